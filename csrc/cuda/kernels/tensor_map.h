// What TMA knows of a matrix in device memory, of which it copies boxes.
#pragma once

#include "platform.h"

#ifndef UNICOM_EMULATE_CUDA
#include <cuda.h>
#endif

namespace unicom::cuda {

#ifdef UNICOM_EMULATE_CUDA
using TensorMap = emulation::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// Of a matrix [rows][cols] of sixteen-bit values whose rows are `stride` values apart, in boxes of
// [box_rows][64]. False where TMA cannot copy it: `data` or a row that is not aligned to 16 bytes,
// or a driver without TMA. `bfloat`: which type; zeros are written alike.
bool make_tensor_map(TensorMap* map, const void* data, int64_t rows, int64_t cols, int64_t stride,
                     int box_rows);

// Whether the driver has TMA, so that make_tensor_map fails of a matrix alone.
bool has_tensor_maps();

}  // namespace unicom::cuda
