#include "samples.h"

#include "loss.h"

namespace unicom::cpu {

namespace {

template <class Real>
void write(const double* from, int64_t count, void* to) {
  for (int64_t i = 0; i < count; ++i) static_cast<Real*>(to)[i] = static_cast<Real>(from[i]);
}

template <class Real>
void write_all(const WriteResults& a) {
  write<Real>(a.sample_loss, a.batch, a.sample_loss_out);
  write<Real>(a.target_cosine, a.batch, a.target_cosine_out);
  write<Real>(a.largest_negative, a.batch, a.largest_negative_out);
  if (a.reduction == Reduction::kNone) return write<Real>(a.sample_loss, a.batch, a.loss);
  double total = 0;
  for (int64_t i = 0; i < a.batch; ++i) total += a.sample_loss[i];
  total *= reduction_factor(a.reduction, a.slot, a.batch);
  write<Real>(&total, 1, a.loss);
}

}  // namespace

void join_targets(const JoinTargets& a) {
  const ShardSums& sums = a.sums;
  for (int64_t i = 0; i < a.batch; ++i) {
    a.loss[i] = 0;
    a.state[i] = {};
    if (a.slot[i] == kIgnoredSlot) continue;
    a.loss[i] = join_target(a.margin, a.scale, i, sums.sum[i * sums.stride], sums.exponent[i],
                            sums.target_cosine[i * sums.stride], sums.inverse_norm[i], &a.state[i]);
  }
}

void write_results(const WriteResults& a, bool is_double) {
  if (is_double)
    write_all<double>(a);
  else
    write_all<float>(a);
}

}  // namespace unicom::cpu
