// The loss on CPUs: the order of the steps, their workspaces and chunk sizes, forward and backward.
// Knows no torch: the bindings hand it plain pointers and a way to run loops on threads.
#pragma once

#include <cstdint>

#include "../../core/problem.h"
#include "parallel.h"

namespace unicom::cpu {

class RowUpdate;

// Bytes of what forward saves. They follow from the bound of the selection, not from its count.
int64_t packed_bytes(const Problem&);
int64_t kept_bytes(const Problem&);

void forward(const Problem&, const ShardSums&, const Saved&, const Parallel&);
void join_targets(const JoinTargets&);
void write_results(const WriteResults&, bool is_double);

// With `update` the prototypes are updated, row by row as their gradients are complete.
void backward(const Problem&, const Gradients&, const RowUpdate* update, const Parallel&);

}  // namespace unicom::cpu
