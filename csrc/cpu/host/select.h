// The selection step on the CPU: the sampled classes, sorted, and where each label sits among them.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace unicom {

// Position of the first label that is neither in [0, num_classes) nor `ignore_index`; -1 if none.
template <class Label>
int64_t find_bad_label(const Label* labels, int64_t batch, int64_t num_classes,
                       int64_t ignore_index);

// The part in [start, stop) of the selection of `count` classes for (seed, step, labels).
//   labels       [batch] of the global batch, already checked by find_bad_label
//   class_index  [selection_bound] receives the selected ids in increasing order
//   slot         [batch] receives each label's position in class_index, kIgnoredSlot for a label
//                that is ignored, kElsewhereSlot for one outside [start, stop)
// Returns the number of ids written. Needs 1 <= count <= num_classes <= kMaxClasses and
// 0 <= start <= stop <= num_classes. The result does not depend on the number of threads.
template <class Label>
int64_t select_classes(const Label* labels, int64_t batch, int64_t num_classes, int64_t count,
                       int64_t seed, int64_t step, int64_t ignore_index, int64_t start,
                       int64_t stop, int64_t* class_index, int64_t* slot, const Parallel& parallel);

// `count` of the feature dimensions [0, dim), in increasing order. 1 <= count <= dim.
void select_features(int64_t dim, int64_t count, int64_t seed, int64_t step, int64_t* out);

}  // namespace unicom
