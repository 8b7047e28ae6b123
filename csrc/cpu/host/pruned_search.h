// The search for nearest centroids, where a row's last centroid is known: most others are passed
// over without their whole product. The result is that of nearest.h, bit for bit.
//
// With the mean of the rows and that of the centroids, which is longer, a = x - row mean and
// b = w - centroid mean, cosines are
//
//     x . w = x . centroid mean  +  row mean . b  +  P a . P b  +  what lies outside of the axes,
//
// P [m, dim] with orthonormal rows: principal axes of the rows, which hold much of a row's norm,
// and nearly all of a centroid's, as the mean of many rows has little of what varies at random.
// By Cauchy-Schwarz the last term is at most |rest of a| |rest of b|, and what rounding to 8-bit
// integers does to the one before is bounded likewise. So m + 4 of dim products mark the centroids
// that may have a cosine above a floor: that with the row's last centroid, computed in double.
// Those marked are multiplied whole in 8-bit integers, and double decides what that leaves open.
//
// Between passes: for each row an upper bound of its cosines with all other centroids is kept. A
// centroid that moved by d since adds at most |a| |d| + row mean . d to it. The centroids are searched
// in the order of their movement, and each row stops where nothing further can reach its floor.
#pragma once

#include <cstdint>

#include "projection.h"

namespace unicom::cpu {

struct SearchWork {
  int64_t screened = 0;    // pairs of a row and a centroid
  int64_t multiplied = 0;  // of these, by 8-bit integers
  int64_t decided = 0;     // of these, in double
};

struct PrunedSearch {
  FloatRows rows;
  const uint8_t* projected;  // [rows.count][projected_row_bytes]
  const int64_t* guess;      // [rows.count] of the nearest centroid, or -1
  const float* bound;  // [rows.count] of the cosines with all but the guess, before they moved
  FloatRows centroids;
  const void* packed;  // of the same centroids
  Projection projection;
  double margin;      // bounds shall be this far below the cosine, where that can be; 0: wherever
  int64_t* index;     // [rows.count] as of nearest.h
  float* score;       // [rows.count]
  float* next_bound;  // [rows.count] of the cosines with all but `index`; may be `bound`
};
SearchWork search(const PrunedSearch&, const Parallel&);

}  // namespace unicom::cpu
