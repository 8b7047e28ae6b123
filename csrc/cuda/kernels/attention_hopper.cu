#include "attention.h"
#include "attention_tile.cuh"
#include "logit_tile.cuh"

namespace unicom::cuda {

namespace {

// Exponentials of a tile, as weights, and their sums. The four lanes that share a row have its
// exponent in common, raised as larger cosines come.
template <class Unit, class T>
class RunningWeights {
 public:
  UNICOM_DEVICE explicit RunningWeights(const Logits& a)
      : exponential_(a.scale), filter_(static_cast<float>(a.filter)), filtered_(a.filter <= 1) {
#pragma unroll
    for (int i = 0; i < T::kThreadRows; ++i) {
      sum_[i] = 0;
      exponent_[i] = kNoExponent;
      largest_[i] = kNoCosine;
    }
  }

  // Makes weights of the cosines of a tile, and brings what was summed to their exponent.
  UNICOM_DEVICE void weigh(T& tile) {
    float by[T::kThreadRows], filtered[T::kThreadRows] = {};
    bool raises = false;
#pragma unroll
    for (int i = 0; i < T::kThreadRows; ++i) {
      float peak = kNoCosine;
#pragma unroll
      for (int j = 0; j < T::kThreadCols; ++j) peak = larger(peak, tile.at(i, j));
      largest_[i] = max_of(largest_[i], peak);
      if (filtered_) {  // they count as 0 in the sum, and have no gradient
        peak = kNoCosine;
#pragma unroll
        for (int j = 0; j < T::kThreadCols; ++j) {
          float& c = tile.at(i, j);
          filtered[i] += c > filter_ ? 1.0f : 0.0f;
          c = c > filter_ ? kNoCosine : c;
          peak = larger(peak, c);
        }
        if (filtered[i] > 0) peak = larger(peak, 0.0f);
      }
      peak = larger(peak, __shfl_xor_sync(kAllLanes, peak, 1));
      peak = larger(peak, __shfl_xor_sync(kAllLanes, peak, 2));
      const float raised =
          max_of(exponent_[i], std::ceil(peak * exponential_.scale_log2) - kWeightPower);
      by[i] = raised - exponent_[i];
      raises |= by[i] > 0;
      exponent_[i] = raised;
    }
    if (__ballot_sync(kAllLanes, raises) != 0) {
#pragma unroll
      for (int i = 0; i < T::kThreadRows; ++i) {
        by[i] = times_power(1.0f, -by[i]);
        sum_[i] *= by[i];
      }
      tile.scale_sums(by);
    }
#pragma unroll
    for (int i = 0; i < T::kThreadRows; ++i) {
#pragma unroll
      for (int j = 0; j < T::kThreadCols; ++j) {
        float& c = tile.at(i, j);
        c = exponential_(c, exponent_[i]);
        sum_[i] += c;
      }
      if (filtered[i] > 0) sum_[i] += filtered[i] * exponential_(0.0f, exponent_[i]);
    }
  }

  // Of row i, the same on each of the four lanes that share it.
  UNICOM_DEVICE RowSum<float> of(int i) const {
    float sum = sum_[i], largest = largest_[i];
    for (int step = 1; step <= 2; ++step) {
      sum += __shfl_xor_sync(kAllLanes, sum, step);
      largest = max_of(largest, __shfl_xor_sync(kAllLanes, largest, step));
    }
    return {sum, exponent_[i], largest};
  }

 private:
  // Weights are at most about 2^this: as far as halves reach, so that those far below the largest
  // keep their digits.
  static constexpr float kWeightPower = 15;

  const Exponential<Unit> exponential_;
  const float filter_;
  const bool filtered_;
  float sum_[T::kThreadRows], exponent_[T::kThreadRows], largest_[T::kThreadRows];
};

// One block of samples against one run of classes.
template <class Unit, int kDepth>
__global__ void __launch_bounds__(kHopperThreads, 1)
    attend_classes_kernel(__grid_constant__ const Attending<AttendClasses> given) {
#ifdef UNICOM_HAS_HOPPER
  using T = AttentionTile<Unit, kDepth>;
  const AttendClasses& a = given.args;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * T::kRows;
  const int64_t count = row_count(a.logits);
  const TileRun run = run_of_block<T::kCols>(count, a.runs);
  const int64_t first_class = run.first * T::kCols;
  T::run(given, static_cast<int>(first_row), static_cast<int>(first_class), run.tiles,
         [&](T& tile) {
           RunningWeights<Unit, T> weights(a.logits);
           for (int t = 0; t < run.tiles; ++t) {
             mask_tile(tile, a.logits, first_row, first_class + int64_t{t} * T::kCols, count);
             weights.weigh(tile);
             tile.add_weighted(t + 1 == run.tiles);
           }
           const int64_t row = blockIdx.y * a.logits.rows + first_row;
           auto* sums = static_cast<RowSum<float>*>(a.sums) + row;
#pragma unroll
           for (int i = 0; i < T::kThreadRows; ++i) {
             const RowSum<float> total = weights.of(i);
             if (lane_index() % 4 == 0) sums[tile.row(i)] = total;
           }
           tile.write(a.attended + row * a.logits.depth, static_cast<int>(a.logits.depth));
         });
#endif
}

// The samples of which a class is a positive, in their order.
class PositivesOfClass {
 public:
  UNICOM_DEVICE PositivesOfClass(const AttendSamples& a, int64_t slot)
      : at_(first_of(a, slot)), end_(first_of(a, slot + 1)) {
    find(a);
  }
  // Calls f(sample) for those before `end`; what was called for is not called for again.
  template <class F>
  UNICOM_DEVICE void before(int end, const AttendSamples& a, const F& f) {
    while (sample_ < end) {
      f(sample_);
      ++at_;
      find(a);
    }
  }

 private:
  // The place among the positives, by slot, of the first with this slot or a larger one.
  UNICOM_DEVICE static int first_of(const AttendSamples& a, int64_t slot) {
    const Positives& positives = a.logits.positives;
    int first = 0;
    for (int high = static_cast<int>(a.logits.batch * positives.width); first < high;) {
      const int middle = (first + high) / 2;
      if (positives.slots[a.by_slot[middle]] < slot)
        first = middle + 1;
      else
        high = middle;
    }
    return first;
  }
  UNICOM_DEVICE void find(const AttendSamples& a) {
    sample_ = at_ < end_ ? static_cast<int>(a.by_slot[at_] / a.logits.positives.width) : INT32_MAX;
  }

  int at_, end_, sample_;
};

// One block of classes against all samples.
template <class Unit, int kDepth>
__global__ void __launch_bounds__(kHopperThreads, 1)
    attend_samples_kernel(__grid_constant__ const Attending<AttendSamples> given) {
#ifdef UNICOM_HAS_HOPPER
  using T = AttentionTile<Unit, kDepth>;
  const AttendSamples& a = given.args;
  const int64_t in_chunk = static_cast<int64_t>(blockIdx.x) * T::kRows;
  const int64_t first_class = a.first + in_chunk;
  if (first_class >= row_count(a.logits)) return;
  const int tiles = static_cast<int>((a.logits.batch + T::kCols - 1) / T::kCols);
  T::run(given, static_cast<int>(first_class), 0, tiles, [&](T& tile) {
    const Exponential<Unit> exponential(a.logits.scale);
    const auto filter = static_cast<float>(a.logits.filter);
    PositivesOfClass positives[T::kThreadRows] = {{a, first_class + tile.row(0)},
                                                  {a, first_class + tile.row(1)}};
    for (int t = 0; t < tiles; ++t) {
      const int first = t * T::kCols;
#pragma unroll
      for (int i = 0; i < T::kThreadRows; ++i)
        positives[i].before(first + T::kCols, a, [&](int sample) {
#pragma unroll
          for (int j = 0; j < T::kThreadCols; ++j)
            if (first + tile.col(j) == sample) tile.at(i, j) = kNoCosine;
        });
      const auto* rows = static_cast<const RowScale<float>*>(a.row) + first;
#pragma unroll
      for (int j = 0; j < T::kThreadCols; j += 2) {
        using Two = Pack<RowScale<float>, 2>;
        const Two two = *reinterpret_cast<const Two*>(rows + tile.col(j));
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const RowScale<float>& row = two.values[e];
          const float factor = row.factor * UnitTraits<Unit>::kProbabilityScale;
#pragma unroll
          for (int i = 0; i < T::kThreadRows; ++i) {
            float& c = tile.at(i, j + e);
            c = c > filter ? 0.0f : exponential(c, row.exponent) * factor;
          }
        }
      }
      tile.add_weighted(t + 1 == tiles);
    }
    tile.write(a.out + in_chunk * a.logits.depth, static_cast<int>(a.logits.depth));
  });
#endif
}

template <class Unit, int kDepth, class Args>
void launch(Queue& queue, void (*kernel)(Attending<Args>), const Args& args, dim3 grid,
            const void* queries, int64_t query_rows, const void* keys, int64_t key_rows) {
  using T = AttentionTile<Unit, kDepth>;
  Attending<Args> given{.args = args, .queries = {}, .keys = {}};
  if (!T::make_maps(&given, queries, query_rows, keys, key_rows, args.logits.depth)) {
    queue.error = cudaErrorInvalidValue;
    return;
  }
  queue.launch(kernel, grid, kHopperThreads, T::kSharedBytes, given);
}

// f(std::integral_constant of the least depth that tiles are made for)
template <class F>
void with_depth(int64_t depth, const F& f) {
  if (depth <= 64) return f(std::integral_constant<int, 64>{});
  if (depth <= 128) return f(std::integral_constant<int, 128>{});
  return f(std::integral_constant<int, 256>{});
}

}  // namespace

bool can_attend(Queue& queue) { return queue.is_hopper() && has_tensor_maps(); }

template <class Unit>
void attend_classes(Queue& queue, const AttendClasses& a) {
  const Logits& l = a.logits;
  with_depth(l.depth, [&](auto depth) {
    launch<Unit, depth.value>(
        queue, attend_classes_kernel<Unit, depth.value>, a,
        dim3(static_cast<unsigned>(l.rows / kRowGranule), static_cast<unsigned>(a.runs)),
        l.embeddings, l.rows, l.prototypes, l.classes);
  });
}

template <class Unit>
void attend_samples(Queue& queue, const AttendSamples& a) {
  const Logits& l = a.logits;
  with_depth(l.depth, [&](auto depth) {
    launch<Unit, depth.value>(queue, attend_samples_kernel<Unit, depth.value>, a,
                              dim3(static_cast<unsigned>(a.chunk / kRowGranule)), l.prototypes,
                              l.classes, l.embeddings, l.rows);
  });
}

#define UNICOM_INSTANTIATE(Unit)                                    \
  template void attend_classes<Unit>(Queue&, const AttendClasses&); \
  template void attend_samples<Unit>(Queue&, const AttendSamples&)
UNICOM_INSTANTIATE(Half);
UNICOM_INSTANTIATE(BFloat);
#undef UNICOM_INSTANTIATE

}  // namespace unicom::cuda
