// Rows become operands: gathered, divided by their norms, rounded, padded.
#pragma once

#include "../../core/rows.h"
#include "../../core/target.h"
#include "logits.h"

namespace unicom::cuda {

struct PackRows {
  RowSource source;
  ClassOrder order;      // of several centres: what is written where
  const int64_t* ids;    // [total] rows to take, or nullptr: rows 0, 1, ...; or so many classes
  const int64_t* count;  // on the device: how many there are, or nullptr: total
  int64_t total;
  Positives positives;   // rows whose sample does not count become zeros; without slots all count
  const double* factor;  // [total] each unit row is multiplied by its own; nullptr: 1
  void* unit;            // [rows][depth] receives the rows; zeros past count and past source.dim,
                         // and where the order has none
  int64_t rows, depth;
  double* inverse_norm;  // [rows] in the order of ids, 0 for a zero row, whose unit vector is 0;
                         // nullptr: not wanted
};
template <class Unit>
void pack_rows(Queue&, const PackRows&);

// The sum of packed rows, in double and in an order that does not depend on the device: that of
// parts, and then of the parts'.
constexpr int64_t kSumParts = 512;
struct SumRows {
  const void* unit;  // [rows][depth]
  int64_t rows, depth;
  double* partial;  // [kSumParts][depth]
  double* out;      // [depth]
};
template <class Unit>
void sum_rows(Queue&, const SumRows&);

}  // namespace unicom::cuda
