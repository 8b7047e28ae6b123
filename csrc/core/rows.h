// Rows of a user's matrix, as every device reads and writes them.
#pragma once

#include <cstdint>

#include <cmath>

#include "macros.h"

namespace unicom {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

UNICOM_HD constexpr int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// [*, dim] of any floating dtype, unit column stride.
struct RowSource {
  const void* data;
  DType dtype;
  int64_t row_stride;      // in elements
  const int64_t* columns;  // selected columns, ascending, or nullptr for all
  int64_t dim;             // number of selected columns
};

static inline const void* row_of(const RowSource& source, int64_t id) {
  return static_cast<const char*>(source.data) + id * source.row_stride * bytes_of(source.dtype);
}
// Bytes of a row up to the last column that is read.
static inline int64_t bytes_of_row(const RowSource& source) {
  const int64_t width = source.columns != nullptr ? source.columns[source.dim - 1] + 1 : source.dim;
  return width * bytes_of(source.dtype);
}

// Squares of float64 values may overflow, or vanish: where their sum is not between these, the row is
// first multiplied by a power of two that brings its largest value near 1.
constexpr double kSmallestSquare = 1e-280, kLargestSquare = 1e280;
UNICOM_HD_INLINED double lift_of(double largest) {
  if (!(largest > 0 && largest < INFINITY)) return 1;
  const int power = -std::ilogb(largest);
  return std::ldexp(1.0, power < 1000 ? power : 1000);
}

// A matrix of which some columns of some rows are written.
struct RowSink {
  void* data;  // nullptr: not wanted
  DType dtype;
  int64_t row_stride;
  const int64_t* columns;
  int64_t dim;
};

// Rows of a matrix that is updated in place: [*, dim], unit column stride.
struct RowArray {
  void* data;  // nullptr: not there
  DType dtype;
  int64_t row_stride;  // in elements
};

// fp32 rows of a matrix [count, dim] with unit column stride.
struct FloatRows {
  const float* data;
  int64_t count, dim, stride;  // stride in elements

  UNICOM_HD const float* operator[](int64_t i) const { return data + i * stride; }
};

}  // namespace unicom
