// Row-sparse optimizer steps on CUDA tensors, and over the emulation of CUDA, see cuda_ops.cpp.
// None of them waits for the device, so none can look at what the ids are:
//
// - merge_rows returns as many entries as it was given: ids ascend, the first of equal ones has the
//   sum, the others rows of zeros.
// - row_adamw_ and row_sgd_ take what merge_rows returns, or a gradient that is padded by repeating
//   its last id with rows of zeros. Ids that are not rows of the parameter are passed over.
#include <tuple>

#include "../cuda/update.h"
#include "on_device.h"
#include "schemas.h"

namespace unicom::cuda {
namespace {

// A parameter and its gradient, checked; `state` checks and describes what belongs to its rows.
struct Target {
  Tensor param, ids, rows;
  ScalarType real;  // of the arithmetic

  Target(const Tensor& param_in, const Tensor& ids_in, const Tensor& rows_in)
      : param(param_in),
        ids(torch::stable::contiguous(ids_in)),
        rows(torch::stable::contiguous(rows_in)),
        real(param.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float) {
    check_matrix(param, "param");
    const int64_t count = ids.numel(), dim = param.size(1);
    check(ids.dim() == 1 && ids.scalar_type() == ScalarType::Long, "ids must be an int64 vector");
    check(rows.dim() == 2 && rows.size(0) == count && rows.size(1) == dim &&
              rows.scalar_type() == param.scalar_type(),
          "rows must be [", count, ", ", dim, "] and of the parameter's dtype");
    check_device(ids, param, "ids");
    check_device(rows, param, "rows");
  }
  SparseRows gradient() const {
    return {index_data(ids), rows.const_data_ptr(), ids.numel(), param.size(1), param.size(0)};
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
  Tensor workspace(int64_t bytes) const {
    return empty_like_device(param, {bytes}, ScalarType::Byte);
  }
};

void row_adamw_op(Tensor param, Tensor exp_avg, Tensor exp_avg_sq, Tensor row_step,
                  Tensor log_decay, Tensor ids, Tensor rows, double total_log_decay, double lr,
                  double beta1, double beta2, double eps, bool maximize) {
  const Target target(param, ids, rows);
  const auto real_name = torch::headeronly::toString(target.real);
  check(exp_avg.scalar_type() == target.real ||
            (exp_avg.scalar_type() == ScalarType::BFloat16 && target.real == ScalarType::Float),
        "exp_avg must be ", real_name, " or, for Float, BFloat16");
  AdamWUpdate a{};
  a.gradient = target.gradient();
  a.options = {lr, beta1, beta2, eps, maximize};
  a.parameter = target.matrix(param, "param");
  a.first = target.matrix(exp_avg, "exp_avg");
  a.second_per_row = exp_avg_sq.dim() == 1;
  if (a.second_per_row) {
    a.second = {target.vector<void>(exp_avg_sq, "exp_avg_sq", target.real),
                dtype_of(exp_avg_sq, "exp_avg_sq"), 1};
  } else {
    a.second = target.matrix(exp_avg_sq, "exp_avg_sq");
    check(exp_avg_sq.scalar_type() == exp_avg.scalar_type(),
          "exp_avg_sq must be of the dtype of exp_avg");
  }
  a.row_step = target.vector<int32_t>(row_step, "row_step", ScalarType::Int);
  a.log_decay = target.vector<double>(log_decay, "log_decay", ScalarType::Double);
  a.total_log_decay = total_log_decay;
  OnDevice on(param);
  Tensor workspace = target.workspace(adamw_workspace(a.gradient.count, a.parameter.dtype));
  a.workspace = workspace.mutable_data_ptr();
  update_rows(on.queue, a);
  on.finish();
}

void row_sgd_op(Tensor param, std::optional<Tensor> momentum_buffer,
                std::optional<Tensor> log_decay, std::optional<Tensor> last_step,
                std::optional<Tensor> history, Tensor ids, Tensor rows, double decay_before,
                double decay_after, int64_t step, double lr, double momentum, double weight_decay,
                bool nesterov, bool maximize) {
  const Target target(param, ids, rows);
  SgdUpdate a{};
  a.gradient = target.gradient();
  a.options = {lr, momentum, weight_decay, nesterov, maximize};
  a.parameter = target.matrix(param, "param");
  if (momentum_buffer) {
    a.buffer = target.matrix(*momentum_buffer, "momentum_buffer");
    check(momentum_buffer->scalar_type() == target.real, "momentum_buffer must be ",
          torch::headeronly::toString(target.real));
  }
  a.log_decay = target.vector<double>(log_decay, "log_decay", ScalarType::Double);
  a.decay_before = decay_before;
  a.decay_after = decay_after;
  a.last_step = target.vector<int32_t>(last_step, "last_step", ScalarType::Int);
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
  OnDevice on(param);
  Tensor workspace =
      target.workspace(sgd_workspace(a.gradient.count, a.remembered, a.parameter.dtype));
  a.workspace = workspace.mutable_data_ptr();
  update_rows(on.queue, a);
  on.finish();
}

// The sorted keys, and where each of them was.
std::tuple<Tensor, Tensor> sort_stably(const Tensor& keys) {
  using torch::stable::detail::from;
  StableIValue stack[4] = {from(keys), from(std::optional<bool>(true)), from(int64_t{0}),
                           from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack, TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

std::tuple<Tensor, Tensor> merge_rows_op(Tensor ids, Tensor rows) {
  ids = torch::stable::contiguous(ids);
  rows = torch::stable::contiguous(rows);
  check(ids.dim() == 1 && ids.scalar_type() == ScalarType::Long, "ids must be an int64 vector");
  check_matrix(rows, "rows");
  check(rows.size(0) == ids.numel(), "rows must be [", ids.numel(), ", d] like ids, got [",
        rows.size(0), ", ", rows.size(1), "]");
  check_device(rows, ids, "rows");
  OnDevice on(ids);
  const int64_t count = ids.numel(), dim = rows.size(1);
  Tensor keys = empty_like_device(ids, {count}, ScalarType::Long), order;
  Tensor merged_ids = empty_like_device(ids, {count}, ScalarType::Long);
  Tensor merged_rows = empty_like_device(rows, {count, dim}, rows.scalar_type());
  Merge merge{index_data(ids),
              rows.const_data_ptr(),
              dtype_of(rows, "rows"),
              count,
              dim,
              keys.mutable_data_ptr<int64_t>(),
              nullptr,
              merged_ids.mutable_data_ptr<int64_t>(),
              merged_rows.mutable_data_ptr()};
  give_keys(on.queue, merge);
  on.finish();
  std::tie(keys, order) = sort_stably(keys);
  merge.keys = keys.mutable_data_ptr<int64_t>();
  merge.order = index_data(order);
  add_equal(on.queue, merge);
  on.finish();
  return {merged_ids, merged_rows};
}

}  // namespace
}  // namespace unicom::cuda

#ifdef UNICOM_EMULATE_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(unicom_ext_emulated, m) {
  for (const char* schema : unicom::kUpdateSchemas) m.def(schema);
}
STABLE_TORCH_LIBRARY_IMPL(unicom_ext_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(unicom_ext, CUDA, m) {
#endif
  m.impl("merge_rows", TORCH_BOX(&unicom::cuda::merge_rows_op));
  m.impl("row_adamw_", TORCH_BOX(&unicom::cuda::row_adamw_op));
  m.impl("row_sgd_", TORCH_BOX(&unicom::cuda::row_sgd_op));
}
