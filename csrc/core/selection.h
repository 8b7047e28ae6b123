// The selection step, as the bindings hand it to a device. Every pointer is the caller's and points
// to memory of that device.
#pragma once

#include <cstdint>

namespace unicom {

// Labels of the global batch, and the shard [start, stop) of the classes that is asked about.
struct Labels {
  const void* data;  // [count] int32 or int64
  bool is_64_bit;
  int64_t count;
  int64_t width;  // of a matrix [B, width] of labels; 0: a vector
  int64_t num_classes;
  int64_t ignore_index;
  int64_t start, stop;
};

// The shard's part of the selection of `count` classes for (seed, step, labels).
struct ClassSelection {
  Labels labels;
  int64_t count;
  int64_t seed;
  const int64_t* step;   // [1]
  int64_t bound;         // selection_bound of sampler.h
  int64_t* class_index;  // [bound] ids in increasing order; past the selection the last is repeated
  int64_t* selected;     // [1] how many there are
  int64_t* slot;  // [count of labels] each label's position in class_index, or a special slot
};

// Position of each label in class_index, ascending, or among all classes of the shard where it is
// null.
struct SlotSearch {
  Labels labels;
  const int64_t* class_index;  // [count] ids in [start, stop), or nullptr
  int64_t count;
  int64_t* slot;  // [count of labels]
};

// `count` of the feature dimensions [0, dim), in increasing order.
struct FeatureSelection {
  int64_t dim, count, seed;
  const int64_t* step;  // [1]
  int64_t* out;         // [count]
};

}  // namespace unicom
