// The search for the nearest centroid and what its results are summed to.
#include "sanitized.h"

#include <algorithm>
#include <random>
#include <vector>

#include "../../csrc/cpu/host/nearest.h"
#include "../../csrc/cpu/host/unit_sums.h"
#include "../../csrc/cuda/host/nearest.h"
#include "../../csrc/cuda/kernels/logits.h"
#include "../../csrc/cuda/kernels/nearest.h"

namespace unicom {

namespace {

struct Found {
  Array<int64_t> index, sums, counts;
  Array<float> score, directions;
  Found(int64_t n, int64_t k, int64_t dim)
      : index(n), sums(k * dim), counts(k), score(n), directions(k * dim) {}

  // Rows that came from where the guess was, if there was one.
  AddUnitRows moves(const FloatRows& rows, const int64_t* guess) const {
    return {.rows = rows,
            .index = index.get(),
            .before = guess,
            .num_sums = counts.size,
            .shift = 40,
            .sums = sums.get(),
            .counts = counts.get()};
  }
  Directions of_sums() const {
    return {.sums = sums.get(),
            .count = counts.size,
            .dim = sums.size / counts.size,
            .out = directions.get()};
  }
};

Found found_on_gpu(const FloatRows& rows, const FloatRows& centroids, const int64_t* guess) {
  Found out(rows.count, centroids.count, rows.dim);
  cuda::Queue queue;
  Array<char> packed(cuda::packed_centroid_bytes(centroids.count, rows.dim));
  {
    Array<char> workspace(cuda::packing_workspace(centroids));
    cuda::pack_centroids(queue, centroids, packed.get(), workspace.get());
  }
  Array<char> workspace(cuda::nearest_workspace(rows, centroids));
  cuda::nearest(queue, rows, guess, centroids, packed.get(), out.index.get(), out.score.get(),
                workspace.get());
  cuda::add_unit_rows(queue, out.moves(rows, guess));
  cuda::directions(queue, out.of_sums());
  expect(queue.error == cudaSuccess, "a launch");
  return out;
}

// Centroids `spread` from a common direction; the smaller it is, the more candidates there are.
void compare_nearest(int64_t n, int64_t k, int64_t dim, float spread) {
  std::mt19937 random(static_cast<unsigned>(n + k));
  std::normal_distribution<float> normal;
  Array<float> rows(n * dim), centroids(k * dim), common(dim);
  for (int64_t i = 0; i < common.size; ++i) common.data[i] = normal(random);
  for (int64_t i = 0; i < rows.size; ++i) rows.data[i] = i < dim ? 0.0f : normal(random);
  for (int64_t i = 0; i < centroids.size; ++i)
    centroids.data[i] = common.data[i % dim] + spread * normal(random);
  Array<int64_t> guess(n);
  for (int64_t i = 0; i < n; ++i) guess.data[i] = static_cast<int64_t>(random() % (k + 1)) - 1;

  const FloatRows all_rows{.data = rows.get(), .count = n, .dim = dim, .stride = dim};
  const FloatRows all_centroids{.data = centroids.get(), .count = k, .dim = dim, .stride = dim};
  Array<char> packed(cpu::packed_centroid_bytes(k, dim));
  cpu::pack_centroids(all_centroids, packed.get(), cpu::Serial());

  const std::string name =
      "nearest of " + std::to_string(n) + " x " + std::to_string(k) + " x " + std::to_string(dim);
  for (const uint64_t schedule : {0, 12345}) {
    const int64_t* given = schedule == 0 ? nullptr : guess.get();
    Found right(n, k, dim);
    cpu::nearest(all_rows, given, all_centroids, packed.get(), right.index.get(), right.score.get(),
                 cpu::Serial());
    cpu::add_unit_rows(right.moves(all_rows, given), cpu::Serial());
    cpu::directions(right.of_sums(), cpu::Serial());
    emulation::set_schedule(schedule);
    const Found out = found_on_gpu(all_rows, all_centroids, given);
    expect(same_bits(out.index, right.index), name + ": index");
    expect(same_bits(out.score, right.score), name + ": score");
    expect(same_bits(out.sums, right.sums), name + ": sums");
    expect(same_bits(out.counts, right.counts), name + ": counts");
    expect(same_bits(out.directions, right.directions), name + ": directions");
  }
}

// ---- the candidates alone: lists that fill up, and are cleared of what is no longer near

// Centroids and rows on a circle, so that most tiles have something better, and windows of all sizes.
void compare_candidates() {
  using namespace unicom::cuda;
  const int64_t rows = 3 * kRowGranule, classes = 5 * kClassGranule, depth = 64, runs = 2;
  Array<uint16_t> units(rows * depth), centroids(classes * depth);
  Array<float> bias(classes), floor(rows), window(rows);
  auto point = [&](const Array<uint16_t>& to, int64_t i, double angle) {
    to.data[i * depth] = half_bits(std::cos(angle));
    to.data[i * depth + 1] = half_bits(std::sin(angle));
  };
  for (int64_t j = 0; j < classes; ++j) point(centroids, j, 1.5 * double(j) / double(classes));
  for (int64_t i = 0; i < rows; ++i) {
    point(units, i, 1.6 * double(i) / double(rows));
    floor.data[i] = i % 50 == 7 ? INFINITY : -INFINITY;  // rows that do not count
    window.data[i] = 0.0004f * static_cast<float>(i * 37 % 101);
  }
  struct Lists {
    Array<Candidate> candidates{runs * rows * kCandidates};
    Array<int32_t> count{runs * rows};
  };
  auto run = [&](int capability) {
    emulation::set_compute_capability(capability);
    emulation::set_schedule(12345);
    Lists out;
    Queue queue;
    find_candidates(queue, {.rows = reinterpret_cast<const Half*>(units.get()),
                            .floor = floor.get(),
                            .window = window.get(),
                            .packed = {.largest_norm = nullptr,
                                       .largest_lost = nullptr,
                                       .inverse_norm = nullptr,
                                       .mean = nullptr,
                                       .bias = bias.get(),
                                       .unit = reinterpret_cast<Half*>(centroids.get()),
                                       .classes = classes,
                                       .depth = depth},
                            .padded = rows,
                            .runs = runs,
                            .candidate = out.candidates.get(),
                            .count = out.count.get()});
    expect(queue.error == cudaSuccess, "candidates: a launch");
    return out;
  };
  const int64_t boxes = emulation::boxes_loaded();
  const Lists elsewhere = run(8);
  expect(emulation::boxes_loaded() == boxes, "candidates: kernels of every GPU");
  const Lists on_hopper = run(9);
  expect(emulation::boxes_loaded() > boxes, "candidates: kernels of Hopper");
  auto list = [&](const Lists& from, int64_t i) {
    const Candidate* begin = from.candidates.get() + i * kCandidates;
    std::vector<std::pair<int32_t, float>> sorted;
    for (int c = 0; c < from.count.data[i]; ++c) sorted.push_back({begin[c].index, begin[c].score});
    std::sort(sorted.begin(), sorted.end());
    return sorted;
  };
  int full = 0, cleared = 0;
  for (int64_t i = 0; i < runs * rows; ++i) {
    const bool too_many = elsewhere.count.data[i] > kCandidates;
    if (too_many != (on_hopper.count.data[i] > kCandidates) ||
        (!too_many && list(elsewhere, i) != list(on_hopper, i)))
      return expect(false, "candidates of row " + std::to_string(i % rows));
    full += too_many;
    // Candidates of tiles before the last that are not near the best of all were there once.
    if (too_many || i >= rows || floor.data[i] > 0) continue;
    double best = -INFINITY;
    int64_t came = 0;
    for (int64_t first = 0; first < 3 * kClassGranule; first += kClassGranule) {
      auto score = [&](int64_t j) {
        double sum = 0;
        for (int k = 0; k < 2; ++k)
          sum += double(emulation::half_to_float(units.data[i * depth + k])) *
                 emulation::half_to_float(centroids.data[j * depth + k]);
        return sum;
      };
      for (int64_t j = first; j < first + kClassGranule; ++j) best = std::max(best, score(j));
      for (int64_t j = first; j < first + kClassGranule; ++j)
        came += score(j) > best - window.data[i];
    }
    cleared += came > kCandidates + 4;
  }
  expect(full > 0 && cleared > 0, "candidates: lists that fill up, and that are cleared");
}

}  // namespace

void check_search() {
  for (const int capability : {8, 9}) {
    emulation::set_compute_capability(capability);
    compare_nearest(1, 1, 1, 1);
    compare_nearest(129, 257, 7, 1);
    compare_nearest(3, 300, 9, 1e-7f);
    emulation::set_shared_limit(99 << 10);
    compare_nearest(5, 513, 66, 1e-3f);
    emulation::set_shared_limit(227 << 10);
  }
  compare_candidates();
}

}  // namespace unicom
