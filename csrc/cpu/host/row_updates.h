// Row-sparse optimizer steps: one pass over the rows that have a gradient.
#pragma once

#include <cstdint>
#include <vector>

#include "../../core/row_state.h"
#include "../kernels/kernels.h"
#include "parallel.h"

namespace unicom::cpu {

// What an optimizer computes with for parameters of a type: float64 for float64, else float32.
DType arithmetic(DType parameter);

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
  virtual void add_spans(int64_t id, std::vector<Span>* spans) const = 0;
};

class RowAdamW final : public RowUpdate {
 public:
  explicit RowAdamW(const AdamWRows& rows) : a_(rows) {}
  void step(int64_t id, const void* gradient, int64_t ahead) const override;
  void add_spans(int64_t id, std::vector<Span>* spans) const override;

 private:
  const AdamWRows a_;
};

class RowSgd final : public RowUpdate {
 public:
  // For the rows ids [count], or the first `count` rows where ids is null.
  RowSgd(const SgdRows& rows, const int64_t* ids, int64_t count);
  void step(int64_t id, const void* gradient, int64_t ahead) const override;
  void add_spans(int64_t id, std::vector<Span>* spans) const override;

 private:
  const SgdRows a_;
  std::vector<Transition> missed_;  // what missing 0, 1, ... steps comes to
};

// The first of these rows whose missed steps the history does not hold; -1 if there is none.
int64_t find_bad_step(const SgdRows& rows, const int64_t* ids, int64_t count);

constexpr int64_t kRowsAhead = 2;

void update_rows(const RowUpdate&, const RowGradient&, const Parallel&);

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

}  // namespace unicom::cpu
