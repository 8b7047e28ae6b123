#include <algorithm>
#include <cmath>
#include <numeric>

#include "../../core/softmax.h"
#include "gradient_rows.h"
#include "loss.h"
#include "nearest_center.h"
#include "samples.h"

namespace unicom::cpu {

namespace {

// The positives' part of the gradients of one sample, in double from the rows as they were given:
// d loss / d cosine = -weight * scale * pull * slope, and d cosine / d x = (w^ - c x^) / |x|.
// And label smoothing's, which takes all classes alike: the positives, which are none of the
// negatives, get theirs back.
template <class Real>
class TargetGradients {
 public:
  // class_sum: of the unit prototypes; nullptr without label smoothing.
  TargetGradients(const Plan& p, const States& states, const double* class_sum)
      : p_(p),
        states_(states),
        class_sum_(class_sum),
        dim_(p.embeddings.dim),
        x_(dim_),
        sum_(dim_),
        nearest_(p) {}

  // embedding [dim], prototypes [width][dim], of which those of other shards are left alone:
  // nullptr where not wanted. place [width]: of each prototype among the packed ones, where it is.
  void operator()(int64_t i, double weight, Real* embedding, Real* prototypes, int64_t* place) {
    const auto& k = kernels_for<double>();
    double x_inverse = 0, smooth = 0;
    bool found = false;
    if (class_sum_ != nullptr && states_.sample(i).smooth > 0) {
      found = true;
      smooth = weight * p_.scale * states_.sample(i).smooth;
      x_inverse = k.unit_row(p_.embedding_rows, i, x_.get(), dim_);
      const double dot = k.dot(x_.get(), class_sum_, dim_);
      for (int64_t d = 0; d < dim_; ++d)
        sum_[d] = -smooth * x_inverse * (class_sum_[d] - dot * x_[d]);
    }
    for (int64_t q = 0; q < p_.positives.width; ++q) {
      const int64_t slot = p_.positives.of(i)[q];
      if (slot < 0) continue;
      if (!found) x_inverse = k.unit_row(p_.embedding_rows, i, x_.get(), dim_);
      nearest_.find(slot, x_.get());
      place[q] = p_.place_of(slot, nearest_.center());
      const PositiveState& state = states_.positive(i, q);
      const double factor = smooth - weight * p_.scale * state.pull * state.slope;
      const double *x = x_.get(), *w = nearest_.unit();
      double* sum = sum_.get();
      if (embedding != nullptr) {
        for (int64_t d = 0; d < dim_; ++d) {
          const double value = factor * x_inverse * (w[d] - state.cosine * x[d]);
          sum[d] = found ? sum[d] + value : value;
        }
      }
      for (int64_t d = 0; d < dim_ && prototypes != nullptr; ++d)
        prototypes[q * dim_ + d] =
            static_cast<Real>(factor * nearest_.inverse_norm() * (x[d] - state.cosine * w[d]));
      found = true;
    }
    for (int64_t d = 0; d < dim_ && embedding != nullptr; ++d)
      embedding[d] = found ? static_cast<Real>(sum_.get()[d]) : Real(0);
  }

 private:
  const Plan& p_;
  const States& states_;
  const double* class_sum_;
  const int64_t dim_;
  Buffer<double> x_, sum_;
  NearestCenter nearest_;
};

// Works through the sampled classes in runs. For each run, over all rows of the batch:
//   1. the tile of probabilities, in the two layouts the products want;
//   2. the run's prototype gradients, complete, straight to their rows;
//   3. its share of the embedding gradients.
// Each number is summed by one thread in a fixed order, so nothing depends on their count.
template <class Unit>
class Backward {
  using Real = RealOf<Unit>;
  static constexpr int64_t kValues = Shape<Unit>::kValues;
  static constexpr int64_t kGroup = kLanes / kValues;  // units of one panel of classes
  static constexpr int64_t kPanelsPerItem = kPanelsTogether;
  // Probabilities of one run, per layout: bounded, so that they stay in cache.
  static constexpr int64_t kRunElements = int64_t{1} << 20;
  // Panels that an embedding gradient sums over in Real before the sum joins one in double: with a
  // million classes one sum in float32 has a relative error of 1e-4.
  static constexpr int64_t kPanelsInReal = 256;

 public:
  Backward(const Plan& p, const Gradients& gradients, const RowUpdate* update,
           const Parallel& parallel)
      : p_(p),
        g_(gradients),
        update_(update),
        parallel_(parallel),
        s_(p),
        k_(kernels_for<Unit>()),
        rows_(p, s_, parallel),
        classes_(const_cast<void*>(gradients.packed), s_),
        logit_panels_(p.centers == 1
                          ? kPanelsPerItem
                          : p.centers * std::max<int64_t>(1, kPanelsPerItem / p.centers)),
        run_panels_(run_panels(std::lcm(logit_panels_, kPanelsPerItem))),
        row_units_(s_.tiles * kTile / kValues),
        row_stride_(s_.padded_rows / kValues),
        tall_(round_up(s_.height, k_.tile.rows)),
        weighted_stride_(k_.tile.padded(row_stride_) * k_.tile.rows),
        row_panels_(s_.padded_rows / kLanes),
        along_rows_(run_panels_ * row_stride_ * kLanes),
        along_classes_(row_panels_ * run_panels_ * kGroup * kLanes),
        weighted_(want_prototypes() ? tall_ / k_.tile.rows * weighted_stride_ : 0),
        class_units_(kValues > 1 && want_embeddings()
                         ? round_up(run_panels_ * kGroup, k_.tile.class_units) * tall_
                         : 0),
        embedding_gradient_(want_embeddings() ? row_panels_ * s_.height * kLanes : 0),
        embedding_sum_(want_embeddings() ? row_panels_ * s_.height * kLanes : 0),
        target_embedding_(want_embeddings() ? p.batch * s_.dim : 0),
        target_prototype_(want_prototypes() ? p.batch * p.positives.width * s_.dim : 0),
        smooth_(p.smooths() && want_prototypes() ? s_.height : 0) {}

  void run() {
    prepare_rows();
    if (s_.panels == 0 && want_embeddings())  // a shard without classes
      std::fill_n(embedding_sum_.get(), row_panels_ * s_.height * kLanes, 0.0);
    int64_t summed = 0;  // panels in embedding_gradient_
    for (int64_t first = 0; first < s_.panels; first += run_panels_) {
      const int64_t panels = std::min(run_panels_, s_.panels - first);
      const int64_t tiles = s_.blocks * ceil_div(panels, logit_panels_);
      const int64_t reorders = kValues > 1 && want_embeddings() ? panels : 0;
      parallel_.run(tiles + reorders, [&](int64_t item) {
        if (item < tiles)
          probabilities(first, panels, item % s_.blocks, item / s_.blocks);
        else
          reorder(first, item - tiles);
      });
      const int64_t class_items = want_prototypes() ? ceil_div(panels, kPanelsPerItem) : 0;
      const int64_t row_items = want_embeddings() ? ceil_div(row_panels_, kPanelsPerItem) : 0;
      parallel_.run(class_items + row_items, [&](int64_t item) {
        if (item < class_items)
          prototype_gradients(first, panels, item);
        else
          add_embedding_gradients(first, panels, summed, item - class_items);
      });
      summed = summed + panels < kPanelsInReal ? summed + panels : 0;
    }
    if (want_embeddings()) finish_embeddings();
  }

 private:
  // Of a run: whole multiples of `step`, which is at least kPanelsPerItem.
  int64_t run_panels(int64_t step) const {
    const int64_t fit = round_up(kRunElements / (s_.padded_rows * kLanes), step);
    return std::min(round_up(s_.panels, step), std::clamp(fit, step, 256 / step * step));
  }
  bool want_prototypes() const { return g_.prototypes != nullptr || update_ != nullptr; }
  bool want_embeddings() const { return g_.embeddings != nullptr || g_.radial != nullptr; }

  // Upstream gradient of each sample's loss.
  std::vector<double> upstream_weights() const {
    std::vector<double> weights(static_cast<size_t>(p_.batch), 0.0);
    const auto* grad = static_cast<const Real*>(g_.grad_loss);
    const double factor = reduction_factor(g_.reduction, p_.positives, p_.batch);
    const bool each = g_.reduction == Reduction::kNone;
    for (int64_t i = 0; i < p_.batch; ++i)
      if (p_.positives.count(i) > 0)
        weights[static_cast<size_t>(i)] = factor * static_cast<double>(grad[each ? i : 0]);
    return weights;
  }

  void prepare_rows() {
    // Rows without gradient: factor 0, and an exponent that no exponential overflows.
    const auto largest = static_cast<int64_t>(std::ceil(p_.scale / kLn2)) + 1;
    const std::vector<double> upstream = upstream_weights();
    row_scale_.resize(static_cast<size_t>(s_.padded_rows), RowScale{0.0, largest});
    weight_.resize(static_cast<size_t>(s_.padded_rows), 0.0);
    for (int64_t i = 0; i < p_.batch; ++i) {
      const SampleState& state = g_.states.sample(i);
      if (p_.positives.count(i) == 0 || state.factor == 0) continue;
      row_scale_[static_cast<size_t>(i)] = {state.factor, static_cast<int64_t>(state.exponent)};
      weight_[static_cast<size_t>(i)] = upstream[static_cast<size_t>(i)] * p_.scale * state.push;
    }
    constexpr int64_t kSamplesPerItem = 16;  // targets: now, before prototypes are updated
    const int64_t* slots = p_.positives.slots;
    place_.assign(slots, slots + p_.batch * p_.positives.width);
    parallel_.run(ceil_div(p_.batch, kSamplesPerItem), [&](int64_t item) {
      TargetGradients<Real> gradients(p_, g_.states, p_.smooths() ? classes_.sum : nullptr);
      const int64_t end = std::min(p_.batch, (item + 1) * kSamplesPerItem);
      const int64_t width = p_.positives.width;
      for (int64_t i = item * kSamplesPerItem; i < end; ++i) {
        Real* embedding = want_embeddings() ? target_embedding_.get() + i * s_.dim : nullptr;
        Real* prototypes =
            want_prototypes() ? target_prototype_.get() + i * width * s_.dim : nullptr;
        gradients(i, upstream[static_cast<size_t>(i)], embedding, prototypes,
                  place_.data() + i * width);
      }
    });
    if (want_prototypes()) {
      if (p_.smooths()) sum_smoothed(upstream);
      constexpr int64_t kRows = Shape<Unit>::kRowGranule;
      parallel_.run(s_.padded_rows / kRows, [&](int64_t granule) {
        k_.pack_weighted(rows_.unit.get(), s_.height, weight_.data(), granule * kRows, kRows,
                         weighted_stride_, weighted_.get());
      });
      // Positives by prototype, those of one in batch order: the order of their sum.
      by_place_.resize(place_.size());
      std::iota(by_place_.begin(), by_place_.end(), int64_t{0});
      std::stable_sort(by_place_.begin(), by_place_.end(),
                       [&](int64_t a, int64_t b) { return place_of(a) < place_of(b); });
    }
  }

  // What label smoothing adds to the gradient of each unit prototype.
  void sum_smoothed(const std::vector<double>& upstream) {
    std::vector<double> sum(static_cast<size_t>(s_.height), 0.0);
    for (int64_t i = 0; i < p_.batch; ++i) {
      const double weight =
          -upstream[static_cast<size_t>(i)] * p_.scale * g_.states.sample(i).smooth;
      const Real* x = rows_.unit.get() + i * s_.height;
      if (weight != 0)
        for (int64_t d = 0; d < s_.height; ++d) sum[static_cast<size_t>(d)] += weight * x[d];
    }
    for (int64_t d = 0; d < s_.height; ++d)
      smooth_[d] = static_cast<Real>(sum[static_cast<size_t>(d)]);
  }

  void probabilities(int64_t first_panel, int64_t panels, int64_t block, int64_t group) {
    const int64_t offset = group * logit_panels_;  // within the run
    const int64_t first_row = block * s_.block_tiles * kTile;
    StruckLanes struck;
    Probabilities<Unit> a;
    fill_block(p_, s_, rows_, classes_, g_.kept, block, first_panel + offset,
               std::min(logit_panels_, panels - offset), &struck, &a);
    a.row = row_scale_.data() + first_row;
    a.along_rows = along_rows_.get() + (offset * row_stride_ + first_row / kValues) * kLanes;
    a.along_rows_stride = row_stride_ * kLanes;
    a.along_classes_stride = run_panels_ * kGroup * kLanes;
    a.along_classes = along_classes_.get() + first_row / kLanes * a.along_classes_stride +
                      offset * kGroup * kLanes;
    k_.probabilities(a);
  }

  int64_t place_of(int64_t positive) const { return place_[static_cast<size_t>(positive)]; }
  int64_t slot_of(int64_t panel) const { return panel / p_.centers * kLanes; }
  int64_t lanes_of(int64_t panel) const { return std::min(kLanes, p_.sampled - slot_of(panel)); }

  void reorder(int64_t first_panel, int64_t panel) {
    const int64_t unit = panel * kGroup, group = k_.tile.class_units;
    k_.lanes_to_units(classes_.panels + (first_panel + panel) * s_.panel_units, s_.height,
                      class_units_.get() + unit / group * group * tall_ + unit % group);
  }

  void prototype_gradients(int64_t first_panel, int64_t panels, int64_t group) {
    const int64_t offset = group * kPanelsPerItem;
    const int64_t count = std::min(kPanelsPerItem, panels - offset);
    const int64_t size = s_.height * kLanes;
    Buffer<Real> gradient(count * size), rows(size);
    Product<Unit> a;
    a.a_tile_stride = weighted_stride_;
    a.group_units = k_.tile.units;
    a.group_stride = k_.tile.units * k_.tile.rows;
    a.b = along_rows_.get() + offset * row_stride_ * kLanes;
    a.b_panel_stride = row_stride_ * kLanes;
    a.out_panel_stride = size;
    a.panels = count;
    a.units = row_units_;
    a.accumulate = p_.smooths();
    for (int64_t k = 0; k < count * s_.height && p_.smooths(); ++k)
      std::fill_n(gradient.get() + k * kLanes, kLanes, smooth_[k % s_.height]);
    a.rows = s_.height;
    a.a = weighted_.get();
    a.out = gradient.get();
    // The rows that the optimizer will want come from memory while this multiplies.
    std::vector<Span> spans;
    if (update_ != nullptr) {
      for (int64_t panel = first_panel + offset; panel < first_panel + offset + count; ++panel) {
        const int64_t slot = slot_of(panel);
        for (int64_t lane = 0; lane < lanes_of(panel); ++lane)
          update_->add_spans(p_.row_of(slot + lane, panel % p_.centers), &spans);
      }
    }
    a.ahead = {spans.data(), static_cast<int64_t>(spans.size())};
    k_.product(a);
    PrototypeRows<Unit> out(p_, g_, update_);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t panel = first_panel + offset + j;
      k_.unit_backward(gradient.get() + j * size, classes_.panels + panel * s_.panel_units, s_.dim,
                       classes_.inverse_norm + panel * kLanes, rows.get());
      const int64_t first = panel * kLanes;
      auto positive =
          std::lower_bound(by_place_.begin(), by_place_.end(), first,
                           [&](int64_t i, int64_t place) { return place_of(i) < place; });
      for (; positive != by_place_.end() && place_of(*positive) < first + kLanes; ++positive) {
        const Real* target = target_prototype_.get() + *positive * s_.dim;
        Real* row = rows.get() + (place_of(*positive) - first) * s_.height;
        for (int64_t d = 0; d < s_.dim; ++d) row[d] += target[d];
      }
      out.put(slot_of(panel), panel % p_.centers, lanes_of(panel), rows.get(), s_.height);
    }
  }

  void add_embedding_gradients(int64_t first_panel, int64_t panels, int64_t summed, int64_t item) {
    const int64_t row_panel = item * kPanelsPerItem;
    Product<Unit> a;
    a.group_units = k_.tile.class_units;
    if (kValues > 1) {
      a.a = class_units_.get();
      a.group_stride = tall_ * a.group_units;
    } else {
      a.a = classes_.panels + first_panel * s_.panel_units;
      a.group_stride = s_.panel_units;
    }
    a.a_tile_stride = k_.tile.rows * a.group_units;
    a.b_panel_stride = run_panels_ * kGroup * kLanes;
    a.b = along_classes_.get() + row_panel * a.b_panel_stride;
    a.out_panel_stride = s_.height * kLanes;
    a.out = embedding_gradient_.get() + row_panel * a.out_panel_stride;
    a.rows = s_.height;
    // Panels past the last row are not needed.
    a.panels = std::min(kPanelsPerItem, ceil_div(p_.batch, kLanes) - row_panel);
    a.units = panels * kGroup;
    a.accumulate = summed > 0;
    if (a.panels <= 0) return;
    k_.product(a);
    if (summed + panels < kPanelsInReal && first_panel + panels < s_.panels) return;
    double* sum = embedding_sum_.get() + row_panel * a.out_panel_stride;
    const bool is_first = first_panel == summed;
    for (int64_t k = 0; k < a.panels * a.out_panel_stride; ++k)
      sum[k] = is_first ? a.out[k] : sum[k] + a.out[k];
  }

  void finish_embeddings() {
    const RowSink out = sink(p_.embeddings, g_.embeddings, p_.dim);
    parallel_.run(ceil_div(p_.batch, kLanes), [&](int64_t panel) {
      Buffer<Real> gradient(s_.dim), row(s_.dim);
      const double* lines = embedding_sum_.get() + panel * s_.height * kLanes;
      const int64_t end = std::min(p_.batch, (panel + 1) * kLanes);
      for (int64_t i = panel * kLanes; i < end; ++i) {
        if (p_.positives.count(i) == 0) continue;  // its row stays zero
        const int64_t lane = i - panel * kLanes;
        const Real* x = rows_.unit.get() + i * s_.height;
        for (int64_t d = 0; d < s_.dim; ++d)
          gradient[d] = static_cast<Real>(lines[d * kLanes + lane]);
        const double dot = k_.dot(gradient.get(), x, s_.dim);
        if (g_.radial != nullptr) g_.radial[i] = g_.states.sample(i).push * dot;
        if (g_.embeddings == nullptr) continue;
        const double factor = weight_[static_cast<size_t>(i)] * g_.states.sample(i).inverse_norm;
        const Real* target = target_embedding_.get() + i * s_.dim;
        for (int64_t d = 0; d < s_.dim; ++d)
          row[d] = static_cast<Real>(factor * (gradient[d] - dot * x[d])) + target[d];
        write_row(out, i, row.get());
      }
    });
  }

  const Plan& p_;
  const Gradients& g_;
  const RowUpdate* update_;
  const Parallel& parallel_;
  const Shape<Unit> s_;
  const Kernels<Unit>& k_;
  const PackedRows<Unit> rows_;
  const PackedClasses<Unit> classes_;
  const int64_t logit_panels_;     // panels of whole classes that probabilities are computed for
  const int64_t run_panels_;       // panels in a run of classes
  const int64_t row_units_;        // what a prototype gradient sums over
  const int64_t row_stride_;       // units from one class panel to the next
  const int64_t tall_;             // height, padded to tiles
  const int64_t weighted_stride_;  // units from one tile of weighted rows to the next
  const int64_t row_panels_;
  Buffer<Unit> along_rows_;          // [run panel][row unit][16 classes]
  Buffer<Unit> along_classes_;       // [row panel][class unit][16 rows]
  Buffer<Unit> weighted_;            // tiles over dimensions, units along rows
  Buffer<Unit> class_units_;         // pairs along classes, a group of them for each of tall_; bf16
  Buffer<Real> embedding_gradient_;  // [row panel][height][16], of up to kPanelsInReal panels
  Buffer<double> embedding_sum_;     // [row panel][height][16], of the panels before them
  Buffer<Real> target_embedding_;    // [batch][dim], the positives' part of each sample's gradient
  Buffer<Real> target_prototype_;    // [batch][width][dim], and of that of each one's prototype
  Buffer<Real> smooth_;              // [height], label smoothing's part of each one's
  std::vector<RowScale> row_scale_;
  std::vector<double> weight_;
  std::vector<int64_t> place_;  // [batch][width] of each positive's nearest prototype, or its slot
  std::vector<int64_t> by_place_;
};

// Zeros what will not be written: all but the leading rows of which every value will be.
void clear_rest(const Plan& p, const Gradients& g, const Parallel& parallel) {
  const auto clear = [&](void* data, DType dtype, int64_t rows, bool all_written, int64_t written) {
    if (data == nullptr) return;
    const int64_t skipped = all_written && p.batch > 0 ? written : 0,
                  bytes = p.dim * bytes_of(dtype);
    fill_zero(static_cast<char*>(data) + skipped * bytes, (rows - skipped) * bytes, parallel);
  };
  if (g.radial != nullptr) std::fill_n(g.radial, p.batch, 0.0);
  const bool whole_rows = p.embeddings.columns == nullptr;
  clear(g.embeddings, p.embeddings.dtype, p.batch,
        whole_rows && count_kept(p.positives, p.batch) == p.batch, p.batch);
  if (g.compact)
    clear(g.prototypes, p.prototypes.dtype, p.bound * p.centers, true, p.sampled * p.centers);
  else
    clear(g.prototypes, p.prototypes.dtype, p.num_classes * p.centers,
          whole_rows && p.class_index == nullptr, p.num_classes * p.centers);
}

template <class Unit>
void run(const Plan& p, const Gradients& g, const RowUpdate* update, const Parallel& parallel) {
  if (p.batch > 0) return Backward<Unit>(p, g, update, parallel).run();
  if (update != nullptr) {  // to the optimizer a gradient of zeros is a step all the same
    PrototypeRows<Unit> out(p, g, update);
    const std::vector<RealOf<Unit>> zeros(static_cast<size_t>(p.prototypes.dim));
    for (int64_t j = 0; j < p.sampled; ++j)
      for (int64_t k = 0; k < p.centers; ++k) out.put(j, k, 1, zeros.data(), p.prototypes.dim);
  }
}

}  // namespace

void backward(const Problem& problem, const Gradients& g, const RowUpdate* update,
              const Parallel& parallel) {
  const Plan p(problem);
  clear_rest(p, g, parallel);
  with_unit(p, [&](auto unit) { run<decltype(unit)>(p, g, update, parallel); });
}

}  // namespace unicom::cpu
