#include "attention.h"
#include "attention_tile.cuh"
#include "logit_tile.cuh"

namespace unicom::cuda {

namespace {

// What weights of each row are divided by, as powers of two: the four lanes that share a row have them
// in common, raised as larger weights come.
template <class T>
class RunningExponents {
 public:
  UNICOM_DEVICE RunningExponents() {
#pragma unroll
    for (float& exponent : exponent_) exponent = kNoExponent;
  }

  // peak: the logarithm of the largest weight among this thread's. Brings what the tile has summed to
  // the new exponents, and calls f(what other sums are to be multiplied by), if any has changed.
  template <class F>
  UNICOM_DEVICE void raise(T& tile, const float (&peak)[T::kThreadRows], const F& f) {
    float by[T::kThreadRows];
    bool raises = false;
#pragma unroll
    for (int i = 0; i < T::kThreadRows; ++i) {
      float largest = larger(peak[i], __shfl_xor_sync(kAllLanes, peak[i], 1));
      largest = larger(largest, __shfl_xor_sync(kAllLanes, largest, 2));
      const float raised = max_of(exponent_[i], std::ceil(largest) - kWeightPower);
      by[i] = raised - exponent_[i];
      raises |= by[i] > 0;
      exponent_[i] = raised;
    }
    if (__ballot_sync(kAllLanes, raises) == 0) return;
#pragma unroll
    for (int i = 0; i < T::kThreadRows; ++i) by[i] = times_power(1.0f, -by[i]);
    tile.scale_sums(by);
    f(by);
  }

  UNICOM_DEVICE float of(int i) const { return exponent_[i]; }

 private:
  // Weights are at most about 2^this: as far as halves reach, so that those far below the largest
  // keep their digits.
  static constexpr float kWeightPower = 15;

  float exponent_[T::kThreadRows];
};

// Exponentials of a tile, as weights, and their sums.
template <class Unit, class T>
class RunningWeights {
 public:
  UNICOM_DEVICE explicit RunningWeights(const Logits& a)
      : exponential_(a.scale), filter_(static_cast<float>(a.filter)), filtered_(a.filter <= 1) {
#pragma unroll
    for (int i = 0; i < T::kThreadRows; ++i) {
      sum_[i] = 0;
      largest_[i] = kNoCosine;
    }
  }

  // Makes weights of the cosines of a tile, and brings what was summed to their exponent.
  UNICOM_DEVICE void weigh(T& tile) {
    float peaks[T::kThreadRows], filtered[T::kThreadRows] = {};
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
      peaks[i] = peak * exponential_.scale_log2;
    }
    exponents_.raise(tile, peaks, [&](const float (&by)[T::kThreadRows]) {
#pragma unroll
      for (int i = 0; i < T::kThreadRows; ++i) sum_[i] *= by[i];
    });
#pragma unroll
    for (int i = 0; i < T::kThreadRows; ++i) {
#pragma unroll
      for (int j = 0; j < T::kThreadCols; ++j) {
        float& c = tile.at(i, j);
        c = exponential_(c, exponents_.of(i));
        sum_[i] += c;
      }
      if (filtered[i] > 0) sum_[i] += filtered[i] * exponential_(0.0f, exponents_.of(i));
    }
  }

  // Of row i, the same on each of the four lanes that share it.
  UNICOM_DEVICE RowSum<float> of(int i) const {
    float sum = sum_[i], largest = largest_[i];
    for (int step = 1; step <= 2; ++step) {
      sum += __shfl_xor_sync(kAllLanes, sum, step);
      largest = max_of(largest, __shfl_xor_sync(kAllLanes, largest, step));
    }
    return {sum, exponents_.of(i), largest};
  }

 private:
  const Exponential<Unit> exponential_;
  const float filter_;
  const bool filtered_;
  RunningExponents<T> exponents_;
  float sum_[T::kThreadRows], largest_[T::kThreadRows];
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

// The samples of which a class is a positive, in their order. The caller says each time which class
// it is: there are no registers to keep it in.
class PositivesOfClass {
 public:
  UNICOM_DEVICE PositivesOfClass(const AttendSamples& a, int64_t slot) : at_(0) {
    for (int high = all(a); at_ < high;) {
      const int middle = (at_ + high) / 2;
      if (slot_at(a, middle) < slot)
        at_ = middle + 1;
      else
        high = middle;
    }
    find(a, slot);
  }
  // Calls f(sample) for those before `end`; what was called for is not called for again.
  template <class F>
  UNICOM_DEVICE void before(int end, const AttendSamples& a, int64_t slot, const F& f) {
    while (sample_ < end) {
      f(sample_);
      ++at_;
      find(a, slot);
    }
  }

 private:
  UNICOM_DEVICE static int all(const AttendSamples& a) {
    return static_cast<int>(a.logits.batch * a.logits.positives.width);
  }
  UNICOM_DEVICE static int64_t slot_at(const AttendSamples& a, int place) {
    return a.logits.positives.slots[a.by_slot[place]];
  }
  UNICOM_DEVICE void find(const AttendSamples& a, int64_t slot) {
    const bool found = at_ < all(a) && slot_at(a, at_) == slot;
    sample_ = found ? static_cast<int>(a.by_slot[at_] / a.logits.positives.width) : INT32_MAX;
  }

  int at_, sample_;  // place among the positives, by slot; its sample
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
    const float scale_log2 = Exponential<Unit>(a.logits.scale).scale_log2;
    const auto filter = static_cast<float>(a.logits.filter);
    RunningExponents<T> exponents;
    PositivesOfClass positives[T::kThreadRows] = {{a, first_class + tile.row(0)},
                                                  {a, first_class + tile.row(1)}};
    for (int t = 0; t < tiles; ++t) {
      const int first = t * T::kCols;
#pragma unroll
      for (int i = 0; i < T::kThreadRows; ++i)
        positives[i].before(first + T::kCols, a, first_class + tile.row(i), [&](int sample) {
#pragma unroll
          for (int j = 0; j < T::kThreadCols; ++j)
            if (first + tile.col(j) == sample) tile.at(i, j) = kNoCosine;
        });
      const auto* rows = static_cast<const RowScale<float>*>(a.row) + first;
      float peaks[T::kThreadRows] = {kNoCosine, kNoCosine};
#pragma unroll
      for (int j = 0; j < T::kThreadCols; ++j) {  // logarithms of weights
        const float exponent = rows[tile.col(j)].exponent;
#pragma unroll
        for (int i = 0; i < T::kThreadRows; ++i) {
          float& c = tile.at(i, j);
          c = c > filter ? kNoCosine : fmaf(c, scale_log2, -exponent);
          peaks[i] = larger(peaks[i], c);
        }
      }
      exponents.raise(tile, peaks, [](const auto&) {});
#pragma unroll
      for (int j = 0; j < T::kThreadCols; ++j) {
        const float factor = rows[tile.col(j)].factor;
#pragma unroll
        for (int i = 0; i < T::kThreadRows; ++i) {
          float& c = tile.at(i, j);
          c = exp2_fast(c - exponents.of(i)) * factor;
        }
      }
      tile.add_weighted(t + 1 == tiles);
    }
    float by[T::kThreadRows];
#pragma unroll
    for (int i = 0; i < T::kThreadRows; ++i)
      by[i] = times_power(UnitTraits<Unit>::kProbabilityScale, exponents.of(i));
    tile.scale_sums(by);
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
