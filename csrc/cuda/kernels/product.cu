#include "product.h"

#include "product_hopper.h"
#include "product_tile.cuh"
#include "tile.cuh"

namespace unicom::cuda {

namespace {

template <class Unit, int kCols, ProductOf kOf>
__global__ void __launch_bounds__(kThreads, 1) product_kernel(__grid_constant__ const Product a) {
  constexpr bool kEmbeddings = kOf == ProductOf::kEmbeddings;
  // P's classes are innermost: they are the depth of one product and the rows of the other.
  using T = Tile<Unit, kCols, kEmbeddings, false>;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * T::kRows;
  const int64_t first_col = static_cast<int64_t>(blockIdx.y) * kCols;
  if (!kEmbeddings && first_row >= class_count(a)) return;

  const StepRange steps = steps_of_part<T, kOf>(a, blockIdx.z);
  T tile;
  auto source = [&](int) {
    const int64_t depth = steps.first * T::kDepth;
    const auto* p = static_cast<const Unit*>(a.probabilities) +
                    (kEmbeddings ? first_row * a.chunk + depth : depth * a.chunk + first_row);
    const auto* operand = static_cast<const Unit*>(a.operand) + depth * a.depth + first_col;
    return OperandPair<Unit>{p, operand, static_cast<int>(a.chunk), static_cast<int>(a.depth)};
  };
  auto write = [&](int) {
    write_sums(tile, out_of_part<T, kOf>(a, blockIdx.z, first_row, first_col), a);
  };
  if (steps.count > 0) {
    tile.run(a.plan, 1, steps.count, source, write);
  } else if (!a.accumulate) {
    tile.clear();
    write(0);
  }
}

template <class Unit, int kCols, ProductOf kOf>
void launch(Queue& queue, const Product& given) {
  using T = Tile<Unit, kCols, kOf == ProductOf::kEmbeddings, false>;
  Product a = given;
  a.plan = T::plan(queue.shared_limit(), 0);
  const int64_t out_rows = kOf == ProductOf::kEmbeddings ? a.rows : a.chunk;
  const dim3 grid(static_cast<unsigned>(out_rows / T::kRows),
                  static_cast<unsigned>(a.depth / kCols), static_cast<unsigned>(a.splits));
  queue.launch(product_kernel<Unit, kCols, kOf>, grid, kThreads, a.plan.bytes, a);
}

template <class Unit, ProductOf kOf>
void launch(Queue& queue, const Product& a) {
  if constexpr (UnitTraits<Unit>::kTensorCores) {
    if (a.depth % 256 == 0) return launch<Unit, 256, kOf>(queue, a);
  }
  if constexpr (sizeof(Unit) <= 4) {
    if (a.depth % 128 == 0) return launch<Unit, 128, kOf>(queue, a);
  }
  launch<Unit, 64, kOf>(queue, a);
}

}  // namespace

template <class Unit>
void product(Queue& queue, const Product& a) {
  if constexpr (UnitTraits<Unit>::kTensorCores) {
    if (product_on_hopper<Unit>(queue, a)) return;
  }
  if (a.of == ProductOf::kEmbeddings)
    launch<Unit, ProductOf::kEmbeddings>(queue, a);
  else
    launch<Unit, ProductOf::kPrototypes>(queue, a);
}

template void product<float>(Queue&, const Product&);
template void product<double>(Queue&, const Product&);
template void product<Half>(Queue&, const Product&);
template void product<BFloat>(Queue&, const Product&);

}  // namespace unicom::cuda
