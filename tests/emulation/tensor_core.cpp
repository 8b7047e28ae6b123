#include "tensor_core.h"

#include <emmintrin.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <vector>

namespace emulation {

void add_truncated(float* sums, const double* a, int a_stride, const double* b, int b_stride) {
  const auto absolute = [](__m128d x) { return _mm_andnot_pd(_mm_set1_pd(-0.0), x); };
  const __m128d start = _mm_set_pd(sums[1], sums[0]);
  __m128d terms[kDepth], largest = absolute(start), exact = start;
  for (int k = 0; k < kDepth; ++k) {
    terms[k] = _mm_mul_pd(_mm_set1_pd(a[k * a_stride]), _mm_loadu_pd(b + k * b_stride));
    largest = _mm_max_pd(largest, absolute(terms[k]));
    exact = _mm_add_pd(exact, terms[k]);
  }
  // Where all is zero, any digit will do.
  largest = _mm_max_pd(largest, _mm_set1_pd(0x1p-900));
  const __m128i digit =
      _mm_sub_epi64(_mm_slli_epi64(_mm_srli_epi64(_mm_castpd_si128(largest), 52), 52),
                    _mm_set1_epi64x(int64_t{23} << 52));
  const __m128d digits =
      _mm_castsi128_pd(_mm_sub_epi64(_mm_set1_epi64x(int64_t{2046} << 52), digit));
  __m128i sum = _mm_cvttpd_epi32(_mm_mul_pd(start, digits));
  for (const __m128d& term : terms)
    sum = _mm_add_epi32(sum, _mm_cvttpd_epi32(_mm_mul_pd(term, digits)));
  // Clears the digits that a float does not hold: as many as |sum| has above 24 bits.
  const __m128i sign = _mm_srai_epi32(sum, 31);
  const __m128i size = _mm_sub_epi32(_mm_xor_si128(sum, sign), sign);
  __m128i beyond = _mm_srli_epi32(size, 24);
  for (int step : {1, 2, 4}) beyond = _mm_or_si128(beyond, _mm_srli_epi32(beyond, step));
  sum = _mm_sub_epi32(_mm_xor_si128(_mm_andnot_si128(beyond, size), sign), sign);
  const __m128d truncated = _mm_mul_pd(_mm_cvtepi32_pd(sum), _mm_castsi128_pd(digit));
  for (int i = 0; i < 2; ++i)
    sums[i] = static_cast<float>(std::isfinite(exact[i]) ? truncated[i] : exact[i]);
}

void multiply_add(float (&c)[4], int lane, const Fragments (&all)[32]) {
  // Of this lane's rows and columns, two each.
  double rows[2][kDepth], columns[kDepth][2];
  for (int i : {0, 1})
    for (int holder = 0; holder < 4; ++holder) {  // within a group of four lanes
      const auto& left = all[lane / 4 * 4 + holder].of;
      const auto& right = all[(lane % 4 * 2 + i) * 4 + holder].of;
      for (int part : {0, 1})
        for (int half : {0, 1}) {
          const int k = part * 8 + holder * 2 + half;
          rows[i][k] = left[2 * part + i][half];
          columns[k][i] = right[4 + part][half];
        }
    }
  for (int i : {0, 1}) add_truncated(&c[2 * i], rows[i], 1, columns[0], 2);
}

float half_to_float(uint16_t bits) {
  // By table: the compiler's own conversion is a slow call.
  static const auto table = [] {
    std::vector<float> values(1 << 16);
    for (size_t i = 0; i < values.size(); ++i)
      values[i] = static_cast<float>(__builtin_bit_cast(_Float16, static_cast<uint16_t>(i)));
    return values;
  }();
  return table[bits];
}

}  // namespace emulation
