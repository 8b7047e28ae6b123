// What kernels share: who a thread is, warp functions, conversions. For device code only.
#pragma once

#include "types.h"

#ifndef UNICOM_EMULATE_CUDA
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#define UNICOM_DEVICE __device__ __forceinline__

namespace unicom::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

UNICOM_DEVICE int64_t global_thread() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}
UNICOM_DEVICE int64_t global_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
}
UNICOM_DEVICE int lane_index() { return static_cast<int>(threadIdx.x % kWarp); }

// Sum over the warp, the same on every lane; the order of additions is fixed.
template <class T>
UNICOM_DEVICE T warp_sum(T value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}
template <class T>
UNICOM_DEVICE T warp_max(T value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2)
    value = max_of(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}
template <class T>
UNICOM_DEVICE T warp_or(T value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value |= __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// One instruction, where the comparison of max_of takes two. A NaN gives way to the other.
UNICOM_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
UNICOM_DEVICE double larger(double a, double b) { return fmax(a, b); }

// A product that is rounded before it is added to anything, as on the CPU.
UNICOM_DEVICE double rounded_product(double a, double b) {
#ifdef UNICOM_EMULATE_CUDA
  return a * b;
#else
  return __dmul_rn(a, b);
#endif
}

// The shared memory whose size the launch gives, aligned as swizzled boxes of TMA ask for.
template <class T>
UNICOM_DEVICE T* dynamic_shared() {
#ifdef UNICOM_EMULATE_CUDA
  return static_cast<T*>(emulation::dynamic_shared());
#else
  extern __shared__ __align__(1024) unsigned char unicom_dynamic_shared[];
  return reinterpret_cast<T*>(unicom_dynamic_shared);
#endif
}

// A few values that are written at once.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};

UNICOM_DEVICE float widen(float x) { return x; }
UNICOM_DEVICE double widen(double x) { return x; }
#ifdef UNICOM_EMULATE_CUDA
UNICOM_DEVICE float widen(Half x) { return emulation::half_to_float(x.bits); }
UNICOM_DEVICE float widen(BFloat x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}
#else
UNICOM_DEVICE float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }
UNICOM_DEVICE float widen(BFloat x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }
#endif

// Rounds to nearest even.
template <class T>
UNICOM_DEVICE T narrow(float x) {
  return static_cast<T>(x);
}
template <class T>
UNICOM_DEVICE T narrow(double x) {
  if constexpr (sizeof(T) == 2)
    return narrow<T>(static_cast<float>(x));
  else
    return static_cast<T>(x);
}
#ifdef UNICOM_EMULATE_CUDA
template <>
UNICOM_DEVICE Half narrow<Half>(float x) {
  return {__builtin_bit_cast(uint16_t, static_cast<_Float16>(x))};
}
template <>
UNICOM_DEVICE BFloat narrow<BFloat>(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fffu : rounded)};
}
#else
template <>
UNICOM_DEVICE Half narrow<Half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
UNICOM_DEVICE BFloat narrow<BFloat>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
#endif

}  // namespace unicom::cuda
