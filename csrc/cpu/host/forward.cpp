#include <algorithm>
#include <cmath>
#include <limits>

#include "../../core/softmax.h"
#include "loss.h"
#include "nearest_center.h"
#include "operands.h"

namespace unicom::cpu {

int64_t packed_bytes(const Problem& p) {
  const int64_t bytes_per_value = p.is_double() ? 8 : p.precision == Precision::kBf16 ? 2 : 4;
  const int64_t lanes = round_up(p.bound, kLanes) * p.centers;
  return lanes * panel_height(p.embeddings.dim) * bytes_per_value +
         (lanes + panel_height(p.embeddings.dim)) * static_cast<int64_t>(sizeof(double));
}

int64_t kept_bytes(const Problem& p) { return kept_panels(p) * kept_panel_bytes(p); }

namespace {

// Classes are worked through in runs, at most kRuns of them whatever the number of threads: each
// has sums of its own, which are merged in order.
constexpr int64_t kRuns = 64;
// Rows of a chunk, as they lie in memory: they stay in the second-level cache, beside the packed
// ones and the batch. A larger batch does not fit there: its classes are packed first, which is a
// small part of its time, and blocks of rows are shared among threads as well as runs.
constexpr int64_t kChunkBytes = int64_t{256} << 10;
constexpr int64_t kBlocksBesideChunk = 2;
// Rows asked for ahead must not drive out what is in use.
constexpr int64_t kMostAhead = int64_t{4} << 20;

template <class Unit>
class Forward {
  using Real = RealOf<Unit>;

 public:
  Forward(const Plan& p, const ShardSums& out, const Saved& saved, const Parallel& parallel)
      : p_(p),
        out_(out),
        saved_(saved),
        parallel_(parallel),
        s_(p),
        k_(kernels_for<Unit>()),
        classes_(saved.packed, s_),
        rows_(p, s_, parallel),
        together_(s_.blocks <= kBlocksBesideChunk),
        together_panels_(panels_together(p)),
        chunk_panels_(std::clamp(kChunkBytes / (bytes_of_row(p.prototypes) * kLanes),
                                 together_panels_, kBlockPanels) /
                      together_panels_ * together_panels_),
        run_panels_(
            std::max(chunk_panels_, round_up(ceil_div(s_.panels, kRuns), together_panels_))),
        runs_(ceil_div(s_.panels, run_panels_)),
        partial_(runs_ * s_.padded_rows),
        class_sums_(p.smooths() ? runs_ * s_.height : 0) {
    if (!constant_exponent(p.scale, static_cast<double>(p.total_sampled), &exponent_))
      exponent_ = kRunningExponent;
  }

  void run() {
    std::fill_n(class_sums_.get(), p_.smooths() ? runs_ * s_.height : 0, 0.0);
    if (together_) {
      parallel_.run(runs_, [&](int64_t run) { sum_run(run, 0, s_.blocks); });
    } else {
      parallel_.run(runs_, [&](int64_t run) {
        const int64_t first = run * run_panels_;
        pack(run, first, std::min(run_panels_, s_.panels - first));
      });
      parallel_.run(s_.blocks * runs_, [&](int64_t item) {
        const int64_t block = item % s_.blocks;
        sum_run(item / s_.blocks, block, block + 1);
      });
    }
    constexpr double kNone = -std::numeric_limits<double>::infinity();
    for (int64_t i = 0; i < p_.batch; ++i) {
      const RowSum sum = merged(i);
      const bool ignored = p_.positives.count(i) == 0;
      out_.sum(i) = ignored ? 0 : sum.sum;
      out_.exponent[i] =
          sum.exponent == kRunningExponent ? kNone : static_cast<double>(sum.exponent);
      out_.largest_negative[i] = !ignored && sum.largest > kNoCosine ? sum.largest : kNone;
      out_.inverse_norm[i] = rows_.inverse_norm[static_cast<size_t>(i)];
    }
    if (p_.smooths()) add_up_classes();
  }

  const double* class_sum() const { return p_.smooths() ? classes_.sum : nullptr; }

 private:
  void pack(int64_t run, int64_t first, int64_t panels) {
    Buffer<Real> scratch(kLanes * s_.height);
    for (int64_t j = first; j < first + panels; ++j) {
      Unit* panel = classes_.panels + j * s_.panel_units;
      k_.pack_panel(p_.prototype_rows(j % p_.centers), p_.class_index, j / p_.centers * kLanes,
                    p_.sampled, p_.rounding, scratch.get(), panel,
                    classes_.inverse_norm + j * kLanes);
      if (p_.smooths()) k_.add_lanes(panel, s_.height, class_sums_.get() + run * s_.height);
    }
  }

  // One run of classes and some blocks of the batch, chunk after chunk. Packs each chunk right
  // before, if that is to be done together, while the rows of the next one come from memory.
  void sum_run(int64_t run, int64_t first_block, int64_t end_block) {
    const int64_t begin = run * run_panels_, end = std::min(s_.panels, begin + run_panels_);
    const int64_t first_row = first_block * s_.block_tiles * kTile;
    const int64_t rows = std::min(s_.padded_rows, end_block * s_.block_tiles * kTile) - first_row;
    Buffer<Real> sums(rows * kLanes), largest(rows * kLanes);
    std::fill_n(sums.get(), rows * kLanes, Real(0));
    std::fill_n(largest.get(), rows * kLanes, static_cast<Real>(kNoCosine));
    std::fill_n(partial_.get() + run * s_.padded_rows + first_row, rows,
                RowSum{0.0, exponent_, kNoCosine});
    int64_t unflushed = 0;
    for (int64_t first = begin; first < end; first += chunk_panels_) {
      const int64_t panels = std::min(chunk_panels_, end - first);
      const bool last = first + panels == end;
      unflushed += panels;
      const bool flush = last || unflushed + chunk_panels_ > kFlushPanels;
      if (flush) unflushed = 0;
      std::vector<Span> spans;
      if (together_) {
        pack(run, first, panels);
        // After the last chunk of a run comes the first of the run that this thread may get.
        spans = spans_of(last ? (run + parallel_.threads()) * run_panels_ : first + panels);
      }
      const auto count = static_cast<int64_t>(spans.size()), blocks = end_block - first_block;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t from = b * count / blocks, to = (b + 1) * count / blocks;
        const int64_t offset = b * s_.block_tiles * kTile * kLanes;
        sum_block(run, first_block + b, first, panels, {spans.data() + from, to - from}, flush,
                  sums.get() + offset, largest.get() + offset);
      }
    }
  }

  // The rows of a chunk that begins at this panel.
  std::vector<Span> spans_of(int64_t first_panel) const {
    std::vector<Span> spans;
    if (chunk_panels_ * kLanes * bytes_of_row(p_.prototypes) > kMostAhead) return spans;
    const int64_t first = first_panel / p_.centers * kLanes;
    const int64_t end = std::min(p_.sampled, first + chunk_panels_ / p_.centers * kLanes);
    for (int64_t slot = first; slot < end; ++slot)
      for (int64_t k = 0; k < p_.centers; ++k)
        spans.push_back(
            {unicom::row_of(p_.prototypes, p_.row_of(slot, k)), bytes_of_row(p_.prototypes)});
    return spans;
  }

  void sum_block(int64_t run, int64_t block, int64_t first_panel, int64_t panels, Ahead ahead,
                 bool flush, Real* sums, Real* largest) {
    StruckLanes struck;
    SumExp<Unit> args;
    fill_block(p_, s_, rows_, classes_, saved_.kept, block, first_panel, panels, &struck, &args);
    args.exponent = exponent_;
    args.sums = sums;
    args.largest = largest;
    args.flush = flush;
    args.result = partial_.get() + run * s_.padded_rows + block * s_.block_tiles * kTile;
    args.ahead = ahead;
    k_.sum_exp(args);
  }

  void add_up_classes() {
    std::fill_n(classes_.sum, s_.height, 0.0);
    for (int64_t run = 0; run < runs_; ++run)
      for (int64_t d = 0; d < s_.height; ++d) classes_.sum[d] += class_sums_[run * s_.height + d];
  }

  RowSum merged(int64_t row) const {
    RowSum total{0.0, exponent_, kNoCosine};
    for (int64_t run = 0; run < runs_; ++run) {
      const RowSum& part = partial_[run * s_.padded_rows + row];
      total.exponent = std::max(total.exponent, part.exponent);
      total.largest = std::max(total.largest, part.largest);
    }
    for (int64_t run = 0; run < runs_; ++run) {
      const RowSum& part = partial_[run * s_.padded_rows + row];
      if (part.exponent == total.exponent) {
        total.sum += part.sum;
      } else if (part.exponent != kRunningExponent) {
        total.sum += std::ldexp(part.sum, static_cast<int>(part.exponent - total.exponent));
      }
    }
    return total;
  }

  const Plan& p_;
  const ShardSums& out_;
  const Saved& saved_;
  const Parallel& parallel_;
  const Shape<Unit> s_;
  const Kernels<Unit>& k_;
  const PackedClasses<Unit> classes_;
  const PackedRows<Unit> rows_;
  const bool together_;  // packing and multiplying
  const int64_t together_panels_, chunk_panels_, run_panels_, runs_;
  int64_t exponent_;
  Buffer<RowSum> partial_;     // [run][padded row]
  Buffer<double> class_sums_;  // [run][height], with label smoothing
};

// Cosines of each sample with its own prototypes, in double from the rows as they were given; with
// label smoothing also the sum of those with the others, which is a product with class_sum.
void target_cosines(const Plan& p, const ShardSums& out, const double* class_sum,
                    const Parallel& parallel) {
  const auto& k = kernels_for<double>();
  constexpr int64_t kSamplesPerItem = 16;
  parallel.run(ceil_div(p.batch, kSamplesPerItem), [&](int64_t item) {
    const int64_t dim = p.embeddings.dim;
    Buffer<double> x(dim);
    NearestCenter nearest(p);
    const int64_t end = std::min(p.batch, (item + 1) * kSamplesPerItem);
    for (int64_t i = item * kSamplesPerItem; i < end; ++i) {
      double* cosine = out.cosines(i);
      std::fill_n(cosine, p.positives.width, 0.0);
      Negatives& negatives = out.negatives(i);
      negatives = {};
      if (p.positives.count(i) == 0) continue;
      k.unit_row(p.embedding_rows, i, x.get(), dim);
      if (class_sum != nullptr)
        negatives = {static_cast<double>(p.sampled), k.dot(x.get(), class_sum, dim)};
      for (int64_t q = 0; q < p.positives.width; ++q) {
        const int64_t slot = p.positives.of(i)[q];
        if (slot < 0) continue;
        nearest.find(slot, x.get());
        cosine[q] = nearest.cosine();
        if (class_sum == nullptr) continue;
        negatives.count -= 1;
        negatives.cosines -= cosine[q];
      }
    }
  });
}

}  // namespace

void forward(const Problem& problem, const ShardSums& out, const Saved& saved,
             const Parallel& parallel) {
  const Plan p(problem);
  with_unit(p, [&](auto unit) {
    Forward<decltype(unit)> pass(p, out, saved, parallel);
    pass.run();
    target_cosines(p, out, pass.class_sum(), parallel);
  });
}

}  // namespace unicom::cpu
