// What the kernels and their launches need of CUDA. The tests compile the same sources as C++
// against an emulation of it (tests/emulation/cuda_emulation.h).
#pragma once

#ifdef UNICOM_EMULATE_CUDA
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace unicom::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of a block, unless a kernel says otherwise
constexpr int kWarpsPerBlock = kThreads / kWarp;

// Where launches go, and the first error of any of them; after an error nothing more is launched.
struct Queue {
  cudaStream_t stream = nullptr;
  cudaError_t error = cudaSuccess;

  // `cluster`: blocks that are side by side in x, which run at once and see each other's shared
  // memory; grid.x is a multiple of it.
  template <class Args>
  void launch(void (*kernel)(Args), dim3 grid, int threads, size_t shared_bytes,
              const std::type_identity_t<Args>& args, int cluster = 1) {
    if (error != cudaSuccess || grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    constexpr size_t kDefaultLimit = 48 << 10;
    if (shared_bytes > kDefaultLimit) {
      // The attribute is the kernel's, not the launch's: always the device's limit, so that threads
      // which launch at once with different sizes do not take it from each other.
      const auto limit = static_cast<int>(shared_limit());
      if (error == cudaSuccess)
        error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
    }
    if (error != cudaSuccess) return;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, args);
  }

  // Most shared memory that a block may have.
  size_t shared_limit() {
    return static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared_limit_));
  }

  int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount, &multiprocessors_); }

  // Whether the device is a Hopper, and the build has code for it. Measurements turn it off.
  bool is_hopper() {
#ifdef UNICOM_HOPPER
    static const bool wanted = [] {
      const char* given = std::getenv("UNICOM_CUDA_HOPPER");
      if (given != nullptr && std::strcmp(given, "0") != 0 && std::strcmp(given, "1") != 0)
        throw std::runtime_error("UNICOM_CUDA_HOPPER must be 0 or 1, got '" + std::string(given) +
                                 "'");
      return given == nullptr || *given == '1';
    }();
    return wanted && attribute(cudaDevAttrComputeCapabilityMajor, &capability_) == 9;
#else
    return false;
#endif
  }

  void fill_zero(void* data, int64_t bytes) {
    if (error != cudaSuccess || bytes == 0) return;
    error = cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), stream);
  }

 private:
  // The device's, which is asked once.
  int attribute(cudaDeviceAttr which, int* known) {
    int device = 0;
    if (*known == 0 && error == cudaSuccess) error = cudaGetDevice(&device);
    if (*known == 0 && error == cudaSuccess) error = cudaDeviceGetAttribute(known, which, device);
    return *known;
  }

  int shared_limit_ = 0, capability_ = 0, multiprocessors_ = 0;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Blocks of kThreads for one thread, or one warp, per item.
inline dim3 thread_grid(int64_t items) {
  return dim3(static_cast<unsigned>(ceil_div(items, kThreads)));
}
inline dim3 warp_grid(int64_t items) {
  return dim3(static_cast<unsigned>(ceil_div(items, kWarpsPerBlock)));
}

}  // namespace unicom::cuda
