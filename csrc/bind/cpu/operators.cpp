// The operators on CPU tensors.
#include "../ops/library.h"
#include "backend.h"
#include "pruned_search.h"

STABLE_TORCH_LIBRARY_FRAGMENT(unicom_ext, m) { unicom::define_operators(m); }

STABLE_TORCH_LIBRARY_IMPL(unicom_ext, CPU, m) {
  unicom::implement_operators<unicom::cpu::Backend>(m);
  unicom::cpu::implement_pruned_search(m);
}
