// Sums of unit rows, exact: the same at any order of the rows, number of threads and ranks, and on
// any device, and a row can be taken out again.
//
// A component u of a unit row, of double arithmetic, is added as the whole number that is nearest to
// u * 2^shift, of two the even one. |u| is at most 1 but for some roundings of double, so a sum of N
// rows is below 2^63 as long as N * 2^shift is at most 2^62, half of that. It is off by at most
// N * 2^-(shift + 1) from that of the components.
#pragma once

#include <cmath>
#include <cstdint>

#include "rows.h"

namespace unicom {

constexpr int64_t kMaxShift = 50;  // CPUs round by adding 1.5 * 2^52, which is right up to 2^51

// Each row goes from sum before[i] to sum index[i].
struct AddUnitRows {
  FloatRows rows;
  const int64_t* index;   // [rows.count] -1: no sum
  const int64_t* before;  // [rows.count] likewise; nullptr: all come from no sum
  int64_t num_sums;
  int64_t shift;    // at most kMaxShift
  int64_t* sums;    // [num_sums][dim]
  int64_t* counts;  // [num_sums] of rows

  UNICOM_HD bool has_sum(int64_t j) const { return j >= 0 && j < num_sums; }
  UNICOM_HD int64_t from(int64_t i) const { return before != nullptr ? before[i] : -1; }
};

// 2^shift / norm. 0 for a row without direction, zero or not finite, which is in no sum.
UNICOM_HD inline double scale_of_row(double square, int64_t shift) {
  const bool directed = square > 0 && square < INFINITY;
  return directed ? static_cast<double>(int64_t{1} << shift) / std::sqrt(square) : 0.0;
}

// Unit vectors of sums, whatever their shift; zero where the sum is.
struct Directions {
  const int64_t* sums;  // [count][dim]
  int64_t count, dim;
  float* out;  // [count][dim]
};

}  // namespace unicom
