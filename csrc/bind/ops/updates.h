// Row-sparse optimizer steps as operators. They write the parameter and its state in place.
//
// ids [n] int64 and rows [n, d] are a sparse gradient. On CPUs it may come in any order, and
// repeated ids add up; what merge_rows makes of it has distinct ids, ascending.
//
// On CUDA nobody can look at what the ids are without waiting for the device, so merge_rows returns
// as many entries as it was given: ids ascend, the first of equal ones has the sum, the others rows
// of zeros. The optimizers take that, or a gradient that is padded by repeating its last id with
// rows of zeros; ids that are not rows of the parameter are passed over.
#pragma once

#include <tuple>

#include "row_states.h"

namespace unicom {
namespace {  // types of torch::stable are hidden

// A gradient by rows, checked; keeps its tensors alive.
struct SparseGradient {
  Tensor ids, rows;

  SparseGradient(const Tensor& ids_in, const Tensor& rows_in)
      : ids(torch::stable::contiguous(ids_in)), rows(torch::stable::contiguous(rows_in)) {
    check(ids.dim() == 1 && ids.scalar_type() == ScalarType::Long, "ids must be an int64 vector");
    check_matrix(rows, "rows");
    check(rows.size(0) == ids.numel(), "rows must be [", ids.numel(), ", d] like ids, got [",
          rows.size(0), ", ", rows.size(1), "]");
    check_device(rows, ids, "rows");
  }
  // Of a parameter.
  SparseGradient(const Tensor& ids_in, const Tensor& rows_in, const Tensor& param)
      : SparseGradient(ids_in, rows_in) {
    check(rows.size(1) == param.size(1) && rows.scalar_type() == param.scalar_type(),
          "rows must be [n, ", param.size(1), "] and of the parameter's dtype");
    check_device(ids, param, "ids");
  }
};

// A Backend has:
//
//   std::tuple<Tensor, Tensor> merge_rows(const SparseGradient&)
//   update(const AdamWRows& or SgdRows&, const SparseGradient&)
template <class Backend>
struct UpdateOps {
  static std::tuple<Tensor, Tensor> merge_rows(Tensor ids, Tensor rows) {
    const SparseGradient gradient(ids, rows);
    Backend on(ids);
    auto merged = on.merge_rows(gradient);
    on.finish();
    return merged;
  }

  static void adamw(Tensor param, Tensor exp_avg, Tensor exp_avg_sq, Tensor row_step,
                    Tensor log_decay, Tensor ids, Tensor rows, double total_log_decay, double lr,
                    double beta1, double beta2, double eps, bool maximize) {
    update(
        param, ids, rows,
        adamw_rows(param, exp_avg, exp_avg_sq, row_step, log_decay, total_log_decay,
                   {.lr = lr, .beta1 = beta1, .beta2 = beta2, .eps = eps, .maximize = maximize}));
  }

  static void sgd(Tensor param, MaybeTensor momentum_buffer, MaybeTensor log_decay,
                  MaybeTensor last_step, MaybeTensor history, Tensor ids, Tensor rows,
                  double decay_before, double decay_after, int64_t step, double lr, double momentum,
                  double weight_decay, bool nesterov, bool maximize) {
    update(param, ids, rows,
           sgd_rows(param, momentum_buffer, log_decay, last_step, history, decay_before,
                    decay_after, step,
                    {.lr = lr,
                     .momentum = momentum,
                     .weight_decay = weight_decay,
                     .nesterov = nesterov,
                     .maximize = maximize}));
  }

 private:
  template <class Rows>
  static void update(const Tensor& param, const Tensor& ids, const Tensor& rows,
                     const Rows& state) {
    const SparseGradient gradient(ids, rows, param);
    Backend on(param);
    on.update(state, gradient);
    on.finish();
  }
};

}  // namespace
}  // namespace unicom
