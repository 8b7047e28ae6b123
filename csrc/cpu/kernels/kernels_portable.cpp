#include "kernels_impl.h"
#include "row_steps_impl.h"

namespace unicom::cpu {

extern const Kernels<float> kernels_fp32_portable;
extern const Kernels<BfPair> kernels_bf16_portable;
// float64 is for checking, not for speed: one build of it serves every CPU.
extern const Kernels<double> kernels_fp64_portable;
const Kernels<double> kernels_fp64_portable = make_kernels<double>();
const Kernels<float> kernels_fp32_portable = make_kernels<float>();
const Kernels<BfPair> kernels_bf16_portable = make_kernels<BfPair>();

extern const NearestKernels nearest_portable;
const NearestKernels nearest_portable = make_nearest_kernels();

extern const UpdateKernels update_portable;
const UpdateKernels update_portable = make_update_kernels();

}  // namespace unicom::cpu
