// Operators of the pruned search for nearest centroids, see cpu/host/pruned_search.h.
#pragma once

#include "../../cpu/host/pruned_search.h"

#include "backend.h"

namespace unicom::cpu {
namespace {  // types of torch::stable are hidden

struct PrunedSearchOps {
  static int64_t largest_byte(Tensor) { return kernels().nearest->largest; }

  static Tensor project_rows(Tensor rows_in, Tensor means, MaybeTensor axes, double step,
                             double rest_step, int64_t largest) {
    const FloatRows rows = float_rows(rows_in, "rows");
    const Projection projection = projection_of(rows.dim, means, axes, step, rest_step, largest);
    Backend on(rows_in);
    Tensor out = on.empty({rows.count, projected_row_bytes(projection)}, ScalarType::Byte);
    cpu::project_rows(rows, projection, out.mutable_data_ptr<uint8_t>(), TorchParallel());
    return out;
  }

  static Tensor order_centroids(Tensor centroids, Tensor order, MaybeTensor moved, Tensor means,
                                MaybeTensor axes, double step, double rest_step, int64_t largest) {
    const FloatRows from = float_rows(centroids, "centroids");
    check(from.count >= 1 && from.count <= INT32_MAX / kLanes, "centroids must have from 1 to ",
          INT32_MAX / kLanes, " rows, got ", from.count);
    const Projection projection = projection_of(from.dim, means, axes, step, rest_step, largest);
    Backend::check_centroids(from);
    check_whole_vector(order, "order", from.count, ScalarType::Long);
    std::vector<bool> seen(from.count);
    for (int64_t j = 0; j < from.count; ++j) {
      const int64_t id = index_data(order)[j];
      check(id >= 0 && id < from.count && !seen[id], "order must have each of 0 .. ",
            from.count - 1, " once, got ", id, " at position ", j);
      seen[id] = true;
    }
    if (moved) {
      check_whole_vector(*moved, "moved", from.count, ScalarType::Float);
      const float* values = moved->const_data_ptr<float>();
      for (int64_t j = 0; j < from.count; ++j)
        check(values[j] >= 0 && (j == 0 || values[j] <= values[j - 1]),
              "moved must not be negative and not increase, got ", values[j], " at position ", j);
    }
    Backend on(centroids);
    Tensor packed = on.large({ordered_centroid_bytes(from.count, projection)}, ScalarType::Byte);
    cpu::order_centroids(from, index_data(order), moved ? moved->const_data_ptr<float>() : nullptr,
                         projection, packed.mutable_data_ptr(), TorchParallel());
    return packed;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> search(Tensor rows_in, Tensor projected,
                                                           Tensor guess, MaybeTensor bound,
                                                           Tensor centroids_in, Tensor packed,
                                                           Tensor means, MaybeTensor axes,
                                                           double step, double rest_step,
                                                           int64_t largest, double margin) {
    const FloatRows rows = float_rows(rows_in, "rows");
    const FloatRows centroids = float_rows(centroids_in, "centroids");
    check(rows.dim == centroids.dim, "centroids must be [k, ", rows.dim, "] like the rows, got [",
          centroids.count, ", ", centroids.dim, "]");
    const Projection projection = projection_of(rows.dim, means, axes, step, rest_step, largest);
    check(projected.dim() == 2 && projected.size(0) == rows.count &&
              projected.size(1) == projected_row_bytes(projection) &&
              projected.scalar_type() == ScalarType::Byte && projected.is_contiguous(),
          "projected must come from project_rows with the same rows");
    check(packed.scalar_type() == ScalarType::Byte &&
              packed.numel() == ordered_centroid_bytes(centroids.count, projection),
          "packed must come from order_centroids with the same centroids");
    check_whole_vector(guess, "guess", rows.count, ScalarType::Long);
    Backend::check_index(index_data(guess), "guess", rows.count, centroids.count);
    if (bound) check_whole_vector(*bound, "bound", rows.count, ScalarType::Float);
    check(margin >= 0, "margin must not be negative, got ", margin);
    Backend on(rows_in);
    Tensor index = on.empty({rows.count}, ScalarType::Long);
    Tensor score = on.empty({rows.count}, ScalarType::Float);
    Tensor next = on.empty({rows.count}, ScalarType::Float);
    Tensor work = on.empty({3}, ScalarType::Long);
    const SearchWork done = cpu::search({.rows = rows,
                                         .projected = projected.const_data_ptr<uint8_t>(),
                                         .guess = index_data(guess),
                                         .bound = bound ? bound->const_data_ptr<float>() : nullptr,
                                         .centroids = centroids,
                                         .packed = packed.const_data_ptr(),
                                         .projection = projection,
                                         .margin = margin,
                                         .index = index.mutable_data_ptr<int64_t>(),
                                         .score = score.mutable_data_ptr<float>(),
                                         .next_bound = next.mutable_data_ptr<float>()},
                                        TorchParallel());
    auto* counts = work.mutable_data_ptr<int64_t>();
    counts[0] = done.screened;
    counts[1] = done.multiplied;
    counts[2] = done.decided;
    return {index, score, next, work};
  }

 private:
  static void check_whole_vector(const Tensor& tensor, const char* name, int64_t size,
                                 ScalarType dtype) {
    check_vector(tensor, name, size, dtype);
    check(tensor.is_contiguous(), name, " must be contiguous");
  }

  static Projection projection_of(int64_t dim, const Tensor& means, const MaybeTensor& axes,
                                  double step, double rest_step, int64_t largest) {
    check(means.dim() == 2 && means.size(0) == 2 && means.size(1) == dim &&
              means.scalar_type() == ScalarType::Float && means.is_contiguous(),
          "means must be contiguous, Float, of shape [2, ", dim, "]");
    check(step >= 1e-4 && rest_step >= 1e-4, "step and rest_step must be at least 1e-4, got ", step,
          " and ", rest_step);
    if (axes)
      check(axes->dim() == 2 && axes->size(1) == dim && axes->size(0) >= 1 &&
                axes->scalar_type() == ScalarType::Float && axes->is_contiguous(),
            "axes must be contiguous, Float, of shape [m, ", dim, "]");
    const int64_t coordinates = axes ? axes->size(0) : dim;
    check(coordinates <= 16384, "projected rows have at most 16384 coordinates, got ",
          coordinates);  // so that sums of products fit an int32
    check(largest >= 1 && largest <= kernels().nearest->largest,
          "rows were projected for another CPU capability than is in use now");
    return {.row_mean = means.const_data_ptr<float>(),
            .centroid_mean = means.const_data_ptr<float>() + dim,
            .axes = axes ? axes->const_data_ptr<float>() : nullptr,
            .dim = dim,
            .count = axes ? axes->size(0) : dim,
            .step = static_cast<float>(step),
            .rest_step = static_cast<float>(rest_step),
            .largest = static_cast<int32_t>(largest)};
  }
};

template <class Library>
void implement_pruned_search(Library& m) {
  m.impl("largest_byte", TORCH_BOX(&PrunedSearchOps::largest_byte));
  m.impl("project_rows", TORCH_BOX(&PrunedSearchOps::project_rows));
  m.impl("order_centroids", TORCH_BOX(&PrunedSearchOps::order_centroids));
  m.impl("pruned_search", TORCH_BOX(&PrunedSearchOps::search));
}

}  // namespace
}  // namespace unicom::cpu
