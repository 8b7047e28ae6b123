// Row optimizers on CUDA from their state tensors, checked.
#pragma once

#include "../../cuda/kernels/row_updates.h"
#include "on_device.h"

namespace unicom::cuda {
namespace {  // types of torch::stable are hidden

// What belongs to the rows of a parameter.
class RowState {
 public:
  const Tensor& param;
  const ScalarType real;  // of the arithmetic

  explicit RowState(const Tensor& param_in)
      : param(param_in),
        real(param.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float) {
    check_matrix(param, "param");
  }
  Rows matrix(const Tensor& t, const char* name) const {
    check(t.dim() == 2 && t.size(0) == param.size(0) && t.size(1) == param.size(1), name,
          " must be [", param.size(0), ", ", param.size(1), "] like the parameter");
    check(t.size(1) <= 1 || t.stride(1) == 1, name, " must have contiguous rows");
    check_device(t, param, name);
    return {t.mutable_data_ptr(), dtype_of(t, name), t.stride(0)};
  }
  template <class T>
  T* vector(const std::optional<Tensor>& t, const char* name, ScalarType dtype) const {
    if (!t) return nullptr;
    check_vector(*t, name, param.size(0), dtype);
    check(t->is_contiguous(), name, " must be contiguous");
    check_device(*t, param, name);
    return static_cast<T*>(t->mutable_data_ptr());
  }
};

// The optimizers but for the gradient and the workspace.
inline AdamWUpdate adamw_update(const Tensor& param, const Tensor& exp_avg,
                                const Tensor& exp_avg_sq, const Tensor& row_step,
                                const Tensor& log_decay, double total_log_decay,
                                const AdamWOptions& options) {
  const RowState state(param);
  const auto real_name = torch::headeronly::toString(state.real);
  check(exp_avg.scalar_type() == state.real ||
            (exp_avg.scalar_type() == ScalarType::BFloat16 && state.real == ScalarType::Float),
        "exp_avg must be ", real_name, " or, for Float, BFloat16");
  AdamWUpdate a{};
  a.options = options;
  a.parameter = state.matrix(param, "param");
  a.first = state.matrix(exp_avg, "exp_avg");
  a.second_per_row = exp_avg_sq.dim() == 1;
  if (a.second_per_row) {
    a.second = {state.vector<void>(exp_avg_sq, "exp_avg_sq", state.real),
                dtype_of(exp_avg_sq, "exp_avg_sq"), 1};
  } else {
    a.second = state.matrix(exp_avg_sq, "exp_avg_sq");
    check(exp_avg_sq.scalar_type() == exp_avg.scalar_type(),
          "exp_avg_sq must be of the dtype of exp_avg");
  }
  a.row_step = state.vector<int32_t>(row_step, "row_step", ScalarType::Int);
  a.log_decay = state.vector<double>(log_decay, "log_decay", ScalarType::Double);
  a.total_log_decay = total_log_decay;
  return a;
}

// history [steps, 4] float64 are the last steps before number `step`.
inline SgdUpdate sgd_update(const Tensor& param, const std::optional<Tensor>& momentum_buffer,
                            const std::optional<Tensor>& log_decay,
                            const std::optional<Tensor>& last_step,
                            const std::optional<Tensor>& history, double decay_before,
                            double decay_after, int64_t step, const SgdOptions& options) {
  const RowState state(param);
  SgdUpdate a{};
  a.options = options;
  a.parameter = state.matrix(param, "param");
  if (momentum_buffer) {
    a.buffer = state.matrix(*momentum_buffer, "momentum_buffer");
    check(momentum_buffer->scalar_type() == state.real, "momentum_buffer must be ",
          torch::headeronly::toString(state.real));
  }
  a.log_decay = state.vector<double>(log_decay, "log_decay", ScalarType::Double);
  a.decay_before = decay_before;
  a.decay_after = decay_after;
  a.last_step = state.vector<int32_t>(last_step, "last_step", ScalarType::Int);
  a.now = step;
  if (last_step) {
    static_assert(sizeof(Transition) == 4 * sizeof(double));
    check(history && history->dim() == 2 && history->size(1) == 4 && history->is_contiguous() &&
              history->scalar_type() == ScalarType::Double,
          "history must be a contiguous Double tensor [steps, 4]");
    check_device(*history, param, "history");
    a.steps = static_cast<const Transition*>(history->const_data_ptr());
    a.remembered = history->size(0);
  }
  return a;
}

}  // namespace
}  // namespace unicom::cuda
