#include "kernels_impl.h"
#include "row_steps_impl.h"

namespace unicom::cpu {

extern const Kernels<float> kernels_fp32_avx512_bf16;
extern const Kernels<BfPair> kernels_bf16_avx512_bf16;
const Kernels<float> kernels_fp32_avx512_bf16 = make_kernels<float>();
const Kernels<BfPair> kernels_bf16_avx512_bf16 = make_kernels<BfPair>();

extern const NearestKernels nearest_avx512_bf16;
const NearestKernels nearest_avx512_bf16 = make_nearest_kernels();

extern const UpdateKernels update_avx512_bf16;
const UpdateKernels update_avx512_bf16 = make_update_kernels();

}  // namespace unicom::cpu
