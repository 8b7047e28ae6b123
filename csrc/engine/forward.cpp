#include <algorithm>
#include <cmath>
#include <limits>

#include "../core/softmax.h"
#include "operands.h"

namespace unicom {

int64_t packed_bytes(int64_t sampled, int64_t dim, int64_t bytes_per_value) {
  const int64_t lanes = round_up(sampled, kLanes);
  return lanes * cpu::panel_height(dim) * bytes_per_value +
         lanes * static_cast<int64_t>(sizeof(double));
}

int64_t kept_panel_bytes(int64_t batch, int64_t real_bytes) {
  return round_up(batch, kTile) * kLanes * real_bytes;
}

int64_t kept_panels(int64_t sampled, int64_t batch, int64_t real_bytes, int64_t workspace_bytes) {
  const int64_t panels = ceil_div(sampled, kLanes);
  const int64_t bytes = kept_panel_bytes(batch, real_bytes);
  if (workspace_bytes == 0 || bytes == 0) return 0;
  const int64_t fit = workspace_bytes / bytes;
  return fit >= panels ? panels : fit / 4 * 4;
}

namespace {

constexpr int64_t kPanelsPerItem = 16;  // panels a thread takes at a time

template <class Unit>
void pack_classes(const Problem& p, const Shape<Unit>& s, PackedClasses<Unit> out,
                  const Parallel& parallel) {
  const auto& k = kernels_for<Unit>();
  parallel.run(ceil_div(s.panels, kPanelsPerItem), [&](int64_t item) {
    Buffer<RealOf<Unit>> scratch(kLanes * s.height);
    const int64_t end = std::min(s.panels, (item + 1) * kPanelsPerItem);
    for (int64_t j = item * kPanelsPerItem; j < end; ++j)
      k.pack_panel(p.prototypes, p.class_index, j * kLanes, p.sampled, p.rounding, scratch.get(),
                   out.panels + j * s.panel_units, out.inverse_norm + j * kLanes);
  });
}

// Sums over the other classes, per row: runs of classes are summed apart, at most kRuns of them
// whatever the number of threads, and merged in order.
constexpr int64_t kRuns = 64;

template <class Unit>
void sum_negatives(const Problem& p, const Shape<Unit>& s, const PackedRows<Unit>& rows,
                   const PackedClasses<Unit>& classes, void* kept, cpu::RowSum* result,
                   const Parallel& parallel) {
  const auto& k = kernels_for<Unit>();
  const int64_t run_panels = std::max<int64_t>(16, round_up(ceil_div(s.panels, kRuns), 4));
  const int64_t runs = ceil_div(s.panels, run_panels);
  int64_t exponent;
  if (!constant_exponent(p.scale, static_cast<double>(p.total_sampled), &exponent))
    exponent = cpu::kRunningExponent;

  Buffer<cpu::RowSum> partial(std::max<int64_t>(1, runs) * s.padded_rows);
  parallel.run(s.blocks * runs, [&](int64_t item) {
    const int64_t block = item % s.blocks, run = item / s.blocks;
    const int64_t first_tile = block * s.block_tiles, first_row = first_tile * kTile;
    const int64_t first_panel = run * run_panels;
    int64_t target[cpu::kBlockTiles * kTile];
    cpu::SumExp<Unit> args;
    args.rows = rows.tiles.get() + first_tile * kTile * s.units;
    args.row_tile_stride = kTile * s.units;
    args.classes = classes.panels + first_panel * s.panel_units;
    args.panel_stride = s.panel_units;
    args.units = s.units;
    args.tiles = s.tiles_in_block(block);
    args.panels = std::min(run_panels, s.panels - first_panel);
    for (int64_t r = 0; r < args.tiles * kTile; ++r)
      target[r] = first_row + r < p.batch && p.slot[first_row + r] >= 0
                      ? p.slot[first_row + r] - first_panel * kLanes
                      : -1;
    args.target = target;
    args.num_classes = p.sampled - first_panel * kLanes;
    args.scale = static_cast<RealOf<Unit>>(p.scale);
    args.filter = static_cast<RealOf<Unit>>(p.filter);
    keep_cosines(p, s, kept, first_panel, first_tile, &args);
    args.exponent = exponent;
    args.result = partial.get() + run * s.padded_rows + first_row;
    k.sum_exp(args);
  });

  for (int64_t r = 0; r < p.batch; ++r) {
    cpu::RowSum total{0.0, exponent, cpu::kNoCosine};
    for (int64_t run = 0; run < runs; ++run) {
      const cpu::RowSum& part = partial[run * s.padded_rows + r];
      total.exponent = std::max(total.exponent, part.exponent);
      total.largest = std::max(total.largest, part.largest);
    }
    for (int64_t run = 0; run < runs; ++run) {
      const cpu::RowSum& part = partial[run * s.padded_rows + r];
      if (part.exponent == total.exponent) {
        total.sum += part.sum;
      } else if (part.exponent != cpu::kRunningExponent) {
        total.sum += std::ldexp(part.sum, static_cast<int>(part.exponent - total.exponent));
      }
    }
    result[r] = total;
  }
}

// Cosine of each sample with its own prototype, in double from the rows as they were given.
void target_cosines(const Problem& p, double* cosine, int64_t stride, const Parallel& parallel) {
  const auto& k = kernels_for<double>();
  constexpr int64_t kSamplesPerItem = 16;
  parallel.run(ceil_div(p.batch, kSamplesPerItem), [&](int64_t item) {
    const int64_t dim = p.embeddings.dim;
    Buffer<double> x(dim), w(dim);
    const int64_t end = std::min(p.batch, (item + 1) * kSamplesPerItem);
    for (int64_t i = item * kSamplesPerItem; i < end; ++i) {
      double& sum = cosine[i * stride];
      sum = 0;
      if (p.slot[i] < 0) continue;
      k.unit_row(p.embeddings, i, x.get(), dim);
      k.unit_row(p.prototypes, class_of(p, i), w.get(), dim);
      sum = k.dot(x.get(), w.get(), dim);
    }
  });
}

}  // namespace

template <class Unit>
void forward(const Problem& p, const ShardSums& out, const Parallel& parallel) {
  const Shape<Unit> s(p);
  const PackedClasses<Unit> classes(out.packed, s);
  pack_classes(p, s, classes, parallel);
  if (p.batch == 0) return;
  const PackedRows<Unit> rows(p, s, parallel);
  Buffer<cpu::RowSum> sums(p.batch);
  sum_negatives(p, s, rows, classes, out.kept, sums.get(), parallel);
  target_cosines(p, out.target_cosine, out.stride, parallel);

  constexpr double kNone = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < p.batch; ++i) {
    const cpu::RowSum& sum = sums[i];
    const bool ignored = p.slot[i] == kIgnoredSlot;
    out.sum[i * out.stride] = ignored ? 0 : sum.sum;
    out.exponent[i] =
        sum.exponent == cpu::kRunningExponent ? kNone : static_cast<double>(sum.exponent);
    out.largest_negative[i] = !ignored && sum.largest > cpu::kNoCosine ? sum.largest : kNone;
    out.inverse_norm[i] = rows.inverse_norm[static_cast<size_t>(i)];
  }
}

template void forward<float>(const Problem&, const ShardSums&, const Parallel&);
template void forward<cpu::BfPair>(const Problem&, const ShardSums&, const Parallel&);
template void forward<double>(const Problem&, const ShardSums&, const Parallel&);

void merge(const MarginOptions& margin, double scale, int64_t batch, const int64_t* slot,
           const ShardSums& sums, double* loss, SampleState* state) {
  for (int64_t i = 0; i < batch; ++i) {
    loss[i] = 0;
    state[i] = {};
    if (slot[i] == kIgnoredSlot) continue;
    loss[i] = join_target(margin, scale, i, sums.sum[i * sums.stride], sums.exponent[i],
                          sums.target_cosine[i * sums.stride], sums.inverse_norm[i], &state[i]);
  }
}

}  // namespace unicom
