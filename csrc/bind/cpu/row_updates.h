// Row optimizers from their state tensors, checked.
#pragma once

#include <vector>

#include "../../cpu/host/row_updates.h"
#include "../ops/tensors.h"

namespace unicom {

inline RowArray row_array(const Tensor& t, const char* name, const Tensor& like) {
  check(t.dim() == 2 && t.size(0) == like.size(0) && t.size(1) == like.size(1), name, " must be [",
        like.size(0), ", ", like.size(1), "] like the parameter");
  check(t.size(1) <= 1 || t.stride(1) == 1, name, " must have contiguous rows");
  return {t.mutable_data_ptr(), dtype_of(t, name), t.stride(0)};
}

template <class T>
T* row_vector(const std::optional<Tensor>& t, const char* name, const Tensor& like,
              ScalarType dtype) {
  if (!t) return nullptr;
  check_vector(*t, name, like.size(0), dtype);
  check(t->is_contiguous(), name, " must be contiguous");
  return t->mutable_data_ptr<T>();
}

inline ScalarType arithmetic(const Tensor& param) {
  return param.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline RowAdamW row_adamw(const Tensor& param, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                          const Tensor& row_step, const Tensor& log_decay, double total_log_decay,
                          const AdamWOptions& options) {
  check_matrix(param, "param");
  RowAdamW update;
  update.options = options;
  update.dim = param.size(1);
  update.parameter = row_array(param, "param", param);
  update.first = row_array(exp_avg, "exp_avg", param);
  const ScalarType real = arithmetic(param);
  check(exp_avg.scalar_type() == real ||
            (exp_avg.scalar_type() == ScalarType::BFloat16 && real == ScalarType::Float),
        "exp_avg must be ", torch::headeronly::toString(real), " or, for ",
        torch::headeronly::toString(ScalarType::Float), ", bfloat16");
  update.second_per_row = exp_avg_sq.dim() == 1;
  if (update.second_per_row) {
    check_vector(exp_avg_sq, "exp_avg_sq", param.size(0), real);
    update.second = {exp_avg_sq.mutable_data_ptr(), dtype_of(exp_avg_sq, "exp_avg_sq"),
                     exp_avg_sq.stride(0)};
  } else {
    update.second = row_array(exp_avg_sq, "exp_avg_sq", param);
    check(exp_avg_sq.scalar_type() == exp_avg.scalar_type(),
          "exp_avg_sq must be of the dtype of exp_avg");
  }
  update.row_step = row_vector<int32_t>(row_step, "row_step", param, ScalarType::Int);
  update.log_decay = row_vector<double>(log_decay, "log_decay", param, ScalarType::Double);
  update.total_log_decay = total_log_decay;
  return update;
}

inline RowSgd row_sgd(const Tensor& param, const std::optional<Tensor>& momentum_buffer,
                      const std::optional<Tensor>& log_decay, double decay_before,
                      double decay_after, const SgdOptions& options) {
  check_matrix(param, "param");
  RowSgd update;
  update.options = options;
  update.dim = param.size(1);
  update.parameter = row_array(param, "param", param);
  update.buffer = {nullptr, update.parameter.dtype, 0};
  if (momentum_buffer) {
    update.buffer = row_array(*momentum_buffer, "momentum_buffer", param);
    check(momentum_buffer->scalar_type() == arithmetic(param), "momentum_buffer must be ",
          torch::headeronly::toString(arithmetic(param)));
  }
  update.log_decay = row_vector<double>(log_decay, "log_decay", param, ScalarType::Double);
  update.decay_before = decay_before;
  update.decay_after = decay_after;
  return update;
}

// Makes `update` replay the steps that rows `ids` missed (ids null: all rows); keep the result
// while it is used. history [steps, 4] float64 are the last steps before number `step`.
inline std::vector<Transition> replay(const Tensor& param, const std::optional<Tensor>& last_step,
                                      const std::optional<Tensor>& history, int64_t step,
                                      const int64_t* ids, int64_t count, RowSgd* update) {
  static_assert(sizeof(Transition) == 4 * sizeof(double));
  if (!last_step) return {};
  check(history && history->dim() == 2 && history->size(1) == 4 && history->is_contiguous() &&
            history->scalar_type() == ScalarType::Double,
        "history must be a contiguous Double tensor [steps, 4]");
  update->last_step = row_vector<int32_t>(last_step, "last_step", param, ScalarType::Int);
  update->now = step;
  const int64_t remembered = history->size(0);
  int64_t most = 0;  // steps that a row missed
  for (int64_t j = 0; j < count; ++j) {
    const int64_t id = ids != nullptr ? ids[j] : j;
    const int64_t last = update->last_step[id];
    check(last < step && step - 1 - last <= remembered, "last_step must be in [",
          step - 1 - remembered, ", ", step - 1, "], got ", last, " for row ", id);
    most = std::max(most, step - 1 - last);
  }
  const auto* steps = static_cast<const Transition*>(history->const_data_ptr());
  auto missed = missed_transitions(steps + remembered - most, most);
  update->missed = missed.data();
  return missed;  // moved: its data stays where it is
}

}  // namespace unicom
