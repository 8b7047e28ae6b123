// The algorithm on GPUs: the same steps in the same order as on CPUs, launched on a queue. Nothing
// waits for the device: counts stay there, arrays have the size of their bound, kernels stop at
// the count. Memory is the caller's: ask for the bytes of a workspace, then hand one in.
#pragma once

#include <functional>

#include "../kernels/samples.h"

namespace unicom::cuda {

// One call of the operation on one shard of the classes; every pointer is the device's.
struct Problem {
  RowSource embeddings;  // [batch, d] with the selected columns
  int64_t batch;
  RowSource prototypes;        // [C, d] with the selected columns
  const int64_t* class_index;  // [bound] ascending class ids, or nullptr: class j is row j
  const int64_t* count;        // [1] how many of them are valid, or nullptr: all
  int64_t bound;
  const int64_t* slot;  // [batch] position of the label in class_index, or a special slot
  double scale;
  double filter;          // +inf: none
  int64_t total_sampled;  // at least |S| of all shards together: fixes the constant exponent
  int64_t kept_classes;   // how many classes' cosines are kept for backward, see kept_classes()
};

// What a shard knows of each sample, see FinishSums.
struct ShardSums {
  double *sum, *target_cosine;  // [batch], with a stride
  int64_t stride;
  double *exponent, *largest_negative, *inverse_norm;  // [batch]
  void* packed;                                        // [packed_bytes]
  void* kept;                                          // [kept_bytes]
};

// Some rows of the prototypes' gradient, and what takes them instead of storing them.
struct GradientRows {
  const void* rows;  // [count][d], of the prototypes' type, for classes [first, first + count)
  int64_t first, count;
  const double* upstream;  // see SparseRows
};
using TakeRows = std::function<void(Queue&, const GradientRows&)>;

struct Gradients {
  const void* grad_loss;  // as the loss: RealOf<Unit>
  Reduction reduction;
  const SampleState* state;
  const void *packed, *kept;
  RowSink embeddings;  // [batch, d]; rows of samples that do not count are left alone
  RowSink prototypes;  // row class_index[j], or row j when compact
  bool compact;
  const TakeRows* take;  // not null: takes the prototypes' gradient, in pieces, in their order. It
                         // may change the prototypes of those classes. Unless the upstream
                         // gradient is 1, embeddings become NaN, and take's rows mean nothing
  int64_t dim;           // d
};

// The packed unit prototypes and their inverse norms, for backward.
int64_t packed_bytes(int64_t bound, int64_t dim, int64_t bytes_per_value);

// The cosines of how many classes fit in `workspace_bytes`, and the bytes that they take. None for
// sixteen-bit operands, which are multiplied again sooner than fp32 cosines are read.
template <class Unit>
int64_t kept_classes(int64_t bound, int64_t batch, int64_t workspace_bytes);
template <class Unit>
int64_t kept_bytes(int64_t classes, int64_t batch);

template <class Unit>
int64_t forward_workspace(const Problem&);
template <class Unit>
void forward(Queue&, const Problem&, const ShardSums&, void* workspace);

// How many classes' gradients are there at a time.
template <class Unit>
int64_t backward_chunk(const Problem&);
template <class Unit>
int64_t backward_workspace(const Problem&, const Gradients&);
template <class Unit>
void backward(Queue&, const Problem&, const Gradients&, void* workspace);

}  // namespace unicom::cuda
