#include "nearest.h"

#include <cmath>
#include <limits>

#include "operands.h"

namespace unicom {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kCapacity = 128;  // candidates of a row, before it is looked at again by itself

template <class Unit>
constexpr bool kBytes = cpu::UnitTraits<Unit>::kValues == 4;

double dot(const float* a, const float* b, int64_t count) {
  return kernels_for<float>().dot(a, b, count);
}

double inverse_norm(const float* row, int64_t dim) {
  const double square = dot(row, row, dim);
  return square == 0 ? 0.0 : 1.0 / std::sqrt(square);
}

cpu::RowSource source_of(const Rows& rows) {
  return {rows.data, cpu::DType::kFloat32, rows.stride, nullptr, rows.dim};
}

// A vector as the kernels multiply it: rounded to whole multiples of `scale`, or to bf16, or as is.
struct Rounded {
  float scale;  // 1 but for bytes
  double norm;  // of the vector
  double lost;  // norm of what rounding took from it
};

// Rounds values [height] in place; for bytes they become whole numbers from -127 to 127.
template <class Unit>
Rounded round_vector(float* values, int64_t height) {
  constexpr int64_t kSums = 8;  // side by side, so that the compiler uses vectors
  float square[kSums] = {}, lost[kSums] = {}, largest[kSums] = {};
  const auto total = [](const float* sums) {
    double all = 0;
    for (int64_t i = 0; i < kSums; ++i) all += static_cast<double>(sums[i]);
    return std::sqrt(all);
  };
  float scale = 1, inverse = 1;
  if constexpr (kBytes<Unit>) {
    for (int64_t k = 0; k < height; k += kSums)
      for (int64_t i = 0; i < kSums; ++i) {
        const float size = std::fabs(values[k + i]);
        largest[i] = size > largest[i] ? size : largest[i];
      }
    const float top = *std::max_element(largest, largest + kSums);
    scale = top > 0 ? top / 127 : 1;
    inverse = 1 / scale;
  }
  for (int64_t k = 0; k < height; k += kSums)
    for (int64_t i = 0; i < kSums; ++i) {
      const float value = values[k + i];
      float rounded = value;
      if constexpr (kBytes<Unit>) {
        constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
        rounded = (value * inverse + kWhole) - kWhole;
      } else if constexpr (cpu::UnitTraits<Unit>::kValues == 2) {
        rounded = cpu::bf16_to_float(cpu::float_to_bf16(value));
      }
      const float difference = value - rounded * scale;
      square[i] += value * value;
      lost[i] += difference * difference;
      values[k + i] = rounded;
    }
  return {scale, total(square), total(lost)};
}

// Units of rounded values [height], `step` apart. In tiles bytes are unsigned: 128 is added.
template <class Unit>
void write_units(const float* values, int64_t units, Unit* out, int64_t step, int shift) {
  for (int64_t u = 0; u < units; ++u) {
    if constexpr (kBytes<Unit>) {
      for (int64_t i = 0; i < 4; ++i)
        out[u * step].byte[i] =
            static_cast<uint8_t>(static_cast<int32_t>(values[4 * u + i]) + shift);
    } else if constexpr (cpu::UnitTraits<Unit>::kValues == 2) {
      out[u * step] = {cpu::float_to_bf16(values[2 * u]), cpu::float_to_bf16(values[2 * u + 1])};
    } else {
      out[u * step] = values[u];
    }
  }
}

// Views into the block that pack_centroids fills.
template <class Unit>
struct PackedCentroids {
  int64_t panel_count, units, height;  // height: dimensions, padded for round_vector
  double* largest_norm;                // of the vectors the panels hold
  double* largest_lost;                // by rounding
  double* inverse_norm;                // [lanes] of the centroids
  Unit* panels;
  float *bias, *scale;  // [lanes] see cpu::Nearest
  int32_t* offset;      // [lanes]
  float* mean;          // [height]
  int64_t bytes;

  PackedCentroids(const void* packed, int64_t count, int64_t dim)
      : panel_count(ceil_div(count, kLanes)),
        units(ceil_div(dim, cpu::UnitTraits<Unit>::kValues)),
        height(round_up(dim, 8)) {
    auto* at = static_cast<char*>(const_cast<void*>(packed));
    char* const begin = at;
    const auto take = [&](auto*& pointer, int64_t values) {
      pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(at);
      at += round_up(values * static_cast<int64_t>(sizeof(*pointer)), 64);
    };
    const int64_t lanes = panel_count * kLanes;
    take(largest_norm, 1);
    take(largest_lost, 1);
    take(inverse_norm, lanes);
    take(panels, lanes * units);
    take(bias, lanes);
    take(scale, lanes);
    take(offset, lanes);
    take(mean, height);
    bytes = at - begin;
  }
};

// A block of rows against all centroids.
template <class Unit>
class Block {
 public:
  Block(const Rows& rows, const Rows& centroids, const PackedCentroids<Unit>& packed, int64_t first,
        int64_t count)
      : rows_(rows),
        centroids_(centroids),
        packed_(packed),
        first_(first),
        count_(count),
        tiles_(ceil_div(count, kTile)),
        tile_values_(tiles_ * packed.units * kTile),
        found_(tiles_, kCapacity) {}

  void run(int64_t* index, float* score) {
    Buffer<float> row(packed_.height);
    for (int64_t r = 0; r < tiles_ * kTile; ++r) pack_row(r, row.get());
    search(tile_values_.get(), tiles_, found_);
    int64_t crowded[kTile], waiting = 0;
    for (int64_t r = 0; r < count_; ++r) {
      if (found_.count[r] <= kCapacity)
        decide(first_ + r, found_, r, index, score);
      else
        crowded[waiting++] = r;
      if (waiting == kTile || (waiting > 0 && r + 1 == count_)) {
        search_again(crowded, waiting, index, score);
        waiting = 0;
      }
    }
  }

 private:
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

  Unit* row_units(Unit* tiles, int64_t r) const {
    return tiles + r / kTile * packed_.units * kTile + r % kTile;
  }

  void pack_row(int64_t r, float* row) {
    constexpr int kShift = kBytes<Unit> ? 128 : 0;
    const int64_t dim = rows_.dim;
    const double inverse = r < count_ ? kernels_for<float>().unit_row(source_of(rows_), first_ + r,
                                                                      row, packed_.height)
                                      : 0.0;
    const bool counts = inverse > 0 && std::isfinite(inverse);
    for (int64_t k = 0; k < packed_.height; ++k) row[k] = counts ? row[k] - packed_.mean[k] : 0.0f;
    const Rounded rounded = round_vector<Unit>(row, packed_.height);
    write_units(row, packed_.units, row_units(tile_values_.get(), r), kTile, kShift);
    found_.scale[r] = rounded.scale;
    // Sums of fp32 products may lose a rounding error in each; those of bytes are exact.
    const double steps = 128 + (kBytes<Unit> ? 0 : static_cast<double>(dim));
    const double error = 1.001 * (rounded.lost * *packed_.largest_norm +
                                  (rounded.norm + rounded.lost) * *packed_.largest_lost) +
                         steps * 0x1p-24;
    // Two scores can each be off by the error, in opposite directions.
    found_.window[r] = static_cast<float>(2.001 * error);
    found_.floor[r] = counts ? -kInfinity : kInfinity;
  }

  void search(const Unit* tiles, int64_t count, const Found& found) const {
    cpu::Nearest<Unit> args;
    args.rows = tiles;
    args.row_tile_stride = packed_.units * kTile;
    args.classes = packed_.panels;
    args.panel_stride = packed_.units * kLanes;
    args.units = packed_.units;
    args.tiles = count;
    args.panels = packed_.panel_count;
    args.num_classes = centroids_.count;
    args.class_bias = packed_.bias;
    args.class_scale = packed_.scale;
    args.class_offset = packed_.offset;
    args.row_scale = found.scale.get();
    args.window = found.window.get();
    args.floor = found.floor.get();
    args.capacity = found.capacity;
    args.candidate = found.candidate.get();
    args.score = found.score.get();
    args.count = found.count.get();
    kernels_for<Unit>().nearest(args);
  }

  // Some rows had more candidates than there was room for: once more, with room for all.
  void search_again(const int64_t* rows, int64_t count, int64_t* index, float* score) {
    Buffer<Unit> tile(packed_.units * kTile);
    Found found(1, centroids_.count);
    for (int64_t m = 0; m < kTile; ++m) {
      const int64_t r = rows[std::min(m, count - 1)];
      const Unit* from = row_units(tile_values_.get(), r);
      for (int64_t u = 0; u < packed_.units; ++u) tile[u * kTile + m] = from[u * kTile];
      found.scale[m] = found_.scale[r];
      found.window[m] = found_.window[r];
      found.floor[m] = m < count ? -kInfinity : kInfinity;
    }
    search(tile.get(), 1, found);
    for (int64_t m = 0; m < count; ++m) decide(first_ + rows[m], found, m, index, score);
  }

  // Compares the candidates in double.
  void decide(int64_t i, const Found& found, int64_t r, int64_t* index, float* score) const {
    const float* row = rows_[i];
    const double square = dot(row, row, rows_.dim);
    if (!(square > 0 && std::isfinite(square))) {
      index[i] = -1;
      score[i] = square == 0 ? 0.0f : std::numeric_limits<float>::quiet_NaN();
      return;
    }
    double largest = -std::numeric_limits<double>::infinity();
    for (int64_t c = 0; c < found.count[r]; ++c) {
      if (found.score[r * found.capacity + c] <= found.floor[r]) continue;
      const int64_t j = found.candidate[r * found.capacity + c];
      const double cosine = dot(row, centroids_[j], rows_.dim) * packed_.inverse_norm[j];
      if (cosine > largest) {  // candidates come in increasing order: the first of equals stays
        largest = cosine;
        index[i] = j;
      }
    }
    score[i] = static_cast<float>(largest / std::sqrt(square));
  }

  const Rows& rows_;
  const Rows& centroids_;
  const PackedCentroids<Unit>& packed_;
  int64_t first_, count_, tiles_;
  Buffer<Unit> tile_values_;
  Found found_;
};

}  // namespace

template <class Unit>
int64_t packed_centroid_bytes(int64_t count, int64_t dim) {
  return PackedCentroids<Unit>(nullptr, count, dim).bytes;
}

template <class Unit>
void pack_centroids(const Rows& centroids, void* packed, const Parallel& parallel) {
  const PackedCentroids<Unit> out(packed, centroids.count, centroids.dim);
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
  Buffer<double> norm(out.panel_count * kLanes), lost(out.panel_count * kLanes);
  each_panel([&](int64_t p) {
    Buffer<float> row(out.height);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t j = p * kLanes + lane;
      if (j < count) kernels_for<float>().unit_row(source_of(centroids), j, row.get(), out.height);
      for (int64_t k = 0; k < out.height; ++k) row[k] = j < count ? row[k] - out.mean[k] : 0.0f;
      out.bias[j] =
          j < count ? static_cast<float>(dot(out.mean, row.get(), out.height)) : -kInfinity;
      const Rounded rounded = round_vector<Unit>(row.get(), out.height);
      norm[j] = rounded.norm;
      lost[j] = rounded.lost;
      out.scale[j] = rounded.scale;
      float sum = 0;  // of whole numbers, exact
      for (int64_t k = 0; k < dim; ++k) sum += row[k];
      out.offset[j] = kBytes<Unit> ? 128 * static_cast<int32_t>(sum) : 0;
      write_units(row.get(), out.units, out.panels + p * out.units * kLanes + lane, kLanes, 0);
    }
  });
  *out.largest_norm = *std::max_element(norm.get(), norm.get() + count);
  *out.largest_lost = *std::max_element(lost.get(), lost.get() + count);
}

template <class Unit>
void nearest(const Rows& rows, const Rows& centroids, const void* packed, int64_t* index,
             float* score, const Parallel& parallel) {
  const PackedCentroids<Unit> classes(packed, centroids.count, centroids.dim);
  // As many rows as the caches hold, and at least a block for every thread.
  const int64_t share = round_up(ceil_div(rows.count, parallel.threads()), kTile);
  const int64_t block = std::min(cpu::kBlockTiles * kTile, std::max(share, kTile));
  parallel.run(ceil_div(rows.count, block), [&](int64_t item) {
    const int64_t first = item * block;
    Block<Unit>(rows, centroids, classes, first, std::min(block, rows.count - first))
        .run(index, score);
  });
}

#define UNICOM_NEAREST(Unit)                                                           \
  template int64_t packed_centroid_bytes<Unit>(int64_t, int64_t);                      \
  template void pack_centroids<Unit>(const Rows&, void*, const Parallel&);             \
  template void nearest<Unit>(const Rows&, const Rows&, const void*, int64_t*, float*, \
                              const Parallel&);
UNICOM_NEAREST(float)
UNICOM_NEAREST(cpu::BfPair)
UNICOM_NEAREST(cpu::ByteQuad)
#undef UNICOM_NEAREST

void add_unit_rows(const Rows& rows, const int64_t* index, int64_t num_sums, double* sums,
                   int64_t* counts, const Parallel& parallel) {
  // Each item has a range of the sums to itself and takes the rows in order.
  const int64_t items = std::min<int64_t>(num_sums, 4 * parallel.threads());
  parallel.run(items, [&](int64_t item) {
    const int64_t begin = num_sums * item / items, end = num_sums * (item + 1) / items;
    for (int64_t i = 0; i < rows.count; ++i) {
      if (index[i] < begin || index[i] >= end) continue;
      const float* row = rows[i];
      const double inverse = inverse_norm(row, rows.dim);
      double* sum = sums + index[i] * rows.dim;
      for (int64_t k = 0; k < rows.dim; ++k) sum[k] += inverse * static_cast<double>(row[k]);
      ++counts[index[i]];
    }
  });
}

}  // namespace unicom
