// Vectors of one instruction set, and the few operations the kernels need on them.
//
// Included only by the kernels_*.cpp sources, each compiled with its own flags; everything is in an
// unnamed namespace so that no function compiled for one instruction set can be linked into
// another. GCC's vector extensions carry most of it: the very same source is tested on every CPU,
// and only fused multiply-add and the bf16 dot product are intrinsics.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "layout.h"

#define UNICOM_INLINE inline __attribute__((always_inline))

#if defined(UNICOM_VECTOR_BYTES)  // set from outside: vectors wider than the instruction set's
#elif defined(__AVX512F__)
#define UNICOM_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define UNICOM_VECTOR_BYTES 32
#else
#define UNICOM_VECTOR_BYTES 16
#endif

namespace unicom::cpu {
namespace {

template <class Real>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(UNICOM_VECTOR_BYTES)));
  typedef int32_t Int __attribute__((vector_size(UNICOM_VECTOR_BYTES)));
  typedef float Load __attribute__((vector_size(UNICOM_VECTOR_BYTES), aligned(4), may_alias));
  using IntScalar = int32_t;
};
template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(UNICOM_VECTOR_BYTES)));
  typedef int64_t Int __attribute__((vector_size(UNICOM_VECTOR_BYTES)));
  typedef double Load __attribute__((vector_size(UNICOM_VECTOR_BYTES), aligned(8), may_alias));
  using IntScalar = int64_t;
};
template <class Real>
using Vec = typename VectorOf<Real>::Type;
template <class Real>
using IntVec = typename VectorOf<Real>::Int;

template <class Real>
constexpr int kWidth = UNICOM_VECTOR_BYTES / sizeof(Real);
template <class Real>
constexpr int kVectors = kLanes / kWidth<Real>;  // vectors in one line of sixteen

template <class Real>
UNICOM_INLINE Vec<Real> load(const Real* p) {
  return *reinterpret_cast<const typename VectorOf<Real>::Load*>(p);
}
template <class Real>
UNICOM_INLINE void store(Real* p, Vec<Real> v) {
  *reinterpret_cast<typename VectorOf<Real>::Load*>(p) = v;
}
// A store to whole lines that does not read them into the caches first, where the instruction set
// has one. Others may read what was stored after the fence.
template <class Real>
UNICOM_INLINE void store_past_caches(Real* p, Vec<Real> v) {
#if defined(__AVX512F__) && UNICOM_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<Real, float>)
    return _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#elif defined(__AVX2__) && UNICOM_VECTOR_BYTES == 32
  if constexpr (std::is_same_v<Real, float>)
    return _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#endif
  store(p, v);
}
UNICOM_INLINE void fence_past_caches() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
template <class Real>
UNICOM_INLINE Vec<Real> broadcast(Real x) {
  return x -
         Vec<Real>{};  // x - 0 is x for every x (x + 0 is not: -0), so this is the bare broadcast
}
template <class Real>
UNICOM_INLINE IntVec<Real> broadcast_int(typename VectorOf<Real>::IntScalar x) {
  return IntVec<Real>{} + x;
}

// a * b + c, in one rounding where the instruction set has it.
UNICOM_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__) && UNICOM_VECTOR_BYTES == 64
  return reinterpret_cast<Vec<float>>(_mm512_fmadd_ps(
      reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__) && UNICOM_VECTOR_BYTES == 32
  return reinterpret_cast<Vec<float>>(_mm256_fmadd_ps(
      reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}
UNICOM_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return a * b + c; }

template <class Real>
UNICOM_INLINE Real horizontal_sum(Vec<Real> v) {
#if defined(__AVX512F__) && UNICOM_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<Real, float>)
    return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#endif
  Real sum = 0;
  for (int i = 0; i < kWidth<Real>; ++i) sum += v[i];
  return sum;
}
// The larger of each two; of b where either is NaN.
template <class Real>
UNICOM_INLINE Vec<Real> larger(Vec<Real> a, Vec<Real> b) {
#if defined(__AVX512F__) && UNICOM_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<Real, float>)
    return reinterpret_cast<Vec<float>>(
        _mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__) && UNICOM_VECTOR_BYTES == 32
  if constexpr (std::is_same_v<Real, float>)
    return reinterpret_cast<Vec<float>>(
        _mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#endif
  return a > b ? a : b;
}
template <class Real>
UNICOM_INLINE Real horizontal_max(Vec<Real> v) {
  Real largest = v[0];
  for (int i = 1; i < kWidth<Real>; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

// Whether any lane of a comparison is true.
UNICOM_INLINE bool any(IntVec<float> mask) {
#if defined(__AVX512F__) && UNICOM_VECTOR_BYTES == 64
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
  uint64_t words[UNICOM_VECTOR_BYTES / 8], all = 0;
  std::memcpy(words, &mask, sizeof(words));
  for (const uint64_t word : words) all |= word;
  return all != 0;
#endif
}

// A bit for each lane of a comparison that is true.
UNICOM_INLINE uint32_t lane_bits(IntVec<float> mask) {
#if defined(__AVX512F__) && UNICOM_VECTOR_BYTES == 64
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__) && UNICOM_VECTOR_BYTES == 32
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kWidth<float>; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

// exp(scale * c) as mantissa * 2^power: mantissa in [0.7, 1.42), power a whole number kept in Real.
// Splitting off the power of two before rounding keeps the relative error near 1e-7 however large
// scale * c is, and lets a shift of the exponent be a whole number that costs no accuracy.
template <class Real>
struct ExpParts {
  Vec<Real> mantissa, power;
};

struct ExpConstants {
  static constexpr double kLog2e = 1.4426950408889634;
  // ln 2 = high + low, with few enough bits in high that power * high is exact in fp32
  static constexpr float kLn2High = 0.693359375f;
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
};

UNICOM_INLINE ExpParts<float> exp_parts(Vec<float> c, float scale) {
  const Vec<float> round = broadcast(ExpConstants::kRound);
  const Vec<float> rounded =
      fma(c, broadcast(static_cast<float>(scale * ExpConstants::kLog2e)), round);
  const Vec<float> power = rounded - round;
  Vec<float> r = fma(c, broadcast(scale), -(power * ExpConstants::kLn2High));
  r = fma(power, broadcast(-ExpConstants::kLn2Low), r);
  // exp(r) = 1 + r + r^2 q(r) on |r| <= ln2 / 2, relative error 3e-9 before rounding
  Vec<float> q = broadcast(0.0013814599f);
  q = fma(q, r, broadcast(0.008368717f));
  q = fma(q, r, broadcast(0.04166839f));
  q = fma(q, r, broadcast(0.16666521f));
  q = fma(q, r, broadcast(0.49999994f));
  return {fma(q * r, r, r) + 1.0f, power};
}

UNICOM_INLINE ExpParts<double> exp_parts(Vec<double> c, double scale) {
  ExpParts<double> out;
  for (int i = 0; i < kWidth<double>; ++i) {
    out.power[i] = std::nearbyint(c[i] * scale * ExpConstants::kLog2e);
    const double r = std::fma(c[i], scale, -out.power[i] * 0.693147180369123816490);
    out.mantissa[i] = std::exp(r - out.power[i] * 1.90821492927058770002e-10);
  }
  return out;
}

// 2^power for whole powers; 0 below the smallest normal number. NaN in, anything out: the mantissa
// beside it is NaN then.
UNICOM_INLINE Vec<float> exp2_whole(Vec<float> power) {
  const Vec<float> round = broadcast(ExpConstants::kRound);
  const Vec<float> shifted = power + round;  // the low bits now hold the whole number
  IntVec<float> bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + (127 - 0x4B400000)) << 23;
  Vec<float> out;
  std::memcpy(&out, &bits, sizeof(out));
  return power < broadcast(-126.0f) ? Vec<float>{} : out;
}
UNICOM_INLINE Vec<double> exp2_whole(Vec<double> power) {
  Vec<double> out;
  for (int i = 0; i < kWidth<double>; ++i) {
    const bool whole = power[i] >= -1022.0 && power[i] <= 1024.0;
    out[i] = whole ? std::ldexp(1.0, static_cast<int>(power[i])) : power[i] < 0 ? 0.0 : power[i];
  }
  return out;
}

// mantissa * 2^(power - exponent), zero on underflow; NaN stays NaN.
template <class Real>
UNICOM_INLINE Vec<Real> exp_scaled(ExpParts<Real> e, Vec<Real> exponent) {
#if defined(__AVX512F__) && UNICOM_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<Real, float>) {
    const auto power = reinterpret_cast<__m512>(e.power - exponent);
    const __mmask16 normal = _mm512_cmp_ps_mask(power, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return reinterpret_cast<Vec<float>>(
        _mm512_maskz_scalef_ps(normal, reinterpret_cast<__m512>(e.mantissa), power));
  }
#endif
  const Vec<Real> scale = exp2_whole(e.power - exponent);
  return scale == Vec<Real>{} ? Vec<Real>{} : e.mantissa * scale;
}

// 32-bit words, for bf16 pairs: lane arithmetic on both halves at once.
typedef uint32_t WordVec __attribute__((vector_size(UNICOM_VECTOR_BYTES)));
typedef uint32_t WordLoad __attribute__((vector_size(UNICOM_VECTOR_BYTES), aligned(4), may_alias));

UNICOM_INLINE WordVec load_words(const void* p) { return *static_cast<const WordLoad*>(p); }
UNICOM_INLINE void store_words(void* p, WordVec v) { *static_cast<WordLoad*>(p) = v; }

UNICOM_INLINE Vec<float> as_float(WordVec w) {
  Vec<float> out;
  std::memcpy(&out, &w, sizeof(out));
  return out;
}
UNICOM_INLINE Vec<float> even_half(WordVec w) { return as_float(w << 16); }
UNICOM_INLINE Vec<float> odd_half(WordVec w) { return as_float(w & 0xffff0000u); }

// fp32 to bf16, nearest even, in the low half of each word; NaN stays NaN.
UNICOM_INLINE WordVec round_to_bf16(Vec<float> v) {
  WordVec bits;
  std::memcpy(&bits, &v, sizeof(bits));
  const WordVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const WordVec quiet = (bits >> 16) | 0x40u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
}

// Pairs of neighbouring words, each holding a 16-bit value, to one word a pair. `even` and `odd`
// say which half of each word is meant (0: low, 16: high).
typedef uint64_t LongVec __attribute__((vector_size(UNICOM_VECTOR_BYTES)));
typedef uint32_t HalfWordVec __attribute__((vector_size(UNICOM_VECTOR_BYTES / 2)));
typedef uint32_t HalfWordStore
    __attribute__((vector_size(UNICOM_VECTOR_BYTES / 2), aligned(4), may_alias));
template <int kHalf>
UNICOM_INLINE void store_pairs(void* out, WordVec words) {
  LongVec both;
  std::memcpy(&both, &words, sizeof(both));
  both >>= kHalf;
  const LongVec pairs = (both & 0xffffu) | ((both >> 16) & 0xffff0000u);
  *static_cast<HalfWordStore*>(out) = __builtin_convertvector(pairs, HalfWordVec);
}

// Values rounded to bf16, two to a word, in the order of memory.
UNICOM_INLINE void store_rounded(void* out, Vec<float> v) {
#if defined(__AVX512BF16__) && UNICOM_VECTOR_BYTES == 64
  const __m256bh rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
  std::memcpy(out, &rounded, sizeof(rounded));
#else
  store_pairs<0>(out, round_to_bf16(v));
#endif
}

// Words whose low half is from `even` and whose high half is from `odd`, rounded to bf16.
UNICOM_INLINE WordVec rounded_pairs(Vec<float> even, Vec<float> odd) {
#if defined(__AVX512BF16__) && UNICOM_VECTOR_BYTES == 64
  const __m512i low = _mm512_cvtepu16_epi32(
      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(even))));
  const __m512i high = _mm512_cvtepu16_epi32(
      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(odd))));
  return reinterpret_cast<WordVec>(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
  return round_to_bf16(even) | (round_to_bf16(odd) << 16);
#endif
}

// Sum of squares: lanes in fp32 over short runs, the rest in double. Rows so long or so short that
// squares would leave the range of fp32 are summed in double altogether.
// `ahead`, if there, is a row that will be wanted soon: see ColumnPicker::pick.
UNICOM_INLINE double sum_of_squares(const float* row, int64_t count, const float* ahead = nullptr) {
  constexpr int kW = kWidth<float>;
  constexpr int64_t kRun = 8 * kW;
  double total = 0;
  int64_t k = 0;
  for (; k + kRun <= count; k += kRun) {
    Vec<float> sum[2] = {};
    for (int64_t i = 0; i < kRun; i += 2 * kW)
      for (int j = 0; j < 2; ++j) {
        if (ahead != nullptr) __builtin_prefetch(ahead + k + i + j * kW);
        const Vec<float> x = load(row + k + i + j * kW);
        sum[j] = fma(x, x, sum[j]);
      }
    total += horizontal_sum<float>(sum[0] + sum[1]);
  }
  for (int64_t i = k; i < count; ++i) total += static_cast<double>(row[i]) * row[i];
  if (total > 1e-20 && total < 1e30) return total;
  total = 0;
  for (int64_t i = 0; i < count; ++i) total += static_cast<double>(row[i]) * row[i];
  return total;
}

// Eight sums run side by side, in as many vectors as that takes: the same on every CPU. Products of
// fp32 values are exact.
typedef float HalfVec __attribute__((vector_size(UNICOM_VECTOR_BYTES / 2)));
typedef float HalfLoad __attribute__((vector_size(UNICOM_VECTOR_BYTES / 2), aligned(4), may_alias));
UNICOM_INLINE Vec<double> load_double(const double* p) { return load(p); }
UNICOM_INLINE Vec<double> load_double(const float* p) {
  return __builtin_convertvector(static_cast<HalfVec>(*reinterpret_cast<const HalfLoad*>(p)),
                                 Vec<double>);
}
template <class Real>
UNICOM_INLINE double dot_in_double(const Real* a, const Real* b, int64_t count) {
  constexpr int kW = kWidth<double>, kSums = 8 / kW;
  Vec<double> sum[kSums] = {};
  int64_t k = 0;
  for (; k + 8 <= count; k += 8)
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i)
      sum[i] += load_double(a + k + i * kW) * load_double(b + k + i * kW);
  double total = 0;
  for (; k < count; ++k) total += static_cast<double>(a[k]) * static_cast<double>(b[k]);
  for (int i = 0; i < 8; ++i) total += sum[i / kW][i % kW];
  return total;
}
UNICOM_INLINE double sum_of_squares(const double* row, int64_t count) {
  return dot_in_double(row, row, count);
}

}  // namespace
}  // namespace unicom::cpu
