// Logits and what becomes of them while they are in registers and the first cache: sums of
// exponentials in the forward pass, probabilities in the backward pass.
#pragma once

#include <type_traits>

#include "rows_impl.h"

namespace unicom::cpu {
namespace {

// Whole lines to memory; past the caches they are not read from there first.
template <class Real>
UNICOM_INLINE void keep(const Real* from, int64_t count, bool past_caches, Real* to) {
  if (past_caches)
    for (int64_t i = 0; i < count; i += kWidth<Real>) store_past_caches(to + i, load(from + i));
  else
    for (int64_t i = 0; i < count; i += kWidth<Real>) store(to + i, load(from + i));
}

template <class Unit>
int64_t ask_steps_of(const LogitBlock<Unit>& block, int64_t panels) {
  if constexpr (kInSquares<Unit>) {
    const int64_t corners = ceil_div(block.tiles * kTile, 2 * kSquare) * ceil_div(panels, 2);
    return corners * ceil_div(block.units, kSquare);
  } else {
    constexpr int P = kRegisterPanels<RealOf<Unit>>;
    return block.tiles * (panels / P + panels % P) * ask_steps(block.units);
  }
}

// Cosines of one tile with the panels [panel, panel + P), multiplied or kept ones: where they are,
// [P][6][16], and how far from one panel to the next. The host sees to it that P panels beside
// each other are all kept or none. Tiles come in order, and find what was multiplied with the ones
// before them.
//   out  [P][kScratch]
template <class Real>
struct TileCosines {
  const Real* data;
  int64_t panel_stride;
};
enum class Kept { kWrite, kRead };
template <class Unit, int P, Kept kKept>
UNICOM_INLINE TileCosines<RealOf<Unit>> tile_cosines(const LogitBlock<Unit>& block, int64_t panel,
                                                     int64_t tile, LinesAhead* ahead,
                                                     RealOf<Unit>* out) {
  constexpr int64_t kSize = kTile * kLanes;
  const bool kept = panel + P <= block.kept;
  RealOf<Unit>* place = block.cosines + panel * block.cosines_panel_stride + tile * kSize;
  if (kept && kKept == Kept::kRead) return {place, block.cosines_panel_stride};
  if constexpr (kInSquares<Unit>) {
    const int64_t before = tile % kTilesTogether<Unit>;
    if (before == 0) multiply_together<P, Unit>(block, panel, tile, out, [ahead] { ahead->ask(); });
    out += before * kSize;
  } else {
    multiply_tile<Unit, P>({block.rows + tile * block.row_tile_stride, 1, kTile},
                           block.classes + panel * block.panel_stride, block.panel_stride,
                           block.units, out, kSize, false, ahead);
  }
  if (kept)
    for (int p = 0; p < P; ++p, place += block.cosines_panel_stride)
      keep(out + p * kScratch<Unit>, kSize, block.past_caches, place);
  return {out, kScratch<Unit>};
}

// The same for sixteen classes of several centres each, in the panels from `panel` on, centre by
// centre: of[k] is that tile of centre k.  out: [centers][kScratch]
template <class Unit, Kept kKept>
UNICOM_INLINE void center_cosines(const LogitBlock<Unit>& block, int64_t panel, int64_t tile,
                                  LinesAhead* ahead, RealOf<Unit>* out, const RealOf<Unit>** of) {
  constexpr int P = kRegisterPanels<RealOf<Unit>>;
  int64_t k = 0;
  auto take = [&](auto count) {
    constexpr int kCount = decltype(count)::value;
    for (; k + kCount <= block.centers; k += kCount) {
      const auto found = tile_cosines<Unit, kCount, kKept>(block, panel + k, tile, ahead,
                                                           out + k * kScratch<Unit>);
      for (int i = 0; i < kCount; ++i) of[k + i] = found.data + i * found.panel_stride;
    }
  };
  take(std::integral_constant<int, P>{});
  if constexpr (P > 2) {
    take(std::integral_constant<int, P - 1>{});
    take(std::integral_constant<int, 2>{});
  }
  if constexpr (P > 1) take(std::integral_constant<int, 1>{});
}

// The largest of each class's cosines, at an offset of the tile; NaN where one of them is.
template <class Real>
UNICOM_INLINE Vec<Real> nearest_center(const Real* const* of, int64_t centers, int64_t offset) {
  Vec<Real> best = load(of[0] + offset);
  for (int64_t k = 1; k < centers; ++k) {
    const Vec<Real> c = load(of[k] + offset);
    best = (c > best) | (c != c) ? c : best;
  }
  return best;
}

// The sixteen cosines of one row and panel, with those that are no negatives struck out.
template <class Unit>
struct Negatives {
  using Real = RealOf<Unit>;
  Vec<Real> value[kVectors<Real>];

  UNICOM_INLINE Negatives(const Real* cosines, uint16_t struck) {
    for (int v = 0; v < kVectors<Real>; ++v) value[v] = load(cosines + v * kWidth<Real>);
    if (struck != 0) {
      Real edited[kLanes];
      for (int v = 0; v < kVectors<Real>; ++v) store(edited + v * kWidth<Real>, value[v]);
      for (uint32_t rest = struck; rest != 0; rest &= rest - 1)
        edited[__builtin_ctz(rest)] = static_cast<Real>(kNoCosine);
      for (int v = 0; v < kVectors<Real>; ++v) value[v] = load(edited + v * kWidth<Real>);
    }
  }
};

template <class Unit>
void sum_exp(const SumExp<Unit>& args) {
  using Real = RealOf<Unit>;
  constexpr int P = kRegisterPanels<Real>;
  constexpr int kV = kVectors<Real>;
  const MatrixUnitFor<Unit> unit;
  alignas(64) Real cosines[kMaxCenters * kScratch<Unit>], nearest[kTile * kLanes];
  const int64_t rows = args.tiles * kTile;
  const int64_t centers = args.centers, classes = args.panels / centers;  // sixteens of classes
  const bool running = args.exponent == kRunningExponent;
  const Vec<Real> fixed = broadcast(static_cast<Real>(running ? 0 : args.exponent));
  const Real scale = args.scale;
  const Vec<Real> filter = broadcast(args.filter);

  auto flush = [&](int64_t r) {
    Real* sums = args.sums + r * kLanes;
    double total = 0;
    for (int64_t i = 0; i < kLanes; ++i) {
      total += static_cast<double>(sums[i]);
      sums[i] = 0;
    }
    args.result[r].sum += total;
  };
  LinesAhead ahead(args.ahead, centers == 1 ? ask_steps_of(args, classes)
                                            : classes * ask_steps_of(args, centers));
  // Raises the row's exponent where a larger logit comes; the powers of two make it exact.
  auto raise = [&](int64_t r, const Vec<Real>* c) {
    Vec<Real> top = c[0];
    for (int v = 1; v < kV; ++v) top = c[v] > top ? c[v] : top;
    const double z = static_cast<double>(horizontal_max<Real>(top)) * args.scale;
    if (!(z > kNoCosine)) return;
    const int64_t power = static_cast<int64_t>(std::nearbyint(z * ExpConstants::kLog2e));
    RowSum& row = args.result[r];
    if (row.exponent != kRunningExponent && power <= row.exponent) return;
    flush(r);
    row.sum = row.exponent == kRunningExponent
                  ? 0.0
                  : std::ldexp(row.sum, static_cast<int>(row.exponent - power));
    row.exponent = power;
  };

  auto panels_at = [&](auto is_running, auto count, int64_t panel) {
    constexpr bool kRunning = decltype(is_running)::value;
    constexpr int kCount = decltype(count)::value;
    for (int64_t t = 0; t < args.tiles; ++t) {
      TileCosines<Real> tile{cosines, 0};
      if (kCount > 1 || centers == 1) {
        tile = tile_cosines<Unit, kCount, Kept::kWrite>(args, panel, t, &ahead, cosines);
      } else {
        const Real* of[kMaxCenters];
        center_cosines<Unit, Kept::kWrite>(args, panel * centers, t, &ahead, cosines, of);
        for (int64_t i = 0; i < kTile * kLanes; i += kWidth<Real>)
          store(nearest + i, nearest_center<Real>(of, centers, i));
        tile = {nearest, 0};
      }
      for (int64_t m = 0; m < kTile; ++m) {
        const int64_t r = t * kTile + m;
        Real* sums = args.sums + r * kLanes;
        Real* largest = args.largest + r * kLanes;
        Vec<Real> best[kV], sum[kV];
        for (int v = 0; v < kV; ++v) {
          best[v] = load(largest + v * kWidth<Real>);
          sum[v] = load(sums + v * kWidth<Real>);
        }
        for (int p = 0; p < kCount; ++p) {
          Negatives<Unit> c(tile.data + p * tile.panel_stride + m * kLanes,
                            args.struck[r * classes + panel + p]);
          for (int v = 0; v < kV; ++v) {
            best[v] = larger<Real>(c.value[v], best[v]);
            c.value[v] = c.value[v] > filter ? Vec<Real>{} : c.value[v];
          }
          Vec<Real> exponent = fixed;
          if constexpr (kRunning) {
            for (int v = 0; v < kV; ++v) store(sums + v * kWidth<Real>, sum[v]);
            raise(r, c.value);
            for (int v = 0; v < kV; ++v) sum[v] = load(sums + v * kWidth<Real>);
            if (args.result[r].exponent != kRunningExponent)
              exponent = broadcast(static_cast<Real>(args.result[r].exponent));
          }
          for (int v = 0; v < kV; ++v)
            sum[v] += exp_scaled<Real>(exp_parts(c.value[v], scale), exponent);
        }
        for (int v = 0; v < kV; ++v) {
          store(largest + v * kWidth<Real>, best[v]);
          store(sums + v * kWidth<Real>, sum[v]);
        }
      }
    }
  };
  int64_t panel = 0;
  auto all_panels = [&](auto is_running) {
    for (; centers == 1 && panel + P <= classes; panel += P)
      panels_at(is_running, std::integral_constant<int, P>{}, panel);
    for (; panel < classes; ++panel) panels_at(is_running, std::integral_constant<int, 1>{}, panel);
  };
  if (running)
    all_panels(std::true_type{});
  else
    all_panels(std::false_type{});
  fence_past_caches();  // what was kept
  if (!args.flush) return;
  for (int64_t r = 0; r < rows; ++r) {
    flush(r);
    for (int64_t i = 0; i < kLanes; ++i) {
      Real& largest = args.largest[r * kLanes + i];
      if (largest > args.result[r].largest) args.result[r].largest = largest;
      largest = static_cast<Real>(kNoCosine);
    }
  }
}

// Probabilities [rows][16] of one panel, in Real, to the two layouts the products read.
template <class Unit>
UNICOM_INLINE void emit(const RealOf<Unit>* p, int64_t rows, Unit* along_rows, Unit* along_classes,
                        int64_t along_classes_stride) {
  constexpr int64_t kValues = UnitTraits<Unit>::kValues;
  constexpr int64_t kGroup = kLanes / kValues;
  if constexpr (kValues == 2) {
    constexpr int kV = kVectors<float>;
    for (int64_t r = 0; r < rows; r += 2)
      for (int v = 0; v < kV; ++v) {
        const Vec<float> even = load(p + r * kLanes + v * kWidth<float>);
        const Vec<float> odd = load(p + (r + 1) * kLanes + v * kWidth<float>);
        store_words(along_rows + r / 2 * kLanes + v * kWidth<float>, rounded_pairs(even, odd));
      }
  }
  for (int64_t r = 0; r < rows; r += kLanes) {
    Unit* out = along_classes + r / kLanes * along_classes_stride;
    const int64_t count = rows - r < kLanes ? rows - r : kLanes;
    if constexpr (kValues == 1) {
      if (count == kLanes) {
        transpose(p + r * kLanes, kGroup, kLanes, kGroup, out, kLanes);
        continue;
      }
    }
    Unit units[kLanes * kGroup];
    if constexpr (kValues == 2) {
      round_to_pairs(p + r * kLanes, count * kLanes, units);
    } else {
      std::memcpy(units, p + r * kLanes, count * kLanes * sizeof(Unit));
    }
    std::memset(units + count * kGroup, 0, (kLanes - count) * kGroup * sizeof(Unit));
    if constexpr (sizeof(Unit) == 4)
      transpose(reinterpret_cast<const uint32_t*>(units), kGroup, kLanes, kGroup,
                reinterpret_cast<uint32_t*>(out), kLanes);
    else
      transpose(units, kGroup, kLanes, kGroup, out, kLanes);
  }
}

template <class Unit>
void probabilities(const Probabilities<Unit>& args) {
  using Real = RealOf<Unit>;
  constexpr int P = kRegisterPanels<Real>;
  constexpr int kV = kVectors<Real>;
  constexpr int64_t kGroup = kLanes / UnitTraits<Unit>::kValues;
  constexpr int64_t kMaxRows = kBlockTiles * kTile;
  constexpr bool kPaired = UnitTraits<Unit>::kValues == 2;
  const MatrixUnitFor<Unit> unit;
  alignas(64) Real cosines[kMaxCenters * kScratch<Unit>];
  // Pairs are rounded from here; single values are written to their place along the rows at once.
  LinesAhead ahead({}, 1);  // nothing
  alignas(64) Real rounded[kPaired ? kMaxCenters : 1][kPaired ? kMaxRows * kLanes : 1];
  const int64_t rows = args.tiles * kTile;
  const int64_t centers = args.centers, classes = args.panels / centers;  // sixteens of classes
  const Real scale = args.scale;
  const Vec<Real> filter = broadcast(args.filter);

  auto place = [&](int64_t panel, int64_t i) {
    if constexpr (kPaired)
      return rounded[i];
    else
      return args.along_rows + panel * args.along_rows_stride;
  };
  auto probability = [&](Vec<Real> c, Vec<Real> exponent, Vec<Real> factor) {
    const Vec<Real> e = exp_scaled<Real>(exp_parts(c, scale), exponent);
    return c > filter ? Vec<Real>{} : e * factor;
  };
  auto finish = [&](int64_t panel, const Real* p) {
    emit<Unit>(p, rows, args.along_rows + panel * args.along_rows_stride,
               args.along_classes + panel * kGroup * kLanes, args.along_classes_stride);
  };
  auto panels_at = [&](auto count, int64_t panel) {
    constexpr int kCount = decltype(count)::value;
    Real* p[kCount];
    for (int i = 0; i < kCount; ++i) p[i] = place(panel + i, i);
    for (int64_t t = 0; t < args.tiles; ++t) {
      const auto tile = tile_cosines<Unit, kCount, Kept::kRead>(args, panel, t, &ahead, cosines);
      if (panel + kCount <= args.kept && t + 1 < args.tiles)
        for (int i = 0; i < kCount; ++i)
          for (int64_t k = 0; k < kTile * kLanes; k += 64 / sizeof(Real))
            __builtin_prefetch(tile.data + i * tile.panel_stride + kTile * kLanes + k);
      for (int64_t m = 0; m < kTile; ++m) {
        const int64_t r = t * kTile + m;
        const Vec<Real> exponent = broadcast(static_cast<Real>(args.row[r].exponent));
        const Vec<Real> factor = broadcast(static_cast<Real>(args.row[r].factor));
        for (int i = 0; i < kCount; ++i) {
          const Negatives<Unit> c(tile.data + i * tile.panel_stride + m * kLanes,
                                  args.struck[r * classes + panel + i]);
          for (int v = 0; v < kV; ++v)
            store(p[i] + r * kLanes + v * kWidth<Real>, probability(c.value[v], exponent, factor));
        }
      }
    }
    for (int i = 0; i < kCount; ++i) finish(panel + i, p[i]);
  };
  // Of each class the nearest centre has all of the probability, of equals the first.
  auto centers_at = [&](int64_t first) {  // sixteen classes
    Real* p[kMaxCenters];
    for (int64_t k = 0; k < centers; ++k) p[k] = place(first * centers + k, k);
    for (int64_t t = 0; t < args.tiles; ++t) {
      const Real* of[kMaxCenters];
      center_cosines<Unit, Kept::kRead>(args, first * centers, t, &ahead, cosines, of);
      for (int64_t m = 0; m < kTile; ++m) {
        const int64_t r = t * kTile + m;
        const Vec<Real> exponent = broadcast(static_cast<Real>(args.row[r].exponent));
        const Vec<Real> factor = broadcast(static_cast<Real>(args.row[r].factor));
        alignas(64) Real best[kLanes];
        for (int64_t i = 0; i < kLanes; i += kWidth<Real>)
          store(best + i, nearest_center<Real>(of, centers, m * kLanes + i));
        const Negatives<Unit> c(best, args.struck[r * classes + first]);
        for (int v = 0; v < kV; ++v) {
          Vec<Real> left = probability(c.value[v], exponent, factor);
          const Vec<Real> largest = load(best + v * kWidth<Real>);
          for (int64_t k = 0; k < centers; ++k) {
            const Vec<Real> own = load(of[k] + m * kLanes + v * kWidth<Real>);
            store(p[k] + r * kLanes + v * kWidth<Real>, own < largest ? Vec<Real>{} : left);
            left = own < largest ? left : Vec<Real>{};
          }
        }
      }
    }
    for (int64_t k = 0; k < centers; ++k) finish(first * centers + k, p[k]);
  };
  if (centers > 1) {
    for (int64_t first = 0; first < classes; ++first) centers_at(first);
    return;
  }
  int64_t panel = 0;
  for (; panel + P <= args.panels; panel += P) panels_at(std::integral_constant<int, P>{}, panel);
  for (; panel < args.panels; ++panel) panels_at(std::integral_constant<int, 1>{}, panel);
}

}  // namespace
}  // namespace unicom::cpu
