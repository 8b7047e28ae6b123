// Tile of float or double operands on the ordinary units: 16 x 16 threads. Shared memory holds both
// operands with the depth outermost, so that a thread reads runs of neighbouring rows and columns.
#pragma once

#include "operand.cuh"

namespace unicom::cuda {

template <class Unit, int kCols_, bool kADepthInner, bool kBDepthInner>
class SimtTile {
 public:
  using Real = Unit;
  // A run of values that one load of 16 bytes brings.
  static constexpr int kRun = 16 / sizeof(Unit);
  static constexpr int kRows = 16 * 32 / sizeof(Unit);  // 128 floats or 64 doubles
  static constexpr int kCols = kCols_;
  static constexpr int kDepth = 16, kTeam = 16;
  static constexpr int kThreadRows = kRows / 16, kThreadCols = kCols / 16;
  static_assert(kThreadRows % kRun == 0 && kThreadCols % kRun == 0);

  // A padded line keeps stores that turn rows into columns from meeting in one bank.
  static constexpr int kALine = kRows + kRun, kBLine = kCols + kRun;
  static constexpr int kStageUnits = kDepth * (kALine + kBLine);
  static constexpr size_t kLeastSharedBytes = sizeof(Unit) * 2 * kStageUnits;
  static TilePlan plan(size_t, int64_t) { return {2, false, kLeastSharedBytes}; }

  UNICOM_DEVICE SimtTile()
      : team_row_(static_cast<int>(threadIdx.x) / 16),
        member_(static_cast<int>(threadIdx.x) % 16) {}

  UNICOM_DEVICE int row(int i) const { return (i / kRun * 16 + team_row_) * kRun + i % kRun; }
  UNICOM_DEVICE int col(int j) const { return (j / kRun * 16 + member_) * kRun + j % kRun; }
  UNICOM_DEVICE int member() const { return member_; }
  UNICOM_DEVICE Unit& at(int i, int j) { return sums_[i][j]; }

  template <class Source, class Epilogue>
  UNICOM_DEVICE void run(const TilePlan&, int tiles, int steps, const Source& source,
                         const Epilogue& epilogue) {
    Unit* shared = dynamic_shared<Unit>();
    const int total = tiles * steps;
    int load_tile = 0, load_step = 0;
    OperandPair<Unit> from = tiles > 0 ? source(0) : OperandPair<Unit>{};
    Fetched<kRows> a;
    Fetched<kCols> b;
    auto fetch_next = [&] {
      if (load_tile >= tiles) return;
      fetch<kRows, kADepthInner>(a, from.a, from.a_stride, load_step);
      fetch<kCols, kBDepthInner>(b, from.b, from.b_stride, load_step);
      if (++load_step == steps) {
        load_step = 0;
        if (++load_tile < tiles) from = source(load_tile);
      }
    };
    auto put = [&](Unit* stage) {
      store<kRows, kADepthInner, kALine>(stage, a);
      store<kCols, kBDepthInner, kBLine>(stage + kDepth * kALine, b);
    };
    if (total > 0) {
      fetch_next();
      put(shared);
    }
    clear();
    int step = 0, tile = 0;
    for (int i = 0; i < total; ++i) {
      __syncthreads();
      fetch_next();
      multiply(shared + i % 2 * kStageUnits);
      if (i + 1 < total) put(shared + (i + 1) % 2 * kStageUnits);
      if (++step == steps) {
        epilogue(tile);
        clear();
        step = 0;
        ++tile;
      }
    }
  }

  template <class Convert>
  UNICOM_DEVICE void store(Unit* to, int64_t stride, const Convert& convert) const {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
      for (int j = 0; j < kThreadCols; j += kRun) {
        Run out;
#pragma unroll
        for (int e = 0; e < kRun; ++e) out.values[e] = convert(i, sums_[i][j + e]);
        *reinterpret_cast<Run*>(to + row(i) * stride + col(j)) = out;
      }
  }

  UNICOM_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
      for (int j = 0; j < kThreadCols; ++j) sums_[i][j] = 0;
  }

 private:
  using Run = Pack<Unit, kRun>;
  // What one thread brings of one operand of one step.
  template <int kCount>
  struct Fetched {
    static constexpr int kRuns = kCount * kDepth / kRun / kThreads;
    static_assert(kRuns * kRun * kThreads == kCount * kDepth);
    Run runs[kRuns];
  };

  // Line and run within the line, in memory, of this thread's r-th run.
  template <int kCount, bool kDepthInner>
  UNICOM_DEVICE static void place(int r, int* line, int* run) {
    constexpr int kRunsPerLine = (kDepthInner ? kDepth : kCount) / kRun;
    const int c = r * kThreads + static_cast<int>(threadIdx.x);
    *line = c / kRunsPerLine;
    *run = c % kRunsPerLine;
  }

  template <int kCount, bool kDepthInner>
  UNICOM_DEVICE static void fetch(Fetched<kCount>& out, const Unit* from, int stride, int step) {
    from += kDepthInner ? int64_t{step} * kDepth : int64_t{step} * kDepth * stride;
#pragma unroll
    for (int r = 0; r < Fetched<kCount>::kRuns; ++r) {
      int line, run;
      place<kCount, kDepthInner>(r, &line, &run);
      out.runs[r] = *reinterpret_cast<const Run*>(from + line * stride + run * kRun);
    }
  }

  template <int kCount, bool kDepthInner, int kLine>
  UNICOM_DEVICE static void store(Unit* to, const Fetched<kCount>& in) {
#pragma unroll
    for (int r = 0; r < Fetched<kCount>::kRuns; ++r) {
      int line, run;
      place<kCount, kDepthInner>(r, &line, &run);
      if constexpr (kDepthInner) {
#pragma unroll
        for (int e = 0; e < kRun; ++e) to[(run * kRun + e) * kLine + line] = in.runs[r].values[e];
      } else {
        *reinterpret_cast<Run*>(to + line * kLine + run * kRun) = in.runs[r];
      }
    }
  }

  UNICOM_DEVICE void multiply(const Unit* a) {
    const Unit* b = a + kDepth * kALine;
#pragma unroll 4
    for (int k = 0; k < kDepth; ++k) {
      Run left[kThreadRows / kRun], right[kThreadCols / kRun];
#pragma unroll
      for (int i = 0; i < kThreadRows / kRun; ++i)
        left[i] = *reinterpret_cast<const Run*>(a + k * kALine + row(i * kRun));
#pragma unroll
      for (int j = 0; j < kThreadCols / kRun; ++j)
        right[j] = *reinterpret_cast<const Run*>(b + k * kBLine + col(j * kRun));
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
        for (int j = 0; j < kThreadCols; ++j)
          sums_[i][j] += left[i / kRun].values[i % kRun] * right[j / kRun].values[j % kRun];
    }
  }

  const int team_row_, member_;
  Unit sums_[kThreadRows][kThreadCols];
};

}  // namespace unicom::cuda
