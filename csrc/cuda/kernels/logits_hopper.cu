#include "logits_hopper.h"

#include "logit_tile.cuh"
#include "tile_hopper.cuh"

namespace unicom::cuda {

namespace {

template <class Unit>
using HopperLogitTile = HopperTile<Unit, kClassCols<Unit>, true, true>;

// A block's rows against the tiles of classes from `first_class` on.
template <class T>
UNICOM_DEVICE auto class_tiles_from(int64_t first_class) {
  return [=](int tile) {
    return HopperOrigin{.row = static_cast<int>(blockIdx.x) * T::kRows,
                        .col = static_cast<int>(first_class) + tile * T::kCols,
                        .depth = 0};
  };
}

// One block of rows against one run of classes.
template <class Unit>
__global__ void __launch_bounds__(kHopperThreads, 1)
    sum_exp_hopper_kernel(__grid_constant__ const OnHopper<SumExp> given) {
#ifdef UNICOM_HAS_HOPPER
  using T = HopperLogitTile<Unit>;
  const SumExp& a = given.args;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * T::kRows;
  const int64_t count = row_count(a.logits);
  const TileRun run = run_of_block<T::kCols>(count, a.runs);
  const int64_t first_class = run.first * T::kCols;
  T::run(given.operands, run.tiles, static_cast<int>(a.logits.depth / T::kDepth),
         class_tiles_from<T>(first_class), [&](T& tile) {
           RunningSums<Unit, T> sums(a.logits);
           for (int t = 0; t < run.tiles; ++t) {
             tile.multiply();
             mask_tile(tile, a.logits, first_row, first_class + int64_t{t} * T::kCols, count);
             sums.add(tile);
           }
           auto* out = static_cast<RowSum<float>*>(a.out) + blockIdx.y * a.logits.rows + first_row;
#pragma unroll
           for (int i = 0; i < T::kThreadRows; ++i) {
             const RowSum<float> total = sums.of_four_lanes(i);
             if (lane_index() % 4 == 0) out[tile.row(i)] = total;
           }
         });
#endif
}

// The classes of the chunk up to the tile of the last: nobody reads what lies behind it.
template <class Unit>
__global__ void __launch_bounds__(kHopperThreads, 1)
    probabilities_hopper_kernel(__grid_constant__ const OnHopper<Probabilities> given) {
#ifdef UNICOM_HAS_HOPPER
  using T = HopperLogitTile<Unit>;
  const Probabilities& a = given.args;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * T::kRows;
  const int64_t count = row_count(a.logits);
  const TileRun run = run_of_block<T::kCols>(min_of(count - a.first, a.chunk), a.runs);
  const int64_t first = run.first * T::kCols;  // within the chunk
  T::run(given.operands, run.tiles, static_cast<int>(a.logits.depth / T::kDepth),
         class_tiles_from<T>(a.first + first), [&](T& tile) {
           const Probability<Unit> probability(a.logits);
           RowScale<float> scale[T::kThreadRows];
#pragma unroll
           for (int i = 0; i < T::kThreadRows; ++i)
             scale[i] = static_cast<const RowScale<float>*>(a.row)[first_row + tile.row(i)];
           for (int t = 0; t < run.tiles; ++t) {
             tile.multiply();
             const int64_t begin = first + int64_t{t} * T::kCols;
             mask_tile(tile, a.logits, first_row, a.first + begin, count);
             tile.store(static_cast<Unit*>(a.out) + first_row * a.chunk + begin, a.chunk,
                        [&](int i, float c) { return probability(c, scale[i]); });
           }
         });
#endif
}

template <class Unit, class Args>
bool launch_on_hopper(Queue& queue, void (*kernel)(OnHopper<Args>), const Args& args) {
  using T = HopperLogitTile<Unit>;
  const Logits& a = args.logits;
  if (!queue.is_hopper() || a.order.centers > 1) return false;
  OnHopper<Args> given{.args = args, .operands = {}};
  if (!T::make_operands(&given.operands, static_cast<const Unit*>(a.embeddings), a.rows, a.depth,
                        static_cast<const Unit*>(a.prototypes), a.classes, a.depth, a.depth))
    return false;
  given.operands.plan = T::plan(queue.shared_limit(), a.depth / T::kDepth, a.rows);
  const dim3 grid(static_cast<unsigned>(a.rows / T::kRows), static_cast<unsigned>(args.runs));
  launch_tiles(queue, kernel, grid, given);
  return true;
}

}  // namespace

template <class Unit>
bool sum_exp_on_hopper(Queue& queue, const SumExp& a) {
  return launch_on_hopper<Unit>(queue, sum_exp_hopper_kernel<Unit>, a);
}

template <class Unit>
bool probabilities_on_hopper(Queue& queue, const Probabilities& a) {
  return launch_on_hopper<Unit>(queue, probabilities_hopper_kernel<Unit>, a);
}

#define UNICOM_INSTANTIATE(Unit)                                \
  template bool sum_exp_on_hopper<Unit>(Queue&, const SumExp&); \
  template bool probabilities_on_hopper<Unit>(Queue&, const Probabilities&)
UNICOM_INSTANTIATE(Half);
UNICOM_INSTANTIATE(BFloat);
#undef UNICOM_INSTANTIATE

}  // namespace unicom::cuda
