// The table of kernels.h. The kernels are written once, in the files included here; each
// kernels_*.cpp compiles them with its own flags and names the result.
#pragma once

#include <type_traits>

#include "logits_impl.h"
#include "nearest_impl.h"
#include "rows_impl.h"

namespace unicom::cpu {
namespace {

template <class Unit>
constexpr Kernels<Unit> make_kernels() {
  Kernels<Unit> k{};
  k.tile = kTileLayout<Unit>;
  k.pack_panel = pack_panel<Unit>;
  k.add_lanes = add_lanes<Unit>;
  k.unit_row = unit_row<RealOf<Unit>>;
  k.pack_tile = pack_tile<Unit>;
  k.pack_weighted = pack_weighted<Unit>;
  if constexpr (UnitTraits<Unit>::kValues == 2) k.lanes_to_units = lanes_to_units;
  k.product = product<Unit>;
  k.sum_exp = sum_exp<Unit>;
  k.probabilities = probabilities<Unit>;
  k.dot = dot<RealOf<Unit>>;
  k.unit_backward = unit_backward<Unit>;
  k.spread_rows = spread_rows<RealOf<Unit>>;
  return k;
}

constexpr NearestKernels make_nearest_kernels() {
  return {.tile = kTileLayout<ByteQuad>,
          .largest = kLargest,
          .nearest = nearest,
          .screen = screen,
          .list_marks = list_marks,
          .byte_products = byte_products,
          .to_bytes = to_bytes};
}

}  // namespace
}  // namespace unicom::cpu
