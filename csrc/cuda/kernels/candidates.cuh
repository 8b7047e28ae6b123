// Lists of candidates, on whichever tile they were found.
#pragma once

#include <cmath>

#include "device.cuh"
#include "nearest.h"

namespace unicom::cuda {

// Keeps of a row's list those above the floor that are of centroids before `end`; how many they are.
// By a warp.
UNICOM_DEVICE int keep_candidates(Candidate* list, int count, float floor, int64_t end) {
  const int lane = lane_index();
  int kept = 0;
  for (int first = 0; first < count; first += kWarp) {
    Candidate candidate{};
    bool keep = false;
    if (first + lane < count) {
      candidate = list[first + lane];
      keep = candidate.score > floor && candidate.index < end;
    }
    const unsigned votes = __ballot_sync(kAllLanes, keep);
    if (keep) list[kept + __popc(votes & ((1u << lane) - 1))] = candidate;
    kept += __popc(votes);
  }
  return kept;
}

// Makes the scores of a tile of its products, and finds the largest of each of the thread's rows.
// bias: that of the tile's first class.
template <class T>
UNICOM_DEVICE void add_bias(T& tile, const float* bias, float (&largest)[T::kThreadRows]) {
#pragma unroll
  for (int i = 0; i < T::kThreadRows; ++i) largest[i] = -INFINITY;
#pragma unroll
  for (int j = 0; j < T::kThreadCols; ++j) {
    const float of_class = bias[tile.col(j)];
#pragma unroll
    for (int i = 0; i < T::kThreadRows; ++i) {
      tile.at(i, j) += of_class;
      largest[i] = larger(largest[i], tile.at(i, j));
    }
  }
}

}  // namespace unicom::cuda
