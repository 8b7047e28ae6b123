// What the kernels and their launches need of CUDA. The tests compile the same sources as C++
// against an emulation of it (tests/emulation/cuda_emulation.h).
#pragma once

#ifdef UNICOM_EMULATE_CUDA
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <type_traits>

namespace unicom::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of a block, unless a kernel says otherwise
constexpr int kWarpsPerBlock = kThreads / kWarp;

// Where launches go, and the first error of any of them; after an error nothing more is launched.
struct Queue {
  cudaStream_t stream = nullptr;
  cudaError_t error = cudaSuccess;

  template <class Args>
  void launch(void (*kernel)(Args), dim3 grid, int threads, size_t shared_bytes,
              const std::type_identity_t<Args>& args) {
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
    error = cudaLaunchKernelEx(&config, kernel, args);
  }

  // Most shared memory that a block may have.
  size_t shared_limit() {
    if (shared_limit_ == 0 && error == cudaSuccess) {
      int device = 0, bytes = 0;
      error = cudaGetDevice(&device);
      if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      shared_limit_ = static_cast<size_t>(bytes);
    }
    return shared_limit_;
  }

  void fill_zero(void* data, int64_t bytes) {
    if (error != cudaSuccess || bytes == 0) return;
    error = cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), stream);
  }

 private:
  size_t shared_limit_ = 0;
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
