#include "row_updates.h"

#include <cstring>

#include "device.cuh"

namespace unicom::cuda {

namespace {

constexpr int kWide = 4;  // values that a lane takes at once where rows are aligned for it
constexpr int64_t kNothing = INT64_MAX;

struct AdamWUpdate : AdamWRows {
  SparseRows gradient;
  void* workspace;
};
struct SgdUpdate : SgdRows {
  SparseRows gradient;
  void* workspace;
};

template <class T>
UNICOM_DEVICE T* row_of(const RowArray& rows, int64_t id) {
  return static_cast<T*>(rows.data) + id * rows.row_stride;
}

template <int kCount, class T, class Real>
UNICOM_DEVICE void load(const T* from, Real (&values)[kCount]) {
  const auto pack = *reinterpret_cast<const Pack<T, kCount>*>(from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = widen(pack.values[i]);
}

template <int kCount, class T, class Real>
UNICOM_DEVICE void store(T* to, const Real (&values)[kCount]) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack.values[i] = narrow<T>(values[i]);
  *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
}

// A moment: like `store`, but bf16 is rounded by the sixteen random bits `dither` of each value.
template <int kCount, class Moment, class Real>
UNICOM_DEVICE void store_moment(Moment* to, const Real (&values)[kCount],
                                const uint32_t (&dither)[kCount]) {
  if constexpr (std::is_same_v<Moment, BFloat>) {
    Pack<BFloat, kCount> pack;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      uint32_t bits;
      std::memcpy(&bits, &values[i], sizeof(bits));
      const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
      const uint32_t quiet = (bits & 0x7fffffu) != 0 ? 0x40u : 0u;
      pack.values[i].bits =
          static_cast<uint16_t>(finite ? (bits + dither[i]) >> 16 : bits >> 16 | quiet);
    }
    *reinterpret_cast<Pack<BFloat, kCount>*>(to) = pack;
  } else {
    store(to, values);
  }
}

// The row that entry j updates, or -1.
UNICOM_DEVICE int64_t updated_row(const SparseRows& g, int64_t num_rows, int64_t j) {
  if (j >= g.count) return -1;
  if (g.upstream != nullptr && *g.upstream != 1) return -1;
  const int64_t at = g.first + j;
  if (g.ids == nullptr) return at;
  const int64_t place = at / g.centers, id = g.ids[place] * g.centers + at % g.centers;
  if (id < 0 || id >= num_rows || (place > 0 && g.ids[place - 1] == g.ids[place])) return -1;
  return id;
}

// ---- AdamW. First a thread per row, for what all of its values share (powers, in double); then a
// ---- warp per row.

template <class Real>
struct AdamWEntry {
  AdamWStep<Real> step;
  uint32_t rounding_key;
};

template <class Real>
__global__ void adamw_entries_kernel(__grid_constant__ const AdamWUpdate a) {
  const int64_t j = global_thread();
  const int64_t id = updated_row(a.gradient, a.num_rows, j);
  if (id < 0) return;
  const int64_t count = ++a.row_step[id];
  const double decay = std::exp(a.total_log_decay - a.log_decay[id]);
  a.log_decay[id] = a.total_log_decay;
  static_cast<AdamWEntry<Real>*>(a.workspace)[j] = {adamw_step<Real>(a.options, count, decay),
                                                    rounding_key(id, count)};
}

// The row's one second moment, after this step.
template <class T, class Real>
UNICOM_DEVICE Real shared_second_moment(const AdamWUpdate& a, const AdamWStep<Real>& s, int64_t id,
                                        const T* gradient) {
  double sum = 0;
  for (int64_t k = lane_index(); k < a.dim; k += kWarp) {
    const double g = widen(gradient[k]);
    sum += g * g;
  }
  const double mean = warp_sum(sum) / static_cast<double>(a.dim);
  Real second = 0;
  if (lane_index() == 0) {
    Real* stored = row_of<Real>(a.second, id);
    second = *stored;
    adamw_second_moment(s, static_cast<Real>(mean), &second);
    *stored = second;
  }
  return __shfl_sync(kAllLanes, second, 0);
}

template <class T, class Moment, int kCount>
__global__ void adamw_kernel(__grid_constant__ const AdamWUpdate a) {
  using Real = RealOf<T>;
  const int64_t j = global_warp();
  const int64_t id = updated_row(a.gradient, a.num_rows, j);
  if (id < 0) return;
  const auto entry = static_cast<const AdamWEntry<Real>*>(a.workspace)[j];
  const AdamWStep<Real>& s = entry.step;
  const T* gradient = static_cast<const T*>(a.gradient.rows) + j * a.dim;
  const Real shared = a.second_per_row ? shared_second_moment(a, s, id, gradient) : Real{0};

  for (int64_t k = lane_index() * kCount; k < a.dim; k += kWarp * kCount) {
    Real slope[kCount], parameter[kCount], first[kCount], second[kCount];
    load(gradient + k, slope);
    load(row_of<T>(a.parameter, id) + k, parameter);
    load(row_of<Moment>(a.first, id) + k, first);
    if (!a.second_per_row) load(row_of<Moment>(a.second, id) + k, second);
    uint32_t low[kCount], high[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      slope[i] *= s.sign;
      adamw_first_moment(s, slope[i], &first[i]);
      if (a.second_per_row)
        second[i] = shared;
      else
        adamw_second_moment(s, slope[i] * slope[i], &second[i]);
      adamw_parameter<ScalarMath>(s, first[i], second[i], &parameter[i]);
      const uint32_t bits = std::is_same_v<Moment, BFloat>
                                ? rounding_bits(entry.rounding_key, static_cast<uint32_t>(k + i))
                                : 0;
      low[i] = bits & 0xffffu;
      high[i] = bits >> 16;
    }
    store(row_of<T>(a.parameter, id) + k, parameter);
    store_moment(row_of<Moment>(a.first, id) + k, first, low);
    if (!a.second_per_row) store_moment(row_of<Moment>(a.second, id) + k, second, high);
  }
}

// ---- SGD, likewise

// What missing the last 0, 1, ..., `remembered` steps comes to. One block: each thread composes a
// stretch of the steps, newest first, and then goes through it again from what came before.
UNICOM_DEVICE Transition step_back(const SgdUpdate& a, int64_t i, const Transition& newer) {
  return then(a.history[a.remembered - 1 - i], newer);
}

__global__ void missed_steps_kernel(__grid_constant__ const SgdUpdate a) {
  __shared__ Transition stretches[2][kThreads];
  const int t = static_cast<int>(threadIdx.x);
  const int64_t length = (a.remembered + kThreads - 1) / kThreads;
  const int64_t begin = min_of(t * length, a.remembered);
  const int64_t end = min_of(begin + length, a.remembered);
  Transition missed = Transition::identity();
  for (int64_t i = begin; i < end; ++i) missed = step_back(a, i, missed);
  stretches[0][t] = missed;
  int from = 0;
  for (int step = 1; step < kThreads; step *= 2, from ^= 1) {
    __syncthreads();
    const Transition& mine = stretches[from][t];
    stretches[from ^ 1][t] = t >= step ? then(mine, stretches[from][t - step]) : mine;
  }
  __syncthreads();
  Transition* out = static_cast<Transition*>(a.workspace);
  missed = t > 0 ? stretches[from][t - 1] : Transition::identity();
  if (t == 0) out[0] = missed;
  for (int64_t i = begin; i < end; ++i) {
    missed = step_back(a, i, missed);
    out[i + 1] = missed;
  }
}

// Behind the missed steps in the workspace.
template <class Real>
UNICOM_DEVICE SgdStep<Real>* sgd_entries(const SgdUpdate& a) {
  return reinterpret_cast<SgdStep<Real>*>(static_cast<Transition*>(a.workspace) + a.remembered + 1);
}

template <class Real>
__global__ void sgd_entries_kernel(__grid_constant__ const SgdUpdate a) {
  const int64_t j = global_thread();
  const int64_t id = updated_row(a.gradient, a.num_rows, j);
  if (id < 0) return;
  Transition before = Transition::identity();
  if (a.last_step != nullptr) {
    const int64_t missed = a.now - 1 - a.last_step[id];
    const int64_t known = min_of(max_of(missed, int64_t{0}), a.remembered);
    before = static_cast<const Transition*>(a.workspace)[known];
    a.last_step[id] = static_cast<int32_t>(a.now);
  } else if (a.log_decay != nullptr) {
    before.pp = std::exp(a.decay_before - a.log_decay[id]);
    a.log_decay[id] = a.decay_after;
  }
  sgd_entries<Real>(a)[j] = sgd_step<Real>(a.options, before);
}

template <class T, int kCount>
__global__ void sgd_kernel(__grid_constant__ const SgdUpdate a) {
  using Real = RealOf<T>;
  const int64_t j = global_warp();
  const int64_t id = updated_row(a.gradient, a.num_rows, j);
  if (id < 0) return;
  const SgdStep<Real> s = sgd_entries<Real>(a)[j];
  const T* gradient = static_cast<const T*>(a.gradient.rows) + j * a.dim;
  for (int64_t k = lane_index() * kCount; k < a.dim; k += kWarp * kCount) {
    Real slope[kCount], parameter[kCount], buffer[kCount] = {};
    load(gradient + k, slope);
    load(row_of<T>(a.parameter, id) + k, parameter);
    if (a.buffer.data != nullptr) load(row_of<Real>(a.buffer, id) + k, buffer);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sgd_value(s, slope[i], &parameter[i], &buffer[i]);
    store(row_of<T>(a.parameter, id) + k, parameter);
    if (a.buffer.data != nullptr) store(row_of<Real>(a.buffer, id) + k, buffer);
  }
}

// ---- merging

// An entry that repeats the id before it with a row of zeros, as all behind the count of a padded
// gradient do, has nothing to add. Each is found by a warp of its own: the sums meet few rows.
template <class T>
__global__ void give_keys_kernel(__grid_constant__ const Merge a) {
  const int64_t j = global_warp();
  if (j >= a.count) return;
  const int64_t id = a.ids[j];
  bool empty = j > 0 && a.ids[j - 1] == id;
  if (empty) {
    const T* row = static_cast<const T*>(a.rows) + j * a.dim;
    int something = 0;
    for (int64_t k = lane_index(); k < a.dim; k += kWarp) something |= !(widen(row[k]) == 0);
    empty = __ballot_sync(kAllLanes, something) == 0;
  }
  if (lane_index() == 0) a.keys[j] = empty ? kNothing : id;
}

// The last key that stands for something; the first entry always does.
UNICOM_DEVICE int64_t last_id(const Merge& a) {
  int64_t low = 1, high = a.count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (a.keys[middle] != kNothing)
      low = middle + 1;
    else
      high = middle;
  }
  return a.keys[low - 1];
}

template <class T>
__global__ void add_equal_kernel(__grid_constant__ const Merge a) {
  using Real = RealOf<T>;
  const int64_t j = global_warp();
  if (j >= a.count) return;
  const int64_t key = a.keys[j];
  int64_t length = 0;  // of the run that begins here
  if (key != kNothing && (j == 0 || a.keys[j - 1] != key))
    for (length = 1; j + length < a.count && a.keys[j + length] == key;) ++length;
  if (lane_index() == 0) a.merged_ids[j] = key != kNothing ? key : last_id(a);
  T* out = static_cast<T*>(a.merged_rows) + j * a.dim;
  for (int64_t k = lane_index(); k < a.dim; k += kWarp) {
    Real sum = 0;
    for (int64_t i = 0; i < length; ++i)
      sum += widen(static_cast<const T*>(a.rows)[a.order[j + i] * a.dim + k]);
    out[k] = narrow<T>(sum);
  }
}

// ---- launches

template <class... Arrays>
bool are_wide(const void* gradient, DType dtype, int64_t dim, const Arrays&... arrays) {
  const auto is_wide = [](const RowArray& rows) {
    size_t bytes = 0;
    with_type(rows.dtype, [&](auto value) { bytes = kWide * sizeof(value); });
    return rows.data == nullptr ||
           (rows.row_stride % kWide == 0 && reinterpret_cast<uintptr_t>(rows.data) % bytes == 0);
  };
  return dim % kWide == 0 && is_wide({const_cast<void*>(gradient), dtype, dim}) &&
         (is_wide(arrays) && ...);
}

// Calls f with whether rows can be taken kWide values at a time, as the number of values.
template <class F>
void with_width(bool wide, const F& f) {
  if (wide)
    f(std::integral_constant<int, kWide>{});
  else
    f(std::integral_constant<int, 1>{});
}

template <class Moment, class T>
void launch_adamw(Queue& queue, const AdamWUpdate& a) {
  const RowArray second = a.second_per_row ? RowArray{} : a.second;
  with_width(are_wide(a.gradient.rows, a.parameter.dtype, a.dim, a.parameter, a.first, second),
             [&](auto n) {
               queue.launch(adamw_kernel<T, Moment, n()>, warp_grid(a.gradient.count), kThreads, 0,
                            a);
             });
}

}  // namespace

int64_t update_workspace(const AdamWRows& rows, int64_t count) {
  const bool is_double = rows.parameter.dtype == DType::kFloat64;
  return count *
         static_cast<int64_t>(is_double ? sizeof(AdamWEntry<double>) : sizeof(AdamWEntry<float>));
}

void update_rows(Queue& queue, const AdamWRows& rows, const SparseRows& gradient, void* workspace) {
  const AdamWUpdate a{rows, gradient, workspace};
  with_type(a.parameter.dtype, [&](auto value) {
    using T = decltype(value);
    using Real = RealOf<T>;
    queue.launch(adamw_entries_kernel<Real>, thread_grid(a.gradient.count), kThreads, 0, a);
    if constexpr (std::is_same_v<Real, float>)
      if (a.first.dtype == DType::kBFloat16) return launch_adamw<BFloat, T>(queue, a);
    launch_adamw<Real, T>(queue, a);
  });
}

int64_t update_workspace(const SgdRows& rows, int64_t count) {
  const bool is_double = rows.parameter.dtype == DType::kFloat64;
  const size_t entry = is_double ? sizeof(SgdStep<double>) : sizeof(SgdStep<float>);
  return (rows.remembered + 1) * static_cast<int64_t>(sizeof(Transition)) +
         count * static_cast<int64_t>(entry);
}

void update_rows(Queue& queue, const SgdRows& rows, const SparseRows& gradient, void* workspace) {
  const SgdUpdate a{rows, gradient, workspace};
  if (a.last_step != nullptr && a.gradient.first == 0)
    queue.launch(missed_steps_kernel, dim3(1), kThreads, 0, a);
  with_type(a.parameter.dtype, [&](auto value) {
    using T = decltype(value);
    queue.launch(sgd_entries_kernel<RealOf<T>>, thread_grid(a.gradient.count), kThreads, 0, a);
    with_width(are_wide(a.gradient.rows, a.parameter.dtype, a.dim, a.parameter, a.buffer),
               [&](auto n) {
                 queue.launch(sgd_kernel<T, n()>, warp_grid(a.gradient.count), kThreads, 0, a);
               });
  });
}

void give_keys(Queue& queue, const Merge& a) {
  with_type(a.dtype, [&](auto value) {
    queue.launch(give_keys_kernel<decltype(value)>, warp_grid(a.count), kThreads, 0, a);
  });
}

void add_equal(Queue& queue, const Merge& a) {
  with_type(a.dtype, [&](auto value) {
    queue.launch(add_equal_kernel<decltype(value)>, warp_grid(a.count), kThreads, 0, a);
  });
}

}  // namespace unicom::cuda
