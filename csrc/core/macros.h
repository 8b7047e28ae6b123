// What lets one header serve the host compiler and nvcc.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define UNICOM_HD __host__ __device__
#else
#define UNICOM_HD
#endif

// For what is called with the vectors of one instruction set: a copy of its own in every caller, so
// that the linker cannot hand one instruction set's copy to another.
#define UNICOM_HD_INLINED UNICOM_HD inline __attribute__((always_inline))

namespace unicom {

UNICOM_HD inline int popcount64(uint64_t word) {
#ifdef __CUDA_ARCH__
  return __popcll(word);
#else
  return __builtin_popcountll(word);
#endif
}

// Position of the lowest set bit; `word` must not be 0.
UNICOM_HD inline int lowest_bit64(uint64_t word) {
#ifdef __CUDA_ARCH__
  return __ffsll(static_cast<long long>(word)) - 1;
#else
  return __builtin_ctzll(word);
#endif
}

template <class T>
UNICOM_HD constexpr T min_of(T a, T b) {
  return b < a ? b : a;
}

template <class T>
UNICOM_HD constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}

}  // namespace unicom
