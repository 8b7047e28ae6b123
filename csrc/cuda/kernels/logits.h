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

// Columns of a tile of logits, and threads that share one of its rows. Tensor cores want wide tiles:
// what they read grows with the tile's edge, what they compute with its area.
template <class Unit>
constexpr int kClassCols = UnitTraits<Unit>::kTensorCores ? 256 : 512 / int{sizeof(Unit)};
constexpr int kTeam = 16;

// Where the prototypes of the sampled classes lie as operands. With one centre class j is row j.
// With several, each thread of a tile has all centres of a class, side by side in its columns, so
// that it finds the nearest alone; columns that are left over hold nothing.
struct ClassOrder {
  int64_t centers = 1;
  int64_t cols = 0;            // of a tile
  int64_t lanes = 0, run = 0;  // threads side by side, each with so many columns

  template <class Unit>
  static ClassOrder of(int64_t centers) {
    constexpr bool kWide = UnitTraits<Unit>::kTensorCores;
    return {centers, kClassCols<Unit>, kWide ? 4 : kTeam, kWide ? 2 : 16 / int64_t{sizeof(Unit)}};
  }
  int64_t most_centers() const { return cols / kTeam; }
  UNICOM_HD int64_t classes_of_thread() const { return cols / kTeam / centers; }
  UNICOM_HD int64_t classes_of_tile() const { return classes_of_thread() * kTeam; }
  // Of so many classes.
  UNICOM_HD int64_t rows(int64_t classes) const {
    return centers == 1 ? classes : (classes + classes_of_tile() - 1) / classes_of_tile() * cols;
  }
  // slot * centers + centre of the prototype in a row; -1 where none can be.
  UNICOM_HD int64_t prototype_at(int64_t row) const {
    if (centers == 1) return row;
    const int64_t group = cols / kTeam * lanes;  // columns of the threads side by side
    const int64_t col = row % cols, in_group = col % group;
    const int64_t thread = col / group * lanes + in_group / run % lanes;
    const int64_t own = in_group / (run * lanes) * run + in_group % run;  // among its columns
    if (own / centers >= classes_of_thread()) return -1;
    const int64_t slot = row / cols * classes_of_tile() + own / centers * kTeam + thread;
    return slot * centers + own % centers;
  }
};

struct Logits {
  const void* embeddings;  // [rows][depth] unit rows
  const void* prototypes;  // [classes][depth] unit rows, in this order; finite past count
  ClassOrder order;
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
  int64_t runs;  // the classes are cut into this many runs, which blocks sum apart
  void* out;     // [runs][rows] RowSum<RealOf<Unit>>
  void* kept;    // [rows][kept_classes] cosines of the first classes, for backward; float
  int64_t
      kept_classes;  // and double only. kNoCosine for positives, past count and for centres that
                     // are not the nearest. Whole granules
  TilePlan plan{};   // by the launch
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
  int64_t first, chunk;  // rows [first, first + chunk) of the prototypes, whole granules
  const void* kept;      // what sum_exp kept
  int64_t kept_classes;
  int64_t runs;
  const void* row;  // [rows] RowScale<RealOf<Unit>>
  void* out;  // [rows][chunk] probability * kProbabilityScale; 0 for positives, past count and for
  // centres that are not the nearest, but in tiles that are past count as a whole nothing
  // is written
  TilePlan plan{};  // by the launch
};
template <class Unit>
void probabilities(Queue&, const Probabilities&);

}  // namespace unicom::cuda
