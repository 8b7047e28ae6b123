#include "loss.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

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

constexpr int64_t kMaxSplits = 16;
// To write and read a block's sums takes about as long as products of this depth (sixteen-bit).
constexpr int64_t kDepthOfSums = 1024;

template <class Unit>
constexpr int64_t kUnitBytes = static_cast<int64_t>(sizeof(Unit));

struct Padded {
  int64_t rows, classes, depth;

  explicit Padded(const Problem& p)
      : rows(round_up(p.batch, kRowGranule)),
        classes(round_up(p.bound, kClassGranule)),
        depth(round_up(p.embeddings.dim, kDepthGranule)) {}
};

template <class Unit>
struct PackedClasses {
  Unit* unit;            // [classes][depth]
  double* inverse_norm;  // [classes]

  PackedClasses(void* packed, const Padded& n)
      : unit(static_cast<Unit*>(packed)),
        inverse_norm(reinterpret_cast<double*>(static_cast<char*>(packed) +
                                               n.classes * n.depth * kUnitBytes<Unit>)) {}
};

template <class Unit>
struct ForwardSpace {
  int64_t runs;
  Unit* rows;
  double* inverse_norm;
  RowSum<RealOf<Unit>>* partial;

  ForwardSpace(Arena& arena, const Padded& n)
      : runs(std::clamp<int64_t>(kWantedBlocks * kRowGranule / std::max<int64_t>(n.rows, 1), 1,
                                 std::max<int64_t>(n.classes / kClassGranule, 1))),
        rows(arena.take<Unit>(n.rows * n.depth)),
        inverse_norm(arena.take<double>(n.rows)),
        partial(arena.take<RowSum<RealOf<Unit>>>(runs * n.rows)) {}
};

}  // namespace

template <class Unit>
int64_t backward_chunk(const Problem& p) {
  const Padded n(p);
  const int64_t class_bytes =
      std::max(n.rows * kUnitBytes<Unit>, n.depth * static_cast<int64_t>(sizeof(RealOf<Unit>)));
  return std::clamp(chunk_bytes() / class_bytes / kClassGranule * kClassGranule, kClassGranule,
                    std::max(n.classes, kClassGranule));
}

namespace {

template <class Unit>
struct BackwardSpace {
  int64_t chunk;  // classes at a time
  int64_t row_splits, class_splits;
  Unit *rows, *weighted, *probabilities;
  double *inverse_norm, *target_weight, *negative_weight, *folded, *largest;
  RowScale<RealOf<Unit>>* row_scale;
  RealOf<Unit>*embedding_sums, *prototype_sums;
  int64_t* by_slot;
  double* upstream;
  char *taken, *targets;  // gradient rows of one chunk, and the samples' targets, if rows are taken

  BackwardSpace(Arena& arena, const Problem& p, const Gradients& g, const Padded& n) {
    const bool want_embeddings = g.embeddings.data != nullptr;
    const bool want_prototypes = g.prototypes.data != nullptr || g.take != nullptr;
    chunk = backward_chunk<Unit>(p);
    row_splits = splits(n.rows, n.depth, chunk);
    class_splits = splits(chunk, n.depth, n.rows);
    rows = arena.take<Unit>(n.rows * n.depth);
    weighted = arena.take<Unit>(want_prototypes ? n.rows * n.depth : 0);
    probabilities = arena.take<Unit>(n.rows * chunk);
    inverse_norm = arena.take<double>(n.rows);
    target_weight = arena.take<double>(n.rows);
    negative_weight = arena.take<double>(n.rows);
    folded = arena.take<double>(n.rows);
    largest = arena.take<double>(1);
    row_scale = arena.take<RowScale<RealOf<Unit>>>(n.rows);
    embedding_sums = arena.take<RealOf<Unit>>(want_embeddings ? row_splits * n.rows * n.depth : 0);
    prototype_sums = arena.take<RealOf<Unit>>(want_prototypes ? class_splits * chunk * n.depth : 0);
    by_slot = arena.take<int64_t>(want_prototypes ? p.batch : 0);
    const int64_t value_bytes = g.take != nullptr ? bytes_of(p.prototypes.dtype) : 0;
    upstream = arena.take<double>(1);
    taken = arena.take<char>(taken_bytes(g.dim * value_bytes));
    targets = arena.take<char>(want_embeddings ? p.batch * p.prototypes.dim * value_bytes : 0);
  }
  int64_t taken_bytes(int64_t row_bytes) const { return chunk * row_bytes; }

 private:
  // How often to cut the sum over `depth` so that rows x cols results fill the device: few waves of
  // blocks, one on each multiprocessor, and few sums to add up.
  static int64_t splits(int64_t rows, int64_t cols, int64_t depth) {
    const int64_t blocks = std::max<int64_t>(rows / kRowGranule * ceil_div(cols, 256), 1);
    const int64_t most = std::clamp<int64_t>(depth / kClassGranule, 1, kMaxSplits);
    auto cost = [&](int64_t parts) {
      return ceil_div(blocks * parts, kMultiprocessors) * (ceil_div(depth, parts) + kDepthOfSums);
    };
    int64_t best = 1;
    for (int64_t parts = 2; parts <= most; ++parts)
      if (cost(parts) < cost(best)) best = parts;
    return best;
  }
};

template <class Unit>
Logits logits_of(const Problem& p, const Padded& n, const Unit* rows, const Unit* classes) {
  return {rows,   classes, n.rows,  n.classes, n.depth, p.batch,
          p.slot, p.count, p.bound, p.scale,   p.filter};
}

PackRows embedding_rows(const Problem& p, const Padded& n, void* unit) {
  return {p.embeddings, nullptr, nullptr, p.batch, p.slot, nullptr, unit, n.rows, n.depth, nullptr};
}

}  // namespace

int64_t packed_bytes(int64_t bound, int64_t dim, int64_t bytes_per_value) {
  const int64_t classes = round_up(bound, kClassGranule);
  return classes *
         (round_up(dim, kDepthGranule) * bytes_per_value + static_cast<int64_t>(sizeof(double)));
}

template <class Unit>
int64_t kept_classes(int64_t bound, int64_t batch, int64_t workspace_bytes) {
  if (UnitTraits<Unit>::kTensorCores || batch == 0) return 0;
  const int64_t fit = workspace_bytes / kept_bytes<Unit>(kClassGranule, batch) * kClassGranule;
  return std::min(fit, round_up(bound, kClassGranule));
}

template <class Unit>
int64_t kept_bytes(int64_t classes, int64_t batch) {
  return classes * round_up(batch, kRowGranule) * static_cast<int64_t>(sizeof(RealOf<Unit>));
}

template <class Unit>
int64_t forward_workspace(const Problem& p) {
  Arena arena(nullptr);
  ForwardSpace<Unit>(arena, Padded(p));
  return arena.used();
}

template <class Unit>
void forward(Queue& queue, const Problem& p, const ShardSums& out, void* workspace) {
  const Padded n(p);
  Arena arena(workspace);
  const ForwardSpace<Unit> space(arena, n);
  const PackedClasses<Unit> classes(out.packed, n);

  pack_rows<Unit>(queue, {p.prototypes, p.class_index, p.count, p.bound, nullptr, nullptr,
                          classes.unit, n.classes, n.depth, classes.inverse_norm});
  if (p.batch == 0) return;
  PackRows rows = embedding_rows(p, n, space.rows);
  rows.inverse_norm = space.inverse_norm;
  pack_rows<Unit>(queue, rows);
  sum_exp<Unit>(queue, {logits_of(p, n, space.rows, classes.unit), space.runs, space.partial,
                        out.kept, p.kept_classes});
  finish_sums<RealOf<Unit>>(
      queue, {p.embeddings, p.prototypes, p.class_index, p.slot, p.batch, n.rows, space.partial,
              space.runs, p.scale, static_cast<double>(p.total_sampled), space.inverse_norm,
              classes.inverse_norm, out.sum, out.target_cosine, out.stride, out.exponent,
              out.largest_negative, out.inverse_norm});
}

template <class Unit>
int64_t backward_workspace(const Problem& p, const Gradients& g) {
  Arena arena(nullptr);
  BackwardSpace<Unit>(arena, p, g, Padded(p));
  return arena.used();
}

template <class Unit>
void backward(Queue& queue, const Problem& p, const Gradients& g, void* workspace) {
  using Real = RealOf<Unit>;
  const bool want_embeddings = g.embeddings.data != nullptr;
  const bool want_prototypes = g.prototypes.data != nullptr || g.take != nullptr;
  if (!(want_embeddings || want_prototypes) || (p.batch == 0 && g.take == nullptr)) return;
  const Padded n(p);
  Arena arena(workspace);
  const BackwardSpace<Unit> space(arena, p, g, n);
  const PackedClasses<Unit> classes(const_cast<void*>(g.packed), n);

  prepare_backward<Real>(queue,
                         {p.batch, n.rows, p.slot, g.state, g.grad_loss, g.reduction, p.scale,
                          space.target_weight, space.negative_weight, space.folded, space.largest,
                          space.row_scale, g.take != nullptr ? space.upstream : nullptr});
  // Columns that were not selected stay zero.
  if (g.take != nullptr)
    queue.fill_zero(space.taken, space.taken_bytes(g.dim * bytes_of(p.prototypes.dtype)));
  auto take = [&](int64_t first, int64_t chunk) {
    (*g.take)(queue, {space.taken, first, std::min(chunk, p.bound - first), space.upstream});
  };
  if (p.batch == 0) {
    for (int64_t first = 0; first < n.classes; first += space.chunk) take(first, space.chunk);
    return;
  }
  PackRows rows = embedding_rows(p, n, space.rows);
  rows.inverse_norm = space.inverse_norm;
  pack_rows<Unit>(queue, rows);
  if (want_prototypes) {
    rows = embedding_rows(p, n, space.weighted);
    rows.factor = space.folded;
    pack_rows<Unit>(queue, rows);
    order_samples(queue, {p.batch, p.slot, space.by_slot});
  }

  Unpack unpack{p.embeddings,
                p.prototypes,
                false,
                p.class_index,
                p.slot,
                p.batch,
                n.depth,
                space.target_weight,
                space.negative_weight,
                space.inverse_norm,
                classes.inverse_norm,
                g.state,
                nullptr,
                nullptr,
                0,
                0,
                {}};
  RowSink prototype_sink = g.prototypes;
  if (g.take != nullptr) {
    const RowSource& from = p.prototypes;
    prototype_sink = {space.taken, from.dtype, g.dim, from.columns, from.dim};
    if (want_embeddings) copy_targets(queue, {from, p.class_index, p.slot, p.batch, space.targets});
  }
  for (int64_t first = 0; first < n.classes; first += space.chunk) {
    const int64_t chunk = std::min(space.chunk, n.classes - first);
    const Unit* unit = classes.unit + first * n.depth;
    const int64_t runs =
        std::clamp<int64_t>(kWantedBlocks * kRowGranule / n.rows, 1, chunk / kClassGranule);
    probabilities<Unit>(queue, {logits_of(p, n, space.rows, classes.unit), first, chunk, g.kept,
                                p.kept_classes, runs, space.row_scale, space.probabilities});
    Product product_of{ProductOf::kEmbeddings,
                       space.probabilities,
                       unit,
                       n.rows,
                       chunk,
                       n.depth,
                       p.count,
                       p.bound,
                       first,
                       space.row_splits,
                       first > 0,
                       space.embedding_sums};
    if (want_embeddings) product<Unit>(queue, product_of);
    if (!want_prototypes) continue;
    product_of.of = ProductOf::kPrototypes;
    product_of.operand = space.weighted;
    product_of.splits = space.class_splits;
    product_of.accumulate = false;
    product_of.out = space.prototype_sums;
    product<Unit>(queue, product_of);
    unpack.unit = unit;
    unpack.partial = space.prototype_sums;
    unpack.splits = space.class_splits;
    unpack.split_stride = chunk * n.depth;
    unpack.sink = prototype_sink;
    unpack_prototypes<Unit>(queue,
                            {unpack, first, chunk, p.count, p.bound, space.by_slot, space.largest,
                             g.compact || g.take != nullptr, g.take != nullptr ? first : 0});
    if (g.take != nullptr) take(first, chunk);
  }
  if (!want_embeddings) return;
  if (n.classes == 0)  // a shard without classes
    queue.fill_zero(space.embedding_sums,
                    space.row_splits * n.rows * n.depth * int64_t{sizeof(Real)});
  if (g.take != nullptr) {
    unpack.by_sample = true;
    unpack.prototypes = {space.targets, p.prototypes.dtype, p.prototypes.dim, nullptr,
                         p.prototypes.dim};
  }
  unpack.unit = space.rows;
  unpack.partial = space.embedding_sums;
  unpack.splits = space.row_splits;
  unpack.split_stride = n.rows * n.depth;
  unpack.sink = g.embeddings;
  unpack_embeddings<Unit>(queue, unpack);
}

#define UNICOM_INSTANTIATE(Unit)                                                \
  template int64_t forward_workspace<Unit>(const Problem&);                     \
  template void forward<Unit>(Queue&, const Problem&, const ShardSums&, void*); \
  template int64_t kept_classes<Unit>(int64_t, int64_t, int64_t);               \
  template int64_t kept_bytes<Unit>(int64_t, int64_t);                          \
  template int64_t backward_chunk<Unit>(const Problem&);                        \
  template int64_t backward_workspace<Unit>(const Problem&, const Gradients&);  \
  template void backward<Unit>(Queue&, const Problem&, const Gradients&, void*)
UNICOM_INSTANTIATE(float);
UNICOM_INSTANTIATE(double);
UNICOM_INSTANTIATE(Half);
UNICOM_INSTANTIATE(BFloat);
#undef UNICOM_INSTANTIATE

}  // namespace unicom::cuda
