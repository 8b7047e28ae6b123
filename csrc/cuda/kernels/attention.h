// The passes in the shape of attention, for sixteen-bit operands of up to kMostAttended columns on
// Hopper: a block keeps some rows, the queries, and goes through others, the keys, in tiles. A tile
// of cosines becomes weights, which multiply the keys at once: weights never leave the registers.
#pragma once

#include "logits.h"

namespace unicom::cuda {

constexpr int64_t kMostAttended = 256;  // depth: so many sums fit into the registers
constexpr int64_t kAttendedKeys = 96;   // of a tile

// Whether the device has them.
bool can_attend(Queue&);

// Forward: samples attend classes. Beside the sum of exponentials of each row, the sum of its
// negatives' prototypes, each by its exponential, both to the same exponent.
struct AttendClasses {
  Logits logits;
  int64_t runs;     // the classes are cut into this many, which blocks sum apart
  void* sums;       // [runs][rows] RowSum<float>
  float* attended;  // [runs][rows][depth]
};
template <class Unit>
void attend_classes(Queue&, const AttendClasses&);

// Backward: classes attend samples, the negatives' part of a chunk of the prototypes' gradient. A
// sample's weight is factor * 2^-exponent * exp(scale * cosine), of which the factor is at most 1 in
// size; one without weight has factor 0 and the exponent -kNoExponent.
struct AttendSamples {
  Logits logits;
  int64_t first, chunk;    // prototypes, whole granules
  const int64_t* by_slot;  // [batch * width], of OrderPositives
  const void* row;         // [rows, whole tiles of keys] RowScale<float>
  float* out;              // [chunk][depth] sums * kProbabilityScale; nothing past count
};
template <class Unit>
void attend_samples(Queue&, const AttendSamples&);

}  // namespace unicom::cuda
