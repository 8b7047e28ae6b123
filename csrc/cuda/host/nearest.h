// Nearest centroid by cosine on GPUs, see nearest.h; candidates come from products of halves.
// Nothing waits for the device. Memory is the caller's: ask for the bytes, then hand them in.
#pragma once

#include "../kernels/nearest.h"

namespace unicom::cuda {

int64_t packed_centroid_bytes(int64_t count, int64_t dim);
int64_t packing_workspace(const FloatRows& centroids);
void pack_centroids(Queue&, const FloatRows& centroids, void* packed, void* workspace);

// As unicom::nearest. The workspace is bounded: rows go through it in chunks. A guess that is no
// centroid counts as none.
int64_t nearest_workspace(const FloatRows& rows, const FloatRows& centroids);
void nearest(Queue&, const FloatRows& rows, const int64_t* guess, const FloatRows& centroids,
             const void* packed, int64_t* index, float* score, void* workspace);

}  // namespace unicom::cuda
