// What a reduction makes of the samples' losses.
#pragma once

#include <algorithm>

#include "../../core/sampler.h"
#include "../../core/target.h"

namespace unicom::cpu {

inline int64_t count_kept(const int64_t* slot, int64_t batch) {
  int64_t kept = 0;
  for (int64_t i = 0; i < batch; ++i) kept += slot[i] != kIgnoredSlot;
  return kept;
}

// What each sample's loss is multiplied by in the result.
inline double reduction_factor(Reduction reduction, const int64_t* slot, int64_t batch) {
  if (reduction != Reduction::kMean) return 1.0;
  return 1.0 / static_cast<double>(std::max<int64_t>(1, count_kept(slot, batch)));
}

}  // namespace unicom::cpu
