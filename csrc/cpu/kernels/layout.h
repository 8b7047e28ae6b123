// How operands lie in memory for the CPU kernels. What a forward pass saves is the same for every
// instruction set, so that any backward pass can read it.
//
//   vector panels   [panel][unit][16]  sixteen classes (or batch rows) side by side; the kernels
//                                      load one line of 16 and multiply it by broadcast values.
//                                      Classes of several centres have a panel for each of
//                                      these: the first ones of sixteen classes, then the second.
//   tile panels     [tile][unit][6]    six rows side by side; the kernels broadcast from these
//   squares         [tile][unit / 16][16][16]  sixteen rows, of each sixteen units side by side: what
//                                      the matrix unit takes in the place of tile panels
//   gradient panels [panel][dim][16]   like vector panels, accumulated in Real
//
// A unit is what one multiply-add consumes along the summed dimension: one float, one double, a
// pair of consecutive bf16 values, or four 8-bit integers (unsigned in tiles, signed in vector
// panels).
#pragma once

#include <cstdint>
#include <cstring>

#include "../../core/rows.h"

namespace unicom::cpu {

constexpr int64_t kLanes = 16;
constexpr int64_t kTile = 6;

// Units that may be read behind the last vector panel of bytes, whatever they are.
constexpr int64_t kBehindPanels = 16 * kLanes;

struct BfPair {
  uint16_t even, odd;
};

struct ByteQuad {
  uint8_t byte[4];
};

template <class Unit>
struct UnitTraits {
  using Real = Unit;
  static constexpr int64_t kValues = 1;  // values per unit
};
template <>
struct UnitTraits<BfPair> {
  using Real = float;
  static constexpr int64_t kValues = 2;
};
template <class Unit>
using RealOf = typename UnitTraits<Unit>::Real;

static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Height of a panel that holds `dim` values per lane: a whole number of tiles, so that products can
// write full tiles, and even, so that pairs fit.
static constexpr int64_t panel_height(int64_t dim) { return round_up(dim, kTile); }

// Rows of a user's matrix, and the selected columns again as bits, by which vector kernels pick
// them out of whole lines: bit c % 16 of entry c / 16 is set for each selected column c, up to the
// last one. Both or neither.
struct SourceRows : RowSource {
  const uint16_t* column_bits;

  SourceRows(const RowSource& rows, const uint16_t* bits) : RowSource(rows), column_bits(bits) {}
};

// Rounding of unit vectors before they are packed (bf16 pairs are rounded by their layout).
enum class Rounding : int32_t { kNone, kFloat16 };

static inline float bf16_to_float(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// Round to nearest even; a NaN stays a (quiet) NaN.
static inline uint16_t float_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return is_nan ? static_cast<uint16_t>((bits >> 16) | 0x40u)
                : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace unicom::cpu
