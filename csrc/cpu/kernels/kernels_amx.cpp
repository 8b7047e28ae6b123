#define UNICOM_MATRIX_UNIT
#include "kernels_impl.h"

namespace unicom::cpu {

extern const Kernels<BfPair> kernels_bf16_amx;
const Kernels<BfPair> kernels_bf16_amx = make_kernels<BfPair>();

extern const NearestKernels nearest_amx;
const NearestKernels nearest_amx = make_nearest_kernels();

}  // namespace unicom::cpu
