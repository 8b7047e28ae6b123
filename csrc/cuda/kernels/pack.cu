#include "pack.h"

#include <cmath>

#include "rows.cuh"

namespace unicom::cuda {

namespace {

// A warp takes one row: a pass for the norm, in double, and one that writes. The second reads what
// the first brought to the caches.
template <class Unit, class T>
__global__ void pack_rows_kernel(__grid_constant__ const PackRows a) {
  const int64_t row = global_warp();
  if (row >= a.rows) return;
  const int lane = lane_index();
  Unit* out = static_cast<Unit*>(a.unit) + row * a.depth;
  const int64_t count = a.count != nullptr ? *a.count : a.total;
  const int64_t centers = a.order.centers, index = a.order.prototype_at(row);
  double factor = 0;
  int64_t id = 0;
  if (index >= 0 && index < count * centers &&
      (a.positives.slots == nullptr || a.positives.count(row) > 0)) {
    id = row_id(a.ids, index, centers);
    auto squares = [&](double lift) {
      double sum = 0;
      for (int64_t k = lane; k < a.source.dim; k += kWarp) {
        const double x = read_value<T>(a.source, id, k) * lift;
        sum += x * x;
      }
      return warp_sum(sum);
    };
    double sum = squares(1.0), lift = 1;
    if (sizeof(T) == 8 && !(sum > kSmallestSquare && sum < kLargestSquare)) {
      double largest = 0;
      for (int64_t k = lane; k < a.source.dim; k += kWarp)
        largest = max_of(largest, std::fabs(double{read_value<T>(a.source, id, k)}));
      lift = lift_of(warp_max(largest));
      sum = squares(lift);
    }
    factor = sum == 0 ? 0.0 : lift / std::sqrt(sum);
  }
  if (a.inverse_norm != nullptr && lane == 0 && index >= 0) a.inverse_norm[index] = factor;
  if (factor == 0) {
    for (int64_t k = lane; k < a.depth; k += kWarp) out[k] = narrow<Unit>(0.0f);
    return;
  }
  if (a.factor != nullptr) factor *= a.factor[row];
  for (int64_t k = lane; k < a.depth; k += kWarp) {
    const double x = k < a.source.dim ? read_value<T>(a.source, id, k) * factor : 0.0;
    out[k] = narrow<Unit>(x);
  }
}

// A block takes one part, a thread some of its columns.
template <class Unit>
__global__ void sum_parts_kernel(__grid_constant__ const SumRows a) {
  const int64_t rows = (a.rows + kSumParts - 1) / kSumParts;
  const int64_t first = blockIdx.x * rows, end = min_of(first + rows, a.rows);
  const auto* unit = static_cast<const Unit*>(a.unit);
  for (int64_t k = threadIdx.x; k < a.depth; k += kThreads) {
    double sum = 0;
    for (int64_t row = first; row < end; ++row) sum += widen(unit[row * a.depth + k]);
    a.partial[blockIdx.x * a.depth + k] = sum;
  }
}

__global__ void add_parts_kernel(__grid_constant__ const SumRows a) {
  const int64_t k = global_thread();
  if (k >= a.depth) return;
  double sum = 0;
  for (int64_t part = 0; part < kSumParts; ++part) sum += a.partial[part * a.depth + k];
  a.out[k] = sum;
}

}  // namespace

template <class Unit>
void sum_rows(Queue& queue, const SumRows& a) {
  queue.launch(sum_parts_kernel<Unit>, dim3(kSumParts), kThreads, 0, a);
  queue.launch(add_parts_kernel, thread_grid(a.depth), kThreads, 0, a);
}

template <class Unit>
void pack_rows(Queue& queue, const PackRows& a) {
  with_type(a.source.dtype, [&](auto value) {
    queue.launch(pack_rows_kernel<Unit, decltype(value)>, warp_grid(a.rows), kThreads, 0, a);
  });
}

#define UNICOM_INSTANTIATE(Unit)                          \
  template void pack_rows<Unit>(Queue&, const PackRows&); \
  template void sum_rows<Unit>(Queue&, const SumRows&)
UNICOM_INSTANTIATE(float);
UNICOM_INSTANTIATE(double);
UNICOM_INSTANTIATE(Half);
UNICOM_INSTANTIATE(BFloat);
#undef UNICOM_INSTANTIATE

}  // namespace unicom::cuda
