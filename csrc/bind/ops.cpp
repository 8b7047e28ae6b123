// The torch operators, through torch's stable ABI: one binary loads in every torch >= 2.11.
//
// Each operator is functional (it writes only tensors it returns), checks everything it is given
// before it touches memory, and hands plain pointers to the engine. Autograd and fake kernels are
// registered from Python (unicom_ext/functional.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>

#include "../engine/buffers.h"
#include "../engine/engine.h"
#include "../engine/selection.h"

namespace unicom {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// std::invalid_argument reaches Python as a ValueError.
template <class... Parts>
void check(bool good, const Parts&... parts) {
  if (good) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// Torch's own threads; items are handed out one by one, so uneven ones balance.
struct TorchParallel final : Parallel {
  int threads() const override { return static_cast<int>(torch::stable::get_num_threads()); }
  void run(int64_t items, const std::function<void(int64_t)>& body) const override {
    const int64_t workers = std::min<int64_t>(items, threads());
    std::atomic<int64_t> next{0};
    std::exception_ptr failure;
    std::atomic<bool> failed{false};
    auto work = [&](int64_t, int64_t) {
      try {
        for (int64_t i; (i = next.fetch_add(1)) < items;) body(i);
      } catch (...) {  // out of memory: stop all, then raise on the caller's thread
        next.store(items);
        if (!failed.exchange(true)) failure = std::current_exception();
      }
    };
    if (workers <= 1)
      work(0, 1);
    else
      torch::stable::parallel_for(0, workers, 1, work);
    if (failure) std::rethrow_exception(failure);
  }
};

cpu::DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return cpu::DType::kFloat32;
    case ScalarType::Double: return cpu::DType::kFloat64;
    case ScalarType::BFloat16: return cpu::DType::kBFloat16;
    case ScalarType::Half: return cpu::DType::kFloat16;
    default:
      check(false, name, " must be float32, float64, bfloat16 or float16, got ",
            torch::headeronly::toString(tensor.scalar_type()));
  }
  return {};
}

Tensor empty_like_device(const Tensor& like, std::initializer_list<int64_t> sizes,
                         ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes), dtype);
}

// A tensor whose memory comes from the pool and goes back to it.
Tensor pooled(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype,
              int64_t bytes_per_value) {
  int64_t strides[2] = {1, 1}, count = 1;
  check(sizes.size() <= 2, "pooled tensors have at most two dimensions");
  for (int64_t size : sizes) count *= size;
  if (sizes.size() == 2) strides[0] = *(sizes.begin() + 1);
  void* block = acquire_block(static_cast<size_t>(count * bytes_per_value));
  return torch::stable::from_blob(block, torch::headeronly::IntHeaderOnlyArrayRef(sizes),
                                  torch::headeronly::IntHeaderOnlyArrayRef(strides, sizes.size()),
                                  like.device(), dtype, [](void* data) { release_block(data); });
}

int64_t value_bytes(cpu::DType dtype) {
  return dtype == cpu::DType::kFloat64 ? 8 : dtype == cpu::DType::kFloat32 ? 4 : 2;
}

void check_matrix(const Tensor& tensor, const char* name) {
  check(tensor.dim() == 2, name, " must be a matrix, got ", tensor.dim(), " dimensions");
}

void check_vector(const Tensor& tensor, const char* name, int64_t size, ScalarType dtype) {
  check(tensor.dim() == 1 && tensor.size(0) == size && tensor.scalar_type() == dtype, name,
        " must be ", torch::headeronly::toString(dtype), " of shape [", size, "]");
}

const int64_t* index_data(const Tensor& index) { return index.const_data_ptr<int64_t>(); }

// ---- selection
// -------------------------------------------------------------------------------------

template <class F>
auto with_labels(const Tensor& labels, const F& f) {
  check(labels.dim() == 1, "labels must be a vector, got ", labels.dim(), " dimensions");
  if (labels.scalar_type() == ScalarType::Int) return f(labels.const_data_ptr<int32_t>());
  check(labels.scalar_type() == ScalarType::Long, "labels must be int32 or int64, got ",
        torch::headeronly::toString(labels.scalar_type()));
  return f(labels.const_data_ptr<int64_t>());
}

template <class Label>
void check_labels(const Label* labels, int64_t batch, int64_t num_classes, int64_t ignore_index) {
  const int64_t bad = find_bad_label(labels, batch, num_classes, ignore_index);
  check(bad < 0, "labels must be in [0, ", num_classes, ") or ignore_index (", ignore_index,
        "), got ", bad < 0 ? 0 : static_cast<int64_t>(labels[bad]), " at position ", bad);
}

std::tuple<Tensor, Tensor, Tensor> select_classes_op(Tensor labels, Tensor step,
                                                     int64_t num_classes, int64_t num_sampled,
                                                     int64_t seed, int64_t ignore_index,
                                                     int64_t start, int64_t stop) {
  labels = torch::stable::contiguous(labels);
  check(num_classes >= 1, "num_classes must be at least 1, got ", num_classes);
  check(num_sampled >= 1 && num_sampled <= num_classes, "num_sampled must be in [1, ", num_classes,
        "], got ", num_sampled);
  check(0 <= start && start <= stop && stop <= num_classes,
        "start and stop must satisfy 0 <= start <= stop <= ", num_classes, ", got ", start, " and ",
        stop);
  check(step.numel() == 1 && step.scalar_type() == ScalarType::Long,
        "step must be one int64 value");
  const int64_t batch = labels.numel();
  const int64_t bound = std::min(selection_bound(num_classes, num_sampled, batch), stop - start);
  return with_labels(labels, [&](const auto* data) {
    check_labels(data, batch, num_classes, ignore_index);
    Tensor class_index = empty_like_device(labels, {bound}, ScalarType::Long);
    Tensor count = empty_like_device(labels, {}, ScalarType::Long);
    Tensor slot = empty_like_device(labels, {batch}, ScalarType::Long);
    int64_t* ids = class_index.mutable_data_ptr<int64_t>();
    const int64_t selected =
        select_classes(data, batch, num_classes, num_sampled, seed, *index_data(step), ignore_index,
                       start, stop, ids, slot.mutable_data_ptr<int64_t>(), TorchParallel());
    std::fill(ids + selected, ids + bound, selected > 0 ? ids[selected - 1] : 0);
    *count.mutable_data_ptr<int64_t>() = selected;
    return std::make_tuple(class_index, count, slot);
  });
}

Tensor select_features_op(Tensor step, int64_t dim, int64_t num_selected, int64_t seed) {
  check(num_selected >= 1 && num_selected <= dim, "num_selected must be in [1, ", dim, "], got ",
        num_selected);
  check(step.numel() == 1 && step.scalar_type() == ScalarType::Long,
        "step must be one int64 value");
  Tensor out = empty_like_device(step, {num_selected}, ScalarType::Long);
  select_features(dim, num_selected, seed, *index_data(step), out.mutable_data_ptr<int64_t>());
  return out;
}

// Position of each label among the class ids (all of them, or an ascending list), -1 where ignored.
Tensor label_slots_op(Tensor labels, std::optional<Tensor> class_index, int64_t num_classes,
                      int64_t ignore_index) {
  labels = torch::stable::contiguous(labels);
  const int64_t batch = labels.numel();
  const int64_t* ids = nullptr;
  int64_t count = 0;
  if (class_index) {
    check(class_index->dim() == 1 && class_index->scalar_type() == ScalarType::Long,
          "class_index must be an int64 vector, got ",
          torch::headeronly::toString(class_index->scalar_type()), " with ", class_index->dim(),
          " dimensions");
    class_index = torch::stable::contiguous(*class_index);
    ids = index_data(*class_index);
    count = class_index->numel();
    for (int64_t j = 0; j < count; ++j)
      check(ids[j] >= 0 && ids[j] < num_classes && (j == 0 || ids[j - 1] < ids[j]),
            "class_index must hold sorted unique ids in [0, ", num_classes, "), got ", ids[j],
            " at position ", j);
  }
  return with_labels(labels, [&](const auto* data) {
    check_labels(data, batch, num_classes, ignore_index);
    Tensor slot = empty_like_device(labels, {batch}, ScalarType::Long);
    int64_t* out = slot.mutable_data_ptr<int64_t>();
    for (int64_t i = 0; i < batch; ++i) {
      const int64_t label = data[i];
      if (label == ignore_index) {
        out[i] = -1;
      } else if (ids == nullptr) {
        out[i] = label;
      } else {
        const int64_t* found = std::lower_bound(ids, ids + count, label);
        check(found != ids + count && *found == label, "class_index must hold every label, but ",
              label, " at position ", i, " of labels is not in it");
        out[i] = found - ids;
      }
    }
    return slot;
  });
}

// ---- the loss
// ---------------------------------------------------------------------------------------

enum class Precision : int64_t { kFp32, kFp16, kBf16 };
enum class Reduction : int64_t { kNone, kMean, kSum };

// Everything the operators share, checked; keeps the tensors alive that Problem points into.
struct Call {
  Tensor embeddings, prototypes, slot;
  std::optional<Tensor> class_index, feature_index, m2, m3;
  Problem problem;
  bool is_double;
  Precision precision;

  Call(const Tensor& embeddings_in, const Tensor& slot_in, const Tensor& prototypes_in,
       const std::optional<Tensor>& class_index_in, const std::optional<Tensor>& count,
       const std::optional<Tensor>& feature_index_in, const std::optional<Tensor>& m2_in,
       const std::optional<Tensor>& m3_in, double m1, double m2_value, double m3_value,
       double scale, double filter, bool exact_margin_grad, bool linear_beyond_pi,
       int64_t precision_in, int64_t workspace_bytes)
      : embeddings(rows(embeddings_in, "embeddings")),
        prototypes(rows(prototypes_in, "prototypes")),
        slot(torch::stable::contiguous(slot_in)),
        class_index(class_index_in),
        feature_index(feature_index_in),
        m2(m2_in),
        m3(m3_in),
        precision(static_cast<Precision>(precision_in)) {
    const int64_t batch = embeddings.size(0), dim = embeddings.size(1);
    const int64_t num_classes = prototypes.size(0);
    check(prototypes.size(1) == dim, "prototypes must be [C, ", dim, "] like the embeddings, got [",
          num_classes, ", ", prototypes.size(1), "]");
    check_vector(slot, "slot", batch, ScalarType::Long);
    check(precision_in >= 0 && precision_in <= 2, "precision must be 0, 1 or 2, got ",
          precision_in);
    check(scale > 0 && scale < std::numeric_limits<double>::infinity(),
          "scale must be a finite number > 0, got ", scale);

    problem.sampled = num_classes;
    problem.class_index = nullptr;
    if (class_index) {
      check(class_index->dim() == 1 && class_index->scalar_type() == ScalarType::Long,
            "class_index must be an int64 vector");
      class_index = torch::stable::contiguous(*class_index);
      problem.class_index = index_data(*class_index);
      problem.sampled = class_index->numel();
      if (count) {
        const int64_t bound = problem.sampled;
        problem.sampled = *index_data(*count);
        check(problem.sampled >= 0 && problem.sampled <= bound, "count must be in [0, ", bound,
              "], got ", problem.sampled);
      }
      for (int64_t j = 0; j < problem.sampled; ++j)
        check(problem.class_index[j] >= 0 && problem.class_index[j] < num_classes,
              "class_index must be in [0, ", num_classes, "), got ", problem.class_index[j],
              " at position ", j);
    }
    const int64_t* slots = index_data(slot);
    for (int64_t i = 0; i < batch; ++i)
      check(slots[i] < problem.sampled, "slot must be below ", problem.sampled, ", got ", slots[i],
            " at position ", i);

    const int64_t* columns = nullptr;
    int64_t selected = dim;
    if (feature_index) {
      check(feature_index->dim() == 1 && feature_index->scalar_type() == ScalarType::Long,
            "feature_index must be an int64 vector");
      feature_index = torch::stable::contiguous(*feature_index);
      columns = index_data(*feature_index);
      selected = feature_index->numel();
      for (int64_t k = 0; k < selected; ++k)
        check(columns[k] >= 0 && columns[k] < dim && (k == 0 || columns[k - 1] < columns[k]),
              "feature_index must hold sorted unique dimensions in [0, ", dim, "), got ",
              columns[k], " at position ", k);
    }
    check(selected >= 1, "feature_index must hold at least one dimension, got none");

    const auto source = [&](const Tensor& t, const char* name) {
      return cpu::RowSource{t.const_data_ptr(), dtype_of(t, name), t.stride(0), columns, selected};
    };
    problem.embeddings = source(embeddings, "embeddings");
    problem.prototypes = source(prototypes, "prototypes");
    is_double = problem.embeddings.dtype == cpu::DType::kFloat64 ||
                problem.prototypes.dtype == cpu::DType::kFloat64;
    problem.batch = batch;
    problem.slot = slots;
    problem.scale = scale;
    problem.filter = filter;
    problem.m1 = m1;
    problem.m2 = m2_value;
    problem.m3 = m3_value;
    problem.m2_per_sample = per_sample(m2, "m2", batch);
    problem.m3_per_sample = per_sample(m3, "m3", batch);
    problem.exact_margin_grad = exact_margin_grad;
    problem.linear_beyond_pi = linear_beyond_pi;
    problem.rounding =
        precision == Precision::kFp16 ? cpu::Rounding::kFloat16 : cpu::Rounding::kNone;
    if (is_double) problem.rounding = cpu::Rounding::kNone;
    check(workspace_bytes >= 0, "workspace_bytes must be at least 0, got ", workspace_bytes);
    problem.kept_panels = kept_panels(bound(), batch, real_bytes(), workspace_bytes);
  }

  int64_t bytes_per_value() const { return is_double ? 8 : precision == Precision::kBf16 ? 2 : 4; }
  int64_t real_bytes() const { return is_double ? 8 : 4; }
  // Sizes follow from the bound of the selection, not from its count, so that shapes are static.
  int64_t bound() const { return class_index ? class_index->numel() : prototypes.size(0); }
  int64_t packed_size() const {
    return packed_bytes(bound(), problem.embeddings.dim, bytes_per_value());
  }
  int64_t kept_size() const {
    return problem.kept_panels * kept_panel_bytes(problem.batch, real_bytes());
  }
  template <class F>
  void with_unit(const F& f) const {
    if (is_double)
      f(double{});
    else if (precision == Precision::kBf16)
      f(cpu::BfPair{});
    else
      f(float{});
  }

 private:
  static Tensor rows(const Tensor& t, const char* name) {
    check_matrix(t, name);
    const bool unit_stride = t.size(1) <= 1 || t.stride(1) == 1;
    return unit_stride && t.stride(0) >= 0 ? t : torch::stable::contiguous(t);
  }
  static const double* per_sample(const std::optional<Tensor>& t, const char* name, int64_t batch) {
    if (!t) return nullptr;
    check_vector(*t, name, batch, ScalarType::Double);
    check(t->is_contiguous(), name, " must be contiguous");
    return t->const_data_ptr<double>();
  }
};

int64_t count_kept(const Problem& p) {
  int64_t kept = 0;
  for (int64_t i = 0; i < p.batch; ++i) kept += p.slot[i] >= 0;
  return kept;
}

double mean_factor(const Problem& p, Reduction reduction) {
  return reduction == Reduction::kMean
             ? 1.0 / static_cast<double>(std::max<int64_t>(1, count_kept(p)))
             : 1.0;
}

template <class F>
void with_real(const Tensor& tensor, const F& f) {
  if (tensor.scalar_type() == ScalarType::Double)
    f(tensor.mutable_data_ptr<double>());
  else
    f(tensor.mutable_data_ptr<float>());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> loss_op(
    Tensor embeddings, Tensor slot, Tensor prototypes, std::optional<Tensor> class_index,
    std::optional<Tensor> count, std::optional<Tensor> feature_index, std::optional<Tensor> m2,
    std::optional<Tensor> m3, double m1, double m2_value, double m3_value, double scale,
    double filter, bool exact_margin_grad, bool linear_beyond_pi, int64_t precision,
    int64_t reduction_in, int64_t workspace_bytes,
    bool /* sparse_grad, which only backward heeds */) {
  const Call call(embeddings, slot, prototypes, class_index, count, feature_index, m2, m3, m1,
                  m2_value, m3_value, scale, filter, exact_margin_grad, linear_beyond_pi, precision,
                  workspace_bytes);
  const auto reduction = static_cast<Reduction>(reduction_in);
  const int64_t batch = call.problem.batch;
  const ScalarType real = call.is_double ? ScalarType::Double : ScalarType::Float;
  Buffer<double> sample(3 * batch);
  Tensor state = empty_like_device(embeddings, {batch, kSampleStateSize}, ScalarType::Double);
  Tensor packed = pooled(embeddings, {call.packed_size()}, ScalarType::Byte, 1);
  Tensor kept = pooled(embeddings, {call.kept_size()}, ScalarType::Byte, 1);
  const ForwardResult result{sample.get(),
                             sample.get() + batch,
                             sample.get() + 2 * batch,
                             static_cast<SampleState*>(state.mutable_data_ptr()),
                             packed.mutable_data_ptr(),
                             kept.mutable_data_ptr()};
  call.with_unit(
      [&](auto unit) { forward<decltype(unit)>(call.problem, result, TorchParallel()); });

  auto vector_of = [&](const double* values) {
    Tensor out = empty_like_device(embeddings, {batch}, real);
    with_real(out, [&](auto* data) {
      for (int64_t i = 0; i < batch; ++i)
        data[i] = static_cast<std::decay_t<decltype(*data)>>(values[i]);
    });
    return out;
  };
  Tensor loss;
  if (reduction == Reduction::kNone) {
    loss = vector_of(result.loss);
  } else {
    double total = 0;
    for (int64_t i = 0; i < batch; ++i) total += result.loss[i];
    total *= mean_factor(call.problem, reduction);
    loss = empty_like_device(embeddings, {}, real);
    with_real(loss, [&](auto* data) { *data = static_cast<std::decay_t<decltype(*data)>>(total); });
  }
  return {loss,
          vector_of(result.loss),
          vector_of(result.target_cosine),
          vector_of(result.largest_negative),
          state,
          packed,
          kept};
}

std::tuple<Tensor, Tensor> loss_backward_op(
    Tensor grad_loss, Tensor embeddings, Tensor slot, Tensor prototypes,
    std::optional<Tensor> class_index, std::optional<Tensor> count,
    std::optional<Tensor> feature_index, std::optional<Tensor> m2, std::optional<Tensor> m3,
    Tensor state, Tensor packed, Tensor kept, double m1, double m2_value, double m3_value,
    double scale, double filter, bool exact_margin_grad, bool linear_beyond_pi, int64_t precision,
    int64_t reduction_in, int64_t workspace_bytes, bool want_embeddings, bool want_prototypes,
    bool compact) {
  const Call call(embeddings, slot, prototypes, class_index, count, feature_index, m2, m3, m1,
                  m2_value, m3_value, scale, filter, exact_margin_grad, linear_beyond_pi, precision,
                  workspace_bytes);
  const Problem& p = call.problem;
  const auto reduction = static_cast<Reduction>(reduction_in);
  check(packed.numel() == call.packed_size() && kept.numel() == call.kept_size() &&
            state.numel() == p.batch * kSampleStateSize,
        "state, packed and kept must come from the forward call with the same arguments");
  grad_loss = torch::stable::contiguous(grad_loss);
  check(grad_loss.numel() == (reduction == Reduction::kNone ? p.batch : 1),
        "grad_loss must match the loss, got ", grad_loss.numel(), " values");

  Buffer<double> weight(p.batch);
  const double factor = mean_factor(p, reduction);
  with_real(grad_loss, [&](const auto* grad) {
    for (int64_t i = 0; i < p.batch; ++i)
      weight[i] =
          p.slot[i] < 0
              ? 0.0
              : factor * static_cast<double>(reduction == Reduction::kNone ? grad[i] : grad[0]);
  });

  const TorchParallel parallel;
  // Gradients start at zero, unless each of their values will be written.
  auto gradient = [&](const Tensor& like, const cpu::RowSource& source, int64_t rows, bool wanted,
                      bool all_rows) {
    const int64_t dim = wanted ? like.size(1) : 0;
    const int64_t bytes = value_bytes(source.dtype);
    rows = wanted ? rows : 0;
    Tensor out = pooled(like, {rows, dim}, like.scalar_type(), bytes);
    if (!all_rows || source.columns != nullptr || p.batch == 0)
      fill_zero(out.mutable_data_ptr(), rows * dim * bytes, parallel);
    const RowSink sink{wanted ? out.mutable_data_ptr() : nullptr, source.dtype, dim, source.columns,
                       source.dim};
    return std::make_pair(out, sink);
  };
  check(!compact || class_index, "compact needs class_index");
  const auto [grad_embeddings, embedding_sink] =
      gradient(call.embeddings, p.embeddings, p.batch, want_embeddings, count_kept(p) == p.batch);
  const auto [grad_prototypes, prototype_sink] = gradient(
      call.prototypes, p.prototypes, compact ? class_index->numel() : call.prototypes.size(0),
      want_prototypes, compact ? p.sampled == class_index->numel() : !class_index.has_value());
  const BackwardArgs args{static_cast<const SampleState*>(state.const_data_ptr()),
                          packed.const_data_ptr(),
                          kept.const_data_ptr(),
                          weight.get(),
                          embedding_sink,
                          prototype_sink,
                          compact};
  call.with_unit([&](auto unit) { backward<decltype(unit)>(p, args, parallel); });
  return {grad_embeddings, grad_prototypes};
}

}  // namespace
}  // namespace unicom

STABLE_TORCH_LIBRARY(unicom_ext, m) {
  m.def(
      "select_classes(Tensor labels, Tensor step, int num_classes, int num_sampled, int seed, "
      "int ignore_index, int start, int stop) -> (Tensor class_index, Tensor count, Tensor slot)");
  m.def("select_features(Tensor step, int dim, int num_selected, int seed) -> Tensor");
  m.def(
      "label_slots(Tensor labels, Tensor? class_index, int num_classes, int ignore_index) -> "
      "Tensor");
  m.def(
      "loss(Tensor embeddings, Tensor slot, Tensor prototypes, Tensor? class_index, Tensor? count, "
      "Tensor? feature_index, Tensor? m2, Tensor? m3, float m1, float m2_value, float m3_value, "
      "float scale, float filter, bool exact_margin_grad, bool linear_beyond_pi, int precision, "
      "int reduction, int workspace_bytes, bool sparse_grad) -> (Tensor loss, Tensor sample_loss, "
      "Tensor target_cosine, "
      "Tensor largest_negative, Tensor state, Tensor packed, Tensor kept)");
  m.def(
      "loss_backward(Tensor grad_loss, Tensor embeddings, Tensor slot, Tensor prototypes, "
      "Tensor? class_index, Tensor? count, Tensor? feature_index, Tensor? m2, Tensor? m3, "
      "Tensor state, Tensor packed, Tensor kept, float m1, float m2_value, float m3_value, float "
      "scale, "
      "float filter, bool exact_margin_grad, bool linear_beyond_pi, int precision, int reduction, "
      "int workspace_bytes, bool want_embeddings, bool want_prototypes, bool compact) "
      "-> (Tensor grad_embeddings, Tensor grad_prototypes)");
}

STABLE_TORCH_LIBRARY_IMPL(unicom_ext, CPU, m) {
  m.impl("select_classes", TORCH_BOX(&unicom::select_classes_op));
  m.impl("select_features", TORCH_BOX(&unicom::select_features_op));
  m.impl("label_slots", TORCH_BOX(&unicom::label_slots_op));
  m.impl("loss", TORCH_BOX(&unicom::loss_op));
  m.impl("loss_backward", TORCH_BOX(&unicom::loss_backward_op));
}
