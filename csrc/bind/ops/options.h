// Options of the loss as the operators of every device take them.
#pragma once

#include <limits>
#include <optional>

#include "../../core/target.h"
#include "tensors.h"

namespace unicom {
namespace {  // types of torch::stable are hidden

enum class Precision : int64_t { kFp32, kFp16, kBf16 };

// The margin's options; keeps the per-sample tensors alive.
struct Margins {
  std::optional<Tensor> m2, m3;
  MarginOptions options;

  Margins(const std::optional<Tensor>& m2_in, const std::optional<Tensor>& m3_in, double m1,
          double m2_value, double m3_value, bool exact_grad, bool linear_beyond_pi, int64_t batch)
      : m2(m2_in), m3(m3_in), options{m1,
                                      m2_value,
                                      m3_value,
                                      per_sample(m2, "m2", batch),
                                      per_sample(m3, "m3", batch),
                                      exact_grad,
                                      linear_beyond_pi} {}

 private:
  static const double* per_sample(const std::optional<Tensor>& t, const char* name, int64_t batch) {
    if (!t) return nullptr;
    check_vector(*t, name, batch, ScalarType::Double);
    check(t->is_contiguous(), name, " must be contiguous");
    return t->const_data_ptr<double>();
  }
};

inline void check_options(double scale, int64_t precision, int64_t workspace_bytes) {
  check(precision >= 0 && precision <= 2, "precision must be 0, 1 or 2, got ", precision);
  check(scale > 0 && scale < std::numeric_limits<double>::infinity(),
        "scale must be a finite number > 0, got ", scale);
  check(workspace_bytes >= 0, "workspace_bytes must be at least 0, got ", workspace_bytes);
}

// What loss_merge takes of each sample, checked and made contiguous. Returns the batch size.
inline int64_t prepare_merge(Tensor& sums, Tensor& exponent, Tensor& inverse_norm, Tensor& slot) {
  const int64_t batch = slot.numel();
  check_vector(slot, "slot", batch, ScalarType::Long);
  check_vector(exponent, "exponent", batch, ScalarType::Double);
  check_vector(inverse_norm, "inverse_norm", batch, ScalarType::Double);
  check(sums.dim() == 2 && sums.size(0) == batch && sums.size(1) == 2 &&
            sums.scalar_type() == ScalarType::Double,
        "sums must be Double of shape [", batch, ", 2]");
  for (Tensor* t : {&sums, &exponent, &inverse_norm, &slot}) *t = torch::stable::contiguous(*t);
  return batch;
}

}  // namespace
}  // namespace unicom
