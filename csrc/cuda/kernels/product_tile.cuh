// A block's part of a product, and what becomes of its results, on whichever tile they were made.
#pragma once

#include "device.cuh"
#include "product.h"

namespace unicom::cuda {

// Of rows of P or of the prototypes, those of this chunk that exist.
UNICOM_DEVICE int64_t valid_classes(const Product& a) {
  const int64_t count = a.order.rows(a.count != nullptr ? *a.count : a.bound);
  return min_of(max_of<int64_t>(count - a.first, 0), a.chunk);
}

// The steps of `depth` each that this block sums over.
struct StepRange {
  int64_t first;
  int steps;
};
template <ProductOf kOf>
UNICOM_DEVICE StepRange steps_of_block(const Product& a, int64_t depth) {
  constexpr bool kEmbeddings = kOf == ProductOf::kEmbeddings;
  const int64_t all = (kEmbeddings ? a.chunk : a.rows) / depth;
  const int64_t used = kEmbeddings ? (valid_classes(a) + depth - 1) / depth : all;
  const int64_t length = (all + a.splits - 1) / a.splits;
  const int64_t first = min_of(blockIdx.z * length, used);
  return {first, static_cast<int>(min_of(length, used - first))};
}

// Writes a tile of sums to where this block's are, or adds them. What is there is read row by row
// before any of it is needed: one wait for a row, not for a run.
template <ProductOf kOf, class T>
UNICOM_DEVICE void write_sums(T& tile, const Product& a) {
  using Real = typename T::Real;
  constexpr int kRuns = T::kThreadCols / T::kRun;
  using Run = Pack<Real, T::kRun>;
  const int64_t out_rows = kOf == ProductOf::kEmbeddings ? a.rows : a.chunk;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * T::kRows;
  const int64_t first_col = static_cast<int64_t>(blockIdx.y) * T::kCols;
  Real* out = static_cast<Real*>(a.out) + (blockIdx.z * out_rows + first_row) * a.depth + first_col;
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
}

}  // namespace unicom::cuda
