// Where the operands of one product lie.
#pragma once

#include "device.cuh"

namespace unicom::cuda {

template <class Unit>
struct OperandPair {
  const Unit* a;  // first row, depth 0
  const Unit* b;
  int a_stride, b_stride;  // 32 bits, to spare registers: a tile never spans 2^31 values
};

}  // namespace unicom::cuda
