// Which of its class's prototypes a positive is drawn to.
#pragma once

#include <utility>

#include "buffers.h"
#include "plan.h"

namespace unicom::cpu {

// In double from the rows as they were given, so that forward and backward find the same.
class NearestCenter {
 public:
  explicit NearestCenter(const Plan& p)
      : p_(p), rows_(2 * p.embeddings.dim), unit_(rows_.get()), spare_(unit_ + p.embeddings.dim) {}

  // Of the class in this slot, the prototype of the largest cosine with x [dim], a unit vector; of
  // equals the first.
  void find(int64_t slot, const double* x) {
    const auto& k = kernels_for<double>();
    const int64_t dim = p_.embeddings.dim;
    for (int64_t c = 0; c < p_.centers; ++c) {
      const double inverse = k.unit_row(p_.prototype_rows(c), p_.class_of(slot), spare_, dim);
      const double found = k.dot(x, spare_, dim);
      if (c > 0 && !is_nearer(found, cosine_)) continue;
      center_ = c;
      cosine_ = found;
      inverse_norm_ = inverse;
      std::swap(unit_, spare_);
    }
  }

  int64_t center() const { return center_; }
  double cosine() const { return cosine_; }
  double inverse_norm() const { return inverse_norm_; }
  const double* unit() const { return unit_; }  // [dim]

 private:
  const Plan& p_;
  Buffer<double> rows_;
  double *unit_, *spare_;
  double cosine_ = 0, inverse_norm_ = 0;
  int64_t center_ = 0;
};

}  // namespace unicom::cpu
