// The steps that work on samples: sums join with targets, losses become weights of gradients.
#pragma once

#include "../../core/rows.h"
#include "../../core/target.h"
#include "logits.h"

namespace unicom::cuda {

// What a shard knows of each sample (the fields of ShardSums). The target's cosine is
// taken in double from the rows as they were given.
struct FinishSums {
  RowSource embeddings, prototypes;
  const int64_t* class_index;  // nullptr: class j is row j
  const int64_t* slot;
  int64_t batch, rows;
  const void* partial;  // [runs][rows] RowSum<Real>
  int64_t runs;
  double scale;
  double total_sampled;              // of all shards: fixes the constant exponent
  const double* row_inverse_norm;    // [rows]
  const double* class_inverse_norm;  // [bound]
  double *sum, *target_cosine;       // [batch], with a stride
  int64_t stride;
  double *exponent, *largest_negative, *inverse_norm;  // [batch]
};
template <class Real>
void finish_sums(Queue&, const FinishSums&);

// The loss of each sample and what backward needs of it. A sample whose label is no class has loss
// NaN and no gradient.
struct JoinTargets {
  MarginOptions margin;
  double scale;
  int64_t batch;
  const int64_t* slot;
  const double *sum, *target_cosine;
  int64_t stride;
  const double *exponent, *inverse_norm;
  double* loss;
  SampleState* state;
};
void join_targets(Queue&, const JoinTargets&);

// Results in the type that the caller sees; the mean is over the samples that are not ignored.
struct WriteResults {
  int64_t batch;
  const int64_t* slot;
  const double *sample_loss, *target_cosine, *largest_negative;
  Reduction reduction;
  void *loss, *sample_loss_out, *target_cosine_out, *largest_negative_out;  // Real
};
template <class Real>
void write_results(Queue&, const WriteResults&);

// The weights of each sample in backward.
struct PrepareBackward {
  int64_t batch, rows;
  const int64_t* slot;
  const SampleState* state;
  const void* grad_loss;  // Real [batch], or [1] for a reduced loss
  Reduction reduction;
  double scale;
  double* target_weight;    // [rows] upstream gradient * scale * (1 - p) * psi', of the target
  double* negative_weight;  // [rows] upstream gradient * scale * (1 - p)
  double* folded;           // [rows] negative_weight / largest: what the operands can hold
  double* largest;          // [1] absolute value of negative_weight
  void* row;                // [rows] RowScale<Real>
  double* upstream;  // nullptr, or [1]: receives the gradient of the reduced loss; unless it is 1,
                     // all weights become NaN
};
template <class Real>
void prepare_backward(Queue&, const PrepareBackward&);

// Samples by slot, those of one class in the order of the batch: the order of their sum.
struct OrderSamples {
  int64_t batch;
  const int64_t* slot;
  int64_t* by_slot;  // [batch]
};
void order_samples(Queue&, const OrderSamples&);

}  // namespace unicom::cuda
