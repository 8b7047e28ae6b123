// The combined margin of ArcFace (arXiv:1801.07698), CosFace (arXiv:1801.09414) and SphereFace
// (arXiv:1704.08063), applied to the cosine of a sample and its own class:
//
//   psi(c) = cos(m1 * arccos(c) + m2) - m3
#pragma once

#include <cmath>

#include "macros.h"

namespace unicom {

template <class Real>
struct Margin {
  Real psi;
  Real slope;  // what backward takes as d psi / d c
};

// `cosine` is clamped to [-1, 1] first (rounding can leave it one ulp outside); NaN stays NaN.
// m1 is positive, m2 is in radians.
//
// With `exact`, slope is the derivative of psi, kept finite at |c| = 1; otherwise it is 1, the
// straight-through gradient.
//
// With `linear`, psi goes on as a line of slope 1 where m1 * theta + m2 passes pi. The line starts
// at or below -1 - m3, so that psi never rises with the angle (for m2 in [0, pi]). For m1 = 1 and
// m2 up to 2.33 it is ArcFace's own continuation, c - m2 * sin(m2). Where m1 * theta + m2 is below 0,
// as a negative m2 makes it, psi stays at its largest value 1 - m3, as AdaFace (arXiv:2204.00964)
// clips the angle; else it would fall towards theta = 0.
template <class Real>
UNICOM_HD inline Margin<Real> evaluate_margin(Real cosine, Real m1, Real m2, Real m3, bool exact,
                                              bool linear) {
  constexpr Real kPi = static_cast<Real>(3.14159265358979323846264338327950288);
  constexpr Real kSmallestSine = static_cast<Real>(1e-6);
  const Real one = 1;
  const Real c = cosine > one ? one : cosine < -one ? -one : cosine;
  const Real theta = std::acos(c);
  if (linear) {
    const Real joint = min_of(max_of((kPi - m2) / m1, Real(0)), kPi);
    if (theta > joint) {
      const Real drop = max_of((kPi - joint) * std::sin(joint), one + std::cos(joint));
      return {c - drop - m3, one};
    }
  }
  Real angle = m1 * theta + m2;
  if (linear && angle < 0) angle = 0;
  const Real psi = std::cos(angle) - m3;
  if (!exact) return {psi, one};
  const Real sine = std::sqrt((one - c) * (one + c));
  return {psi, m1 * std::sin(angle) / max_of(sine, kSmallestSine)};
}

}  // namespace unicom
