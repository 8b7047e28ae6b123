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
  double factor = 0;
  int64_t id = 0;
  if (row < count && (a.positives.slots == nullptr || a.positives.count(row) > 0)) {
    id = a.ids != nullptr ? a.ids[row] : row;
    double sum = 0;
    for (int64_t k = lane; k < a.source.dim; k += kWarp) {
      const double x = read_value<T>(a.source, id, k);
      sum += x * x;
    }
    sum = warp_sum(sum);
    factor = sum == 0 ? 0.0 : 1.0 / std::sqrt(sum);
  }
  if (a.inverse_norm != nullptr && lane == 0) a.inverse_norm[row] = factor;
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

}  // namespace

template <class Unit>
void pack_rows(Queue& queue, const PackRows& a) {
  with_type(a.source.dtype, [&](auto value) {
    queue.launch(pack_rows_kernel<Unit, decltype(value)>, warp_grid(a.rows), kThreads, 0, a);
  });
}

template void pack_rows<float>(Queue&, const PackRows&);
template void pack_rows<double>(Queue&, const PackRows&);
template void pack_rows<Half>(Queue&, const PackRows&);
template void pack_rows<BFloat>(Queue&, const PackRows&);

}  // namespace unicom::cuda
