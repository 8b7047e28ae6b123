// From sums over unit vectors to gradients of the rows: the target's part, the derivative of the
// normalisation, and the write to the selected columns.
#pragma once

#include "../../core/rows.h"
#include "../../core/target.h"
#include "logits.h"

namespace unicom::cuda {

// What both gradients need. The positives' part is taken in double from the rows as they were given:
// d loss / d cosine = -target_weight, and d cosine / d x = (w^ - c x^) / |x|.
struct Unpack {
  RowSource embeddings, prototypes;
  bool by_sample;  // the rows of prototypes are those of the positives [batch][width] in turn
  const int64_t* class_index;
  ClassOrder order;
  Positives positives;  // their prototypes, as slot * centers + centre
  int64_t batch, depth;
  const double* target_weight;    // [batch][width]
  const double* negative_weight;  // [batch]
  const double *row_inverse_norm, *class_inverse_norm;
  // Label smoothing takes all classes alike; the positives, which are none of the negatives, get
  // theirs back.
  const double* smooth_weight;  // [batch], or nullptr: none
  const double* class_sum;      // [depth] of the unit prototypes
  const double* smooth_sum;     // [depth] of unit embeddings, each by its smooth_weight
  States states;
  double* radial;       // see Gradients
  const void* unit;     // [rows or chunk][depth] packed unit rows of what is written
  const void* partial;  // [splits][rows or chunk][depth] RealOf<Unit>
  int64_t splits, split_stride;
  // nullptr: the sums are of probabilities * kProbabilityScale; or [rows]: of embeddings, by
  // exponentials * 2^-part_exponent.
  const float* part_exponent;
  RowSink sink;  // of embeddings: data may be nullptr, then only radial is wanted
};

template <class Unit>
void unpack_embeddings(Queue&, const Unpack&);

// The selected columns of each positive, as `by_sample` wants them once prototypes change.
struct CopyTargets {
  RowSource prototypes;
  const int64_t* class_index;
  int64_t centers;
  const int64_t* slots;  // [count] their prototypes, as slot * centers + centre
  int64_t count;
  void* out;  // [count][prototypes.dim], of its type; rows of slots elsewhere are left alone
};
void copy_targets(Queue&, const CopyTargets&);

struct UnpackPrototypes {
  Unpack common;
  int64_t first, chunk;  // rows of prototypes in this chunk
  const int64_t* count;
  int64_t bound;
  const int64_t* by_slot;  // [batch * width], of OrderPositives
  const double* fold;      // [1] what the weights in the operands were divided by
  bool compact;            // row j of the sink is prototype sink_first + j of the list, not of all
  int64_t sink_first;
};
template <class Unit>
void unpack_prototypes(Queue&, const UnpackPrototypes&);

}  // namespace unicom::cuda
