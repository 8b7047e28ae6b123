// The operators on CUDA tensors; over the emulation of CUDA, on CPU tensors in a namespace of their
// own.
#include "../ops/library.h"
#include "backend.h"

#ifdef UNICOM_EMULATE_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(unicom_ext_emulated, m) { unicom::define_operators(m); }
STABLE_TORCH_LIBRARY_IMPL(unicom_ext_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(unicom_ext, CUDA, m) {
#endif
  unicom::implement_operators<unicom::cuda::Backend>(m);
}
