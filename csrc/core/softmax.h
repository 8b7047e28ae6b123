// The softmax without a maximum, and the loss in which the target joins last.
#pragma once

#include <cmath>
#include <cstdint>

#include "macros.h"

namespace unicom {

constexpr double kLn2 = 0.69314718055994530942;

// Non-target logits lie in [-scale, scale]. Shifting all of them by the constant
// max(0, scale + ln count - 88) keeps each exponential and their sum inside fp32, and is a whole
// power of two here so that it costs no accuracy. Returns false where some exponential could
// underflow; then the largest logit of each row must be tracked instead.
UNICOM_HD inline bool constant_exponent(double scale, double count, int64_t* exponent) {
  const double shift = scale + std::log(count > 1 ? count : 1.0) - 88.0;
  *exponent = shift > 0 ? static_cast<int64_t>(std::ceil(shift / kLn2)) : 0;
  return -scale - static_cast<double>(*exponent) * kLn2 > -87.0;
}

// exp(scale * cosine) * 2^-exponent for a whole exponent; 0 on underflow, NaN stays NaN. The power
// of two is split off before anything is rounded, so that the relative error stays near 1e-7 (in
// fp32) however large scale * cosine is.
UNICOM_HD inline float scaled_exp(float cosine, float scale, float exponent) {
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const float power = std::rint(cosine * (scale * 1.44269504f));
  float r = std::fma(cosine, scale, -(power * kLn2High));
  r = std::fma(power, -kLn2Low, r);
  const float lifted = power - exponent;
  if (!(lifted >= -126.0f)) return lifted < -126.0f ? 0.0f : lifted;
  return std::ldexp(std::exp(r), static_cast<int>(lifted));
}
UNICOM_HD inline double scaled_exp(double cosine, double scale, double exponent) {
  constexpr double kLn2High = 0.693147180369123816490, kLn2Low = 1.90821492927058770002e-10;
  const double power = std::rint(cosine * scale * 1.4426950408889634);
  double r = std::fma(cosine, scale, -power * kLn2High);
  r = std::fma(power, -kLn2Low, r);
  const double lifted = power - exponent;
  if (!(lifted >= -1022.0)) return lifted < -1022.0 ? 0.0 : lifted;
  return std::ldexp(std::exp(r), static_cast<int>(lifted));
}

struct TargetLoss {
  double loss;  // log(1 + exp(a - z))
  double miss;  // 1 - p_target = 1 / (1 + exp(z - a))
};

// a: log of the sum over the other classes (-inf when there is none); z: the target's logit. Never
// through log-sum-exp of both: on converged samples that loses every digit of 1 - p.
UNICOM_HD inline TargetLoss target_loss(double a, double z) {
  if (a == -INFINITY) return {0.0, 0.0};
  const double x = a - z;
  const double tail = std::exp(-std::fabs(x));
  const double softplus = std::log1p(tail) + (x > 0 ? x : 0.0);
  const double sigmoid = x > 0 ? 1.0 / (1.0 + tail) : tail / (1.0 + tail);
  if (x != x) return {x, x};
  return {softplus, sigmoid};
}

}  // namespace unicom
