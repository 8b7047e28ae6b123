// What the CPU works out of a problem, once a call.
#pragma once

#include <type_traits>
#include <vector>

#include "../../core/problem.h"
#include "../kernels/kernels.h"

namespace unicom::cpu {

template <class Unit>
const Kernels<Unit>& kernels_for() {
  if constexpr (std::is_same_v<Unit, float>)
    return *kernels().fp32;
  else if constexpr (std::is_same_v<Unit, double>)
    return *kernels().fp64;
  else
    return *kernels().bf16;
}

// Calls f with a value of the operand type.
template <class F>
void with_unit(const Problem& p, const F& f) {
  if (p.is_double())
    f(double{});
  else if (p.precision == Precision::kBf16)
    f(BfPair{});
  else
    f(float{});
}

// Class panels whose cosines are kept for backward, and the bytes of one. A multiple of four, or
// all of them: what the widest kernels work on together.
int64_t kept_panels(const Problem&);
int64_t kept_panel_bytes(const Problem&);

class Plan : public Problem {
  std::vector<uint16_t> column_bits_;

 public:
  SourceRows embedding_rows, prototype_rows;
  int64_t sampled;  // classes that take part
  Rounding rounding;
  int64_t kept_panels;

  explicit Plan(const Problem& p);
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  int64_t class_of(int64_t slot_index) const {
    return class_index != nullptr ? class_index[slot_index] : slot_index;
  }
};

}  // namespace unicom::cpu
