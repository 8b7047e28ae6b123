// What the torch operators share. They go through torch's stable ABI: one binary loads in every
// torch >= 2.11.
//
// Each operator checks everything that it is given before it touches memory, and hands plain
// pointers to the device's host code. The bodies are templates over a Backend, one for each device
// (bind/cpu/backend.h, bind/cuda/backend.h). An object of it is one call:
//
//   Backend(like)             of an operator whose results lie where `like` does
//   empty(sizes, dtype)       memory for a result; large(...) where it may be much
//   finish()                  raises what went wrong on the way
//
// and the steps of each family of operators, as its template asks for them; those named check_ look
// at values, as far as the host can see them. Autograd and fake kernels are registered from Python
// (unicom_ext/ops).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>

#include "../../core/rows.h"

namespace unicom {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// std::invalid_argument reaches Python as a ValueError.
template <class... Parts>
void check(bool good, const Parts&... parts) {
  if (good) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default:
      check(false, name, " must be float32, float64, bfloat16 or float16, got ",
            torch::headeronly::toString(tensor.scalar_type()));
  }
  return {};
}

inline int64_t bytes_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte: return 1;
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    case ScalarType::Float: return 4;
    default: return 8;
  }
}

inline Tensor empty_like_device(const Tensor& like, std::initializer_list<int64_t> sizes,
                                ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes), dtype);
}

inline void check_matrix(const Tensor& tensor, const char* name) {
  check(tensor.dim() == 2, name, " must be a matrix, got ", tensor.dim(), " dimensions");
}

inline void check_vector(const Tensor& tensor, const char* name, int64_t size, ScalarType dtype) {
  check(tensor.dim() == 1 && tensor.size(0) == size && tensor.scalar_type() == dtype, name,
        " must be ", torch::headeronly::toString(dtype), " of shape [", size, "]");
}

inline void check_device(const Tensor& tensor, const Tensor& like, const char* name) {
  check(tensor.device() == like.device(), name, " must be on the device of the other tensors");
}

inline FloatRows float_rows(const Tensor& tensor, const char* name) {
  check_matrix(tensor, name);
  check(tensor.scalar_type() == ScalarType::Float, name, " must be float32, got ",
        torch::headeronly::toString(tensor.scalar_type()));
  check(tensor.size(1) >= 1, name, " must have at least one column");
  check(tensor.stride(1) == 1 || tensor.size(1) == 1, name, " must have unit column stride");
  return {.data = tensor.const_data_ptr<float>(),
          .count = tensor.size(0),
          .dim = tensor.size(1),
          .stride = tensor.stride(0)};
}

// Never null, which says that there is no index: torch has no address for one that is empty.
inline const int64_t* index_data(const Tensor& index) {
  static const int64_t nothing = 0;
  return index.numel() == 0 ? &nothing : index.const_data_ptr<int64_t>();
}

}  // namespace unicom
