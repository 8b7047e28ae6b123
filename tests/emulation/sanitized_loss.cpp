// The loss, forward and backward, on the CPU backend and on the emulated one.
#include "sanitized.h"

#include <algorithm>
#include <limits>
#include <random>

#include "../../csrc/core/sampler.h"
#include "../../csrc/cpu/host/loss.h"
#include "../../csrc/cpu/host/select.h"
#include "../../csrc/cuda/host/loss.h"

namespace unicom {

namespace {

struct Case {
  int64_t batch, num_classes, dim, sampled, features;
  double scale;
  bool compact;
  int64_t positives = 1;
  MultiLabel multi_label = MultiLabel::kAverage;
  double label_smoothing = 0;
  int64_t centers = 1;
};

struct Outcome {
  Array<double> loss;
  Array<float> grad_embeddings, grad_prototypes;
};

// The inputs of a case; class_index and slot as the sampler of the CPU draws them.
struct Inputs {
  Case c;
  Array<float> embeddings, prototypes;
  Array<int64_t> labels, class_index, slot, feature_index;
  int64_t count, bound;

  explicit Inputs(const Case& c_)
      : c(c_),
        embeddings(c.batch * c.dim),
        prototypes(c.num_classes * c.centers * c.dim),
        labels(c.batch * c.positives),
        class_index(selection_bound(c.num_classes, c.sampled, labels.size, 0, c.num_classes)),
        slot(labels.size),
        feature_index(c.features),
        bound(class_index.size) {
    std::mt19937 random(static_cast<unsigned>(c.batch * 31 + c.num_classes));
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < embeddings.size; ++i) embeddings.data[i] = normal(random);
    for (int64_t i = 0; i < prototypes.size; ++i) prototypes.data[i] = normal(random);
    for (int64_t i = 0; i < c.batch; ++i)  // none of a sample's classes twice
      for (int64_t p = 0; p < c.positives; ++p)
        labels.data[i * c.positives + p] =
            (i + p) % 7 == 3
                ? -100
                : static_cast<int64_t>(random() % (c.num_classes / c.positives / 2 + 1)) *
                          c.positives +
                      p;
    const int64_t step = 9;
    cpu::select_classes({.labels = {.data = labels.get(),
                                    .is_64_bit = true,
                                    .count = labels.size,
                                    .width = c.positives,
                                    .num_classes = c.num_classes,
                                    .ignore_index = -100,
                                    .start = 0,
                                    .stop = c.num_classes},
                         .count = c.sampled,
                         .seed = 5,
                         .step = &step,
                         .bound = bound,
                         .class_index = class_index.get(),
                         .selected = &count,
                         .slot = slot.get()},
                        cpu::Serial());
    cpu::select_features(
        {.dim = c.dim, .count = c.features, .seed = 5, .step = &step, .out = feature_index.get()});
  }
  RowSource source(const Array<float>& rows) const {
    return {.data = rows.get(),
            .dtype = DType::kFloat32,
            .row_stride = c.dim,
            .columns = feature_index.get(),
            .dim = c.features};
  }
  Problem problem(Precision precision, int64_t keep_bytes, bool wants_embeddings) const {
    return {.embeddings = source(embeddings),
            .prototypes = source(prototypes),
            .batch = c.batch,
            .num_classes = c.num_classes,
            .centers = c.centers,
            .dim = c.dim,
            .class_index = class_index.get(),
            .count = &count,
            .bound = bound,
            .positives = positives(),
            .scale = c.scale,
            .filter = c.label_smoothing > 0 ? std::numeric_limits<double>::infinity() : 0.4,
            .label_smoothing = c.label_smoothing,
            .total_sampled = bound,
            .precision = precision,
            .keep_bytes = keep_bytes,
            .wants_embeddings = wants_embeddings};
  }
  Positives positives() const { return {.slots = slot.get(), .width = c.positives}; }
  Outcome outcome() const {
    return {Array<double>(c.batch), Array<float>(c.batch * c.dim),
            Array<float>((c.compact ? bound : c.num_classes) * c.centers * c.dim)};
  }
};

const MarginOptions kMargin{.m1 = 1.0,
                            .m2 = 0.3,
                            .m3 = 0.05,
                            .m2_of_each = nullptr,
                            .m3_of_each = nullptr,
                            .exact_grad = false,
                            .linear_beyond_pi = false};

// What forward makes and backward reads.
struct Forward {
  int64_t batch, width;
  Array<double> sums, state;
  Array<char> packed, kept;

  Forward(const Problem& p, int64_t packed_bytes, int64_t kept_bytes)
      : batch(p.batch),
        width(p.positives.width),
        sums((3 + ShardSums::row_size(width)) * batch),
        state(state_size(width) * batch),
        packed(packed_bytes),
        kept(kept_bytes) {}

  ShardSums shard() const {
    double* const s = sums.get();
    double* const rest = s + ShardSums::row_size(width) * batch;
    return {.sums = s,
            .exponent = rest,
            .inverse_norm = rest + batch,
            .largest_negative = rest + 2 * batch,
            .width = width};
  }
  States states() const { return {.data = state.get(), .width = width}; }
  Saved saved() const { return {.packed = packed.get(), .kept = kept.get()}; }
  JoinTargets join(const Inputs& in, const Outcome& out) const {
    return {.of = {.margin = kMargin,
                   .scale = in.c.scale,
                   .multi_label = in.c.multi_label,
                   .label_smoothing = in.c.label_smoothing,
                   .positives = in.positives(),
                   .states = states()},
            .batch = in.c.batch,
            .sums = shard(),
            .loss = out.loss.get()};
  }
  Gradients gradients(const Inputs& in, const Outcome& out) const {
    static constexpr float kUpstream = 1.0f;
    return {.grad_loss = &kUpstream,
            .reduction = Reduction::kSum,
            .states = states(),
            .packed = packed.get(),
            .kept = kept.get(),
            .embeddings = out.grad_embeddings.get(),
            .radial = nullptr,
            .prototypes = out.grad_prototypes.get(),
            .compact = in.c.compact};
  }
};

Outcome on_cpu(const Inputs& in) {
  Outcome out = in.outcome();
  const Problem p = in.problem(Precision::kFp32, 0, true);
  const Forward saved(p, cpu::packed_bytes(p), cpu::kept_bytes(p));
  cpu::forward(p, saved.shard(), saved.saved(), cpu::Serial());
  cpu::join_targets(saved.join(in, out));
  cpu::backward(p, saved.gradients(in, out), nullptr, cpu::Serial());
  return out;
}

// take: the prototypes' gradient is handed over in pieces, as for an update inside backward.
Outcome on_gpu(const Inputs& in, Precision precision, int64_t keep_bytes, bool take,
               bool wants_embeddings) {
  using namespace unicom::cuda;
  Outcome out = in.outcome();
  Queue queue;
  const Problem p = in.problem(precision, keep_bytes, wants_embeddings);
  const Forward saved(p, cuda::packed_bytes(p), cuda::kept_bytes(p));
  {
    Array<char> workspace(forward_workspace(queue, p));
    forward(queue, p, saved.shard(), saved.saved(), workspace.get());
  }
  join_targets(queue, saved.join(in, out));
  const TakeRows take_rows = [&](Queue&, const GradientRows& part) {
    const int64_t centers = in.c.centers;
    for (int64_t j = 0; j < part.count && part.first + j < in.count * centers; ++j) {
      const int64_t place = part.first + j, slot = place / centers;
      const int64_t row =
          in.c.compact ? place : in.class_index.data[slot] * centers + place % centers;
      std::copy_n(static_cast<const float*>(part.rows) + j * p.dim, p.dim,
                  out.grad_prototypes.get() + row * p.dim);
    }
  };
  const TakeRows* const taken = take ? &take_rows : nullptr;
  Gradients gradients = saved.gradients(in, out);
  if (take) gradients.prototypes = nullptr;
  Array<char> workspace(backward_workspace(queue, p, gradients, taken));
  backward(queue, p, gradients, taken, workspace.get());
  return out;
}

// attends: forward is told that the embeddings' gradient will be wanted, and prepares it on a Hopper.
void compare(const Inputs& in, Precision precision, const Outcome& right, double tolerance,
             const std::string& name, bool attends = false) {
  emulation::set_schedule(0);
  const Outcome in_order = on_gpu(in, precision, 0, false, attends);
  // Nothing of this may be seen in the result: the order of the threads, kept cosines, less shared
  // memory, gradients in pieces.
  emulation::set_schedule(12345);
  if (!attends) emulation::set_shared_limit(99 << 10);
  const Outcome out = on_gpu(in, precision, 1 << 18, true, attends);
  emulation::set_shared_limit(227 << 10);
  expect(same_bits(out.grad_embeddings, in_order.grad_embeddings) &&
             same_bits(out.grad_prototypes, in_order.grad_prototypes),
         name + ": two ways to the same bits");
  for (int64_t i = 0; i < in.c.batch; ++i)
    expect(std::fabs(out.loss.data[i] - right.loss.data[i]) <=
               in.c.scale * tolerance * (1 + right.loss.data[i] / 64),
           name + ": loss of sample " + std::to_string(i) + " by " +
               std::to_string(out.loss.data[i] - right.loss.data[i]));
  const double x = distance(out.grad_embeddings, right.grad_embeddings);
  const double w = distance(out.grad_prototypes, right.grad_prototypes);
  expect(x <= in.c.scale * tolerance, name + ": embedding gradients by " + std::to_string(x));
  expect(w <= in.c.scale * tolerance, name + ": prototype gradients by " + std::to_string(w));
}

}  // namespace

void check_loss() {
  const Case cases[] = {
      {1, 2, 1, 1, 1, 16, false},
      {7, 65, 17, 30, 9, 64, true},
      {129, 300, 70, 257, 65, 30, true},
      {3, 151, 300, 20, 256, 200, false},
      {9, 310, 17, 120, 15, 64, true, 3, MultiLabel::kAverage},
      {40, 700, 150, 10, 129, 30, false, 5, MultiLabel::kSeparate},
      {7, 65, 17, 30, 9, 64, true, 1, MultiLabel::kAverage, 0.1},
      {9, 310, 70, 120, 66, 30, false, 3, MultiLabel::kAverage, 0.3},
      {9, 130, 40, 60, 36, 16, false, 3, MultiLabel::kAverage, 0, 3},
      {7, 65, 17, 20, 9, 16, true, 1, MultiLabel::kAverage, 0, 8},
  };
  Precision half = Precision::kFp16;
  for (const Case& c : cases) {
    const Inputs in(c);
    const Outcome right = on_cpu(in);
    const std::string name = std::to_string(c.batch) + " x " + std::to_string(c.num_classes) +
                             " x " + std::to_string(c.dim) + ", " + std::to_string(c.positives);
    compare(in, Precision::kFp32, right, 2e-7, name + " float");
    // Both kinds of halves run the same code: each takes every other case, of every kind of case.
    half = half == Precision::kFp16 ? Precision::kBf16 : Precision::kFp16;
    const double tolerance = half == Precision::kFp16 ? 1e-3 : 1e-2;
    for (const int capability : {8, 9}) {
      emulation::set_compute_capability(capability);
      compare(in, half, right, tolerance, name + " halves on " + std::to_string(capability));
    }
    compare(in, half, right, tolerance, name + " halves by attention", true);
  }
}

}  // namespace unicom
