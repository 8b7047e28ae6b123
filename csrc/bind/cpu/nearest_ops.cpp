// Operators of the clustering: nearest centroid of each row, and the sums of unit rows by centroid.
#include "../../cpu/host/nearest.h"

#include <cmath>
#include <optional>
#include <tuple>

#include "../ops/nearest_checks.h"
#include "../ops/schemas.h"

namespace unicom {
namespace {

Rows fp32_rows(const Tensor& tensor, const char* name) {
  check_float_rows(tensor, name);
  return {tensor.const_data_ptr<float>(), tensor.size(0), tensor.size(1), tensor.stride(0)};
}

Tensor pack_centroids_op(Tensor centroids) {
  const Rows from = fp32_rows(centroids, "centroids");
  check(from.count >= 1, "centroids must have at least one row");
  for (int64_t j = 0; j < from.count; ++j) {
    bool finite = true;
    for (int64_t k = 0; k < from.dim; ++k) finite &= std::isfinite(from[j][k]);
    check(finite, "centroids must be finite, but row ", j, " is not");
  }
  Tensor packed =
      pooled(centroids, {packed_centroid_bytes(from.count, from.dim)}, ScalarType::Byte, 1);
  pack_centroids(from, packed.mutable_data_ptr(), TorchParallel());
  return packed;
}

// Indices of centroids, -1 for none.
const int64_t* checked_index(const Tensor& index, const char* name, int64_t rows, int64_t count) {
  check_vector(index, name, rows, ScalarType::Long);
  check(index.is_contiguous(), name, " must be contiguous");
  const int64_t* ids = index_data(index);
  for (int64_t i = 0; i < rows; ++i)
    check(ids[i] >= -1 && ids[i] < count, name, " must be in [-1, ", count, "), got ", ids[i],
          " at position ", i);
  return ids;
}

std::tuple<Tensor, Tensor> nearest_op(Tensor rows_in, Tensor centroids_in, Tensor packed,
                                      std::optional<Tensor> guess_in) {
  const Rows rows = fp32_rows(rows_in, "rows"), centroids = fp32_rows(centroids_in, "centroids");
  check_search(rows_in, centroids_in, packed,
               packed_centroid_bytes(centroids.count, centroids.dim));
  check(fits_kernels(packed.const_data_ptr()),
        "centroids were packed for another CPU capability than is in use now");
  const int64_t* guess =
      guess_in ? checked_index(*guess_in, "guess", rows.count, centroids.count) : nullptr;
  Tensor index = empty_like_device(rows_in, {rows.count}, ScalarType::Long);
  Tensor score = empty_like_device(rows_in, {rows.count}, ScalarType::Float);
  nearest(rows, guess, centroids, packed.const_data_ptr(), index.mutable_data_ptr<int64_t>(),
          score.mutable_data_ptr<float>(), TorchParallel());
  return {index, score};
}

// The one operator here that changes its arguments: sums of a whole pass are far larger than what
// one call adds to them.
void add_unit_rows_op(Tensor sums, Tensor counts, Tensor rows_in, Tensor index) {
  const Rows rows = fp32_rows(rows_in, "rows");
  const int64_t num_sums = check_sums(sums, counts, rows_in);
  const int64_t* ids = checked_index(index, "index", rows.count, num_sums);
  add_unit_rows(rows, ids, num_sums, sums.mutable_data_ptr<double>(),
                counts.mutable_data_ptr<int64_t>(), TorchParallel());
}

}  // namespace
}  // namespace unicom

STABLE_TORCH_LIBRARY_FRAGMENT(unicom_ext, m) {
  for (const char* schema : unicom::kNearestSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(unicom_ext, CPU, m) {
  m.impl("pack_centroids", TORCH_BOX(&unicom::pack_centroids_op));
  m.impl("nearest", TORCH_BOX(&unicom::nearest_op));
  m.impl("add_unit_rows", TORCH_BOX(&unicom::add_unit_rows_op));
}
