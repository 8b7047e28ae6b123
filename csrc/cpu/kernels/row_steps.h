// One optimizer step of one row, one table of functions per instruction set. The arithmetic is
// core/row_step.h; here it meets vectors and the types that parameters and moments are kept in.
#pragma once

#include "../../core/row_step.h"
#include "layout.h"

namespace unicom::cpu {

// Arithmetic is in double for double parameters and in float for all others: `Real` below. `ahead`
// is a row that will be wanted soon: its lines are asked for one by one, on the way, as many
// requests at once would wait for one another.
struct AdamWRow {
  const void* gradient;    // [dim] Real
  void* parameter;         // [dim]
  void* first;             // [dim] moments: Real, or bf16
  void* second;            // [dim] the same, or one Real
  const void* ahead[3];    // parameter, first, second
  DType parameter_dtype;   //
  bool bf16_moments;       //
  bool second_per_row;     //
  int64_t dim;             //
  uint32_t rounding_key;   // for bf16 moments
  AdamWStep<double> step;  //
};

struct SgdRow {
  const void* gradient;  // [dim] Real
  void* parameter;       // [dim]
  void* buffer;          // [dim] Real, or nullptr without momentum
  const void* ahead[2];  // parameter, buffer
  DType parameter_dtype;
  int64_t dim;
  SgdStep<double> step;
};

struct UpdateKernels {
  void (*adamw)(const AdamWRow&);
  void (*sgd)(const SgdRow&);
  // sum[k] += values[k] in Real; with `first`, sum[k] = values[k].
  void (*add_row)(const void* values, DType, int64_t dim, bool first, void* sum);
  // out[k] = sum[k], rounded.
  void (*put_row)(const void* sum, DType, int64_t dim, void* out);
};

// Of the instruction set in use, see kernels.h.
const UpdateKernels& update_kernels();

}  // namespace unicom::cpu
