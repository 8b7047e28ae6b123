// Options of the loss as the operators of every device take them: two lists, parsed and checked
// here alone. unicom_ext/loss writes them in the same order.
#pragma once

#include <limits>
#include <optional>
#include <vector>

#include "../../core/problem.h"
#include "tensors.h"

namespace unicom {
namespace {  // types of torch::stable are hidden

struct Options {
  MarginOptions margin;  // without its per-sample arrays
  double scale;
  double filter;  // infinity: none
  Precision precision;
  Reduction reduction;
  int64_t workspace_bytes;
  // And of the autograd formula, which hands both lists on as they are: is the prototypes' gradient
  // to hold the sampled rows alone?
  bool sparse_grad;

  Options(const std::vector<double>& reals, const std::vector<int64_t>& codes) {
    check(reals.size() == 5, "reals must be [m1, m2, m3, scale, filter], got ", reals.size(),
          " values");
    check(codes.size() == 6,
          "codes must be [exact_margin_grad, linear_beyond_pi, precision, reduction, "
          "workspace_bytes, sparse_grad], got ",
          codes.size(), " values");
    margin = {.m1 = reals[0],
              .m2 = reals[1],
              .m3 = reals[2],
              .m2_per_sample = nullptr,
              .m3_per_sample = nullptr,
              .exact_grad = codes[0] != 0,
              .linear_beyond_pi = codes[1] != 0};
    scale = reals[3];
    filter = reals[4];
    check(codes[2] >= 0 && codes[2] <= 2, "precision must be 0, 1 or 2, got ", codes[2]);
    check(codes[3] >= 0 && codes[3] <= 2, "reduction must be 0, 1 or 2, got ", codes[3]);
    check(scale > 0 && scale < std::numeric_limits<double>::infinity(),
          "scale must be a finite number > 0, got ", scale);
    precision = static_cast<Precision>(codes[2]);
    reduction = static_cast<Reduction>(codes[3]);
    workspace_bytes = codes[4];
    check(workspace_bytes >= 0, "workspace_bytes must be at least 0, got ", workspace_bytes);
    sparse_grad = codes[5] != 0;
  }

  // With what the margin takes from each sample; the tensors must outlive it.
  MarginOptions margin_of(const std::optional<Tensor>& m2, const std::optional<Tensor>& m3,
                          int64_t batch) const {
    MarginOptions all = margin;
    all.m2_per_sample = per_sample(m2, "m2", batch);
    all.m3_per_sample = per_sample(m3, "m3", batch);
    return all;
  }

 private:
  static const double* per_sample(const std::optional<Tensor>& t, const char* name, int64_t batch) {
    if (!t) return nullptr;
    check_vector(*t, name, batch, ScalarType::Double);
    check(t->is_contiguous(), name, " must be contiguous");
    return t->const_data_ptr<double>();
  }
};

}  // namespace
}  // namespace unicom
