// What a reduction makes of the samples' losses.
#pragma once

#include <algorithm>

#include "../../core/target.h"

namespace unicom::cpu {

inline int64_t count_kept(const Positives& positives, int64_t batch) {
  int64_t kept = 0;
  for (int64_t i = 0; i < batch; ++i) kept += positives.count(i) > 0;
  return kept;
}

// What each sample's loss is multiplied by in the result.
inline double reduction_factor(Reduction reduction, const Positives& positives, int64_t batch) {
  if (reduction != Reduction::kMean) return 1.0;
  return 1.0 / static_cast<double>(std::max<int64_t>(1, count_kept(positives, batch)));
}

}  // namespace unicom::cpu
