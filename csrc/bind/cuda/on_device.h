// What the operators on CUDA tensors share.
#pragma once

#include <tuple>

#include "../../cuda/kernels/platform.h"
#include "../ops/tensors.h"

#ifndef UNICOM_EMULATE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace unicom::cuda {
namespace {  // types of torch::stable are hidden

// The device of a call and its current stream.
class OnDevice {
 public:
#ifdef UNICOM_EMULATE_CUDA
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    queue.stream = static_cast<cudaStream_t>(stream);
  }
#endif

  // Raises the first error of the launches, if there was one.
  void finish() const {
    if (queue.error == cudaSuccess) return;
    std::string message =
        std::string("a CUDA kernel could not be started: ") + cudaGetErrorString(queue.error);
#ifndef UNICOM_EMULATE_CUDA
    if (queue.error == cudaErrorNoKernelImageForDevice ||
        queue.error == cudaErrorInvalidDeviceFunction ||
        queue.error == cudaErrorUnsupportedPtxVersion)
      message += ". unicom_ext needs a GPU of compute capability 8.0 (Ampere) or newer";
    cudaGetLastError();  // so that it is not reported again elsewhere
#endif
    throw std::runtime_error(message);
  }

  Queue queue;

 private:
#ifndef UNICOM_EMULATE_CUDA
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// Memory of the caching allocator. Through the stable ABI its errors have lost their type and their
// message: where the device still answers, it was out of memory, and unicom_ext/ops/library.py makes
// torch's error of ours.
inline Tensor allocate(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  try {
    return empty_like_device(like, sizes, dtype);
  } catch (const std::exception&) {
#ifndef UNICOM_EMULATE_CUDA
    size_t free = 0, total = 0;
    if (cudaMemGetInfo(&free, &total) != cudaSuccess) throw;
#endif
    std::ostringstream message;
    message << "CUDA out of memory. unicom_ext tried to allocate "
            << torch::headeronly::toString(dtype) << " [";
    const char* separator = "";
    for (int64_t size : sizes) {
      message << separator << size;
      separator = ", ";
    }
    message << "]";
    throw std::runtime_error(message.str());
  }
}

// The sorted keys, and where each of them was.
inline std::tuple<Tensor, Tensor> sort_stably(const Tensor& keys) {
  using torch::stable::detail::from;
  StableIValue stack[4] = {from(keys), from(std::optional<bool>(true)), from(int64_t{0}),
                           from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack, TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

inline void check_device(const Tensor& tensor, const Tensor& like, const char* name) {
  check(tensor.device() == like.device(), name, " must be on the device of the other tensors");
}

}  // namespace
}  // namespace unicom::cuda
