#include "projection.h"

#include <algorithm>
#include <cstring>

#include "buffers.h"

namespace unicom::cpu {

namespace {

constexpr int64_t kRowsPerPacking = 16 * kTile;
constexpr int64_t kChunk = 64;  // summands of a coordinate that are added up before they join

// Unit rows minus a mean along the axes.
class Coordinates {
 public:
  explicit Coordinates(const Projection& p)
      : p_(p),
        height_(round_up(p.dim, 8)),
        width_(round_up(p.count, kLanes)),
        axes_(p.axes != nullptr ? width_ * p.dim : 0) {
    for (int64_t i = 0; p.axes != nullptr && i < width_; ++i)
      for (int64_t k = 0; k < p.dim; ++k)
        axes_[i / kLanes * p.dim * kLanes + k * kLanes + i % kLanes] =
            i < p.count ? p.axes[i * p.dim + k] : 0.0f;
    // Of sums of sums of fp32 products, for a vector of norm 1.
    const double roundings = static_cast<double>(std::min(kChunk, p.dim) + p.dim / kChunk + 2);
    error_ = std::sqrt(static_cast<double>(p.count)) * roundings * 0x1p-24;
  }

  int64_t height() const { return height_; }

  // Of a vector.
  struct Result {
    float* along;  // [count]
    double norm;   // of the vector
    double error;  // bound of the norm of what is wrong with `along`
    double rest;   // bound of the norm outside the axes
  };

  // The unit rows [rows][height], zeros past dim, lose the mean; calls use(row, result). There is
  // room for whole tiles of them.
  template <class Use>
  void each(float* units, int64_t rows, const float* mean, const Use& use) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < p_.dim; ++k) units[r * height_ + k] -= mean[k];
    if (p_.axes == nullptr) {
      for (int64_t r = 0; r < rows; ++r) {
        float* row = units + r * height_;
        use(r, Result{row, std::sqrt(dot(row, row, p_.dim)), 0, 0});
      }
      return;
    }
    const int64_t tiles = ceil_div(rows, kTile), panels = width_ / kLanes;
    Buffer<float> tile(tiles * kTile * p_.dim), out(panels * tiles * kTile * kLanes);
    Buffer<float> along(width_);
    for (int64_t t = 0; t < tiles; ++t)
      kernels_for<float>().pack_tile(units + t * kTile * height_, height_, p_.dim, Rounding::kNone,
                                     t, tile.get());
    for (int64_t k = 0; k < p_.dim; k += kChunk)
      kernels_for<float>().product({.a = tile.get() + k * kTile,
                                    .a_tile_stride = p_.dim * kTile,
                                    .group_units = 1,
                                    .group_stride = kTile,
                                    .b = axes_.get() + k * kLanes,
                                    .b_panel_stride = p_.dim * kLanes,
                                    .out = out.get(),
                                    .out_panel_stride = tiles * kTile * kLanes,
                                    .rows = tiles * kTile,
                                    .panels = panels,
                                    .units = std::min(kChunk, p_.dim - k),
                                    .accumulate = k > 0,
                                    .ahead = {}});
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < p_.count; ++i)
        along[i] = out[(i / kLanes * tiles * kTile + r) * kLanes + i % kLanes];
      const float* row = units + r * height_;
      const double norm = std::sqrt(dot(row, row, p_.dim));
      const double inside = dot(along.get(), along.get(), p_.count);
      const double error = error_ * norm;
      const double outside = norm * norm - inside + 2.001 * error * norm + 1e-9;
      use(r, Result{along.get(), norm, error, std::sqrt(std::max(outside, 0.0))});
    }
  }

 private:
  const Projection& p_;
  int64_t height_, width_;
  Buffer<float> axes_;  // vector panels [panels][dim][16]
  double error_;
};

// Coordinates in bytes.
Bytes coordinates_to_bytes(const float* along, int64_t count, float step, int32_t largest,
                           int32_t shift, uint8_t* bytes) {
  return kernels().nearest->to_bytes({.values = along,
                                      .factor = 1,
                                      .mean = nullptr,
                                      .count = count,
                                      .step = step,
                                      .largest = largest,
                                      .shift = shift,
                                      .bytes = bytes,
                                      .padded = round_up(count, 16)});
}

}  // namespace

int64_t projected_row_bytes(const Projection& p) {
  return screen_units(p) * kValues + static_cast<int64_t>(sizeof(RowFacts));
}

int64_t ordered_centroid_bytes(int64_t count, const Projection& p) {
  return OrderedCentroids(nullptr, count, p).bytes;
}

void project_rows(const FloatRows& rows, const Projection& p, uint8_t* projected,
                  const Parallel& parallel) {
  const Coordinates coordinates(p);
  const int64_t units = screen_units(p), bytes = projected_row_bytes(p);
  const double most = 2.0 * p.largest;  // of the rest, which has no sign
  parallel.run(ceil_div(rows.count, kRowsPerPacking), [&](int64_t item) {
    const int64_t first = item * kRowsPerPacking;
    const int64_t count = std::min(kRowsPerPacking, rows.count - first);
    Buffer<float> unit(kRowsPerPacking * coordinates.height());
    double shared[kRowsPerPacking], length[kRowsPerPacking];
    for (int64_t r = 0; r < count; ++r) {
      float* out = unit.get() + r * coordinates.height();
      const float* row = rows[first + r];
      length[r] = std::sqrt(dot(row, row, p.dim));
      if (std::isfinite(length[r]))
        kernels_for<float>().unit_row(source_of(rows), first + r, out, coordinates.height());
      else
        std::fill_n(out, coordinates.height(), 0.0f);
      shared[r] = dot(out, p.centroid_mean, p.dim);
    }
    Buffer<uint8_t> along(round_up(p.count, 16));
    coordinates.each(
        unit.get(), count, p.row_mean, [&](int64_t r, const Coordinates::Result& found) {
          uint8_t* out = projected + (first + r) * bytes;
          const Bytes coded =
              coordinates_to_bytes(found.along, p.count, p.step, p.largest, p.largest, along.get());
          std::fill_n(out, bytes, uint8_t{0});
          std::copy_n(along.get(), p.count, out);
          const double rest = std::ceil(found.rest / static_cast<double>(p.rest_step));
          if (p.axes != nullptr)
            std::fill_n(out + rest_unit(p) * kValues, kValues,
                        static_cast<uint8_t>(std::min(rest, most)));
          const double lost = 1.001 * coded.lost + found.error;
          const RowFacts facts{.length = length[r],
                               .lost = rest > most ? std::numeric_limits<float>::infinity()
                                                   : round_up_to_float(lost),
                               .kept = round_up_to_float(1.001 * (coded.norm + lost)),
                               .norm = round_up_to_float(1.001 * found.norm),
                               .shared = static_cast<float>(shared[r])};
          std::memcpy(out + units * kValues, &facts, sizeof(facts));
        });
  });
}

void order_centroids(const FloatRows& centroids, const int64_t* order, const float* moved,
                     const Projection& p, void* packed, const Parallel& parallel) {
  const int64_t count = centroids.count;
  const OrderedCentroids out(packed, count, p);
  const Coordinates coordinates(p);
  constexpr int64_t kPerItem = 6 * kLanes;
  static_assert(kPerItem % kTile == 0);
  const int64_t items = ceil_div(count, kPerItem);
  Buffer<float> along(count * p.count);
  Buffer<double> rest(count), error(count), norm(items), lost(items), top(items);
  Buffer<double> bias(count);
  const double means = dot(p.row_mean, p.centroid_mean, p.dim);
  parallel.run(items, [&](int64_t item) {
    const int64_t first = item * kPerItem, rows = std::min(kPerItem, count - first);
    Buffer<float> units(kPerItem * coordinates.height()), row(p.dim);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t j = first + r, id = order[j];
      out.id[j] = static_cast<int32_t>(id);
      out.moved[j] = moved != nullptr ? moved[j] : 0.0f;
      out.inverse_norm[id] = inverse_norm(centroids[id], p.dim);
      kernels_for<float>().unit_row(source_of(centroids), id,
                                    units.get() + r * coordinates.height(), coordinates.height());
      bias[j] = dot(centroids[id], p.row_mean, p.dim) * out.inverse_norm[id] - means;
      out.bias[j] = static_cast<float>(bias[j]);
      const Bytes whole =
          unit_row_to_bytes(centroids, id, out.inverse_norm[id], p.centroid_mean, p.largest, 0,
                            out.whole + j * out.bytes_each, out.bytes_each, row.get());
      out.scale[j] = whole.step;
      out.norm[j] = round_up_to_float(1.001 * whole.norm);
      out.lost[j] = round_up_to_float(1.001 * whole.lost);
      out.whole_start[j] = -p.largest * whole.sum;
    }
    norm[item] = lost[item] = top[item] = 0;
    coordinates.each(units.get(), rows, p.centroid_mean,
                     [&](int64_t r, const Coordinates::Result& found) {
                       const int64_t j = first + r;
                       std::copy_n(found.along, p.count, along.get() + j * p.count);
                       rest[j] = found.rest;
                       error[j] = found.error;
                       const double inside = std::sqrt(dot(found.along, found.along, p.count));
                       norm[item] = std::max(norm[item], 1.001 * inside + found.error);
                       for (int64_t i = 0; i < p.count; ++i)
                         top[item] = std::max<double>(top[item], std::fabs(found.along[i]));
                     });
  });
  // A step of the coordinates with which the largest of them fits a byte, and the largest rest four.
  const auto largest_of = [](const Buffer<double>& values, int64_t n) {
    return *std::max_element(values.get(), values.get() + n);
  };
  const double row_step = p.step, rest_step = p.rest_step;
  const float step = round_up_to_float(
      std::max({1e-4, largest_of(top, items) / p.largest,
                largest_of(rest, count) * rest_step / (row_step * (4 * p.largest - 1))}));
  *out.unit = row_step * static_cast<double>(step);
  parallel.run(items, [&](int64_t item) {
    Buffer<uint8_t> bytes(out.units * kValues + 16);
    for (int64_t j = item * kPerItem; j < std::min(count, (item + 1) * kPerItem); ++j) {
      std::fill_n(bytes.get(), out.units * kValues, uint8_t{0});
      const Bytes coded =
          coordinates_to_bytes(along.get() + j * p.count, p.count, step, p.largest, 0, bytes.get());
      lost[item] = std::max(lost[item], 1.001 * coded.lost + error[j]);
      int32_t left = static_cast<int32_t>(std::ceil(rest[j] * rest_step / *out.unit));
      for (int64_t i = 0; p.axes != nullptr && i < kValues; ++i) {
        const int32_t part = std::min(left, p.largest);
        bytes[rest_unit(p) * kValues + i] = static_cast<uint8_t>(part);
        left -= part;
      }
      write_units(bytes.get(), out.units, out.panels + j / kLanes * out.units * kLanes + j % kLanes,
                  kLanes);
      out.start[j] = static_cast<int32_t>(std::clamp(std::ceil(bias[j] / *out.unit),
                                                     -double{kLimit} / 2, double{kLimit} / 2)) -
                     p.largest * coded.sum;
    }
  });
  for (int64_t j = count; j < out.panel_count * kLanes; ++j) {
    ByteQuad* to = out.panels + j / kLanes * out.units * kLanes + j % kLanes;
    for (int64_t u = 0; u < out.units; ++u) to[u * kLanes] = {};
    out.start[j] = -2 * (kLimit - 1);  // below every limit
  }
  *out.largest_norm = largest_of(norm, items);
  *out.largest_lost = largest_of(lost, items);
}

}  // namespace unicom::cpu
