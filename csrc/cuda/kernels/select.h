// The selection step on GPUs. Results are those of csrc/cpu/host/select.h, with one difference: a
// label that is no class gets kInvalidSlot, since nobody can raise without waiting for the device.
#pragma once

#include "platform.h"

namespace unicom::cuda {

struct Labels {
  const void* data;  // [batch] int32 or int64
  bool is_64_bit;
  int64_t batch;
  int64_t num_classes;
  int64_t ignore_index;
  int64_t start, stop;  // the shard
};

struct ClassSelection {
  Labels labels;
  int64_t count;  // classes to draw
  int64_t seed;
  const int64_t* step;
  int64_t bound;         // length of class_index
  int64_t* class_index;  // [bound]; past the selection the last id is repeated
  int64_t* selected;     // [1] how many there are
  int64_t* slot;         // [batch]
  uint64_t* workspace;   // [selection_workspace(labels)]
};

int64_t selection_workspace(const Labels&);
void select_classes(Queue&, const ClassSelection&);

// Position of each label of the shard in class_index [count], ascending, or among all classes of
// the shard where it is null. A label that is not in class_index is invalid.
struct SlotSearch {
  Labels labels;
  const int64_t* class_index;
  int64_t count;
  int64_t* slot;
};
void find_slots(Queue&, const SlotSearch&);

constexpr int64_t kMaxFeatures = 48 * 1024 * 8;

struct FeatureSelection {
  int64_t dim, count, seed;  // dim <= kMaxFeatures
  const int64_t* step;
  int64_t* out;  // [count]
};
void select_features(Queue&, const FeatureSelection&);

}  // namespace unicom::cuda
