#include "samples.h"

#include <algorithm>

#include "loss.h"

namespace unicom::cpu {

namespace {

template <class Real>
void write(const double* from, int64_t count, void* to) {
  for (int64_t i = 0; i < count; ++i) static_cast<Real*>(to)[i] = static_cast<Real>(from[i]);
}

template <class Real>
void write_all(const WriteResults& a) {
  const int64_t width = a.positives.width;
  write<Real>(a.sample_loss, a.batch, a.sample_loss_out);
  for (int64_t i = 0; i < a.batch; ++i)
    write<Real>(a.sums.cosines(i), width, static_cast<Real*>(a.target_cosine_out) + i * width);
  write<Real>(a.sums.largest_negative, a.batch, a.largest_negative_out);
  if (a.reduction == Reduction::kNone) return write<Real>(a.sample_loss, a.batch, a.loss);
  double total = 0;
  for (int64_t i = 0; i < a.batch; ++i) total += a.sample_loss[i];
  total *= reduction_factor(a.reduction, a.positives, a.batch);
  write<Real>(&total, 1, a.loss);
}

}  // namespace

void join_targets(const JoinTargets& a) {
  const int64_t size = state_size(a.of.positives.width);
  for (int64_t i = 0; i < a.batch; ++i) {
    a.loss[i] = 0;
    std::fill_n(a.of.states.data + i * size, size, 0.0);
    if (a.of.positives.count(i) > 0)
      a.loss[i] = a.of(i, a.sums.sum(i), a.sums.exponent[i], a.sums.cosines(i),
                       a.sums.inverse_norm[i], a.sums.negatives(i));
  }
}

void write_results(const WriteResults& a, bool is_double) {
  if (is_double)
    write_all<double>(a);
  else
    write_all<float>(a);
}

}  // namespace unicom::cpu
