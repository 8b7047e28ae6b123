// The selection on CUDA tensors, and over the emulation of CUDA, see cuda_loss_ops.cpp.
#include "../../cuda/kernels/select.h"

#include <tuple>

#include "../../core/sampler.h"
#include "../ops/schemas.h"
#include "on_device.h"

namespace unicom::cuda {
namespace {

Labels labels_of(const Tensor& labels, int64_t num_classes, int64_t ignore_index, int64_t start,
                 int64_t stop) {
  check(labels.dim() == 1, "labels must be a vector, got ", labels.dim(), " dimensions");
  const bool is_64_bit = labels.scalar_type() == ScalarType::Long;
  check(is_64_bit || labels.scalar_type() == ScalarType::Int, "labels must be int32 or int64, got ",
        torch::headeronly::toString(labels.scalar_type()));
  check(num_classes >= 1 && num_classes <= kMaxClasses, "num_classes must be in [1, ", kMaxClasses,
        "], got ", num_classes);
  check(0 <= start && start <= stop && stop <= num_classes,
        "start and stop must satisfy 0 <= start <= stop <= ", num_classes, ", got ", start, " and ",
        stop);
  return {
      labels.const_data_ptr(), is_64_bit, labels.numel(), num_classes, ignore_index, start, stop};
}

const int64_t* step_data(const Tensor& step) {
  check(step.numel() == 1 && step.scalar_type() == ScalarType::Long,
        "step must be one int64 value");
  return index_data(step);
}

std::tuple<Tensor, Tensor, Tensor> select_classes_op(Tensor labels, Tensor step,
                                                     int64_t num_classes, int64_t num_sampled,
                                                     int64_t seed, int64_t ignore_index,
                                                     int64_t start, int64_t stop) {
  labels = torch::stable::contiguous(labels);
  check_device(step, labels, "step");
  const Labels described = labels_of(labels, num_classes, ignore_index, start, stop);
  check(num_sampled >= 1 && num_sampled <= num_classes, "num_sampled must be in [1, ", num_classes,
        "], got ", num_sampled);
  OnDevice on(labels);
  const int64_t batch = labels.numel();
  const int64_t bound = selection_bound(num_classes, num_sampled, batch, start, stop);
  Tensor class_index = allocate(labels, {bound}, ScalarType::Long);
  Tensor count = allocate(labels, {}, ScalarType::Long);
  Tensor slot = allocate(labels, {batch}, ScalarType::Long);
  Tensor workspace = allocate(labels, {selection_workspace(described)}, ScalarType::Long);
  select_classes(on.queue, {described, num_sampled, seed, step_data(step), bound,
                            class_index.mutable_data_ptr<int64_t>(),
                            count.mutable_data_ptr<int64_t>(), slot.mutable_data_ptr<int64_t>(),
                            static_cast<uint64_t*>(workspace.mutable_data_ptr())});
  on.finish();
  return {class_index, count, slot};
}

Tensor select_features_op(Tensor step, int64_t dim, int64_t num_selected, int64_t seed) {
  check(num_selected >= 1 && num_selected <= dim, "num_selected must be in [1, ", dim, "], got ",
        num_selected);
  check(dim <= kMaxFeatures, "dim must be at most ", kMaxFeatures, " on CUDA, got ", dim);
  OnDevice on(step);
  Tensor out = allocate(step, {num_selected}, ScalarType::Long);
  select_features(on.queue,
                  {dim, num_selected, seed, step_data(step), out.mutable_data_ptr<int64_t>()});
  on.finish();
  return out;
}

Tensor label_slots_op(Tensor labels, std::optional<Tensor> class_index, int64_t num_classes,
                      int64_t ignore_index, int64_t start, int64_t stop) {
  labels = torch::stable::contiguous(labels);
  const Labels described = labels_of(labels, num_classes, ignore_index, start, stop);
  SlotSearch search{described, nullptr, 0, nullptr};
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
  OnDevice on(labels);
  Tensor slot = allocate(labels, {labels.numel()}, ScalarType::Long);
  search.slot = slot.mutable_data_ptr<int64_t>();
  find_slots(on.queue, search);
  on.finish();
  return slot;
}

}  // namespace
}  // namespace unicom::cuda

#ifdef UNICOM_EMULATE_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(unicom_ext_emulated, m) {
  for (const char* schema : unicom::kSelectionSchemas) m.def(schema);
}
STABLE_TORCH_LIBRARY_IMPL(unicom_ext_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(unicom_ext, CUDA, m) {
#endif
  m.impl("select_classes", TORCH_BOX(&unicom::cuda::select_classes_op));
  m.impl("select_features", TORCH_BOX(&unicom::cuda::select_features_op));
  m.impl("label_slots", TORCH_BOX(&unicom::cuda::label_slots_op));
}
