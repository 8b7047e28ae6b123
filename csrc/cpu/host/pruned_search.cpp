#include "pruned_search.h"

#include <atomic>
#include <limits>
#include <numeric>
#include <vector>

#include "buffers.h"
#include "byte_vectors.h"

namespace unicom::cpu {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int32_t kLimit = 1 << 30;  // no sum of products reaches it
constexpr int64_t kRowsPerBlock = kBlockTiles * kTile;
constexpr int64_t kBlocksPerItem = 4;  // whose rows stay in a second-level cache
constexpr int64_t kPanelsPerSweep = 1024;
constexpr int64_t kRowsPerPacking = 16 * kTile;
constexpr int64_t kChunk = 64;  // summands of a coordinate that are added up before they join

float round_up_to_float(double x) {
  const float value = static_cast<float>(x);
  return value >= x ? value : std::nextafter(value, std::numeric_limits<float>::infinity());
}

// The bytes of a row: coordinates, then where there are axes in one unit the norm of the rest, four
// times.
int64_t rest_unit(const Projection& p) { return ceil_div(p.count, kValues); }
int64_t screen_units(const Projection& p) {
  return round_up(rest_unit(p) + (p.axes != nullptr ? 1 : 0), 4);
}
int64_t whole_bytes(const Projection& p) { return round_up(p.dim, 128); }

// What is kept of a row besides its bytes.
struct RowFacts {
  double length;  // norm of the row as it was given; 0 or not finite: it is not searched
  float lost;     // bound of the norm of what rounding took from the coordinates; +infinity: no
                  // bound of the rest fits a byte
  float kept;     // of the norm of the coordinates that are multiplied
  float norm;     // of the norm of row - row mean
  float shared;   // with x the unit row: x . centroid mean, which no score contains
};

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
                                     tile.get() + t * kTile * p_.dim);
    for (int64_t k = 0; k < p_.dim; k += kChunk)
      kernels_for<float>().product({.a = tile.get() + k * kTile,
                                    .a_tile_stride = p_.dim * kTile,
                                    .group_units = 0,
                                    .group_stride = 0,
                                    .b = axes_.get() + k * kLanes,
                                    .b_panel_stride = p_.dim * kLanes,
                                    .out = out.get(),
                                    .out_panel_stride = tiles * kTile * kLanes,
                                    .tiles = tiles,
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

// Views into the block that order_centroids fills. Centroids are in the order of the search.
struct OrderedCentroids {
  int64_t count, panel_count, units, bytes_each;
  double* unit;                               // what a sum of the screen counts in
  double* largest_norm;                       // bounds over centroids: of the coordinates
  double* largest_lost;                       // of what rounding took from them
  double* inverse_norm;                       // [count] by id, not by order
  ByteQuad* panels;                           // of the screen
  int32_t* start;                             // [lanes]
  uint8_t* whole;                             // [count][bytes_each]
  int32_t* whole_start;                       // [count]
  int32_t* id;                                // [count]
  float *scale, *bias, *norm, *lost, *moved;  // [count]
  int64_t bytes;

  OrderedCentroids(const void* packed, int64_t count, const Projection& p)
      : count(count),
        panel_count(ceil_div(count, kLanes)),
        units(screen_units(p)),
        bytes_each(whole_bytes(p)) {
    auto* at = static_cast<char*>(const_cast<void*>(packed));
    char* const begin = at;
    const auto take = [&](auto*& pointer, int64_t values) {
      pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(at);
      at += round_up(values * static_cast<int64_t>(sizeof(*pointer)), 64);
    };
    const int64_t lanes = panel_count * kLanes;
    take(unit, 1);
    take(largest_norm, 1);
    take(largest_lost, 1);
    take(inverse_norm, count);
    take(panels, lanes * units);
    take(start, lanes);
    take(whole, count * bytes_each);
    take(whole_start, count);
    take(id, count);
    for (float** floats : {&scale, &bias, &norm, &lost, &moved}) take(*floats, count);
    bytes = at - begin;
  }
};

// Rows of one item against all centroids.
class Item {
 public:
  Item(const PrunedSearch& s, const OrderedCentroids& centroids, int64_t first, int64_t count)
      : s_(s),
        p_(s.projection),
        c_(centroids),
        row_bytes_(projected_row_bytes(s.projection)),
        first_(first),
        count_(count),
        known_(count),
        marked_(std::min(kPanelsPerSweep, round_up(centroids.panel_count, kMarkedPanels)) * kLanes +
                kMoreMarks),
        sums_(marked_.size()) {}

  SearchWork run() {
    std::vector<int64_t> searched;
    for (int64_t r = 0; r < count_; ++r)
      if (look_at(r)) searched.push_back(r);
    // Rows that stop early are together.
    std::vector<int64_t> first(c_.panel_count + 2);
    for (const int64_t r : searched) ++first[panels_of(r) + 1];
    std::partial_sum(first.begin(), first.end(), first.begin());
    std::vector<int64_t> rows(searched.size());
    for (const int64_t r : searched) rows[first[panels_of(r)]++] = r;
    for (size_t begin = 0; begin < rows.size(); begin += kRowsPerBlock)
      search_block(rows.data() + begin,
                   std::min(kRowsPerBlock, static_cast<int64_t>(rows.size() - begin)));
    return work_;
  }

 private:
  struct Known {
    double norm;     // of the row
    double cosine;   // with the guess, times norm
    double bound;    // of the cosines with what is not searched
    double reach;    // what a centroid's movement is multiplied by
    int64_t wanted;  // centroids to be searched
  };

  struct Candidate {
    double upper;  // bound of the cosine
    int32_t place;
  };

  const float* row(int64_t r) const { return s_.rows[first_ + r]; }
  int64_t panels_of(int64_t r) const { return ceil_div(known_[r].wanted, kLanes); }
  const uint8_t* projected(int64_t r) const { return s_.projected + (first_ + r) * row_bytes_; }
  RowFacts facts(int64_t r) const {
    RowFacts facts;
    std::memcpy(&facts, projected(r) + c_.units * kValues, sizeof(facts));
    return facts;
  }

  // Cosine times the norm of the row, as nearest.cpp computes it.
  double cosine(int64_t r, int64_t id) const {
    return dot(row(r), s_.centroids[id], s_.rows.dim) * c_.inverse_norm[id];
  }

  // Whether the row is to be searched; otherwise its result is written.
  bool look_at(int64_t r) {
    const int64_t i = first_ + r, guess = s_.guess[i];
    Known& known = known_[r];
    if (r + 1 < count_ && s_.guess[i + 1] >= 0) {
      const float* next = s_.centroids[s_.guess[i + 1]];
      for (int64_t k = 0; k < s_.rows.dim; k += 16) __builtin_prefetch(next + k);
    }
    known.norm = facts(r).length;
    if (!(known.norm > 0 && std::isfinite(known.norm))) {
      s_.index[i] = -1;
      s_.score[i] = known.norm == 0 ? 0.0f : std::numeric_limits<float>::quiet_NaN();
      s_.next_bound[i] = std::numeric_limits<float>::infinity();
      return false;
    }
    known.cosine = -kInfinity;
    known.wanted = c_.count;
    known.bound = -kInfinity;
    if (guess < 0) return true;
    known.cosine = cosine(r, guess);
    if (s_.bound == nullptr) return true;
    known.reach = std::max<double>(facts(r).norm, kLeastNorm);
    const double bound = s_.bound[i], floor = known.cosine / known.norm - kSlack;
    known.wanted =
        std::partition_point(c_.moved, c_.moved + c_.count,
                             [&](float moved) { return bound + known.reach * moved >= floor; }) -
        c_.moved;
    if (known.wanted > 0) return true;
    write(r, guess, known.cosine, bound + known.reach * c_.moved[0]);
    return false;
  }

  void write(int64_t r, int64_t index, double cosine, double bound) const {
    const int64_t i = first_ + r;
    s_.index[i] = index;
    s_.score[i] = static_cast<float>(cosine / known_[r].norm);
    s_.next_bound[i] = round_up_to_float(bound);
  }

  void search_block(const int64_t* rows, int64_t count) {
    const int64_t tiles = ceil_div(count, kTile);
    int64_t panels = 0;
    for (int64_t b = 0; b < count; ++b) panels = std::max(panels, panels_of(rows[b]));
    const int64_t searched = std::min(panels * kLanes, c_.count);
    const int64_t stride = std::min(round_up(panels, kMarkedPanels), kPanelsPerSweep);
    Buffer<ByteQuad> tile(tiles * kTile * c_.units);
    Buffer<uint8_t> whole(count * c_.bytes_each);
    Buffer<int32_t> limit(tiles * kTile);
    Buffer<uint16_t> marks(tiles * kTile * stride);
    std::vector<Search> state(count);
    Buffer<float> unit(c_.bytes_each);
    for (int64_t b = 0; b < tiles * kTile; ++b) {
      limit[b] = kLimit;
      const uint8_t* from = projected(rows[std::min(b, count - 1)]);
      for (int64_t u = 0; u < c_.units; ++u)
        std::memcpy(&tile[(b / kTile * c_.units + u) * kTile + b % kTile], from + u * kValues,
                    kValues);
      if (b >= count) continue;
      limit[b] = begin(rows[b], searched, state[b]);
      pack_whole(rows[b], unit.get(), whole.get() + b * c_.bytes_each, state[b]);
    }
    for (int64_t panel = 0; panel < panels; panel += kPanelsPerSweep) {
      const int64_t swept = std::min(kPanelsPerSweep, panels - panel);
      kernels().nearest->screen({{.rows = tile.get(),
                                  .row_tile_stride = c_.units * kTile,
                                  .classes = c_.panels + panel * c_.units * kLanes,
                                  .panel_stride = c_.units * kLanes,
                                  .units = c_.units,
                                  .tiles = tiles,
                                  .panels = swept},
                                 c_.start + panel * kLanes,
                                 limit.get(),
                                 marks.get(),
                                 stride});
      for (int64_t b = 0; b < count; ++b) {
        for (int64_t p = swept; p % kMarkedPanels != 0; ++p) marks[b * stride + p] = 0;
        multiply_marked(rows[b], marks.get() + b * stride, swept, panel * kLanes,
                        whole.get() + b * c_.bytes_each, state[b]);
      }
    }
    work_.screened += count * searched;
    for (int64_t b = 0; b < count; ++b) decide(rows[b], state[b]);
  }

  // A row while it is searched.
  struct Search {
    double floor;     // cosines below are not looked for
    double bound;     // of all cosines that were passed over
    double lower[2];  // bounds from below of the two largest cosines
    double shared, kept, lost, scale;
    std::vector<Candidate> candidates;
  };

  // The limit of the row's sums in the screen.
  int32_t begin(int64_t r, int64_t searched, Search& search) const {
    const Known& known = known_[r];
    const RowFacts row = facts(r);
    const double cosine = known.cosine / known.norm;
    double others = -kInfinity;  // what those that are not searched may reach
    if (searched < c_.count) others = s_.bound[first_ + r] + known.reach * c_.moved[searched];
    search.floor = std::min(cosine, std::max(cosine - s_.margin, others));
    search.bound = std::max(search.floor, others);
    search.lower[0] = cosine;
    search.lower[1] = -kInfinity;
    search.shared = row.shared;
    if (!(row.lost < kInfinity) || search.floor == -kInfinity) return -kLimit;
    const double least = (search.floor - row.shared - row.lost * *c_.largest_norm -
                          row.kept * *c_.largest_lost - kSlack) /
                         *c_.unit;
    return static_cast<int32_t>(
        std::clamp(std::floor(least) - 1, -double{kLimit}, double{kLimit} - 1));
  }

  // All dimensions of the row, in bytes.
  void pack_whole(int64_t r, float* unit, uint8_t* out, Search& search) const {
    const Bytes bytes = unit_row_to_bytes(s_.rows, first_ + r, 1 / known_[r].norm, p_.row_mean,
                                          p_.largest, p_.largest, out, c_.bytes_each, unit);
    search.scale = bytes.step;
    search.lost = 1.001 * bytes.lost;
    search.kept = 1.001 * (bytes.norm + bytes.lost);
  }

  void multiply_marked(int64_t r, const uint16_t* marks, int64_t panels, int64_t first,
                       const uint8_t* whole, Search& search) {
    const int64_t marked =
        kernels().nearest->list_marks(marks, panels, static_cast<int32_t>(first), marked_.data());
    if (marked == 0) return;
    kernels().nearest->byte_products({.row = whole,
                                      .matrix = c_.whole,
                                      .bytes = c_.bytes_each,
                                      .wanted = marked_.data(),
                                      .count = marked,
                                      .sums = sums_.data()});
    work_.multiplied += marked;
    const int64_t guess = s_.guess[first_ + r];
    for (int64_t m = 0; m < marked; ++m) {
      const int32_t j = marked_[m];
      if (c_.id[j] == guess) continue;
      const double score =
          search.scale * c_.scale[j] * (sums_[m] + c_.whole_start[j]) + c_.bias[j] + search.shared;
      const double error = search.lost * c_.norm[j] + search.kept * c_.lost[j] + kSlack;
      const double upper = score + error, lower = score - error;
      if (upper < (s_.margin > 0 ? std::max(search.floor, search.lower[1]) : search.lower[0]))
        continue;
      if (lower > search.lower[0]) {
        search.lower[1] = search.lower[0];
        search.lower[0] = lower;
      } else if (lower > search.lower[1]) {
        search.lower[1] = lower;
      }
      search.candidates.push_back({upper, j});
    }
  }

  // Compares the candidates in double: all that may be as near as the nearest, and with a margin
  // those that may be the second.
  void decide(int64_t r, Search& search) {
    const Known& known = known_[r];
    int64_t best = s_.guess[first_ + r];
    double largest = known.cosine, second = search.bound * known.norm;
    std::sort(search.candidates.begin(), search.candidates.end(),
              [](const Candidate& a, const Candidate& b) {
                return a.upper != b.upper ? a.upper > b.upper : a.place < b.place;
              });
    for (const Candidate& c : search.candidates) {
      if (c.upper * known.norm < (s_.margin > 0 ? second : largest)) break;
      const int64_t id = c_.id[c.place];
      const double other = cosine(r, id);
      ++work_.decided;
      if (best < 0 || other > largest || (other == largest && id < best)) {
        if (best >= 0) second = std::max(second, largest);
        largest = other;
        best = id;
      } else {
        second = std::max(second, other);
      }
    }
    // Without a margin some that were not decided are only known to be no nearer.
    if (!(s_.margin > 0)) second = std::max(second, largest);
    write(r, best, largest, second / known.norm + kSlack);
  }

  const PrunedSearch& s_;
  const Projection& p_;
  const OrderedCentroids& c_;
  int64_t row_bytes_, first_, count_;
  Buffer<Known> known_;
  std::vector<int32_t> marked_, sums_;
  SearchWork work_;
};

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

SearchWork search(const PrunedSearch& s, const Parallel& parallel) {
  const OrderedCentroids centroids(s.packed, s.centroids.count, s.projection);
  const int64_t share = round_up(ceil_div(s.rows.count, parallel.threads()), kRowsPerBlock);
  const int64_t size = std::min(kBlocksPerItem * kRowsPerBlock, std::max(share, kRowsPerBlock));
  std::atomic<int64_t> screened{0}, multiplied{0}, decided{0};
  parallel.run(ceil_div(s.rows.count, size), [&](int64_t item) {
    const int64_t first = item * size;
    const SearchWork work = Item(s, centroids, first, std::min(size, s.rows.count - first)).run();
    screened += work.screened;
    multiplied += work.multiplied;
    decided += work.decided;
  });
  return {screened, multiplied, decided};
}

}  // namespace unicom::cpu
