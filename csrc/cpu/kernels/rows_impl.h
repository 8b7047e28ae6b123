// Rows of matrices to the operands of products, and gradients back to rows.
#pragma once

#include <type_traits>

#include "product.h"

namespace unicom::cpu {
namespace {

template <class T>
UNICOM_INLINE float widen(T x) {
  return static_cast<float>(x);
}
struct Bf16 {
  uint16_t bits;
};
template <>
UNICOM_INLINE float widen(Bf16 x) {
  return bf16_to_float(x.bits);
}

template <class Real, class T>
void read_row(const T* row, const int64_t* columns, int64_t dim, Real* out) {
  auto value = [&](int64_t k) -> Real {
    if constexpr (sizeof(T) == 8)
      return static_cast<Real>(row[k]);
    else
      return static_cast<Real>(widen(row[k]));
  };
  if (columns != nullptr) {
    for (int64_t k = 0; k < dim; ++k) out[k] = value(columns[k]);
  } else {
    for (int64_t k = 0; k < dim; ++k) out[k] = value(k);
  }
}

template <class Real>
double dot(const Real* a, const Real* b, int64_t count) {
  return dot_in_double(a, b, count);
}

// Divides out [dim] by its norm, and pads it. Returns the inverse norm (0 for a zero row, whose
// unit vector is 0).
template <class Real>
double normalize(Real* out, int64_t dim, int64_t height) {
  double sum = sum_of_squares(out, dim), lift = 1;
  if constexpr (sizeof(Real) == 8) {
    if (!(sum > kSmallestSquare && sum < kLargestSquare)) {
      double largest = 0;
      for (int64_t k = 0; k < dim; ++k)
        largest = std::fabs(out[k]) > largest ? std::fabs(out[k]) : largest;
      lift = lift_of(largest);
      for (int64_t k = 0; k < dim; ++k) out[k] *= lift;
      sum = sum_of_squares(out, dim);
    }
  }
  const double inverse = sum == 0 ? 0.0 : 1.0 / std::sqrt(sum);
  if (inverse > 1e-30 && inverse < 1e30) {
    const Real factor = static_cast<Real>(inverse);
    for (int64_t k = 0; k < dim; ++k) out[k] *= factor;
  } else {  // an inverse outside the range of fp32, or NaN
    for (int64_t k = 0; k < dim; ++k) out[k] = static_cast<Real>(out[k] * inverse);
  }
  for (int64_t k = dim; k < height; ++k) out[k] = 0;
  return inverse * lift;
}

// Selected columns of rows in fp32, where the instruction set can pick them out of whole lines.
class ColumnPicker {
 public:
  explicit ColumnPicker(const SourceRows& source) {
#if defined(__AVX512F__) && UNICOM_VECTOR_BYTES == 64
    if (source.columns == nullptr) return;
    groups_ = source.columns[source.dim - 1] / kLanes + 1;
    mask_ = source.column_bits;
#else
    (void)source;
#endif
  }
  bool works() const { return groups_ > 0; }

  // The selected values of a row, beside each other. Asks for the row `ahead` on the way, line by
  // line: many requests at once would wait for one another.
  UNICOM_INLINE void pick(const float* row, const float* ahead, float* out) const {
#if defined(__AVX512F__) && UNICOM_VECTOR_BYTES == 64
    for (int64_t g = 0; g < groups_; ++g) {
      __builtin_prefetch(ahead + g * kLanes);
      const __mmask16 mask = mask_[g];
      const int count = __builtin_popcount(mask);
      const __m512 picked =
          _mm512_maskz_compress_ps(mask, _mm512_maskz_loadu_ps(mask, row + g * kLanes));
      _mm512_mask_storeu_ps(out, static_cast<__mmask16>((1u << count) - 1), picked);
      out += count;
    }
#else
    (void)row, (void)ahead, (void)out;
#endif
  }

  // The reverse; columns that are not selected are left alone.
  UNICOM_INLINE void put(const float* values, float* row) const {
#if defined(__AVX512F__) && UNICOM_VECTOR_BYTES == 64
    for (int64_t g = 0; g < groups_; ++g) {
      const __mmask16 mask = mask_[g];
      const int count = __builtin_popcount(mask);
      const __m512 dense = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), values);
      _mm512_mask_storeu_ps(row + g * kLanes, mask, _mm512_maskz_expand_ps(mask, dense));
      values += count;
    }
#else
    (void)values, (void)row;
#endif
  }

 private:
  int64_t groups_ = 0;
  const uint16_t* mask_ = nullptr;
};

// One unit row; returns the inverse norm.
template <class Real>
double unit_row(const SourceRows& source, int64_t id, Real* out, int64_t height) {
  const int64_t offset = id * source.row_stride;
  if constexpr (std::is_same_v<Real, float>) {
    const ColumnPicker picker(source);
    if (source.dtype == DType::kFloat32 && picker.works()) {
      const float* row = static_cast<const float*>(source.data) + offset;
      picker.pick(row, row, out);
      return normalize(out, source.dim, height);
    }
  }
  auto read = [&](auto* data) { read_row(data + offset, source.columns, source.dim, out); };
  switch (source.dtype) {
    case DType::kFloat32: read(static_cast<const float*>(source.data)); break;
    case DType::kFloat64: read(static_cast<const double*>(source.data)); break;
    case DType::kBFloat16: read(static_cast<const Bf16*>(source.data)); break;
    case DType::kFloat16: read(static_cast<const _Float16*>(source.data)); break;
  }
  return normalize(out, source.dim, height);
}

constexpr int64_t kPrefetchRows = 4;
constexpr int64_t kPrefetchBytes = 4096;

UNICOM_INLINE void prefetch_row(const SourceRows& source, int64_t id) {
  const int64_t bytes = bytes_of_row(source);
  const int64_t some = bytes < kPrefetchBytes ? bytes : kPrefetchBytes;
  const char* row = static_cast<const char*>(row_of(source, id));
  for (int64_t offset = 0; offset < some; offset += 64) __builtin_prefetch(row + offset);
}

template <class Real>
void round_values(Real* values, int64_t count, Rounding rounding) {
  if (rounding == Rounding::kFloat16)
    for (int64_t k = 0; k < count; ++k)
      values[k] = static_cast<Real>(static_cast<float>(static_cast<_Float16>(values[k])));
}

template <class Unit>
UNICOM_INLINE Unit make_unit(RealOf<Unit> even, RealOf<Unit> odd) {
  if constexpr (UnitTraits<Unit>::kValues == 2)
    return BfPair{float_to_bf16(even), float_to_bf16(odd)};
  else
    return even;
}

// A 4 x 4 block of 32-bit words: load(i) gives row i, put(j, v) takes column j.
typedef uint32_t Words4 __attribute__((vector_size(16)));
typedef uint32_t Words4Load __attribute__((vector_size(16), aligned(4), may_alias));
UNICOM_INLINE Words4 load_words4(const void* p) { return *static_cast<const Words4Load*>(p); }
UNICOM_INLINE void store_words4(void* p, Words4 v) { *static_cast<Words4Load*>(p) = v; }
template <class Load, class Put>
UNICOM_INLINE void transpose_words(const Load& load, const Put& put) {
  const Words4 a = load(0), b = load(1), c = load(2), d = load(3);
  const Words4 ab_low = __builtin_shuffle(a, b, Words4{0, 4, 1, 5});
  const Words4 ab_high = __builtin_shuffle(a, b, Words4{2, 6, 3, 7});
  const Words4 cd_low = __builtin_shuffle(c, d, Words4{0, 4, 1, 5});
  const Words4 cd_high = __builtin_shuffle(c, d, Words4{2, 6, 3, 7});
  put(0, __builtin_shuffle(ab_low, cd_low, Words4{0, 1, 4, 5}));
  put(1, __builtin_shuffle(ab_low, cd_low, Words4{2, 3, 6, 7}));
  put(2, __builtin_shuffle(ab_high, cd_high, Words4{0, 1, 4, 5}));
  put(3, __builtin_shuffle(ab_high, cd_high, Words4{2, 3, 6, 7}));
}

#if defined(__AVX512F__) && UNICOM_VECTOR_BYTES == 64
// A 16 x 16 block of 32-bit words: load(r) gives row r, which becomes column r of out.
template <class Load>
UNICOM_INLINE void transpose_block(const Load& load, void* out, int64_t out_stride) {
  float* to = static_cast<float*>(out);
  __m512 a[kLanes], b[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) a[i] = load(i);
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d x = _mm512_castps_pd(b[i + j]), y = _mm512_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  // a[4 q + c]: columns c, c + 4, c + 8, c + 12 of rows 4 q, ... 4 q + 3
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 x = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88);
    const __m512 y = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
    const __m512 z = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
    const __m512 w = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_ps(to + c * out_stride, _mm512_shuffle_f32x4(x, z, 0x88));
    _mm512_storeu_ps(to + (c + 4) * out_stride, _mm512_shuffle_f32x4(y, w, 0x88));
    _mm512_storeu_ps(to + (c + 8) * out_stride, _mm512_shuffle_f32x4(x, z, 0xdd));
    _mm512_storeu_ps(to + (c + 12) * out_stride, _mm512_shuffle_f32x4(y, w, 0xdd));
  }
}
#endif

// out[c][r] = in[r][c]: rows x columns of elements that are copied as they are.
template <class T>
void transpose(const T* in, int64_t in_stride, int64_t rows, int64_t columns, T* out,
               int64_t out_stride) {
#if defined(__AVX512F__) && UNICOM_VECTOR_BYTES == 64
  if (sizeof(T) == 4 && rows == kLanes)
    for (; columns >= kLanes; columns -= kLanes, in += kLanes, out += kLanes * out_stride)
      transpose_block([&](int i) { return _mm512_loadu_ps(in + i * in_stride); }, out, out_stride);
#endif
  const bool by_four = sizeof(T) == 4 && rows % 4 == 0;
  const int64_t tail = by_four ? columns - columns % 4 : 0;
  if (by_four)
    for (int64_t c = 0; c < tail; c += 4)
      for (int64_t r = 0; r < rows; r += 4)
        transpose_words([&](int i) -> Words4 { return load_words4(in + (r + i) * in_stride + c); },
                        [&](int i, Words4 v) { store_words4(out + (c + i) * out_stride + r, v); });
  for (int64_t c = tail; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r) out[c * out_stride + r] = in[r * in_stride + c];
}

// fp32 values to bf16 pairs along memory; count is even. `out` may be `in`.
UNICOM_INLINE void round_to_pairs(const float* in, int64_t count, BfPair* out) {
  int64_t k = 0;
  for (; k + kWidth<float> <= count; k += kWidth<float>) store_rounded(out + k / 2, load(in + k));
  for (; k < count; k += 2) {
    const BfPair pair = make_unit<BfPair>(in[k], in[k + 1]);
    std::memcpy(out + k / 2, &pair, sizeof(pair));
  }
}

// Sixteen rows [16][height] of Real to a vector panel [height / values][16]; overwrites the rows.
template <class Unit>
void rows_to_panel(RealOf<Unit>* rows, int64_t height, Unit* panel) {
  if constexpr (UnitTraits<Unit>::kValues == 2) {
    // Round in place, each row into its own front half, then move whole pairs.
    for (int64_t lane = 0; lane < kLanes; ++lane)
      round_to_pairs(rows + lane * height, height, reinterpret_cast<BfPair*>(rows + lane * height));
    transpose(reinterpret_cast<const uint32_t*>(rows), height, kLanes, height / 2,
              reinterpret_cast<uint32_t*>(panel), kLanes);
  } else {
    transpose(rows, height, kLanes, height, panel, kLanes);
  }
}

// Sixteen whole fp32 rows go straight to their panel: norms first, which brings the rows into the
// cache, then transposed and scaled in one pass. False, and nothing done, where a row is zero or
// its norm lies outside the range of fp32.
bool pack_whole_rows(const SourceRows& source, const int64_t* ids, int64_t first, int64_t total,
                     float* panel, double* inverse_norm) {
  typedef float Floats4 __attribute__((vector_size(16)));
  const float* rows[kLanes];
  Floats4 scale[kLanes / 4];
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const auto row_at = [&](int64_t position) {
      const int64_t id = ids != nullptr ? ids[position] : position;
      return static_cast<const float*>(source.data) + id * source.row_stride;
    };
    const int64_t ahead = first + lane + kPrefetchRows;
    rows[lane] = row_at(first + lane);
    const double inverse =
        1.0 / std::sqrt(sum_of_squares(rows[lane], source.dim,
                                       row_at(ahead < total ? ahead : total - 1)));
    if (!(inverse > 1e-30 && inverse < 1e30)) return false;
    inverse_norm[lane] = inverse;
    scale[lane / 4][lane % 4] = static_cast<float>(inverse);
  }
  int64_t k = 0;
#if defined(__AVX512F__) && UNICOM_VECTOR_BYTES == 64
  for (; k + kLanes <= source.dim; k += kLanes) {
    transpose_block(
        [&](int i) {
          return _mm512_mul_ps(_mm512_loadu_ps(rows[i] + k), _mm512_set1_ps(scale[i / 4][i % 4]));
        },
        panel + k * kLanes, kLanes);
  }
#endif
  const int64_t fours = source.dim - source.dim % 4;
  for (; k < fours; k += 4)
    for (int64_t r = 0; r < kLanes; r += 4)
      transpose_words([&](int i) -> Words4 { return load_words4(rows[r + i] + k); },
                      [&](int i, Words4 v) {
                        const Floats4 scaled = reinterpret_cast<Floats4>(v) * scale[r / 4];
                        store_words4(panel + (k + i) * kLanes + r,
                                     reinterpret_cast<Words4>(scaled));
                      });
  for (; k < panel_height(source.dim); ++k)
    for (int64_t lane = 0; lane < kLanes; ++lane)
      panel[k * kLanes + lane] = k < source.dim ? rows[lane][k] * scale[lane / 4][lane % 4] : 0.0f;
  return true;
}

// All values of a row; `ahead` as above.
UNICOM_INLINE void copy_row(const float* row, const float* ahead, int64_t dim, float* out) {
  int64_t k = 0;
  for (; k + kWidth<float> <= dim; k += kWidth<float>) {
    __builtin_prefetch(ahead + k);
    store(out + k, load(row + k));
  }
  for (; k < dim; ++k) out[k] = row[k];
}

template <class Unit>
void pack_panel(const SourceRows& source, const int64_t* ids, int64_t first, int64_t total,
                Rounding rounding, RealOf<Unit>* scratch, Unit* panel, double* inverse_norm) {
  const int64_t height = panel_height(source.dim);
  const int64_t count = total - first < kLanes ? total - first : kLanes;
  if constexpr (std::is_same_v<Unit, float>)
    if (source.dtype == DType::kFloat32 && source.columns == nullptr && count == kLanes &&
        rounding == Rounding::kNone &&
        pack_whole_rows(source, ids, first, total, panel, inverse_norm))
      return;
  const auto id_of = [&](int64_t lane) {
    return ids != nullptr ? ids[first + lane] : first + lane;
  };
  const ColumnPicker picker(source);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    RealOf<Unit>* row = scratch + lane * height;
    if (lane < count) {
      // Sampled rows lie scattered in memory: ask for those to come while this one is worked on.
      const int64_t id = id_of(lane);
      const int64_t last = total - 1 - first;
      const int64_t ahead = id_of(lane + kPrefetchRows < last ? lane + kPrefetchRows : last);
      if constexpr (std::is_same_v<RealOf<Unit>, float>) {
        const bool whole = source.columns == nullptr;
        if (source.dtype == DType::kFloat32 && (whole || picker.works())) {
          const float* data = static_cast<const float*>(source.data);
          const float* from = data + id * source.row_stride;
          const float* next = data + ahead * source.row_stride;
          if (whole)
            copy_row(from, next, source.dim, row);
          else
            picker.pick(from, next, row);
          inverse_norm[lane] = normalize(row, source.dim, height);
          continue;
        }
      }
      prefetch_row(source, ahead);
      inverse_norm[lane] = unit_row(source, id, row, height);
    } else {
      inverse_norm[lane] = 0;
      std::memset(row, 0, sizeof(*row) * height);
    }
  }
  round_values(scratch, kLanes * height, rounding);
  rows_to_panel(scratch, height, panel);
}

template <class Unit>
void pack_tile(const RealOf<Unit>* rows, int64_t height, int64_t units, Rounding rounding,
               int64_t index, Unit* tiles) {
  constexpr int64_t kValues = UnitTraits<Unit>::kValues;
  if constexpr (kInSquares<Unit>) {
    for (int64_t m = 0; m < kTile; ++m) {
      Unit* to = tiles + kTileLayout<Unit>.at(index * kTile + m, 0, units);
      for (int64_t u = 0; u < units; u += kSquare, to += kSquareUnits)
        for (int64_t i = 0; i < kSquare; ++i) {
          const RealOf<Unit>* pair = rows + m * height + (u + i) * kValues;
          to[i] = u + i < units ? make_unit<Unit>(pair[0], pair[1]) : Unit{};
        }
    }
    return;
  }
  Unit* tile = tiles + index * kTile * units;
  const auto pack = [&](const auto& round) {
    for (int64_t u = 0; u < units; ++u)
      for (int64_t m = 0; m < kTile; ++m) {
        const RealOf<Unit>* pair = rows + m * height + u * kValues;
        tile[u * kTile + m] = make_unit<Unit>(round(pair[0]), kValues == 2 ? round(pair[1]) : 0);
      }
  };
  if (rounding == Rounding::kNone) return pack([](RealOf<Unit> x) { return x; });
  pack([rounding](RealOf<Unit> x) {
    round_values(&x, 1, rounding);
    return x;
  });
}

template <class Unit>
void pack_weighted(const RealOf<Unit>* rows, int64_t height, const double* weight, int64_t first,
                   int64_t count, int64_t tile_stride, Unit* tiles) {
  using Real = RealOf<Unit>;
  constexpr int64_t kValues = UnitTraits<Unit>::kValues;
  constexpr TileLayout kLayout = kTileLayout<Unit>;
  for (int64_t r = 0; r < count; r += kValues) {
    const Real* even = rows + (first + r) * height;
    const bool paired = kValues == 2 && r + 1 < count;
    const Real* odd = paired ? even + height : even;
    const Real even_weight = static_cast<Real>(weight[first + r]);
    const Real odd_weight = paired ? static_cast<Real>(weight[first + r + 1]) : 0;
    Unit* out = tiles + kLayout.at(0, (first + r) / kValues, 0);
    for (int64_t k = 0; k < height; k += kLayout.rows, out += tile_stride)
      for (int64_t i = 0; i < kLayout.rows && k + i < height; ++i)
        out[i * kLayout.units] =
            make_unit<Unit>(even[k + i] * even_weight, odd[k + i] * odd_weight);
  }
}

void lanes_to_units(const BfPair* panel, int64_t height, BfPair* out) {
  // [height / 2][16 lanes] pairs along the dimension -> [height][8] pairs along the lanes
  constexpr int kW = kWidth<float>;
  constexpr int64_t kApart = kTileLayout<BfPair>.class_units;
  for (int64_t u = 0; u < height / 2; ++u)
    for (int v = 0; v < kVectors<float>; ++v) {
      const WordVec line = load_words(panel + u * kLanes + v * kW);
      store_pairs<0>(out + 2 * u * kApart + v * kW / 2, line);
      store_pairs<16>(out + (2 * u + 1) * kApart + v * kW / 2, line);
    }
}

// ---- normalisation backward

// The values k of a class panel's lanes, of vector v of them.
template <class Unit>
UNICOM_INLINE Vec<RealOf<Unit>> panel_values(const Unit* panel, int64_t k, int v) {
  if constexpr (UnitTraits<Unit>::kValues == 2) {
    const WordVec line = load_words(panel + k / 2 * kLanes + v * kWidth<float>);
    return k % 2 ? odd_half(line) : even_half(line);
  } else {
    return load(panel + k * kLanes + v * kWidth<RealOf<Unit>>);
  }
}

template <class Unit>
void add_lanes(const Unit* panel, int64_t height, double* sums) {
  using Real = RealOf<Unit>;
  for (int64_t k = 0; k < height; ++k) {
    Vec<Real> sum = panel_values(panel, k, 0);
    for (int v = 1; v < kVectors<Real>; ++v) sum += panel_values(panel, k, v);
    sums[k] += static_cast<double>(horizontal_sum<Real>(sum));
  }
}

template <class Unit>
void unit_backward(const RealOf<Unit>* gradient, const Unit* panel, int64_t dim,
                   const double* scale, RealOf<Unit>* rows) {
  using Real = RealOf<Unit>;
  constexpr int kV = kVectors<Real>;
  const int64_t height = panel_height(dim);
  auto unit = [&](int64_t k, int v) { return panel_values(panel, k, v); };
  Vec<Real> dot[kV] = {}, square[kV] = {}, factor[kV];
  for (int64_t k = 0; k < dim; ++k)
    for (int v = 0; v < kV; ++v) {
      const Vec<Real> u = unit(k, v);
      dot[v] = fma(load(gradient + k * kLanes + v * kWidth<Real>), u, dot[v]);
      square[v] = fma(u, u, square[v]);
    }
  // A rounded unit vector is not quite of length 1: project along what was really multiplied.
  for (int v = 0; v < kV; ++v) {
    const Vec<Real> zero{};
    dot[v] = square[v] > zero ? dot[v] / square[v] : zero;
    for (int i = 0; i < kWidth<Real>; ++i)
      factor[v][i] = static_cast<Real>(scale[v * kWidth<Real> + i]);
  }
  int64_t first = 0;
#if defined(__AVX512F__) && UNICOM_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<Real, float>)
    for (; first + kLanes <= dim; first += kLanes)
      transpose_block(
          [&](int i) {
            const Vec<Real> g = load(gradient + (first + i) * kLanes);
            return reinterpret_cast<__m512>(factor[0] * fma(-dot[0], unit(first + i, 0), g));
          },
          rows + first, height);
#endif
  for (int64_t k = first; k < height; k += kLanes) {
    const int64_t count = height - k < kLanes ? height - k : kLanes;
    Real block[kLanes][kLanes];
    for (int64_t i = 0; i < count; ++i)
      for (int v = 0; v < kV; ++v) {
        const Vec<Real> g = load(gradient + (k + i) * kLanes + v * kWidth<Real>);
        store(block[i] + v * kWidth<Real>,
              k + i < dim ? factor[v] * fma(-dot[v], unit(k + i, v), g) : Vec<Real>{});
      }
    transpose(block[0], kLanes, count, kLanes, rows + k, height);
  }
}

// ---- rows back to where their columns were

template <class Real>
void spread_rows(const Real* rows, int64_t height, int64_t count, const SourceRows& columns,
                 Real* out, int64_t out_stride) {
  const ColumnPicker picker(columns);
  for (int64_t r = 0; r < count; ++r, rows += height, out += out_stride) {
    if constexpr (std::is_same_v<Real, float>) {
      if (picker.works()) {
        picker.put(rows, out);
        continue;
      }
    }
    for (int64_t k = 0; k < columns.dim; ++k) out[columns.columns[k]] = rows[k];
  }
}

}  // namespace
}  // namespace unicom::cpu
