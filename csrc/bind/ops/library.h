// All operators of one device.
#pragma once

#include "loss.h"
#include "nearest.h"
#include "schemas.h"
#include "selection.h"
#include "updates.h"

namespace unicom {
namespace {  // types of torch::stable are hidden

template <class Library>
void define_operators(Library& m) {
  for (const char* schema : kLossSchemas) m.def(schema);
  for (const char* schema : kUpdateSchemas) m.def(schema);
  for (const char* schema : kSelectionSchemas) m.def(schema);
  for (const char* schema : kNearestSchemas) m.def(schema);
  for (const char* schema : kPrunedSearchSchemas) m.def(schema);
}

template <class Backend, class Library>
void implement_operators(Library& m) {
  m.impl("loss", TORCH_BOX(&LossOps<Backend>::loss));
  m.impl("loss_backward", TORCH_BOX(&LossOps<Backend>::backward));
  m.impl("loss_backward_adamw_", TORCH_BOX(&LossOps<Backend>::backward_adamw));
  m.impl("loss_backward_sgd_", TORCH_BOX(&LossOps<Backend>::backward_sgd));
  m.impl("loss_sums", TORCH_BOX(&LossOps<Backend>::sums));
  m.impl("loss_merge", TORCH_BOX(&LossOps<Backend>::merge));
  m.impl("merge_rows", TORCH_BOX(&UpdateOps<Backend>::merge_rows));
  m.impl("row_adamw_", TORCH_BOX(&UpdateOps<Backend>::adamw));
  m.impl("row_sgd_", TORCH_BOX(&UpdateOps<Backend>::sgd));
  m.impl("select_classes", TORCH_BOX(&SelectionOps<Backend>::classes));
  m.impl("select_features", TORCH_BOX(&SelectionOps<Backend>::features));
  m.impl("label_slots", TORCH_BOX(&SelectionOps<Backend>::slots));
  m.impl("pack_centroids", TORCH_BOX(&NearestOps<Backend>::pack_centroids));
  m.impl("nearest", TORCH_BOX(&NearestOps<Backend>::nearest));
  m.impl("add_unit_rows", TORCH_BOX(&NearestOps<Backend>::add_unit_rows));
  m.impl("directions", TORCH_BOX(&NearestOps<Backend>::directions));
}

}  // namespace
}  // namespace unicom
