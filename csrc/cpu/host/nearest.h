// Nearest centroid by cosine: the forward pass with an arg-max in place of the exponentials.
// The N x k cosines are never stored.
//
// The kernels multiply vectors rounded to 8-bit integers, and keep for each row the centroids that
// may be the nearest: those whose score is not further below the best one than rounding can
// explain. How far that is, is known and not estimated: what rounding takes from a vector, times
// the norm of the other one, bounds what it can do to their product. These few are compared in
// double, from the rows as they were given, so the result is that of double arithmetic at any
// instruction set and number of threads.
//
// Before rounding, the mean of the unit centroids is taken off rows and centroids: embeddings tend
// to lie in a narrow cone, and what they share neither decides nor should cost accuracy. With
// a = x - mean and b = w - mean, x . w = a . b + mean . b + (a part that all w have in common).
//
#pragma once

#include <cstdint>

#include "../../core/rows.h"
#include "parallel.h"

namespace unicom::cpu {

int64_t packed_centroid_bytes(int64_t count, int64_t dim);

void pack_centroids(const FloatRows& centroids, void* packed, const Parallel&);

// Whether the kernels in use can multiply these: what one instruction set packed may be too large
// for another.
bool fits_kernels(const void* packed);

// For each row the centroid of largest cosine, the lowest index among equals, and the cosine.
// A zero row gets index -1 and score 0, a row with NaN or infinity -1 and NaN.
//   guess   of the nearest centroid of each row, or -1; nullptr for none. Good ones save time, and
//           no guess changes the result.
//   packed  of the same centroids, which are finite; fits the kernels
void nearest(const FloatRows& rows, const int64_t* guess, const FloatRows& centroids,
             const void* packed, int64_t* index, float* score, const Parallel&);

}  // namespace unicom::cpu
