// Operand types of the kernels: how they are stored and multiplied.
#pragma once

#include "../../core/macros.h"
#include "../../core/rows.h"
#include "platform.h"

namespace unicom::cuda {

// Sixteen-bit floats as they lie in memory.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// What the operands of a product are: float and double are multiplied as they are, the sixteen-bit
// types on tensor cores with float sums.
template <class Unit>
struct UnitTraits {
  using Real = float;
  static constexpr bool kTensorCores = true;
  // Probabilities are stored as p * this, so that those of a million classes stay normal numbers; and
  // unit vectors that are weighted, so that those of samples of little weight do.
  static constexpr float kProbabilityScale = 32768.0f;
};
template <>
struct UnitTraits<float> {
  using Real = float;
  static constexpr bool kTensorCores = false;
  static constexpr float kProbabilityScale = 1.0f;
};
template <>
struct UnitTraits<double> {
  using Real = double;
  static constexpr bool kTensorCores = false;
  static constexpr double kProbabilityScale = 1.0;
};
template <class Unit>
using RealOf = typename UnitTraits<Unit>::Real;

// How a tile uses shared memory.
struct TilePlan {
  int stages;    // of operands under way
  bool keeps_a;  // all of A stays there, for every tile of columns
  size_t bytes;
};

// Calls f with a value of the type that `dtype` names.
template <class F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32: return f(float{});
    case DType::kFloat64: return f(double{});
    case DType::kBFloat16: return f(BFloat{});
    case DType::kFloat16: return f(Half{});
  }
}

}  // namespace unicom::cuda
