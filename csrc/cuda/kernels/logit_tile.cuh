// What becomes of a tile of cosines, on whichever tile of logits they were made.
#pragma once

#include <cmath>

#include "../../core/softmax.h"
#include "logits.h"
#include "tensor_core.cuh"

namespace unicom::cuda {

// exp(scale * c) * 2^-exponent. Sixteen-bit operands are off by more than the fast way costs.
template <class Unit>
struct Exponential {
  using Real = RealOf<Unit>;
  Real scale, scale_log2;

  UNICOM_DEVICE explicit Exponential(double s)
      : scale(static_cast<Real>(s)), scale_log2(static_cast<Real>(s / kLn2)) {}
  UNICOM_DEVICE Real operator()(Real c, Real exponent) const {
    if constexpr (UnitTraits<Unit>::kTensorCores)
      return exp2_fast(fmaf(c, scale_log2, -exponent));
    else
      return scaled_exp(c, scale, exponent);
  }
};

template <class Real>
UNICOM_DEVICE Real times_power(Real x, Real power) {
  return std::ldexp(x, static_cast<int>(max_of(power, Real(-2000))));
}

template <class Real>
UNICOM_DEVICE RowSum<Real> merged(const RowSum<Real>& a, const RowSum<Real>& b) {
  const Real exponent = max_of(a.exponent, b.exponent);
  return {times_power(a.sum, a.exponent - exponent) + times_power(b.sum, b.exponent - exponent),
          exponent, max_of(a.largest, b.largest)};
}

UNICOM_DEVICE int64_t class_count(const Logits& a) {
  return a.count != nullptr ? *a.count : a.bound;
}
// The same in rows of the prototypes.
UNICOM_DEVICE int64_t row_count(const Logits& a) { return a.order.rows(class_count(a)); }

// Some tiles of classes, which one block goes through.
struct TileRun {
  int64_t first;  // tile
  int tiles;
};

// This block's part of the tiles that hold `classes`. By their count, not by their bound: runs are
// equally long, however many of the sampled classes the labels brought.
template <int kCols>
UNICOM_DEVICE TileRun run_of_block(int64_t classes, int64_t runs) {
  const int64_t all = (max_of<int64_t>(classes, 0) + kCols - 1) / kCols;
  const int64_t length = (all + runs - 1) / runs;
  const int64_t first = min_of(blockIdx.y * length, all);
  return {first, static_cast<int>(min_of(length, all - first))};
}

// Puts kNoCosine where there is no negative: at the positives and past the last class.
template <class T>
UNICOM_DEVICE void mask_tile(T& tile, const Logits& a, int64_t first_row, int64_t first_class,
                             int64_t count) {
  using Real = typename T::Real;
  if (first_class + T::kCols > count) {
    const int valid = static_cast<int>(max_of<int64_t>(count - first_class, 0));
#pragma unroll
    for (int j = 0; j < T::kThreadCols; ++j)
      if (tile.col(j) >= valid) {
#pragma unroll
        for (int i = 0; i < T::kThreadRows; ++i) tile.at(i, j) = Real(kNoCosine);
      }
  }
#pragma unroll
  for (int i = 0; i < T::kThreadRows; ++i) {
    const int64_t row = first_row + tile.row(i);
    if (row >= a.batch) continue;
    for (int64_t p = 0; p < a.positives.width; ++p) {
      const int64_t target = a.positives.of(row)[p] - first_class;
      if (target < 0 || target >= T::kCols) continue;
#pragma unroll
      for (int j = 0; j < T::kThreadCols; ++j)
        if (tile.col(j) == target) tile.at(i, j) = Real(kNoCosine);
    }
  }
}

// Sums of exponentials over tiles. A thread keeps, for each of its rows, its own exponent, raised as
// larger cosines come.
template <class Unit, class T>
class RunningSums {
 public:
  using Real = RealOf<Unit>;

  UNICOM_DEVICE explicit RunningSums(const Logits& a)
      : exponential_(a.scale), filter_(static_cast<Real>(a.filter)), filtered_(a.filter <= 1) {
#pragma unroll
    for (int i = 0; i < T::kThreadRows; ++i) {
      sum_[i] = 0;
      exponent_[i] = Real(kNoExponent);
      largest_[i] = Real(kNoCosine);
    }
  }

  // The cosines of a tile, which is changed.
  UNICOM_DEVICE void add(T& tile) {
#pragma unroll
    for (int i = 0; i < T::kThreadRows; ++i) {
      Real peak = Real(kNoCosine);
#pragma unroll
      for (int j = 0; j < T::kThreadCols; ++j) peak = larger(peak, tile.at(i, j));
      largest_[i] = max_of(largest_[i], peak);
      if (filtered_) {
        peak = Real(kNoCosine);
#pragma unroll
        for (int j = 0; j < T::kThreadCols; ++j) {
          Real& c = tile.at(i, j);
          c = c > filter_ ? Real(0) : c;
          peak = larger(peak, c);
        }
      }
      const Real raised = max_of(exponent_[i], Real(std::ceil(peak * exponential_.scale_log2)));
      Real total = raised == exponent_[i] ? sum_[i] : times_power(sum_[i], exponent_[i] - raised);
#pragma unroll
      for (int j = 0; j < T::kThreadCols; ++j) total += exponential_(tile.at(i, j), raised);
      exponent_[i] = raised;
      sum_[i] = total;
    }
  }

  UNICOM_DEVICE RowSum<Real> of(int i) const { return {sum_[i], exponent_[i], largest_[i]}; }
  // Of four lanes side by side that share their rows; the same on each of them.
  UNICOM_DEVICE RowSum<Real> of_four_lanes(int i) const {
    const int first = lane_index() / 4 * 4;
    auto of_lane = [&](int lane) {
      return RowSum<Real>{__shfl_sync(kAllLanes, sum_[i], lane),
                          __shfl_sync(kAllLanes, exponent_[i], lane),
                          __shfl_sync(kAllLanes, largest_[i], lane)};
    };
    RowSum<Real> total = of_lane(first);
    for (int member = 1; member < 4; ++member) total = merged(total, of_lane(first + member));
    return total;
  }

 private:
  const Exponential<Unit> exponential_;
  const Real filter_;
  const bool filtered_;
  Real sum_[T::kThreadRows], exponent_[T::kThreadRows], largest_[T::kThreadRows];
};

// A probability as it is stored, from a cosine that is kNoCosine where there is no negative.
template <class Unit>
struct Probability {
  using Real = RealOf<Unit>;
  Exponential<Unit> exponential;
  Real filter;

  UNICOM_DEVICE explicit Probability(const Logits& a)
      : exponential(a.scale), filter(static_cast<Real>(a.filter)) {}
  UNICOM_DEVICE Unit operator()(Real c, const RowScale<Real>& row) const {
    const Real p =
        exponential(c, row.exponent) * (row.factor * Real(UnitTraits<Unit>::kProbabilityScale));
    return narrow<Unit>(c > filter ? Real(0) : p);
  }
};

}  // namespace unicom::cuda
