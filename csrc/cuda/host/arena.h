// How work and memory are cut on GPUs.
#pragma once

#include "../kernels/platform.h"

namespace unicom::cuda {

// Work is cut for a GPU of this many multiprocessors (Hopper's), whatever the one at hand has: so
// all of them add in the same order.
constexpr int64_t kMultiprocessors = 132;
// Where blocks do not need the whole multiprocessor, or are of unequal length.
constexpr int64_t kWantedBlocks = 4 * kMultiprocessors;

// Hands out pieces of one block of memory; over a null block it only adds up their sizes.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = base_ != nullptr ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace unicom::cuda
