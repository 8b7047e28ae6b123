// Operators that draw classes and feature dimensions and find each label among them.
#pragma once

#include <tuple>

#include "../../core/sampler.h"
#include "../../core/selection.h"
#include "tensors.h"

namespace unicom {
namespace {  // types of torch::stable are hidden

// A Backend has:
//
//   static constexpr int64_t kMaxFeatures
//   static void check_labels(const Labels&), check_sorted(const SlotSearch&)
//   select_classes(const ClassSelection&), find_slots(const SlotSearch&)
//   select_features(const FeatureSelection&)
template <class Backend>
struct SelectionOps {
  static std::tuple<Tensor, Tensor, Tensor> classes(Tensor labels, Tensor step, int64_t num_classes,
                                                    int64_t num_sampled, int64_t seed,
                                                    int64_t ignore_index, int64_t start,
                                                    int64_t stop) {
    labels = torch::stable::contiguous(labels);
    const Labels described = labels_of(labels, num_classes, ignore_index, start, stop);
    check(num_sampled >= 0 && num_sampled <= num_classes, "num_sampled must be in [0, ",
          num_classes, "], got ", num_sampled);
    check_device(step, labels, "step");
    const int64_t* steps = step_data(step);
    Backend::check_labels(described);
    const int64_t batch = labels.numel();
    const int64_t bound = selection_bound(num_classes, num_sampled, batch, start, stop);
    Backend on(labels);
    Tensor class_index = on.empty({bound}, ScalarType::Long);
    Tensor count = on.empty({}, ScalarType::Long);
    Tensor slot = like_labels(on, labels);
    on.select_classes({.labels = described,
                       .count = num_sampled,
                       .seed = seed,
                       .step = steps,
                       .bound = bound,
                       .class_index = class_index.mutable_data_ptr<int64_t>(),
                       .selected = count.mutable_data_ptr<int64_t>(),
                       .slot = slot.mutable_data_ptr<int64_t>()});
    on.finish();
    return {class_index, count, slot};
  }

  static Tensor features(Tensor step, int64_t dim, int64_t num_selected, int64_t seed) {
    check(num_selected >= 1 && num_selected <= dim, "num_selected must be in [1, ", dim, "], got ",
          num_selected);
    check(dim <= Backend::kMaxFeatures, "dim must be at most ", Backend::kMaxFeatures,
          " on CUDA, got ", dim);
    const int64_t* steps = step_data(step);
    Backend on(step);
    Tensor out = on.empty({num_selected}, ScalarType::Long);
    on.select_features({.dim = dim,
                        .count = num_selected,
                        .seed = seed,
                        .step = steps,
                        .out = out.mutable_data_ptr<int64_t>()});
    on.finish();
    return out;
  }

  static Tensor slots(Tensor labels, MaybeTensor class_index, int64_t num_classes,
                      int64_t ignore_index, int64_t start, int64_t stop) {
    labels = torch::stable::contiguous(labels);
    SlotSearch search{.labels = labels_of(labels, num_classes, ignore_index, start, stop),
                      .class_index = nullptr,
                      .count = 0,
                      .slot = nullptr};
    if (class_index) {
      check(class_index->dim() == 1 && class_index->scalar_type() == ScalarType::Long,
            "class_index must be an int64 vector, got ",
            torch::headeronly::toString(class_index->scalar_type()), " with ", class_index->dim(),
            " dimensions");
      check_device(*class_index, labels, "class_index");
      class_index = torch::stable::contiguous(*class_index);
      search.class_index = index_data(*class_index);
      search.count = class_index->numel();
    }
    Backend::check_sorted(search);
    Backend::check_labels(search.labels);
    Backend on(labels);
    Tensor slot = like_labels(on, labels);
    search.slot = slot.mutable_data_ptr<int64_t>();
    on.find_slots(search);
    on.finish();
    return slot;
  }

 private:
  static Labels labels_of(const Tensor& labels, int64_t num_classes, int64_t ignore_index,
                          int64_t start, int64_t stop) {
    check(labels.dim() == 1 || labels.dim() == 2, "labels must be [B] or [B, P], got ",
          labels.dim(), " dimensions");
    const bool is_64_bit = labels.scalar_type() == ScalarType::Long;
    check(is_64_bit || labels.scalar_type() == ScalarType::Int,
          "labels must be int32 or int64, got ", torch::headeronly::toString(labels.scalar_type()));
    check(num_classes >= 1 && num_classes <= kMaxClasses, "num_classes must be in [1, ",
          kMaxClasses, "], got ", num_classes);
    check(0 <= start && start <= stop && stop <= num_classes,
          "start and stop must satisfy 0 <= start <= stop <= ", num_classes, ", got ", start,
          " and ", stop);
    return {.data = labels.const_data_ptr(),
            .is_64_bit = is_64_bit,
            .count = labels.numel(),
            .width = labels.dim() == 2 ? labels.size(1) : 0,
            .num_classes = num_classes,
            .ignore_index = ignore_index,
            .start = start,
            .stop = stop};
  }

  static Tensor like_labels(const Backend& on, const Tensor& labels) {
    if (labels.dim() == 1) return on.empty({labels.size(0)}, ScalarType::Long);
    return on.empty({labels.size(0), labels.size(1)}, ScalarType::Long);
  }

  static const int64_t* step_data(const Tensor& step) {
    check(step.numel() == 1 && step.scalar_type() == ScalarType::Long,
          "step must be one int64 value");
    return index_data(step);
  }
};

}  // namespace
}  // namespace unicom
