// The operators' steps on CPU tensors.
#pragma once

#include <atomic>
#include <cmath>
#include <exception>
#include <initializer_list>
#include <string>
#include <tuple>
#include <vector>

#include "../../cpu/host/buffers.h"
#include "../../cpu/host/loss.h"
#include "../../cpu/host/nearest.h"
#include "../../cpu/host/row_updates.h"
#include "../../cpu/host/select.h"
#include "../../cpu/host/unit_sums.h"
#include "../ops/updates.h"

namespace unicom::cpu {
namespace {  // types of torch::stable are hidden

// Torch's own threads; items are handed out one by one, so uneven ones balance.
struct TorchParallel final : Parallel {
  int threads() const override { return static_cast<int>(torch::stable::get_num_threads()); }
  void run(int64_t items, const std::function<void(int64_t)>& body) const override {
    const int64_t workers = std::min<int64_t>(items, threads());
    std::atomic<int64_t> next{0};
    std::exception_ptr failure;
    std::atomic<bool> failed{false};
    auto work = [&](int64_t, int64_t) {
      try {
        for (int64_t i; (i = next.fetch_add(1)) < items;) body(i);
      } catch (...) {  // out of memory: stop all, then raise on the caller's thread
        next.store(items);
        if (!failed.exchange(true)) failure = std::current_exception();
      }
    };
    if (workers <= 1)
      work(0, 1);
    else
      torch::stable::parallel_for(0, workers, 1, work);
    if (failure) std::rethrow_exception(failure);
  }
};

class Backend {
 public:
  explicit Backend(const Tensor& like) : like_(like) {}

  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    return empty_like_device(like_, sizes, dtype);
  }
  // Its memory comes from the pool and goes back to it.
  Tensor large(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    int64_t strides[2] = {1, 1}, count = 1;
    check(sizes.size() <= 2, "pooled tensors have at most two dimensions");
    for (int64_t size : sizes) count *= size;
    if (sizes.size() == 2) strides[0] = *(sizes.begin() + 1);
    void* block = acquire_block(static_cast<size_t>(count * bytes_of(dtype)));
    return torch::stable::from_blob(block, torch::headeronly::IntHeaderOnlyArrayRef(sizes),
                                    torch::headeronly::IntHeaderOnlyArrayRef(strides, sizes.size()),
                                    like_.device(), dtype, [](void* data) { release_block(data); });
  }
  Buffer<double> doubles(int64_t count) const { return Buffer<double>(count); }
  void finish() const {}

  // ---- the loss

  static int64_t packed_bytes(const Problem& p) { return cpu::packed_bytes(p); }
  static int64_t kept_bytes(const Problem& p) { return cpu::kept_bytes(p); }
  static int64_t sampled(const Problem& p) { return p.count != nullptr ? *p.count : p.bound; }

  static int64_t most_centers(const Problem&) { return kMaxCenters; }
  static void check_values(const Problem& p) {
    const int64_t sampled = Backend::sampled(p);
    check(sampled >= 0 && sampled <= p.bound, "count must be in [0, ", p.bound, "], got ", sampled);
    for (int64_t j = 0; j < sampled && p.class_index != nullptr; ++j)
      check(p.class_index[j] >= 0 && p.class_index[j] < p.num_classes,
            "class_index must be in [0, ", p.num_classes, "), got ", p.class_index[j],
            " at position ", j);
    for (int64_t i = 0; i < p.batch * p.positives.width; ++i)
      check(p.positives.slots[i] < sampled, "slot must be below ", sampled, ", got ",
            p.positives.slots[i], " at position ", i);
    const int64_t* columns = p.embeddings.columns;
    for (int64_t k = 0; k < p.embeddings.dim && columns != nullptr; ++k)
      check(columns[k] >= 0 && columns[k] < p.dim && (k == 0 || columns[k - 1] < columns[k]),
            "feature_index must hold sorted unique dimensions in [0, ", p.dim, "), got ",
            columns[k], " at position ", k);
    check(p.total_sampled >= sampled, "total_sampled must be at least ", sampled,
          ", the classes of this shard, got ", p.total_sampled);
  }

  void forward(const Problem& p, const ShardSums& sums, const Saved& saved) const {
    cpu::forward(p, sums, saved, parallel_);
  }
  void join_targets(const JoinTargets& a) const { cpu::join_targets(a); }
  void write_results(const WriteResults& a, bool is_double) const {
    cpu::write_results(a, is_double);
  }
  void backward(const Problem& p, const Gradients& g) const {
    cpu::backward(p, g, nullptr, parallel_);
  }
  void backward_with_update(const Problem& p, const Gradients& g, const AdamWRows& rows) const {
    const RowAdamW update(rows);
    cpu::backward(p, g, &update, parallel_);
  }
  void backward_with_update(const Problem& p, const Gradients& g, const SgdRows& rows) const {
    const int64_t* ids = p.class_index;  // of the prototypes that take part
    std::vector<int64_t> of_centers;
    if (ids != nullptr && p.centers > 1) {
      for (int64_t j = 0; j < sampled(p); ++j)
        for (int64_t k = 0; k < p.centers; ++k) of_centers.push_back(ids[j] * p.centers + k);
      ids = of_centers.data();
    }
    const RowSgd update = checked(rows, ids, sampled(p) * p.centers);
    cpu::backward(p, g, &update, parallel_);
  }

  // ---- row updates

  std::tuple<Tensor, Tensor> merge_rows(const SparseGradient& gradient) const {
    const SparseGradient merged = merge(gradient);
    return {merged.ids, merged.rows};
  }
  void update(const AdamWRows& rows, const SparseGradient& gradient) const {
    const SparseGradient merged = merge(gradient);
    update_rows(RowAdamW(rows), checked(merged, rows.num_rows), parallel_);
  }
  void update(const SgdRows& rows, const SparseGradient& gradient) const {
    const SparseGradient merged = merge(gradient);
    const RowGradient view = checked(merged, rows.num_rows);
    update_rows(checked(rows, view.ids, view.count), view, parallel_);
  }

  // ---- selection

  static constexpr int64_t kMaxFeatures = INT64_MAX;

  static void check_labels(const Labels& labels) {
    const int64_t bad = find_bad_label(labels);
    if (bad >= 0)
      check(false, "labels must be in [0, ", labels.num_classes, ") or ignore_index (",
            labels.ignore_index, "), got ", label_at(labels, bad), " at position ",
            position(labels, bad));
  }
  static void check_sorted(const SlotSearch& a) {
    const int64_t start = a.labels.start, stop = a.labels.stop;
    const int64_t* ids = a.class_index;
    for (int64_t j = 0; j < a.count; ++j)
      check(ids[j] >= start && ids[j] < stop && (j == 0 || ids[j - 1] < ids[j]),
            "class_index must hold sorted unique ids in [", start, ", ", stop, "), got ", ids[j],
            " at position ", j);
  }
  void select_classes(const ClassSelection& a) const { cpu::select_classes(a, parallel_); }
  void select_features(const FeatureSelection& a) const { cpu::select_features(a); }
  void find_slots(const SlotSearch& a) const {
    const int64_t bad = cpu::find_slots(a);
    if (bad >= 0)
      check(false, "class_index must hold every label, but ", label_at(a.labels, bad),
            " at position ", position(a.labels, bad), " of labels is not in it");
  }

  // ---- the nearest centroid

  static int64_t packed_centroid_bytes(int64_t count, int64_t dim) {
    return cpu::packed_centroid_bytes(count, dim);
  }
  static void check_centroids(const FloatRows& rows) {
    for (int64_t j = 0; j < rows.count; ++j) {
      bool finite = true;
      for (int64_t k = 0; k < rows.dim; ++k) finite &= std::isfinite(rows[j][k]);
      check(finite, "centroids must be finite, but row ", j, " is not");
    }
  }
  static void check_packed(const void* packed) {
    check(fits_kernels(packed),
          "centroids were packed for another CPU capability than is in use now");
  }
  static void check_index(const int64_t* index, const char* name, int64_t rows, int64_t centroids) {
    for (int64_t i = 0; i < rows; ++i)
      check(index[i] >= -1 && index[i] < centroids, name, " must be in [-1, ", centroids, "), got ",
            index[i], " at position ", i);
  }
  void pack_centroids(const FloatRows& centroids, void* packed) const {
    cpu::pack_centroids(centroids, packed, parallel_);
  }
  void nearest(const FloatRows& rows, const int64_t* guess, const FloatRows& centroids,
               const void* packed, int64_t* index, float* score) const {
    cpu::nearest(rows, guess, centroids, packed, index, score, parallel_);
  }
  void add_unit_rows(const AddUnitRows& a) const { cpu::add_unit_rows(a, parallel_); }
  void directions(const Directions& a) const { cpu::directions(a, parallel_); }

 private:
  static int64_t label_at(const Labels& labels, int64_t position) {
    return with_labels(labels, [&](const auto* data) { return int64_t{data[position]}; });
  }

  // As a user finds it in labels [B], or [B, width].
  static std::string position(const Labels& labels, int64_t flat) {
    if (labels.width == 0) return std::to_string(flat);
    return "[" + std::to_string(flat / labels.width) + ", " + std::to_string(flat % labels.width) +
           "]";
  }

  static RowSgd checked(const SgdRows& rows, const int64_t* ids, int64_t count) {
    const int64_t bad = rows.last_step != nullptr ? find_bad_step(rows, ids, count) : -1;
    if (bad >= 0)
      check(false, "last_step must be in [", rows.now - 1 - rows.remembered, ", ", rows.now - 1,
            "], got ", rows.last_step[bad], " for row ", bad);
    return RowSgd(rows, ids, count);
  }

  // Ids of a merged gradient ascend.
  static RowGradient checked(const SparseGradient& merged, int64_t num_rows) {
    const RowGradient view = view_of(merged);
    const bool inside =
        view.count == 0 || (view.ids[0] >= 0 && view.ids[view.count - 1] < num_rows);
    check(inside, "ids must be in [0, ", num_rows, ")");
    return view;
  }

  static RowGradient view_of(const SparseGradient& g) {
    const int64_t dim = g.rows.size(1);
    return {.ids = index_data(g.ids),
            .count = g.ids.numel(),
            .rows = {.data = g.rows.mutable_data_ptr(),
                     .dtype = dtype_of(g.rows, "rows"),
                     .row_stride = dim},
            .dim = dim};
  }

  // The same gradient, its rows added up where ids repeat or are out of order.
  SparseGradient merge(const SparseGradient& gradient) const {
    const RowGradient from = view_of(gradient);
    if (strictly_ascending(from.ids, from.count)) return gradient;
    const MergedRows merged(from.ids, from.count);
    Tensor ids = empty({merged.count()}, ScalarType::Long);
    Tensor rows = large({merged.count(), from.dim}, gradient.rows.scalar_type());
    merged.write(from, ids.mutable_data_ptr<int64_t>(), view_of({ids, rows}).rows, parallel_);
    return {ids, rows};
  }

  const Tensor& like_;
  const TorchParallel parallel_;
};

}  // namespace
}  // namespace unicom::cpu
