#include "row_updates.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "../kernels/row_steps.h"
#include "buffers.h"

namespace unicom::cpu {

namespace {

constexpr int64_t kRowsPerItem = 64;

void* row_at(const RowArray& array, int64_t id) {
  return static_cast<char*>(array.data) + id * array.row_stride * bytes_of(array.dtype);
}

Span span_of(const RowArray& array, int64_t id, int64_t dim) {
  return {row_at(array, id), dim * bytes_of(array.dtype)};
}

// Steps that a row missed.
int64_t missed_by(const SgdRows& rows, int64_t id) { return rows.now - 1 - rows.last_step[id]; }

// The transitions that missing 0, 1, ... of the last steps comes to, given the steps oldest first.
std::vector<Transition> missed_transitions(const Transition* steps, int64_t count) {
  std::vector<Transition> missed{Transition::identity()};
  missed.reserve(static_cast<size_t>(count) + 1);
  for (int64_t i = count - 1; i >= 0; --i) missed.push_back(then(steps[i], missed.back()));
  return missed;
}

}  // namespace

DType arithmetic(DType parameter) {
  return parameter == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

void RowAdamW::step(int64_t id, const void* gradient, int64_t ahead) const {
  const int64_t count = ++a_.row_step[id];
  const double decay = std::exp(a_.total_log_decay - a_.log_decay[id]);
  a_.log_decay[id] = a_.total_log_decay;
  update_kernels().adamw(
      {.gradient = gradient,
       .parameter = row_at(a_.parameter, id),
       .first = row_at(a_.first, id),
       .second = row_at(a_.second, id),
       .ahead = {row_at(a_.parameter, ahead), row_at(a_.first, ahead), row_at(a_.second, ahead)},
       .parameter_dtype = a_.parameter.dtype,
       .bf16_moments = a_.first.dtype == DType::kBFloat16,
       .second_per_row = a_.second_per_row,
       .dim = a_.dim,
       .rounding_key = rounding_key(id, count),
       .step = adamw_step<double>(a_.options, count, decay)});
}

void RowAdamW::add_spans(int64_t id, std::vector<Span>* spans) const {
  spans->push_back(span_of(a_.parameter, id, a_.dim));
  spans->push_back(span_of(a_.first, id, a_.dim));
  spans->push_back(span_of(a_.second, id, a_.second_per_row ? 1 : a_.dim));
}

int64_t find_bad_step(const SgdRows& rows, const int64_t* ids, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    const int64_t id = ids != nullptr ? ids[j] : j, missed = missed_by(rows, id);
    if (missed < 0 || missed > rows.remembered) return id;
  }
  return -1;
}

RowSgd::RowSgd(const SgdRows& rows, const int64_t* ids, int64_t count) : a_(rows) {
  if (a_.last_step == nullptr) return;
  int64_t most = 0;
  for (int64_t j = 0; j < count; ++j)
    most = std::max(most, missed_by(a_, ids != nullptr ? ids[j] : j));
  missed_ = missed_transitions(a_.history + a_.remembered - most, most);
}

void RowSgd::step(int64_t id, const void* gradient, int64_t ahead) const {
  Transition before = Transition::identity();
  if (a_.last_step != nullptr) {
    before = missed_[static_cast<size_t>(missed_by(a_, id))];
    a_.last_step[id] = static_cast<int32_t>(a_.now);
  } else if (a_.log_decay != nullptr) {
    before.pp = std::exp(a_.decay_before - a_.log_decay[id]);
    a_.log_decay[id] = a_.decay_after;
  }
  const bool with_buffer = a_.buffer.data != nullptr;
  const RowArray& other = with_buffer ? a_.buffer : a_.parameter;
  update_kernels().sgd({.gradient = gradient,
                        .parameter = row_at(a_.parameter, id),
                        .buffer = with_buffer ? row_at(a_.buffer, id) : nullptr,
                        .ahead = {row_at(a_.parameter, ahead), row_at(other, ahead)},
                        .parameter_dtype = a_.parameter.dtype,
                        .dim = a_.dim,
                        .step = sgd_step<double>(a_.options, before)});
}

void RowSgd::add_spans(int64_t id, std::vector<Span>* spans) const {
  spans->push_back(span_of(a_.parameter, id, a_.dim));
  if (a_.buffer.data != nullptr) spans->push_back(span_of(a_.buffer, id, a_.dim));
}

void update_rows(const RowUpdate& update, const RowGradient& gradient, const Parallel& parallel) {
  const bool plain = gradient.rows.dtype == arithmetic(gradient.rows.dtype);
  const int64_t items = (gradient.count + kRowsPerItem - 1) / kRowsPerItem;
  parallel.run(items, [&](int64_t item) {
    Buffer<double> scratch(plain ? 0 : gradient.dim);  // also wide enough for floats
    const int64_t end = std::min(gradient.count, (item + 1) * kRowsPerItem);
    for (int64_t j = item * kRowsPerItem; j < end; ++j) {
      const void* row = row_at(gradient.rows, j);
      if (!plain) {
        update_kernels().add_row(row, gradient.rows.dtype, gradient.dim, true, scratch.get());
        row = scratch.get();
      }
      update.step(gradient.ids[j], row, gradient.ids[std::min(j + kRowsAhead, gradient.count - 1)]);
    }
  });
}

bool strictly_ascending(const int64_t* ids, int64_t count) {
  for (int64_t j = 1; j < count; ++j)
    if (ids[j - 1] >= ids[j]) return false;
  return true;
}

MergedRows::MergedRows(const int64_t* ids, int64_t count) : order_(static_cast<size_t>(count)) {
  std::iota(order_.begin(), order_.end(), int64_t{0});
  std::stable_sort(order_.begin(), order_.end(),
                   [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
  for (int64_t j = 0; j < count; ++j)
    if (j == 0 || ids[order_[j]] != ids[order_[j - 1]]) begin_.push_back(j);
  begin_.push_back(count);
}

void MergedRows::write(const RowGradient& from, int64_t* ids, const RowArray& rows,
                       const Parallel& parallel) const {
  const DType dtype = from.rows.dtype;
  parallel.run((count() + kRowsPerItem - 1) / kRowsPerItem, [&](int64_t item) {
    Buffer<double> sum(from.dim);
    const int64_t end = std::min(count(), (item + 1) * kRowsPerItem);
    for (int64_t j = item * kRowsPerItem; j < end; ++j) {
      const auto first = static_cast<size_t>(begin_[static_cast<size_t>(j)]);
      const auto last = static_cast<size_t>(begin_[static_cast<size_t>(j) + 1]);
      ids[j] = from.ids[order_[first]];
      if (last == first + 1) {
        std::memcpy(row_at(rows, j), row_at(from.rows, order_[first]),
                    static_cast<size_t>(from.dim * bytes_of(dtype)));
        continue;
      }
      for (size_t i = first; i < last; ++i)
        update_kernels().add_row(row_at(from.rows, order_[i]), dtype, from.dim, i == first,
                                 sum.get());
      update_kernels().put_row(sum.get(), dtype, from.dim, row_at(rows, j));
    }
  });
}

}  // namespace unicom::cpu
