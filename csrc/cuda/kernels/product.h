// The two products of backward, from probabilities P [rows][chunk] of one chunk of classes.
#pragma once

#include "logits.h"

namespace unicom::cuda {

enum class ProductOf {
  kEmbeddings,  // out[row][k] = sum over classes of P[row][class] * operand[class][k]
  kPrototypes,  // out[class][k] = sum over rows of P[row][class] * operand[row][k]
};

struct Product {
  ProductOf of;
  const void* probabilities;  // [rows][chunk]
  const void* operand;        // [chunk or rows][depth]
  int64_t rows, chunk, depth;
  ClassOrder order;
  const int64_t* count;  // on the device, classes in all, or nullptr: bound
  int64_t bound, first;  // the first row of prototypes; those past count have no share and no sum
  int64_t splits;        // the sum is cut into this many parts, each with its own result
  bool accumulate;       // add to what out holds
  void* out;             // [splits][rows or chunk][depth] RealOf<Unit>
  TilePlan plan{};       // by the launch
};
template <class Unit>
void product(Queue&, const Product&);

}  // namespace unicom::cuda
