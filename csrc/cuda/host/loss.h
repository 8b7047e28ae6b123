// The loss on GPUs: the same steps in the same order as on CPUs, launched on a queue. Nothing waits
// for the device: counts stay there, arrays have the size of their bound, kernels stop at the
// count. Memory is the caller's: ask for the bytes of a workspace, then hand one in.
#pragma once

#include <functional>

#include "../kernels/samples.h"

namespace unicom::cuda {

// Bytes of what forward saves. No cosines of sixteen-bit operands are kept, which are multiplied
// again sooner than fp32 cosines are read; but where they are narrow and the embeddings' gradient is
// wanted there is room for the negatives' part of it (attention.h), whatever the device: tensors
// have the same size everywhere.
int64_t packed_bytes(const Problem&);
int64_t kept_bytes(const Problem&);

int64_t most_centers(const Problem&);

int64_t forward_workspace(Queue&, const Problem&);
void forward(Queue&, const Problem&, const ShardSums&, const Saved&, void* workspace);

// join_targets is a kernel of samples.h.
void write_results(Queue&, const WriteResults&, bool is_double);

// Some rows of the prototypes' gradient, and what takes them instead of storing them.
struct GradientRows {
  const void*
      rows;  // [count][d], of the prototypes' type, for those from `first` on, class by class
  int64_t first, count;
  const double* upstream;  // see SparseRows
};
using TakeRows = std::function<void(Queue&, const GradientRows&)>;

// How many prototypes' gradients are there at a time, at most.
int64_t backward_chunk(Queue&, const Problem&, const Gradients&);

// take, unless it is null, takes the prototypes' gradient, in pieces, in their order. It may change
// the prototypes of those classes. Unless the upstream gradient is 1, the gradient of the
// embeddings becomes NaN, and take's rows mean nothing.
int64_t backward_workspace(Queue&, const Problem&, const Gradients&, const TakeRows* take);
void backward(Queue&, const Problem&, const Gradients&, const TakeRows* take, void* workspace);

}  // namespace unicom::cuda
