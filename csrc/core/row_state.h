// What a row optimizer keeps for the rows of one parameter, and is told for one step.
#pragma once

#include "row_step.h"
#include "rows.h"

namespace unicom {

struct AdamWRows {
  AdamWOptions options;
  RowArray parameter;
  RowArray first, second;  // moments: bf16, or the type of the arithmetic
  bool second_per_row;     // second is one value per row, of the type of the arithmetic
  int32_t* row_step;       // [num_rows] steps that each row has had
  double* log_decay;       // [num_rows] log of the weight decay that each row has had
  double total_log_decay;  // of a row that missed no step, this one included
  int64_t num_rows, dim;
};

// Lazy (`log_decay`): missed steps shrink the parameter and leave the buffer alone. Exact
// (`last_step`): they are replayed, as steps with a zero gradient. Neither: there is no decay.
struct SgdRows {
  SgdOptions options;
  RowArray parameter, buffer;
  double* log_decay;          // [num_rows], or nullptr
  double decay_before;        // log of the decay of a row that missed no step, before this one
  double decay_after;         //   and with it
  int32_t* last_step;         // [num_rows] the last step that each row had, or nullptr
  const Transition* history;  // [remembered] the steps before this one, oldest first
  int64_t remembered;
  int64_t now;  // this step's number
  int64_t num_rows, dim;
};

}  // namespace unicom
