// Row-sparse optimizer steps, and what makes any sparse gradient one that they take.
#pragma once

#include "../../core/row_state.h"
#include "types.h"

namespace unicom::cuda {

// Entry j is the gradient of row ids[first + j]. Equal ids lie beside each other, and only the
// first of them counts: the others' rows are not read. Ids that are no rows are passed over.
struct SparseRows {
  const int64_t* ids;  // [first + count], or of classes of several centres; nullptr: row j has id j
  const void* rows;    // [count][dim], of the parameter's type
  int64_t count;
  int64_t first = 0;                 // entries before these, of which other calls take care
  int64_t centers = 1;               // entry j is centre j % centers of class ids[j / centers]
  const double* upstream = nullptr;  // [1] on the device: unless it is 1, no row is updated
};

// One workspace, for the largest count, serves all parts of one gradient.
int64_t update_workspace(const AdamWRows&, int64_t count);
int64_t update_workspace(const SgdRows&, int64_t count);
void update_rows(Queue&, const AdamWRows&, const SparseRows&, void* workspace);
void update_rows(Queue&, const SgdRows&, const SparseRows&, void* workspace);

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
