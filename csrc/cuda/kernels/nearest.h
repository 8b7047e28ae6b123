// The steps of the search for the nearest centroid on GPUs. The algorithm, and why its result is
// that of double arithmetic, is csrc/cpu/host/nearest.h's; here the products that find candidates
// are those of halves, on tensor cores.
//
// With mean that of the unit centroids, vectors are multiplied as kVectorScale * (unit vector -
// mean). No value is above 2^14, and what is small enough to lose digits as a subnormal half is
// below 2^-27 of a unit vector. Scores and their bounds are in the units of these products.
#pragma once

#include "../../core/rows.h"
#include "../../core/unit_sums.h"
#include "types.h"

namespace unicom::cuda {

constexpr double kVectorScale = 8192;
constexpr double kScoreScale = kVectorScale * kVectorScale;

struct PackedCentroids {
  double* largest_norm;  // [1] of the vectors that are multiplied, before rounding
  double* largest_lost;  // [1] norm of what rounding took from one
  double* inverse_norm;  // [count] 1 / norm, 0 for a zero row
  float* mean;           // [depth] of the unit centroids
  float* bias;           // [classes] mean . vector; -infinity past count
  Half* unit;            // [classes][depth]; zeros past count and past dim
  int64_t classes, depth;
};

struct PackCentroids {
  FloatRows centroids;
  PackedCentroids out;
  int64_t slices;        // the mean is a sum of sums, each over a slice of the centroids
  double* partial_mean;  // [slices][dim]
};
void pack_centroids(Queue&, const PackCentroids&);

struct PackQueries {
  FloatRows rows;
  const int64_t* guess;  // [count] of the nearest centroid; nullptr or out of range: none
  FloatRows centroids;
  PackedCentroids packed;
  int64_t padded;  // rows, with the padding of the last tile
  Half* unit;      // [padded][depth]
  float* floor;    // [padded] no score of the nearest centroid is below; +infinity: does not count
  float* window;   // [padded] nor is it further than this below the best score
  double* norm;    // [padded] 0 or not finite for rows that do not count
};
void pack_queries(Queue&, const PackQueries&);

struct Candidate {
  float score;
  int32_t index;
};
constexpr int kCandidates = 64;  // of a row in a run; a multiple of the warp

// The centroids of each row that may be its nearest, in any order.
struct FindCandidates {
  const Half* rows;  // [padded][depth]
  const float *floor, *window;
  PackedCentroids packed;
  int64_t padded, runs;  // the centroids are cut into this many runs, searched apart
  Candidate* candidate;  // [runs][padded][kCandidates]
  int32_t* count;        // [runs][padded]; more than kCandidates where they were too many
  TilePlan plan{};       // by the launch
};
void find_candidates(Queue&, const FindCandidates&);

// Compares a row's candidates in double; all centroids, where there were too many candidates.
struct Decide {
  FloatRows rows, centroids;
  const double* inverse_norm;  // [centroids.count]
  const float* window;
  const double* norm;
  int64_t padded, runs;
  const Candidate* candidate;
  const int32_t* count;
  int64_t* index;  // [rows.count] of the largest cosine, the lowest among equals
  float* score;    // [rows.count] that cosine; for a row that does not count -1, and 0 or NaN
};
void decide(Queue&, const Decide&);

// An index that is no sum counts as -1.
void add_unit_rows(Queue&, const AddUnitRows&);

void directions(Queue&, const Directions&);

}  // namespace unicom::cuda
