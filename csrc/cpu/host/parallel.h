// How the CPU runs loops on threads without knowing whose threads they are.
#pragma once

#include <cstdint>
#include <functional>

namespace unicom::cpu {

// Calls body(i) once for every i in [0, items), in any order, on any threads. Bodies write to
// disjoint memory, so a result never depends on the number of threads.
struct Parallel {
  virtual ~Parallel() = default;
  virtual void run(int64_t items, const std::function<void(int64_t)>& body) const = 0;
  virtual int threads() const = 0;
};

struct Serial final : Parallel {
  void run(int64_t items, const std::function<void(int64_t)>& body) const override {
    for (int64_t i = 0; i < items; ++i) body(i);
  }
  int threads() const override { return 1; }
};

}  // namespace unicom::cpu
