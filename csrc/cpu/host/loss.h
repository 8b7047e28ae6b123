// The algorithm: the order of the steps, their workspaces and chunk sizes, forward and backward.
// Knows no torch: the bindings hand it plain pointers and a way to run loops on threads.
#pragma once

#include <cstdint>

#include "../../core/sampler.h"
#include "../../core/target.h"
#include "../kernels/kernels.h"
#include "parallel.h"

namespace unicom {

// One call of the operation on one shard of the classes. All pointers stay the caller's.
struct Problem {
  cpu::RowSource embeddings;  // [batch, d] with the selected columns
  int64_t batch;
  cpu::RowSource prototypes;   // [C, d] with the selected columns
  const int64_t* class_index;  // [sampled] ascending class ids, or nullptr: class j is row j
  int64_t sampled;             // |S|
  const int64_t* slot;         // [batch] position of the label in class_index, kIgnoredSlot: the
                               // row does not count, kElsewhereSlot: its target is not here
  double scale;
  double filter;          // +inf: none
  int64_t total_sampled;  // at least |S| of all shards together: fixes the constant exponent
  cpu::Rounding rounding;
  int64_t kept_panels;  // class panels whose cosines are kept for backward, see kept_panels()
};

// The packed unit prototypes: vector panels, then one inverse norm per lane.
int64_t packed_bytes(int64_t sampled, int64_t dim, int64_t bytes_per_value);

// How many class panels' cosines fit in `workspace_bytes`, and the bytes of one panel. A multiple
// of four, or all of them: what the widest kernels work on together.
int64_t kept_panel_bytes(int64_t batch, int64_t real_bytes);
int64_t kept_panels(int64_t sampled, int64_t batch, int64_t real_bytes, int64_t workspace_bytes);

// What a shard knows of each sample. Shards merge by adding `sum` (after bringing it to a common
// exponent, where exponents are not the constant one) and `target_cosine`.
struct ShardSums {
  double* sum;               // over this shard's other classes of exp(scale * cosine), as
  double* exponent;          //   sum * 2^exponent; -inf without classes above the constant range
  double* target_cosine;     // 0 where ignored or elsewhere
  double* largest_negative;  // cosine; -inf where there is none
  double* inverse_norm;      // of the embedding's selected part
  int64_t stride;            // between the samples of sum and target_cosine; the others are dense
  void* packed;              // packed_bytes
  void* kept;                // kept_panels * kept_panel_bytes
};

class RowUpdate;

struct BackwardArgs {
  const SampleState* state;
  const void* packed;
  const void* kept;
  const double* weight;  // [batch] upstream gradient of each sample's loss
  RowSink embeddings;    // [batch, d]
  RowSink prototypes;    // row class_index[j], or row j when compact
  bool compact;  // prototypes holds the sampled rows only, and whole: it need not be cleared
  const RowUpdate* update;  // not null: the prototypes are updated and `prototypes` is not written
};

template <class Unit>
void forward(const Problem&, const ShardSums&, const Parallel&);

// The loss of each sample and what backward needs of it, from the sums of all shards. Ignored
// samples have loss 0.
void merge(const MarginOptions&, double scale, int64_t batch, const int64_t* slot, const ShardSums&,
           double* loss, SampleState* state);

template <class Unit>
void backward(const Problem&, const BackwardArgs&, const Parallel&);

void fill_zero(void* data, int64_t bytes, const Parallel&);

}  // namespace unicom
