#include "samples.h"

#include <cmath>

#include "logit_tile.cuh"
#include "rows.cuh"

namespace unicom::cuda {

namespace {

constexpr int kWideThreads = 1024;  // of kernels that run in one block

// The cosine of a sample with the nearest centre of the class in a slot, of equals the first; the
// same on all lanes of a warp.
struct NearestCenter {
  double cosine;
  int64_t prototype;  // slot * centers + centre
};
template <class Call>
UNICOM_DEVICE NearestCenter nearest_center(const Call& a, int64_t sample, int64_t slot) {
  NearestCenter best{0, slot * a.centers};
  const double x_inverse = a.row_inverse_norm[sample];
  for (int64_t index = slot * a.centers; index < (slot + 1) * a.centers; ++index) {
    const int64_t id = row_id(a.class_index, index, a.centers);
    const double w_inverse = a.class_inverse_norm[index];
    double cosine = 0;
    for (int64_t k = lane_index(); k < a.embeddings.dim; k += kWarp)
      cosine += read_any(a.embeddings, sample, k) * x_inverse *
                (read_any(a.prototypes, id, k) * w_inverse);
    cosine = warp_sum(cosine);
    if (index == slot * a.centers || is_nearer(cosine, best.cosine)) best = {cosine, index};
  }
  return best;
}

// A warp takes one sample.
__global__ void find_centers_kernel(__grid_constant__ const FindCenters a) {
  const int64_t i = global_warp();
  if (i >= a.batch) return;
  const bool counted = a.positives.count(i) > 0;
  for (int64_t p = 0; p < a.positives.width; ++p) {
    const int64_t slot = a.positives.of(i)[p];
    const int64_t found = slot < 0  ? slot
                          : counted ? nearest_center(a, i, slot).prototype
                                    : slot * a.centers;
    if (lane_index() == 0) a.prototype[i * a.positives.width + p] = found;
  }
}

// A warp takes one sample.
template <class Real>
__global__ void finish_sums_kernel(__grid_constant__ const FinishSums a) {
  const int64_t i = global_warp();
  if (i >= a.batch) return;
  const int lane = lane_index();
  const bool counted = a.positives.count(i) > 0;
  Negatives negatives{};
  const bool smooths = a.class_sum != nullptr;
  if (smooths && counted) {
    for (int64_t k = lane; k < a.embeddings.dim; k += kWarp)
      negatives.cosines += read_any(a.embeddings, i, k) * a.row_inverse_norm[i] * a.class_sum[k];
    negatives.cosines = warp_sum(negatives.cosines);
    negatives.count = static_cast<double>(a.count != nullptr ? *a.count : a.bound);
  }
  for (int64_t p = 0; p < a.positives.width; ++p) {
    const int64_t slot = a.positives.of(i)[p];
    double cosine = 0;
    if (counted && slot >= 0) {
      cosine = nearest_center(a, i, slot).cosine;
      negatives.count -= 1;
      negatives.cosines -= cosine;
    }
    if (lane == 0) a.out.cosines(i)[p] = cosine;
  }
  if (lane == 0) a.out.negatives(i) = smooths && counted ? negatives : Negatives{};

  const auto* partial = static_cast<const RowSum<Real>*>(a.partial) + i;
  double exponent = kNoExponent, largest = kNoCosine, sum = 0;
  for (int64_t run = lane; run < a.runs; run += kWarp) {
    exponent = max_of<double>(exponent, partial[run * a.rows].exponent);
    largest = max_of<double>(largest, partial[run * a.rows].largest);
  }
  exponent = warp_max(exponent);
  largest = warp_max(largest);
  int64_t constant;
  const bool is_constant = constant_exponent(a.scale, a.total_sampled, &constant);
  const double target = is_constant ? static_cast<double>(constant) : exponent;
  for (int64_t run = lane; run < a.runs; run += kWarp) {
    const RowSum<Real> part = partial[run * a.rows];
    const double power = part.exponent - target;
    sum += std::ldexp(static_cast<double>(part.sum),
                      static_cast<int>(min_of(max_of(power, -3000.0), 3000.0)));
  }
  sum = warp_sum(sum);
  if (lane != 0) return;
  const bool none = largest <= kNoCosine;
  a.out.sum(i) = counted ? sum : 0.0;
  a.out.exponent[i] = !is_constant && none ? -INFINITY : target;
  a.out.largest_negative[i] = counted && !none ? largest : -INFINITY;
  a.out.inverse_norm[i] = a.row_inverse_norm[i];
}

// A warp takes one row.
__global__ void merge_attended_kernel(__grid_constant__ const MergeAttended a) {
  const int64_t row = global_warp();
  if (row >= a.rows) return;
  const auto* sums = static_cast<const RowSum<float>*>(a.sums) + row;
  float exponent = kNoExponent;
  for (int64_t run = 0; run < a.runs; ++run)
    exponent = max_of(exponent, sums[run * a.rows].exponent);
  for (int64_t k = lane_index(); k < a.depth; k += kWarp) {
    float total = 0;
    for (int64_t run = 0; run < a.runs; ++run)
      total += times_power(a.attended[(run * a.rows + row) * a.depth + k],
                           sums[run * a.rows].exponent - exponent);
    a.out[row * a.depth + k] = total;
  }
  if (lane_index() == 0) a.exponent[row] = exponent;
}

__global__ void join_targets_kernel(__grid_constant__ const JoinTargets a) {
  const int64_t i = global_thread();
  if (i >= a.batch) return;
  const Positives& positives = a.of.positives;
  if (positives.count(i) > 0) {
    a.loss[i] = a.of(i, a.sums.sum(i), a.sums.exponent[i], a.sums.cosines(i),
                     a.sums.inverse_norm[i], a.sums.negatives(i));
  } else {
    a.loss[i] = positives.any_invalid(i) ? NAN : 0.0;
    a.of.states.sample(i) = {};
    for (int64_t p = 0; p < positives.width; ++p) a.of.states.positive(i, p) = {};
  }
}

struct Sum {
  UNICOM_DEVICE double operator()(double a, double b) const { return a + b; }
};
struct Max {
  UNICOM_DEVICE double operator()(double a, double b) const { return a > b ? a : b; }
};

// One value of each of kWideThreads threads, combined in a fixed order; the same on every thread.
template <class Operation>
UNICOM_DEVICE double block_reduce(double value, Operation combine) {
  __shared__ double values[kWideThreads];
  const int t = static_cast<int>(threadIdx.x);
  __syncthreads();
  values[t] = value;
  for (int half = kWideThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t < half) values[t] = combine(values[t], values[t + half]);
  }
  __syncthreads();
  return values[0];
}

// What each sample's loss is multiplied by in the result.
UNICOM_DEVICE double reduction_factor(Reduction reduction, const Positives& positives,
                                      int64_t batch) {
  if (reduction != Reduction::kMean) return 1.0;
  double kept = 0;
  for (int64_t i = threadIdx.x; i < batch; i += kWideThreads) kept += positives.count(i) > 0;
  return 1.0 / max_of(block_reduce(kept, Sum{}), 1.0);
}

template <class Real>
__global__ void write_results_kernel(__grid_constant__ const WriteResults a) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < a.batch; i += kWideThreads) {
    const double loss = a.sample_loss[i];
    total += loss;
    static_cast<Real*>(a.sample_loss_out)[i] = static_cast<Real>(loss);
    const int64_t width = a.positives.width;
    for (int64_t p = 0; p < width; ++p)
      static_cast<Real*>(a.target_cosine_out)[i * width + p] =
          static_cast<Real>(a.sums.cosines(i)[p]);
    static_cast<Real*>(a.largest_negative_out)[i] = static_cast<Real>(a.sums.largest_negative[i]);
    if (a.reduction == Reduction::kNone) static_cast<Real*>(a.loss)[i] = static_cast<Real>(loss);
  }
  if (a.reduction == Reduction::kNone) return;
  const double factor = reduction_factor(a.reduction, a.positives, a.batch);
  total = block_reduce(total, Sum{});
  if (threadIdx.x == 0) *static_cast<Real*>(a.loss) = static_cast<Real>(total * factor);
}

template <class Real>
__global__ void prepare_backward_kernel(__grid_constant__ const PrepareBackward a) {
  const double factor = reduction_factor(a.reduction, a.positives, a.batch);
  const auto* grad = static_cast<const Real*>(a.grad_loss);
  // Rows without gradient: factor 0, and an exponent that no exponential overflows.
  const double highest = std::ceil(a.scale / kLn2) + 1;
  double largest = 0;
  for (int64_t i = threadIdx.x; i < a.rows; i += kWideThreads) {
    double negative = 0, smooth = 0;
    RowScale<Real> row{0, static_cast<Real>(highest)};
    const bool counted = i < a.batch && a.positives.count(i) > 0;
    double weight = 0;
    if (counted) {
      weight = factor * static_cast<double>(a.reduction == Reduction::kNone ? grad[i] : grad[0]);
      if (a.upstream != nullptr && grad[0] != Real(1)) weight = NAN;
      weight *= a.scale;
      const SampleState state = a.states.sample(i);
      negative = weight * state.push;
      smooth = weight * state.smooth;
      if (state.factor != 0)
        row = {static_cast<Real>(state.factor), static_cast<Real>(state.exponent)};
    }
    for (int64_t p = 0; p < a.positives.width && i < a.batch; ++p) {
      const PositiveState state = a.states.positive(i, p);
      a.target_weight[i * a.positives.width + p] =
          counted ? weight * state.pull * state.slope : 0.0;
    }
    a.negative_weight[i] = negative;
    if (a.smooth_weight != nullptr) a.smooth_weight[i] = smooth;
    static_cast<RowScale<Real>*>(a.row)[i] = row;
    largest = max_of(largest, std::fabs(negative));
  }
  largest = block_reduce(largest, Max{});
  for (int64_t i = threadIdx.x; i < a.rows; i += kWideThreads) {
    a.folded[i] = largest > 0 ? a.negative_weight[i] / largest * a.reach : 0.0;
    if (!a.folds) continue;
    RowScale<Real>& row = static_cast<RowScale<Real>*>(a.row)[i];
    int power = 0;
    row.factor = static_cast<Real>(std::frexp(row.factor * a.folded[i], &power));
    row.exponent = row.factor == 0 ? Real(-kNoExponent) : row.exponent - static_cast<Real>(power);
  }
  if (threadIdx.x != 0) return;
  *a.fold = largest / a.reach;
  if (a.upstream != nullptr) *a.upstream = static_cast<double>(grad[0]);
}

__global__ void sum_smoothed_kernel(__grid_constant__ const SumSmoothed a) {
  const int64_t k = global_thread();
  if (k >= a.depth) return;
  double sum = 0;
  for (int64_t i = 0; i < a.batch && k < a.embeddings.dim; ++i) {
    // Samples without part: what they hold, NaN included, must not reach the others.
    const double weight = a.smooth_weight[i] * a.row_inverse_norm[i];
    if (weight != 0) sum += weight * read_any(a.embeddings, i, k);
  }
  a.out[k] = sum;
}

// Every positive counts those that come before it: a lane for each, and each warp of the block
// compares with a part of all.
__global__ void order_positives_kernel(__grid_constant__ const OrderPositives a) {
  constexpr int kPart = 128, kTile = kPart * kWarpsPerBlock;
  __shared__ int64_t keys[kTile];
  __shared__ int64_t places[kWarpsPerBlock][kWarp];
  const int t = static_cast<int>(threadIdx.x), warp = t / kWarp, lane = lane_index();
  // One comparison orders by slot and then by position.
  auto key = [&](int64_t i) { return i < a.count ? a.slots[i] * a.count + i : INT64_MAX; };
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarp + lane, own = key(i);
  int before = 0;
  for (int64_t first = 0; first < a.count; first += kTile) {
    __syncthreads();
    for (int j = t; j < kTile; j += kThreads) keys[j] = key(first + j);
    __syncthreads();
#pragma unroll 16
    for (int j = 0; j < kPart; ++j) before += keys[warp * kPart + j] < own;
  }
  places[warp][lane] = before;
  __syncthreads();
  if (warp != 0 || i >= a.count) return;
  int64_t place = 0;
  for (int w = 0; w < kWarpsPerBlock; ++w) place += places[w][lane];
  a.by_slot[place] = i;
}

}  // namespace

template <class Real>
void finish_sums(Queue& queue, const FinishSums& a) {
  queue.launch(finish_sums_kernel<Real>, warp_grid(a.batch), kThreads, 0, a);
}
void merge_attended(Queue& queue, const MergeAttended& a) {
  queue.launch(merge_attended_kernel, warp_grid(a.rows), kThreads, 0, a);
}
void join_targets(Queue& queue, const JoinTargets& a) {
  queue.launch(join_targets_kernel, thread_grid(a.batch), kThreads, 0, a);
}
template <class Real>
void write_results(Queue& queue, const WriteResults& a) {
  queue.launch(write_results_kernel<Real>, dim3(1), kWideThreads, 0, a);
}
template <class Real>
void prepare_backward(Queue& queue, const PrepareBackward& a) {
  queue.launch(prepare_backward_kernel<Real>, dim3(1), kWideThreads, 0, a);
}
void sum_smoothed(Queue& queue, const SumSmoothed& a) {
  queue.launch(sum_smoothed_kernel, thread_grid(a.depth), kThreads, 0, a);
}
void find_centers(Queue& queue, const FindCenters& a) {
  queue.launch(find_centers_kernel, warp_grid(a.batch), kThreads, 0, a);
}
void order_positives(Queue& queue, const OrderPositives& a) {
  const dim3 grid(static_cast<unsigned>(ceil_div(a.count, kWarp)));
  queue.launch(order_positives_kernel, grid, kThreads, 0, a);
}

#define UNICOM_INSTANTIATE(Real)                                  \
  template void finish_sums<Real>(Queue&, const FinishSums&);     \
  template void write_results<Real>(Queue&, const WriteResults&); \
  template void prepare_backward<Real>(Queue&, const PrepareBackward&)
UNICOM_INSTANTIATE(float);
UNICOM_INSTANTIATE(double);
#undef UNICOM_INSTANTIATE

}  // namespace unicom::cuda
