#include "unit_sums.h"

#include <algorithm>
#include <bit>

#include "buffers.h"
#include "plan.h"

namespace unicom::cpu {

namespace {

// sum += factor * row, each product rounded to a whole number; a negative factor takes away what
// its opposite has added. Adding kWhole leaves the number in the last digits.
void add_row(const float* row, int64_t dim, double factor, int64_t* sum) {
  constexpr double kWhole = 0x1.8p52;
  for (int64_t k = 0; k < dim; ++k)
    sum[k] += std::bit_cast<int64_t>(factor * static_cast<double>(row[k]) + kWhole) -
              std::bit_cast<int64_t>(kWhole);
}

}  // namespace

void add_unit_rows(const AddUnitRows& a, const Parallel& parallel) {
  const int64_t dim = a.rows.dim;
  Buffer<int64_t> moved(a.rows.count);
  int64_t moves = 0;
  for (int64_t i = 0; i < a.rows.count; ++i)
    if (a.index[i] != a.from(i)) moved[moves++] = i;
  // Each item has a range of the sums to itself.
  const int64_t items = std::min<int64_t>(a.num_sums, 4 * parallel.threads());
  parallel.run(items, [&](int64_t item) {
    const int64_t begin = a.num_sums * item / items, end = a.num_sums * (item + 1) / items;
    const auto is_own = [&](int64_t j) { return j >= begin && j < end; };
    for (int64_t m = 0; m < moves; ++m) {
      const int64_t i = moved[m], from = a.from(i), to = a.index[i];
      if (!is_own(from) && !is_own(to)) continue;
      const float* row = a.rows[i];
      const double scale = scale_of_row(kernels_for<float>().dot(row, row, dim), a.shift);
      if (scale == 0) continue;
      if (is_own(from)) {
        add_row(row, dim, -scale, a.sums + from * dim);
        --a.counts[from];
      }
      if (is_own(to)) {
        add_row(row, dim, scale, a.sums + to * dim);
        ++a.counts[to];
      }
    }
  });
}

void directions(const Directions& a, const Parallel& parallel) {
  constexpr int64_t kRowsPerItem = 64;
  parallel.run(ceil_div(a.count, kRowsPerItem), [&](int64_t item) {
    Buffer<double> sum(a.dim);
    const int64_t end = std::min(a.count, (item + 1) * kRowsPerItem);
    for (int64_t j = item * kRowsPerItem; j < end; ++j) {
      for (int64_t k = 0; k < a.dim; ++k) sum[k] = static_cast<double>(a.sums[j * a.dim + k]);
      const double norm = std::sqrt(kernels_for<double>().dot(sum.get(), sum.get(), a.dim));
      for (int64_t k = 0; k < a.dim; ++k)
        a.out[j * a.dim + k] = norm > 0 ? static_cast<float>(sum[k] / norm) : 0.0f;
    }
  });
}

}  // namespace unicom::cpu
