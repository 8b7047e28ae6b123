// The state of row optimizers, from tensors that are checked.
#pragma once

#include "../../core/row_state.h"
#include "tensors.h"

namespace unicom {
namespace {  // types of torch::stable are hidden

// Makes pointers of what belongs to the rows of a parameter.
class RowTensors {
 public:
  const Tensor& param;
  const ScalarType real;  // of the arithmetic

  explicit RowTensors(const Tensor& param_in)
      : param(param_in),
        real(param.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float) {
    check_matrix(param, "param");
  }
  RowArray matrix(const Tensor& t, const char* name) const {
    check(t.dim() == 2 && t.size(0) == param.size(0) && t.size(1) == param.size(1), name,
          " must be [", param.size(0), ", ", param.size(1), "] like the parameter");
    check(t.size(1) <= 1 || t.stride(1) == 1, name, " must have contiguous rows");
    check_device(t, param, name);
    return {.data = t.mutable_data_ptr(), .dtype = dtype_of(t, name), .row_stride = t.stride(0)};
  }
  template <class T>
  T* vector(const MaybeTensor& t, const char* name, ScalarType dtype) const {
    if (!t) return nullptr;
    check_vector(*t, name, param.size(0), dtype);
    check(t->is_contiguous(), name, " must be contiguous");
    check_device(*t, param, name);
    return static_cast<T*>(t->mutable_data_ptr());
  }
};

inline AdamWRows adamw_rows(const Tensor& param, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                            const Tensor& row_step, const Tensor& log_decay, double total_log_decay,
                            const AdamWOptions& options) {
  const RowTensors of(param);
  check(exp_avg.scalar_type() == of.real ||
            (exp_avg.scalar_type() == ScalarType::BFloat16 && of.real == ScalarType::Float),
        "exp_avg must be ", torch::headeronly::toString(of.real), " or, for ",
        torch::headeronly::toString(ScalarType::Float), ", bfloat16");
  const bool second_per_row = exp_avg_sq.dim() == 1;
  RowArray second;
  if (second_per_row) {
    second = {.data = of.vector<void>(exp_avg_sq, "exp_avg_sq", of.real),
              .dtype = dtype_of(exp_avg_sq, "exp_avg_sq"),
              .row_stride = 1};
  } else {
    second = of.matrix(exp_avg_sq, "exp_avg_sq");
    check(exp_avg_sq.scalar_type() == exp_avg.scalar_type(),
          "exp_avg_sq must be of the dtype of exp_avg");
  }
  return {.options = options,
          .parameter = of.matrix(param, "param"),
          .first = of.matrix(exp_avg, "exp_avg"),
          .second = second,
          .second_per_row = second_per_row,
          .row_step = of.vector<int32_t>(row_step, "row_step", ScalarType::Int),
          .log_decay = of.vector<double>(log_decay, "log_decay", ScalarType::Double),
          .total_log_decay = total_log_decay,
          .num_rows = param.size(0),
          .dim = param.size(1)};
}

// history [steps, 4] float64 are the last steps before number `step`.
inline SgdRows sgd_rows(const Tensor& param, const MaybeTensor& momentum_buffer,
                        const MaybeTensor& log_decay, const MaybeTensor& last_step,
                        const MaybeTensor& history, double decay_before, double decay_after,
                        int64_t step, const SgdOptions& options) {
  const RowTensors of(param);
  const RowArray parameter = of.matrix(param, "param");
  RowArray buffer{.data = nullptr, .dtype = parameter.dtype, .row_stride = 0};
  if (momentum_buffer) {
    buffer = of.matrix(*momentum_buffer, "momentum_buffer");
    check(momentum_buffer->scalar_type() == of.real, "momentum_buffer must be ",
          torch::headeronly::toString(of.real));
  }
  SgdRows rows{.options = options,
               .parameter = parameter,
               .buffer = buffer,
               .log_decay = of.vector<double>(log_decay, "log_decay", ScalarType::Double),
               .decay_before = decay_before,
               .decay_after = decay_after,
               .last_step = of.vector<int32_t>(last_step, "last_step", ScalarType::Int),
               .history = nullptr,
               .remembered = 0,
               .now = step,
               .num_rows = param.size(0),
               .dim = param.size(1)};
  if (last_step) {
    static_assert(sizeof(Transition) == 4 * sizeof(double));
    check(history && history->dim() == 2 && history->size(1) == 4 && history->is_contiguous() &&
              history->scalar_type() == ScalarType::Double,
          "history must be a contiguous Double tensor [steps, 4]");
    check_device(*history, param, "history");
    rows.history = static_cast<const Transition*>(history->const_data_ptr());
    rows.remembered = history->size(0);
  }
  return rows;
}

}  // namespace
}  // namespace unicom
