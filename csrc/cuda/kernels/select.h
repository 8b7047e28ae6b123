// The selection step on GPUs. Results are those of csrc/cpu/host/select.h, with one difference: a
// label that is no class, or is not in class_index, gets kInvalidSlot, since nobody can raise
// without waiting for the device.
#pragma once

#include "../../core/selection.h"
#include "platform.h"

namespace unicom::cuda {

int64_t selection_workspace(const Labels&);  // bytes
void select_classes(Queue&, const ClassSelection&, void* workspace);

void find_slots(Queue&, const SlotSearch&);

constexpr int64_t kMaxFeatures = 48 * 1024 * 8;
void select_features(Queue&, const FeatureSelection&);  // dim <= kMaxFeatures

}  // namespace unicom::cuda
