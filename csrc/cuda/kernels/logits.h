// The logits, which exist only in registers: a tile of cosines becomes row sums (forward) or
// probabilities (backward).
#pragma once

#include "../../core/target.h"
#include "types.h"

namespace unicom::cuda {

// Operands are padded to these, so that tiles need no bounds.
constexpr int64_t kRowGranule = 128;
constexpr int64_t kClassGranule = 256;
constexpr int64_t kDepthGranule = 64;

struct Logits {
  const void* embeddings;  // [rows][depth] unit rows
  const void* prototypes;  // [classes][depth] unit rows; finite past count
  int64_t rows, classes, depth;
  int64_t batch;
  Positives positives;   // positions among the classes, negative: none here
  const int64_t* count;  // on the device: how many classes there are, or nullptr: bound
  int64_t bound;
  double scale, filter;  // cosines of negatives above filter count as 0; +inf: none
};

// sum over a row's negatives of exp(scale * cosine), as sum * 2^exponent.
template <class Real>
struct RowSum {
  Real sum, exponent;
  Real largest;  // largest cosine before the filter
};
constexpr float kNoCosine = -1e30f;  // below every cosine: exp gives 0 and max ignores it
// Of a sum without terms: below every exponent, yet far above scale * kNoCosine.
constexpr float kNoExponent = -1e15f;

struct SumExp {
  Logits logits;
  int64_t runs;          // the classes are cut into this many runs, which blocks sum apart
  void* out;             // [runs][rows] RowSum<RealOf<Unit>>
  void* kept;            // [rows][kept_classes] cosines of the first classes, for backward; float
  int64_t kept_classes;  // and double only. kNoCosine for positives and past count. Whole granules
  TilePlan plan{};       // by the launch
};
template <class Unit>
void sum_exp(Queue&, const SumExp&);

// A negative's softmax among negatives is factor * 2^-exponent * exp(scale * cosine).
template <class Real>
struct RowScale {
  Real factor, exponent;
};

struct Probabilities {
  Logits logits;
  int64_t first, chunk;  // classes [first, first + chunk), whole granules
  const void* kept;      // what sum_exp kept
  int64_t kept_classes;
  int64_t runs;
  const void* row;  // [rows] RowScale<RealOf<Unit>>
  void* out;  // [rows][chunk] probability * kProbabilityScale; 0 for positives and past count,
              // but in tiles that are past it as a whole nothing is written
  TilePlan plan{};  // by the launch
};
template <class Unit>
void probabilities(Queue&, const Probabilities&);

}  // namespace unicom::cuda
