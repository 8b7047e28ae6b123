// The kernels of kernels.h, written once; each kernels_*.cpp includes this with its own flags and
// names the result with UNICOM_ISA_NAME / UNICOM_ISA_TABLE.
#pragma once

#include <limits>
#include <type_traits>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "nearest_impl.h"
#include "product.h"

namespace unicom::cpu {
namespace {

// ---- reading and packing rows
// --------------------------------------------------------------------

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

// Divides out [dim] by its norm, and pads it. Returns the inverse norm (0 for a zero row, whose
// unit vector is 0).
template <class Real>
double normalize(Real* out, int64_t dim, int64_t height) {
  const double sum = sum_of_squares(out, dim);
  const double inverse = sum == 0 ? 0.0 : 1.0 / std::sqrt(sum);
  if (inverse > 1e-30 && inverse < 1e30) {
    const Real factor = static_cast<Real>(inverse);
    for (int64_t k = 0; k < dim; ++k) out[k] *= factor;
  } else {  // an inverse outside the range of fp32, or NaN
    for (int64_t k = 0; k < dim; ++k) out[k] = static_cast<Real>(out[k] * inverse);
  }
  for (int64_t k = dim; k < height; ++k) out[k] = 0;
  return inverse;
}

// One unit row; returns the inverse norm.
template <class Real>
double unit_row(const RowSource& source, int64_t id, Real* out, int64_t height) {
  const int64_t offset = id * source.row_stride;
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

UNICOM_INLINE void prefetch_row(const RowSource& source, int64_t id) {
  const int64_t width = source.dtype == DType::kFloat64   ? 8
                        : source.dtype == DType::kFloat32 ? 4
                                                          : 2;
  const int64_t last = source.columns != nullptr ? source.columns[source.dim - 1] : source.dim - 1;
  const int64_t bytes = (last + 1) * width < kPrefetchBytes ? (last + 1) * width : kPrefetchBytes;
  const char* row = static_cast<const char*>(source.data) + id * source.row_stride * width;
  for (int64_t offset = 0; offset < bytes; offset += 64) __builtin_prefetch(row + offset);
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
bool pack_whole_rows(const RowSource& source, const int64_t* ids, int64_t first, int64_t total,
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

// Selected columns of fp32 rows, where the instruction set can pick them out of whole lines.
class ColumnPicker {
 public:
  ColumnPicker(const int64_t* columns, int64_t dim) {
#if defined(__AVX512F__) && UNICOM_VECTOR_BYTES == 64
    if (columns == nullptr) return;
    const int64_t width = columns[dim - 1] / kLanes + 1;
    if (width > kMostGroups) return;
    groups_ = width;
    std::memset(mask_, 0, static_cast<size_t>(width) * sizeof(*mask_));
    for (int64_t k = 0; k < dim; ++k)
      mask_[columns[k] / kLanes] |= static_cast<uint16_t>(1u << (columns[k] % kLanes));
#else
    (void)columns, (void)dim;
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
  static constexpr int64_t kMostGroups = 512;
  int64_t groups_ = 0;
  uint16_t mask_[kMostGroups];
};

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
void pack_panel(const RowSource& source, const int64_t* ids, int64_t first, int64_t total,
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
  const ColumnPicker picker(source.dtype == DType::kFloat32 ? source.columns : nullptr, source.dim);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    RealOf<Unit>* row = scratch + lane * height;
    if (lane < count) {
      // Sampled rows lie scattered in memory: ask for those to come while this one is worked on.
      const int64_t id = id_of(lane);
      const int64_t last = total - 1 - first;
      const int64_t ahead = id_of(lane + kPrefetchRows < last ? lane + kPrefetchRows : last);
      if constexpr (std::is_same_v<RealOf<Unit>, float>) {
        const bool whole = source.dtype == DType::kFloat32 && source.columns == nullptr;
        if (whole || picker.works()) {
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
               Unit* tile) {
  constexpr int64_t kValues = UnitTraits<Unit>::kValues;
  for (int64_t u = 0; u < units; ++u)
    for (int64_t m = 0; m < kTile; ++m) {
      RealOf<Unit> pair[2] = {rows[m * height + u * kValues],
                              kValues == 2 ? rows[m * height + u * kValues + 1] : 0};
      round_values(pair, 2, rounding);
      tile[u * kTile + m] = make_unit<Unit>(pair[0], pair[1]);
    }
}

template <class Unit>
void pack_weighted(const RealOf<Unit>* rows, int64_t height, const double* weight, int64_t first,
                   int64_t count, int64_t tile_stride, Unit* tiles) {
  using Real = RealOf<Unit>;
  constexpr int64_t kValues = UnitTraits<Unit>::kValues;
  for (int64_t r = 0; r < count; r += kValues) {
    const Real* even = rows + (first + r) * height;
    const bool paired = kValues == 2 && r + 1 < count;
    const Real* odd = paired ? even + height : even;
    const Real even_weight = static_cast<Real>(weight[first + r]);
    const Real odd_weight = paired ? static_cast<Real>(weight[first + r + 1]) : 0;
    for (int64_t k = 0; k < height; ++k)
      tiles[k / kTile * tile_stride + (first + r) / kValues * kTile + k % kTile] =
          make_unit<Unit>(even[k] * even_weight, odd[k] * odd_weight);
  }
}

void lanes_to_units(const BfPair* panel, int64_t height, BfPair* out) {
  // [height / 2][16 lanes] pairs along the dimension -> [height][8] pairs along the lanes
  constexpr int kW = kWidth<float>;
  for (int64_t u = 0; u < height / 2; ++u)
    for (int v = 0; v < kVectors<float>; ++v) {
      const WordVec line = load_words(panel + u * kLanes + v * kW);
      store_pairs<0>(out + 2 * u * (kLanes / 2) + v * kW / 2, line);
      store_pairs<16>(out + (2 * u + 1) * (kLanes / 2) + v * kW / 2, line);
    }
}

// ---- logits
// ----------------------------------------------------------------------------------------

// Whole lines to memory; past the caches they are not read from there first.
template <class Real>
UNICOM_INLINE void keep(const Real* from, int64_t count, bool past_caches, Real* to) {
#if defined(__AVX512F__) && UNICOM_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<Real, float>)
    if (past_caches) {
      for (int64_t i = 0; i < count; i += kLanes)
        _mm512_stream_ps(to + i, _mm512_loadu_ps(from + i));
      return;
    }
#else
  (void)past_caches;
#endif
  std::memcpy(to, from, count * sizeof(Real));
}

// Cosines of one tile with the panels [panel, panel + P), multiplied or kept ones: where they are,
// [P][6][16], and how far from one panel to the next. The engine sees to it that P panels beside
// each other are all kept or none.
template <class Real>
struct TileCosines {
  const Real* data;
  int64_t panel_stride;
};
enum class Kept { kWrite, kRead };
template <class Unit, int P, Kept kKept>
UNICOM_INLINE TileCosines<RealOf<Unit>> tile_cosines(const LogitBlock<Unit>& block, int64_t panel,
                                                     int64_t tile, RealOf<Unit>* out) {
  constexpr int64_t kSize = kTile * kLanes;
  const bool kept = panel + P <= block.kept;
  RealOf<Unit>* place = block.cosines + panel * block.cosines_panel_stride + tile * kSize;
  if (kept && kKept == Kept::kRead) return {place, block.cosines_panel_stride};
  multiply_tile<Unit, P>({block.rows + tile * block.row_tile_stride, 0, 0},
                         block.classes + panel * block.panel_stride, block.panel_stride,
                         block.units, out, kSize, false);
  if (kept)
    for (int p = 0; p < P; ++p, place += block.cosines_panel_stride)
      keep(out + p * kSize, kSize, block.past_caches, place);
  return {out, kSize};
}

// The sixteen cosines of one row and panel, with the target and the padding struck out.
template <class Unit>
struct Negatives {
  using Real = RealOf<Unit>;
  Vec<Real> value[kVectors<Real>];

  UNICOM_INLINE Negatives(const Real* cosines, int64_t target, int64_t valid) {
    for (int v = 0; v < kVectors<Real>; ++v) value[v] = load(cosines + v * kWidth<Real>);
    if (static_cast<uint64_t>(target) < kLanes || valid < kLanes) {
      Real edited[kLanes];
      for (int v = 0; v < kVectors<Real>; ++v) store(edited + v * kWidth<Real>, value[v]);
      if (static_cast<uint64_t>(target) < kLanes) edited[target] = static_cast<Real>(kNoCosine);
      for (int64_t lane = valid < 0 ? 0 : valid; lane < kLanes; ++lane)
        edited[lane] = static_cast<Real>(kNoCosine);
      for (int v = 0; v < kVectors<Real>; ++v) value[v] = load(edited + v * kWidth<Real>);
    }
  }
};

template <class Unit>
void sum_exp(const SumExp<Unit>& args) {
  using Real = RealOf<Unit>;
  constexpr int P = kRegisterPanels<Real>;
  constexpr int kV = kVectors<Real>;
  constexpr int64_t kMaxRows = kBlockTiles * kTile;
  // Lane sums in Real over a bounded number of panels, then in double.
  constexpr int64_t kFlush = 64;
  alignas(64) Real cosines[P * kTile * kLanes];
  alignas(64) Real sums[kMaxRows][kLanes];
  alignas(64) Real largest[kMaxRows][kLanes];
  const int64_t rows = args.tiles * kTile;
  const bool running = args.exponent == kRunningExponent;
  const Vec<Real> fixed = broadcast(static_cast<Real>(running ? 0 : args.exponent));
  const Vec<Real> filter = broadcast(args.filter);

  for (int64_t r = 0; r < rows; ++r) {
    args.result[r] = {0.0, args.exponent, kNoCosine};
    for (int64_t i = 0; i < kLanes; ++i) {
      sums[r][i] = 0;
      largest[r][i] = static_cast<Real>(kNoCosine);
    }
  }
  auto flush = [&](int64_t r) {
    double total = 0;
    for (int64_t i = 0; i < kLanes; ++i) {
      total += static_cast<double>(sums[r][i]);
      sums[r][i] = 0;
    }
    args.result[r].sum += total;
  };
  // Raises the row's exponent where a larger logit comes; the powers of two make it exact.
  auto raise = [&](int64_t r, const Vec<Real>* c) {
    Vec<Real> top = c[0];
    for (int v = 1; v < kV; ++v) top = c[v] > top ? c[v] : top;
    const double z = static_cast<double>(horizontal_max<Real>(top)) * args.scale;
    if (!(z > kNoCosine)) return;
    const int64_t power = static_cast<int64_t>(std::nearbyint(z * ExpConstants::kLog2e));
    RowSum& row = args.result[r];
    if (row.exponent != kRunningExponent && power <= row.exponent) return;
    flush(r);
    row.sum = row.exponent == kRunningExponent
                  ? 0.0
                  : std::ldexp(row.sum, static_cast<int>(row.exponent - power));
    row.exponent = power;
  };

  auto panels_at = [&](auto is_running, auto count, int64_t panel) {
    constexpr bool kRunning = decltype(is_running)::value;
    constexpr int kCount = decltype(count)::value;
    for (int64_t t = 0; t < args.tiles; ++t) {
      const auto tile = tile_cosines<Unit, kCount, Kept::kWrite>(args, panel, t, cosines);
      for (int64_t m = 0; m < kTile; ++m) {
        const int64_t r = t * kTile + m;
        Vec<Real> best[kV], sum[kV];
        for (int v = 0; v < kV; ++v) {
          best[v] = load(largest[r] + v * kWidth<Real>);
          sum[v] = load(sums[r] + v * kWidth<Real>);
        }
        for (int p = 0; p < kCount; ++p) {
          const int64_t first = (panel + p) * kLanes;
          Negatives<Unit> c(tile.data + p * tile.panel_stride + m * kLanes, args.target[r] - first,
                            args.num_classes - first);
          for (int v = 0; v < kV; ++v) {
            best[v] = larger<Real>(c.value[v], best[v]);
            c.value[v] = c.value[v] > filter ? Vec<Real>{} : c.value[v];
          }
          Vec<Real> exponent = fixed;
          if constexpr (kRunning) {
            for (int v = 0; v < kV; ++v) store(sums[r] + v * kWidth<Real>, sum[v]);
            raise(r, c.value);
            for (int v = 0; v < kV; ++v) sum[v] = load(sums[r] + v * kWidth<Real>);
            if (args.result[r].exponent != kRunningExponent)
              exponent = broadcast(static_cast<Real>(args.result[r].exponent));
          }
          for (int v = 0; v < kV; ++v)
            sum[v] += exp_scaled<Real>(exp_parts(c.value[v], args.scale), exponent);
        }
        for (int v = 0; v < kV; ++v) {
          store(largest[r] + v * kWidth<Real>, best[v]);
          store(sums[r] + v * kWidth<Real>, sum[v]);
        }
      }
    }
  };
  int64_t panel = 0, unflushed = 0;
  auto advance = [&](int64_t count) {
    panel += count;
    unflushed += count;
    if (unflushed >= kFlush || panel == args.panels) {
      for (int64_t r = 0; r < rows; ++r) flush(r);
      unflushed = 0;
    }
  };
  auto all_panels = [&](auto is_running) {
    for (; panel + P <= args.panels; advance(P))
      panels_at(is_running, std::integral_constant<int, P>{}, panel);
    for (; panel < args.panels; advance(1))
      panels_at(is_running, std::integral_constant<int, 1>{}, panel);
  };
  if (running)
    all_panels(std::true_type{});
  else
    all_panels(std::false_type{});
#if defined(__SSE2__)
  _mm_sfence();  // what was kept past the caches
#endif
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < kLanes; ++i)
      if (largest[r][i] > args.result[r].largest) args.result[r].largest = largest[r][i];
}

// Probabilities [rows][16] of one panel, in Real, to the two layouts the products read.
template <class Unit>
UNICOM_INLINE void emit(const RealOf<Unit>* p, int64_t rows, Unit* along_rows, Unit* along_classes,
                        int64_t along_classes_stride) {
  constexpr int64_t kValues = UnitTraits<Unit>::kValues;
  constexpr int64_t kGroup = kLanes / kValues;
  if constexpr (kValues == 2) {
    constexpr int kV = kVectors<float>;
    for (int64_t r = 0; r < rows; r += 2)
      for (int v = 0; v < kV; ++v) {
        const Vec<float> even = load(p + r * kLanes + v * kWidth<float>);
        const Vec<float> odd = load(p + (r + 1) * kLanes + v * kWidth<float>);
        store_words(along_rows + r / 2 * kLanes + v * kWidth<float>, rounded_pairs(even, odd));
      }
  }
  for (int64_t r = 0; r < rows; r += kLanes) {
    Unit* out = along_classes + r / kLanes * along_classes_stride;
    const int64_t count = rows - r < kLanes ? rows - r : kLanes;
    if constexpr (kValues == 1) {
      if (count == kLanes) {
        transpose(p + r * kLanes, kGroup, kLanes, kGroup, out, kLanes);
        continue;
      }
    }
    Unit units[kLanes * kGroup];
    if constexpr (kValues == 2) {
      round_to_pairs(p + r * kLanes, count * kLanes, units);
    } else {
      std::memcpy(units, p + r * kLanes, count * kLanes * sizeof(Unit));
    }
    std::memset(units + count * kGroup, 0, (kLanes - count) * kGroup * sizeof(Unit));
    if constexpr (sizeof(Unit) == 4)
      transpose(reinterpret_cast<const uint32_t*>(units), kGroup, kLanes, kGroup,
                reinterpret_cast<uint32_t*>(out), kLanes);
    else
      transpose(units, kGroup, kLanes, kGroup, out, kLanes);
  }
}

template <class Unit>
void probabilities(const Probabilities<Unit>& args) {
  using Real = RealOf<Unit>;
  constexpr int P = kRegisterPanels<Real>;
  constexpr int kV = kVectors<Real>;
  constexpr int64_t kGroup = kLanes / UnitTraits<Unit>::kValues;
  constexpr int64_t kMaxRows = kBlockTiles * kTile;
  constexpr bool kPaired = UnitTraits<Unit>::kValues == 2;
  alignas(64) Real cosines[P * kTile * kLanes];
  // Pairs are rounded from here; single values are written to their place along the rows at once.
  alignas(64) Real rounded[kPaired ? P : 1][kPaired ? kMaxRows * kLanes : 1];
  const int64_t rows = args.tiles * kTile;
  const Vec<Real> filter = broadcast(args.filter);

  auto panels_at = [&](auto count, int64_t panel) {
    constexpr int kCount = decltype(count)::value;
    Real* p[kCount];
    for (int i = 0; i < kCount; ++i) {
      if constexpr (kPaired)
        p[i] = rounded[i];
      else
        p[i] = args.along_rows + (panel + i) * args.along_rows_stride;
    }
    for (int64_t t = 0; t < args.tiles; ++t) {
      const auto tile = tile_cosines<Unit, kCount, Kept::kRead>(args, panel, t, cosines);
      if (tile.data != cosines && t + 1 < args.tiles)
        for (int i = 0; i < kCount; ++i)
          for (int64_t k = 0; k < kTile * kLanes; k += 64 / sizeof(Real))
            __builtin_prefetch(tile.data + i * tile.panel_stride + kTile * kLanes + k);
      for (int64_t m = 0; m < kTile; ++m) {
        const int64_t r = t * kTile + m;
        const Vec<Real> exponent = broadcast(static_cast<Real>(args.row[r].exponent));
        const Vec<Real> factor = broadcast(static_cast<Real>(args.row[r].factor));
        for (int i = 0; i < kCount; ++i) {
          const int64_t first = (panel + i) * kLanes;
          const Negatives<Unit> c(tile.data + i * tile.panel_stride + m * kLanes,
                                  args.target[r] - first, args.num_classes - first);
          for (int v = 0; v < kV; ++v) {
            const Vec<Real> e = exp_scaled<Real>(exp_parts(c.value[v], args.scale), exponent);
            store(p[i] + r * kLanes + v * kWidth<Real>,
                  c.value[v] > filter ? Vec<Real>{} : e * factor);
          }
        }
      }
    }
    for (int i = 0; i < kCount; ++i)
      emit<Unit>(p[i], rows, args.along_rows + (panel + i) * args.along_rows_stride,
                 args.along_classes + (panel + i) * kGroup * kLanes, args.along_classes_stride);
  };
  int64_t panel = 0;
  for (; panel + P <= args.panels; panel += P) panels_at(std::integral_constant<int, P>{}, panel);
  for (; panel < args.panels; ++panel) panels_at(std::integral_constant<int, 1>{}, panel);
}

// ---- normalisation backward
// ------------------------------------------------------------------------

template <class Unit>
void unit_backward(const RealOf<Unit>* gradient, const Unit* panel, int64_t dim,
                   const double* scale, RealOf<Unit>* rows) {
  using Real = RealOf<Unit>;
  constexpr int64_t kValues = UnitTraits<Unit>::kValues;
  constexpr int kV = kVectors<Real>;
  const int64_t height = panel_height(dim);
  auto unit = [&](int64_t k, int v) -> Vec<Real> {
    if constexpr (kValues == 2) {
      const WordVec line = load_words(panel + k / 2 * kLanes + v * kWidth<float>);
      return k % 2 ? odd_half(line) : even_half(line);
    } else {
      return load(panel + k * kLanes + v * kWidth<Real>);
    }
  };
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
  for (int64_t k = first; k < height; k += 2) {
    Real block[2][kLanes];
    for (int i = 0; i < 2; ++i)
      for (int v = 0; v < kV; ++v) {
        const Vec<Real> g = load(gradient + (k + i) * kLanes + v * kWidth<Real>);
        store(block[i] + v * kWidth<Real>,
              k + i < dim ? factor[v] * fma(-dot[v], unit(k + i, v), g) : Vec<Real>{});
      }
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      rows[lane * height + k] = block[0][lane];
      rows[lane * height + k + 1] = block[1][lane];
    }
  }
}

// ---- rows back to where their columns were
// -----------------------------------------------------

template <class Real>
void spread_rows(const Real* rows, int64_t height, int64_t count, const int64_t* columns,
                 int64_t dim, Real* out, int64_t out_stride) {
  const ColumnPicker picker(columns, dim);
  for (int64_t r = 0; r < count; ++r, rows += height, out += out_stride) {
    if constexpr (std::is_same_v<Real, float>) {
      if (picker.works()) {
        picker.put(rows, out);
        continue;
      }
    }
    for (int64_t k = 0; k < dim; ++k) out[columns[k]] = rows[k];
  }
}

template <class Unit>
constexpr Kernels<Unit> make_kernels() {
  Kernels<Unit> k{};
  k.pack_panel = pack_panel<Unit>;
  k.unit_row = unit_row<RealOf<Unit>>;
  k.pack_tile = pack_tile<Unit>;
  k.pack_weighted = pack_weighted<Unit>;
  if constexpr (UnitTraits<Unit>::kValues == 2) k.lanes_to_units = lanes_to_units;
  k.product = product<Unit>;
  k.sum_exp = sum_exp<Unit>;
  k.probabilities = probabilities<Unit>;
  k.dot = dot;
  if constexpr (std::is_same_v<RealOf<Unit>, float>) k.nearest = nearest<Unit>;
  k.unit_backward = unit_backward<Unit>;
  k.spread_rows = spread_rows<RealOf<Unit>>;
  return k;
}

constexpr Kernels<ByteQuad> make_byte_kernels() {
  Kernels<ByteQuad> k{};
  k.nearest = nearest<ByteQuad>;
  return k;
}

}  // namespace
}  // namespace unicom::cpu
