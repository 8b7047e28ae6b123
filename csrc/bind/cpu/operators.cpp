// The operators on CPU tensors.
#include "../ops/library.h"
#include "backend.h"

STABLE_TORCH_LIBRARY_FRAGMENT(unicom_ext, m) { unicom::define_operators(m); }

STABLE_TORCH_LIBRARY_IMPL(unicom_ext, CPU, m) {
  unicom::implement_operators<unicom::cpu::Backend>(m);
}
