// How work and memory are cut on GPUs.
#pragma once

#include "../kernels/platform.h"

namespace unicom::cuda {

// Blocks that fill the largest GPUs twice over: work is cut until there are about as many.
constexpr int64_t kWantedBlocks = 528;

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
