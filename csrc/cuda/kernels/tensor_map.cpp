#include "tensor_map.h"

#include <cudaTypedefs.h>

#include <cstdint>

namespace unicom::cuda {

namespace {

// The driver's function, which is found at run time: nothing is linked to the driver. Null where
// there is none.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const auto found = [] {
    constexpr unsigned kVersion = 12000;
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &function, kVersion, cudaEnableDefault, &result);
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) function = nullptr;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return found;
}

}  // namespace

bool has_tensor_maps() { return encoder() != nullptr; }

bool make_tensor_map(TensorMap* map, const void* data, int64_t rows, int64_t cols, int64_t stride,
                     int box_rows) {
  constexpr int64_t kBytes = 2;                    // of a value
  constexpr int64_t kMostRows = int64_t{1} << 31;  // boxes are named by 32-bit coordinates
  if (!has_tensor_maps() || reinterpret_cast<uintptr_t>(data) % 16 != 0 ||
      stride * kBytes % 16 != 0 || rows < 1 || cols < 1 || rows >= kMostRows || cols >= kMostRows)
    return false;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(stride * kBytes)};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  return encoder()(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(data), sizes,
                   row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace unicom::cuda
