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

// Class panels whose cosines are kept for backward, and the bytes of one. A multiple of what kernels
// work on together (kPanelsTogether, and the centres of a class), or all of them.
constexpr int64_t kPanelsTogether = 4;
inline int64_t panels_together(const Problem& p) {
  return p.centers == 1 ? kPanelsTogether : p.centers;
}
int64_t kept_panels(const Problem&);
int64_t kept_panel_bytes(const Problem&);

class Plan : public Problem {
  std::vector<uint16_t> column_bits_;

 public:
  SourceRows embedding_rows;
  int64_t sampled;  // classes that take part
  Rounding rounding;
  int64_t kept_panels;

  explicit Plan(const Problem& p);
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  int64_t class_of(int64_t slot_index) const {
    return class_index != nullptr ? class_index[slot_index] : slot_index;
  }
  // Of a prototype in its matrix.
  int64_t row_of(int64_t slot_index, int64_t center) const {
    return class_of(slot_index) * centers + center;
  }
  // Where a prototype is among the packed ones: see layout.h.
  int64_t place_of(int64_t slot_index, int64_t center) const {
    return (slot_index / kLanes * centers + center) * kLanes + slot_index % kLanes;
  }
  // What kernels read: row j is that centre of class j.
  SourceRows prototype_rows(int64_t center) const {
    return {rows_of_center(center), column_bits_.data()};
  }
};

}  // namespace unicom::cpu
