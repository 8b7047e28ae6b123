// The arithmetic of tensor cores, which has no part in what sanitizers look for: built without them,
// as it takes most of the time.
//
// Sums are as tensor cores may take them at worst: terms are aligned to the largest, and what is below
// its last digit is dropped; so is what the sum has below its own.
#pragma once

#include <cstdint>

namespace emulation {

constexpr int kDepth = 16;  // of one product

// sums[i] += sum over k of a[k * a_stride] * b[k * b_stride + i], for i = 0 and 1. Values are those
// of sixteen bits, so that products are exact.
void add_truncated(float* sums, const double* a, int a_stride, const double* b, int b_stride);

// What a lane holds of A and B in mma.m16n8k16, by register.
struct Fragments {
  float of[6][2];
};
// mma.m16n8k16 for one lane: C of it, and the fragments of all.
void multiply_add(float (&c)[4], int lane, const Fragments (&all)[32]);

float half_to_float(uint16_t bits);

}  // namespace emulation
