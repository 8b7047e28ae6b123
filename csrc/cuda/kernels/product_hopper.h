// The products of backward on Hopper's tensor cores. False where this path cannot take them: on
// other GPUs, and where TMA cannot copy the operands; then nothing was launched.
#pragma once

#include "product.h"

namespace unicom::cuda {

template <class Unit>
bool product_on_hopper(Queue&, const Product&);

}  // namespace unicom::cuda
