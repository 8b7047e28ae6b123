// The operators of the clustering on CUDA tensors, and over the emulation of CUDA, see
// cuda_loss_ops.cpp. None of them waits for the device, so none can look at values: centroids have
// to be finite, a guess that is no centroid counts as none, and rows whose index is no sum are left
// out.
#include "../../cuda/host/nearest.h"

#include <cstdint>
#include <tuple>

#include "../ops/nearest_checks.h"
#include "../ops/schemas.h"
#include "on_device.h"

namespace unicom::cuda {
namespace {

FloatRows float_rows(const Tensor& tensor, const char* name) {
  check_float_rows(tensor, name);
  return {tensor.const_data_ptr<float>(), tensor.size(0), tensor.size(1), tensor.stride(0)};
}

Tensor pack_centroids_op(Tensor centroids) {
  const FloatRows from = float_rows(centroids, "centroids");
  check(from.count >= 1 && from.count <= INT32_MAX, "centroids must have from 1 to ", INT32_MAX,
        " rows, got ", from.count);
  OnDevice on(centroids);
  Tensor packed =
      allocate(centroids, {packed_centroid_bytes(from.count, from.dim)}, ScalarType::Byte);
  Tensor workspace = allocate(centroids, {packing_workspace(from)}, ScalarType::Byte);
  pack_centroids(on.queue, from, packed.mutable_data_ptr(), workspace.mutable_data_ptr());
  on.finish();
  return packed;
}

const int64_t* index_of_rows(const Tensor& index, const char* name, const Tensor& rows) {
  check_vector(index, name, rows.size(0), ScalarType::Long);
  check(index.is_contiguous(), name, " must be contiguous");
  check_device(index, rows, name);
  return index_data(index);
}

std::tuple<Tensor, Tensor> nearest_op(Tensor rows_in, Tensor centroids_in, Tensor packed,
                                      std::optional<Tensor> guess_in) {
  const FloatRows rows = float_rows(rows_in, "rows");
  const FloatRows centroids = float_rows(centroids_in, "centroids");
  check_search(rows_in, centroids_in, packed,
               packed_centroid_bytes(centroids.count, centroids.dim));
  check_device(centroids_in, rows_in, "centroids");
  check_device(packed, rows_in, "packed");
  const int64_t* guess = guess_in ? index_of_rows(*guess_in, "guess", rows_in) : nullptr;
  OnDevice on(rows_in);
  Tensor index = allocate(rows_in, {rows.count}, ScalarType::Long);
  Tensor score = allocate(rows_in, {rows.count}, ScalarType::Float);
  Tensor workspace = allocate(rows_in, {nearest_workspace(rows, centroids)}, ScalarType::Byte);
  nearest(on.queue, rows, guess, centroids, packed.const_data_ptr(),
          index.mutable_data_ptr<int64_t>(), score.mutable_data_ptr<float>(),
          workspace.mutable_data_ptr());
  on.finish();
  return {index, score};
}

void add_unit_rows_op(Tensor sums, Tensor counts, Tensor rows_in, Tensor index) {
  const FloatRows rows = float_rows(rows_in, "rows");
  const int64_t num_sums = check_sums(sums, counts, rows_in);
  check_device(sums, rows_in, "sums");
  check_device(counts, rows_in, "counts");
  index_of_rows(index, "index", rows_in);
  OnDevice on(rows_in);
  const auto [key, order] = sort_stably(index);
  Tensor inverse_norm = allocate(rows_in, {rows.count}, ScalarType::Double);
  inverse_norms(on.queue, {rows, inverse_norm.mutable_data_ptr<double>()});
  add_unit_rows(on.queue,
                {rows, inverse_norm.const_data_ptr<double>(), index_data(key), index_data(order),
                 num_sums, sums.mutable_data_ptr<double>(), counts.mutable_data_ptr<int64_t>()});
  on.finish();
}

}  // namespace
}  // namespace unicom::cuda

#ifdef UNICOM_EMULATE_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(unicom_ext_emulated, m) {
  for (const char* schema : unicom::kNearestSchemas) m.def(schema);
}
STABLE_TORCH_LIBRARY_IMPL(unicom_ext_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(unicom_ext, CUDA, m) {
#endif
  m.impl("pack_centroids", TORCH_BOX(&unicom::cuda::pack_centroids_op));
  m.impl("nearest", TORCH_BOX(&unicom::cuda::nearest_op));
  m.impl("add_unit_rows", TORCH_BOX(&unicom::cuda::add_unit_rows_op));
}
