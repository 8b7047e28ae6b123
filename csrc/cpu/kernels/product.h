// The register tile: up to six broadcast rows times one or several panels of sixteen lanes.
// Every product of the operation (logits, both gradients) is this loop over other operands.
#pragma once

#include "kernels.h"
#include "matrix_unit.h"
#include "simd.h"

namespace unicom::cpu {
namespace {

// acc[m][.] += sum over u of a[u * kStepU + m * kStepM] * b[p * b_stride + u]
template <class Unit>
struct MultiplyAdd;

template <class Real>
struct MultiplyAddReal {
  template <int M, int P, int kStepM, int kStepU>
  static UNICOM_INLINE void run(Vec<Real> (&acc)[M][P * kVectors<Real>], const Real* a,
                                const Real* b, int64_t b_stride, int64_t units) {
    constexpr int kV = kVectors<Real>;
#pragma GCC unroll 2
    for (int64_t u = 0; u < units; ++u) {
      Vec<Real> line[P * kV];
#pragma GCC unroll 8
      for (int v = 0; v < P * kV; ++v)
        line[v] = load(b + (v / kV) * b_stride + u * kLanes + (v % kV) * kWidth<Real>);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Vec<Real> value = broadcast(a[u * kStepU + m * kStepM]);
#pragma GCC unroll 8
        for (int v = 0; v < P * kV; ++v) acc[m][v] = fma(value, line[v], acc[m][v]);
      }
    }
  }
};
template <>
struct MultiplyAdd<float> : MultiplyAddReal<float> {};
template <>
struct MultiplyAdd<double> : MultiplyAddReal<double> {};

template <>
struct MultiplyAdd<BfPair> {
  template <int M, int P, int kStepM, int kStepU>
  static UNICOM_INLINE void run(Vec<float> (&acc)[M][P * kVectors<float>], const BfPair* a,
                                const BfPair* b, int64_t b_stride, int64_t units) {
    constexpr int kV = kVectors<float>;
    for (int64_t u = 0; u < units; ++u) {
      WordVec line[P * kV];
#pragma GCC unroll 8
      for (int v = 0; v < P * kV; ++v)
        line[v] = load_words(b + (v / kV) * b_stride + u * kLanes + (v % kV) * kWidth<float>);
#if defined(__AVX512BF16__)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        uint32_t word;
        std::memcpy(&word, a + u * kStepU + m * kStepM, 4);
        const __m512bh value = (__m512bh)_mm512_set1_epi32(static_cast<int>(word));
#pragma GCC unroll 8
        for (int v = 0; v < P * kV; ++v)
          acc[m][v] = (Vec<float>)_mm512_dpbf16_ps((__m512)acc[m][v], value, (__m512bh)line[v]);
      }
#else
      // Without the instruction: the same sum as two fp32 multiply-adds, odd half first.
      Vec<float> half[P * kV];
#pragma GCC unroll 8
      for (int v = 0; v < P * kV; ++v) half[v] = odd_half(line[v]);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Vec<float> value = broadcast(bf16_to_float(a[u * kStepU + m * kStepM].odd));
#pragma GCC unroll 8
        for (int v = 0; v < P * kV; ++v) acc[m][v] = fma(value, half[v], acc[m][v]);
      }
#pragma GCC unroll 8
      for (int v = 0; v < P * kV; ++v) half[v] = even_half(line[v]);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Vec<float> value = broadcast(bf16_to_float(a[u * kStepU + m * kStepM].even));
#pragma GCC unroll 8
        for (int v = 0; v < P * kV; ++v) acc[m][v] = fma(value, half[v], acc[m][v]);
      }
#endif
    }
  }
};

// Lines of Ahead, some at each step.
class LinesAhead {
 public:
  LinesAhead(Ahead ahead, int64_t steps) : next_(ahead.spans), last_(ahead.spans + ahead.count) {
    int64_t lines = 0;
    for (const Span* span = next_; span < last_; ++span) lines += ceil_div(span->bytes, kLine);
    lines_per_step_ = ceil_div(lines, steps);
  }
  UNICOM_INLINE void ask() {
    for (int64_t i = 0; i < lines_per_step_; ++i, line_ += kLine) {
      if (line_ >= end_) {
        if (next_ == last_) return;
        line_ = static_cast<const char*>(next_->begin);
        end_ = line_ + next_->bytes;
        ++next_;
      }
      __builtin_prefetch(line_);
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const Span *next_, *last_;
  int64_t lines_per_step_;
  const char *line_ = nullptr, *end_ = nullptr;
};
// Units of a product between two steps.
constexpr int64_t kAskUnits = 32;
static constexpr int64_t ask_steps(int64_t units) { return ceil_div(units, kAskUnits); }

// Rows per register tile, and panels beside each other, so that the accumulators fill the
// registers.
template <class Real>
constexpr int kRegisterRows =
    UNICOM_VECTOR_BYTES >= 32 ? (sizeof(Real) == 4 ? 6 : 3) : (sizeof(Real) == 4 ? 2 : 1);
template <class Real>
constexpr int kRegisterPanels = UNICOM_VECTOR_BYTES == 64 && sizeof(Real) == 4 ? 4 : 1;

// Where a tile of `a` lies; see Product in kernels.h.
template <class Unit>
struct TileOperand {
  const Unit* a;
  int64_t group_units;  // 1 of tile panels
  int64_t group_stride;
};

// out[p * out_panel + m * 16 + lane] (+)= the product of one tile with P panels. It begins at zero and
// joins what is there at the end: sums of sums, whose rounding grows much less with their length.
// Not inlined: alone, the loop gets all the registers.
template <class Unit, int P>
__attribute__((noinline)) void multiply_tile(TileOperand<Unit> tile, const Unit* b,
                                             int64_t b_stride, int64_t units, RealOf<Unit>* out,
                                             int64_t out_panel, bool accumulate,
                                             LinesAhead* ahead) {
  using Real = RealOf<Unit>;
  constexpr int kV = kVectors<Real>;
  constexpr int M = kRegisterRows<Real>;
  constexpr int kGroup = kLanes / UnitTraits<Unit>::kValues;
  for (int first = 0; first < kTile; first += M) {
    Vec<Real> acc[M][P * kV];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < P * kV; ++v) acc[m][v] = Vec<Real>{};
    if (tile.group_units == 1) {
      for (int64_t u = 0; u < units; u += kAskUnits) {
        ahead->ask();
        MultiplyAdd<Unit>::template run<M, P, 1, kTile>(
            acc, tile.a + u * kTile + first, b + u * kLanes, b_stride,
            units - u < kAskUnits ? units - u : kAskUnits);
      }
    } else {
      const Unit* a = tile.a + first * kGroup;
      for (int64_t u = 0; u < units; u += kGroup, a += tile.group_stride)
        MultiplyAdd<Unit>::template run<M, P, kGroup, 1>(acc, a, b + u * kLanes, b_stride,
                                                         units - u < kGroup ? units - u : kGroup);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < P * kV; ++v) {
        Real* sum = out + (v / kV) * out_panel + (first + m) * kLanes + (v % kV) * kWidth<Real>;
        store(sum, accumulate ? load(sum) + acc[m][v] : acc[m][v]);
      }
  }
}

// Whether products of these units are those of the matrix unit.
#if defined(UNICOM_MATRIX_UNIT)
template <class Unit>
constexpr bool kInSquares = std::is_same_v<Unit, BfPair> || std::is_same_v<Unit, ByteQuad>;
#else
template <class Unit>
constexpr bool kInSquares = false;
#endif

struct NoMatrixUnit {
  NoMatrixUnit() {}  // so that it is not unused
};
template <class Unit>
using MatrixUnitFor = std::conditional_t<kInSquares<Unit>, MatrixUnit, NoMatrixUnit>;

template <class Unit>
constexpr TileLayout kTileLayout =
    kInSquares<Unit> ? TileLayout{kSquare, kSquare, kSquare}
                     : TileLayout{kTile, 1, kLanes / UnitTraits<Unit>::kValues};

// Tiles that are multiplied together: whole squares of rows, where there are squares.
template <class Unit>
constexpr int64_t kTilesTogether = kInSquares<Unit> ? kSquare : 1;
template <class Unit>
constexpr int64_t kScratch = kTilesTogether<Unit> * kTile * kLanes;  // sums of a panel

// out [P][kScratch]: sums of the tiles `tile`, ... of a block, as many as go together, with the
// panels panel, ... panel + P - 1.
template <int P, class Unit, class Step>
UNICOM_INLINE void multiply_together(const CosineBlock<Unit>& block, int64_t panel, int64_t tile,
                                     SumOf<Unit>* out, const Step& step) {
  const int64_t left = block.tiles - tile;
  const int64_t tiles = left < kTilesTogether<Unit> ? left : kTilesTogether<Unit>;
  multiply_squares<Unit>(
      block.rows + tile * block.row_tile_stride, block.row_tile_stride / kTile * kSquare,
      kSquareUnits, ceil_div(tiles * kTile, kSquare), block.classes + panel * block.panel_stride,
      block.panel_stride, P, block.units, true, false, out, kScratch<Unit>, step);
}

// `product` in squares. Here sums go on from block to block: what they lose is little beside what
// the operands have lost.
template <class Unit>
void product_of_squares(const Product<Unit>& args) {
  using Real = RealOf<Unit>;
  constexpr int64_t kBlock = 16 * kSquare;  // two panels of it stay in the first-level cache
  alignas(64) Real last[2 * kSquareUnits];
  const MatrixUnitFor<Unit> unit;
  const int64_t whole = args.rows / kSquare, rest = args.rows % kSquare * kLanes;
  LinesAhead ahead(args.ahead, ceil_div(args.rows, 2 * kSquare) * ceil_div(args.panels, 2) *
                                   ceil_div(args.units, kSquare));
  const auto ask = [&ahead] { ahead.ask(); };
  for (int64_t begin = 0; begin < args.units; begin += kBlock) {
    const int64_t units = args.units - begin < kBlock ? args.units - begin : kBlock;
    const bool accumulate = args.accumulate || begin > 0;
    const Unit* a = args.a + begin / kSquare * args.group_stride;
    for (int64_t p = 0; p < args.panels; p += 2) {
      const int64_t panels = args.panels - p < 2 ? args.panels - p : 2;
      const Unit* b = args.b + p * args.b_panel_stride + begin * kLanes;
      Real* out = args.out + p * args.out_panel_stride;
      multiply_squares<Unit>(a, args.a_tile_stride, args.group_stride, whole, b,
                             args.b_panel_stride, panels, units, false, accumulate, out,
                             args.out_panel_stride, ask);
      if (rest == 0) continue;
      out += whole * kSquareUnits;
      for (int64_t j = 0; j < panels && accumulate; ++j)
        std::memcpy(last + j * kSquareUnits, out + j * args.out_panel_stride, rest * sizeof(Real));
      multiply_squares<Unit>(a + whole * args.a_tile_stride, args.a_tile_stride, args.group_stride,
                             1, b, args.b_panel_stride, panels, units, false, accumulate, last,
                             kSquareUnits, ask);
      for (int64_t j = 0; j < panels; ++j)
        std::memcpy(out + j * args.out_panel_stride, last + j * kSquareUnits, rest * sizeof(Real));
    }
  }
}

template <class Unit>
void product(const Product<Unit>& args) {
  using Real = RealOf<Unit>;
  if constexpr (kInSquares<Unit>) return product_of_squares(args);
  constexpr int P = kRegisterPanels<Real>;
  constexpr int kGroup = kLanes / UnitTraits<Unit>::kValues;
  // A block of the summed dimension whose lines of b stay in the first-level cache over all tiles.
  constexpr int64_t kBlock = 16384 / (kLanes * sizeof(Unit) * P) / kGroup * kGroup;
  const int64_t tiles = args.rows / kTile;
  const int64_t groups = args.panels / P + args.panels % P;
  LinesAhead ahead(args.ahead, tiles * groups * ask_steps(args.units));
  for (int64_t begin = 0; begin < args.units; begin += kBlock) {
    const int64_t units = args.units - begin < kBlock ? args.units - begin : kBlock;
    const bool accumulate = args.accumulate || begin > 0;
    const int64_t a_offset = begin / args.group_units * args.group_stride;
    auto run = [&](auto panels, int64_t panel) {
      for (int64_t t = 0; t < tiles; ++t)
        multiply_tile<Unit, decltype(panels)::value>(
            {args.a + t * args.a_tile_stride + a_offset, args.group_units, args.group_stride},
            args.b + panel * args.b_panel_stride + begin * kLanes, args.b_panel_stride, units,
            args.out + panel * args.out_panel_stride + t * kTile * kLanes, args.out_panel_stride,
            accumulate, &ahead);
    };
    int64_t panel = 0;
    for (; panel + P <= args.panels; panel += P) run(std::integral_constant<int, P>{}, panel);
    for (; panel < args.panels; ++panel) run(std::integral_constant<int, 1>{}, panel);
  }
}

}  // namespace
}  // namespace unicom::cpu
