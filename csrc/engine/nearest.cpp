#include "nearest.h"

#include <cmath>
#include <limits>

#include "operands.h"

namespace unicom {

using cpu::kBestLanes;

namespace {

constexpr double kEpsilon = 0x1p-24;  // half an ulp of fp32 at 1

// Products of fp32 values are exact in double, and the order of the sums is fixed: the same on
// every CPU.
double dot(const float* a, const float* b, int64_t count) {
  constexpr int64_t kSums = 8;
  double sum[kSums] = {};
  int64_t k = 0;
  for (; k + kSums <= count; k += kSums)
    for (int64_t i = 0; i < kSums; ++i)
      sum[i] += static_cast<double>(a[k + i]) * static_cast<double>(b[k + i]);
  double total = 0;
  for (; k < count; ++k) total += static_cast<double>(a[k]) * static_cast<double>(b[k]);
  for (const double part : sum) total += part;
  return total;
}

double inverse_norm(const float* row, int64_t dim) {
  const double square = dot(row, row, dim);
  return square == 0 ? 0.0 : 1.0 / std::sqrt(square);
}

// Norm of what rounding to bf16 takes from a row.
double lost_in_rounding(const float* row, int64_t dim) {
  float sum = 0;
  for (int64_t k = 0; k < dim; ++k) {
    const float lost = row[k] - cpu::bf16_to_float(cpu::float_to_bf16(row[k]));
    sum += lost * lost;
  }
  return std::sqrt(static_cast<double>(sum));
}

template <class Unit>
struct PackedCentroids {
  Unit* panels;
  double* inverse_norm;  // [whole panels]
  double* lost;          // [whole panels] of each centroid in rounding
  int64_t panel_count, panel_units;

  PackedCentroids(const void* packed, int64_t count, int64_t dim)
      : panels(static_cast<Unit*>(const_cast<void*>(packed))),
        panel_count(ceil_div(count, kLanes)),
        panel_units(cpu::panel_height(dim) / cpu::UnitTraits<Unit>::kValues * kLanes) {
    inverse_norm = reinterpret_cast<double*>(panels + panel_count * panel_units);
    lost = inverse_norm + panel_count * kLanes;
  }
  int64_t bytes() const {
    return panel_count * (panel_units * static_cast<int64_t>(sizeof(Unit)) +
                          2 * kLanes * static_cast<int64_t>(sizeof(double)));
  }
};

cpu::RowSource source_of(const Rows& rows) {
  return {rows.data, cpu::DType::kFloat32, rows.stride, nullptr, rows.dim};
}

// A block of rows against all centroids.
template <class Unit>
class Block {
 public:
  Block(const Rows& rows, const Rows& centroids, const PackedCentroids<Unit>& packed,
        double centroid_error, int64_t first, int64_t count)
      : rows_(rows),
        centroids_(centroids),
        packed_(packed),
        centroid_error_(centroid_error),
        first_(first),
        count_(count),
        tiles_(ceil_div(count, kTile)),
        units_(ceil_div(rows.dim, cpu::UnitTraits<Unit>::kValues)),
        packed_rows_(tiles_ * units_ * kTile),
        error_(tiles_ * kTile),
        best_(tiles_ * kTile * kBestLanes),
        second_(tiles_ * kTile * kBestLanes),
        panel_(tiles_ * kTile * kBestLanes) {}

  void run(int64_t* index, float* score) {
    pack();
    cpu::Nearest<Unit> args;
    args.rows = packed_rows_.get();
    args.row_tile_stride = units_ * kTile;
    args.classes = packed_.panels;
    args.panel_stride = packed_.panel_units;
    args.units = units_;
    args.tiles = tiles_;
    args.panels = packed_.panel_count;
    args.num_classes = centroids_.count;
    args.best = best_.get();
    args.second = second_.get();
    args.panel = panel_.get();
    kernels_for<Unit>().nearest(args);
    for (int64_t r = 0; r < count_; ++r) decide(r, index + first_ + r, score + first_ + r);
  }

 private:
  // Unit rows to tiles; a row without direction counts as zeros.
  void pack() {
    const auto& k = kernels_for<Unit>();
    const int64_t height = cpu::panel_height(rows_.dim);
    Buffer<float> unit(kTile * height);
    for (int64_t t = 0; t < tiles_; ++t) {
      for (int64_t m = 0; m < kTile; ++m) {
        const int64_t r = t * kTile + m;
        float* row = unit.get() + m * height;
        const double inverse =
            r < count_ ? k.unit_row(source_of(rows_), first_ + r, row, height) : 0.0;
        if (!(inverse > 0 && std::isfinite(inverse))) std::fill(row, row + height, 0.0f);
        error_[r] = 1.001 * centroid_error_ + (static_cast<double>(rows_.dim) + 64) * kEpsilon;
        if constexpr (cpu::UnitTraits<Unit>::kValues == 2)
          error_[r] += 1.001 * lost_in_rounding(row, rows_.dim);
      }
      k.pack_tile(unit.get(), height, units_, cpu::Rounding::kNone,
                  packed_rows_.get() + t * units_ * kTile);
    }
  }

  // Compares in double what the kernel's cosines leave open.
  void decide(int64_t r, int64_t* index, float* score) const {
    const float* row = rows_[first_ + r];
    const double square = dot(row, row, rows_.dim);
    *index = -1;
    if (!(square > 0 && square < std::numeric_limits<double>::infinity())) {
      *score = square == 0 ? 0.0f : std::numeric_limits<float>::quiet_NaN();
      return;
    }
    const float* best = best_.get() + r * kBestLanes;
    const float* second = second_.get() + r * kBestLanes;
    const int32_t* panel = panel_.get() + r * kBestLanes;
    float top = best[0];
    for (int64_t lane = 1; lane < kBestLanes; ++lane) top = std::max(top, best[lane]);
    // Two cosines can each be off by the error, in opposite directions.
    const double floor = top - 2 * error_[r];
    double largest = -std::numeric_limits<double>::infinity();
    const auto consider = [&](int64_t j) {
      const double cosine = dot(row, centroids_[j], rows_.dim) * packed_.inverse_norm[j];
      if (cosine > largest || (cosine == largest && j < *index)) {
        largest = cosine;
        *index = j;
      }
    };
    for (int64_t lane = 0; lane < kBestLanes; ++lane) {
      if (best[lane] < floor || panel[lane] < 0) continue;
      if (second[lane] < floor)
        consider(panel[lane] * kLanes + lane % kLanes);
      else  // another centroid of this lane may be the one
        for (int64_t j = lane; j < centroids_.count; j += kBestLanes) consider(j);
    }
    *score = static_cast<float>(largest / std::sqrt(square));
  }

  const Rows& rows_;
  const Rows& centroids_;
  const PackedCentroids<Unit>& packed_;
  double centroid_error_;
  int64_t first_, count_, tiles_, units_;
  Buffer<Unit> packed_rows_;
  Buffer<double> error_;  // [rows] how far a cosine of the kernel may be from the truth
  Buffer<float> best_, second_;
  Buffer<int32_t> panel_;
};

}  // namespace

template <class Unit>
int64_t packed_centroid_bytes(int64_t count, int64_t dim) {
  return PackedCentroids<Unit>(nullptr, count, dim).bytes();
}

template <class Unit>
void pack_centroids(const Rows& centroids, void* packed, const Parallel& parallel) {
  const auto& k = kernels_for<Unit>();
  const PackedCentroids<Unit> out(packed, centroids.count, centroids.dim);
  const int64_t height = cpu::panel_height(centroids.dim);
  constexpr int64_t kPanelsPerItem = 16;
  parallel.run(ceil_div(out.panel_count, kPanelsPerItem), [&](int64_t item) {
    Buffer<float> scratch(kLanes * height);
    const int64_t end = std::min(out.panel_count, (item + 1) * kPanelsPerItem);
    for (int64_t p = item * kPanelsPerItem; p < end; ++p) {
      double* inverse = out.inverse_norm + p * kLanes;
      k.pack_panel(source_of(centroids), nullptr, p * kLanes, centroids.count, cpu::Rounding::kNone,
                   scratch.get(), out.panels + p * out.panel_units, inverse);
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t j = p * kLanes + lane;
        inverse[lane] = out.lost[j] = 0;
        if (j >= centroids.count) continue;
        inverse[lane] = inverse_norm(centroids[j], centroids.dim);
        if constexpr (cpu::UnitTraits<Unit>::kValues == 2) {
          k.unit_row(source_of(centroids), j, scratch.get(), height);
          out.lost[j] = lost_in_rounding(scratch.get(), centroids.dim);
        }
      }
    }
  });
}

template <class Unit>
void nearest(const Rows& rows, const Rows& centroids, const void* packed, int64_t* index,
             float* score, const Parallel& parallel) {
  const PackedCentroids<Unit> classes(packed, centroids.count, centroids.dim);
  double centroid_error = 0;
  for (int64_t j = 0; j < centroids.count; ++j)
    centroid_error = std::max(centroid_error, classes.lost[j]);
  // As many rows as the caches hold, and at least a block for every thread.
  const int64_t share = round_up(ceil_div(rows.count, parallel.threads()), kTile);
  const int64_t block = std::min(cpu::kBlockTiles * kTile, std::max(share, kTile));
  parallel.run(ceil_div(rows.count, block), [&](int64_t item) {
    const int64_t first = item * block;
    Block<Unit>(rows, centroids, classes, centroid_error, first,
                std::min(block, rows.count - first))
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
