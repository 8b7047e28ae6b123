// The logits on Hopper's tensor cores. False where this path cannot take them: on other GPUs, with
// several centres, and where TMA cannot copy the operands; then nothing was launched.
#pragma once

#include "logits.h"

namespace unicom::cuda {

template <class Unit>
bool sum_exp_on_hopper(Queue&, const SumExp&);
template <class Unit>
bool probabilities_on_hopper(Queue&, const Probabilities&);

}  // namespace unicom::cuda
