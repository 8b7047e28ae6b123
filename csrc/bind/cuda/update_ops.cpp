// Row-sparse optimizer steps on CUDA tensors, and over the emulation of CUDA, see
// cuda_loss_ops.cpp. None of them waits for the device, so none can look at what the ids are:
//
// - merge_rows returns as many entries as it was given: ids ascend, the first of equal ones has the
//   sum, the others rows of zeros.
// - row_adamw_ and row_sgd_ take what merge_rows returns, or a gradient that is padded by repeating
//   its last id with rows of zeros. Ids that are not rows of the parameter are passed over.
#include <tuple>

#include "../ops/schemas.h"
#include "row_updates.h"

namespace unicom::cuda {
namespace {

// A gradient by rows, checked; keeps its tensors alive.
struct Gradient {
  Tensor ids, rows;
  SparseRows described;

  Gradient(const Tensor& param, const Tensor& ids_in, const Tensor& rows_in)
      : ids(torch::stable::contiguous(ids_in)), rows(torch::stable::contiguous(rows_in)) {
    check_matrix(param, "param");
    const int64_t count = ids.numel(), dim = param.size(1);
    check(ids.dim() == 1 && ids.scalar_type() == ScalarType::Long, "ids must be an int64 vector");
    check(rows.dim() == 2 && rows.size(0) == count && rows.size(1) == dim &&
              rows.scalar_type() == param.scalar_type(),
          "rows must be [", count, ", ", dim, "] and of the parameter's dtype");
    check_device(ids, param, "ids");
    check_device(rows, param, "rows");
    described = {index_data(ids), rows.const_data_ptr(), count, dim, param.size(0)};
  }
};

template <class Update>
void run_update(const Tensor& param, Update update, const Gradient& gradient,
                int64_t workspace_bytes) {
  OnDevice on(param);
  Tensor workspace = allocate(param, {workspace_bytes}, ScalarType::Byte);
  update.gradient = gradient.described;
  update.workspace = workspace.mutable_data_ptr();
  update_rows(on.queue, update);
  on.finish();
}

void row_adamw_op(Tensor param, Tensor exp_avg, Tensor exp_avg_sq, Tensor row_step,
                  Tensor log_decay, Tensor ids, Tensor rows, double total_log_decay, double lr,
                  double beta1, double beta2, double eps, bool maximize) {
  const Gradient gradient(param, ids, rows);
  const AdamWUpdate update = adamw_update(param, exp_avg, exp_avg_sq, row_step, log_decay,
                                          total_log_decay, {lr, beta1, beta2, eps, maximize});
  run_update(param, update, gradient,
             adamw_workspace(gradient.described.count, update.parameter.dtype));
}

void row_sgd_op(Tensor param, std::optional<Tensor> momentum_buffer,
                std::optional<Tensor> log_decay, std::optional<Tensor> last_step,
                std::optional<Tensor> history, Tensor ids, Tensor rows, double decay_before,
                double decay_after, int64_t step, double lr, double momentum, double weight_decay,
                bool nesterov, bool maximize) {
  const Gradient gradient(param, ids, rows);
  const SgdUpdate update =
      sgd_update(param, momentum_buffer, log_decay, last_step, history, decay_before, decay_after,
                 step, {lr, momentum, weight_decay, nesterov, maximize});
  run_update(param, update, gradient,
             sgd_workspace(gradient.described.count, update.remembered, update.parameter.dtype));
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
  Tensor keys = allocate(ids, {count}, ScalarType::Long), order;
  Tensor merged_ids = allocate(ids, {count}, ScalarType::Long);
  Tensor merged_rows = allocate(rows, {count, dim}, rows.scalar_type());
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
