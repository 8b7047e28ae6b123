// Row-sparse optimizer steps, and what makes any sparse gradient one that they take.
#pragma once

#include "../../core/row_step.h"
#include "../../core/rows.h"
#include "types.h"

namespace unicom::cuda {

// Rows of a matrix that is updated: [*, dim], unit column stride.
struct Rows {
  void* data;  // nullptr: not there
  DType dtype;
  int64_t stride;  // in elements
};

// Entry j is the gradient of row ids[first + j]. Equal ids lie beside each other, and only the
// first of them counts: the others' rows are not read. Ids outside [0, num_rows) are passed over.
struct SparseRows {
  const int64_t* ids;  // [first + count]; nullptr: row j has id j
  const void* rows;    // [count][dim], of the parameter's type
  int64_t count, dim, num_rows;
  int64_t first = 0;                 // entries before these, of which other calls take care
  const double* upstream = nullptr;  // [1] on the device: unless it is 1, no row is updated
};

struct AdamWUpdate {
  SparseRows gradient;
  AdamWOptions options;
  Rows parameter;
  Rows first, second;      // moments: bf16, or the type of the arithmetic
  bool second_per_row;     // second is one value per row, of the type of the arithmetic
  int32_t* row_step;       // [num_rows] steps that each row has had
  double* log_decay;       // [num_rows] log of the weight decay that each row has had
  double total_log_decay;  // of a row that missed no step, this one included
  void* workspace;         // adamw_workspace bytes
};
int64_t adamw_workspace(int64_t count, DType parameter);
void update_rows(Queue&, const AdamWUpdate&);

// As unicom::RowSgd: lazy with log_decay, exact with last_step.
struct SgdUpdate {
  SparseRows gradient;
  SgdOptions options;
  Rows parameter, buffer;
  double* log_decay;  // [num_rows], or nullptr
  double decay_before, decay_after;
  int32_t* last_step;       // [num_rows] the last step that each row had, or nullptr
  const Transition* steps;  // [remembered] the steps before this one, oldest first
  int64_t remembered;
  int64_t now;      // this step's number
  void* workspace;  // sgd_workspace bytes; the same for all parts of one gradient
};
int64_t sgd_workspace(int64_t count, int64_t remembered, DType parameter);
void update_rows(Queue&, const SgdUpdate&);

// A gradient in any order, of which repeated ids add up, becomes one as above: give it keys, sort
// them stably, and add up the rows of equal ones, in the order in which they came.
struct Merge {
  const int64_t* ids;  // [count]
  const void* rows;    // [count][dim]
  DType dtype;
  int64_t count, dim;
  int64_t* keys;         // [count] receives ids; behind all of them where there is nothing to add
  const int64_t* order;  // [count] where the sorted keys were
  int64_t* merged_ids;   // [count], ascending
  void* merged_rows;     // [count][dim]
};
void give_keys(Queue&, const Merge&);
void add_equal(Queue&, const Merge&);

}  // namespace unicom::cuda
