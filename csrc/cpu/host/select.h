// The selection step on the CPU: the sampled classes, sorted, and where each label sits among them.
#pragma once

#include <cstdint>

#include "../../core/selection.h"
#include "parallel.h"

namespace unicom::cpu {

// Calls f with the labels as what they are.
template <class F>
auto with_labels(const Labels& labels, const F& f) {
  if (labels.is_64_bit) return f(static_cast<const int64_t*>(labels.data));
  return f(static_cast<const int32_t*>(labels.data));
}

// Position of the first label that is neither in [0, num_classes) nor `ignore_index`; -1 if none.
int64_t find_bad_label(const Labels&);

// Labels are already checked by find_bad_label. Needs 1 <= count <= num_classes <= kMaxClasses and
// 0 <= start <= stop <= num_classes. The result does not depend on the number of threads.
void select_classes(const ClassSelection&, const Parallel&);

// Returns the position of the first label of the shard that is not in class_index, which ends the
// search; -1 if there is none.
int64_t find_slots(const SlotSearch&);

// 1 <= count <= dim.
void select_features(const FeatureSelection&);

}  // namespace unicom::cpu
