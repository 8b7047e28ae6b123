#include "product_hopper.h"

#include "product_tile.cuh"
#include "tile_hopper.cuh"

namespace unicom::cuda {

namespace {

// Clusters go through tiles of as many row blocks as they have blocks. Tiles of the same rows are
// neighbours, which clusters take at the same time: P, the larger operand, is read once from memory
// and then from the second-level cache. In a cluster it is the operand that blocks share, of which a
// tile has twice as much.
template <class Unit, int kCols, ProductOf kOf>
__global__ void __launch_bounds__(kHopperThreads, 1)
    product_hopper_kernel(__grid_constant__ const OnHopper<Product> given) {
#ifdef UNICOM_HAS_HOPPER
  constexpr bool kEmbeddings = kOf == ProductOf::kEmbeddings;
  using T = HopperTile<Unit, kCols, kEmbeddings, false>;
  const Product& a = given.args;
  const int64_t part = blockIdx.y;
  const StepRange steps = steps_of_part<T, kOf>(a, part);
  if (steps.count == 0 && a.accumulate) return;

  const int ranks = given.operands.plan.ranks;
  const int rank = static_cast<int>(blockIdx.x) % ranks;
  const int cluster = static_cast<int>(blockIdx.x) / ranks;
  const int clusters = static_cast<int>(gridDim.x) / ranks;
  // A tile of probabilities is written as a whole, and holds all rows of a cluster's tile.
  const int64_t rows = kEmbeddings ? a.rows : class_count(a);
  const int64_t cluster_rows = ranks * T::kRows;
  const int col_tiles = static_cast<int>(a.depth / kCols);
  const int all = static_cast<int>((rows + cluster_rows - 1) / cluster_rows) * col_tiles;
  const int tiles = (max_of(all - cluster, 0) + clusters - 1) / clusters;
  // Where this block's tile t begins.
  auto row = [=](int t) {
    return ((cluster + t * clusters) / col_tiles * ranks + rank) * T::kRows;
  };
  auto col = [=](int t) { return (cluster + t * clusters) % col_tiles * kCols; };
  auto out = [&](int t) { return out_of_part<T, kOf>(a, part, row(t), col(t)); };
  if (steps.count == 0) {
    for (int t = 0; t < tiles; ++t)
      for (int i = static_cast<int>(threadIdx.x); i < T::kRows * kCols; i += kHopperThreads)
        out(t)[i / kCols * a.depth + i % kCols] = 0;
    return;
  }
  auto source = [=](int t) {
    const int depth = static_cast<int>(steps.first) * T::kDepth;
    return HopperOrigin{.row = row(t), .col = col(t), .depth = depth};
  };
  T::run(given.operands, tiles, steps.count, source, [&](T& tile) {
    for (int t = 0; t < tiles; ++t) {
      tile.multiply();
      write_sums(tile, out(t), a);
    }
  });
#endif
}

template <class Unit, int kCols, ProductOf kOf>
bool launch_on_hopper(Queue& queue, const Product& a) {
  constexpr bool kEmbeddings = kOf == ProductOf::kEmbeddings;
  using T = HopperTile<Unit, kCols, kEmbeddings, false>;
  OnHopper<Product> given{.args = a, .operands = {}};
  const int64_t rows = kEmbeddings ? a.rows : a.chunk, depth = kEmbeddings ? a.chunk : a.rows;
  if (!T::make_operands(&given.operands, static_cast<const Unit*>(a.probabilities), rows, a.chunk,
                        static_cast<const Unit*>(a.operand), a.depth, a.depth, depth))
    return false;
  HopperPlan& plan = given.operands.plan;
  plan = T::plan(queue.shared_limit(), 0, rows);
  // One block on each multiprocessor, for all parts of the sum together.
  const int64_t tiles = rows / (plan.ranks * T::kRows) * (a.depth / kCols);
  const int64_t at_once = queue.multiprocessors() / (plan.ranks * a.splits);
  const int64_t clusters = min_of(tiles, max_of<int64_t>(at_once, 1));
  const dim3 grid(static_cast<unsigned>(clusters * plan.ranks), static_cast<unsigned>(a.splits));
  launch_tiles(queue, product_hopper_kernel<Unit, kCols, kOf>, grid, given);
  return true;
}

template <class Unit, ProductOf kOf>
bool launch_on_hopper(Queue& queue, const Product& a) {
  if (a.depth % 256 == 0) return launch_on_hopper<Unit, 256, kOf>(queue, a);
  if (a.depth % 128 == 0) return launch_on_hopper<Unit, 128, kOf>(queue, a);
  return launch_on_hopper<Unit, 64, kOf>(queue, a);
}

}  // namespace

template <class Unit>
bool product_on_hopper(Queue& queue, const Product& a) {
  if (!queue.is_hopper()) return false;
  return a.of == ProductOf::kEmbeddings ? launch_on_hopper<Unit, ProductOf::kEmbeddings>(queue, a)
                                        : launch_on_hopper<Unit, ProductOf::kPrototypes>(queue, a);
}

template bool product_on_hopper<Half>(Queue&, const Product&);
template bool product_on_hopper<BFloat>(Queue&, const Product&);

}  // namespace unicom::cuda
