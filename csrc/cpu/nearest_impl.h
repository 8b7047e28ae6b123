// The search for the nearest class: the register tile with a comparison in place of the
// exponentials.
#pragma once

#include <limits>

#include "product.h"

namespace unicom::cpu {
namespace {

double dot(const float* a, const float* b, int64_t count) { return dot_in_double(a, b, count); }

// Takes in the classes first, first + 1, ... whose scores are above the floor.
template <class Unit>
__attribute__((noinline)) void add_candidates(const Nearest<Unit>& args, int64_t row,
                                              const float* scores, int64_t lanes, int64_t first) {
  constexpr int kW = kWidth<float>;
  float& floor = args.floor[row];
  int32_t* candidate = args.candidate + row * args.capacity;
  float* score = args.score + row * args.capacity;
  int32_t count = args.count[row];
  // The best of these first: it raises the floor, and few of the others remain.
  Vec<float> best = load(scores);
  for (int64_t lane = kW; lane < lanes; lane += kW) {
    const Vec<float> next = load(scores + lane);
    best = next > best ? next : best;
  }
  const float raised = horizontal_max<float>(best) - args.window[row];
  floor = raised > floor ? raised : floor;
  for (int64_t start = 0; start < lanes; start += kW) {
    uint32_t above = lane_bits(load(scores + start) > broadcast(floor));
    for (; above != 0; above &= above - 1) {
      const int64_t lane = start + __builtin_ctz(above);
      if (count == args.capacity) {
        // The floor has risen since the first ones came.
        count = 0;
        for (int32_t i = 0; i < args.capacity; ++i)
          if (score[i] > floor) {
            candidate[count] = candidate[i];
            score[count++] = score[i];
          }
        if (count == args.capacity) {
          args.count[row] = static_cast<int32_t>(args.capacity) + 1;
          floor = std::numeric_limits<float>::infinity();
          return;
        }
      }
      candidate[count] = static_cast<int32_t>(first + lane);
      score[count++] = scores[lane];
    }
  }
  args.count[row] = count;
}

// The compiler may not carry what it knows of these values past this point. Without it, it moves
// the accumulators about inside the loop between two such points.
template <int M, int N>
UNICOM_INLINE void keep_in_registers([[maybe_unused]] Vec<float> (&acc)[M][N]) {
#if defined(__AVX512F__) && UNICOM_VECTOR_BYTES == 64
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) asm("" : "+v"(acc[m][v]));
#endif
}

// Scores [6][16 P] of one tile and the panels panel, ... panel + P - 1, of those rows that have one
// above their floor; returns a bit for each of these rows.
// Not inlined: alone, the loop gets all the registers.
template <class Unit, int P>
__attribute__((noinline)) unsigned tile_scores(const Nearest<Unit>& args, int64_t panel,
                                               int64_t tile, float* scores) {
  constexpr bool kBytes = UnitTraits<Unit>::kValues == 4;
  constexpr int kN = P * kVectors<float>;
  constexpr int kW = kWidth<float>;
  constexpr int M = kRegisterRows<float>;
  const float* bias = args.class_bias + panel * kLanes;
  const float* class_scale = args.class_scale + panel * kLanes;
  const int32_t* class_start = args.class_start + panel * kLanes;
  unsigned found = 0;
  for (int first = 0; first < kTile; first += M) {
    Vec<float> acc[M][kN];
#pragma GCC unroll 8
    for (int v = 0; v < kN; ++v) {
      Vec<float> start{};
      if constexpr (kBytes) std::memcpy(&start, class_start + v * kW, sizeof(start));
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[m][v] = start;
    }
    keep_in_registers(acc);
    MultiplyAdd<Unit>::template run<M, P, 1, kTile>(
        acc, args.rows + tile * args.row_tile_stride + first,
        args.classes + panel * args.panel_stride, args.panel_stride, args.units);
    keep_in_registers(acc);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const int64_t r = tile * kTile + first + m;
      const Vec<float> floor = broadcast(args.floor[r]);
      const Vec<float> scale = broadcast(args.row_scale[r]);
      IntVec<float> above{};
#pragma GCC unroll 8
      for (int v = 0; v < kN; ++v) {
        if constexpr (kBytes)
          acc[m][v] = fma(__builtin_convertvector((IntVec<float>)acc[m][v], Vec<float>) *
                              load(class_scale + v * kW),
                          scale, load(bias + v * kW));
        else
          acc[m][v] += load(bias + v * kW);
        above |= acc[m][v] > floor;
      }
      if (any(above)) {
        found |= 1u << (first + m);
#pragma GCC unroll 8
        for (int v = 0; v < kN; ++v) store(scores + (first + m) * P * kLanes + v * kW, acc[m][v]);
      }
    }
  }
  return found;
}

template <class Unit>
void nearest(const Nearest<Unit>& args) {
  constexpr int P = kRegisterPanels<float>;
  alignas(64) float scores[kTile * P * kLanes];
  for (int64_t r = 0; r < args.tiles * kTile; ++r) args.count[r] = 0;
  auto panels_at = [&](auto count, int64_t panel) {
    constexpr int kCount = decltype(count)::value;
    for (int64_t t = 0; t < args.tiles; ++t) {
      unsigned found = tile_scores<Unit, kCount>(args, panel, t, scores);
      for (; found != 0; found &= found - 1) {
        const int m = __builtin_ctz(found);
        add_candidates(args, t * kTile + m, scores + m * kCount * kLanes, kCount * kLanes,
                       panel * kLanes);
      }
    }
  };
  int64_t panel = 0;
  for (; panel + P <= args.panels; panel += P) panels_at(std::integral_constant<int, P>{}, panel);
  for (; panel < args.panels; ++panel) panels_at(std::integral_constant<int, 1>{}, panel);
}

}  // namespace
}  // namespace unicom::cpu
