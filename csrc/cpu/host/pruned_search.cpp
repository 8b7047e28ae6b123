#include "pruned_search.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>
#include <vector>

#include "buffers.h"
#include "byte_vectors.h"

namespace unicom::cpu {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kRowsPerBlock = kBlockTiles * kTile;
constexpr int64_t kBlocksPerItem = 4;  // whose rows stay in a second-level cache
constexpr int64_t kPanelsPerSweep = 1024;

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
    const NearestKernels& k = *kernels().nearest;
    Buffer<ByteQuad> tile(units_of_rows(tiles * kTile, c_.units, k.tile));
    Buffer<uint8_t> whole(count * c_.bytes_each);
    Buffer<int32_t> limit(tiles * kTile);
    Buffer<uint16_t> marks(tiles * kTile * stride);
    std::vector<Search> state(count);
    Buffer<float> unit(c_.bytes_each);
    for (int64_t b = 0; b < tiles * kTile; ++b) {
      limit[b] = kLimit;
      const uint8_t* from = projected(rows[std::min(b, count - 1)]);
      write_row(from, c_.units, k.tile, b, tile.get());
      if (b >= count) continue;
      limit[b] = begin(rows[b], searched, state[b]);
    }
    for (int64_t panel = 0; panel < panels; panel += kPanelsPerSweep) {
      const int64_t swept = std::min(kPanelsPerSweep, panels - panel);
      k.screen({{{.rows = tile.get(),
                  .row_tile_stride = k.tile.padded(c_.units) * kTile,
                  .classes = c_.panels + panel * c_.units * kLanes,
                  .panel_stride = c_.units * kLanes,
                  .units = c_.units,
                  .tiles = tiles,
                  .panels = swept},
                 c_.start + panel * kLanes},
                limit.get(),
                marks.get(),
                stride});
      for (int64_t b = 0; b < count; ++b) {
        for (int64_t p = swept; p % kMarkedPanels != 0; ++p) marks[b * stride + p] = 0;
        const int64_t marked = k.list_marks(marks.get() + b * stride, swept,
                                            static_cast<int32_t>(panel * kLanes), marked_.data());
        if (marked == 0) continue;
        uint8_t* bytes = whole.get() + b * c_.bytes_each;
        if (!(state[b].scale > 0)) pack_whole(rows[b], unit.get(), bytes, state[b]);
        multiply_marked(rows[b], marked, bytes, state[b]);
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
    double shared;
    double kept, lost, scale = 0;  // of the whole row in bytes; 0: not there yet
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

  // All dimensions of the row, in bytes: once any centroid is marked.
  void pack_whole(int64_t r, float* unit, uint8_t* out, Search& search) const {
    const Bytes bytes = unit_row_to_bytes(s_.rows, first_ + r, 1 / known_[r].norm, p_.row_mean,
                                          p_.largest, p_.largest, out, c_.bytes_each, unit);
    search.scale = bytes.step;
    search.lost = 1.001 * bytes.lost;
    search.kept = 1.001 * (bytes.norm + bytes.lost);
  }

  void multiply_marked(int64_t r, int64_t marked, const uint8_t* whole, Search& search) {
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
