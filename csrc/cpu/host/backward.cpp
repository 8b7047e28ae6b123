#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "../../core/softmax.h"
#include "operands.h"
#include "row_updates.h"

namespace unicom {

namespace {

// A gradient larger than the caches gains nothing from passing through them: stores that go past
// them do not read the memory first.
void zero_piece(char* data, size_t bytes) {
#if defined(__SSE2__)
  const size_t lines = bytes / 64;
  for (size_t i = 0; i < lines; ++i, data += 64)
    for (int j = 0; j < 4; ++j)
      _mm_stream_si128(reinterpret_cast<__m128i*>(data) + j, _mm_setzero_si128());
  _mm_sfence();
  bytes -= lines * 64;
#endif
  std::memset(data, 0, bytes);
}

}  // namespace

void fill_zero(void* data, int64_t bytes, const Parallel& parallel) {
  constexpr int64_t kPiece = int64_t{1} << 20;
  const bool past_caches = bytes > kCacheBytes && reinterpret_cast<uintptr_t>(data) % 64 == 0;
  parallel.run(ceil_div(bytes, kPiece), [&](int64_t i) {
    char* piece = static_cast<char*>(data) + i * kPiece;
    const auto size = static_cast<size_t>(std::min(kPiece, bytes - i * kPiece));
    if (past_caches)
      zero_piece(piece, size);
    else
      std::memset(piece, 0, size);
  });
}

namespace {

template <class To, class Real>
void write_columns(To* row, const RowSink& sink, const Real* values) {
  auto convert = [](Real value) -> To {
    if constexpr (std::is_same_v<To, uint16_t>)
      return cpu::float_to_bf16(static_cast<float>(value));
    else
      return static_cast<To>(value);
  };
  if (sink.columns == nullptr) {
    for (int64_t k = 0; k < sink.dim; ++k) row[k] = convert(values[k]);
  } else {
    for (int64_t k = 0; k < sink.dim; ++k) row[sink.columns[k]] = convert(values[k]);
  }
}

template <class Real>
void write_row(const RowSink& sink, int64_t id, const Real* values) {
  const int64_t offset = id * sink.row_stride;
  switch (sink.dtype) {
    case cpu::DType::kFloat32:
      return write_columns(static_cast<float*>(sink.data) + offset, sink, values);
    case cpu::DType::kFloat64:
      return write_columns(static_cast<double*>(sink.data) + offset, sink, values);
    case cpu::DType::kBFloat16:
      return write_columns(static_cast<uint16_t*>(sink.data) + offset, sink, values);
    case cpu::DType::kFloat16:
      return write_columns(static_cast<_Float16*>(sink.data) + offset, sink, values);
  }
}

// The target's part of the gradients of one sample, in double from the rows as they were given:
// d loss / d cosine = -weight * scale * miss * slope, and d cosine / d x = (w^ - c x^) / |x|.
// embedding and prototype [dim]: nullptr where not wanted.
template <class Real>
void target_gradients(const Problem& p, const BackwardArgs& args, int64_t i, double* x, double* w,
                      Real* embedding, Real* prototype) {
  const auto& k = kernels_for<double>();
  const int64_t dim = p.embeddings.dim;
  const SampleState& state = args.state[i];
  const double x_inverse = k.unit_row(p.embeddings, i, x, dim);
  const double w_inverse = k.unit_row(p.prototypes, class_of(p, i), w, dim);
  const double factor = -args.weight[i] * p.scale * state.miss * state.slope;
  for (int64_t d = 0; d < dim && embedding != nullptr; ++d)
    embedding[d] = static_cast<Real>(factor * x_inverse * (w[d] - state.cosine * x[d]));
  for (int64_t d = 0; d < dim && prototype != nullptr; ++d)
    prototype[d] = static_cast<Real>(factor * w_inverse * (x[d] - state.cosine * w[d]));
}

// Where the finished rows of the prototype gradient go, panel by panel: to a matrix, or to the
// optimizer at once.
template <class Unit>
class PrototypeRows {
  using Real = RealOf<Unit>;

 public:
  PrototypeRows(const Problem& p, const BackwardArgs& args)
      : p_(p),
        args_(args),
        width_(args.prototypes.row_stride),
        spread_(whole() && args.prototypes.columns != nullptr),
        rows_(spread_ ? kLanes * width_ : 0),
        converted_(args.update != nullptr ? width_ : 0) {
    std::fill_n(rows_.get(), spread_ ? kLanes * width_ : 0, Real(0));
  }
#if defined(__SSE2__)
  ~PrototypeRows() { _mm_sfence(); }
#endif

  // rows [count][height] of the selected columns, of the slots from `first` on
  void put(int64_t first, int64_t count, const Real* rows, int64_t height) {
    if (!whole()) {
      for (int64_t r = 0; r < count; ++r)
        write_row(args_.prototypes, id_of(first + r), rows + r * height);
      return;
    }
    if (spread_) {
      kernels_for<Unit>().spread_rows(rows, height, count, p_.prototypes, rows_.get(), width_);
      rows = rows_.get();
      height = width_;
    }
    RowSink sink{args_.prototypes.data, args_.prototypes.dtype, width_, nullptr, width_};
    for (int64_t r = 0; r < count; ++r) {
      const Real* row = rows + r * height;
      if (args_.update == nullptr) {
        if (!store_past_caches(sink, first + r, row)) write_row(sink, first + r, row);
        continue;
      }
      const cpu::DType dtype = arithmetic(sink.dtype);
      const void* gradient = row;
      if (cpu::bytes_of(dtype) != sizeof(Real)) {
        write_row({converted_.get(), dtype, 0, nullptr, width_}, 0, row);
        gradient = converted_.get();
      }
      args_.update->step(id_of(first + r), gradient,
                         id_of(first + std::min(r + kRowsAhead, count - 1)));
    }
  }

 private:
  bool whole() const { return args_.compact || args_.update != nullptr; }
  int64_t id_of(int64_t slot) const { return p_.class_index ? p_.class_index[slot] : slot; }

  // A gradient larger than the caches gains nothing from passing through them.
  bool store_past_caches(const RowSink& sink, int64_t slot, const Real* row) const {
#if defined(__SSE2__)
    const int64_t bytes = width_ * static_cast<int64_t>(sizeof(Real));
    auto* to = reinterpret_cast<__m128i*>(static_cast<char*>(sink.data) + slot * bytes);
    if (sink.dtype == cpu::DType::kFloat32 && sizeof(Real) == 4 && bytes % 16 == 0 &&
        bytes * p_.sampled > kCacheBytes && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
      const auto* from = reinterpret_cast<const __m128i*>(row);
      for (int64_t i = 0; i < bytes / 16; ++i) _mm_stream_si128(to + i, _mm_loadu_si128(from + i));
      return true;
    }
#endif
    return false;
  }

  const Problem& p_;
  const BackwardArgs& args_;
  const int64_t width_;       // of a whole row
  const bool spread_;         // columns were selected
  Buffer<Real> rows_;         // [16][width], zero where columns were not selected
  Buffer<double> converted_;  // wide enough for any type
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
  static constexpr int64_t kPanelsPerItem = 4;
  // Probabilities of one run, per layout: bounded, so that they stay in cache.
  static constexpr int64_t kRunElements = int64_t{1} << 20;

 public:
  Backward(const Problem& p, const BackwardArgs& args, const Parallel& parallel)
      : p_(p),
        args_(args),
        parallel_(parallel),
        s_(p),
        k_(kernels_for<Unit>()),
        rows_(p, s_, parallel),
        classes_(const_cast<void*>(args.packed), s_),
        run_panels_(
            std::min(round_up(s_.panels, kPanelsPerItem),
                     std::clamp<int64_t>(round_up(kRunElements / (s_.padded_rows * kLanes), 4),
                                         kPanelsPerItem, 256))),
        row_units_(s_.tiles * kTile / kValues),
        row_stride_(s_.padded_rows / kValues),
        row_panels_(s_.padded_rows / kLanes),
        along_rows_(run_panels_ * row_stride_ * kLanes),
        along_classes_(row_panels_ * run_panels_ * kGroup * kLanes),
        weighted_(want_prototypes() ? row_stride_ * s_.height : 0),
        class_units_(kValues > 1 && want_embeddings() ? run_panels_ * s_.height * kGroup : 0),
        embedding_gradient_(want_embeddings() ? row_panels_ * s_.height * kLanes : 0),
        target_embedding_(want_embeddings() ? p.batch * s_.dim : 0),
        target_prototype_(want_prototypes() ? p.batch * s_.dim : 0) {}

  void run() {
    prepare_rows();
    if (s_.panels == 0 && want_embeddings())  // a shard without classes
      std::fill_n(embedding_gradient_.get(), row_panels_ * s_.height * kLanes, Real(0));
    for (int64_t first = 0; first < s_.panels; first += run_panels_) {
      const int64_t panels = std::min(run_panels_, s_.panels - first);
      const int64_t groups = ceil_div(panels, kPanelsPerItem);
      const int64_t reorders = kValues > 1 && want_embeddings() ? panels : 0;
      parallel_.run(s_.blocks * groups + reorders, [&](int64_t item) {
        if (item < s_.blocks * groups)
          probabilities(first, panels, item % s_.blocks, item / s_.blocks);
        else
          reorder(first, item - s_.blocks * groups);
      });
      const int64_t class_items = want_prototypes() ? groups : 0;
      const int64_t row_items = want_embeddings() ? ceil_div(row_panels_, kPanelsPerItem) : 0;
      parallel_.run(class_items + row_items, [&](int64_t item) {
        if (item < class_items)
          prototype_gradients(first, panels, item);
        else
          add_embedding_gradients(first, panels, item - class_items);
      });
    }
    if (want_embeddings()) finish_embeddings();
  }

 private:
  bool want_prototypes() const {
    return args_.prototypes.data != nullptr || args_.update != nullptr;
  }
  bool want_embeddings() const { return args_.embeddings.data != nullptr; }

  void prepare_rows() {
    // Rows without gradient: factor 0, and an exponent that no exponential overflows.
    const auto largest = static_cast<int64_t>(std::ceil(p_.scale / kLn2)) + 1;
    row_scale_.resize(static_cast<size_t>(s_.padded_rows), cpu::RowScale{0.0, largest});
    weight_.resize(static_cast<size_t>(s_.padded_rows), 0.0);
    for (int64_t i = 0; i < p_.batch; ++i) {
      const SampleState& state = args_.state[i];
      if (p_.slot[i] == kIgnoredSlot || state.factor == 0) continue;
      row_scale_[static_cast<size_t>(i)] = {state.factor, static_cast<int64_t>(state.exponent)};
      weight_[static_cast<size_t>(i)] = args_.weight[i] * p_.scale * state.miss;
    }
    constexpr int64_t kSamplesPerItem = 16;  // targets: now, before prototypes are updated
    parallel_.run(ceil_div(p_.batch, kSamplesPerItem), [&](int64_t item) {
      Buffer<double> x(s_.dim), w(s_.dim);
      const int64_t end = std::min(p_.batch, (item + 1) * kSamplesPerItem);
      for (int64_t i = item * kSamplesPerItem; i < end; ++i) {
        Real* embedding = want_embeddings() ? target_embedding_.get() + i * s_.dim : nullptr;
        Real* prototype = want_prototypes() ? target_prototype_.get() + i * s_.dim : nullptr;
        if (p_.slot[i] >= 0)
          target_gradients(p_, args_, i, x.get(), w.get(), embedding, prototype);
        else if (want_embeddings())
          std::fill_n(embedding, s_.dim, Real(0));
      }
    });
    if (want_prototypes()) {
      constexpr int64_t kRows = Shape<Unit>::kRowGranule;
      parallel_.run(s_.padded_rows / kRows, [&](int64_t granule) {
        k_.pack_weighted(rows_.unit.get(), s_.height, weight_.data(), granule * kRows, kRows,
                         row_stride_ * kTile, weighted_.get());
      });
      // Samples by slot, those of one class in batch order: the order of their sum.
      by_slot_.resize(static_cast<size_t>(p_.batch));
      std::iota(by_slot_.begin(), by_slot_.end(), int64_t{0});
      std::stable_sort(by_slot_.begin(), by_slot_.end(),
                       [&](int64_t a, int64_t b) { return p_.slot[a] < p_.slot[b]; });
    }
  }

  void probabilities(int64_t first_panel, int64_t panels, int64_t block, int64_t group) {
    const int64_t offset = group * kPanelsPerItem;  // within the run
    const int64_t first_row = block * s_.block_tiles * kTile;
    int64_t target[cpu::kBlockTiles * kTile];
    cpu::Probabilities<Unit> a;
    fill_block(p_, s_, rows_, classes_, args_.kept, block, first_panel + offset,
               std::min(kPanelsPerItem, panels - offset), target, &a);
    a.row = row_scale_.data() + first_row;
    a.along_rows = along_rows_.get() + (offset * row_stride_ + first_row / kValues) * kLanes;
    a.along_rows_stride = row_stride_ * kLanes;
    a.along_classes_stride = run_panels_ * kGroup * kLanes;
    a.along_classes = along_classes_.get() + first_row / kLanes * a.along_classes_stride +
                      offset * kGroup * kLanes;
    k_.probabilities(a);
  }

  void reorder(int64_t first_panel, int64_t panel) {
    k_.lanes_to_units(classes_.panels + (first_panel + panel) * s_.panel_units, s_.height,
                      class_units_.get() + panel * s_.height * kGroup);
  }

  void prototype_gradients(int64_t first_panel, int64_t panels, int64_t group) {
    const int64_t offset = group * kPanelsPerItem;
    const int64_t count = std::min(kPanelsPerItem, panels - offset);
    const int64_t size = s_.height * kLanes;
    Buffer<Real> gradient(count * size), rows(size);
    cpu::Product<Unit> a;
    a.a_tile_stride = row_stride_ * kTile;
    a.group_units = a.group_stride = 0;
    a.b = along_rows_.get() + offset * row_stride_ * kLanes;
    a.b_panel_stride = row_stride_ * kLanes;
    a.out_panel_stride = size;
    a.panels = count;
    a.units = row_units_;
    a.accumulate = false;
    a.tiles = s_.height / kTile;
    a.a = weighted_.get();
    a.out = gradient.get();
    // The rows that the optimizer will want come from memory while this multiplies.
    std::vector<cpu::Span> spans;
    if (args_.update != nullptr) {
      const int64_t first = (first_panel + offset) * kLanes;
      const int64_t end = std::min(first + count * kLanes, p_.sampled);
      for (int64_t slot = first; slot < end; ++slot)
        args_.update->add_spans(p_.class_index ? p_.class_index[slot] : slot, &spans);
    }
    a.ahead = {spans.data(), static_cast<int64_t>(spans.size())};
    k_.product(a);
    PrototypeRows<Unit> out(p_, args_);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t panel = first_panel + offset + j;
      k_.unit_backward(gradient.get() + j * size, classes_.panels + panel * s_.panel_units, s_.dim,
                       classes_.inverse_norm + panel * kLanes, rows.get());
      const int64_t lanes = std::min(kLanes, p_.sampled - panel * kLanes);
      auto sample = std::lower_bound(by_slot_.begin(), by_slot_.end(), panel * kLanes,
                                     [&](int64_t i, int64_t slot) { return p_.slot[i] < slot; });
      for (; sample != by_slot_.end() && p_.slot[*sample] < panel * kLanes + lanes; ++sample) {
        const Real* target = target_prototype_.get() + *sample * s_.dim;
        Real* row = rows.get() + (p_.slot[*sample] - panel * kLanes) * s_.height;
        for (int64_t d = 0; d < s_.dim; ++d) row[d] += target[d];
      }
      out.put(panel * kLanes, lanes, rows.get(), s_.height);
    }
  }

  void add_embedding_gradients(int64_t first_panel, int64_t panels, int64_t item) {
    const int64_t row_panel = item * kPanelsPerItem;
    cpu::Product<Unit> a;
    a.group_units = kGroup;
    if (kValues > 1) {
      a.a = class_units_.get();
      a.group_stride = s_.height * kGroup;
    } else {
      a.a = classes_.panels + first_panel * s_.panel_units;
      a.group_stride = s_.panel_units;
    }
    a.a_tile_stride = kTile * kGroup;
    a.b_panel_stride = run_panels_ * kGroup * kLanes;
    a.b = along_classes_.get() + row_panel * a.b_panel_stride;
    a.out_panel_stride = s_.height * kLanes;
    a.out = embedding_gradient_.get() + row_panel * a.out_panel_stride;
    a.tiles = s_.height / kTile;
    // Panels past the last row are not needed.
    a.panels = std::min(kPanelsPerItem, ceil_div(p_.batch, kLanes) - row_panel);
    a.units = panels * kGroup;
    a.accumulate = first_panel > 0;
    if (a.panels > 0) k_.product(a);
  }

  void finish_embeddings() {
    parallel_.run(ceil_div(p_.batch, kLanes), [&](int64_t panel) {
      Buffer<Real> gradient(s_.dim), row(s_.dim);
      const Real* lines = embedding_gradient_.get() + panel * s_.height * kLanes;
      const int64_t end = std::min(p_.batch, (panel + 1) * kLanes);
      for (int64_t i = panel * kLanes; i < end; ++i) {
        if (p_.slot[i] == kIgnoredSlot) continue;  // its row stays zero
        const int64_t lane = i - panel * kLanes;
        const Real* x = rows_.unit.get() + i * s_.height;
        for (int64_t d = 0; d < s_.dim; ++d) gradient[d] = lines[d * kLanes + lane];
        const double dot = k_.dot(gradient.get(), x, s_.dim);
        const double factor = weight_[static_cast<size_t>(i)] * args_.state[i].inverse_norm;
        const Real* target = target_embedding_.get() + i * s_.dim;
        for (int64_t d = 0; d < s_.dim; ++d)
          row[d] = static_cast<Real>(factor * (gradient[d] - dot * x[d])) + target[d];
        write_row(args_.embeddings, i, row.get());
      }
    });
  }

  const Problem& p_;
  const BackwardArgs& args_;
  const Parallel& parallel_;
  const Shape<Unit> s_;
  const cpu::Kernels<Unit>& k_;
  const PackedRows<Unit> rows_;
  const PackedClasses<Unit> classes_;
  const int64_t run_panels_;  // panels in a run of classes
  const int64_t row_units_;   // what a prototype gradient sums over
  const int64_t row_stride_;  // units from one class panel to the next
  const int64_t row_panels_;
  Buffer<Unit> along_rows_;          // [run panel][row unit][16 classes]
  Buffer<Unit> along_classes_;       // [row panel][class unit][16 rows]
  Buffer<Unit> weighted_;            // tile panels over dimensions [height / 6][row unit][6]
  Buffer<Unit> class_units_;         // pairs along classes [run panel][height][8]; bf16 only
  Buffer<Real> embedding_gradient_;  // [row panel][height][16]
  Buffer<Real> target_embedding_;    // [batch][dim], the target's part of each sample's gradients
  Buffer<Real> target_prototype_;    //
  std::vector<cpu::RowScale> row_scale_;
  std::vector<double> weight_;
  std::vector<int64_t> by_slot_;
};

}  // namespace

template <class Unit>
void backward(const Problem& p, const BackwardArgs& args, const Parallel& parallel) {
  if (p.batch > 0) return Backward<Unit>(p, args, parallel).run();
  if (args.update != nullptr) {  // to the optimizer a gradient of zeros is a step all the same
    PrototypeRows<Unit> out(p, args);
    const std::vector<RealOf<Unit>> zeros(static_cast<size_t>(p.prototypes.dim));
    for (int64_t j = 0; j < p.sampled; ++j) out.put(j, 1, zeros.data(), p.prototypes.dim);
  }
}

template void backward<float>(const Problem&, const BackwardArgs&, const Parallel&);
template void backward<cpu::BfPair>(const Problem&, const BackwardArgs&, const Parallel&);
template void backward<double>(const Problem&, const BackwardArgs&, const Parallel&);

}  // namespace unicom
