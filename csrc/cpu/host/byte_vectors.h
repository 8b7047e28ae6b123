// Vectors as the searches for nearest centroids multiply them: whole multiples of a step, in bytes.
#pragma once

#include <cmath>
#include <cstring>

#include "plan.h"

namespace unicom::cpu {

constexpr int64_t kValues = sizeof(ByteQuad);  // of a unit

// What fp32 arithmetic may do to a score outside the sum of products, for unit vectors and their
// mean: some seventy rounding errors at worst.
constexpr double kSlack = 128 * 0x1p-24;

// Arrays one after another in a block, each on a line of its own. With a null block only their
// bytes count.
class Arrays {
 public:
  explicit Arrays(const void* block)
      : begin_(static_cast<char*>(const_cast<void*>(block))), at_(begin_) {}
  template <class T>
  void take(T*& array, int64_t count) {
    array = reinterpret_cast<T*>(at_);
    at_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  }
  int64_t bytes() const { return at_ - begin_; }

 private:
  char *begin_, *at_;
};

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

// A unit row minus a mean, in bytes; `unit` [dim] is room for it.
inline Bytes unit_row_to_bytes(const FloatRows& rows, int64_t i, double inverse_norm,
                               const float* mean, int32_t largest, int32_t shift, uint8_t* bytes,
                               int64_t padded, float* unit) {
  // Rows so long or so short that fp32 does not hold the inverse are divided in double.
  const bool usual = inverse_norm > 1e-30 && inverse_norm < 1e30;
  if (!usual) kernels_for<float>().unit_row(source_of(rows), i, unit, rows.dim);
  return kernels().nearest->to_bytes({.values = usual ? rows[i] : unit,
                                      .factor = usual ? static_cast<float>(inverse_norm) : 1.0f,
                                      .mean = mean,
                                      .count = rows.dim,
                                      .step = 0,
                                      .largest = largest,
                                      .shift = shift,
                                      .bytes = bytes,
                                      .padded = padded});
}

// Bytes to units that lie `step` apart.
inline void write_units(const uint8_t* bytes, int64_t units, ByteQuad* out, int64_t step) {
  for (int64_t u = 0; u < units; ++u) std::memcpy(out + u * step, bytes + u * kValues, kValues);
}

// Bytes to a row of tiles as the kernels take them, with zeros to the end of the last run of units;
// and units of so many rows.
inline void write_row(const uint8_t* bytes, int64_t units, const TileLayout& layout, int64_t row,
                      ByteQuad* tiles) {
  ByteQuad* out = tiles + layout.at(row, 0, units);
  if (layout.units == 1) return write_units(bytes, units, out, layout.rows);
  for (int64_t u = 0; u < units; u += layout.units, out += layout.rows * layout.units) {
    const int64_t count = std::min(layout.units, units - u);
    std::memcpy(out, bytes + u * kValues, count * kValues);
    std::memset(out + count, 0, (layout.units - count) * kValues);
  }
}
inline int64_t units_of_rows(int64_t rows, int64_t units, const TileLayout& layout) {
  return round_up(rows, layout.rows) * layout.padded(units);
}

}  // namespace unicom::cpu
