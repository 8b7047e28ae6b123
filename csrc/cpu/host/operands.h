// Packed operands of one call: prototypes as vector panels, embeddings as unit rows and tile
// panels.
#pragma once

#include <algorithm>
#include <vector>

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
  int64_t panels;               // of sampled classes: of each sixteen as many as centres
  int64_t batch, tiles;         // rows, and tiles of six rows
  int64_t padded_rows;          // whole granules
  int64_t blocks, block_tiles;  // row blocks of the logit kernels

  explicit Shape(const Plan& p)
      : dim(p.embeddings.dim),
        height(panel_height(dim)),
        units(ceil_div(dim, kValues)),
        panel_units(height / kValues * kLanes),
        panels(ceil_div(p.sampled, kLanes) * p.centers),
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
        tiles(s.padded_rows * kernels_for<Unit>().tile.padded(s.units)),
        inverse_norm(static_cast<size_t>(s.padded_rows), 0.0) {
    const auto& k = kernels_for<Unit>();
    constexpr int64_t kRows = Shape<Unit>::kRowGranule;
    parallel.run(s.padded_rows / kRows, [&](int64_t granule) {
      for (int64_t r = granule * kRows; r < (granule + 1) * kRows; ++r) {
        RealOf<Unit>* row = unit.get() + r * s.height;
        // An ignored row counts as zeros: what it holds, NaN included, must not reach the others.
        if (r < s.batch && p.positives.count(r) > 0) {
          inverse_norm[static_cast<size_t>(r)] = k.unit_row(p.embedding_rows, r, row, s.height);
        } else {
          std::fill(row, row + s.height, RealOf<Unit>(0));
        }
      }
      for (int64_t t = granule * kRows / kTile; t < (granule + 1) * kRows / kTile; ++t)
        k.pack_tile(unit.get() + t * kTile * s.height, s.height, s.units, p.rounding, t,
                    tiles.get());
    });
  }
};

// Views into the block that `forward` fills and `backward` reads.
template <class Unit>
struct PackedClasses {
  Unit* panels;
  double* inverse_norm;
  double* sum;  // [height] of the unit vectors, with label smoothing

  PackedClasses(void* packed, const Shape<Unit>& s)
      : panels(static_cast<Unit*>(packed)),
        inverse_norm(reinterpret_cast<double*>(static_cast<char*>(packed) +
                                               s.panels * s.panel_units * sizeof(Unit))),
        sum(inverse_norm + s.panels * kLanes) {}
};

// Bits of the lanes that hold no negative, for the rows and panels of a block.
using StruckLanes = uint16_t[kBlockTiles * kTile * kBlockPanels];

// The positives of each row, and the lanes past the last class. Panels: of classes, whatever the
// number of their centres.
template <class Unit>
void strike(const Plan& p, int64_t first_row, int64_t first_panel, LogitBlock<Unit>* block,
            uint16_t* struck) {
  const int64_t rows = block->tiles * kTile, panels = block->panels / block->centers;
  const int64_t first = first_panel * kLanes, valid = p.sampled - first;
  block->struck = struck;
  std::fill_n(struck, rows * panels, uint16_t{0});
  for (int64_t j = std::max<int64_t>(valid / kLanes, 0); j < panels; ++j) {
    const int64_t lanes = std::max<int64_t>(valid - j * kLanes, 0);
    for (int64_t r = 0; r < rows; ++r)
      struck[r * panels + j] = static_cast<uint16_t>(0xffffu << lanes);
  }
  for (int64_t r = 0; r < std::min(rows, p.batch - first_row); ++r)
    for (int64_t q = 0; q < p.positives.width; ++q) {
      const int64_t slot = p.positives.of(first_row + r)[q] - first;
      if (slot >= 0 && slot < panels * kLanes)
        struck[r * panels + slot / kLanes] |= static_cast<uint16_t>(1u << (slot % kLanes));
    }
}

// What a block of logits takes: rows of the batch against the panels [first_panel, first_panel +
// panels), and its kept cosines [kept panel][tile][6][16].
template <class Unit>
void fill_block(const Plan& p, const Shape<Unit>& s, const PackedRows<Unit>& rows,
                const PackedClasses<Unit>& classes, const void* kept, int64_t block,
                int64_t first_panel, int64_t panels, StruckLanes* struck, LogitBlock<Unit>* out) {
  const int64_t first_tile = block * s.block_tiles, first_row = first_tile * kTile;
  const int64_t row_units = kernels_for<Unit>().tile.padded(s.units);
  out->rows = rows.tiles.get() + first_row * row_units;
  out->row_tile_stride = kTile * row_units;
  out->classes = classes.panels + first_panel * s.panel_units;
  out->panel_stride = s.panel_units;
  out->units = s.units;
  out->tiles = s.tiles_in_block(block);
  out->panels = panels;
  out->centers = p.centers;
  strike(p, first_row, first_panel / p.centers, out, *struck);
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
