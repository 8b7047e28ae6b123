// Row-sparse optimizer steps: one pass over the rows that have a gradient.
#pragma once

#include <cstdint>
#include <vector>

#include "../../core/row_step.h"
#include "../kernels/kernels.h"
#include "parallel.h"

namespace unicom {

// What an optimizer computes with for parameters of a type: float64 for float64, else float32.
cpu::DType arithmetic(cpu::DType parameter);

// Rows of a matrix that an optimizer writes: [*, dim], unit column stride.
struct RowArray {
  void* data;  // nullptr: not there
  cpu::DType dtype;
  int64_t row_stride;  // in elements

  void* row(int64_t id) const;
};

// The gradient of some rows: row j of `rows` belongs to parameter row ids[j].
struct RowGradient {
  const int64_t* ids;  // [count] strictly ascending
  int64_t count;
  RowArray rows;
  int64_t dim;
};

// An optimizer, as the rows of one parameter see it.
class RowUpdate {
 public:
  virtual ~RowUpdate() = default;
  // One step of row `id`; gradient [dim] is float, or double for double parameters. `ahead` is a
  // row that will have its step soon.
  virtual void step(int64_t id, const void* gradient, int64_t ahead) const = 0;
  // Adds the memory of a row that will have its step later.
  virtual void add_spans(int64_t id, std::vector<cpu::Span>* spans) const = 0;
};

class RowAdamW final : public RowUpdate {
 public:
  AdamWOptions options;
  RowArray parameter;
  RowArray first, second;      // moments: bf16, or the type of the arithmetic
  bool second_per_row;         // second is one value per row, in the type of the arithmetic
  int32_t* row_step;           // [C] steps each row has had
  double* log_decay;           // [C] log of the weight decay each row has had; nullptr for none
  double total_log_decay = 0;  // of a row that missed no step, this one included
  int64_t dim;

  void step(int64_t id, const void* gradient, int64_t ahead) const override;
  void add_spans(int64_t id, std::vector<cpu::Span>* spans) const override;
};

// Lazy (`log_decay`): missed steps shrink the parameter and leave the buffer alone. Exact
// (`last_step`): they are replayed, as steps with a zero gradient.
class RowSgd final : public RowUpdate {
 public:
  SgdOptions options;
  RowArray parameter, buffer;
  double* log_decay = nullptr;   // [C]
  double decay_before = 0;       // log of the decay of a row that missed no step, before this one
  double decay_after = 0;        //   and with it
  int32_t* last_step = nullptr;  // [C] the last step that each row had, replays included
  const Transition* missed = nullptr;  // what missing 0, 1, ... steps comes to
  int64_t now = 0;                     // this step's number
  int64_t dim;

  void step(int64_t id, const void* gradient, int64_t ahead) const override;
  void add_spans(int64_t id, std::vector<cpu::Span>* spans) const override;
};

constexpr int64_t kRowsAhead = 2;

void update_rows(const RowUpdate&, const RowGradient&, const Parallel&);

// The transitions that missing 0, 1, ... of the last steps comes to, given the steps oldest first.
std::vector<Transition> missed_transitions(const Transition* steps, int64_t count);

bool strictly_ascending(const int64_t* ids, int64_t count);

// A gradient whose ids come in any order and repeat, as the distinct ids, ascending, with the sum
// of each one's rows in the order in which they came.
class MergedRows {
 public:
  MergedRows(const int64_t* ids, int64_t count);
  int64_t count() const { return static_cast<int64_t>(begin_.size()) - 1; }
  // ids [count()] and rows [count(), dim] of the dtype of `from`.
  void write(const RowGradient& from, int64_t* ids, const RowArray& rows, const Parallel&) const;

 private:
  std::vector<int64_t> order_;  // entries by id
  std::vector<int64_t> begin_;  // where in order_ each distinct id begins, and the end
};

}  // namespace unicom
