// Selections of classes and dimensions, and updates of rows.
#include "sanitized.h"

#include <random>

#include "../../csrc/core/sampler.h"
#include "../../csrc/cpu/host/row_updates.h"
#include "../../csrc/cpu/host/select.h"
#include "../../csrc/cuda/kernels/row_updates.h"
#include "../../csrc/cuda/kernels/select.h"

namespace unicom {

namespace {

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

}  // namespace

void check_rows() {
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
  compare_updates(50, 1, 7);
  compare_updates(9, 35, 70);
  compare_updates(300, 132, 40);
}

}  // namespace unicom
