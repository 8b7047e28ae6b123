// Reading and writing rows of a user's matrix in kernels.
#pragma once

#include "../../core/rows.h"
#include "device.cuh"

namespace unicom::cuda {

// Row of a prototype, of which index says the place of its class in a list, or among all, and the
// centre: place * centers + centre.
UNICOM_DEVICE int64_t row_id(const int64_t* class_index, int64_t index, int64_t centers) {
  if (class_index == nullptr) return index;
  return centers == 1 ? class_index[index]
                      : class_index[index / centers] * centers + index % centers;
}

template <class T>
UNICOM_DEVICE auto read_value(const RowSource& source, int64_t row, int64_t k) {
  const int64_t column = source.columns != nullptr ? source.columns[k] : k;
  return widen(static_cast<const T*>(source.data)[row * source.row_stride + column]);
}

// The same where the type is known only at run time.
UNICOM_DEVICE double read_any(const RowSource& source, int64_t row, int64_t k) {
  switch (source.dtype) {
    case DType::kFloat32: return read_value<float>(source, row, k);
    case DType::kFloat64: return read_value<double>(source, row, k);
    case DType::kBFloat16: return read_value<BFloat>(source, row, k);
    default: return read_value<Half>(source, row, k);
  }
}

UNICOM_DEVICE void write_any(const RowSink& sink, int64_t row, int64_t k, double value) {
  const int64_t at = row * sink.row_stride + (sink.columns != nullptr ? sink.columns[k] : k);
  switch (sink.dtype) {
    case DType::kFloat32: static_cast<float*>(sink.data)[at] = narrow<float>(value); return;
    case DType::kFloat64: static_cast<double*>(sink.data)[at] = value; return;
    case DType::kBFloat16: static_cast<BFloat*>(sink.data)[at] = narrow<BFloat>(value); return;
    default: static_cast<Half*>(sink.data)[at] = narrow<Half>(value);
  }
}

}  // namespace unicom::cuda
