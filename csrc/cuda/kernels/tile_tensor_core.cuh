// Tile of sixteen-bit operands on tensor cores: eight warps, two along the rows and four along the
// columns; operands come by asynchronous copies in a ring of two or three stages. A line of shared
// memory is cut into chunks of 16 bytes, and chunk c of line l lies at c ^ (l % 8), so that the
// eight lines that one matrix load touches lie in different banks.
#pragma once

#include "fragments.cuh"
#include "operand.cuh"
#include "tensor_core.cuh"

namespace unicom::cuda {

template <class Unit, int kCols_, bool kADepthInner, bool kBDepthInner>
class TensorCoreTile {
 public:
  using Real = float;
  static constexpr int kRows = 128, kCols = kCols_;
  static constexpr int kDepth = 64;
  static constexpr int kWarpRows = kRows / 2, kWarpCols = kCols / 4;
  static constexpr int kMmaRows = kWarpRows / 16, kMmaCols = kWarpCols / 8;
  static constexpr int kThreadRows = 2 * kMmaRows, kThreadCols = 2 * kMmaCols;
  static constexpr int kRun = 2, kTeam = 16;
  static_assert(kMmaCols % 2 == 0, "matrices of B are loaded in pairs");

  static constexpr int kAUnits = kRows * kDepth, kStageUnits = kAUnits + kCols * kDepth;
  static constexpr int kABytes = static_cast<int>(sizeof(Unit)) * kAUnits;  // of a step
  static constexpr int kStageBytes = static_cast<int>(sizeof(Unit)) * kStageUnits;
  static constexpr size_t kLeastSharedBytes = 2 * (kStageBytes - kABytes);

  // Three stages where a block may have the shared memory (data centre GPUs), else two. A that
  // stays spares a third of what comes from the second-level cache.
  static TilePlan plan(size_t limit, int64_t steps) {
    for (const int stages : {3, 2}) {
      const size_t kept = static_cast<size_t>(steps) * kABytes + stages * (kStageBytes - kABytes);
      if (steps > 0 && kept <= limit) return {stages, true, kept};
      const size_t streamed = static_cast<size_t>(stages) * kStageBytes;
      if (streamed <= limit || stages == 2) return {stages, false, streamed};
    }
    return {};
  }

  UNICOM_DEVICE TensorCoreTile()
      : lane_(lane_index()),
        warp_row_(static_cast<int>(threadIdx.x) / kWarp % 2 * kWarpRows),
        warp_col_(static_cast<int>(threadIdx.x) / kWarp / 2 * kWarpCols) {}

  // Position in the tile of this thread's results.
  UNICOM_DEVICE int row(int i) const { return warp_row_ + i / 2 * 16 + i % 2 * 8 + lane_ / 4; }
  UNICOM_DEVICE int col(int j) const { return warp_col_ + j / 2 * 8 + lane_ % 4 * 2 + j % 2; }
  UNICOM_DEVICE int member() const { return warp_col_ / kWarpCols * 4 + lane_ % 4; }
  UNICOM_DEVICE float& at(int i, int j) { return sums_[i / 2][j / 2][i % 2 * 2 + j % 2]; }

  // source(tile) gives an OperandPair; epilogue(tile) reads the results.
  template <class Source, class Epilogue>
  UNICOM_DEVICE void run(const TilePlan& plan, int tiles, int steps, const Source& source,
                         const Epilogue& epilogue) {
    const SharedAddress all_of_a = shared_address(dynamic_shared<Unit>());
    const SharedAddress shared = all_of_a + (plan.keeps_a ? steps * kABytes : 0);
    const int stage_bytes = plan.keeps_a ? kStageBytes - kABytes : kStageBytes;
    const int ring = plan.stages * stage_bytes;
    const int total = tiles * steps;
    int load_tile = 0, load_step = 0;
    OperandPair<Unit> from = tiles > 0 ? source(0) : OperandPair<Unit>{};
    auto copy_next = [&](int stage) {
      if (load_tile < tiles) {
        const SharedAddress a = plan.keeps_a ? all_of_a + load_step * kABytes : shared + stage;
        const SharedAddress b = plan.keeps_a ? shared + stage : a + kABytes;
        if (!plan.keeps_a || load_tile == 0)
          copy<kRows, kADepthInner>(a, from.a, from.a_stride, load_step);
        copy<kCols, kBDepthInner>(b, from.b, from.b_stride, load_step);
        if (++load_step == steps) {
          load_step = 0;
          if (++load_tile < tiles) from = source(load_tile);
        }
      }
      commit_copies();
    };
    // Offsets of the stage that is multiplied and of the one that is filled, the last to be free.
    int stage = 0, free = ring - stage_bytes;
    copy_next(0);
    if (plan.stages == 3) copy_next(stage_bytes);
    clear();
    int step = 0, tile = 0;
    for (int i = 0; i < total; ++i) {
      if (plan.stages == 3)
        wait_copies<1>();
      else
        wait_copies<0>();
      __syncthreads();
      copy_next(free);
      const SharedAddress now = shared + stage;
      multiply(plan.keeps_a ? all_of_a + step * kABytes : now, plan.keeps_a ? now : now + kABytes);
      free = stage;
      stage += stage_bytes;
      if (stage == ring) stage = 0;
      if (++step == steps) {
        epilogue(tile);
        clear();
        step = 0;
        ++tile;
      }
    }
    wait_copies<0>();
  }

  template <class Convert>
  UNICOM_DEVICE void store(Unit* to, int64_t stride, const Convert& convert) {
    store_fragments(*this, to + warp_col_, stride, convert);
  }

  UNICOM_DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m)
#pragma unroll
      for (int n = 0; n < kMmaCols; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums_[m][n][e] = 0;
  }

 private:
  // One operand of one step: kLines lines, of rows with the depth inside or of depths with rows.
  template <int kCount, bool kDepthInner>
  UNICOM_DEVICE void copy(SharedAddress to, const Unit* from, int stride, int step) const {
    constexpr int kLines = kDepthInner ? kCount : kDepth;
    constexpr int kChunks = (kDepthInner ? kDepth : kCount) / 8;
    from += kDepthInner ? int64_t{step} * kDepth : int64_t{step} * kDepth * stride;
#pragma unroll
    for (int first = 0; first < kLines * kChunks; first += kThreads) {
      const int c = first + static_cast<int>(threadIdx.x);
      const int line = c / kChunks, chunk = c % kChunks;
      copy_async(to + chunk_offset<kChunks>(line, chunk), from + line * stride + chunk * 8);
    }
  }

  template <int kChunks>
  UNICOM_DEVICE static int chunk_offset(int line, int chunk) {
    static_assert(kChunks % 8 == 0);
    return (line * kChunks + (chunk ^ (line % 8))) * 16;
  }

  // A 16 x 16 part of A at (row, depth) in the registers of mma's first operand.
  UNICOM_DEVICE void load_a(uint32_t (&r)[4], SharedAddress a, int row, int depth) const {
    if constexpr (kADepthInner)
      load_matrices(r, a + chunk_offset<kDepth / 8>(row + lane_ % 16, depth / 8 + lane_ / 16));
    else
      load_matrices_transposed(r, a + chunk_offset<kRows / 8>(depth + lane_ % 8 + lane_ / 16 * 8,
                                                              row / 8 + lane_ / 8 % 2));
  }
  // Two neighbouring 8-column parts of B at (col, depth): {r[0], r[1]} and {r[2], r[3]}.
  UNICOM_DEVICE void load_b(uint32_t (&r)[4], SharedAddress b, int col, int depth) const {
    if constexpr (kBDepthInner)
      load_matrices(r, b + chunk_offset<kDepth / 8>(col + lane_ % 8 + lane_ / 16 * 8,
                                                    depth / 8 + lane_ / 8 % 2));
    else
      load_matrices_transposed(
          r, b + chunk_offset<kCols / 8>(depth + lane_ % 16, col / 8 + lane_ / 16));
  }

  UNICOM_DEVICE void multiply(SharedAddress a, SharedAddress b) {
#pragma unroll
    for (int depth = 0; depth < kDepth; depth += 16) {
      uint32_t left[kMmaRows][4], right[kMmaCols / 2][4];
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m) load_a(left[m], a, warp_row_ + 16 * m, depth);
#pragma unroll
      for (int n = 0; n < kMmaCols / 2; ++n) load_b(right[n], b, warp_col_ + 16 * n, depth);
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m)
#pragma unroll
        for (int n = 0; n < kMmaCols; ++n)
          multiply_add<Unit>(sums_[m][n], left[m], right[n / 2][n % 2 * 2],
                             right[n / 2][n % 2 * 2 + 1]);
    }
  }

  const int lane_, warp_row_, warp_col_;
  float sums_[kMmaRows][kMmaCols][4];
};

}  // namespace unicom::cuda
