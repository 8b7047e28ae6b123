// The end of the forward pass for one sample: its target joins the sum over the other classes, and
// what backward needs of it is written down.
#pragma once

#include "margin.h"
#include "softmax.h"

namespace unicom {

enum class Reduction : int64_t { kNone, kMean, kSum };

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

struct MarginOptions {
  double m1;
  double m2, m3;                // radians; used where the per-sample arrays are null
  const double* m2_per_sample;  // [batch] or nullptr
  const double* m3_per_sample;
  bool exact_grad;
  bool linear_beyond_pi;
};

// Sample i, whose other classes sum to sum * 2^exponent (0: there are none) and whose target has
// the given cosine. Returns its loss.
UNICOM_HD inline double join_target(const MarginOptions& m, double scale, int64_t i, double sum,
                                    double exponent, double cosine, double inverse_norm,
                                    SampleState* state) {
  const double m2 = m.m2_per_sample ? m.m2_per_sample[i] : m.m2;
  const double m3 = m.m3_per_sample ? m.m3_per_sample[i] : m.m3;
  const auto margin = evaluate_margin(cosine, m.m1, m2, m3, m.exact_grad, m.linear_beyond_pi);
  const double a = sum == 0 ? -INFINITY : exponent * kLn2 + std::log(sum);
  const TargetLoss loss = target_loss(a, scale * margin.psi);
  int power = 0;
  const double mantissa = std::frexp(sum, &power);
  const bool empty = sum == 0;
  *state = {inverse_norm,
            cosine,
            margin.slope,
            loss.miss,
            empty ? 0.0 : 1.0 / mantissa,
            empty ? 0.0 : exponent + static_cast<double>(power)};
  return loss.loss;
}

}  // namespace unicom
