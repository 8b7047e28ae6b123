// Runs the CUDA backend over its emulation beside the CPU backend, on sizes around every granule,
// without torch: under sanitizers, and in two orders of the threads, whose results must be the same
// bit for bit. Prints what differs and ends with 1.
#include "cuda_emulation.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/core/sampler.h"
#include "../../csrc/cpu/host/loss.h"
#include "../../csrc/cpu/host/nearest.h"
#include "../../csrc/cpu/host/row_updates.h"
#include "../../csrc/cpu/host/select.h"
#include "../../csrc/cpu/host/unit_sums.h"
#include "../../csrc/cuda/host/loss.h"
#include "../../csrc/cuda/host/nearest.h"
#include "../../csrc/cuda/kernels/attention.h"
#include "../../csrc/cuda/kernels/logits.h"
#include "../../csrc/cuda/kernels/nearest.h"
#include "../../csrc/cuda/kernels/product.h"
#include "../../csrc/cuda/kernels/row_updates.h"
#include "../../csrc/cuda/kernels/select.h"

namespace unicom {
namespace {

bool failed = false;

void expect(bool good, const std::string& what) {
  if (good) return;
  std::printf("differs: %s\n", what.c_str());
  failed = true;
}

uint16_t half_bits(double x) { return __builtin_bit_cast(uint16_t, static_cast<_Float16>(x)); }

struct Case {
  int64_t batch, num_classes, dim, sampled, features;
  double scale;
  bool compact;
  int64_t positives = 1;
  MultiLabel multi_label = MultiLabel::kAverage;
  double label_smoothing = 0;
  int64_t centers = 1;
};

// Exactly as large as asked for, so that the sanitizer sees the first byte beyond.
template <class T>
struct Array {
  std::unique_ptr<T[]> data;
  int64_t size;
  explicit Array(int64_t n) : data(new T[static_cast<size_t>(n)]()), size(n) {}
  T* get() const { return data.get(); }
};

double distance(const Array<float>& a, const Array<float>& b) {
  double error = 0, total = 0;
  for (int64_t i = 0; i < a.size; ++i) {
    error += (a.data[i] - b.data[i]) * double(a.data[i] - b.data[i]);
    total += b.data[i] * double(b.data[i]);
  }
  return total == 0 ? std::sqrt(error) : std::sqrt(error / total);
}

bool same_bits(const Array<float>& a, const Array<float>& b) {
  return std::memcmp(a.get(), b.get(), sizeof(float) * static_cast<size_t>(a.size)) == 0;
}

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

void compare_selections(int64_t num_classes, int64_t count, int64_t batch, int64_t start,
                        int64_t stop) {
  Array<int64_t> labels(batch);
  for (int64_t i = 0; i < batch; ++i) labels.data[i] = i % 5 == 0 ? -100 : i * 37 % num_classes;
  const int64_t bound = selection_bound(num_classes, count, batch, start, stop);
  Array<int64_t> ids(bound), slot(batch), gpu_ids(bound), gpu_slot(batch);
  const int64_t step = 4;
  int64_t selected = -1, gpu_selected = -1;
  ClassSelection selection{.labels = {.data = labels.get(),
                                      .is_64_bit = true,
                                      .count = batch,
                                      .width = 0,
                                      .num_classes = num_classes,
                                      .ignore_index = -100,
                                      .start = start,
                                      .stop = stop},
                           .count = count,
                           .seed = 3,
                           .step = &step,
                           .bound = bound,
                           .class_index = ids.get(),
                           .selected = &selected,
                           .slot = slot.get()};
  cpu::select_classes(selection, cpu::Serial());
  selection.class_index = gpu_ids.get();
  selection.selected = &gpu_selected;
  selection.slot = gpu_slot.get();
  cuda::Queue queue;
  Array<char> workspace(cuda::selection_workspace(selection.labels));
  cuda::select_classes(queue, selection, workspace.get());
  bool same = selected == gpu_selected;
  for (int64_t j = 0; same && j < bound; ++j) same = ids.data[j] == gpu_ids.data[j];
  for (int64_t i = 0; i < batch; ++i) same = same && slot.data[i] == gpu_slot.data[i];
  expect(same, "selection of " + std::to_string(num_classes));
}

// One matrix under both row optimizers, its gradient in any order, and repeated ids add up.
struct RowInputs {
  int64_t num_rows, dim, count;
  Array<int64_t> ids;
  Array<float> rows;
  Array<Transition> steps;

  RowInputs(int64_t num_rows_, int64_t dim_, int64_t count_)
      : num_rows(num_rows_), dim(dim_), count(count_), ids(count), rows(count * dim), steps(300) {
    std::mt19937 random(static_cast<unsigned>(dim));
    std::normal_distribution<float> normal;
    for (int64_t j = 0; j < count; ++j) ids.data[j] = random() % num_rows;
    for (int64_t i = 0; i < rows.size; ++i) rows.data[i] = normal(random);
    for (int64_t i = 0; i < steps.size; ++i) steps.data[i] = {0.999, -0.01, 0.1, 0.9};
  }
};

struct RowOutcome {
  Array<float> parameter, first, second;
  Array<int32_t> row_step, last_step;
  Array<double> log_decay;

  explicit RowOutcome(const RowInputs& in)
      : parameter(in.num_rows * in.dim),
        first(parameter.size),
        second(parameter.size),
        row_step(in.num_rows),
        last_step(in.num_rows),
        log_decay(in.num_rows) {
    for (int64_t i = 0; i < parameter.size; ++i) parameter.data[i] = std::sin(float(i));
    for (int64_t i = 0; i < in.num_rows; ++i) last_step.data[i] = static_cast<int32_t>(i * 7 % 300);
  }
};

RowArray array_of(const Array<float>& values, int64_t dim) {
  return {.data = values.get(), .dtype = DType::kFloat32, .row_stride = dim};
}

AdamWRows adamw_rows(const RowInputs& in, const RowOutcome& out) {
  return {.options = {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .maximize = false},
          .parameter = array_of(out.parameter, in.dim),
          .first = array_of(out.first, in.dim),
          .second = array_of(out.second, in.dim),
          .second_per_row = false,
          .row_step = out.row_step.get(),
          .log_decay = out.log_decay.get(),
          .total_log_decay = -0.01,
          .num_rows = in.num_rows,
          .dim = in.dim};
}

SgdRows sgd_rows(const RowInputs& in, const RowOutcome& out) {
  return {.options = {.lr = 0.01,
                      .momentum = 0.9,
                      .weight_decay = 0.1,
                      .nesterov = true,
                      .maximize = false},
          .parameter = array_of(out.parameter, in.dim),
          .buffer = array_of(out.first, in.dim),
          .log_decay = nullptr,
          .decay_before = 0,
          .decay_after = 0,
          .last_step = out.last_step.get(),
          .history = in.steps.get(),
          .remembered = in.steps.size,
          .now = in.steps.size + 1,
          .num_rows = in.num_rows,
          .dim = in.dim};
}

RowOutcome updated_on_cpu(const RowInputs& in) {
  RowOutcome out(in);
  const cpu::MergedRows merged(in.ids.get(), in.count);
  Array<int64_t> ids(merged.count());
  Array<float> rows(merged.count() * in.dim);
  const cpu::RowGradient gradient{
      .ids = ids.get(), .count = merged.count(), .rows = array_of(rows, in.dim), .dim = in.dim};
  merged.write(
      {.ids = in.ids.get(), .count = in.count, .rows = array_of(in.rows, in.dim), .dim = in.dim},
      ids.get(), gradient.rows, cpu::Serial());
  update_rows(cpu::RowAdamW(adamw_rows(in, out)), gradient, cpu::Serial());
  update_rows(cpu::RowSgd(sgd_rows(in, out), gradient.ids, gradient.count), gradient,
              cpu::Serial());
  return out;
}

RowOutcome updated_on_gpu(const RowInputs& in) {
  RowOutcome out(in);
  cuda::Queue queue;
  Array<int64_t> keys(in.count), order(in.count), sorted(in.count), ids(in.count);
  Array<float> rows(in.count * in.dim);
  cuda::Merge merge{.ids = in.ids.get(),
                    .rows = in.rows.get(),
                    .dtype = DType::kFloat32,
                    .count = in.count,
                    .dim = in.dim,
                    .keys = keys.get(),
                    .order = order.get(),
                    .merged_ids = ids.get(),
                    .merged_rows = rows.get()};
  give_keys(queue, merge);
  std::iota(order.get(), order.get() + in.count, int64_t{0});
  std::stable_sort(order.get(), order.get() + in.count,
                   [&](int64_t a, int64_t b) { return keys.data[a] < keys.data[b]; });
  for (int64_t j = 0; j < in.count; ++j) sorted.data[j] = keys.data[order.data[j]];
  merge.keys = sorted.get();
  add_equal(queue, merge);
  const cuda::SparseRows gradient{.ids = ids.get(), .rows = rows.get(), .count = in.count};
  const auto update = [&](const auto& state) {
    Array<char> workspace(cuda::update_workspace(state, in.count));
    cuda::update_rows(queue, state, gradient, workspace.get());
  };
  update(adamw_rows(in, out));
  update(sgd_rows(in, out));
  return out;
}

void compare_updates(int64_t num_rows, int64_t dim, int64_t count) {
  const RowInputs in(num_rows, dim, count);
  const RowOutcome right = updated_on_cpu(in);
  emulation::set_schedule(0);
  const RowOutcome in_order = updated_on_gpu(in);
  emulation::set_schedule(12345);
  const RowOutcome out = updated_on_gpu(in);
  const std::string name = "update of " + std::to_string(num_rows) + " x " + std::to_string(dim);
  expect(same_bits(out.parameter, in_order.parameter), name + ": two orders of the threads");
  expect(distance(out.parameter, right.parameter) < 1e-6, name + ": parameter");
  expect(distance(out.first, right.first) < 1e-6, name + ": first");
  expect(distance(out.second, right.second) < 1e-6, name + ": second");
  for (int64_t i = 0; i < num_rows; ++i)
    expect(out.row_step.data[i] == right.row_step.data[i] &&
               out.last_step.data[i] == right.last_step.data[i],
           name + ": steps of row " + std::to_string(i));
}

// ---- the nearest centroid

struct Found {
  Array<int64_t> index, sums, counts;
  Array<float> score, directions;
  Found(int64_t n, int64_t k, int64_t dim)
      : index(n), sums(k * dim), counts(k), score(n), directions(k * dim) {}

  // Rows that came from where the guess was, if there was one.
  AddUnitRows moves(const FloatRows& rows, const int64_t* guess) const {
    return {.rows = rows,
            .index = index.get(),
            .before = guess,
            .num_sums = counts.size,
            .shift = 40,
            .sums = sums.get(),
            .counts = counts.get()};
  }
  Directions of_sums() const {
    return {.sums = sums.get(),
            .count = counts.size,
            .dim = sums.size / counts.size,
            .out = directions.get()};
  }
};

template <class T>
bool same_array(const Array<T>& a, const Array<T>& b) {
  return std::memcmp(a.get(), b.get(), sizeof(T) * static_cast<size_t>(a.size)) == 0;
}

Found found_on_gpu(const FloatRows& rows, const FloatRows& centroids, const int64_t* guess) {
  Found out(rows.count, centroids.count, rows.dim);
  cuda::Queue queue;
  Array<char> packed(cuda::packed_centroid_bytes(centroids.count, rows.dim));
  {
    Array<char> workspace(cuda::packing_workspace(centroids));
    cuda::pack_centroids(queue, centroids, packed.get(), workspace.get());
  }
  Array<char> workspace(cuda::nearest_workspace(rows, centroids));
  cuda::nearest(queue, rows, guess, centroids, packed.get(), out.index.get(), out.score.get(),
                workspace.get());
  cuda::add_unit_rows(queue, out.moves(rows, guess));
  cuda::directions(queue, out.of_sums());
  expect(queue.error == cudaSuccess, "a launch");
  return out;
}

// Centroids `spread` from a common direction; the smaller it is, the more candidates there are.
void compare_nearest(int64_t n, int64_t k, int64_t dim, float spread) {
  std::mt19937 random(static_cast<unsigned>(n + k));
  std::normal_distribution<float> normal;
  Array<float> rows(n * dim), centroids(k * dim), common(dim);
  for (int64_t i = 0; i < common.size; ++i) common.data[i] = normal(random);
  for (int64_t i = 0; i < rows.size; ++i) rows.data[i] = i < dim ? 0.0f : normal(random);
  for (int64_t i = 0; i < centroids.size; ++i)
    centroids.data[i] = common.data[i % dim] + spread * normal(random);
  Array<int64_t> guess(n);
  for (int64_t i = 0; i < n; ++i) guess.data[i] = static_cast<int64_t>(random() % (k + 1)) - 1;

  const FloatRows all_rows{.data = rows.get(), .count = n, .dim = dim, .stride = dim};
  const FloatRows all_centroids{.data = centroids.get(), .count = k, .dim = dim, .stride = dim};
  Array<char> packed(cpu::packed_centroid_bytes(k, dim));
  cpu::pack_centroids(all_centroids, packed.get(), cpu::Serial());

  const std::string name =
      "nearest of " + std::to_string(n) + " x " + std::to_string(k) + " x " + std::to_string(dim);
  for (const uint64_t schedule : {0, 12345}) {
    const int64_t* given = schedule == 0 ? nullptr : guess.get();
    Found right(n, k, dim);
    cpu::nearest(all_rows, given, all_centroids, packed.get(), right.index.get(), right.score.get(),
                 cpu::Serial());
    cpu::add_unit_rows(right.moves(all_rows, given), cpu::Serial());
    cpu::directions(right.of_sums(), cpu::Serial());
    emulation::set_schedule(schedule);
    const Found out = found_on_gpu(all_rows, all_centroids, given);
    expect(same_array(out.index, right.index), name + ": index");
    expect(same_array(out.score, right.score), name + ": score");
    expect(same_array(out.sums, right.sums), name + ": sums");
    expect(same_array(out.counts, right.counts), name + ": counts");
    expect(same_array(out.directions, right.directions), name + ": directions");
  }
}

// ---- the candidates alone: lists that fill up, and are cleared of what is no longer near

// Centroids and rows on a circle, so that most tiles have something better, and windows of all sizes.
void compare_candidates() {
  using namespace unicom::cuda;
  const int64_t rows = 3 * kRowGranule, classes = 5 * kClassGranule, depth = 64, runs = 2;
  Array<uint16_t> units(rows * depth), centroids(classes * depth);
  Array<float> bias(classes), floor(rows), window(rows);
  auto point = [&](const Array<uint16_t>& to, int64_t i, double angle) {
    to.data[i * depth] = half_bits(std::cos(angle));
    to.data[i * depth + 1] = half_bits(std::sin(angle));
  };
  for (int64_t j = 0; j < classes; ++j) point(centroids, j, 1.5 * double(j) / double(classes));
  for (int64_t i = 0; i < rows; ++i) {
    point(units, i, 1.6 * double(i) / double(rows));
    floor.data[i] = i % 50 == 7 ? INFINITY : -INFINITY;  // rows that do not count
    window.data[i] = 0.0004f * static_cast<float>(i * 37 % 101);
  }
  struct Lists {
    Array<Candidate> candidates{runs * rows * kCandidates};
    Array<int32_t> count{runs * rows};
  };
  auto run = [&](int capability) {
    emulation::set_compute_capability(capability);
    emulation::set_schedule(12345);
    Lists out;
    Queue queue;
    find_candidates(queue, {.rows = reinterpret_cast<const Half*>(units.get()),
                            .floor = floor.get(),
                            .window = window.get(),
                            .packed = {.largest_norm = nullptr,
                                       .largest_lost = nullptr,
                                       .inverse_norm = nullptr,
                                       .mean = nullptr,
                                       .bias = bias.get(),
                                       .unit = reinterpret_cast<Half*>(centroids.get()),
                                       .classes = classes,
                                       .depth = depth},
                            .padded = rows,
                            .runs = runs,
                            .candidate = out.candidates.get(),
                            .count = out.count.get()});
    expect(queue.error == cudaSuccess, "candidates: a launch");
    return out;
  };
  const int64_t boxes = emulation::boxes_loaded();
  const Lists elsewhere = run(8);
  expect(emulation::boxes_loaded() == boxes, "candidates: kernels of every GPU");
  const Lists on_hopper = run(9);
  expect(emulation::boxes_loaded() > boxes, "candidates: kernels of Hopper");
  auto list = [&](const Lists& from, int64_t i) {
    const Candidate* begin = from.candidates.get() + i * kCandidates;
    std::vector<std::pair<int32_t, float>> sorted;
    for (int c = 0; c < from.count.data[i]; ++c) sorted.push_back({begin[c].index, begin[c].score});
    std::sort(sorted.begin(), sorted.end());
    return sorted;
  };
  int full = 0, cleared = 0;
  for (int64_t i = 0; i < runs * rows; ++i) {
    const bool too_many = elsewhere.count.data[i] > kCandidates;
    if (too_many != (on_hopper.count.data[i] > kCandidates) ||
        (!too_many && list(elsewhere, i) != list(on_hopper, i)))
      return expect(false, "candidates of row " + std::to_string(i % rows));
    full += too_many;
    // Candidates of tiles before the last that are not near the best of all were there once.
    if (too_many || i >= rows || floor.data[i] > 0) continue;
    double best = -INFINITY;
    int64_t came = 0;
    for (int64_t first = 0; first < 3 * kClassGranule; first += kClassGranule) {
      auto score = [&](int64_t j) {
        double sum = 0;
        for (int k = 0; k < 2; ++k)
          sum += double(emulation::half_to_float(units.data[i * depth + k])) *
                 emulation::half_to_float(centroids.data[j * depth + k]);
        return sum;
      };
      for (int64_t j = first; j < first + kClassGranule; ++j) best = std::max(best, score(j));
      for (int64_t j = first; j < first + kClassGranule; ++j)
        came += score(j) > best - window.data[i];
    }
    cleared += came > kCandidates + 4;
  }
  expect(full > 0 && cleared > 0, "candidates: lists that fill up, and that are cleared");
}

// ---- the logits alone, so that blocks go through several tiles of classes

struct LogitCase {
  int64_t batch, bound, count, depth, runs, width;
  double scale, filter;
};

// Rows of about unit length, as halves.
Array<uint16_t> unit_rows(std::mt19937& random, int64_t rows, int64_t depth) {
  std::normal_distribution<float> normal;
  Array<uint16_t> out(rows * depth);
  for (int64_t i = 0; i < out.size; ++i)
    out.data[i] = half_bits(normal(random) / std::sqrt(double(depth)));
  return out;
}

// Inputs of a case, and what comes of them in double precision.
struct LogitInputs {
  const LogitCase& c;
  int64_t rows, classes;
  double log2_scale;
  Array<uint16_t> embeddings, prototypes;
  Array<int64_t> slots;
  Array<double> cosines;  // [batch][classes], kNoCosine where there is no negative below the filter
  Array<double> sums, largest;
  Array<cuda::RowScale<float>> scales;

  explicit LogitInputs(const LogitCase& c_)
      : c(c_),
        rows(cuda::round_up(c.batch, cuda::kRowGranule)),
        classes(cuda::round_up(c.bound, cuda::kClassGranule)),
        log2_scale(c.scale / std::log(2.0)),
        embeddings(0),
        prototypes(0),
        slots(c.batch * c.width),
        cosines(c.batch * classes),
        sums(c.batch),
        largest(c.batch),
        scales(cuda::round_up(rows, cuda::kAttendedKeys)) {
    using cuda::kNoCosine;
    std::mt19937 random(static_cast<unsigned>(c.count));
    embeddings = unit_rows(random, rows, c.depth);
    prototypes = unit_rows(random, classes, c.depth);
    for (int64_t i = 0; i < slots.size; ++i)
      slots.data[i] = static_cast<int64_t>(random() % (c.count + 9)) - 9;  // negative: none here
    // Rows without gradient have an exponent that no exponential overflows (PrepareBackward).
    for (int64_t i = 0; i < scales.size; ++i)
      scales.data[i] = {0, static_cast<float>(std::ceil(log2_scale) + 1)};
    for (int64_t i = 0; i < c.batch; ++i) {
      largest.data[i] = kNoCosine;
      double* const row = cosines.get() + i * classes;
      for (int64_t j = 0; j < classes; ++j) {
        const int64_t* const own = slots.get() + i * c.width;
        row[j] = kNoCosine;
        if (j >= c.count || std::find(own, own + c.width, j) != own + c.width) continue;
        double cosine = 0;
        for (int64_t k = 0; k < c.depth; ++k) cosine += embedding(i, k) * prototype(j, k);
        largest.data[i] = std::max(largest.data[i], cosine);
        row[j] = cosine > c.filter ? kNoCosine : cosine;
        sums.data[i] += std::exp2(log2_scale * (cosine > c.filter ? 0 : cosine));
      }
      const double exponent = std::ceil(std::log2(sums.data[i]));
      scales.data[i] = {static_cast<float>(std::exp2(exponent) / sums.data[i]),
                        static_cast<float>(exponent)};
    }
  }
  double embedding(int64_t i, int64_t k) const {
    return emulation::half_to_float(embeddings.data[i * c.depth + k]);
  }
  double prototype(int64_t j, int64_t k) const {
    return emulation::half_to_float(prototypes.data[j * c.depth + k]);
  }
  // Of a class's exponential in its sample's sum.
  double share(int64_t i, int64_t j) const {
    const double cosine = cosines.data[i * classes + j];
    return cosine == cuda::kNoCosine ? 0 : std::exp2(log2_scale * cosine) / sums.data[i];
  }
  cuda::Logits logits() const {
    return {.embeddings = embeddings.get(),
            .prototypes = prototypes.get(),
            .order = cuda::ClassOrder::of<cuda::Half>(1),
            .rows = rows,
            .classes = classes,
            .depth = c.depth,
            .batch = c.batch,
            .positives = {.slots = slots.get(), .width = c.width},
            .count = &c.count,
            .bound = c.bound,
            .scale = c.scale,
            .filter = c.filter};
  }
  // Whether runs' sums are those of each row.
  void expect_sums(const Array<cuda::RowSum<float>>& out, const std::string& name) const {
    for (int64_t i = 0; i < c.batch; ++i) {
      double sum = 0, peak = cuda::kNoCosine;
      for (int64_t r = 0; r < c.runs; ++r) {
        const cuda::RowSum<float>& part = out.data[r * rows + i];
        if (part.sum > 0) sum += part.sum * std::exp2(double(part.exponent));
        peak = std::max(peak, double(part.largest));
      }
      const std::string of_row = name + ", row " + std::to_string(i);
      expect(std::fabs(sum / sums.data[i] - 1) < off(), of_row + ": sum");
      expect(std::fabs(peak - largest.data[i]) < 1e-6, of_row + ": largest cosine");
    }
  }
  double off() const { return 1e-6 * (c.scale + 3); }
};

struct LogitOutcome {
  Array<cuda::RowSum<float>> sums;
  Array<uint16_t> probabilities;
};

// Sums of exponentials and probabilities of all classes but those of the first tile, beside what
// they are in double precision.
void compare_logits(const LogitCase& c) {
  using namespace unicom::cuda;
  const LogitInputs in(c);
  const int64_t rows = in.rows, first = kClassGranule, chunk = in.classes - first;
  const std::string name = "logits of " + std::to_string(c.batch) + " x " +
                           std::to_string(c.count) + " x " + std::to_string(c.depth);
  const Logits logits = in.logits();
  auto run = [&](uint64_t schedule) {
    emulation::set_schedule(schedule);
    LogitOutcome out{Array<RowSum<float>>(c.runs * rows), Array<uint16_t>(rows * chunk)};
    Queue queue;
    sum_exp<Half>(queue, {.logits = logits,
                          .runs = c.runs,
                          .out = out.sums.get(),
                          .kept = nullptr,
                          .kept_classes = 0});
    probabilities<Half>(queue, {.logits = logits,
                                .first = first,
                                .chunk = chunk,
                                .kept = nullptr,
                                .kept_classes = 0,
                                .runs = c.runs,
                                .row = in.scales.get(),
                                .out = out.probabilities.get()});
    expect(queue.error == cudaSuccess, name + ": a launch");
    return out;
  };
  for (const int capability : {8, 9}) {
    emulation::set_compute_capability(capability);
    const int64_t boxes = emulation::boxes_loaded();
    const LogitOutcome in_order = run(0), out = run(12345);
    const std::string on = name + " on " + std::to_string(capability);
    expect((emulation::boxes_loaded() > boxes) == (capability == 9), on + ": which kernels run");
    expect(std::memcmp(out.sums.get(), in_order.sums.get(),
                       sizeof(RowSum<float>) * static_cast<size_t>(out.sums.size)) == 0 &&
               std::memcmp(out.probabilities.get(), in_order.probabilities.get(),
                           2 * static_cast<size_t>(out.probabilities.size)) == 0,
           on + ": two orders of the threads");
    in.expect_sums(out.sums, on);
    for (int64_t i = 0; i < c.batch; ++i) {
      const std::string of_row = on + ", row " + std::to_string(i);
      for (int64_t j = 0; j < std::min(chunk, round_up(c.count - first, kClassGranule)); ++j) {
        const double right = in.share(i, first + j) * UnitTraits<Half>::kProbabilityScale;
        const double got = emulation::half_to_float(out.probabilities.data[i * chunk + j]);
        if (std::fabs(got - right) > right * (1e-3 + in.off()) + 6e-8)
          return expect(false, of_row + ", class " + std::to_string(first + j) + ": " +
                                   std::to_string(got) + " for " + std::to_string(right));
      }
    }
  }
}

// Passes in the shape of attention alone: sums of exponentials, and both sums of unit rows by their
// probabilities, all samples alike, in chunks that begin at the first class.
void compare_attention(const LogitCase& c) {
  using namespace unicom::cuda;
  const LogitInputs in(c);
  const std::string name = "attention of " + std::to_string(c.batch) + " x " +
                           std::to_string(c.count) + " x " + std::to_string(c.depth);
  Array<int64_t> by_slot(in.slots.size);
  std::iota(by_slot.get(), by_slot.get() + by_slot.size, int64_t{0});
  std::stable_sort(by_slot.get(), by_slot.get() + by_slot.size,
                   [&](int64_t a, int64_t b) { return in.slots.data[a] < in.slots.data[b]; });
  struct AttentionOutcome {
    Array<RowSum<float>> sums;
    Array<float> of_rows, exponent, of_classes;
  };
  emulation::set_compute_capability(9);
  auto run = [&](uint64_t schedule) {
    emulation::set_schedule(schedule);
    AttentionOutcome out{Array<RowSum<float>>(c.runs * in.rows), Array<float>(in.rows * c.depth),
                         Array<float>(in.rows), Array<float>(in.classes * c.depth)};
    Array<float> attended(c.runs * in.rows * c.depth);
    Queue queue;
    attend_classes<Half>(queue, {.logits = in.logits(),
                                 .runs = c.runs,
                                 .sums = out.sums.get(),
                                 .attended = attended.get()});
    merge_attended(queue, {.rows = in.rows,
                           .depth = c.depth,
                           .runs = c.runs,
                           .sums = out.sums.get(),
                           .attended = attended.get(),
                           .out = out.of_rows.get(),
                           .exponent = out.exponent.get()});
    attend_samples<Half>(queue, {.logits = in.logits(),
                                 .first = 0,
                                 .chunk = in.classes,
                                 .by_slot = by_slot.get(),
                                 .row = in.scales.get(),
                                 .out = out.of_classes.get()});
    expect(queue.error == cudaSuccess, name + ": a launch");
    return out;
  };
  const AttentionOutcome in_order = run(0), out = run(12345);
  expect(std::memcmp(out.sums.get(), in_order.sums.get(),
                     sizeof(RowSum<float>) * static_cast<size_t>(out.sums.size)) == 0 &&
             same_bits(out.of_rows, in_order.of_rows) &&
             same_bits(out.of_classes, in_order.of_classes),
         name + ": two orders of the threads");
  in.expect_sums(out.sums, name);
  Array<double> of_classes(c.count * c.depth), size_of_classes(c.count * c.depth);
  const double off = 1e-3 + in.off();
  for (int64_t i = 0; i < c.batch; ++i)
    for (int64_t k = 0; k < c.depth; ++k) {
      double right = 0, size = 0;
      for (int64_t j = 0; j < c.count; ++j) {
        const double of_row = in.share(i, j) * in.prototype(j, k);
        const double of_class = in.share(i, j) * in.embedding(i, k);
        right += of_row;
        size += std::fabs(of_row);
        of_classes.data[j * c.depth + k] += of_class;
        size_of_classes.data[j * c.depth + k] += std::fabs(of_class);
      }
      const double got = out.of_rows.data[i * c.depth + k] *
                         std::exp2(double(out.exponent.data[i])) / in.sums.data[i];
      if (!(std::fabs(got - right) <= off * size))
        return expect(false, name + ", row " + std::to_string(i) + ": " + std::to_string(got) +
                                 " for " + std::to_string(right));
    }
  for (int64_t at = 0; at < of_classes.size; ++at) {
    const double got = out.of_classes.data[at] / UnitTraits<Half>::kProbabilityScale;
    if (!(std::fabs(got - of_classes.data[at]) <= off * size_of_classes.data[at] + 1e-10))
      return expect(false, name + ", class " + std::to_string(at / c.depth) + ": " +
                               std::to_string(got) + " for " + std::to_string(of_classes.data[at]));
  }
}

// ---- the products of backward alone, so that blocks go through several tiles and parts of the sum
// may be empty

struct ProductCase {
  int64_t rows, first, chunk, count, depth, splits;
  bool accumulate;
};

// Of both kinds of GPUs, which add in the same order, beside what they are in double precision.
void compare_products(const ProductCase& c, cuda::ProductOf of) {
  using namespace unicom::cuda;
  const bool of_embeddings = of == ProductOf::kEmbeddings;
  const std::string name = std::string("product of ") +
                           (of_embeddings ? "embeddings " : "prototypes ") +
                           std::to_string(c.rows) + " x " + std::to_string(c.count) + " x " +
                           std::to_string(c.depth) + " in " + std::to_string(c.splits);
  std::mt19937 random(static_cast<unsigned>(c.count));
  std::uniform_real_distribution<float> uniform(0, 8);
  // As probabilities leave it: zeros up to the end of the last tile of classes, and behind it NaN.
  const int64_t valid = std::clamp<int64_t>(c.count - c.first, 0, c.chunk);
  const int64_t written = round_up(valid, kClassGranule);
  constexpr uint16_t kNan = 0x7fff;
  Array<uint16_t> p(c.rows * c.chunk);
  for (int64_t i = 0; i < p.size; ++i) {
    const int64_t j = i % c.chunk;
    p.data[i] = j < valid ? half_bits(uniform(random)) : j < written ? uint16_t{0} : kNan;
  }
  const Array<uint16_t> operand = unit_rows(random, of_embeddings ? c.chunk : c.rows, c.depth);
  // What all parts have for results that have a sum.
  const int64_t out_rows = of_embeddings ? c.rows : c.chunk;
  const int64_t sum_rows = of_embeddings ? c.rows : written;
  Array<float> before(c.splits * out_rows * c.depth);
  for (int64_t i = 0; i < before.size; ++i) before.data[i] = c.accumulate ? uniform(random) : NAN;
  Array<double> right(sum_rows * c.depth), size(sum_rows * c.depth);
  auto value = [](const Array<uint16_t>& a, int64_t i) {
    return double(emulation::half_to_float(a.data[i]));
  };
  for (int64_t i = 0; i < right.size; ++i) {
    const int64_t row = i / c.depth, col = i % c.depth;
    for (int64_t k = 0; k < (of_embeddings ? valid : c.rows); ++k) {
      const double term = value(p, of_embeddings ? row * c.chunk + k : k * c.chunk + row) *
                          value(operand, k * c.depth + col);
      right.data[i] += term;
      size.data[i] += std::fabs(term);
    }
    for (int64_t part = 0; c.accumulate && part < c.splits; ++part)
      right.data[i] += before.data[part * out_rows * c.depth + i];
  }
  auto run = [&](int capability, uint64_t schedule) {
    emulation::set_compute_capability(capability);
    emulation::set_schedule(schedule);
    Array<float> out(before.size);
    std::copy_n(before.get(), before.size, out.get());
    Queue queue;
    product<Half>(queue, {.of = of,
                          .probabilities = p.get(),
                          .operand = operand.get(),
                          .rows = c.rows,
                          .chunk = c.chunk,
                          .depth = c.depth,
                          .order = ClassOrder::of<Half>(1),
                          .count = &c.count,
                          .bound = c.first + c.chunk,
                          .first = c.first,
                          .splits = c.splits,
                          .accumulate = c.accumulate,
                          .out = out.get()});
    expect(queue.error == cudaSuccess, name + ": a launch");
    return out;
  };
  const int64_t boxes = emulation::boxes_loaded();
  const Array<float> out = run(9, 0), other_order = run(9, 12345);
  const int64_t boxes_on_hopper = emulation::boxes_loaded();
  const Array<float> other_kind = run(8, 12345);
  const bool some = valid > 0;  // else there is nothing to load
  expect((boxes_on_hopper > boxes) == some && emulation::boxes_loaded() == boxes_on_hopper,
         name + ": which kernels run");
  for (int64_t i = 0; i < right.size; ++i) {
    double sum = 0;
    for (int64_t part = 0; part < c.splits; ++part) {
      const int64_t at = part * out_rows * c.depth + i;
      if (out.data[at] != other_order.data[at])
        return expect(false, name + ": two orders of the threads");
      if ((of_embeddings || i < valid * c.depth) && out.data[at] != other_kind.data[at])
        return expect(false, name + ": two kinds of GPUs");
      sum += out.data[at];
    }
    if (!(std::fabs(sum - right.data[i]) <= 2e-6 * (size.data[i] + 8 * c.splits)))
      return expect(false, name + ", result " + std::to_string(i) + ": " + std::to_string(sum) +
                               " for " + std::to_string(right.data[i]));
  }
  // What is behind the count stays as it was.
  for (int64_t part = 0; part < c.splits; ++part) {
    const size_t bytes = sizeof(float) * static_cast<size_t>((out_rows - sum_rows) * c.depth);
    const int64_t at = (part * out_rows + sum_rows) * c.depth;
    expect(std::memcmp(out.get() + at, before.get() + at, bytes) == 0, name + ": behind the count");
  }
}

}  // namespace
}  // namespace unicom

int main() {
  using namespace unicom;
  compare_selections(1000, 100, 33, 0, 1000);
  compare_selections(1000, 100, 33, 255, 700);
  compare_selections(513, 513, 4, 0, 513);
  compare_selections(300, 7, 0, 10, 10);
  compare_selections(270000, 3000, 300, 0, 270000);
  for (int64_t dim : {1, 2, 64, 1000}) {
    Array<int64_t> a((dim + 1) / 2), b((dim + 1) / 2);
    const int64_t step = 8;
    FeatureSelection selection{
        .dim = dim, .count = a.size, .seed = 1, .step = &step, .out = a.get()};
    cpu::select_features(selection);
    cuda::Queue queue;
    selection.out = b.get();
    cuda::select_features(queue, selection);
    expect(std::memcmp(a.get(), b.get(), sizeof(int64_t) * static_cast<size_t>(a.size)) == 0,
           "features of " + std::to_string(dim));
  }
  for (const int capability : {8, 9}) {
    emulation::set_compute_capability(capability);
    compare_nearest(1, 1, 1, 1);
    compare_nearest(129, 257, 7, 1);
    compare_nearest(3, 300, 9, 1e-7f);
    emulation::set_shared_limit(99 << 10);
    compare_nearest(5, 513, 66, 1e-3f);
    emulation::set_shared_limit(227 << 10);
  }
  compare_candidates();
  constexpr double kNone = std::numeric_limits<double>::infinity();
  compare_logits({1, 700, 513, 64, 1, 1, 64, kNone});
  compare_logits({130, 1300, 1200, 64, 1, 1, 64, 0.2});
  compare_logits({129, 1025, 1025, 256, 2, 3, 16, kNone});
  compare_logits({65, 800, 769, 384, 1, 0, 300, kNone});
  compare_logits({150, 600, 599, 576, 1, 1, 64, 0.05});
  compare_attention({130, 1300, 1200, 64, 1, 1, 64, 0.2});
  compare_attention({650, 160, 150, 64, 1, 3, 30, kNone});
  compare_attention({257, 640, 640, 128, 1, 0, 300, kNone});
  compare_attention({400, 512, 500, 256, 2, 2, 64, kNone});
  const ProductCase products[] = {
      {128, 0, 256, 256, 64, 1, false},   {128, 256, 512, 513, 128, 1, true},
      {256, 0, 512, 300, 192, 2, false},  {384, 256, 256, 300, 256, 1, true},
      {1280, 0, 256, 255, 64, 4, false},  {128, 256, 1280, 1100, 64, 2, true},
      {128, 0, 512, 1, 512, 2, false},    {128, 512, 256, 400, 64, 1, true},
      {128, 512, 256, 400, 64, 1, false},
  };
  for (const ProductCase& c : products)
    for (const auto of : {cuda::ProductOf::kEmbeddings, cuda::ProductOf::kPrototypes})
      compare_products(c, of);
  compare_updates(50, 1, 7);
  compare_updates(9, 35, 70);
  compare_updates(300, 132, 40);
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
  for (const Case& c : cases) {
    const Inputs in(c);
    const Outcome right = on_cpu(in);
    const std::string name = std::to_string(c.batch) + " x " + std::to_string(c.num_classes) +
                             " x " + std::to_string(c.dim) + ", " + std::to_string(c.positives);
    compare(in, Precision::kFp32, right, 2e-7, name + " float");
    for (const int capability : {8, 9}) {
      emulation::set_compute_capability(capability);
      const std::string on = name + " on " + std::to_string(capability);
      compare(in, Precision::kFp16, right, 1e-3, on + " half");
      compare(in, Precision::kBf16, right, 1e-2, on + " bfloat");
    }
    compare(in, Precision::kFp16, right, 1e-3, name + " half by attention", true);
    compare(in, Precision::kBf16, right, 1e-2, name + " bfloat by attention", true);
  }
  std::printf(failed ? "FAILED\n" : "all the same\n");
  return failed ? 1 : 0;
}
