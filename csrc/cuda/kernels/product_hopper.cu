#include "product_hopper.h"

#include "product_tile.cuh"
#include "tile_hopper.cuh"

namespace unicom::cuda {

namespace {

// P's classes are innermost: they are the depth of one product and the rows of the other.
template <class Unit, int kCols, ProductOf kOf>
using HopperProductTile = HopperTile<Unit, kCols, kOf == ProductOf::kEmbeddings, false>;

template <class Unit, int kCols, ProductOf kOf>
__global__ void __launch_bounds__(kHopperThreads, 1)
    product_hopper_kernel(__grid_constant__ const OnHopper<Product> given) {
#ifdef UNICOM_HAS_HOPPER
  using T = HopperProductTile<Unit, kCols, kOf>;
  const Product& a = given.args;
  if constexpr (kOf == ProductOf::kPrototypes) {
    // All blocks of a cluster go or stay.
    const int64_t ranks = given.operands.plan.ranks;
    if (blockIdx.x / ranks * ranks * T::kRows >= valid_classes(a)) return;
  }
  const StepRange range = steps_of_block<kOf>(a, T::kDepth);
  auto source = [&](int) {
    return HopperOrigin{.row = static_cast<int>(blockIdx.x) * T::kRows,
                        .col = static_cast<int>(blockIdx.y) * kCols,
                        .depth = static_cast<int>(range.first) * T::kDepth};
  };
  T::run(given.operands, range.steps > 0 ? 1 : 0, range.steps, source, [&](T& tile) {
    if (range.steps > 0) {
      tile.multiply();
      write_sums<kOf>(tile, a);
    } else if (!a.accumulate) {
      tile.clear();
      write_sums<kOf>(tile, a);
    }
  });
#endif
}

template <class Unit, int kCols, ProductOf kOf>
bool launch_product_on_hopper(Queue& queue, const Product& a) {
  using T = HopperProductTile<Unit, kCols, kOf>;
  constexpr bool kEmbeddings = kOf == ProductOf::kEmbeddings;
  const int64_t out_rows = kEmbeddings ? a.rows : a.chunk;
  OnHopper<Product> given{.args = a, .operands = {}};
  if (!T::make_operands(&given.operands, static_cast<const Unit*>(a.probabilities), out_rows,
                        a.chunk, static_cast<const Unit*>(a.operand), a.depth, a.depth,
                        kEmbeddings ? a.chunk : a.rows))
    return false;
  given.operands.plan = T::plan(queue.shared_limit(), 0, out_rows);
  const dim3 grid(static_cast<unsigned>(out_rows / T::kRows),
                  static_cast<unsigned>(a.depth / kCols), static_cast<unsigned>(a.splits));
  launch_tiles(queue, product_hopper_kernel<Unit, kCols, kOf>, grid, given);
  return true;
}

template <class Unit, ProductOf kOf>
bool launch_product_on_hopper(Queue& queue, const Product& a) {
  if (a.depth % 256 == 0) return launch_product_on_hopper<Unit, 256, kOf>(queue, a);
  if (a.depth % 128 == 0) return launch_product_on_hopper<Unit, 128, kOf>(queue, a);
  return launch_product_on_hopper<Unit, 64, kOf>(queue, a);
}

}  // namespace

template <class Unit>
bool product_on_hopper(Queue& queue, const Product& a) {
  if (!queue.is_hopper()) return false;
  return a.of == ProductOf::kEmbeddings
             ? launch_product_on_hopper<Unit, ProductOf::kEmbeddings>(queue, a)
             : launch_product_on_hopper<Unit, ProductOf::kPrototypes>(queue, a);
}

template bool product_on_hopper<Half>(Queue&, const Product&);
template bool product_on_hopper<BFloat>(Queue&, const Product&);

}  // namespace unicom::cuda
