#include "product.h"

#include "tile.cuh"

namespace unicom::cuda {

namespace {

template <class Unit, int kCols, ProductOf kOf>
__global__ void __launch_bounds__(kThreads, 1) product_kernel(__grid_constant__ const Product a) {
  constexpr bool kEmbeddings = kOf == ProductOf::kEmbeddings;
  // P's classes are innermost: they are the depth of one product and the rows of the other.
  using T = Tile<Unit, kCols, kEmbeddings, false>;
  using Real = typename T::Real;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * T::kRows;
  const int64_t first_col = static_cast<int64_t>(blockIdx.y) * kCols;
  const int64_t count = a.order.rows(a.count != nullptr ? *a.count : a.bound);
  const int64_t valid = min_of(max_of<int64_t>(count - a.first, 0), a.chunk);
  if (!kEmbeddings && first_row >= valid) return;

  const int64_t all_steps = (kEmbeddings ? a.chunk : a.rows) / T::kDepth;
  const int64_t used_steps = kEmbeddings ? (valid + T::kDepth - 1) / T::kDepth : all_steps;
  const int64_t steps = (all_steps + a.splits - 1) / a.splits;
  const int64_t begin = min_of(blockIdx.z * steps, used_steps);
  const int64_t end = min_of(begin + steps, used_steps);

  const int64_t out_rows = kEmbeddings ? a.rows : a.chunk;
  Real* out = static_cast<Real*>(a.out) + (blockIdx.z * out_rows + first_row) * a.depth + first_col;
  T tile;
  auto source = [&](int) {
    const int64_t depth = begin * T::kDepth;
    const auto* p = static_cast<const Unit*>(a.probabilities) +
                    (kEmbeddings ? first_row * a.chunk + depth : depth * a.chunk + first_row);
    const auto* operand = static_cast<const Unit*>(a.operand) + depth * a.depth + first_col;
    return OperandPair<Unit>{p, operand, static_cast<int>(a.chunk), static_cast<int>(a.depth)};
  };
  // What is there is read row by row before any of it is needed: one wait for a row, not for a run.
  auto write = [&](int) {
    constexpr int kRuns = T::kThreadCols / T::kRun;
    using Run = Pack<Real, T::kRun>;
#pragma unroll
    for (int i = 0; i < T::kThreadRows; ++i) {
      Real* row = out + tile.row(i) * static_cast<int>(a.depth);
      Run runs[kRuns] = {};
      if (a.accumulate) {
#pragma unroll
        for (int r = 0; r < kRuns; ++r)
          runs[r] = *reinterpret_cast<const Run*>(row + tile.col(r * T::kRun));
      }
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
#pragma unroll
        for (int e = 0; e < T::kRun; ++e) runs[r].values[e] += tile.at(i, r * T::kRun + e);
        *reinterpret_cast<Run*>(row + tile.col(r * T::kRun)) = runs[r];
      }
    }
  };
  if (begin < end) {
    tile.run(a.plan, 1, static_cast<int>(end - begin), source, write);
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
