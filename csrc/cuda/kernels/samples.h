// The steps that work on samples: sums join with targets, losses become weights of gradients.
#pragma once

#include "../../core/problem.h"
#include "logits.h"

namespace unicom::cuda {

// What a shard knows of each sample. The positives' cosines are taken in double from the rows as they
// were given.
struct FinishSums {
  RowSource embeddings, prototypes;
  const int64_t* class_index;  // nullptr: all
  int64_t centers;
  Positives positives;
  int64_t batch, rows;
  const void* partial;  // [runs][rows] RowSum<Real>
  int64_t runs;
  double scale;
  double total_sampled;              // of all shards: fixes the constant exponent
  const double* row_inverse_norm;    // [rows]
  const double* class_inverse_norm;  // [bound * centers]
  const double* class_sum;           // of the unit prototypes; nullptr without label smoothing
  const int64_t* count;              // of classes; nullptr: bound
  int64_t bound;
  ShardSums out;
};
template <class Real>
void finish_sums(Queue&, const FinishSums&);

// The sums of prototypes that AttendClasses made, of all runs, to the largest of their exponents.
struct MergeAttended {
  int64_t rows, depth, runs;
  const void* sums;       // [runs][rows] RowSum<float>
  const float* attended;  // [runs][rows][depth]
  float* out;             // [rows][depth]
  float* exponent;        // [rows]
};
void merge_attended(Queue&, const MergeAttended&);

// A sample with a label that is no class has loss NaN and no gradient.
void join_targets(Queue&, const JoinTargets&);

template <class Real>
void write_results(Queue&, const WriteResults&);

// The weights of each sample in backward.
struct PrepareBackward {
  int64_t batch, rows;
  Positives positives;
  States states;
  const void* grad_loss;  // Real [batch], or [1] for a reduced loss
  Reduction reduction;
  double scale;
  double* target_weight;    // [batch][width] upstream gradient * scale * pull * psi'
  double* negative_weight;  // [rows] upstream gradient * scale * push
  double reach;             // of what can hold the weights
  double* folded;           // [rows] negative_weight / fold, at most reach in size
  double* fold;             // [1]
  double* smooth_weight;    // nullptr, or [rows] upstream gradient * scale * smooth
  void* row;                // [rows] RowScale<Real>;
  bool folds;               //   times folded, as AttendSamples wants it
  double* upstream;  // nullptr, or [1]: receives the gradient of the reduced loss; unless it is 1,
                     // all weights become NaN
};
template <class Real>
void prepare_backward(Queue&, const PrepareBackward&);

// What label smoothing takes from the gradient of each unit prototype: the unit embeddings, each by
// its smooth_weight.
struct SumSmoothed {
  RowSource embeddings;
  int64_t batch, depth;
  const double *row_inverse_norm, *smooth_weight;  // [batch]
  double* out;                                     // [depth]
};
void sum_smoothed(Queue&, const SumSmoothed&);

// Which prototype each positive is drawn to, of a class of several centres: in double from the rows
// as they were given, as FinishSums finds it.
struct FindCenters {
  RowSource embeddings, prototypes;
  const int64_t* class_index;  // nullptr: all
  int64_t centers;
  Positives positives;
  int64_t batch;
  const double *row_inverse_norm, *class_inverse_norm;
  int64_t* prototype;  // [batch][width] slot * centers + centre; negative slots as they are
};
void find_centers(Queue&, const FindCenters&);

// Positives by prototype, those of one in the order of the batch: the order of their sum.
struct OrderPositives {
  const int64_t* slots;  // [count] slots, or what find_centers made of them
  int64_t count;
  int64_t* by_slot;  // [count]
};
void order_positives(Queue&, const OrderPositives&);

}  // namespace unicom::cuda
