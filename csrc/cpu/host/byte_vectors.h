// Vectors as the searches for nearest centroids multiply them: whole multiples of a step, in bytes.
#pragma once

#include <algorithm>
#include <cmath>

#include "plan.h"

namespace unicom::cpu {

constexpr int64_t kValues = sizeof(ByteQuad);  // of a unit

// What fp32 arithmetic may do to a score outside the sum of products, for unit vectors and their
// mean: some seventy rounding errors at worst.
constexpr double kSlack = 128 * 0x1p-24;

inline double dot(const float* a, const float* b, int64_t count) {
  return kernels_for<float>().dot(a, b, count);
}

inline double inverse_norm(const float* row, int64_t dim) {
  const double square = dot(row, row, dim);
  return square == 0 ? 0.0 : 1.0 / std::sqrt(square);
}

inline SourceRows source_of(const FloatRows& rows) {
  return {{.data = rows.data,
           .dtype = DType::kFloat32,
           .row_stride = rows.stride,
           .columns = nullptr,
           .dim = rows.dim},
          nullptr};
}

// A vector as the kernels multiply it: whole multiples of `scale`.
struct Rounded {
  float scale;
  double norm;  // of the vector
  double lost;  // norm of what rounding took from it
};

// Rounds values [height] to whole [height], from -largest to largest. Leaves in values what that
// took from them.
inline Rounded round_vector(float* values, int64_t height, int32_t largest, int32_t* whole) {
  constexpr int64_t kSide = 8;  // side by side, so that the compiler uses vectors
  const double norm = std::sqrt(dot(values, values, height));
  float tops[kSide] = {};
  for (int64_t k = 0; k < height; k += kSide)
    for (int64_t i = 0; i < kSide; ++i) {
      const float size = std::fabs(values[k + i]);
      tops[i] = size > tops[i] ? size : tops[i];
    }
  const float top = *std::max_element(tops, tops + kSide);
  // All but equal to the mean: below what 1 / scale can be taken of, nothing remains.
  const float scale = top > 1e-30f ? top / static_cast<float>(largest) : 1;
  const float inverse = 1 / scale;
  for (int64_t k = 0; k < height; ++k) {
    constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const float rounded = (values[k] * inverse + kWhole) - kWhole;
    whole[k] = static_cast<int32_t>(rounded);
    values[k] -= rounded * scale;
  }
  return {scale, norm, std::sqrt(dot(values, values, height))};
}

// Whole numbers to units, `step` apart. In tiles bytes are unsigned: `shift` is added.
inline void write_units(const int32_t* whole, int64_t units, ByteQuad* out, int64_t step, int32_t shift) {
  for (int64_t u = 0; u < units; ++u)
    for (int64_t i = 0; i < kValues; ++i)
      out[u * step].byte[i] = static_cast<uint8_t>(whole[kValues * u + i] + shift);
}

}  // namespace unicom::cpu
