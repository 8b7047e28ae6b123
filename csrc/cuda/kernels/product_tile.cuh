// What blocks do for a product, on whichever tile.
#pragma once

#include "device.cuh"
#include "product.h"

namespace unicom::cuda {

// Classes of the chunk that are there.
UNICOM_DEVICE int64_t class_count(const Product& a) {
  const int64_t count = a.order.rows(a.count != nullptr ? *a.count : a.bound);
  return min_of(max_of<int64_t>(count - a.first, 0), a.chunk);
}

// Where one part of the sum lies in it, in steps. Its classes end at the count.
struct StepRange {
  int64_t first;
  int count;
};
template <class T, ProductOf kOf>
UNICOM_DEVICE StepRange steps_of_part(const Product& a, int64_t part) {
  constexpr bool kEmbeddings = kOf == ProductOf::kEmbeddings;
  const int64_t all = (kEmbeddings ? a.chunk : a.rows) / T::kDepth;
  const int64_t used = kEmbeddings ? (class_count(a) + T::kDepth - 1) / T::kDepth : all;
  const int64_t steps = (all + a.splits - 1) / a.splits;
  const int64_t first = min_of(part * steps, used);
  return {first, static_cast<int>(min_of(steps, used - first))};
}

// Where the results of one part of the sum belong, from (row, col) on.
template <class T, ProductOf kOf>
UNICOM_DEVICE typename T::Real* out_of_part(const Product& a, int64_t part, int64_t row,
                                            int64_t col) {
  const int64_t rows = kOf == ProductOf::kEmbeddings ? a.rows : a.chunk;
  return static_cast<typename T::Real*>(a.out) + (part * rows + row) * a.depth + col;
}

// Writes a tile's results, or adds them to what is there, which is read row by row before any of it
// is needed: one wait for a row, not for a run.
template <class T>
UNICOM_DEVICE void write_sums(T& tile, typename T::Real* out, const Product& a) {
  constexpr int kRuns = T::kThreadCols / T::kRun;
  using Run = Pack<typename T::Real, T::kRun>;
#pragma unroll
  for (int i = 0; i < T::kThreadRows; ++i) {
    auto* row = out + tile.row(i) * static_cast<int>(a.depth);
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
