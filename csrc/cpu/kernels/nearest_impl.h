// The search for the nearest class: the register tile with a comparison in place of the
// exponentials.
#pragma once

#include <limits>

#include "product.h"

namespace unicom::cpu {
namespace {

// Takes in the classes first, first + 1, ... whose scores are above the floor.
__attribute__((noinline)) void add_candidates(const Nearest& args, int64_t row, const float* scores,
                                              int64_t lanes, int64_t first) {
  constexpr int kW = kWidth<float>;
  float& floor = args.floor[row];
  int32_t* candidate = args.candidate + row * args.capacity;
  float* score = args.score + row * args.capacity;
  int32_t count = args.count[row];
  // The best of these first: it raises the floor, and few of the others remain.
  Vec<float> best = load(scores);
  for (int64_t lane = kW; lane < lanes; lane += kW) {
    const Vec<float> next = load(scores + lane);
    best = next > best ? next : best;
  }
  const float raised = horizontal_max<float>(best) - args.window[row];
  floor = raised > floor ? raised : floor;
  for (int64_t start = 0; start < lanes; start += kW) {
    uint32_t above = lane_bits(load(scores + start) > broadcast(floor));
    for (; above != 0; above &= above - 1) {
      const int64_t lane = start + __builtin_ctz(above);
      if (count == args.capacity) {
        // The floor has risen since the first ones came.
        count = 0;
        for (int32_t i = 0; i < args.capacity; ++i)
          if (score[i] > floor) {
            candidate[count] = candidate[i];
            score[count++] = score[i];
          }
        if (count == args.capacity) {
          args.count[row] = static_cast<int32_t>(args.capacity) + 1;
          floor = std::numeric_limits<float>::infinity();
          return;
        }
      }
      candidate[count] = static_cast<int32_t>(first + lane);
      score[count++] = scores[lane];
    }
  }
  args.count[row] = count;
}

// Emulated 512-bit kernels stand for those with VNNI, so that what these ask of the host is
// tested on every CPU.
#if defined(__AVX512VNNI__) || (UNICOM_VECTOR_BYTES == 64 && !defined(__AVX512F__))
constexpr int32_t kLargest = 127;
constexpr int kRun = 1;  // units that are added up before they join the 32-bit sums
constexpr int kRows = 6;

UNICOM_INLINE IntVec<float> add_products(IntVec<float> acc, const WordVec (&a)[kRun],
                                         const WordVec (&b)[kRun]) {
#if defined(__AVX512VNNI__)
  return (IntVec<float>)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a[0], (__m512i)b[0]);
#else
  for (int i = 0; i < 4; ++i)
    acc += (IntVec<float>)(a[0] >> (8 * i) & 0xffu) * ((IntVec<float>)(b[0] << (24 - 8 * i)) >> 24);
  return acc;
#endif
}
#else
// Sums of 16 bits, for as long as they hold: four products of at most 126 * 63 are 31,752.
constexpr int32_t kLargest = 63;
constexpr int kRun = 2;
constexpr int kRows = 3;  // few, as the lines of a run need registers too

typedef int16_t Int16Vec __attribute__((vector_size(UNICOM_VECTOR_BYTES)));

// The sums of two products each: of unsigned bytes and signed ones.
UNICOM_INLINE Int16Vec pair_products(WordVec a, WordVec b) {
#if defined(__AVX512BW__) && UNICOM_VECTOR_BYTES == 64
  return (Int16Vec)_mm512_maddubs_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && UNICOM_VECTOR_BYTES == 32
  return (Int16Vec)_mm256_maddubs_epi16((__m256i)a, (__m256i)b);
#else
  const Int16Vec low = (Int16Vec)(a & 0x00ff00ffu), high = (Int16Vec)((a >> 8) & 0x00ff00ffu);
  return low * (((Int16Vec)b << 8) >> 8) + high * ((Int16Vec)b >> 8);
#endif
}

// The sums of two neighbours each.
UNICOM_INLINE IntVec<float> pair_sums(Int16Vec x) {
#if defined(__AVX512BW__) && UNICOM_VECTOR_BYTES == 64
  return (IntVec<float>)_mm512_madd_epi16((__m512i)x, _mm512_set1_epi16(1));
#elif defined(__AVX2__) && UNICOM_VECTOR_BYTES == 32
  return (IntVec<float>)_mm256_madd_epi16((__m256i)x, _mm256_set1_epi16(1));
#else
  return (((IntVec<float>)x << 16) >> 16) + ((IntVec<float>)x >> 16);
#endif
}

UNICOM_INLINE IntVec<float> add_products(IntVec<float> acc, const WordVec (&a)[kRun],
                                         const WordVec (&b)[kRun]) {
  Int16Vec sum = pair_products(a[0], b[0]);
#pragma GCC unroll 8
  for (int s = 1; s < kRun; ++s) sum += pair_products(a[s], b[s]);
  return acc + pair_sums(sum);
}
#endif

// acc[m][.] += sum over u of a[6 u + m] * b[p * b_stride + u], the four products of each
template <int P>
UNICOM_INLINE void multiply_bytes(IntVec<float> (&acc)[kRows][P * kVectors<float>],
                                  const ByteQuad* a, const ByteQuad* b, int64_t b_stride,
                                  int64_t units) {
  constexpr int kV = kVectors<float>;
  for (int64_t u = 0; u < units; u += kRun) {
    WordVec line[P * kV][kRun];
#pragma GCC unroll 8
    for (int s = 0; s < kRun; ++s)
#pragma GCC unroll 8
      for (int v = 0; v < P * kV; ++v)
        line[v][s] =
            load_words(b + (v / kV) * b_stride + (u + s) * kLanes + (v % kV) * kWidth<float>);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      WordVec value[kRun];
#pragma GCC unroll 8
      for (int s = 0; s < kRun; ++s) {
        uint32_t word;
        std::memcpy(&word, a + (u + s) * kTile + m, 4);
        value[s] = WordVec{} + word;
      }
#pragma GCC unroll 8
      for (int v = 0; v < P * kV; ++v) acc[m][v] = add_products(acc[m][v], value, line[v]);
    }
  }
}

// The compiler may not carry what it knows of these values past this point. Without it, it moves
// the accumulators about inside the loop between two such points.
template <int M, int N>
UNICOM_INLINE void keep_in_registers([[maybe_unused]] IntVec<float> (&acc)[M][N]) {
#if defined(__AVX512F__) && UNICOM_VECTOR_BYTES == 64
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) asm("" : "+v"(acc[m][v]));
#endif
}

// Sums that have been multiplied before they are looked at, on the matrix unit.
class SumsAhead {
 public:
  // Those of the tiles from `tile` on that go together.
  template <int P>
  UNICOM_INLINE void multiply(const ByteBlock& args, int64_t panel, int64_t tile) {
    if constexpr (kInSquares<ByteQuad>)
      if (tile % kTilesTogether<ByteQuad> == 0)
        multiply_together<P, ByteQuad>(args, panel, tile, sums_, [] {});
  }
  // [16], of a row of the tile and panel p of the P.
  UNICOM_INLINE const int32_t* of(int64_t tile, int row, int p) const {
    return sums_ + p * kScratch<ByteQuad> +
           (tile % kTilesTogether<ByteQuad> * kTile + row) * kLanes;
  }

 private:
  const MatrixUnitFor<ByteQuad> unit_;
  alignas(64) int32_t sums_[kInSquares<ByteQuad> ? kRegisterPanels<float> * kScratch<ByteQuad> : 1];
};

// Sums of products of the rows first, ... first + kRows - 1 of one tile with the panels panel, ...
// panel + P - 1.
template <int P>
UNICOM_INLINE void sum_products(const ByteBlock& args, [[maybe_unused]] const SumsAhead& ahead,
                                int64_t panel, int64_t tile, int first,
                                IntVec<float> (&acc)[kRows][P * kVectors<float>]) {
  const int32_t* start = args.class_start + panel * kLanes;
  if constexpr (kInSquares<ByteQuad>) {
    constexpr int kV = kVectors<float>;
#pragma GCC unroll 8
    for (int v = 0; v < P * kV; ++v)
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m)
        acc[m][v] =
            (IntVec<float>)load_words(start + v * kWidth<float>) +
            (IntVec<float>)load_words(ahead.of(tile, first + m, v / kV) + v % kV * kWidth<float>);
    return;
  }
#pragma GCC unroll 8
  for (int v = 0; v < P * kVectors<float>; ++v)
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
      acc[m][v] = (IntVec<float>)load_words(start + v * kWidth<float>);
  keep_in_registers(acc);
  multiply_bytes<P>(acc, args.rows + tile * args.row_tile_stride + first,
                    args.classes + panel * args.panel_stride, args.panel_stride, args.units);
  keep_in_registers(acc);
}

// Scores [6][16 P] of one tile and the panels panel, ... panel + P - 1, of those rows that have one
// above their floor; returns a bit for each of these rows.
// Not inlined: alone, the loop gets all the registers.
template <int P>
__attribute__((noinline)) unsigned tile_scores(const Nearest& args, const SumsAhead& ahead,
                                               int64_t panel, int64_t tile, float* scores) {
  constexpr int kN = P * kVectors<float>;
  constexpr int kW = kWidth<float>;
  const float* bias = args.class_bias + panel * kLanes;
  const float* class_scale = args.class_scale + panel * kLanes;
  unsigned found = 0;
  for (int first = 0; first < kTile; first += kRows) {
    IntVec<float> acc[kRows][kN];
    sum_products<P>(args, ahead, panel, tile, first, acc);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const int64_t r = tile * kTile + first + m;
      const Vec<float> floor = broadcast(args.floor[r]);
      const Vec<float> scale = broadcast(args.row_scale[r]);
      Vec<float> score[kN];
      IntVec<float> above{};
#pragma GCC unroll 8
      for (int v = 0; v < kN; ++v) {
        score[v] = fma(__builtin_convertvector(acc[m][v], Vec<float>) * load(class_scale + v * kW),
                       scale, load(bias + v * kW));
        above |= score[v] > floor;
      }
      if (any(above)) {
        found |= 1u << (first + m);
#pragma GCC unroll 8
        for (int v = 0; v < kN; ++v) store(scores + (first + m) * P * kLanes + v * kW, score[v]);
      }
    }
  }
  return found;
}

void nearest(const Nearest& args) {
  constexpr int P = kRegisterPanels<float>;
  alignas(64) float scores[kTile * P * kLanes];
  SumsAhead ahead;
  for (int64_t r = 0; r < args.tiles * kTile; ++r) args.count[r] = 0;
  auto panels_at = [&](auto count, int64_t panel) {
    constexpr int kCount = decltype(count)::value;
    for (int64_t t = 0; t < args.tiles; ++t) {
      ahead.multiply<kCount>(args, panel, t);
      unsigned found = tile_scores<kCount>(args, ahead, panel, t, scores);
      for (; found != 0; found &= found - 1) {
        const int m = __builtin_ctz(found);
        add_candidates(args, t * kTile + m, scores + m * kCount * kLanes, kCount * kLanes,
                       panel * kLanes);
      }
    }
  };
  int64_t panel = 0;
  for (; panel + P <= args.panels; panel += P) panels_at(std::integral_constant<int, P>{}, panel);
  for (; panel < args.panels; ++panel) panels_at(std::integral_constant<int, 1>{}, panel);
}

// A bit for each lane of which the sum is above the limit.
UNICOM_INLINE uint32_t bits_above(IntVec<float> sums, int32_t limit) {
#if defined(__AVX512F__) && UNICOM_VECTOR_BYTES == 64
  return _mm512_cmpgt_epi32_mask((__m512i)sums, _mm512_set1_epi32(limit));
#else
  return lane_bits(sums > broadcast_int<float>(limit));
#endif
}

// The marks of one tile for the panels panel, ... panel + P - 1. Not inlined, like tile_scores.
template <int P>
__attribute__((noinline)) void mark_tile(const Screen& args, const SumsAhead& ahead, int64_t panel,
                                         int64_t tile) {
  constexpr int kV = kVectors<float>, kN = P * kV;
  constexpr int kW = kWidth<float>;
  for (int first = 0; first < kTile; first += kRows) {
    IntVec<float> acc[kRows][kN];
    sum_products<P>(args, ahead, panel, tile, first, acc);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const int64_t r = tile * kTile + first + m;
      const int32_t limit = args.limit[r];
      uint16_t* marks = args.marks + r * args.marks_stride + panel;
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        uint32_t bits = 0;
#pragma GCC unroll 8
        for (int v = 0; v < kV; ++v) bits |= bits_above(acc[m][p * kV + v], limit) << (v * kW);
        marks[p] = static_cast<uint16_t>(bits);
      }
    }
  }
}

void screen(const Screen& args) {
  constexpr int P = kRegisterPanels<float>;
  SumsAhead ahead;
  const auto panels_at = [&](auto count, int64_t panel) {
    constexpr int kCount = decltype(count)::value;
    for (int64_t t = 0; t < args.tiles; ++t) {
      ahead.multiply<kCount>(args, panel, t);
      mark_tile<kCount>(args, ahead, panel, t);
    }
  };
  int64_t panel = 0;
  for (; panel + P <= args.panels; panel += P) panels_at(std::integral_constant<int, P>{}, panel);
  for (; panel < args.panels; ++panel) panels_at(std::integral_constant<int, 1>{}, panel);
}

// How many lanes of a group are marked cannot be foreseen: the first few are written whether they
// are there or not.
int64_t list_marks(const uint16_t* marks, int64_t panels, int32_t first, int32_t* out) {
  constexpr uint64_t kLast = uint64_t{1} << 63;
  int32_t* const begin = out;
  for (int64_t p = 0; p < panels; p += kMarkedPanels) {
    uint64_t bits;
    std::memcpy(&bits, marks + p, sizeof(bits));
    const int count = __builtin_popcountll(bits);
    const int32_t at = first + static_cast<int32_t>(p * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kMoreMarks; ++i, bits &= bits - 1)
      out[i] = at + __builtin_ctzll(bits | kLast);
    for (int i = kMoreMarks; i < count; ++i, bits &= bits - 1) out[i] = at + __builtin_ctzll(bits);
    out += count;
  }
  return out - begin;
}

UNICOM_INLINE int32_t sum_of_lanes(IntVec<float> sums) {
#if defined(__AVX512F__) && UNICOM_VECTOR_BYTES == 64
  return _mm512_reduce_add_epi32((__m512i)sums);
#else
  int32_t sum = 0;
  for (int i = 0; i < kWidth<float>; ++i) sum += sums[i];
  return sum;
#endif
}

template <int N>
UNICOM_INLINE void products_of(const ByteProducts& args, int64_t first) {
  const uint8_t* line[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) line[i] = args.matrix + args.wanted[first + i] * args.bytes;
  IntVec<float> acc[N] = {};
  for (int64_t k = 0; k < args.bytes; k += kRun * UNICOM_VECTOR_BYTES) {
    WordVec row[kRun];
#pragma GCC unroll 8
    for (int s = 0; s < kRun; ++s) row[s] = load_words(args.row + k + s * UNICOM_VECTOR_BYTES);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      WordVec value[kRun];
#pragma GCC unroll 8
      for (int s = 0; s < kRun; ++s) value[s] = load_words(line[i] + k + s * UNICOM_VECTOR_BYTES);
      acc[i] = add_products(acc[i], row, value);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) args.sums[first + i] = sum_of_lanes(acc[i]);
}

void byte_products(const ByteProducts& args) {
  constexpr int64_t kAhead = 8;
  int64_t i = 0;
  for (; i + 4 <= args.count; i += 4) {
    for (int64_t next = i + kAhead; next < i + kAhead + 4 && next < args.count; ++next)
      for (int64_t k = 0; k < args.bytes; k += 64)
        __builtin_prefetch(args.matrix + args.wanted[next] * args.bytes + k);
    products_of<4>(args, i);
  }
  for (; i < args.count; ++i) products_of<1>(args, i);
}

typedef uint8_t ByteStore
    __attribute__((vector_size(UNICOM_VECTOR_BYTES / 4), aligned(1), may_alias));

Bytes to_bytes(const ToBytes& args) {
  constexpr int kW = kWidth<float>;
  // The vector at k, zero past the end.
  const auto at = [&](int64_t k) {
    if (k + kW <= args.count) {
      const Vec<float> x = broadcast(args.factor) * load(args.values + k);
      return args.mean != nullptr ? x - load(args.mean + k) : x;
    }
    Vec<float> x{};
    for (int i = 0; i < kW && k + i < args.count; ++i)
      x[i] = args.factor * args.values[k + i] - (args.mean != nullptr ? args.mean[k + i] : 0.0f);
    return x;
  };
  Vec<float> square{}, top{};
  for (int64_t k = 0; k < args.count; k += kW) {
    const Vec<float> x = at(k);
    square = fma(x, x, square);
    top = larger<float>(top, larger<float>(x, -x));
  }
  const float largest = static_cast<float>(args.largest), size = horizontal_max<float>(top);
  // All but equal to the mean: below what 1 / step can be taken of, nothing remains.
  const float step = args.step > 0 ? args.step : size > 1e-30f ? size / largest : 1;
  const float inverse = 1 / step;
  Vec<float> lost{};
  IntVec<float> sum{};
  for (int64_t k = 0; k < args.padded; k += kW) {
    const Vec<float> x = at(k), round = broadcast(ExpConstants::kRound);
    Vec<float> whole = (x * broadcast(inverse) + round) - round;
    whole = larger<float>(whole, broadcast(-largest));
    whole = -larger<float>(-whole, broadcast(-largest));
    const Vec<float> left = x - whole * broadcast(step);
    lost = fma(left, left, lost);
    const IntVec<float> value = __builtin_convertvector(whole, IntVec<float>);
    sum += value;
    const IntVec<float> shifted = value + args.shift;
#if defined(__AVX512F__) && UNICOM_VECTOR_BYTES == 64
    _mm_storeu_si128(reinterpret_cast<__m128i*>(args.bytes + k),
                     _mm512_cvtepi32_epi8((__m512i)shifted));
#else
    *reinterpret_cast<ByteStore*>(args.bytes + k) = __builtin_convertvector(
        shifted, uint8_t __attribute__((vector_size(UNICOM_VECTOR_BYTES / 4))));
#endif
  }
  return {step, std::sqrt(horizontal_sum<float>(square)), std::sqrt(horizontal_sum<float>(lost)),
          sum_of_lanes(sum)};
}

}  // namespace
}  // namespace unicom::cpu
