// The row optimizers' arithmetic: what one step does to one value of a prototype, and what a row
// needs to know for it. `Value` is a number or a vector of numbers, so that the device, the CPU's
// vectors and the remainders all run the same lines.
#pragma once

#include <cmath>

#include "macros.h"
#include "random.h"

namespace unicom {

struct ScalarMath {
  template <class Real>
  UNICOM_HD static Real sqrt(Real x) {
    return std::sqrt(x);
  }
};

// ---- AdamW (Loshchilov and Hutter, arXiv:1711.05101)

// The same for all values of a row.
template <class Real>
struct AdamWStep {
  Real decay;      // product of 1 - lr * weight_decay, over this step and those the row missed
  Real sign;       // -1 to maximise
  Real gain1;      // 1 - beta1
  Real beta2;      //
  Real gain2;      // 1 - beta2
  Real step_size;  // lr / (1 - beta1^n)
  Real root_gain;  // 1 / sqrt(1 - beta2^n)
  Real eps;
};

struct AdamWOptions {
  double lr, beta1, beta2, eps;
  bool maximize;
  double log_beta1 = std::log(beta1), log_beta2 = std::log(beta2);
};

// n: how many steps the row has had, this one included. Its moments stood still in between, so the
// correction of their bias counts its own steps.
template <class Real>
UNICOM_HD inline AdamWStep<Real> adamw_step(const AdamWOptions& o, int64_t n, double decay) {
  // beta^n; exp is twice as fast as pow, and this happens in every row.
  const double count = static_cast<double>(n);
  const double bias1 = 1.0 - std::exp(count * o.log_beta1);
  const double bias2 = 1.0 - std::exp(count * o.log_beta2);
  return {static_cast<Real>(decay),
          static_cast<Real>(o.maximize ? -1 : 1),
          static_cast<Real>(1.0 - o.beta1),
          static_cast<Real>(o.beta2),
          static_cast<Real>(1.0 - o.beta2),
          static_cast<Real>(o.lr / bias1),
          static_cast<Real>(1.0 / std::sqrt(bias2)),
          static_cast<Real>(o.eps)};
}

template <class Value, class Real>
UNICOM_HD_INLINED void adamw_first_moment(const AdamWStep<Real>& s, Value gradient, Value* first) {
  *first = *first + (gradient - *first) * s.gain1;
}

// `square` is gradient^2, or its mean over the row where the row has one second moment.
template <class Value, class Real>
UNICOM_HD_INLINED void adamw_second_moment(const AdamWStep<Real>& s, Value square, Value* second) {
  *second = *second * s.beta2 + square * s.gain2;
}

template <class Math, class Value, class Real>
UNICOM_HD_INLINED void adamw_parameter(const AdamWStep<Real>& s, Value first, Value second,
                                       Value* parameter) {
  *parameter =
      *parameter * s.decay - s.step_size * first / (Math::sqrt(second) * s.root_gain + s.eps);
}

// ---- SGD with momentum, and its missed steps

// A step without gradient is linear in (parameter, momentum buffer); missed steps compose.
struct Transition {
  double pp, pb;  // parameter' = pp * parameter + pb * buffer
  double bp, bb;  // buffer'    = bp * parameter + bb * buffer

  UNICOM_HD static Transition identity() { return {1, 0, 0, 1}; }
};

// First `a`, then `b`.
UNICOM_HD inline Transition then(const Transition& a, const Transition& b) {
  return {b.pp * a.pp + b.pb * a.bp, b.pp * a.pb + b.pb * a.bb, b.bp * a.pp + b.bb * a.bp,
          b.bp * a.pb + b.bb * a.bb};
}

struct SgdOptions {
  double lr, momentum, weight_decay;
  bool nesterov, maximize;
};

template <class Real>
struct SgdStep {
  Real pp, pb, bp, bb;  // the missed steps
  Real sign;            // -1 to maximise
  Real lr, momentum, weight_decay;
  bool nesterov;
};

template <class Real>
UNICOM_HD inline SgdStep<Real> sgd_step(const SgdOptions& o, const Transition& missed) {
  return {static_cast<Real>(missed.pp),
          static_cast<Real>(missed.pb),
          static_cast<Real>(missed.bp),
          static_cast<Real>(missed.bb),
          static_cast<Real>(o.maximize ? -1 : 1),
          static_cast<Real>(o.lr),
          static_cast<Real>(o.momentum),
          static_cast<Real>(o.weight_decay),
          o.nesterov};
}

// torch.optim.SGD's order: decay joins the gradient, the gradient the buffer, the buffer the step.
template <class Value, class Real>
UNICOM_HD_INLINED void sgd_value(const SgdStep<Real>& s, Value gradient, Value* parameter,
                                 Value* buffer) {
  const Value p = *parameter * s.pp + *buffer * s.pb;
  const Value b = *parameter * s.bp + *buffer * s.bb;
  const Value slope = gradient * s.sign + p * s.weight_decay;
  const Value moved = b * s.momentum + slope;
  const Value direction = s.nesterov ? slope + moved * s.momentum : moved;
  *parameter = p - direction * s.lr;
  *buffer = s.momentum == 0 ? b : moved;  // without momentum it is left alone
}

// ---- moments in bf16

// Rounded up or down at random with the chances that make the mean right: a moment that changes by
// less than its last digit would stand still otherwise, as beta2 = 0.999 makes it. What is drawn
// depends on the row, its step and the column alone.
UNICOM_HD inline uint32_t rounding_key(int64_t row, int64_t step) {
  return static_cast<uint32_t>(absorb(static_cast<uint64_t>(row), static_cast<uint64_t>(step)));
}

// 32 bits for one column (Word: uint32_t, or a vector of them): the low sixteen for the first
// moment, the high sixteen for the second. An integer hash (constants from Wellons' "lowbias32").
template <class Word>
UNICOM_HD_INLINED Word rounding_bits(uint32_t key, Word column) {
  Word x = column * 0x9e3779b9u + key;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

}  // namespace unicom
