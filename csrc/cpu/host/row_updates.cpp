#include "row_updates.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "../kernels/row_steps.h"
#include "buffers.h"

namespace unicom {

namespace {

constexpr int64_t kRowsPerItem = 64;

cpu::Span span_of(const RowArray& array, int64_t id, int64_t dim) {
  return {array.row(id), dim * cpu::bytes_of(array.dtype)};
}

}  // namespace

cpu::DType arithmetic(cpu::DType parameter) {
  return parameter == cpu::DType::kFloat64 ? cpu::DType::kFloat64 : cpu::DType::kFloat32;
}

void* RowArray::row(int64_t id) const {
  return static_cast<char*>(data) + id * row_stride * cpu::bytes_of(dtype);
}

void RowAdamW::step(int64_t id, const void* gradient, int64_t ahead) const {
  const int64_t count = ++row_step[id];
  double decay = 1;
  if (log_decay != nullptr) {
    decay = std::exp(total_log_decay - log_decay[id]);
    log_decay[id] = total_log_decay;
  }
  cpu::update_kernels().adamw({gradient,
                               parameter.row(id),
                               first.row(id),
                               second.row(id),
                               {parameter.row(ahead), first.row(ahead), second.row(ahead)},
                               parameter.dtype,
                               first.dtype == cpu::DType::kBFloat16,
                               second_per_row,
                               dim,
                               rounding_key(id, count),
                               adamw_step<double>(options, count, decay)});
}

void RowAdamW::add_spans(int64_t id, std::vector<cpu::Span>* spans) const {
  spans->push_back(span_of(parameter, id, dim));
  spans->push_back(span_of(first, id, dim));
  spans->push_back(span_of(second, id, second_per_row ? 1 : dim));
}

void RowSgd::step(int64_t id, const void* gradient, int64_t ahead) const {
  Transition before = Transition::identity();
  if (last_step != nullptr) {
    before = missed[now - 1 - last_step[id]];
    last_step[id] = static_cast<int32_t>(now);
  } else if (log_decay != nullptr) {
    before.pp = std::exp(decay_before - log_decay[id]);
    log_decay[id] = decay_after;
  }
  const RowArray& other = buffer.data != nullptr ? buffer : parameter;
  cpu::update_kernels().sgd({gradient,
                             parameter.row(id),
                             buffer.data != nullptr ? buffer.row(id) : nullptr,
                             {parameter.row(ahead), other.row(ahead)},
                             parameter.dtype,
                             dim,
                             sgd_step<double>(options, before)});
}

void RowSgd::add_spans(int64_t id, std::vector<cpu::Span>* spans) const {
  spans->push_back(span_of(parameter, id, dim));
  if (buffer.data != nullptr) spans->push_back(span_of(buffer, id, dim));
}

void update_rows(const RowUpdate& update, const RowGradient& gradient, const Parallel& parallel) {
  const bool plain = gradient.rows.dtype == arithmetic(gradient.rows.dtype);
  const int64_t items = (gradient.count + kRowsPerItem - 1) / kRowsPerItem;
  parallel.run(items, [&](int64_t item) {
    Buffer<double> scratch(plain ? 0 : gradient.dim);  // also wide enough for floats
    const int64_t end = std::min(gradient.count, (item + 1) * kRowsPerItem);
    for (int64_t j = item * kRowsPerItem; j < end; ++j) {
      const void* row = gradient.rows.row(j);
      if (!plain) {
        cpu::update_kernels().add_row(row, gradient.rows.dtype, gradient.dim, true, scratch.get());
        row = scratch.get();
      }
      update.step(gradient.ids[j], row, gradient.ids[std::min(j + kRowsAhead, gradient.count - 1)]);
    }
  });
}

std::vector<Transition> missed_transitions(const Transition* steps, int64_t count) {
  std::vector<Transition> missed{Transition::identity()};
  missed.reserve(static_cast<size_t>(count) + 1);
  for (int64_t i = count - 1; i >= 0; --i) missed.push_back(then(steps[i], missed.back()));
  return missed;
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
  const cpu::DType dtype = from.rows.dtype;
  parallel.run((count() + kRowsPerItem - 1) / kRowsPerItem, [&](int64_t item) {
    Buffer<double> sum(from.dim);
    const int64_t end = std::min(count(), (item + 1) * kRowsPerItem);
    for (int64_t j = item * kRowsPerItem; j < end; ++j) {
      const auto first = static_cast<size_t>(begin_[static_cast<size_t>(j)]);
      const auto last = static_cast<size_t>(begin_[static_cast<size_t>(j) + 1]);
      ids[j] = from.ids[order_[first]];
      if (last == first + 1) {
        std::memcpy(rows.row(j), from.rows.row(order_[first]),
                    static_cast<size_t>(from.dim * cpu::bytes_of(dtype)));
        continue;
      }
      for (size_t i = first; i < last; ++i)
        cpu::update_kernels().add_row(from.rows.row(order_[i]), dtype, from.dim, i == first,
                                      sum.get());
      cpu::update_kernels().put_row(sum.get(), dtype, from.dim, rows.row(j));
    }
  });
}

}  // namespace unicom
