// Operators of the clustering: nearest centroid of each row, and the sums of unit rows by centroid.
#pragma once

#include <cstdint>
#include <tuple>

#include "../../core/unit_sums.h"
#include "tensors.h"

namespace unicom {
namespace {  // types of torch::stable are hidden

// A Backend has:
//
//   static int64_t packed_centroid_bytes(int64_t count, int64_t dim)
//   static void check_centroids(const FloatRows&), check_packed(const void*)
//   static void check_index(const int64_t*, const char* name, int64_t rows, int64_t centroids)
//   pack_centroids(const FloatRows&, void* packed)
//   nearest(rows, const int64_t* guess, centroids, const void* packed, int64_t* index, float*
//   score)
//   add_unit_rows(const AddUnitRows&), directions(const Directions&)
template <class Backend>
struct NearestOps {
  static Tensor pack_centroids(Tensor centroids) {
    const FloatRows from = float_rows(centroids, "centroids");
    check(from.count >= 1 && from.count <= INT32_MAX, "centroids must have from 1 to ", INT32_MAX,
          " rows, got ", from.count);
    Backend::check_centroids(from);
    Backend on(centroids);
    Tensor packed =
        on.large({Backend::packed_centroid_bytes(from.count, from.dim)}, ScalarType::Byte);
    on.pack_centroids(from, packed.mutable_data_ptr());
    on.finish();
    return packed;
  }

  static std::tuple<Tensor, Tensor> nearest(Tensor rows_in, Tensor centroids_in, Tensor packed,
                                            MaybeTensor guess_in) {
    const FloatRows rows = float_rows(rows_in, "rows");
    const FloatRows centroids = float_rows(centroids_in, "centroids");
    check(rows.dim == centroids.dim, "centroids must be [k, ", rows.dim, "] like the rows, got [",
          centroids.count, ", ", centroids.dim, "]");
    check(packed.numel() == Backend::packed_centroid_bytes(centroids.count, centroids.dim),
          "packed must come from pack_centroids with the same centroids");
    check_device(centroids_in, rows_in, "centroids");
    check_device(packed, rows_in, "packed");
    Backend::check_packed(packed.const_data_ptr());
    const int64_t* guess =
        guess_in ? index_of_rows(*guess_in, "guess", rows_in, centroids.count) : nullptr;
    Backend on(rows_in);
    Tensor index = on.empty({rows.count}, ScalarType::Long);
    Tensor score = on.empty({rows.count}, ScalarType::Float);
    on.nearest(rows, guess, centroids, packed.const_data_ptr(), index.mutable_data_ptr<int64_t>(),
               score.mutable_data_ptr<float>());
    on.finish();
    return {index, score};
  }

  // The one operator here that changes its arguments: sums of a whole pass are far larger than what
  // one call adds to them.
  static void add_unit_rows(Tensor sums, Tensor counts, Tensor rows_in, Tensor index_in,
                            int64_t shift, MaybeTensor before_in) {
    const FloatRows rows = float_rows(rows_in, "rows");
    check_sums(sums);
    check(sums.size(1) == rows.dim, "sums must be [k, ", rows.dim, "] like the rows, got [",
          sums.size(0), ", ", sums.size(1), "]");
    const int64_t num_sums = sums.size(0);
    check_vector(counts, "counts", num_sums, ScalarType::Long);
    check(counts.is_contiguous(), "counts must be contiguous");
    check_device(sums, rows_in, "sums");
    check_device(counts, rows_in, "counts");
    check(shift >= 0 && shift <= kMaxShift, "shift must be from 0 to ", kMaxShift, ", got ", shift);
    const int64_t* index = index_of_rows(index_in, "index", rows_in, num_sums);
    const int64_t* before =
        before_in ? index_of_rows(*before_in, "before", rows_in, num_sums) : nullptr;
    Backend on(rows_in);
    on.add_unit_rows({.rows = rows,
                      .index = index,
                      .before = before,
                      .num_sums = num_sums,
                      .shift = shift,
                      .sums = sums.mutable_data_ptr<int64_t>(),
                      .counts = counts.mutable_data_ptr<int64_t>()});
    on.finish();
  }

  static Tensor directions(Tensor sums) {
    check_sums(sums);
    Backend on(sums);
    Tensor out = on.empty({sums.size(0), sums.size(1)}, ScalarType::Float);
    on.directions({.sums = sums.const_data_ptr<int64_t>(),
                   .count = sums.size(0),
                   .dim = sums.size(1),
                   .out = out.mutable_data_ptr<float>()});
    on.finish();
    return out;
  }

 private:
  static void check_sums(const Tensor& sums) {
    check_matrix(sums, "sums");
    check(sums.scalar_type() == ScalarType::Long, "sums must be int64, got ",
          torch::headeronly::toString(sums.scalar_type()));
    check(sums.is_contiguous(), "sums must be contiguous");
  }

  // Indices of centroids, -1 for none.
  static const int64_t* index_of_rows(const Tensor& index, const char* name, const Tensor& rows,
                                      int64_t count) {
    check_vector(index, name, rows.size(0), ScalarType::Long);
    check(index.is_contiguous(), name, " must be contiguous");
    check_device(index, rows, name);
    Backend::check_index(index_data(index), name, rows.size(0), count);
    return index_data(index);
  }
};

}  // namespace
}  // namespace unicom
