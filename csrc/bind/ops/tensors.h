// What the torch operators share. They go through torch's stable ABI: one binary loads in every
// torch >= 2.11.
//
// Each operator is functional (it writes only tensors it returns), checks everything it is given
// before it touches memory, and hands plain pointers to the engine. Autograd and fake kernels are
// registered from Python (unicom_ext/functional.py).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "../../cpu/host/buffers.h"
#include "../../cpu/host/parallel.h"
#include "../../cpu/kernels/layout.h"

namespace unicom {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// std::invalid_argument reaches Python as a ValueError.
template <class... Parts>
void check(bool good, const Parts&... parts) {
  if (good) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// Torch's own threads; items are handed out one by one, so uneven ones balance.
struct TorchParallel final : Parallel {
  int threads() const override { return static_cast<int>(torch::stable::get_num_threads()); }
  void run(int64_t items, const std::function<void(int64_t)>& body) const override {
    const int64_t workers = std::min<int64_t>(items, threads());
    std::atomic<int64_t> next{0};
    std::exception_ptr failure;
    std::atomic<bool> failed{false};
    auto work = [&](int64_t, int64_t) {
      try {
        for (int64_t i; (i = next.fetch_add(1)) < items;) body(i);
      } catch (...) {  // out of memory: stop all, then raise on the caller's thread
        next.store(items);
        if (!failed.exchange(true)) failure = std::current_exception();
      }
    };
    if (workers <= 1)
      work(0, 1);
    else
      torch::stable::parallel_for(0, workers, 1, work);
    if (failure) std::rethrow_exception(failure);
  }
};

inline cpu::DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return cpu::DType::kFloat32;
    case ScalarType::Double: return cpu::DType::kFloat64;
    case ScalarType::BFloat16: return cpu::DType::kBFloat16;
    case ScalarType::Half: return cpu::DType::kFloat16;
    default:
      check(false, name, " must be float32, float64, bfloat16 or float16, got ",
            torch::headeronly::toString(tensor.scalar_type()));
  }
  return {};
}

inline Tensor empty_like_device(const Tensor& like, std::initializer_list<int64_t> sizes,
                                ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes), dtype);
}

// A tensor whose memory comes from the pool and goes back to it.
inline Tensor pooled(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype,
                     int64_t bytes_per_value) {
  int64_t strides[2] = {1, 1}, count = 1;
  check(sizes.size() <= 2, "pooled tensors have at most two dimensions");
  for (int64_t size : sizes) count *= size;
  if (sizes.size() == 2) strides[0] = *(sizes.begin() + 1);
  void* block = acquire_block(static_cast<size_t>(count * bytes_per_value));
  return torch::stable::from_blob(block, torch::headeronly::IntHeaderOnlyArrayRef(sizes),
                                  torch::headeronly::IntHeaderOnlyArrayRef(strides, sizes.size()),
                                  like.device(), dtype, [](void* data) { release_block(data); });
}

inline void check_matrix(const Tensor& tensor, const char* name) {
  check(tensor.dim() == 2, name, " must be a matrix, got ", tensor.dim(), " dimensions");
}

inline void check_vector(const Tensor& tensor, const char* name, int64_t size, ScalarType dtype) {
  check(tensor.dim() == 1 && tensor.size(0) == size && tensor.scalar_type() == dtype, name,
        " must be ", torch::headeronly::toString(dtype), " of shape [", size, "]");
}

inline const int64_t* index_data(const Tensor& index) { return index.const_data_ptr<int64_t>(); }

}  // namespace unicom
