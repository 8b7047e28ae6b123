// Runs the CUDA backend over its emulation beside the CPU backend, on sizes around every granule,
// without torch: under sanitizers, and in two orders of the threads, whose results must be the same
// bit for bit. Prints what differs and ends with 1.
#include "cuda_emulation.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/host/loss.h"
#include "../../csrc/cpu/host/nearest.h"
#include "../../csrc/cpu/host/row_updates.h"
#include "../../csrc/cpu/host/select.h"
#include "../../csrc/cuda/host/loss.h"
#include "../../csrc/cuda/host/nearest.h"
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

struct Case {
  int64_t batch, num_classes, dim, sampled, features;
  double scale;
  bool compact;
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
  Array<uint16_t> feature_bits;
  int64_t count, bound;

  explicit Inputs(const Case& c_)
      : c(c_),
        embeddings(c.batch * c.dim),
        prototypes(c.num_classes * c.dim),
        labels(c.batch),
        class_index(selection_bound(c.num_classes, c.sampled, c.batch, 0, c.num_classes)),
        slot(c.batch),
        feature_index(c.features),
        feature_bits((c.dim + 15) / 16),
        bound(class_index.size) {
    std::mt19937 random(static_cast<unsigned>(c.batch * 31 + c.num_classes));
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < embeddings.size; ++i) embeddings.data[i] = normal(random);
    for (int64_t i = 0; i < prototypes.size; ++i) prototypes.data[i] = normal(random);
    for (int64_t i = 0; i < c.batch; ++i)
      labels.data[i] = i % 7 == 3 ? -100 : static_cast<int64_t>(random() % (c.num_classes / 2 + 1));
    count = select_classes(labels.get(), c.batch, c.num_classes, c.sampled, 5, 9, -100, 0,
                           c.num_classes, class_index.get(), slot.get(), Serial());
    for (int64_t j = count; j < bound; ++j)
      class_index.data[j] = count > 0 ? class_index.data[count - 1] : 0;
    select_features(c.dim, c.features, 5, 9, feature_index.get());
    for (int64_t k = 0; k < c.features; ++k) {
      const int64_t column = feature_index.data[k];
      feature_bits.data[column / 16] |= static_cast<uint16_t>(1 << column % 16);
    }
  }
  RowSource source(const Array<float>& rows) const {
    return {rows.get(),          DType::kFloat32, c.dim,
            feature_index.get(), c.features,      feature_bits.get()};
  }
  RowSink sink(const Array<float>& rows) const {
    return {rows.get(), DType::kFloat32, c.dim, feature_index.get(), c.features};
  }
  Outcome outcome() const {
    return {Array<double>(c.batch), Array<float>(c.batch * c.dim),
            Array<float>((c.compact ? bound : c.num_classes) * c.dim)};
  }
};

const MarginOptions kMargin{1.0, 0.3, 0.05, nullptr, nullptr, false, false};

Outcome on_cpu(const Inputs& in) {
  Outcome out = in.outcome();
  const Problem p{in.source(in.embeddings),
                  in.c.batch,
                  in.source(in.prototypes),
                  in.class_index.get(),
                  in.count,
                  in.slot.get(),
                  in.c.scale,
                  0.4,
                  in.count,
                  cpu::Rounding::kNone,
                  0};
  Array<double> sums(5 * in.c.batch);
  Array<SampleState> state(in.c.batch);
  Array<char> packed(packed_bytes(in.bound, in.c.features, 4));
  double* s = sums.get();
  const int64_t b = in.c.batch;
  const ShardSums shard{s, s + b, s + 2 * b, s + 3 * b, s + 4 * b, 1, packed.get(), nullptr};
  forward<float>(p, shard, Serial());
  merge(kMargin, in.c.scale, b, in.slot.get(), shard, out.loss.get(), state.get());
  Array<double> weight(b);
  for (int64_t i = 0; i < b; ++i) weight.data[i] = in.slot.data[i] == kIgnoredSlot ? 0 : 1;
  backward<float>(p,
                  {state.get(), packed.get(), nullptr, weight.get(), in.sink(out.grad_embeddings),
                   in.sink(out.grad_prototypes), in.c.compact},
                  Serial());
  return out;
}

// take: the prototypes' gradient is handed over in pieces, as for an update inside backward.
template <class Unit>
Outcome on_gpu(const Inputs& in, int64_t workspace_bytes, bool take) {
  using namespace unicom::cuda;
  Outcome out = in.outcome();
  Queue queue;
  const int64_t b = in.c.batch;
  const cuda::Problem p{in.source(in.embeddings),
                        b,
                        in.source(in.prototypes),
                        in.class_index.get(),
                        &in.count,
                        in.bound,
                        in.slot.get(),
                        in.c.scale,
                        0.4,
                        in.bound,
                        kept_classes<Unit>(in.bound, b, workspace_bytes)};
  Array<double> sums(5 * b);
  Array<SampleState> state(b);
  Array<char> packed(cuda::packed_bytes(in.bound, in.c.features, sizeof(Unit)));
  Array<char> kept(kept_bytes<Unit>(p.kept_classes, b));
  double* s = sums.get();
  {
    Array<char> workspace(forward_workspace<Unit>(p));
    forward<Unit>(queue, p,
                  {s, s + b, 1, s + 2 * b, s + 3 * b, s + 4 * b, packed.get(), kept.get()},
                  workspace.get());
  }
  join_targets(queue, {kMargin, in.c.scale, b, in.slot.get(), s, s + b, 1, s + 2 * b, s + 4 * b,
                       out.loss.get(), state.get()});
  const float upstream = 1.0f;
  const int64_t dim = in.c.dim;
  const TakeRows take_rows = [&](Queue&, const GradientRows& part) {
    for (int64_t j = 0; j < part.count && part.first + j < in.count; ++j) {
      const int64_t slot = part.first + j, row = in.c.compact ? slot : in.class_index.data[slot];
      std::copy_n(static_cast<const float*>(part.rows) + j * dim, dim,
                  out.grad_prototypes.get() + row * dim);
    }
  };
  Gradients gradients{&upstream,
                      Reduction::kSum,
                      state.get(),
                      packed.get(),
                      kept.get(),
                      in.sink(out.grad_embeddings),
                      in.sink(out.grad_prototypes),
                      in.c.compact,
                      take ? &take_rows : nullptr,
                      dim};
  if (take) gradients.prototypes.data = nullptr;
  Array<char> workspace(backward_workspace<Unit>(p, gradients));
  backward<Unit>(queue, p, gradients, workspace.get());
  return out;
}

template <class Unit>
void compare(const Inputs& in, const Outcome& right, double tolerance, const std::string& name) {
  emulation::set_schedule(0);
  const Outcome in_order = on_gpu<Unit>(in, 0, false);
  // Nothing of this may be seen in the result: the order of the threads, kept cosines, less shared
  // memory, gradients in pieces.
  emulation::set_schedule(12345);
  emulation::set_shared_limit(99 << 10);
  const Outcome out = on_gpu<Unit>(in, 1 << 18, true);
  emulation::set_shared_limit(227 << 10);
  expect(same_bits(out.grad_embeddings, in_order.grad_embeddings) &&
             same_bits(out.grad_prototypes, in_order.grad_prototypes),
         name + ": two ways to the same bits");
  for (int64_t i = 0; i < in.c.batch; ++i)
    expect(std::fabs(out.loss.data[i] - right.loss.data[i]) <=
               in.c.scale * tolerance * (1 + right.loss.data[i] / 64),
           name + ": loss of sample " + std::to_string(i));
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
  const int64_t selected =
      select_classes(labels.get(), batch, num_classes, count, int64_t{3}, int64_t{4}, -100, start,
                     stop, ids.get(), slot.get(), Serial());
  const cuda::Labels described{labels.get(), true, batch, num_classes, -100, start, stop};
  const int64_t step = 4;
  int64_t gpu_selected = -1;
  cuda::Queue queue;
  Array<uint64_t> workspace(cuda::selection_workspace(described));
  cuda::select_classes(queue, {described, count, 3, &step, bound, gpu_ids.get(), &gpu_selected,
                               gpu_slot.get(), workspace.get()});
  bool same = selected == gpu_selected;
  for (int64_t j = 0; same && j < selected; ++j) same = ids.data[j] == gpu_ids.data[j];
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

const AdamWOptions kAdamW{0.01, 0.9, 0.999, 1e-8, false};
const SgdOptions kSgd{0.01, 0.9, 0.1, true, false};

RowOutcome updated_on_cpu(const RowInputs& in) {
  RowOutcome out(in);
  const MergedRows merged(in.ids.get(), in.count);
  Array<int64_t> ids(merged.count());
  Array<float> rows(merged.count() * in.dim);
  const RowGradient gradient{
      ids.get(), merged.count(), {rows.get(), DType::kFloat32, in.dim}, in.dim};
  merged.write({in.ids.get(), in.count, {in.rows.get(), DType::kFloat32, in.dim}, in.dim},
               ids.get(), gradient.rows, Serial());
  auto array = [&](const Array<float>& values) {
    return RowArray{values.get(), DType::kFloat32, in.dim};
  };
  RowAdamW adamw;
  adamw.options = kAdamW;
  adamw.parameter = array(out.parameter);
  adamw.first = array(out.first);
  adamw.second = array(out.second);
  adamw.second_per_row = false;
  adamw.row_step = out.row_step.get();
  adamw.log_decay = out.log_decay.get();
  adamw.total_log_decay = -0.01;
  adamw.dim = in.dim;
  update_rows(adamw, gradient, Serial());
  const auto missed = missed_transitions(in.steps.get(), in.steps.size);
  RowSgd sgd;
  sgd.options = kSgd;
  sgd.parameter = array(out.parameter);
  sgd.buffer = array(out.first);
  sgd.last_step = out.last_step.get();
  sgd.missed = missed.data();
  sgd.now = in.steps.size + 1;
  sgd.dim = in.dim;
  update_rows(sgd, gradient, Serial());
  return out;
}

RowOutcome updated_on_gpu(const RowInputs& in) {
  RowOutcome out(in);
  cuda::Queue queue;
  Array<int64_t> keys(in.count), order(in.count), sorted(in.count), ids(in.count);
  Array<float> rows(in.count * in.dim);
  cuda::Merge merge{in.ids.get(), in.rows.get(), DType::kFloat32, in.count,  in.dim,
                    keys.get(),   order.get(),   ids.get(),       rows.get()};
  give_keys(queue, merge);
  std::iota(order.get(), order.get() + in.count, int64_t{0});
  std::stable_sort(order.get(), order.get() + in.count,
                   [&](int64_t a, int64_t b) { return keys.data[a] < keys.data[b]; });
  for (int64_t j = 0; j < in.count; ++j) sorted.data[j] = keys.data[order.data[j]];
  merge.keys = sorted.get();
  add_equal(queue, merge);
  const cuda::SparseRows gradient{ids.get(), rows.get(), in.count, in.dim, in.num_rows};
  auto array = [&](const Array<float>& values) {
    return cuda::Rows{values.get(), DType::kFloat32, in.dim};
  };
  Array<char> adamw_space(cuda::adamw_workspace(in.count, DType::kFloat32));
  update_rows(queue, cuda::AdamWUpdate{gradient, kAdamW, array(out.parameter), array(out.first),
                                       array(out.second), false, out.row_step.get(),
                                       out.log_decay.get(), -0.01, adamw_space.get()});
  Array<char> sgd_space(cuda::sgd_workspace(in.count, in.steps.size, DType::kFloat32));
  update_rows(queue, cuda::SgdUpdate{gradient, kSgd, array(out.parameter), array(out.first),
                                     nullptr, 0, 0, out.last_step.get(), in.steps.get(),
                                     in.steps.size, in.steps.size + 1, sgd_space.get()});
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
  Array<int64_t> index, counts;
  Array<float> score;
  Array<double> sums;
  Found(int64_t n, int64_t k, int64_t dim) : index(n), counts(k), score(n), sums(k * dim) {}
};

template <class T>
bool same_array(const Array<T>& a, const Array<T>& b) {
  return std::memcmp(a.get(), b.get(), sizeof(T) * static_cast<size_t>(a.size)) == 0;
}

Found found_on_gpu(const cuda::FloatRows& rows, const cuda::FloatRows& centroids,
                   const int64_t* guess) {
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
  Array<int64_t> key(rows.count), order(rows.count);
  std::iota(order.get(), order.get() + rows.count, int64_t{0});
  std::stable_sort(order.get(), order.get() + rows.count,
                   [&](int64_t a, int64_t b) { return out.index.data[a] < out.index.data[b]; });
  for (int64_t j = 0; j < rows.count; ++j) key.data[j] = out.index.data[order.data[j]];
  Array<double> inverse_norm(rows.count);
  cuda::inverse_norms(queue, {rows, inverse_norm.get()});
  cuda::add_unit_rows(queue, {rows, inverse_norm.get(), key.get(), order.get(), centroids.count,
                              out.sums.get(), out.counts.get()});
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

  const Rows cpu_rows{rows.get(), n, dim, dim}, cpu_centroids{centroids.get(), k, dim, dim};
  Found right(n, k, dim);
  Array<char> packed(packed_centroid_bytes(k, dim));
  pack_centroids(cpu_centroids, packed.get(), Serial());
  nearest(cpu_rows, nullptr, cpu_centroids, packed.get(), right.index.get(), right.score.get(),
          Serial());
  add_unit_rows(cpu_rows, right.index.get(), k, right.sums.get(), right.counts.get(), Serial());

  const std::string name =
      "nearest of " + std::to_string(n) + " x " + std::to_string(k) + " x " + std::to_string(dim);
  for (const uint64_t schedule : {0, 12345}) {
    emulation::set_schedule(schedule);
    const Found out = found_on_gpu({rows.get(), n, dim, dim}, {centroids.get(), k, dim, dim},
                                   schedule == 0 ? nullptr : guess.get());
    expect(same_array(out.index, right.index), name + ": index");
    expect(same_array(out.score, right.score), name + ": score");
    expect(same_array(out.sums, right.sums), name + ": sums");
    expect(same_array(out.counts, right.counts), name + ": counts");
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
    select_features(dim, a.size, 1, 8, a.get());
    cuda::Queue queue;
    cuda::select_features(queue, {dim, b.size, 1, &step, b.get()});
    expect(std::memcmp(a.get(), b.get(), sizeof(int64_t) * static_cast<size_t>(a.size)) == 0,
           "features of " + std::to_string(dim));
  }
  compare_nearest(1, 1, 1, 1);
  compare_nearest(129, 257, 7, 1);
  compare_nearest(3, 300, 9, 1e-7f);
  emulation::set_shared_limit(99 << 10);
  compare_nearest(5, 513, 66, 1e-3f);
  emulation::set_shared_limit(227 << 10);
  compare_updates(50, 1, 7);
  compare_updates(9, 35, 70);
  compare_updates(300, 132, 40);
  const Case cases[] = {
      {1, 2, 1, 1, 1, 16, false},
      {7, 65, 17, 30, 9, 64, true},
      {129, 300, 70, 257, 65, 30, true},
      {3, 151, 300, 20, 256, 200, false},
  };
  for (const Case& c : cases) {
    const Inputs in(c);
    const Outcome right = on_cpu(in);
    const std::string name = std::to_string(c.batch) + " x " + std::to_string(c.num_classes) +
                             " x " + std::to_string(c.dim);
    compare<float>(in, right, 2e-7, name + " float");
    compare<cuda::Half>(in, right, 1e-3, name + " half");
    compare<cuda::BFloat>(in, right, 1e-2, name + " bfloat");
  }
  std::printf(failed ? "FAILED\n" : "all the same\n");
  return failed ? 1 : 0;
}
