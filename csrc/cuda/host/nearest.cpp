#include "nearest.h"

#include <algorithm>

#include "../kernels/logits.h"
#include "arena.h"

namespace unicom::cuda {

namespace {

// At a time, so that they fill the largest GPUs with the centroids in a few runs.
constexpr int64_t kChunkRows = 16384;
// Centroids of a partial mean, unless that makes too many of them.
constexpr int64_t kSliceRows = 256, kMaxSlices = 256;

PackedCentroids packed_in(Arena& arena, int64_t count, int64_t dim) {
  PackedCentroids packed{};
  packed.classes = round_up(count, kClassGranule);
  packed.depth = round_up(dim, kDepthGranule);
  packed.largest_norm = arena.take<double>(1);
  packed.largest_lost = arena.take<double>(1);
  packed.inverse_norm = arena.take<double>(count);
  packed.mean = arena.take<float>(packed.depth);
  packed.bias = arena.take<float>(packed.classes);
  packed.unit = arena.take<Half>(packed.classes * packed.depth);
  return packed;
}

int64_t slices_of(const FloatRows& centroids) {
  return std::clamp<int64_t>(centroids.count / kSliceRows, 1, kMaxSlices);
}

// Rows are cut into chunks of equal size.
struct Space {
  int64_t padded, runs;  // rows of a chunk

  Half* unit;
  float *floor, *window;
  double* norm;
  Candidate* candidate;
  int32_t* count;

  Space(Arena& arena, int64_t rows, const PackedCentroids& packed)
      : padded(round_up(ceil_div(rows, ceil_div(std::max<int64_t>(rows, 1), kChunkRows)),
                        kRowGranule)),
        runs(std::clamp<int64_t>(kWantedBlocks * kRowGranule / std::max<int64_t>(padded, 1), 1,
                                 packed.classes / kClassGranule)),
        unit(arena.take<Half>(padded * packed.depth)),
        floor(arena.take<float>(padded)),
        window(arena.take<float>(padded)),
        norm(arena.take<double>(padded)),
        candidate(arena.take<Candidate>(runs * padded * kCandidates)),
        count(arena.take<int32_t>(runs * padded)) {}
};

}  // namespace

int64_t packed_centroid_bytes(int64_t count, int64_t dim) {
  Arena arena(nullptr);
  packed_in(arena, count, dim);
  return arena.used();
}

int64_t packing_workspace(const FloatRows& centroids) {
  return slices_of(centroids) * centroids.dim * int64_t{sizeof(double)};
}

void pack_centroids(Queue& queue, const FloatRows& centroids, void* packed, void* workspace) {
  Arena arena(packed);
  pack_centroids(queue, PackCentroids{.centroids = centroids,
                                      .out = packed_in(arena, centroids.count, centroids.dim),
                                      .slices = slices_of(centroids),
                                      .partial_mean = static_cast<double*>(workspace)});
}

int64_t nearest_workspace(const FloatRows& rows, const FloatRows& centroids) {
  Arena none(nullptr), arena(nullptr);
  Space(arena, rows.count, packed_in(none, centroids.count, centroids.dim));
  return arena.used();
}

void nearest(Queue& queue, const FloatRows& rows, const int64_t* guess, const FloatRows& centroids,
             const void* packed_block, int64_t* index, float* score, void* workspace) {
  Arena packed_arena(const_cast<void*>(packed_block)), arena(workspace);
  const PackedCentroids packed = packed_in(packed_arena, centroids.count, centroids.dim);
  const Space space(arena, rows.count, packed);
  for (int64_t first = 0; first < rows.count; first += space.padded) {
    const int64_t count = std::min(space.padded, rows.count - first);
    const FloatRows chunk{
        .data = rows[first], .count = count, .dim = rows.dim, .stride = rows.stride};
    pack_queries(queue, {.rows = chunk,
                         .guess = guess != nullptr ? guess + first : nullptr,
                         .centroids = centroids,
                         .packed = packed,
                         .padded = space.padded,
                         .unit = space.unit,
                         .floor = space.floor,
                         .window = space.window,
                         .norm = space.norm});
    find_candidates(queue, {.rows = space.unit,
                            .floor = space.floor,
                            .window = space.window,
                            .packed = packed,
                            .padded = space.padded,
                            .runs = space.runs,
                            .candidate = space.candidate,
                            .count = space.count});
    decide(queue, {.rows = chunk,
                   .centroids = centroids,
                   .inverse_norm = packed.inverse_norm,
                   .window = space.window,
                   .norm = space.norm,
                   .padded = space.padded,
                   .runs = space.runs,
                   .candidate = space.candidate,
                   .count = space.count,
                   .index = index + first,
                   .score = score + first});
  }
}

}  // namespace unicom::cuda
