// Enough of CUDA to run this project's kernels as C++: clusters of blocks one after another, each
// thread a fibre. Fibres run in a random order between barriers, so that a missing barrier shows as
// a result that changes with the order. Divergent barriers and collectives, and kernels that never
// end, stop the program with a message.
//
//   shared memory        dynamic: a block of exactly the size asked for, filled with NaN before
//                        each block of threads starts; static: static variables, so not in clusters
//   asynchronous copies  happen when the thread waits for them, not before
//   warp functions       all 32 lanes must take part
//
// Include this before anything that uses CUDA. Launches wait for each other, and each is over when
// it returns.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#include "hopper_emulation.h"
#include "tensor_core.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define __restrict__ __restrict

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline const char* cudaGetErrorString(cudaError_t e) { return e ? "invalid value" : "no error"; }
using cudaStream_t = void*;
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMultiProcessorCount
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fibre that runs

namespace emulation {

// The order in which fibres run follows from this; 0 is the order of thread numbers.
void set_schedule(uint64_t seed);

void run_grid(const std::function<void()>& kernel, dim3 grid, dim3 block, dim3 cluster,
              size_t shared_bytes);
void* dynamic_shared();
// What a block may have: that of a data centre GPU by default; 99 KiB is that of the others.
void set_shared_limit(int bytes);
int shared_limit();
// Which kernels there are to choose from: those of an architecture and of all before.
void set_compute_capability(int major);
int compute_capability();
// So few that persistent blocks have several tiles.
constexpr int kMultiprocessors = 6;
void barrier();
bool barrier_or(bool predicate);

constexpr int kExchangeBytes = sizeof(Fragments);
// Every lane of the warp gives `bytes` and then sees what all gave: [32][kExchangeBytes].
const char* exchange(const void* mine, int bytes);

template <class T>
T from_lane(const char* all, int lane) {
  T value;
  std::memcpy(&value, all + lane * kExchangeBytes, sizeof(T));
  return value;
}

void copy_async(void* to, const void* from, int bytes);
void commit_copies();
void wait_copies(int pending);

inline int lane() { return static_cast<int>(threadIdx.x % 32); }

// ldmatrix.x4: of matrix m, lane l receives elements [l / 4][2 (l % 4) + {0, 1}], or the
// transposed.
inline void load_matrices(uint32_t (&r)[4], const char* row, bool transposed) {
  const char* all = exchange(&row, sizeof(row));
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int i = lane() / 4, j = 2 * (lane() % 4) + e;
      const int line = transposed ? j : i, column = transposed ? i : j;
      std::memcpy(&pair[e], from_lane<const char*>(all, 8 * m + line) + 2 * column, 2);
    }
    std::memcpy(&r[m], pair, 4);
  }
}

// mma.m16n8k16, rows of A times columns of B.
template <class Widen>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  const Widen& widen) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  Fragments mine;
  for (int i = 0; i < 6; ++i)
    for (int half : {0, 1})
      mine.of[i][half] = widen(static_cast<uint16_t>(words[i] >> (16 * half)));
  const char* all = exchange(&mine, sizeof(mine));
  multiply_add(c, lane(), *reinterpret_cast<const Fragments(*)[32]>(all));
}

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}

}  // namespace emulation

inline void __syncthreads() { emulation::barrier(); }
inline int __syncthreads_or(int predicate) { return emulation::barrier_or(predicate != 0); }

inline void __syncwarp() {
  const char nothing = 0;
  emulation::exchange(&nothing, sizeof(nothing));
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::from_lane<T>(emulation::exchange(&value, sizeof(T)), emulation::lane() ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return emulation::from_lane<T>(emulation::exchange(&value, sizeof(T)), from);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const char* all = emulation::exchange(&predicate, sizeof(predicate));
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= (emulation::from_lane<int>(all, i) != 0 ? 1u : 0u) << i;
  return votes;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <class T>
T atomicOr(T* address, T value) {
  const T before = *address;
  *address |= value;
  return before;
}
template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}
template <class T>
T atomicMax(T* address, T value) {
  const T before = *address;
  if (value > before) *address = value;
  return before;
}

inline long long __double2ll_rn(double x) { return std::llrint(x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= emulation::shared_limit() ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulation::shared_limit(); break;
    case cudaDevAttrComputeCapabilityMajor: *value = emulation::compute_capability(); break;
    case cudaDevAttrMultiProcessorCount: *value = emulation::kMultiprocessors; break;
  }
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}
template <class Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Args),
                               const std::type_identity_t<Args>& args) {
  const Args copy = args;  // parameters are passed by value
  dim3 cluster;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto& size = config->attrs[i].val.clusterDim;
    cluster = dim3(size.x, size.y, size.z);
  }
  if (config->gridDim.x % cluster.x != 0 || config->gridDim.y % cluster.y != 0 ||
      config->gridDim.z % cluster.z != 0)
    return cudaErrorInvalidValue;
  emulation::run_grid([&] { kernel(copy); }, config->gridDim, config->blockDim, cluster,
                      config->dynamicSmemBytes);
  return cudaSuccess;
}
