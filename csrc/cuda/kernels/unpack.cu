#include "unpack.h"

#include "rows.cuh"

namespace unicom::cuda {

namespace {

// What makes sums by probabilities of a row's sums.
template <class Unit>
UNICOM_DEVICE double factor_of_parts(const Unpack& a, int64_t row) {
  if (a.part_exponent == nullptr) return 1.0 / UnitTraits<Unit>::kProbabilityScale;
  const SampleState state = a.states.sample(row);
  const double power = a.part_exponent[row] - state.exponent;
  return std::ldexp(state.factor, static_cast<int>(min_of(max_of(power, -3000.0), 3000.0)));
}

// The sum of one value's parts, in their order.
template <class Unit>
UNICOM_DEVICE double total_at(const Unpack& a, double factor, int64_t row, int64_t k) {
  using Real = RealOf<Unit>;
  const Real* part = static_cast<const Real*>(a.partial) + row * a.depth + k;
  double total = 0;
  for (int64_t z = 0; z < a.splits; ++z) total += part[z * a.split_stride];
  return total * factor;
}

template <class Unit>
UNICOM_DEVICE double unit_at(const Unpack& a, int64_t row, int64_t k) {
  return widen(static_cast<const Unit*>(a.unit)[row * a.depth + k]);
}

// A warp takes one row: a pass for the projection, one that writes.
template <class Unit>
UNICOM_DEVICE double projection(const Unpack& a, double factor, int64_t row) {
  double dot = 0;
  for (int64_t k = lane_index(); k < a.sink.dim; k += kWarp)
    dot += total_at<Unit>(a, factor, row, k) * unit_at<Unit>(a, row, k);
  return warp_sum(dot);
}

template <class Unit>
__global__ void unpack_embeddings_kernel(__grid_constant__ const Unpack a) {
  const int64_t i = global_warp();
  if (i >= a.batch) return;
  if (a.positives.count(i) == 0) {
    if (a.radial != nullptr) a.radial[i] = 0;
    return;
  }
  const double of_parts = factor_of_parts<Unit>(a, i);
  const double dot = projection<Unit>(a, of_parts, i);
  if (a.radial != nullptr) a.radial[i] = a.states.sample(i).push * dot;
  if (a.sink.data == nullptr) return;
  const double x_inverse = a.row_inverse_norm[i];
  const double factor = a.negative_weight[i] * x_inverse;
  const int64_t width = a.positives.width;
  const double smooth = a.smooth_weight != nullptr ? a.smooth_weight[i] : 0.0;
  double class_sum = 0;  // along the embedding
  if (smooth != 0) {
    for (int64_t k = lane_index(); k < a.sink.dim; k += kWarp)
      class_sum += a.class_sum[k] * read_any(a.embeddings, i, k) * x_inverse;
    class_sum = warp_sum(class_sum);
  }
  for (int64_t k = lane_index(); k < a.sink.dim; k += kWarp) {
    double value = factor * (total_at<Unit>(a, of_parts, i, k) - dot * unit_at<Unit>(a, i, k));
    if (smooth != 0)
      value -= smooth * x_inverse *
               (a.class_sum[k] - class_sum * (read_any(a.embeddings, i, k) * x_inverse));
    for (int64_t p = 0; p < width; ++p) {
      const int64_t slot = a.positives.of(i)[p], positive = i * width + p;
      if (slot < 0) continue;
      const int64_t id = a.by_sample ? positive : row_id(a.class_index, slot, a.order.centers);
      value -= (a.target_weight[positive] - smooth) * x_inverse *
               (read_any(a.prototypes, id, k) * a.class_inverse_norm[slot] -
                a.states.positive(i, p).cosine * (read_any(a.embeddings, i, k) * x_inverse));
    }
    write_any(a.sink, i, k, value);
  }
}

template <class T>
__global__ void copy_targets_kernel(__grid_constant__ const CopyTargets a) {
  const int64_t i = global_warp();
  if (i >= a.count || a.slots[i] < 0) return;
  const int64_t id = row_id(a.class_index, a.slots[i], a.centers);
  const T* row = static_cast<const T*>(a.prototypes.data) + id * a.prototypes.row_stride;
  T* out = static_cast<T*>(a.out) + i * a.prototypes.dim;
  for (int64_t k = lane_index(); k < a.prototypes.dim; k += kWarp)
    out[k] = row[a.prototypes.columns != nullptr ? a.prototypes.columns[k] : k];
}

template <class Unit>
__global__ void unpack_prototypes_kernel(__grid_constant__ const UnpackPrototypes p) {
  const Unpack& a = p.common;
  const int64_t row = global_warp();                         // within the chunk
  const int64_t slot = a.order.prototype_at(p.first + row);  // and centre
  const int64_t count = (p.count != nullptr ? *p.count : p.bound) * a.order.centers;
  if (row >= p.chunk || slot < 0 || slot >= count) return;

  const int64_t width = a.positives.width, positives = a.batch * width;
  const int64_t* slots = a.positives.slots;
  int64_t first = 0;  // of those with this prototype
  for (int64_t high = positives; first < high;) {
    const int64_t middle = (first + high) / 2;
    if (slots[p.by_slot[middle]] < slot)
      first = middle + 1;
    else
      high = middle;
  }
  const int64_t id = row_id(a.class_index, slot, a.order.centers);
  const bool smooths = a.smooth_weight != nullptr;
  const double of_parts = factor_of_parts<Unit>(a, row);
  const double dot = projection<Unit>(a, of_parts, row);
  const double w_inverse = a.class_inverse_norm[slot];
  double smooth_dot = 0;
  for (int64_t k = lane_index(); k < a.sink.dim && smooths; k += kWarp)
    smooth_dot += a.smooth_sum[k] * unit_at<Unit>(a, row, k);
  if (smooths) smooth_dot = warp_sum(smooth_dot);
  for (int64_t k = lane_index(); k < a.sink.dim; k += kWarp) {
    double value = *p.fold * w_inverse *
                   (total_at<Unit>(a, of_parts, row, k) - dot * unit_at<Unit>(a, row, k));
    if (smooths) value -= w_inverse * (a.smooth_sum[k] - smooth_dot * unit_at<Unit>(a, row, k));
    for (int64_t s = first; s < positives && slots[p.by_slot[s]] == slot; ++s) {
      const int64_t positive = p.by_slot[s], i = positive / width;
      if (a.positives.any_invalid(i)) continue;
      const double smooth = smooths ? a.smooth_weight[i] : 0.0;
      value -= (a.target_weight[positive] - smooth) * w_inverse *
               (read_any(a.embeddings, i, k) * a.row_inverse_norm[i] -
                a.states.positive(i, positive % width).cosine *
                    (read_any(a.prototypes, id, k) * w_inverse));
    }
    write_any(a.sink, p.compact ? slot - p.sink_first : id, k, value);
  }
}

}  // namespace

template <class Unit>
void unpack_embeddings(Queue& queue, const Unpack& a) {
  queue.launch(unpack_embeddings_kernel<Unit>, warp_grid(a.batch), kThreads, 0, a);
}
void copy_targets(Queue& queue, const CopyTargets& a) {
  with_type(a.prototypes.dtype, [&](auto value) {
    queue.launch(copy_targets_kernel<decltype(value)>, warp_grid(a.count), kThreads, 0, a);
  });
}
template <class Unit>
void unpack_prototypes(Queue& queue, const UnpackPrototypes& a) {
  queue.launch(unpack_prototypes_kernel<Unit>, warp_grid(a.chunk), kThreads, 0, a);
}

#define UNICOM_INSTANTIATE(Unit)                                \
  template void unpack_embeddings<Unit>(Queue&, const Unpack&); \
  template void unpack_prototypes<Unit>(Queue&, const UnpackPrototypes&)
UNICOM_INSTANTIATE(float);
UNICOM_INSTANTIATE(double);
UNICOM_INSTANTIATE(Half);
UNICOM_INSTANTIATE(BFloat);
#undef UNICOM_INSTANTIATE

}  // namespace unicom::cuda
