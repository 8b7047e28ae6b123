// Products on the matrix unit of the CPU (Intel AMX), sixteen rows by sixteen lanes at a time.
//
// The rows are given as squares [16 rows][16 units], a line for each row; what they are multiplied
// by is sixteen units of a vector panel, [unit][lane], as they lie there. Both are a register.
#pragma once

#include <cstring>

#include "layout.h"
#include "simd.h"

namespace unicom::cpu {
namespace {

constexpr int64_t kSquare = 16;
constexpr int64_t kSquareUnits = kSquare * kSquare;
static_assert(kSquare == kLanes);

// One or two squares of rows beside each other times one or two panels.
template <class Unit>
struct Corner {
  const Unit* rows[2];    // the first square of each
  int64_t square_stride;  // from a square to that of the next units
  const Unit* panels[2];  // the first line of each
  int64_t squares;
  const Unit* row_tail[2];  // and one more; nullptr: none
  const Unit* panel_tail[2];
  bool accumulate;  // sums go on from what is in out; else from zero
};

template <class Unit>
using SumOf = std::conditional_t<std::is_same_v<Unit, ByteQuad>, int32_t, float>;
// out[i][j] [16 rows][16 lanes]
template <class Unit>
using CornerSums = SumOf<Unit>* [2][2];

#if defined(__AMX_TILE__)

// Registers as the products below use them: four of sums, two of rows, two of panels, all whole. For
// as long as it lives, this thread has them.
class MatrixUnit {
 public:
  MatrixUnit() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("" ::"m"(config));  // written before it is read
    _tile_loadconfig(&config);
  }
  ~MatrixUnit() { _tile_release(); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
};

// Numbers of registers are part of the instructions.
#define UNICOM_MULTIPLY(sum, row, panel)      \
  if constexpr (std::is_same_v<Unit, BfPair>) \
    _tile_dpbf16ps(sum, row, panel);          \
  else                                        \
    _tile_dpbusd(sum, row, panel);

template <class Unit, int kRows, int kPanels, class Step>
void multiply_corner(const Corner<Unit>& c, const CornerSums<Unit>& out, const Step& step) {
  constexpr int kLine = 64;
  // The compiler does not know that these instructions read memory.
  asm volatile("" ::: "memory");
  if (c.accumulate) {
    _tile_loadd(0, out[0][0], kLine);
    if constexpr (kPanels == 2) _tile_loadd(1, out[0][1], kLine);
    if constexpr (kRows == 2) _tile_loadd(2, out[1][0], kLine);
    if constexpr (kRows == 2 && kPanels == 2) _tile_loadd(3, out[1][1], kLine);
  } else {
    _tile_zero(0);
    if constexpr (kPanels == 2) _tile_zero(1);
    if constexpr (kRows == 2) _tile_zero(2);
    if constexpr (kRows == 2 && kPanels == 2) _tile_zero(3);
  }
  const auto add = [&](const Unit* row0, const Unit* row1, const Unit* panel0, const Unit* panel1) {
    _tile_loadd(4, row0, kLine);
    _tile_loadd(6, panel0, kLine);
    UNICOM_MULTIPLY(0, 4, 6)
    if constexpr (kPanels == 2) {
      _tile_loadd(7, panel1, kLine);
      UNICOM_MULTIPLY(1, 4, 7)
    }
    if constexpr (kRows == 2) {
      _tile_loadd(5, row1, kLine);
      UNICOM_MULTIPLY(2, 5, 6)
    }
    if constexpr (kRows == 2 && kPanels == 2) {
      UNICOM_MULTIPLY(3, 5, 7)
    }
  };
  for (int64_t s = 0; s < c.squares; ++s) {
    step();
    const int64_t row = s * c.square_stride, panel = s * kSquareUnits;
    add(c.rows[0] + row, c.rows[1] + row, c.panels[0] + panel, c.panels[1] + panel);
  }
  if (c.row_tail[0] != nullptr) add(c.row_tail[0], c.row_tail[1], c.panel_tail[0], c.panel_tail[1]);
  _tile_stored(0, out[0][0], kLine);
  if constexpr (kPanels == 2) _tile_stored(1, out[0][1], kLine);
  if constexpr (kRows == 2) _tile_stored(2, out[1][0], kLine);
  if constexpr (kRows == 2 && kPanels == 2) _tile_stored(3, out[1][1], kLine);
}

#undef UNICOM_MULTIPLY

#else  // the same sums where there is no such unit, so that all around them is tested on any CPU

class MatrixUnit {
 public:
  MatrixUnit() {}
};

UNICOM_INLINE void add_to(float* sum, const BfPair& a, const BfPair& b) {
  *sum += bf16_to_float(a.even) * bf16_to_float(b.even);
  *sum += bf16_to_float(a.odd) * bf16_to_float(b.odd);
}
UNICOM_INLINE void add_to(int32_t* sum, const ByteQuad& a, const ByteQuad& b) {
  for (int i = 0; i < 4; ++i) *sum += a.byte[i] * static_cast<int8_t>(b.byte[i]);
}

template <class Unit, int kRows, int kPanels, class Step>
void multiply_corner(const Corner<Unit>& c, const CornerSums<Unit>& out, const Step& step) {
  const auto add = [&](const Unit* row, const Unit* panel, SumOf<Unit>* sums) {
    for (int64_t r = 0; r < kSquare; ++r)
      for (int64_t u = 0; u < kSquare; ++u)
        for (int64_t lane = 0; lane < kLanes; ++lane)
          add_to(sums + r * kLanes + lane, row[r * kSquare + u], panel[u * kLanes + lane]);
  };
  for (int64_t s = 0; s < c.squares; ++s) step();
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kPanels; ++j) {
      if (!c.accumulate) std::memset(out[i][j], 0, kSquareUnits * sizeof(SumOf<Unit>));
      for (int64_t s = 0; s < c.squares; ++s)
        add(c.rows[i] + s * c.square_stride, c.panels[j] + s * kSquareUnits, out[i][j]);
      if (c.row_tail[i] != nullptr) add(c.row_tail[i], c.panel_tail[j], out[i][j]);
    }
}

#endif

// The last units of squares or panels, filled up with zeros.
template <class Unit>
class Tail {
 public:
  // Of a square: `units` of each row.
  const Unit* of_rows(const Unit* square, int64_t units) {
    for (int64_t r = 0; r < kSquare; ++r) {
      std::memcpy(values_ + r * kSquare, square + r * kSquare, units * sizeof(Unit));
      std::memset(values_ + r * kSquare + units, 0, (kSquare - units) * sizeof(Unit));
    }
    return values_;
  }
  // Of a panel: its last `units` lines.
  const Unit* of_panel(const Unit* lines, int64_t units) {
    std::memcpy(values_, lines, units * kLanes * sizeof(Unit));
    std::memset(values_ + units * kLanes, 0, (kSquare - units) * kLanes * sizeof(Unit));
    return values_;
  }

 private:
  alignas(64) Unit values_[kSquareUnits];
};

// Whether zeros times whatever lies behind a panel are nothing: then products may go on to whole
// squares, and read up to kBehindPanels behind the last one. In floating point that may be NaN.
template <class Unit>
constexpr bool kMayReadOn = std::is_same_v<Unit, ByteQuad>;
static_assert(kBehindPanels >= (kSquare - 1) * kLanes);

// out[panel * out_panel + r * 16 + lane] (+)=, r < 16 row_squares: rows, whose squares lie row_stride
// apart, times panels.  padded: the squares end with zeros past the units
template <class Unit, class Step>
void multiply_squares(const Unit* rows, int64_t row_stride, int64_t square_stride,
                      int64_t row_squares, const Unit* panels, int64_t panel_stride,
                      int64_t panel_count, int64_t units, bool padded, bool accumulate,
                      SumOf<Unit>* out, int64_t out_panel, const Step& step) {
  const bool read_on = padded && kMayReadOn<Unit>;
  const int64_t squares = read_on ? ceil_div(units, kSquare) : units / kSquare;
  const int64_t rest = read_on ? 0 : units % kSquare;
  Tail<Unit> row_tail[2], panel_tail[2];
  for (int64_t p = 0; p < panel_count; p += 2) {
    const int panels_here = panel_count - p > 1 ? 2 : 1;
    Corner<Unit> corner{};
    corner.square_stride = square_stride;
    corner.accumulate = accumulate;
    corner.squares = squares;
    corner.panels[1] = panels;  // some address, where there is one panel alone
    corner.rows[1] = rows;
    for (int j = 0; j < panels_here; ++j) {
      corner.panels[j] = panels + (p + j) * panel_stride;
      if (rest > 0)
        corner.panel_tail[j] =
            panel_tail[j].of_panel(corner.panels[j] + squares * kSquareUnits, rest);
    }
    for (int64_t r = 0; r < row_squares; r += 2) {
      const int rows_here = row_squares - r > 1 ? 2 : 1;
      CornerSums<Unit> sums{};
      for (int i = 0; i < rows_here; ++i) {
        corner.rows[i] = rows + (r + i) * row_stride;
        if (rest > 0) {
          const Unit* last = corner.rows[i] + squares * square_stride;
          corner.row_tail[i] = padded ? last : row_tail[i].of_rows(last, rest);
        }
        for (int j = 0; j < panels_here; ++j)
          sums[i][j] = out + (p + j) * out_panel + (r + i) * kSquareUnits;
      }
      if (rows_here == 2 && panels_here == 2)
        multiply_corner<Unit, 2, 2>(corner, sums, step);
      else if (rows_here == 2)
        multiply_corner<Unit, 2, 1>(corner, sums, step);
      else if (panels_here == 2)
        multiply_corner<Unit, 1, 2>(corner, sums, step);
      else
        multiply_corner<Unit, 1, 1>(corner, sums, step);
    }
  }
}

}  // namespace
}  // namespace unicom::cpu
