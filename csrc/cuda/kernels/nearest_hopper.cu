#include "nearest_hopper.h"

#include <cmath>

#include "candidates.cuh"
#include "logit_tile.cuh"
#include "tile_hopper.cuh"

namespace unicom::cuda {

namespace {

using HopperSearchTile = HopperTile<Half, kClassGranule, true, true>;

// What a warp knows of its rows, which no other warp has a part of; the same on the four lanes that
// share a row.
template <class T>
class FoundCandidates {
 public:
  UNICOM_DEVICE FoundCandidates(const T& tile, const FindCandidates& a, int64_t first_row)
      : bias_(a.packed.bias),
        lists_(a.candidate +
               (blockIdx.y * a.padded + first_row + tile.row(0) - lane_index() / 4) * kCandidates) {
#pragma unroll
    for (int i = 0; i < T::kThreadRows; ++i) {
      floor_[i] = a.floor[first_row + tile.row(i)];
      window_[i] = a.window[first_row + tile.row(i)];
      count_[i] = 0;
    }
  }

  // The products of a tile, which are changed. Which candidates remain does not depend on the order
  // in which lanes find them: floors rise first, then what is above them is taken.
  UNICOM_DEVICE void add(T& tile, int64_t first_class) {
    float best[T::kThreadRows];
    add_bias(tile, bias_ + first_class, best);
    bool found = false;
#pragma unroll
    for (int i = 0; i < T::kThreadRows; ++i) {
      best[i] = larger(best[i], __shfl_xor_sync(kAllLanes, best[i], 1));
      best[i] = larger(best[i], __shfl_xor_sync(kAllLanes, best[i], 2));
      const bool above = best[i] > floor_[i];
      if (above) floor_[i] = larger(floor_[i], best[i] - window_[i]);
      found |= above;
    }
    if (__ballot_sync(kAllLanes, found) == 0) return;
#pragma unroll
    for (int i = 0; i < T::kThreadRows; ++i) take(tile, i, first_class);
  }

  UNICOM_DEVICE int count(int i) const { return count_[i]; }

 private:
  // Of the rows i of the lanes.
  UNICOM_DEVICE void take(T& tile, int i, int64_t first_class) {
    const int lane = lane_index();
    int mine = 0;
#pragma unroll
    for (int j = 0; j < T::kThreadCols; ++j) mine += tile.at(i, j) > floor_[i] ? 1 : 0;
    const int neighbour = __shfl_xor_sync(kAllLanes, mine, 1);
    const int others = __shfl_xor_sync(kAllLanes, mine + neighbour, 2);
    const int all = mine + neighbour + others;
    const bool full = all > 0 && count_[i] + all > kCandidates;
    const unsigned fulls = __ballot_sync(kAllLanes, full);
    if (fulls != 0) clear_full_lists(i, fulls, first_class);
    int place = count_[i] + (lane % 2 != 0 ? neighbour : 0) + (lane % 4 >= 2 ? others : 0);
    count_[i] += all;
    if (count_[i] > kCandidates) floor_[i] = INFINITY;
    Candidate* list = list_of(i, lane / 4);
#pragma unroll
    for (int j = 0; j < T::kThreadCols; ++j)
      if (tile.at(i, j) > floor_[i])
        list[place++] = {tile.at(i, j), static_cast<int32_t>(first_class) + tile.col(j)};
  }

  // Takes what is no longer above the floor out of the lists of rows i that are full. The floor has
  // risen since their first candidates came.
  UNICOM_DEVICE void clear_full_lists(int i, unsigned fulls, int64_t first_class) {
    __syncwarp();
    for (int r = 0; r < kWarp / 4; ++r) {
      if ((fulls >> 4 * r & 1) == 0) continue;
      const int count = __shfl_sync(kAllLanes, count_[i], 4 * r);
      const float floor = __shfl_sync(kAllLanes, floor_[i], 4 * r);
      const int kept = keep_candidates(list_of(i, r), count, floor, first_class);
      if (lane_index() / 4 == r) count_[i] = kept;
    }
    __syncwarp();
  }

  UNICOM_DEVICE Candidate* list_of(int i, int r) const {
    return lists_ + (8 * i + r) * kCandidates;
  }

  const float* bias_;
  Candidate* lists_;  // of the warp's rows
  float floor_[T::kThreadRows], window_[T::kThreadRows];
  int count_[T::kThreadRows];
};

// One block of rows against one run of centroids.
__global__ void __launch_bounds__(kHopperThreads, 1)
    find_candidates_hopper_kernel(__grid_constant__ const OnHopper<FindCandidates> given) {
#ifdef UNICOM_HAS_HOPPER
  using T = HopperSearchTile;
  const FindCandidates& a = given.args;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * T::kRows;
  const TileRun run = run_of_block<T::kCols>(a.packed.classes, a.runs);
  T::run(
      given.operands, run.tiles, static_cast<int>(a.packed.depth / T::kDepth),
      [=](int t) {
        return HopperOrigin{.row = static_cast<int>(first_row),
                            .col = (static_cast<int>(run.first) + t) * T::kCols,
                            .depth = 0};
      },
      [&](T& tile) {
        FoundCandidates<T> found(tile, a, first_row);
        for (int t = 0; t < run.tiles; ++t) {
          tile.multiply();
          found.add(tile, (run.first + t) * T::kCols);
        }
        int32_t* count = a.count + blockIdx.y * a.padded + first_row;
#pragma unroll
        for (int i = 0; i < T::kThreadRows; ++i)
          if (lane_index() % 4 == 0) count[tile.row(i)] = found.count(i);
      });
#endif
}

}  // namespace

bool find_candidates_on_hopper(Queue& queue, const FindCandidates& a) {
  using T = HopperSearchTile;
  if (!queue.is_hopper()) return false;
  OnHopper<FindCandidates> given{.args = a, .operands = {}};
  const int64_t depth = a.packed.depth;
  if (!T::make_operands(&given.operands, a.rows, a.padded, depth, a.packed.unit, a.packed.classes,
                        depth, depth))
    return false;
  given.operands.plan = T::plan(queue.shared_limit(), depth / T::kDepth, a.padded);
  const dim3 grid(static_cast<unsigned>(a.padded / T::kRows), static_cast<unsigned>(a.runs));
  launch_tiles(queue, find_candidates_hopper_kernel, grid, given);
  return true;
}

}  // namespace unicom::cuda
