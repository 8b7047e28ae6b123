// Row-sparse optimizer steps as operators. They write the parameter and its state in place.
//
// ids [n] int64 and rows [n, d] are a sparse gradient as it comes: in any order, and repeated ids
// add up.
#include <tuple>

#include "../engine/update.h"
#include "common.h"
#include "schemas.h"

namespace unicom {
namespace {

RowArray row_array(const Tensor& t, const char* name, const Tensor& like) {
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

ScalarType arithmetic(const Tensor& param) {
  return param.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A sparse gradient: checked, and its rows merged where ids repeat or are out of order.
struct Gradient {
  Tensor ids, rows;
  RowGradient view;

  Gradient(const Tensor& ids_in, const Tensor& rows_in)
      : ids(torch::stable::contiguous(ids_in)), rows(torch::stable::contiguous(rows_in)) {
    check(ids.dim() == 1 && ids.scalar_type() == ScalarType::Long, "ids must be an int64 vector");
    check_matrix(rows, "rows");
    check(rows.size(0) == ids.numel(), "rows must be [", ids.numel(), ", d] like ids, got [",
          rows.size(0), ", ", rows.size(1), "]");
    see();
    if (strictly_ascending(view.ids, view.count)) return;
    const MergedRows merged(view.ids, view.count);
    Tensor merged_ids = empty_like_device(ids, {merged.count()}, ScalarType::Long);
    Tensor merged_rows =
        pooled(rows, {merged.count(), view.dim}, rows.scalar_type(), value_bytes(view.rows.dtype));
    merged.write(view, merged_ids.mutable_data_ptr<int64_t>(),
                 {merged_rows.mutable_data_ptr(), view.rows.dtype, view.dim}, TorchParallel());
    ids = merged_ids;
    rows = merged_rows;
    see();
  }

  void check_against(const Tensor& param) const {
    check(view.dim == param.size(1) && rows.scalar_type() == param.scalar_type(),
          "rows must be [n, ", param.size(1), "] and of the parameter's dtype");
    // They ascend.
    const bool inside =
        view.count == 0 || (view.ids[0] >= 0 && view.ids[view.count - 1] < param.size(0));
    check(inside, "ids must be in [0, ", param.size(0), ")");
  }

 private:
  void see() {
    view = {index_data(ids),
            ids.numel(),
            {rows.mutable_data_ptr(), dtype_of(rows, "rows"), rows.size(1)},
            rows.size(1)};
  }
};

std::tuple<Tensor, Tensor> merge_rows_op(Tensor ids, Tensor rows) {
  const Gradient gradient(ids, rows);
  return {gradient.ids, gradient.rows};
}

void row_adamw_op(Tensor param, Tensor exp_avg, Tensor exp_avg_sq, Tensor row_step,
                  Tensor log_decay, Tensor ids, Tensor rows, double total_log_decay, double lr,
                  double beta1, double beta2, double eps, bool maximize) {
  check_matrix(param, "param");
  RowAdamW update;
  update.options = {lr, beta1, beta2, eps, maximize};
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
  const Gradient gradient(ids, rows);
  gradient.check_against(param);
  update_rows(update, gradient.view, TorchParallel());
}

void row_sgd_op(Tensor param, std::optional<Tensor> momentum_buffer,
                std::optional<Tensor> log_decay, std::optional<Tensor> last_step,
                std::optional<Tensor> history, Tensor ids, Tensor rows, double decay_before,
                double decay_after, int64_t step, double lr, double momentum, double weight_decay,
                bool nesterov, bool maximize) {
  check_matrix(param, "param");
  RowSgd update;
  update.options = {lr, momentum, weight_decay, nesterov, maximize};
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
  const Gradient gradient(ids, rows);
  gradient.check_against(param);
  std::vector<Transition> missed;
  if (last_step) {
    static_assert(sizeof(Transition) == 4 * sizeof(double));
    check(history && history->dim() == 2 && history->size(1) == 4 && history->is_contiguous() &&
              history->scalar_type() == ScalarType::Double,
          "history must be a contiguous Double tensor [steps, 4]");
    update.last_step = row_vector<int32_t>(last_step, "last_step", param, ScalarType::Int);
    update.now = step;
    int64_t most = 0;  // steps that a row missed
    for (int64_t j = 0; j < gradient.view.count; ++j) {
      const int64_t count = step - 1 - update.last_step[gradient.view.ids[j]];
      check(count >= 0 && count <= history->size(0), "last_step must be in [",
            step - 1 - history->size(0), ", ", step - 1, "], got ", step - 1 - count, " for row ",
            gradient.view.ids[j]);
      most = std::max(most, count);
    }
    const auto* steps = static_cast<const Transition*>(history->const_data_ptr());
    missed = missed_transitions(steps + history->size(0) - most, most);
    update.missed = missed.data();
  }
  update_rows(update, gradient.view, TorchParallel());
}

}  // namespace
}  // namespace unicom

STABLE_TORCH_LIBRARY_FRAGMENT(unicom_ext, m) {
  for (const char* schema : unicom::kUpdateSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(unicom_ext, CPU, m) {
  m.impl("merge_rows", TORCH_BOX(&unicom::merge_rows_op));
  m.impl("row_adamw_", TORCH_BOX(&unicom::row_adamw_op));
  m.impl("row_sgd_", TORCH_BOX(&unicom::row_sgd_op));
}
