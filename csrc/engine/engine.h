// The algorithm: the order of the steps, their workspaces and chunk sizes, forward and backward.
// Knows no torch: the bindings hand it plain pointers and a way to run loops on threads.
#pragma once

#include <cstdint>

#include "../cpu/kernels.h"
#include "parallel.h"

namespace unicom {

// One call of the operation. All pointers stay the caller's.
struct Problem {
  cpu::RowSource embeddings;  // [batch, d] with the selected columns
  int64_t batch;
  cpu::RowSource prototypes;   // [C, d] with the selected columns
  const int64_t* class_index;  // [sampled] ascending class ids, or nullptr: class j is row j
  int64_t sampled;             // |S|
  const int64_t* slot;         // [batch] position of the label in class_index, -1: ignored
  double scale;
  double filter;  // +inf: none
  double m1;
  double m2, m3;                // radians; used where the per-sample arrays are null
  const double* m2_per_sample;  // [batch] or nullptr
  const double* m3_per_sample;
  bool exact_margin_grad;
  bool linear_beyond_pi;
  cpu::Rounding rounding;
  int64_t kept_panels;  // class panels whose cosines are kept for backward, see kept_panels()
};

// What the backward pass needs of each sample.
struct SampleState {
  double inverse_norm;  // of the embedding's selected part
  double cosine;        // with its prototype
  double slope;         // psi'(cosine)
  double miss;          // 1 - p_target
  double factor;        // a negative's softmax among negatives is
  double exponent;      //   factor * 2^-exponent * exp(scale * cosine)
};
constexpr int64_t kSampleStateSize = 6;
static_assert(sizeof(SampleState) == kSampleStateSize * sizeof(double));

// The packed unit prototypes: vector panels, then one inverse norm per lane.
int64_t packed_bytes(int64_t sampled, int64_t dim, int64_t bytes_per_value);

// How many class panels' cosines fit in `workspace_bytes`, and the bytes of one panel. A multiple
// of four, or all of them: what the widest kernels work on together.
int64_t kept_panel_bytes(int64_t batch, int64_t real_bytes);
int64_t kept_panels(int64_t sampled, int64_t batch, int64_t real_bytes, int64_t workspace_bytes);

struct ForwardResult {
  double* loss;              // [batch]
  double* target_cosine;     // [batch], 0 where ignored
  double* largest_negative;  // [batch], -inf where there is none
  SampleState* state;        // [batch]
  void* packed;              // packed_bytes
  void* kept;                // kept_panels * kept_panel_bytes
};

// A gradient matrix: zero except where rows are written.
struct RowSink {
  void* data;  // nullptr: not wanted
  cpu::DType dtype;
  int64_t row_stride;
  const int64_t* columns;
  int64_t dim;
};

struct BackwardArgs {
  const SampleState* state;
  const void* packed;
  const void* kept;
  const double* weight;  // [batch] upstream gradient of each sample's loss
  RowSink embeddings;    // [batch, d]
  RowSink prototypes;    // row class_index[j], or row j when compact
  bool compact;
};

template <class Unit>
void forward(const Problem&, const ForwardResult&, const Parallel&);
template <class Unit>
void backward(const Problem&, const BackwardArgs&, const Parallel&);

void fill_zero(void* data, int64_t bytes, const Parallel&);

}  // namespace unicom
