// Nearest centroid by cosine: the forward pass with an arg-max in place of the exponentials.
// The N x k cosines are never stored.
//
// The kernels multiply rounded unit vectors and leave, per row, the best cosine of each of
// kBestLanes lanes of centroids. How far those can be from the truth is known (the norm of what
// rounding took from each vector bounds what it can do to a cosine), so every centroid that may be
// the nearest is known too: these few are compared in double, from the rows as they were given. The
// result is that of double arithmetic, at any precision, instruction set and number of threads.
//
// The boundary to another device: packed centroids and rows in; index and score out.
#pragma once

#include <cstdint>

#include "../cpu/kernels.h"
#include "parallel.h"

namespace unicom {

// fp32 rows of a matrix [count, dim] with unit column stride.
struct Rows {
  const float* data;
  int64_t count, dim, stride;  // stride in elements

  const float* operator[](int64_t i) const { return data + i * stride; }
};

// Bytes of the packed centroids: vector panels of Unit, and an inverse norm for each.
template <class Unit>
int64_t packed_centroid_bytes(int64_t count, int64_t dim);

template <class Unit>
void pack_centroids(const Rows& centroids, void* packed, const Parallel&);

// For each row the centroid of largest cosine, the lowest index among equals, and the cosine.
// A zero row gets index -1 and score 0, a row with NaN or infinity -1 and NaN.
//   packed  of the same centroids, which are finite
template <class Unit>
void nearest(const Rows& rows, const Rows& centroids, const void* packed, int64_t* index,
             float* score, const Parallel&);

// sums[index[i]] += rows[i] / |rows[i]| in double and in the order of the rows,
// counts[index[i]] += 1; rows with index -1 are left out. The result does not depend on the number
// of threads.
void add_unit_rows(const Rows& rows, const int64_t* index, int64_t num_sums, double* sums,
                   int64_t* counts, const Parallel&);

}  // namespace unicom
