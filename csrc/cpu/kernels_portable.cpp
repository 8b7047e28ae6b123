#include "kernels_impl.h"
#include "update_impl.h"

namespace unicom::cpu {

extern const Kernels<float> kernels_fp32_portable;
extern const Kernels<BfPair> kernels_bf16_portable;
extern const Kernels<ByteQuad> kernels_int8_portable;
// float64 is for checking, not for speed: one build of it serves every CPU.
extern const Kernels<double> kernels_fp64_portable;
const Kernels<double> kernels_fp64_portable = make_kernels<double>();
const Kernels<float> kernels_fp32_portable = make_kernels<float>();
const Kernels<BfPair> kernels_bf16_portable = make_kernels<BfPair>();
const Kernels<ByteQuad> kernels_int8_portable = make_byte_kernels();

extern const UpdateKernels update_portable;
const UpdateKernels update_portable = make_update_kernels();

}  // namespace unicom::cpu
