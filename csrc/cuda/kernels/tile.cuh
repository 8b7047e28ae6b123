// Tile<Unit, kCols, kADepthInner, kBDepthInner>: what one block of threads does in every product.
// It multiplies kRows rows of A by kCols columns of B, summed over the depth, and keeps the result
// in registers for an epilogue:
//
//   result[row][col] = sum over k of A[row][k] * B[col][k]
//
// A (B) lies in memory with the depth innermost, [rows][depth], or outermost, [depth][rows]. All of
// it is padded: no access needs a bound. A thread holds kThreadRows x kThreadCols results; kTeam
// threads share each row, and columns come in runs of kRun neighbours.
//
// store(to, stride, convert) writes convert(i, result) of each of its rows i as Units, sixteen
// bytes at a time. run(plan, tiles, steps, source, epilogue) goes through `tiles` products of
// `steps` * kDepth. The copies of the next product are under way during the epilogue of the last.
// plan(limit, steps) says how it uses shared memory where a block may have `limit` bytes of it;
// steps: those of a tile if A is the same for all tiles, else 0.
#pragma once

#include "tile_simt.cuh"
#include "tile_tensor_core.cuh"

namespace unicom::cuda {

template <class Unit, int kCols, bool kADepthInner, bool kBDepthInner>
using Tile = std::conditional_t<UnitTraits<Unit>::kTensorCores,
                                TensorCoreTile<Unit, kCols, kADepthInner, kBDepthInner>,
                                SimtTile<Unit, kCols, kADepthInner, kBDepthInner>>;

}  // namespace unicom::cuda
