// The end of the forward pass for one sample: its positives join the sum over its negatives, and what
// backward needs of it is written down.
#pragma once

#include "margin.h"
#include "sampler.h"
#include "softmax.h"

namespace unicom {

enum class Reduction : int64_t { kNone, kMean, kSum };

// What becomes of several positives of one sample; see unicom_ext/loss/options.py.
enum class MultiLabel : int64_t { kAverage, kSeparate };

// The classes that are positives of each sample, as slots (sampler.h). No class stands twice in a
// sample's row; what is left of a row holds kIgnoredSlot.
struct Positives {
  const int64_t* slots;  // [batch][width]
  int64_t width;

  UNICOM_HD const int64_t* of(int64_t sample) const { return slots + sample * width; }
  UNICOM_HD bool any_invalid(int64_t sample) const {
    bool found = false;
    for (int64_t p = 0; p < width; ++p) found |= of(sample)[p] == kInvalidSlot;
    return found;
  }
  // How many positives a sample has, on whatever shard; 0 for one that takes no part.
  UNICOM_HD int64_t count(int64_t sample) const {
    int64_t found = 0;
    for (int64_t p = 0; p < width; ++p) found += is_counted(of(sample)[p]);
    return any_invalid(sample) ? 0 : found;
  }
};

// What the backward pass needs of each sample, and of each of its positives: one row of doubles.
struct SampleState {
  double inverse_norm;  // of the embedding's selected part
  double push;          // how fast the loss rises with the log of the sum over the negatives
  double factor;        // a negative's softmax among negatives is
  double exponent;      //   factor * 2^-exponent * exp(scale * cosine)
  double smooth;        // how fast label smoothing makes it fall with each negative's logit
  double of_scale;      // how fast it rises with the scale, but for what the sum over the negatives
                        //   has in it: push * their mean cosine by their softmax
};
struct PositiveState {
  double cosine;  // with its prototype
  double slope;   // psi'(cosine)
  double pull;    // how fast the loss falls with its logit
};

UNICOM_HD constexpr int64_t state_size(int64_t width) {
  constexpr int64_t kSample = sizeof(SampleState) / sizeof(double);
  constexpr int64_t kPositive = sizeof(PositiveState) / sizeof(double);
  return kSample + width * kPositive;
}

struct States {
  double* data;   // [batch][state_size(width)]
  int64_t width;  // of Positives

  UNICOM_HD SampleState& sample(int64_t i) const {
    return *reinterpret_cast<SampleState*>(data + i * state_size(width));
  }
  UNICOM_HD PositiveState& positive(int64_t i, int64_t p) const {
    return reinterpret_cast<PositiveState*>(&sample(i) + 1)[p];
  }
};

// Whether a prototype takes the place of one of its class that came before: NaN is not passed over.
template <class Real>
UNICOM_HD bool is_nearer(Real cosine, Real before) {
  return cosine > before || cosine != cosine;
}

// The negatives of a sample as label smoothing sees them, all alike.
struct Negatives {
  double count;
  double cosines;  // their sum
};

struct MarginOptions {
  double m1;
  double m2, m3;             // radians; used where the arrays are null
  const double* m2_of_each;  // [batch][width] or nullptr
  const double* m3_of_each;
  bool exact_grad;
  bool linear_beyond_pi;

  UNICOM_HD Margin<double> operator()(double cosine, int64_t positive) const {
    return evaluate_margin(cosine, m1, m2_of_each ? m2_of_each[positive] : m2,
                           m3_of_each ? m3_of_each[positive] : m3, exact_grad, linear_beyond_pi);
  }
};

// The loss of each sample, from the sums over its negatives and the cosines of its positives.
struct SampleLoss {
  MarginOptions margin;
  double scale;
  MultiLabel multi_label;
  double label_smoothing;
  Positives positives;
  States states;

  // Sample i, whose negatives sum to sum * 2^exponent (0: there are none).  cosine: [width]
  UNICOM_HD double operator()(int64_t i, double sum, double exponent, const double* cosine,
                              double inverse_norm, const Negatives& alike) const {
    const bool empty = sum == 0;
    int power = 0;
    const double mantissa = std::frexp(sum, &power);
    states.sample(i) = {inverse_norm,
                        0.0,
                        empty ? 0.0 : 1.0 / mantissa,
                        empty ? 0.0 : exponent + static_cast<double>(power),
                        0.0,
                        0.0};
    const double negatives = empty ? -INFINITY : exponent * kLn2 + std::log(sum);
    for (int64_t p = 0; p < positives.width; ++p) {
      PositiveState& state = states.positive(i, p);
      state = {};
      if (!is_counted(positives.of(i)[p])) continue;
      const Margin<double> psi = margin(cosine[p], i * positives.width + p);
      state = {cosine[p], psi.slope, scale * psi.psi};  // its logit, for now
    }
    return multi_label == MultiLabel::kAverage ? average(i, negatives, alike)
                                               : separate(i, negatives);
  }

 private:
  // The mean over the positives of their cross entropies, each against the negatives alone. Label
  // smoothing adds label_smoothing * (the positive's logit - the mean of its own and the negatives').
  UNICOM_HD double average(int64_t i, double negatives, const Negatives& alike) const {
    const auto count = static_cast<double>(positives.count(i));
    const bool smooths = label_smoothing > 0 && alike.count > 0;
    const double smooth = smooths ? label_smoothing / (alike.count + 1.0) : 0.0;
    double loss = 0, push = 0, of_scale = 0;
    for (int64_t p = 0; p < positives.width; ++p) {
      if (!is_counted(positives.of(i)[p])) continue;
      double& pull = states.positive(i, p).pull;
      const double logit = pull;
      const TargetLoss one = target_loss(negatives, logit);
      pull = one.miss / count;
      loss += one.loss / count;
      push += pull;
      if (smooths) {
        pull -= smooth * alike.count / count;
        loss += smooth * (alike.count * logit - scale * alike.cosines) / count;
      }
      of_scale -= pull * logit / scale;
    }
    if (smooths) of_scale -= smooth * alike.cosines;
    states.sample(i).push = push;
    states.sample(i).smooth = smooth;
    states.sample(i).of_scale = of_scale;
    return loss;
  }

  // log(1 + sum over negatives of exp z) + log(1 + sum over positives of exp -z).
  UNICOM_HD double separate(int64_t i, double negatives) const {
    double largest = -INFINITY, sum = 0;
    for (int64_t p = 0; p < positives.width; ++p)
      if (is_counted(positives.of(i)[p])) largest = max_of(largest, -states.positive(i, p).pull);
    for (int64_t p = 0; p < positives.width; ++p)
      if (is_counted(positives.of(i)[p])) sum += std::exp(-states.positive(i, p).pull - largest);
    const double missed = largest + std::log(sum);
    const TargetLoss pushed = target_loss(negatives, 0.0), pulled = target_loss(missed, 0.0);
    for (int64_t p = 0; p < positives.width; ++p) {
      if (!is_counted(positives.of(i)[p])) continue;
      double& pull = states.positive(i, p).pull;
      const double logit = pull;
      pull = pulled.miss * std::exp(-logit - missed);
      states.sample(i).of_scale -= pull * logit / scale;
    }
    states.sample(i).push = pushed.miss;
    return pushed.loss + pulled.loss;
  }
};

}  // namespace unicom
