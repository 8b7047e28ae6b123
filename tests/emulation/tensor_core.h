// The arithmetic of tensor cores, which has no part in what sanitizers look for: built without them,
// as it takes most of the time.
//
// Sums are as tensor cores may take them at worst: terms are aligned to the largest, and what is below
// its last digit is dropped; so is what the sum has below its own.
#pragma once

#include <cstdint>

namespace emulation {

constexpr int kDepth = 16;  // of one product

// sums[rows][cols] += the sum over k of a[k][rows] * b[k][cols]; `cols` is a multiple of 4. Values are
// those of sixteen bits, so that products are exact.
void multiply_add(float* sums, const double* a, int rows, const double* b, int cols);

// What a lane holds of A and B in mma.m16n8k16, by register.
struct Fragments {
  float of[6][2];
};
// mma.m16n8k16 for one lane: C of it, and the fragments of all.
void multiply_add(float (&c)[4], int lane, const Fragments (&all)[32]);

float half_to_float(uint16_t bits);

}  // namespace emulation
