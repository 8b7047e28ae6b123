// The search for candidates on Hopper's tensor cores. False where this path cannot take it: on other
// GPUs, and where TMA cannot copy the operands; then nothing was launched.
#pragma once

#include "nearest.h"

namespace unicom::cuda {

bool find_candidates_on_hopper(Queue&, const FindCandidates&);

}  // namespace unicom::cuda
