// Row-sparse optimizer steps as operators. They write the parameter and its state in place.
//
// ids [n] int64 and rows [n, d] are a sparse gradient as it comes: in any order, and repeated ids
// add up.
#include <tuple>

#include "../ops/schemas.h"
#include "row_updates.h"

namespace unicom {
namespace {

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
    Tensor merged_rows = pooled(rows, {merged.count(), view.dim}, rows.scalar_type(),
                                cpu::bytes_of(view.rows.dtype));
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
  const RowAdamW update = row_adamw(param, exp_avg, exp_avg_sq, row_step, log_decay,
                                    total_log_decay, {lr, beta1, beta2, eps, maximize});
  const Gradient gradient(ids, rows);
  gradient.check_against(param);
  update_rows(update, gradient.view, TorchParallel());
}

void row_sgd_op(Tensor param, std::optional<Tensor> momentum_buffer,
                std::optional<Tensor> log_decay, std::optional<Tensor> last_step,
                std::optional<Tensor> history, Tensor ids, Tensor rows, double decay_before,
                double decay_after, int64_t step, double lr, double momentum, double weight_decay,
                bool nesterov, bool maximize) {
  RowSgd update = row_sgd(param, momentum_buffer, log_decay, decay_before, decay_after,
                          {lr, momentum, weight_decay, nesterov, maximize});
  const Gradient gradient(ids, rows);
  gradient.check_against(param);
  const auto missed =
      replay(param, last_step, history, step, gradient.view.ids, gradient.view.count, &update);
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
