// What the operators of the clustering ask of their arguments on every device.
#pragma once

#include "tensors.h"

namespace unicom {
namespace {  // types of torch::stable are hidden

inline void check_float_rows(const Tensor& tensor, const char* name) {
  check_matrix(tensor, name);
  check(tensor.scalar_type() == ScalarType::Float, name, " must be float32, got ",
        torch::headeronly::toString(tensor.scalar_type()));
  check(tensor.size(1) >= 1, name, " must have at least one column");
  check(tensor.stride(1) == 1 || tensor.size(1) == 1, name, " must have unit column stride");
}

inline void check_search(const Tensor& rows, const Tensor& centroids, const Tensor& packed,
                         int64_t packed_bytes) {
  check(rows.size(1) == centroids.size(1), "centroids must be [k, ", rows.size(1),
        "] like the rows, got [", centroids.size(0), ", ", centroids.size(1), "]");
  check(packed.numel() == packed_bytes,
        "packed must come from pack_centroids with the same centroids");
}

// Returns the number of sums.
inline int64_t check_sums(const Tensor& sums, const Tensor& counts, const Tensor& rows) {
  check_matrix(sums, "sums");
  check(sums.size(1) == rows.size(1) && sums.scalar_type() == ScalarType::Double &&
            sums.is_contiguous(),
        "sums must be contiguous, Double, of shape [k, ", rows.size(1), "]");
  check_vector(counts, "counts", sums.size(0), ScalarType::Long);
  check(counts.is_contiguous(), "counts must be contiguous");
  return sums.size(0);
}

}  // namespace
}  // namespace unicom
