// Operators that draw classes and feature dimensions and find each label among them.
#include <algorithm>
#include <tuple>

#include "../../core/sampler.h"
#include "../../cpu/host/select.h"
#include "../ops/schemas.h"
#include "../ops/tensors.h"

namespace unicom {
namespace {

template <class F>
auto with_labels(const Tensor& labels, const F& f) {
  check(labels.dim() == 1, "labels must be a vector, got ", labels.dim(), " dimensions");
  if (labels.scalar_type() == ScalarType::Int) return f(labels.const_data_ptr<int32_t>());
  check(labels.scalar_type() == ScalarType::Long, "labels must be int32 or int64, got ",
        torch::headeronly::toString(labels.scalar_type()));
  return f(labels.const_data_ptr<int64_t>());
}

template <class Label>
void check_labels(const Label* labels, int64_t batch, int64_t num_classes, int64_t ignore_index) {
  const int64_t bad = find_bad_label(labels, batch, num_classes, ignore_index);
  check(bad < 0, "labels must be in [0, ", num_classes, ") or ignore_index (", ignore_index,
        "), got ", bad < 0 ? 0 : static_cast<int64_t>(labels[bad]), " at position ", bad);
}

void check_range(int64_t start, int64_t stop, int64_t num_classes) {
  check(0 <= start && start <= stop && stop <= num_classes,
        "start and stop must satisfy 0 <= start <= stop <= ", num_classes, ", got ", start, " and ",
        stop);
}

std::tuple<Tensor, Tensor, Tensor> select_classes_op(Tensor labels, Tensor step,
                                                     int64_t num_classes, int64_t num_sampled,
                                                     int64_t seed, int64_t ignore_index,
                                                     int64_t start, int64_t stop) {
  labels = torch::stable::contiguous(labels);
  check(num_classes >= 1, "num_classes must be at least 1, got ", num_classes);
  check(num_sampled >= 1 && num_sampled <= num_classes, "num_sampled must be in [1, ", num_classes,
        "], got ", num_sampled);
  check_range(start, stop, num_classes);
  check(step.numel() == 1 && step.scalar_type() == ScalarType::Long,
        "step must be one int64 value");
  const int64_t batch = labels.numel();
  const int64_t bound = selection_bound(num_classes, num_sampled, batch, start, stop);
  return with_labels(labels, [&](const auto* data) {
    check_labels(data, batch, num_classes, ignore_index);
    Tensor class_index = empty_like_device(labels, {bound}, ScalarType::Long);
    Tensor count = empty_like_device(labels, {}, ScalarType::Long);
    Tensor slot = empty_like_device(labels, {batch}, ScalarType::Long);
    int64_t* ids = class_index.mutable_data_ptr<int64_t>();
    const int64_t selected =
        select_classes(data, batch, num_classes, num_sampled, seed, *index_data(step), ignore_index,
                       start, stop, ids, slot.mutable_data_ptr<int64_t>(), TorchParallel());
    std::fill(ids + selected, ids + bound, selected > 0 ? ids[selected - 1] : 0);
    *count.mutable_data_ptr<int64_t>() = selected;
    return std::make_tuple(class_index, count, slot);
  });
}

Tensor select_features_op(Tensor step, int64_t dim, int64_t num_selected, int64_t seed) {
  check(num_selected >= 1 && num_selected <= dim, "num_selected must be in [1, ", dim, "], got ",
        num_selected);
  check(step.numel() == 1 && step.scalar_type() == ScalarType::Long,
        "step must be one int64 value");
  Tensor out = empty_like_device(step, {num_selected}, ScalarType::Long);
  select_features(dim, num_selected, seed, *index_data(step), out.mutable_data_ptr<int64_t>());
  return out;
}

// Position of each label of the shard [start, stop) among its class ids: all of them, or an
// ascending list; else kIgnoredSlot or kElsewhereSlot.
Tensor label_slots_op(Tensor labels, std::optional<Tensor> class_index, int64_t num_classes,
                      int64_t ignore_index, int64_t start, int64_t stop) {
  labels = torch::stable::contiguous(labels);
  check_range(start, stop, num_classes);
  const int64_t batch = labels.numel();
  const int64_t* ids = nullptr;
  int64_t count = 0;
  if (class_index) {
    check(class_index->dim() == 1 && class_index->scalar_type() == ScalarType::Long,
          "class_index must be an int64 vector, got ",
          torch::headeronly::toString(class_index->scalar_type()), " with ", class_index->dim(),
          " dimensions");
    class_index = torch::stable::contiguous(*class_index);
    ids = index_data(*class_index);
    count = class_index->numel();
    for (int64_t j = 0; j < count; ++j)
      check(ids[j] >= start && ids[j] < stop && (j == 0 || ids[j - 1] < ids[j]),
            "class_index must hold sorted unique ids in [", start, ", ", stop, "), got ", ids[j],
            " at position ", j);
  }
  return with_labels(labels, [&](const auto* data) {
    check_labels(data, batch, num_classes, ignore_index);
    Tensor slot = empty_like_device(labels, {batch}, ScalarType::Long);
    int64_t* out = slot.mutable_data_ptr<int64_t>();
    for (int64_t i = 0; i < batch; ++i) {
      const int64_t label = data[i];
      if (label == ignore_index) {
        out[i] = kIgnoredSlot;
      } else if (label < start || label >= stop) {
        out[i] = kElsewhereSlot;
      } else if (ids == nullptr) {
        out[i] = label - start;
      } else {
        const int64_t* found = std::lower_bound(ids, ids + count, label);
        check(found != ids + count && *found == label, "class_index must hold every label, but ",
              label, " at position ", i, " of labels is not in it");
        out[i] = found - ids;
      }
    }
    return slot;
  });
}

}  // namespace
}  // namespace unicom

STABLE_TORCH_LIBRARY_FRAGMENT(unicom_ext, m) {
  for (const char* schema : unicom::kSelectionSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(unicom_ext, CPU, m) {
  m.impl("select_classes", TORCH_BOX(&unicom::select_classes_op));
  m.impl("select_features", TORCH_BOX(&unicom::select_features_op));
  m.impl("label_slots", TORCH_BOX(&unicom::label_slots_op));
}
