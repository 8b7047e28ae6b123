#include "loss.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../kernels/attention.h"
#include "../kernels/pack.h"
#include "../kernels/product.h"
#include "../kernels/unpack.h"
#include "arena.h"

namespace unicom::cuda {

namespace {

// Probabilities in flight, and one copy of their sums. A chunk of classes has to be long enough
// that its products fill the device, and the shorter it is, the more of it stays in the
// second-level cache. Benchmarks vary it.
int64_t chunk_bytes() {
  static const int64_t bytes = [] {
    const char* given = std::getenv("UNICOM_CUDA_CHUNK_MIB");
    if (given == nullptr) return int64_t{128} << 20;
    char* end = nullptr;
    const long mib = std::strtol(given, &end, 10);
    if (end == given || *end != '\0' || mib < 1 || mib > 1 << 16)
      throw std::runtime_error(
          "UNICOM_CUDA_CHUNK_MIB must be a whole number from 1 to 65536, got '" +
          std::string(given) + "'");
    return int64_t{mib} << 20;
  }();
  return bytes;
}

// Most classes at a time where no probabilities are in memory: their blocks fill the device four
// times.
constexpr int64_t kAttendedChunk = 4 * kMultiprocessors * kRowGranule;

// Into how many parts to cut work so that `blocks` blocks for each fill the device: few waves, one
// block on each multiprocessor. length(parts): of one block's work.
template <class Length>
int64_t parts_that_fill(int64_t blocks, int64_t most, const Length& length) {
  auto cost = [&](int64_t parts) {
    return ceil_div(blocks * parts, kMultiprocessors) * length(parts);
  };
  int64_t best = 1;
  for (int64_t parts = 2; parts <= most; ++parts)
    if (cost(parts) < cost(best)) best = parts;
  return best;
}

// Into how many runs to cut tiles of classes, against each of which all blocks of rows go: to begin
// takes a block about as long as a tile.
int64_t runs_of(int64_t rows, int64_t classes) {
  const int64_t tiles = classes / kClassGranule;
  return parts_that_fill(rows / kRowGranule, std::min(tiles, kWantedBlocks),
                         [&](int64_t runs) { return ceil_div(tiles, runs) + 1; });
}

constexpr int64_t kMaxSplits = 16;
// To write and read a block's sums takes about as long as products of this depth (sixteen-bit).
constexpr int64_t kDepthOfSums = 1024;

template <class Unit>
constexpr int64_t kUnitBytes = static_cast<int64_t>(sizeof(Unit));

// f(value of the operand type)
template <class F>
auto with_unit(const Problem& p, const F& f) {
  if (p.is_double()) return f(double{});
  if (p.precision == Precision::kFp16) return f(Half{});
  if (p.precision == Precision::kBf16) return f(BFloat{});
  return f(float{});
}

ClassOrder order_of(const Problem& p) {
  return with_unit(p, [&](auto unit) { return ClassOrder::of<decltype(unit)>(p.centers); });
}

struct Padded {
  int64_t rows, classes, depth;

  explicit Padded(const Problem& p)
      : rows(round_up(p.batch, kRowGranule)),
        classes(round_up(order_of(p).rows(p.bound), kClassGranule)),
        depth(round_up(p.embeddings.dim, kDepthGranule)) {}
};

// Whether operands are such that passes in the shape of attention take them, on a device that has
// them.
template <class Unit>
bool suits_attention(const Problem& p) {
  return UnitTraits<Unit>::kTensorCores && p.centers == 1 && Padded(p).depth <= kMostAttended;
}
template <class Unit>
bool attends(Queue& queue, const Problem& p) {
  return suits_attention<Unit>(p) && p.batch > 0 && Padded(p).classes > 0 && can_attend(queue);
}

// What forward then keeps of the negatives' part of the embeddings' gradient.
struct Attended {
  float* sums;      // [rows][depth]
  float* exponent;  // [rows]

  Attended(void* kept, const Padded& n)
      : sums(static_cast<float*>(kept)), exponent(sums + n.rows * n.depth) {}
  static int64_t bytes(const Padded& n) { return n.rows * (n.depth + 1) * int64_t{sizeof(float)}; }
};

template <class Unit>
struct PackedClasses {
  Unit* unit;            // [classes][depth]
  double* inverse_norm;  // [classes]
  double* sum;           // [depth] of the unit vectors, with label smoothing

  PackedClasses(void* packed, const Padded& n)
      : unit(static_cast<Unit*>(packed)),
        inverse_norm(reinterpret_cast<double*>(static_cast<char*>(packed) +
                                               n.classes * n.depth * kUnitBytes<Unit>)),
        sum(inverse_norm + n.classes) {}
};

template <class Unit>
struct ForwardSpace {
  bool attends;
  int64_t runs;
  Unit* rows;
  double* inverse_norm;
  RowSum<RealOf<Unit>>* partial;
  float* attended;     // [runs][rows][depth]
  double* class_sums;  // [kSumParts][depth], with label smoothing

  ForwardSpace(Arena& arena, Queue& queue, const Problem& p, const Padded& n)
      : attends(p.wants_embeddings && cuda::attends<Unit>(queue, p)),
        runs(attends ? attending_runs(n) : runs_of(n.rows, n.classes)),
        rows(arena.take<Unit>(n.rows * n.depth)),
        inverse_norm(arena.take<double>(n.rows)),
        partial(arena.take<RowSum<RealOf<Unit>>>(runs * n.rows)),
        attended(arena.take<float>(attends ? runs * n.rows * n.depth : 0)),
        class_sums(arena.take<double>(p.smooths() ? kSumParts * n.depth : 0)) {}

 private:
  static int64_t attending_runs(const Padded& n) {
    // To write and read a block's sums takes about as long as so many tiles.
    constexpr int64_t kTilesOfSums = 4;
    const int64_t blocks = n.rows / kRowGranule, tiles = ceil_div(n.classes, kAttendedKeys);
    return parts_that_fill(blocks, std::clamp<int64_t>(kWantedBlocks / blocks, 1, tiles),
                           [&](int64_t parts) { return ceil_div(tiles, parts) + kTilesOfSums; });
  }
};

bool wants_embeddings(const Gradients& g) { return g.embeddings != nullptr || g.radial != nullptr; }

// Whether backward's part of the passes in the shape of attention is taken: where forward has made
// its own, if that is needed.
template <class Unit>
bool attends(Queue& queue, const Problem& p, const Gradients& g) {
  return (p.wants_embeddings || !wants_embeddings(g)) && attends<Unit>(queue, p);
}

template <class Unit>
int64_t chunk_of(Queue& queue, const Problem& p, const Gradients& g) {
  const Padded n(p);
  const bool attending = attends<Unit>(queue, p, g);
  const int64_t class_bytes = std::max(attending ? 0 : n.rows * kUnitBytes<Unit>,
                                       n.depth * static_cast<int64_t>(sizeof(RealOf<Unit>)));
  const int64_t most = attending ? std::min(kAttendedChunk, n.classes) : n.classes;
  return std::clamp(chunk_bytes() / class_bytes / kClassGranule * kClassGranule, kClassGranule,
                    std::max(most, kClassGranule));
}

template <class Unit>
struct BackwardSpace {
  bool attends;
  int64_t chunk;       // classes at a time
  int64_t scale_rows;  // of the samples' weights
  int64_t row_splits, class_splits;
  Unit *rows, *weighted, *probabilities;
  double *inverse_norm, *target_weight, *negative_weight, *folded, *fold;
  double *smooth_weight, *smooth_sum;  // of label smoothing
  RowScale<RealOf<Unit>>* row_scale;
  RealOf<Unit>*embedding_sums, *prototype_sums;
  int64_t *by_slot, *target_prototype;
  double* upstream;
  char *taken, *targets;  // gradient rows of one chunk, and the samples' targets, if rows are taken

  BackwardSpace(Arena& arena, Queue& queue, const Problem& p, const Gradients& g, bool take,
                const Padded& n) {
    const bool want_embeddings = wants_embeddings(g);
    const bool want_prototypes = g.prototypes != nullptr || take;
    attends = cuda::attends<Unit>(queue, p, g);
    chunk = chunk_of<Unit>(queue, p, g);
    scale_rows = round_up(n.rows, attends ? kAttendedKeys : 1);
    row_splits = attends ? 1 : splits(n.rows, n.depth, chunk);
    class_splits = attends ? 1 : splits(chunk, n.depth, n.rows);
    rows = arena.take<Unit>(n.rows * n.depth);
    weighted = arena.take<Unit>(want_prototypes && !attends ? n.rows * n.depth : 0);
    probabilities = arena.take<Unit>(attends ? 0 : n.rows * chunk);
    inverse_norm = arena.take<double>(n.rows);
    target_weight = arena.take<double>(p.batch * p.positives.width);
    negative_weight = arena.take<double>(scale_rows);
    folded = arena.take<double>(scale_rows);
    fold = arena.take<double>(1);
    smooth_weight = arena.take<double>(p.smooths() ? scale_rows : 0);
    smooth_sum = arena.take<double>(p.smooths() && want_prototypes ? n.depth : 0);
    row_scale = arena.take<RowScale<RealOf<Unit>>>(scale_rows);
    embedding_sums =
        arena.take<RealOf<Unit>>(want_embeddings && !attends ? row_splits * n.rows * n.depth : 0);
    prototype_sums = arena.take<RealOf<Unit>>(want_prototypes ? class_splits * chunk * n.depth : 0);
    by_slot = arena.take<int64_t>(want_prototypes ? p.batch * p.positives.width : 0);
    target_prototype = arena.take<int64_t>(p.centers > 1 ? p.batch * p.positives.width : 0);
    const int64_t value_bytes = take ? bytes_of(p.prototypes.dtype) : 0;
    upstream = arena.take<double>(1);
    taken = arena.take<char>(taken_bytes(p.dim * value_bytes));
    const int64_t rows_of_targets = want_embeddings ? p.batch * p.positives.width : 0;
    targets = arena.take<char>(rows_of_targets * p.prototypes.dim * value_bytes);
  }
  int64_t taken_bytes(int64_t row_bytes) const { return chunk * row_bytes; }

 private:
  // How often to cut the sum over `depth` of rows x cols results.
  static int64_t splits(int64_t rows, int64_t cols, int64_t depth) {
    return parts_that_fill(std::max<int64_t>(rows / kRowGranule * ceil_div(cols, 256), 1),
                           std::clamp<int64_t>(depth / kClassGranule, 1, kMaxSplits),
                           [&](int64_t parts) { return ceil_div(depth, parts) + kDepthOfSums; });
  }
};

template <class Unit>
Logits logits_of(const Problem& p, const Padded& n, const Unit* rows, const Unit* classes) {
  return {.embeddings = rows,
          .prototypes = classes,
          .order = order_of(p),
          .rows = n.rows,
          .classes = n.classes,
          .depth = n.depth,
          .batch = p.batch,
          .positives = p.positives,
          .count = p.count,
          .bound = p.bound,
          .scale = p.scale,
          .filter = p.filter};
}

// factor, inverse_norm: see PackRows.
template <class Unit>
void pack_embeddings(Queue& queue, const Problem& p, const Padded& n, const double* factor,
                     Unit* unit, double* inverse_norm) {
  pack_rows<Unit>(queue, {.source = p.embeddings,
                          .order = {},
                          .ids = nullptr,
                          .count = nullptr,
                          .total = p.batch,
                          .positives = p.positives,
                          .factor = factor,
                          .unit = unit,
                          .rows = n.rows,
                          .depth = n.depth,
                          .inverse_norm = inverse_norm});
}

// How many classes' cosines forward keeps, and the bytes that some take.
template <class Unit>
int64_t bytes_of_kept(const Problem& p, int64_t classes) {
  return classes * round_up(p.batch, kRowGranule) * static_cast<int64_t>(sizeof(RealOf<Unit>));
}
template <class Unit>
int64_t kept_classes(const Problem& p) {
  if (UnitTraits<Unit>::kTensorCores || p.batch == 0) return 0;
  const int64_t fit = p.keep_bytes / bytes_of_kept<Unit>(p, kClassGranule) * kClassGranule;
  return std::min(fit, Padded(p).classes);
}

template <class Unit>
void run_forward(Queue& queue, const Problem& p, const ShardSums& out, const Saved& saved,
                 void* workspace) {
  const Padded n(p);
  Arena arena(workspace);
  const ForwardSpace<Unit> space(arena, queue, p, n);
  const PackedClasses<Unit> classes(saved.packed, n);

  pack_rows<Unit>(queue, {.source = p.prototypes,
                          .order = order_of(p),
                          .ids = p.class_index,
                          .count = p.count,
                          .total = p.bound,
                          .positives = {},
                          .factor = nullptr,
                          .unit = classes.unit,
                          .rows = n.classes,
                          .depth = n.depth,
                          .inverse_norm = classes.inverse_norm});
  if (p.smooths())
    sum_rows<Unit>(queue, {.unit = classes.unit,
                           .rows = n.classes,
                           .depth = n.depth,
                           .partial = space.class_sums,
                           .out = classes.sum});
  if (p.batch == 0) return;
  pack_embeddings(queue, p, n, nullptr, space.rows, space.inverse_norm);
  const Logits logits = logits_of(p, n, space.rows, classes.unit);
  if (space.attends) {
    if constexpr (UnitTraits<Unit>::kTensorCores) {
      attend_classes<Unit>(queue, {.logits = logits,
                                   .runs = space.runs,
                                   .sums = space.partial,
                                   .attended = space.attended});
      const Attended attended(saved.kept, n);
      merge_attended(queue, {.rows = n.rows,
                             .depth = n.depth,
                             .runs = space.runs,
                             .sums = space.partial,
                             .attended = space.attended,
                             .out = attended.sums,
                             .exponent = attended.exponent});
    }
  } else {
    sum_exp<Unit>(queue, {.logits = logits,
                          .runs = space.runs,
                          .out = space.partial,
                          .kept = saved.kept,
                          .kept_classes = kept_classes<Unit>(p)});
  }
  finish_sums<RealOf<Unit>>(queue, {.embeddings = p.embeddings,
                                    .prototypes = p.prototypes,
                                    .class_index = p.class_index,
                                    .centers = p.centers,
                                    .positives = p.positives,
                                    .batch = p.batch,
                                    .rows = n.rows,
                                    .partial = space.partial,
                                    .runs = space.runs,
                                    .scale = p.scale,
                                    .total_sampled = static_cast<double>(p.total_sampled),
                                    .row_inverse_norm = space.inverse_norm,
                                    .class_inverse_norm = classes.inverse_norm,
                                    .class_sum = p.smooths() ? classes.sum : nullptr,
                                    .count = p.count,
                                    .bound = p.bound,
                                    .out = out});
}

// Rows of a gradient [*, width] with the columns and the type of what it is the gradient of.
RowSink sink(const RowSource& source, void* gradient, int64_t width) {
  return {.data = gradient,
          .dtype = source.dtype,
          .row_stride = width,
          .columns = source.columns,
          .dim = source.dim};
}

template <class Unit>
void run_backward(Queue& queue, const Problem& p, const Gradients& g, const TakeRows* take_rows,
                  void* workspace) {
  using Real = RealOf<Unit>;
  const bool taken = take_rows != nullptr;
  const bool want_embeddings = wants_embeddings(g);
  const bool want_prototypes = g.prototypes != nullptr || taken;
  if (!(want_embeddings || want_prototypes) || (p.batch == 0 && !taken)) return;
  const Padded n(p);
  Arena arena(workspace);
  const BackwardSpace<Unit> space(arena, queue, p, g, taken, n);
  const PackedClasses<Unit> classes(const_cast<void*>(g.packed), n);

  prepare_backward<Real>(queue, {.batch = p.batch,
                                 .rows = space.scale_rows,
                                 .positives = p.positives,
                                 .states = g.states,
                                 .grad_loss = g.grad_loss,
                                 .reduction = g.reduction,
                                 .scale = p.scale,
                                 .target_weight = space.target_weight,
                                 .negative_weight = space.negative_weight,
                                 .reach = space.attends ? 1 : UnitTraits<Unit>::kProbabilityScale,
                                 .folded = space.folded,
                                 .fold = space.fold,
                                 .smooth_weight = p.smooths() ? space.smooth_weight : nullptr,
                                 .row = space.row_scale,
                                 .folds = space.attends,
                                 .upstream = taken ? space.upstream : nullptr});
  // Columns that were not selected stay zero.
  if (taken) queue.fill_zero(space.taken, space.taken_bytes(p.dim * bytes_of(p.prototypes.dtype)));
  const ClassOrder order = order_of(p);
  // Prototypes, class by class, before those of a chunk.
  auto prototypes_before = [&](int64_t row) {
    return order.centers == 1 ? row : row / order.cols * order.classes_of_tile() * order.centers;
  };
  auto take = [&](int64_t first, int64_t chunk) {
    const int64_t begin = prototypes_before(first), end = prototypes_before(first + chunk);
    (*take_rows)(queue, {.rows = space.taken,
                         .first = begin,
                         .count = std::min(end, p.bound * p.centers) - begin,
                         .upstream = space.upstream});
  };
  if (p.batch == 0) {
    for (int64_t first = 0; first < n.classes; first += space.chunk) take(first, space.chunk);
    return;
  }
  pack_embeddings(queue, p, n, nullptr, space.rows, space.inverse_norm);
  Positives targets = p.positives;  // as prototypes
  if (p.centers > 1) {
    find_centers(queue, {.embeddings = p.embeddings,
                         .prototypes = p.prototypes,
                         .class_index = p.class_index,
                         .centers = p.centers,
                         .positives = p.positives,
                         .batch = p.batch,
                         .row_inverse_norm = space.inverse_norm,
                         .class_inverse_norm = classes.inverse_norm,
                         .prototype = space.target_prototype});
    targets.slots = space.target_prototype;
  }
  if (want_prototypes) {
    if (!space.attends) pack_embeddings<Unit>(queue, p, n, space.folded, space.weighted, nullptr);
    order_positives(
        queue,
        {.slots = targets.slots, .count = p.batch * p.positives.width, .by_slot = space.by_slot});
    if (p.smooths())
      sum_smoothed(queue, {.embeddings = p.embeddings,
                           .batch = p.batch,
                           .depth = n.depth,
                           .row_inverse_norm = space.inverse_norm,
                           .smooth_weight = space.smooth_weight,
                           .out = space.smooth_sum});
  }

  Unpack unpack{.embeddings = p.embeddings,
                .prototypes = p.prototypes,
                .by_sample = false,
                .class_index = p.class_index,
                .order = order,
                .positives = targets,
                .batch = p.batch,
                .depth = n.depth,
                .target_weight = space.target_weight,
                .negative_weight = space.negative_weight,
                .row_inverse_norm = space.inverse_norm,
                .class_inverse_norm = classes.inverse_norm,
                .smooth_weight = p.smooths() ? space.smooth_weight : nullptr,
                .class_sum = classes.sum,
                .smooth_sum = space.smooth_sum,
                .states = g.states,
                .radial = g.radial,
                .unit = nullptr,
                .partial = nullptr,
                .splits = 0,
                .split_stride = 0,
                .part_exponent = nullptr,
                .sink = {}};
  const RowSink prototype_sink = sink(p.prototypes, taken ? space.taken : g.prototypes, p.dim);
  if (taken && want_embeddings)
    copy_targets(queue, {.prototypes = p.prototypes,
                         .class_index = p.class_index,
                         .centers = p.centers,
                         .slots = targets.slots,
                         .count = p.batch * p.positives.width,
                         .out = space.targets});
  const Logits logits = logits_of(p, n, space.rows, classes.unit);
  // The sums of a chunk's prototypes, and what the chunk adds to those of the embeddings.
  auto sum_chunk = [&](int64_t first, int64_t chunk) {
    probabilities<Unit>(queue, {.logits = logits,
                                .first = first,
                                .chunk = chunk,
                                .kept = g.kept,
                                .kept_classes = kept_classes<Unit>(p),
                                .runs = runs_of(n.rows, chunk),
                                .row = space.row_scale,
                                .out = space.probabilities});
    Product product_of{.of = ProductOf::kEmbeddings,
                       .probabilities = space.probabilities,
                       .operand = classes.unit + first * n.depth,
                       .rows = n.rows,
                       .chunk = chunk,
                       .depth = n.depth,
                       .order = order,
                       .count = p.count,
                       .bound = p.bound,
                       .first = first,
                       .splits = space.row_splits,
                       .accumulate = first > 0,
                       .out = space.embedding_sums};
    if (want_embeddings) product<Unit>(queue, product_of);
    if (!want_prototypes) return;
    product_of.of = ProductOf::kPrototypes;
    product_of.operand = space.weighted;
    product_of.splits = space.class_splits;
    product_of.accumulate = false;
    product_of.out = space.prototype_sums;
    product<Unit>(queue, product_of);
  };
  auto attend_chunk = [&](int64_t first, int64_t chunk) {
    if constexpr (UnitTraits<Unit>::kTensorCores)
      attend_samples<Unit>(queue, {.logits = logits,
                                   .first = first,
                                   .chunk = chunk,
                                   .by_slot = space.by_slot,
                                   .row = space.row_scale,
                                   .out = space.prototype_sums});
  };
  for (int64_t first = 0; first < n.classes; first += space.chunk) {
    const int64_t chunk = std::min(space.chunk, n.classes - first);
    if (!space.attends)
      sum_chunk(first, chunk);
    else if (want_prototypes)
      attend_chunk(first, chunk);
    if (!want_prototypes) continue;
    unpack.unit = classes.unit + first * n.depth;
    unpack.partial = space.prototype_sums;
    unpack.splits = space.class_splits;
    unpack.split_stride = chunk * n.depth;
    unpack.sink = prototype_sink;
    unpack_prototypes<Unit>(queue, {.common = unpack,
                                    .first = first,
                                    .chunk = chunk,
                                    .count = p.count,
                                    .bound = p.bound,
                                    .by_slot = space.by_slot,
                                    .fold = space.fold,
                                    .compact = g.compact || taken,
                                    .sink_first = taken ? prototypes_before(first) : 0});
    if (taken) take(first, chunk);
  }
  if (!want_embeddings) return;
  if (n.classes == 0)  // a shard without classes
    queue.fill_zero(space.embedding_sums,
                    space.row_splits * n.rows * n.depth * int64_t{sizeof(Real)});
  if (taken) {
    unpack.by_sample = true;
    unpack.prototypes = {.data = space.targets,
                         .dtype = p.prototypes.dtype,
                         .row_stride = p.prototypes.dim,
                         .columns = nullptr,
                         .dim = p.prototypes.dim};
  }
  unpack.unit = space.rows;
  const Attended attended(const_cast<void*>(g.kept), n);
  if (space.attends) {
    unpack.partial = attended.sums;
    unpack.part_exponent = attended.exponent;
  } else {
    unpack.partial = space.embedding_sums;
  }
  unpack.splits = space.row_splits;
  unpack.split_stride = n.rows * n.depth;
  unpack.sink = sink(p.embeddings, g.embeddings, p.dim);
  unpack_embeddings<Unit>(queue, unpack);
}

}  // namespace

int64_t packed_bytes(const Problem& p) {
  const Padded n(p);
  const int64_t unit_bytes =
      with_unit(p, [](auto unit) { return static_cast<int64_t>(sizeof(unit)); });
  return n.classes * n.depth * unit_bytes +
         (n.classes + n.depth) * static_cast<int64_t>(sizeof(double));
}

int64_t kept_bytes(const Problem& p) {
  return with_unit(p, [&](auto unit) {
    using Unit = decltype(unit);
    if (suits_attention<Unit>(p)) return p.wants_embeddings ? Attended::bytes(Padded(p)) : 0;
    return bytes_of_kept<Unit>(p, kept_classes<Unit>(p));
  });
}

int64_t forward_workspace(Queue& queue, const Problem& p) {
  Arena arena(nullptr);
  with_unit(p, [&](auto unit) { ForwardSpace<decltype(unit)>(arena, queue, p, Padded(p)); });
  return arena.used();
}

void forward(Queue& queue, const Problem& p, const ShardSums& out, const Saved& saved,
             void* workspace) {
  with_unit(p, [&](auto unit) { run_forward<decltype(unit)>(queue, p, out, saved, workspace); });
}

void write_results(Queue& queue, const WriteResults& a, bool is_double) {
  if (is_double)
    write_results<double>(queue, a);
  else
    write_results<float>(queue, a);
}

int64_t most_centers(const Problem& p) { return order_of(p).most_centers(); }

int64_t backward_chunk(Queue& queue, const Problem& p, const Gradients& g) {
  return with_unit(p, [&](auto unit) { return chunk_of<decltype(unit)>(queue, p, g); });
}

int64_t backward_workspace(Queue& queue, const Problem& p, const Gradients& g,
                           const TakeRows* take) {
  Arena arena(nullptr);
  with_unit(p, [&](auto unit) {
    BackwardSpace<decltype(unit)>(arena, queue, p, g, take != nullptr, Padded(p));
  });
  return arena.used();
}

void backward(Queue& queue, const Problem& p, const Gradients& g, const TakeRows* take,
              void* workspace) {
  if (g.embeddings != nullptr)  // rows of samples that do not count are left alone
    queue.fill_zero(g.embeddings, p.batch * p.dim * bytes_of(p.embeddings.dtype));
  const bool all_written =
      p.batch > 0 && p.class_index == nullptr && p.prototypes.columns == nullptr;
  if (g.prototypes != nullptr && !all_written)
    queue.fill_zero(g.prototypes, (g.compact ? p.bound : p.num_classes) * p.centers * p.dim *
                                      bytes_of(p.prototypes.dtype));
  with_unit(p, [&](auto unit) { run_backward<decltype(unit)>(queue, p, g, take, workspace); });
}

}  // namespace unicom::cuda
