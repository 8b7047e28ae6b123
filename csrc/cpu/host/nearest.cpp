#include "nearest.h"

#include <cmath>
#include <limits>
#include <numeric>

#include "buffers.h"
#include "byte_vectors.h"

namespace unicom::cpu {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kCapacity = 256;  // candidates of a row, before it is looked at again by itself

// Views into the block that pack_centroids fills.
struct PackedCentroids {
  int64_t panel_count, units, height;  // height: dimensions, padded to fours of units
  int32_t* largest;                    // size of a value, see NearestKernels
  double* largest_norm;                // of the vectors the panels hold
  double* largest_lost;                // by rounding
  double* inverse_norm;                // [lanes] of the centroids
  ByteQuad* panels;
  float *bias, *scale;  // [lanes] see Nearest
  int32_t* start;       // [lanes]
  float* mean;          // [height]
  int64_t bytes;

  PackedCentroids(const void* packed, int64_t count, int64_t dim)
      : panel_count(ceil_div(count, kLanes)),
        units(round_up(ceil_div(dim, kValues), 4)),
        height(units * kValues) {
    Arrays arrays(packed);
    const int64_t lanes = panel_count * kLanes;
    arrays.take(largest, 1);
    arrays.take(largest_norm, 1);
    arrays.take(largest_lost, 1);
    arrays.take(inverse_norm, lanes);
    arrays.take(panels, lanes * units + kBehindPanels);
    arrays.take(bias, lanes);
    arrays.take(scale, lanes);
    arrays.take(start, lanes);
    arrays.take(mean, height);
    bytes = arrays.bytes();
  }
};

// A block of rows against all centroids.
class Block {
 public:
  Block(const FloatRows& rows, const int64_t* guess, const FloatRows& centroids,
        const PackedCentroids& packed, int64_t first, int64_t count)
      : rows_(rows),
        guess_(guess),
        centroids_(centroids),
        packed_(packed),
        first_(first),
        count_(count),
        tiles_(ceil_div(count, kTile)),
        k_(*kernels().nearest),
        tile_values_(units_of_rows(tiles_ * kTile, packed.units, k_.tile)),
        known_(tiles_ * kTile),
        found_(tiles_, kCapacity) {}

  void run(int64_t* index, float* score) {
    Buffer<float> unit(packed_.height);
    Buffer<uint8_t> bytes(packed_.height);
    for (int64_t r = 0; r < tiles_ * kTile; ++r) {
      if (guess_ != nullptr && r + 2 < count_) fetch(guess_[first_ + r + 2]);
      pack_row(r, unit.get(), bytes.get());
      start(found_, r, r);
    }
    search(tile_values_.get(), tiles_, found_);
    int64_t crowded[kTile], waiting = 0;
    for (int64_t r = 0; r < count_; ++r) {
      if (found_.count[r] <= kCapacity)
        decide(r, found_, r, index, score);
      else
        crowded[waiting++] = r;
      if (waiting == kTile || (waiting > 0 && r + 1 == count_)) {
        search_again(crowded, waiting, index, score);
        waiting = 0;
      }
    }
  }

 private:
  // What is known of a row before the search.
  struct Known {
    double norm;    // 0 or not finite for rows that do not count
    double shared;  // with x the unit row: x . mean, which no score contains
    double error;   // bound of |score + shared - cosine|
    double cosine;  // of the guess, times norm; -infinity without one
    float scale;    // of the row as the kernels multiply it
    bool counts;
  };

  // What the kernels need and leave for each row of some tiles.
  struct Found {
    Buffer<float> scale, window, floor, score;
    Buffer<int32_t> candidate, count;
    int64_t capacity;

    Found(int64_t tiles, int64_t capacity)
        : scale(tiles * kTile),
          window(tiles * kTile),
          floor(tiles * kTile),
          score(tiles * kTile * capacity),
          candidate(tiles * kTile * capacity),
          count(tiles * kTile),
          capacity(capacity) {}
  };

  // Asks for a centroid to come into the cache.
  void fetch(int64_t j) const {
    if (j < 0) return;
    for (int64_t k = 0; k < rows_.dim; k += 16) __builtin_prefetch(centroids_[j] + k);
  }

  // Cosine times the norm of the row, which is the same for all centroids.
  double cosine(const float* row, int64_t j) const {
    return dot(row, centroids_[j], rows_.dim) * packed_.inverse_norm[j];
  }

  void pack_row(int64_t r, float* unit, uint8_t* bytes) {
    Known& known = known_[r];
    known = {0, 0, 0, -std::numeric_limits<double>::infinity(), 1, false};
    if (r < count_) {
      const float* given = rows_[first_ + r];
      known.norm = std::sqrt(dot(given, given, rows_.dim));
      known.counts = known.norm > 0 && std::isfinite(known.norm);
    }
    if (!known.counts) {
      std::fill_n(bytes, packed_.height, uint8_t{0});
      write_row(bytes, packed_.units, k_.tile, r, tile_values_.get());
      return;
    }
    const float* given = rows_[first_ + r];
    known.shared = dot(given, packed_.mean, rows_.dim) / known.norm;
    const int64_t guess = guess_ != nullptr ? guess_[first_ + r] : -1;
    if (guess >= 0) known.cosine = cosine(given, guess);
    const Bytes row =
        unit_row_to_bytes(rows_, first_ + r, 1 / known.norm, packed_.mean, *packed_.largest,
                          *packed_.largest, bytes, packed_.height, unit);
    write_row(bytes, packed_.units, k_.tile, r, tile_values_.get());
    known.scale = row.step;
    const double norm = row.norm + row.lost;
    const double largest = *packed_.largest_norm, largest_lost = *packed_.largest_lost;
    known.error = 1.001 * (row.lost * largest + norm * largest_lost) + kSlack;
  }

  // Before a search: candidates are what may be better than the guess, or than the best one found,
  // whose score can be off by the error too, in the other direction.
  void start(const Found& found, int64_t slot, int64_t r) const {
    const Known& known = known_[r];
    found.scale[slot] = known.scale;
    found.window[slot] = static_cast<float>(2.001 * known.error);
    found.floor[slot] =
        !known.counts
            ? kInfinity
            : static_cast<float>(known.cosine / known.norm - known.shared - 1.001 * known.error);
  }

  void search(const ByteQuad* tiles, int64_t count, const Found& found) const {
    Nearest args;
    args.rows = tiles;
    args.row_tile_stride = k_.tile.padded(packed_.units) * kTile;
    args.classes = packed_.panels;
    args.panel_stride = packed_.units * kLanes;
    args.units = packed_.units;
    args.tiles = count;
    args.panels = packed_.panel_count;
    args.class_bias = packed_.bias;
    args.class_scale = packed_.scale;
    args.class_start = packed_.start;
    args.row_scale = found.scale.get();
    args.window = found.window.get();
    args.floor = found.floor.get();
    args.capacity = found.capacity;
    args.candidate = found.candidate.get();
    args.score = found.score.get();
    args.count = found.count.get();
    k_.nearest(args);
  }

  // Some rows had more candidates than there was room for: once more, with room for all.
  void search_again(const int64_t* rows, int64_t count, int64_t* index, float* score) {
    const int64_t units = packed_.units;
    Buffer<ByteQuad> tile(units_of_rows(kTile, units, k_.tile));
    Found found(1, centroids_.count);
    for (int64_t m = 0; m < kTile; ++m) {
      const int64_t r = rows[std::min(m, count - 1)];
      for (int64_t u = 0; u < units; ++u)
        tile[k_.tile.at(m, u, units)] = tile_values_[k_.tile.at(r, u, units)];
      start(found, m, r);
      if (m >= count) found.floor[m] = kInfinity;
    }
    search(tile.get(), 1, found);
    for (int64_t m = 0; m < count; ++m) decide(rows[m], found, m, index, score);
  }

  // Compares the candidates in double.
  void decide(int64_t r, const Found& found, int64_t slot, int64_t* index, float* score) const {
    const int64_t i = first_ + r;
    const Known& known = known_[r];
    if (!known.counts) {
      index[i] = -1;
      score[i] = known.norm == 0 ? 0.0f : std::numeric_limits<float>::quiet_NaN();
      return;
    }
    const float* scores = found.score.get() + slot * found.capacity;
    const int32_t* candidates = found.candidate.get() + slot * found.capacity;
    const int64_t count = found.count[slot];
    int64_t best = guess_ != nullptr ? guess_[i] : -1;
    double largest = known.cosine;
    if (best < 0) {
      best = candidates[std::max_element(scores, scores + count) - scores];
      largest = cosine(rows_[i], best);
    }
    // Only what might be as near as the best one is looked at.
    const int64_t certain = best;
    const double floor = largest / known.norm - known.shared - 1.001 * known.error;
    for (int64_t c = 0; c < count; ++c)
      if (scores[c] >= floor && candidates[c] != certain) fetch(candidates[c]);
    for (int64_t c = 0; c < count; ++c) {
      const int64_t j = candidates[c];
      if (scores[c] < floor || j == certain) continue;
      const double other = cosine(rows_[i], j);
      if (other > largest || (other == largest && j < best)) {  // the first of equals
        largest = other;
        best = j;
      }
    }
    index[i] = best;
    score[i] = static_cast<float>(largest / known.norm);
  }

  const FloatRows& rows_;
  const int64_t* guess_;
  const FloatRows& centroids_;
  const PackedCentroids& packed_;
  int64_t first_, count_, tiles_;
  const NearestKernels& k_;
  Buffer<ByteQuad> tile_values_;
  Buffer<Known> known_;
  Found found_;
};

}  // namespace

int64_t packed_centroid_bytes(int64_t count, int64_t dim) {
  return PackedCentroids(nullptr, count, dim).bytes;
}

void pack_centroids(const FloatRows& centroids, void* packed, const Parallel& parallel) {
  const PackedCentroids out(packed, centroids.count, centroids.dim);
  // Sums of products fit an int32 at any length.
  *out.largest = std::min(kernels().nearest->largest,
                          static_cast<int32_t>(std::sqrt(0x7fffffff / out.height)));
  const int64_t dim = centroids.dim, count = centroids.count;
  constexpr int64_t kPanelsPerItem = 16, kColumnsPerItem = 32;
  const auto each_panel = [&](const auto& body) {
    parallel.run(ceil_div(out.panel_count, kPanelsPerItem), [&](int64_t item) {
      const int64_t end = std::min(out.panel_count, (item + 1) * kPanelsPerItem);
      for (int64_t p = item * kPanelsPerItem; p < end; ++p) body(p);
    });
  };
  each_panel([&](int64_t p) {
    for (int64_t j = p * kLanes; j < (p + 1) * kLanes; ++j)
      out.inverse_norm[j] = j < count ? inverse_norm(centroids[j], dim) : 0.0;
  });
  parallel.run(ceil_div(out.height, kColumnsPerItem), [&](int64_t item) {
    const int64_t begin = item * kColumnsPerItem;
    double sum[kColumnsPerItem] = {};
    const int64_t columns = std::clamp<int64_t>(dim - begin, 0, kColumnsPerItem);
    for (int64_t j = 0; j < count; ++j)
      for (int64_t k = 0; k < columns; ++k)
        sum[k] += out.inverse_norm[j] * static_cast<double>(centroids[j][begin + k]);
    const int64_t end = std::min(out.height, begin + kColumnsPerItem);
    for (int64_t k = begin; k < end; ++k)
      out.mean[k] = static_cast<float>(sum[k - begin] / static_cast<double>(count));
  });
  const double mean_square = dot(out.mean, out.mean, dim);
  Buffer<double> norm(out.panel_count * kLanes), lost(out.panel_count * kLanes);
  each_panel([&](int64_t p) {
    Buffer<float> unit(out.height);
    Buffer<uint8_t> bytes(out.height);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t j = p * kLanes + lane;
      std::fill_n(bytes.get(), out.height, uint8_t{0});
      Bytes packed_row{1, 0, 0, 0};
      out.bias[j] = -kInfinity;
      if (j < count) {
        const double shared = dot(centroids[j], out.mean, dim) * out.inverse_norm[j];
        out.bias[j] = static_cast<float>(shared - mean_square);
        packed_row = unit_row_to_bytes(centroids, j, out.inverse_norm[j], out.mean, *out.largest, 0,
                                       bytes.get(), out.height, unit.get());
      }
      norm[j] = packed_row.norm;
      lost[j] = packed_row.lost;
      out.scale[j] = packed_row.step;
      out.start[j] = -*out.largest * packed_row.sum;
      write_units(bytes.get(), out.units, out.panels + p * out.units * kLanes + lane, kLanes);
    }
  });
  *out.largest_norm = *std::max_element(norm.get(), norm.get() + count);
  *out.largest_lost = *std::max_element(lost.get(), lost.get() + count);
}

bool fits_kernels(const void* packed) {
  return *PackedCentroids(packed, 1, 1).largest <= kernels().nearest->largest;
}

void nearest(const FloatRows& rows, const int64_t* guess, const FloatRows& centroids,
             const void* packed, int64_t* index, float* score, const Parallel& parallel) {
  const PackedCentroids classes(packed, centroids.count, centroids.dim);
  // As many rows as the caches hold, and at least a block for every thread.
  const int64_t share = round_up(ceil_div(rows.count, parallel.threads()), kTile);
  const int64_t block = std::min(kBlockTiles * kTile, std::max(share, kTile));
  parallel.run(ceil_div(rows.count, block), [&](int64_t item) {
    const int64_t first = item * block;
    Block(rows, guess, centroids, classes, first, std::min(block, rows.count - first))
        .run(index, score);
  });
}

}  // namespace unicom::cpu
