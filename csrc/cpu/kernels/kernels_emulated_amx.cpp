#define UNICOM_VECTOR_BYTES 64
#define UNICOM_MATRIX_UNIT
#include "kernels_impl.h"

namespace unicom::cpu {

extern const Kernels<BfPair> kernels_bf16_emulated_amx;
const Kernels<BfPair> kernels_bf16_emulated_amx = make_kernels<BfPair>();

extern const NearestKernels nearest_emulated_amx;
const NearestKernels nearest_emulated_amx = make_nearest_kernels();

}  // namespace unicom::cpu
