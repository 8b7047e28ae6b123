// Packed operands of one call: prototypes as vector panels, embeddings as unit rows and tile
// panels.
#pragma once

#include <algorithm>
#include <vector>

#include "../../core/sampler.h"
#include "buffers.h"
#include "parallel.h"
#include "plan.h"

namespace unicom::cpu {

// What is larger than this passes the caches by.
constexpr int64_t kCacheBytes = int64_t{32} << 20;
// Kept cosines are read once and late: storing them past the caches pays earlier (measured).
constexpr int64_t kKeptPastCaches = int64_t{4} << 20;

// Sizes that follow from the problem and the operand type.
template <class Unit>
struct Shape {
  static constexpr int64_t kValues = UnitTraits<Unit>::kValues;
  static constexpr int64_t kRowGranule = 48;  // whole tiles and whole panels of rows

  int64_t dim, height;          // selected dimensions; padded to whole tiles
  int64_t units;                // along the dimensions, what a logit sums over
  int64_t panel_units;          // units of a packed class panel
  int64_t panels;               // of sampled classes
  int64_t batch, tiles;         // rows, and tiles of six rows
  int64_t padded_rows;          // whole granules
  int64_t blocks, block_tiles;  // row blocks of the logit kernels

  explicit Shape(const Plan& p)
      : dim(p.embeddings.dim),
        height(panel_height(dim)),
        units(ceil_div(dim, kValues)),
        panel_units(height / kValues * kLanes),
        panels(ceil_div(p.sampled, kLanes)),
        batch(p.batch),
        tiles(ceil_div(p.batch, kTile)),
        padded_rows(round_up(p.batch, kRowGranule)) {
    const int64_t granule = kRowGranule / kTile;
    blocks = std::max<int64_t>(1, ceil_div(tiles, kBlockTiles));
    block_tiles = round_up(ceil_div(tiles, blocks), granule);
    blocks = ceil_div(tiles, block_tiles > 0 ? block_tiles : 1);
  }

  int64_t tiles_in_block(int64_t block) const {
    return std::min(block_tiles, tiles - block * block_tiles);
  }
};

// Embeddings of the batch: unit rows [padded_rows][height], and as the tiles a logit broadcasts.
template <class Unit>
struct PackedRows {
  Buffer<RealOf<Unit>> unit;
  Buffer<Unit> tiles;
  std::vector<double> inverse_norm;

  PackedRows(const Plan& p, const Shape<Unit>& s, const Parallel& parallel)
      : unit(s.padded_rows * s.height),
        tiles(s.padded_rows * s.units),
        inverse_norm(static_cast<size_t>(s.padded_rows), 0.0) {
    const auto& k = kernels_for<Unit>();
    constexpr int64_t kRows = Shape<Unit>::kRowGranule;
    parallel.run(s.padded_rows / kRows, [&](int64_t granule) {
      for (int64_t r = granule * kRows; r < (granule + 1) * kRows; ++r) {
        RealOf<Unit>* row = unit.get() + r * s.height;
        // An ignored row counts as zeros: what it holds, NaN included, must not reach the others.
        if (r < s.batch && p.slot[r] != kIgnoredSlot) {
          inverse_norm[static_cast<size_t>(r)] = k.unit_row(p.embedding_rows, r, row, s.height);
        } else {
          std::fill(row, row + s.height, RealOf<Unit>(0));
        }
      }
      for (int64_t t = granule * kRows / kTile; t < (granule + 1) * kRows / kTile; ++t)
        k.pack_tile(unit.get() + t * kTile * s.height, s.height, s.units, p.rounding,
                    tiles.get() + t * kTile * s.units);
    });
  }
};

// Views into the block that `forward` fills and `backward` reads.
template <class Unit>
struct PackedClasses {
  Unit* panels;
  double* inverse_norm;

  PackedClasses(void* packed, const Shape<Unit>& s)
      : panels(static_cast<Unit*>(packed)),
        inverse_norm(reinterpret_cast<double*>(static_cast<char*>(packed) +
                                               s.panels * s.panel_units * sizeof(Unit))) {}
};

// What a block of logits takes: rows of the batch against the panels [first_panel, first_panel +
// panels), and its kept cosines [kept panel][tile][6][16]. `target` has room for the block's rows.
template <class Unit>
void fill_block(const Plan& p, const Shape<Unit>& s, const PackedRows<Unit>& rows,
                const PackedClasses<Unit>& classes, const void* kept, int64_t block,
                int64_t first_panel, int64_t panels, int64_t* target, LogitBlock<Unit>* out) {
  const int64_t first_tile = block * s.block_tiles, first_row = first_tile * kTile;
  out->rows = rows.tiles.get() + first_row * s.units;
  out->row_tile_stride = kTile * s.units;
  out->classes = classes.panels + first_panel * s.panel_units;
  out->panel_stride = s.panel_units;
  out->units = s.units;
  out->tiles = s.tiles_in_block(block);
  out->panels = panels;
  out->num_classes = p.sampled - first_panel * kLanes;
  for (int64_t r = 0; r < out->tiles * kTile; ++r)
    target[r] = first_row + r < p.batch && p.slot[first_row + r] >= 0
                    ? p.slot[first_row + r] - first_panel * kLanes
                    : -1;
  out->target = target;
  out->scale = static_cast<RealOf<Unit>>(p.scale);
  out->filter = static_cast<RealOf<Unit>>(p.filter);
  out->kept = std::clamp<int64_t>(p.kept_panels - first_panel, 0, panels);
  out->cosines_panel_stride = s.tiles * kTile * kLanes;
  out->cosines = static_cast<RealOf<Unit>*>(const_cast<void*>(kept)) +
                 first_panel * out->cosines_panel_stride + first_row * kLanes;
  out->past_caches =
      p.kept_panels * out->cosines_panel_stride * int64_t{sizeof(RealOf<Unit>)} > kKeptPastCaches;
}

}  // namespace unicom::cpu
