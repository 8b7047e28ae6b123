// Where the rows of the gradients go, once they are complete.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cstring>

#include "operands.h"
#include "row_updates.h"

namespace unicom::cpu {

// A gradient larger than the caches gains nothing from passing through them: stores that go past
// them do not read the memory first.
inline void zero_piece(char* data, size_t bytes) {
#if defined(__SSE2__)
  const size_t lines = bytes / 64;
  for (size_t i = 0; i < lines; ++i, data += 64)
    for (int j = 0; j < 4; ++j)
      _mm_stream_si128(reinterpret_cast<__m128i*>(data) + j, _mm_setzero_si128());
  _mm_sfence();
  bytes -= lines * 64;
#endif
  std::memset(data, 0, bytes);
}

inline void fill_zero(void* data, int64_t bytes, const Parallel& parallel) {
  constexpr int64_t kPiece = int64_t{1} << 20;
  const bool past_caches = bytes > kCacheBytes && reinterpret_cast<uintptr_t>(data) % 64 == 0;
  parallel.run(ceil_div(bytes, kPiece), [&](int64_t i) {
    char* piece = static_cast<char*>(data) + i * kPiece;
    const auto size = static_cast<size_t>(std::min(kPiece, bytes - i * kPiece));
    if (past_caches)
      zero_piece(piece, size);
    else
      std::memset(piece, 0, size);
  });
}

template <class To, class Real>
void write_columns(To* row, const RowSink& sink, const Real* values) {
  auto convert = [](Real value) -> To {
    if constexpr (std::is_same_v<To, uint16_t>)
      return float_to_bf16(static_cast<float>(value));
    else
      return static_cast<To>(value);
  };
  if (sink.columns == nullptr) {
    for (int64_t k = 0; k < sink.dim; ++k) row[k] = convert(values[k]);
  } else {
    for (int64_t k = 0; k < sink.dim; ++k) row[sink.columns[k]] = convert(values[k]);
  }
}

// Rows of a gradient [*, width] with the columns and the type of what it is the gradient of.
inline RowSink sink(const RowSource& source, void* gradient, int64_t width) {
  return {gradient, source.dtype, width, source.columns, source.dim};
}

template <class Real>
void write_row(const RowSink& sink, int64_t id, const Real* values) {
  const int64_t offset = id * sink.row_stride;
  switch (sink.dtype) {
    case DType::kFloat32:
      return write_columns(static_cast<float*>(sink.data) + offset, sink, values);
    case DType::kFloat64:
      return write_columns(static_cast<double*>(sink.data) + offset, sink, values);
    case DType::kBFloat16:
      return write_columns(static_cast<uint16_t*>(sink.data) + offset, sink, values);
    case DType::kFloat16:
      return write_columns(static_cast<_Float16*>(sink.data) + offset, sink, values);
  }
}

// The gradient of the prototypes, panel by panel: to a matrix, or to the optimizer at once.
template <class Unit>
class PrototypeRows {
  using Real = RealOf<Unit>;

 public:
  PrototypeRows(const Plan& p, const Gradients& g, const RowUpdate* update)
      : p_(p),
        update_(update),
        whole_(g.compact || update != nullptr),
        spread_(whole_ && p.prototypes.columns != nullptr),
        columns_(sink(p.prototypes, g.prototypes, p.dim)),
        all_{g.prototypes, p.prototypes.dtype, p.dim, nullptr, p.dim},
        rows_(spread_ ? kLanes * p.dim : 0),
        converted_(update != nullptr ? p.dim : 0) {
    std::fill_n(rows_.get(), spread_ ? kLanes * p.dim : 0, Real(0));
  }
#if defined(__SSE2__)
  ~PrototypeRows() { _mm_sfence(); }
#endif

  // rows [count][height] of the selected columns, of one centre of the slots from `first` on
  void put(int64_t first, int64_t center, int64_t count, const Real* rows, int64_t height) {
    if (!whole_) {
      for (int64_t r = 0; r < count; ++r)
        write_row(columns_, p_.row_of(first + r, center), rows + r * height);
      return;
    }
    if (spread_) {
      kernels_for<Unit>().spread_rows(rows, height, count, p_.prototype_rows(0), rows_.get(),
                                      p_.dim);
      rows = rows_.get();
      height = p_.dim;
    }
    for (int64_t r = 0; r < count; ++r) {
      const Real* row = rows + r * height;
      if (update_ == nullptr) {
        const int64_t to = (first + r) * p_.centers + center;
        if (!store_past_caches(to, row)) write_row(all_, to, row);
        continue;
      }
      const DType dtype = arithmetic(all_.dtype);
      const void* gradient = row;
      if (bytes_of(dtype) != sizeof(Real)) {
        write_row({converted_.get(), dtype, 0, nullptr, p_.dim}, 0, row);
        gradient = converted_.get();
      }
      update_->step(p_.row_of(first + r, center), gradient,
                    p_.row_of(first + std::min(r + kRowsAhead, count - 1), center));
    }
  }

 private:
  // A gradient larger than the caches gains nothing from passing through them.
  bool store_past_caches(int64_t row_index, const Real* row) const {
#if defined(__SSE2__)
    const int64_t bytes = p_.dim * static_cast<int64_t>(sizeof(Real));
    auto* to = reinterpret_cast<__m128i*>(static_cast<char*>(all_.data) + row_index * bytes);
    if (all_.dtype == DType::kFloat32 && sizeof(Real) == 4 && bytes % 16 == 0 &&
        bytes * p_.sampled * p_.centers > kCacheBytes &&
        reinterpret_cast<uintptr_t>(to) % 16 == 0) {
      const auto* from = reinterpret_cast<const __m128i*>(row);
      for (int64_t i = 0; i < bytes / 16; ++i) _mm_stream_si128(to + i, _mm_loadu_si128(from + i));
      return true;
    }
#endif
    return false;
  }

  const Plan& p_;
  const RowUpdate* update_;
  const bool whole_;             // rows are written whole, one for each prototype
  const bool spread_;            // and columns were selected
  const RowSink columns_, all_;  // the matrix by selected columns, and by whole rows
  Buffer<Real> rows_;            // [16][dim], zero where columns were not selected
  Buffer<double> converted_;     // wide enough for any type
};

}  // namespace unicom::cpu
