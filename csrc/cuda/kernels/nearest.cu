#include "nearest.h"

#include <cmath>

#include "candidates.cuh"
#include "logits.h"
#include "nearest_hopper.h"
#include "tile.cuh"

namespace unicom::cuda {

namespace {

constexpr float kInfinity = INFINITY;
constexpr int kOctet = 8;  // lanes that share one product in double
constexpr int kOctets = kWarp / kOctet;

UNICOM_DEVICE const float* row_of(const FloatRows& rows, int64_t i) {
  return rows.data + i * rows.stride;
}

// The sum of term(k) over k in double, one of each octet of a warp; all lanes call it. The order of
// summation is that of the CPU's dot product (csrc/cpu/kernels/simd.h), so every bit is.
template <class Term>
UNICOM_DEVICE double sum_of_octet(int64_t count, Term term) {
  const int lane = lane_index(), member = lane % kOctet;
  const int64_t whole = count / kOctet * kOctet;
  double sum = 0, total = 0;
#pragma unroll 4
  for (int64_t k = member; k < whole; k += kOctet) sum += term(k);
  for (int64_t k = whole; k < count; ++k) total += term(k);
#pragma unroll
  for (int i = 0; i < kOctet; ++i) total += __shfl_sync(kAllLanes, sum, lane - member + i);
  return total;
}

// Dot product; its products are exact.
UNICOM_DEVICE double dot_of_octet(const float* a, const float* b, int64_t dim) {
  return sum_of_octet(
      dim, [&](int64_t k) { return static_cast<double>(a[k]) * static_cast<double>(b[k]); });
}

// ---- packing

__global__ void inverse_norms_kernel(__grid_constant__ const PackCentroids a) {
  const int64_t j = global_thread() / kOctet;
  const float* row = row_of(a.centroids, min_of(j, a.centroids.count - 1));
  const double square = dot_of_octet(row, row, a.centroids.dim);
  if (j < a.centroids.count && lane_index() % kOctet == 0)
    a.out.inverse_norm[j] = square == 0 ? 0.0 : 1.0 / std::sqrt(square);
}

// A thread sums one column over one slice.
__global__ void partial_mean_kernel(__grid_constant__ const PackCentroids a) {
  const int64_t k = global_thread(), slice = blockIdx.y;
  if (k >= a.centroids.dim) return;
  const int64_t length = (a.centroids.count + a.slices - 1) / a.slices;
  const int64_t begin = slice * length, end = min_of(begin + length, a.centroids.count);
  double sum = 0;
#pragma unroll 4
  for (int64_t j = begin; j < end; ++j)
    sum += a.out.inverse_norm[j] * static_cast<double>(row_of(a.centroids, j)[k]);
  a.partial_mean[slice * a.centroids.dim + k] = sum;
}

__global__ void mean_kernel(__grid_constant__ const PackCentroids a) {
  const int64_t k = global_thread();
  if (k >= a.out.depth) return;
  double sum = 0;
  if (k < a.centroids.dim)
    for (int64_t s = 0; s < a.slices; ++s) sum += a.partial_mean[s * a.centroids.dim + k];
  a.out.mean[k] = static_cast<float>(sum / static_cast<double>(a.centroids.count));
}

// A unit vector less the mean, and what became of it as halves.
struct Rounded {
  double norm, lost;                    // of the vector; of what rounding took from it
  double unit_by_mean, vector_by_mean;  // products
};

// By a warp: out = kVectorScale * (x * inverse_norm - mean).
UNICOM_DEVICE Rounded pack_vector(const float* x, double inverse_norm, int64_t dim,
                                  const float* mean, int64_t depth, Half* out) {
  Rounded sums{};
  for (int64_t k = lane_index(); k < depth; k += kWarp) {
    double vector = 0;
    if (k < dim) {
      const double unit = x[k] * inverse_norm, shift = mean[k];
      vector = unit - shift;
      sums.unit_by_mean += unit * shift;
      sums.vector_by_mean += vector * shift;
    }
    const Half rounded = narrow<Half>(vector * kVectorScale);
    const double lost = vector - widen(rounded) / kVectorScale;
    sums.norm += vector * vector;
    sums.lost += lost * lost;
    out[k] = rounded;
  }
  return {std::sqrt(warp_sum(sums.norm)), std::sqrt(warp_sum(sums.lost)),
          warp_sum(sums.unit_by_mean), warp_sum(sums.vector_by_mean)};
}

UNICOM_DEVICE void pack_zeros(int64_t depth, Half* out) {
  for (int64_t k = lane_index(); k < depth; k += kWarp) out[k] = narrow<Half>(0.0f);
}

// Doubles that are not negative have the order of their bits.
UNICOM_DEVICE void raise(double* largest, double value) {
#ifdef UNICOM_EMULATE_CUDA
  const auto bits = __builtin_bit_cast(unsigned long long, value);
#else
  const auto bits = static_cast<unsigned long long>(__double_as_longlong(value));
#endif
  atomicMax(reinterpret_cast<unsigned long long*>(largest), bits);
}

__global__ void pack_centroids_kernel(__grid_constant__ const PackCentroids a) {
  const int64_t j = global_warp();
  if (j >= a.out.classes) return;
  Half* out = a.out.unit + j * a.out.depth;
  float bias = -kInfinity;
  if (j < a.centroids.count) {
    const Rounded made = pack_vector(row_of(a.centroids, j), a.out.inverse_norm[j], a.centroids.dim,
                                     a.out.mean, a.out.depth, out);
    bias = static_cast<float>(made.vector_by_mean * kScoreScale);
    if (lane_index() == 0) {
      raise(a.out.largest_norm, made.norm);
      raise(a.out.largest_lost, made.lost);
    }
  } else {
    pack_zeros(a.out.depth, out);
  }
  if (lane_index() == 0) a.out.bias[j] = bias;
}

// Roundings of fp32 in a score and in what it is compared with: of the bias, at most 2 for unit
// vectors and their mean, of the sum with it, at most 6, and of the bounds, as large as scores.
constexpr double kSlack = 32 * 0x1p-24;

// Of each product that is added, times the norms of both vectors: tensor cores may align the terms
// of one instruction to the largest and drop what is below its last digit, and so much again for
// the sum of a part of them.
constexpr double kLostBySum = 4 * 0x1p-24;

__global__ void pack_queries_kernel(__grid_constant__ const PackQueries a) {
  const int64_t i = global_warp();
  if (i >= a.padded) return;
  const int lane = lane_index();
  const float* x = row_of(a.rows, i);
  double norm = 0, known = -kInfinity;  // known: cosine of the guess, times norm
  if (i < a.rows.count) {
    const int64_t guess = a.guess != nullptr ? a.guess[i] : -1;
    const bool guessed = guess >= 0 && guess < a.centroids.count;
    // The second octet multiplies by the guess, the others by the row itself.
    const bool by_guess = guessed && lane / kOctet == 1;
    const double product = dot_of_octet(x, by_guess ? row_of(a.centroids, guess) : x, a.rows.dim);
    norm = std::sqrt(__shfl_sync(kAllLanes, product, 0));
    const double guess_product = __shfl_sync(kAllLanes, product, kOctet);
    if (guessed) known = guess_product * a.packed.inverse_norm[guess];
  }
  Half* out = a.unit + i * a.packed.depth;
  float floor = kInfinity, window = 0;
  if (norm > 0 && norm < kInfinity) {
    const Rounded made = pack_vector(x, 1.0 / norm, a.rows.dim, a.packed.mean, a.packed.depth, out);
    const double largest = *a.packed.largest_norm, largest_lost = *a.packed.largest_lost;
    const double size = made.norm + made.lost;
    // What rounding takes, by Cauchy-Schwarz, and what the sum does.
    const double error = 1.001 * (made.lost * largest + size * largest_lost +
                                  kLostBySum * static_cast<double>(a.packed.depth) * size *
                                      (largest + largest_lost)) +
                         kSlack;
    floor = static_cast<float>((known / norm - made.unit_by_mean - 1.001 * error) * kScoreScale);
    window = static_cast<float>(2.001 * error * kScoreScale);
  } else {
    pack_zeros(a.packed.depth, out);
  }
  if (lane != 0) return;
  a.floor[i] = floor;
  a.window[i] = window;
  a.norm[i] = norm;
}

// ---- the search

using SearchTile = Tile<Half, kClassGranule, true, true>;

// Integers in the order of floats, for atomicMax.
UNICOM_DEVICE int ordered(float x) {
  const int bits = __float_as_int(x);
  return bits ^ (bits >> 31 & 0x7fffffff);
}
UNICOM_DEVICE float unordered(int bits) { return __int_as_float(bits ^ (bits >> 31 & 0x7fffffff)); }

// What a block knows of its rows, behind the operands in shared memory.
struct Search {
  int floor[SearchTile::kRows];  // ordered
  float window[SearchTile::kRows];
  int count[SearchTile::kRows];
  int again[SearchTile::kRows];  // whose candidates of this tile are taken once more
};

// A warp takes what is no longer above the floor, and what this tile added, out of the full lists.
UNICOM_DEVICE void clear_full_lists(Search& search, Candidate* lists, int64_t first_class) {
  const int lane = lane_index();
  for (int r = static_cast<int>(threadIdx.x) / kWarp; r < SearchTile::kRows; r += kWarpsPerBlock) {
    const float floor = unordered(search.floor[r]);
    // A list that could not be cleared stays too long.
    const bool full = search.count[r] > kCandidates && floor < kInfinity;
    int kept = 0;
    if (full) {
      kept = keep_candidates(lists + int64_t{r} * kCandidates, kCandidates, floor, first_class);
    }
    if (lane != 0) continue;
    search.again[r] = full;
    if (full) search.count[r] = kept;
  }
}

// One block of rows against one run of centroids. Which candidates remain does not depend on the
// order in which threads find them: floors rise first, then what is above them is taken.
__global__ void __launch_bounds__(kThreads, 1)
    find_candidates_kernel(__grid_constant__ const FindCandidates a) {
  using T = SearchTile;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * T::kRows;
  const int64_t run_tiles = (a.packed.classes / T::kCols + a.runs - 1) / a.runs;
  const int64_t first_class = blockIdx.y * run_tiles * T::kCols;
  const int64_t end_class = min_of(a.packed.classes, first_class + run_tiles * T::kCols);
  const int tiles = static_cast<int>(max_of<int64_t>(end_class - first_class, 0) / T::kCols);
  Candidate* lists = a.candidate + (blockIdx.y * a.padded + first_row) * kCandidates;
  auto& search = *reinterpret_cast<Search*>(dynamic_shared<char>() + a.plan.bytes);
  const int own = static_cast<int>(threadIdx.x);
  if (own < T::kRows) {
    search.floor[own] = ordered(a.floor[first_row + own]);
    search.window[own] = a.window[first_row + own];
    search.count[own] = 0;
  }
  __syncthreads();

  T tile;
  auto take = [&](int64_t begin, bool once_more) {
    bool full = false;
#pragma unroll
    for (int i = 0; i < T::kThreadRows; ++i) {
      const int r = tile.row(i);
      if (once_more && search.again[r] == 0) continue;
      const float floor = unordered(search.floor[r]);
#pragma unroll
      for (int j = 0; j < T::kThreadCols; ++j) {
        if (!(tile.at(i, j) > floor)) continue;
        const int place = atomicAdd(&search.count[r], 1);
        full |= place >= kCandidates;
        if (place < kCandidates)
          lists[r * kCandidates + place] = {tile.at(i, j),
                                            static_cast<int32_t>(begin) + tile.col(j)};
      }
    }
    return full;
  };
  tile.run(
      a.plan, tiles, static_cast<int>(a.packed.depth / T::kDepth),
      [&](int t) {
        const Half* classes =
            a.packed.unit + (first_class + int64_t{t} * T::kCols) * a.packed.depth;
        const int stride = static_cast<int>(a.packed.depth);
        return OperandPair<Half>{a.rows + first_row * a.packed.depth, classes, stride, stride};
      },
      [&](int t) {
        const int64_t begin = first_class + int64_t{t} * T::kCols;
        float best[T::kThreadRows];
        add_bias(tile, a.packed.bias + begin, best);
        bool found = false;
#pragma unroll
        for (int i = 0; i < T::kThreadRows; ++i) {
          const int r = tile.row(i);
          const bool above = best[i] > unordered(search.floor[r]);
          best[i] = above ? best[i] - search.window[r] : -kInfinity;
          found |= above;
        }
        // Between two barriers floors are either read or raised.
        if (!__syncthreads_or(found)) return;
#pragma unroll
        for (int i = 0; i < T::kThreadRows; ++i)
          if (best[i] > -kInfinity) atomicMax(&search.floor[tile.row(i)], ordered(best[i]));
        __syncthreads();
        if (!__syncthreads_or(take(begin, false))) return;
        // Some list is full. The floor has risen since its first candidates came.
        clear_full_lists(search, lists, begin);
        __syncthreads();
        take(begin, true);
        __syncthreads();
        if (own < T::kRows && search.count[own] > kCandidates)
          search.floor[own] = ordered(kInfinity);
      });
  __syncthreads();
  if (own < T::kRows) a.count[blockIdx.y * a.padded + first_row + own] = search.count[own];
}

// ---- the decision

struct Nearest {
  double cosine;  // times the norm of the row
  int64_t index;
};

// The first of equals.
UNICOM_DEVICE Nearest nearer(const Nearest& a, const Nearest& b) {
  return b.cosine > a.cosine || (b.cosine == a.cosine && b.index < a.index) ? b : a;
}

// Of the octets of a warp.
UNICOM_DEVICE Nearest nearest_of_warp(Nearest best) {
#pragma unroll
  for (int step = kOctet; step < kWarp; step *= 2)
    best = nearer(best, {__shfl_xor_sync(kAllLanes, best.cosine, step),
                         __shfl_xor_sync(kAllLanes, best.index, step)});
  return best;
}

// Each octet with a centroid of its own, or with none, past the last.
UNICOM_DEVICE Nearest compared(const Decide& a, const float* row, int64_t index, Nearest best) {
  const bool there = index < a.centroids.count;
  const int64_t j = there ? index : 0;
  const double cosine = dot_of_octet(row, row_of(a.centroids, j), a.rows.dim) * a.inverse_norm[j];
  return there ? nearer(best, {cosine, index}) : best;
}

// By a warp; false where a list was full, or no score was a number.
UNICOM_DEVICE bool decide_candidates(const Decide& a, int64_t i, Nearest& best) {
  const int lane = lane_index();
  float largest = -kInfinity;
  bool full = false;
  for (int64_t run = 0; run < a.runs; ++run) {
    const int64_t at = run * a.padded + i;
    const int count = a.count[at];
    full |= count > kCandidates;
    for (int c = lane; c < min_of(count, kCandidates); c += kWarp)
      largest = larger(largest, a.candidate[at * kCandidates + c].score);
  }
  largest = warp_max(largest);
  if (full || largest == -kInfinity) return false;
  const float floor = largest - a.window[i];
  for (int64_t run = 0; run < a.runs; ++run) {
    const int64_t at = run * a.padded + i;
    const int count = a.count[at];
    for (int first = 0; first < count; first += kWarp) {
      Candidate candidate{-kInfinity, 0};
      if (first + lane < count) candidate = a.candidate[at * kCandidates + first + lane];
      unsigned above = __ballot_sync(kAllLanes, candidate.score > floor);
      while (above != 0) {
        int64_t own = a.centroids.count;
        for (int octet = 0; octet < kOctets && above != 0; ++octet) {
          const int32_t index = __shfl_sync(kAllLanes, candidate.index, lowest_bit64(above));
          if (lane / kOctet == octet) own = index;
          above &= above - 1;
        }
        best = compared(a, row_of(a.rows, i), own, best);
      }
    }
  }
  best = nearest_of_warp(best);
  return true;
}

// A warp for each row; then the whole block for each of its rows that had too many candidates.
__global__ void decide_kernel(__grid_constant__ const Decide a) {
  __shared__ bool crowded[kWarpsPerBlock];
  __shared__ Nearest of_warp[kWarpsPerBlock];
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = lane_index();
  const Nearest none{-kInfinity, a.centroids.count};
  const int64_t i = global_warp();
  auto write = [&](int64_t row, const Nearest& best) {
    a.index[row] = best.index;
    a.score[row] = static_cast<float>(best.cosine / a.norm[row]);
  };
  bool full = false;
  if (i < a.rows.count) {
    const double norm = a.norm[i];
    if (norm > 0 && norm < kInfinity) {
      Nearest best = none;
      full = !decide_candidates(a, i, best);
      if (!full && lane == 0) write(i, best);
    } else if (lane == 0) {
      a.index[i] = -1;
      a.score[i] = norm == 0 ? 0.0f : NAN;
    }
  }
  if (lane == 0) crowded[warp] = full;
  __syncthreads();
  for (int w = 0; w < kWarpsPerBlock; ++w) {
    if (!crowded[w]) continue;
    const int64_t row = i - warp + w;
    Nearest best = none;
    for (int64_t first = warp * kOctets; first < a.centroids.count;
         first += kWarpsPerBlock * kOctets)
      best = compared(a, row_of(a.rows, row), first + lane / kOctet, best);
    best = nearest_of_warp(best);
    if (lane == 0) of_warp[warp] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int other = 1; other < kWarpsPerBlock; ++other) best = nearer(best, of_warp[other]);
      write(row, best);
    }
    __syncthreads();
  }
}

// ---- sums

UNICOM_DEVICE void add_whole(int64_t* to, int64_t value) {
  // Two's complement: as unsigned numbers, for which there is such an operation.
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}

// A warp for each row. Sums of whole numbers do not depend on the order of the warps.
__global__ void add_unit_rows_kernel(__grid_constant__ const AddUnitRows a) {
  const int64_t i = global_warp();
  if (i >= a.rows.count) return;
  const int64_t from = a.from(i), to = a.index[i];
  const bool leaves = a.has_sum(from), enters = a.has_sum(to);
  if (from == to || (!leaves && !enters)) return;
  const float* row = row_of(a.rows, i);
  const double scale = scale_of_row(dot_of_octet(row, row, a.rows.dim), a.shift);
  if (scale == 0) return;
  for (int64_t k = lane_index(); k < a.rows.dim; k += kWarp) {
    const int64_t value = __double2ll_rn(rounded_product(scale, row[k]));
    if (leaves) add_whole(a.sums + from * a.rows.dim + k, -value);
    if (enters) add_whole(a.sums + to * a.rows.dim + k, value);
  }
  if (lane_index() == 0) {
    if (leaves) add_whole(a.counts + from, -1);
    if (enters) add_whole(a.counts + to, 1);
  }
}

__global__ void directions_kernel(__grid_constant__ const Directions a) {
  const int64_t j = global_thread() / kOctet;
  const int64_t* sum = a.sums + min_of(j, a.count - 1) * a.dim;
  const double norm = std::sqrt(sum_of_octet(a.dim, [&](int64_t k) {
    const auto value = static_cast<double>(sum[k]);
    return rounded_product(value, value);
  }));
  if (j >= a.count) return;
  for (int64_t k = lane_index() % kOctet; k < a.dim; k += kOctet)
    a.out[j * a.dim + k] = norm > 0 ? static_cast<float>(static_cast<double>(sum[k]) / norm) : 0.0f;
}

}  // namespace

void pack_centroids(Queue& queue, const PackCentroids& a) {
  queue.launch(inverse_norms_kernel, thread_grid(a.centroids.count * kOctet), kThreads, 0, a);
  dim3 grid = thread_grid(a.centroids.dim);
  grid.y = static_cast<unsigned>(a.slices);
  queue.launch(partial_mean_kernel, grid, kThreads, 0, a);
  queue.launch(mean_kernel, thread_grid(a.out.depth), kThreads, 0, a);
  queue.fill_zero(a.out.largest_norm, sizeof(double));
  queue.fill_zero(a.out.largest_lost, sizeof(double));
  queue.launch(pack_centroids_kernel, warp_grid(a.out.classes), kThreads, 0, a);
}

void pack_queries(Queue& queue, const PackQueries& a) {
  queue.launch(pack_queries_kernel, warp_grid(a.padded), kThreads, 0, a);
}

void find_candidates(Queue& queue, const FindCandidates& given) {
  if (find_candidates_on_hopper(queue, given)) return;
  using T = SearchTile;
  FindCandidates a = given;
  a.plan = T::plan(queue.shared_limit() - sizeof(Search), a.packed.depth / T::kDepth);
  const dim3 grid(static_cast<unsigned>(a.padded / T::kRows), static_cast<unsigned>(a.runs));
  queue.launch(find_candidates_kernel, grid, kThreads, a.plan.bytes + sizeof(Search), a);
}

void decide(Queue& queue, const Decide& a) {
  queue.launch(decide_kernel, warp_grid(a.rows.count), kThreads, 0, a);
}

void add_unit_rows(Queue& queue, const AddUnitRows& a) {
  queue.launch(add_unit_rows_kernel, warp_grid(a.rows.count), kThreads, 0, a);
}

void directions(Queue& queue, const Directions& a) {
  queue.launch(directions_kernel, thread_grid(a.count * kOctet), kThreads, 0, a);
}

}  // namespace unicom::cuda
