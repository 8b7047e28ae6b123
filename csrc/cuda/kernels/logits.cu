#include "logits.h"

#include "logit_tile.cuh"
#include "logits_hopper.h"
#include "tile.cuh"

namespace unicom::cuda {

namespace {

template <class Unit>
using LogitTile = Tile<Unit, kClassCols<Unit>, true, true>;

// mask_tile where classes have several centres, and of each class all but the nearest centre, of
// equals the first.
template <class T>
UNICOM_DEVICE void mask_centers(T& tile, const Logits& a, int64_t first_row, int64_t first_col) {
  using Real = typename T::Real;
  static_assert(T::kTeam == kTeam);
  const int centers = static_cast<int>(a.order.centers);
  const int classes = static_cast<int>(a.order.classes_of_thread());
  const int64_t first_class = first_col / T::kCols * a.order.classes_of_tile();
  const int64_t count = class_count(a) - first_class;
  // Of this thread's columns: those of classes there are, and a class's first and last one.
  uint32_t there = 0, firsts = 0, lasts = 0;
  for (int u = 0; u < classes; ++u) {
    firsts |= 1u << (u * centers);
    lasts |= 1u << ((u + 1) * centers - 1);
    if (u * kTeam + tile.member() < count) there |= ((1u << centers) - 1) << (u * centers);
  }
#pragma unroll
  for (int i = 0; i < T::kThreadRows; ++i) {
    uint32_t negatives = there;
    const int64_t row = first_row + tile.row(i);
    for (int64_t p = 0; p < a.positives.width && row < a.batch; ++p) {
      const int64_t target = a.positives.of(row)[p] - first_class;
      if (target < 0 || target >= classes * kTeam || target % kTeam != tile.member()) continue;
      negatives &= ~(((1u << centers) - 1) << (target / kTeam * centers));
    }
    Real before[T::kThreadCols];  // the largest of the class up to here
#pragma unroll
    for (int j = 0; j < T::kThreadCols; ++j) {
      const Real c = tile.at(i, j);
      const bool first = j == 0 || (firsts >> j & 1) != 0;
      before[j] = first || is_nearer(c, before[j - 1]) ? c : before[j - 1];
    }
    Real largest = 0;
#pragma unroll
    for (int j = T::kThreadCols - 1; j >= 0; --j) {
      if ((lasts >> j & 1) != 0) largest = before[j];
      const bool first = j == 0 || (firsts >> j & 1) != 0;
      const bool nearest = !(tile.at(i, j) < largest) && (first || before[j - 1] < largest);
      // Which is its own cosine, unless that of another centre is NaN.
      tile.at(i, j) = nearest && (negatives >> j & 1) != 0 ? largest : Real(kNoCosine);
    }
  }
}

// Operands of tile `first_class / kCols` of the classes against one block of rows.
template <class Unit, class T>
UNICOM_DEVICE auto class_tiles(const Logits& a, int64_t first_row, int64_t first_class) {
  return [=, &a](int tile) {
    const auto* rows = static_cast<const Unit*>(a.embeddings) + first_row * a.depth;
    const auto* classes =
        static_cast<const Unit*>(a.prototypes) + (first_class + int64_t{tile} * T::kCols) * a.depth;
    const int stride = static_cast<int>(a.depth);
    return OperandPair<Unit>{rows, classes, stride, stride};
  };
}

// One block of rows against one run of classes; the team of a row is merged at the end. kCenters:
// classes have several; a kernel of its own, as both together would not fit into the registers.
template <class Unit, bool kCenters>
__global__ void __launch_bounds__(kThreads, 1) sum_exp_kernel(__grid_constant__ const SumExp a) {
  using T = LogitTile<Unit>;
  using Real = typename T::Real;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * T::kRows;
  const int64_t count = row_count(a.logits);
  const TileRun run = run_of_block<T::kCols>(count, a.runs);
  const int64_t first_class = run.first * T::kCols;

  T tile;
  RunningSums<Unit, T> sums(a.logits);
  tile.run(a.plan, run.tiles, static_cast<int>(a.logits.depth / T::kDepth),
           class_tiles<Unit, T>(a.logits, first_row, first_class), [&](int t) {
             const int64_t begin = first_class + int64_t{t} * T::kCols;
             if constexpr (kCenters)
               mask_centers(tile, a.logits, first_row, begin);
             else
               mask_tile(tile, a.logits, first_row, begin, count);
             if constexpr (!UnitTraits<Unit>::kTensorCores) {
               if (begin < a.kept_classes)
                 tile.store(static_cast<Real*>(a.kept) + first_row * a.kept_classes + begin,
                            a.kept_classes, [](int, Real c) { return c; });
             }
             sums.add(tile);
           });

  __syncthreads();
  auto* shared = dynamic_shared<RowSum<Real>>();  // [kRows][kTeam]
  static_assert(sizeof(RowSum<Real>) * T::kRows * T::kTeam <= T::kLeastSharedBytes);
#pragma unroll
  for (int i = 0; i < T::kThreadRows; ++i)
    shared[tile.row(i) * T::kTeam + tile.member()] = sums.of(i);
  __syncthreads();
  const int r = static_cast<int>(threadIdx.x);
  if (r >= T::kRows) return;
  RowSum<Real> total = shared[r * T::kTeam];
  for (int m = 1; m < T::kTeam; ++m) total = merged(total, shared[r * T::kTeam + m]);
  static_cast<RowSum<Real>*>(a.out)[blockIdx.y * a.logits.rows + first_row + r] = total;
}

UNICOM_HD inline int64_t kept_of_chunk(const Probabilities& a) {
  return min_of(max_of<int64_t>(a.kept_classes - a.first, 0), a.chunk);
}

// The classes of the chunk whose cosines were not kept, up to the tile of the last: nobody reads
// what lies behind it.
template <class Unit, bool kCenters>
__global__ void __launch_bounds__(kThreads, 1)
    probabilities_kernel(__grid_constant__ const Probabilities a) {
  using T = LogitTile<Unit>;
  using Real = typename T::Real;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * T::kRows;
  const int64_t count = row_count(a.logits);
  const int64_t kept = kept_of_chunk(a);
  const TileRun run = run_of_block<T::kCols>(min_of(count - a.first, a.chunk) - kept, a.runs);
  const int64_t first = kept + run.first * T::kCols;  // within the chunk
  const Probability<Unit> probability(a.logits);
  RowScale<Real> scale[T::kThreadRows];
  T tile;
#pragma unroll
  for (int i = 0; i < T::kThreadRows; ++i)
    scale[i] = static_cast<const RowScale<Real>*>(a.row)[first_row + tile.row(i)];
  tile.run(a.plan, run.tiles, static_cast<int>(a.logits.depth / T::kDepth),
           class_tiles<Unit, T>(a.logits, first_row, a.first + first), [&](int t) {
             const int64_t begin = first + int64_t{t} * T::kCols;
             if constexpr (kCenters)
               mask_centers(tile, a.logits, first_row, a.first + begin);
             else
               mask_tile(tile, a.logits, first_row, a.first + begin, count);
             tile.store(static_cast<Unit*>(a.out) + first_row * a.chunk + begin, a.chunk,
                        [&](int i, Real c) { return probability(c, scale[i]); });
           });
}

// The classes of the chunk whose cosines were kept: a thread takes sixteen bytes of a row.
template <class Unit>
__global__ void kept_probabilities_kernel(__grid_constant__ const Probabilities a) {
  using Real = RealOf<Unit>;
  constexpr int kRun = 16 / sizeof(Real);
  using Run = Pack<Real, kRun>;
  const int64_t runs = kept_of_chunk(a) / kRun;  // of a row
  const int64_t row = global_thread() / runs, begin = global_thread() % runs * kRun;
  // Tiles behind the count were not multiplied, and nobody will read them here either.
  constexpr int64_t kTile = kClassCols<Unit>;
  if (row >= a.logits.rows || (a.first + begin) / kTile * kTile >= row_count(a.logits)) return;
  const Probability<Unit> probability(a.logits);
  const auto scale = static_cast<const RowScale<Real>*>(a.row)[row];
  const auto* kept = static_cast<const Real*>(a.kept) + row * a.kept_classes + a.first;
  const Run in = *reinterpret_cast<const Run*>(kept + begin);
  Pack<Unit, kRun> out;
#pragma unroll
  for (int e = 0; e < kRun; ++e) out.values[e] = probability(in.values[e], scale);
  *reinterpret_cast<Pack<Unit, kRun>*>(static_cast<Unit*>(a.out) + row * a.chunk + begin) = out;
}

dim3 logit_grid(const Logits& a, int64_t tile_rows, int64_t runs) {
  return dim3(static_cast<unsigned>(a.rows / tile_rows), static_cast<unsigned>(runs));
}

}  // namespace

template <class Unit>
void sum_exp(Queue& queue, const SumExp& given) {
  if constexpr (UnitTraits<Unit>::kTensorCores) {
    if (sum_exp_on_hopper<Unit>(queue, given)) return;
  }
  using T = LogitTile<Unit>;
  SumExp a = given;
  a.plan = T::plan(queue.shared_limit(), a.logits.depth / T::kDepth);
  auto* kernel =
      a.logits.order.centers > 1 ? sum_exp_kernel<Unit, true> : sum_exp_kernel<Unit, false>;
  queue.launch(kernel, logit_grid(a.logits, T::kRows, a.runs), kThreads, a.plan.bytes, a);
}

template <class Unit>
void probabilities(Queue& queue, const Probabilities& given) {
  if constexpr (UnitTraits<Unit>::kTensorCores) {
    if (probabilities_on_hopper<Unit>(queue, given)) return;
  }
  using T = LogitTile<Unit>;
  Probabilities a = given;
  a.plan = T::plan(queue.shared_limit(), a.logits.depth / T::kDepth);
  const int64_t kept = kept_of_chunk(a);
  if constexpr (!UnitTraits<Unit>::kTensorCores) {
    const int64_t runs = a.logits.rows * kept * int64_t{sizeof(Unit)} / 16;
    queue.launch(kept_probabilities_kernel<Unit>, thread_grid(runs), kThreads, 0, a);
  }
  auto* kernel = a.logits.order.centers > 1 ? probabilities_kernel<Unit, true>
                                            : probabilities_kernel<Unit, false>;
  if (kept < a.chunk)
    queue.launch(kernel, logit_grid(a.logits, T::kRows, a.runs), kThreads, a.plan.bytes, a);
}

#define UNICOM_INSTANTIATE(Unit)                      \
  template void sum_exp<Unit>(Queue&, const SumExp&); \
  template void probabilities<Unit>(Queue&, const Probabilities&)
UNICOM_INSTANTIATE(float);
UNICOM_INSTANTIATE(double);
UNICOM_INSTANTIATE(Half);
UNICOM_INSTANTIATE(BFloat);
#undef UNICOM_INSTANTIATE

}  // namespace unicom::cuda
