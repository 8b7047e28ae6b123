// The operators of the loss on CUDA tensors. None of them waits for the device.
//
// The tests compile this file too, over the emulation of CUDA: then the same operators take CPU
// tensors and live in the namespace unicom_ext_emulated.
#include <tuple>

#include "../../core/sampler.h"
#include "../../cuda/host/loss.h"
#include "../ops/options.h"
#include "../ops/schemas.h"
#include "row_updates.h"

namespace unicom::cuda {
namespace {

// Everything the operators share, checked as far as shapes go; keeps the tensors alive that
// `problem` points into.
struct Call {
  Tensor embeddings, prototypes, slot;
  std::optional<Tensor> class_index, count, feature_index;
  Problem problem;
  bool is_double;
  Options options;
  int64_t kept_size;  // bytes

  Call(const Tensor& embeddings_in, const Tensor& slot_in, const Tensor& prototypes_in,
       const std::optional<Tensor>& class_index_in, const std::optional<Tensor>& count_in,
       const std::optional<Tensor>& feature_index_in, const Options& options_in)
      : embeddings(rows(embeddings_in, "embeddings")),
        prototypes(rows(prototypes_in, "prototypes")),
        slot(torch::stable::contiguous(slot_in)),
        class_index(vector(class_index_in, "class_index")),
        count(vector(count_in, "count")),
        feature_index(vector(feature_index_in, "feature_index")),
        options(options_in) {
    const int64_t batch = embeddings.size(0), dim = embeddings.size(1);
    check(prototypes.size(1) == dim, "prototypes must be [C, ", dim, "] like the embeddings, got [",
          prototypes.size(0), ", ", prototypes.size(1), "]");
    check_vector(slot, "slot", batch, ScalarType::Long);
    check_device(prototypes, embeddings, "prototypes");
    check_device(slot, embeddings, "slot");
    const int64_t selected = feature_index ? feature_index->numel() : dim;
    check(selected >= 1, "feature_index must hold at least one dimension, got none");
    const int64_t* columns = feature_index ? index_data(*feature_index) : nullptr;
    problem.embeddings = source(embeddings, "embeddings", columns, selected);
    problem.prototypes = source(prototypes, "prototypes", columns, selected);
    is_double =
        problem.embeddings.dtype == DType::kFloat64 || problem.prototypes.dtype == DType::kFloat64;
    problem.batch = batch;
    problem.class_index = class_index ? index_data(*class_index) : nullptr;
    problem.count = class_index && count ? index_data(*count) : nullptr;
    problem.bound = class_index ? class_index->numel() : prototypes.size(0);
    problem.slot = index_data(slot);
    problem.scale = options.scale;
    problem.filter = options.filter;
    problem.total_sampled = problem.bound;
    with_unit([&](auto unit) {
      using Unit = decltype(unit);
      problem.kept_classes = kept_classes<Unit>(problem.bound, batch, options.workspace_bytes);
      kept_size = kept_bytes<Unit>(problem.kept_classes, batch);
    });
  }

  int64_t packed_size() const {
    const int64_t bytes = is_double ? 8 : options.precision == Precision::kFp32 ? 4 : 2;
    return packed_bytes(problem.bound, problem.embeddings.dim, bytes);
  }
  ScalarType real() const { return is_double ? ScalarType::Double : ScalarType::Float; }
  Tensor bytes(int64_t size) const { return allocate(embeddings, {size}, ScalarType::Byte); }

  template <class F>
  void with_unit(const F& f) const {
    if (is_double) return f(double{});
    switch (options.precision) {
      case Precision::kFp32: return f(float{});
      case Precision::kFp16: return f(Half{});
      case Precision::kBf16: return f(BFloat{});
    }
  }
  template <class F>
  void with_real(const F& f) const {
    if (is_double)
      f(double{});
    else
      f(float{});
  }

  void run_forward(OnDevice& on, const ShardSums& sums) const {
    with_unit([&](auto unit) {
      using Unit = decltype(unit);
      Tensor workspace = bytes(forward_workspace<Unit>(problem));
      forward<Unit>(on.queue, problem, sums, workspace.mutable_data_ptr());
    });
  }

 private:
  static Tensor rows(const Tensor& t, const char* name) {
    check_matrix(t, name);
    const bool unit_stride = t.size(1) <= 1 || t.stride(1) == 1;
    return unit_stride && t.stride(0) >= 0 ? t : torch::stable::contiguous(t);
  }
  std::optional<Tensor> vector(const std::optional<Tensor>& t, const char* name) const {
    if (!t) return {};
    check(t->dim() <= 1 && t->scalar_type() == ScalarType::Long, name, " must be an int64 vector");
    check_device(*t, embeddings, name);
    return torch::stable::contiguous(*t);
  }
  static RowSource source(const Tensor& t, const char* name, const int64_t* columns, int64_t dim) {
    return {t.const_data_ptr(), dtype_of(t, name), t.stride(0), columns, dim};
  }
};

Tensor doubles(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return allocate(like, sizes, ScalarType::Double);
}

SampleState* state_data(Tensor& state) {
  return static_cast<SampleState*>(state.mutable_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> loss_sums_op(
    Tensor embeddings, Tensor slot, Tensor prototypes, std::optional<Tensor> class_index,
    std::optional<Tensor> count, std::optional<Tensor> feature_index, int64_t total_sampled,
    std::vector<double> reals, std::vector<int64_t> codes) {
  Call call(embeddings, slot, prototypes, class_index, count, feature_index, {reals, codes});
  call.problem.total_sampled = total_sampled;
  OnDevice on(embeddings);
  const int64_t batch = call.problem.batch;
  Tensor sums = doubles(embeddings, {batch, 2}), exponent = doubles(embeddings, {batch});
  Tensor largest = doubles(embeddings, {batch}), inverse_norm = doubles(embeddings, {batch});
  Tensor packed = call.bytes(call.packed_size()), kept = call.bytes(call.kept_size);
  double* pairs = sums.mutable_data_ptr<double>();
  call.run_forward(on, {pairs, pairs + 1, 2, exponent.mutable_data_ptr<double>(),
                        largest.mutable_data_ptr<double>(), inverse_norm.mutable_data_ptr<double>(),
                        packed.mutable_data_ptr(), kept.mutable_data_ptr()});
  on.finish();
  return {sums, exponent, largest, inverse_norm, packed, kept};
}

std::tuple<Tensor, Tensor> loss_merge_op(Tensor sums, Tensor exponent, Tensor inverse_norm,
                                         Tensor slot, std::optional<Tensor> m2,
                                         std::optional<Tensor> m3, std::vector<double> reals,
                                         std::vector<int64_t> codes) {
  const int64_t batch = prepare_merge(sums, exponent, inverse_norm, slot);
  const Options options(reals, codes);
  const MarginOptions margin = options.margin_of(m2, m3, batch);
  OnDevice on(sums);
  Tensor loss = doubles(sums, {batch}), state = doubles(sums, {batch, kSampleStateSize});
  const double* pairs = sums.const_data_ptr<double>();
  join_targets(on.queue, {margin, options.scale, batch, index_data(slot), pairs, pairs + 1, 2,
                          exponent.const_data_ptr<double>(), inverse_norm.const_data_ptr<double>(),
                          loss.mutable_data_ptr<double>(), state_data(state)});
  on.finish();
  return {loss, state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> loss_op(
    Tensor embeddings, Tensor slot, Tensor prototypes, std::optional<Tensor> class_index,
    std::optional<Tensor> count, std::optional<Tensor> feature_index, std::optional<Tensor> m2,
    std::optional<Tensor> m3, std::vector<double> reals, std::vector<int64_t> codes) {
  const Call call(embeddings, slot, prototypes, class_index, count, feature_index, {reals, codes});
  const int64_t batch = call.problem.batch;
  const MarginOptions margin = call.options.margin_of(m2, m3, batch);
  const auto reduction = call.options.reduction;
  OnDevice on(embeddings);
  auto real = [&](std::initializer_list<int64_t> sizes) {
    return allocate(embeddings, sizes, call.real());
  };
  Tensor loss = reduction == Reduction::kNone ? real({batch}) : real({});
  Tensor sample_loss = real({batch}), target_cosine = real({batch}), largest = real({batch});
  Tensor state = doubles(embeddings, {batch, kSampleStateSize});
  Tensor packed = call.bytes(call.packed_size()), kept = call.bytes(call.kept_size);
  Tensor scratch = doubles(embeddings, {6, batch});
  double* values = scratch.mutable_data_ptr<double>();
  const ShardSums sums{values,
                       values + batch,
                       1,
                       values + 2 * batch,
                       values + 3 * batch,
                       values + 4 * batch,
                       packed.mutable_data_ptr(),
                       kept.mutable_data_ptr()};
  double* losses = values + 5 * batch;
  call.run_forward(on, sums);
  join_targets(on.queue,
               {margin, call.options.scale, batch, call.problem.slot, sums.sum, sums.target_cosine,
                1, sums.exponent, sums.inverse_norm, losses, state_data(state)});
  call.with_real([&](auto value) {
    write_results<decltype(value)>(
        on.queue, {batch, call.problem.slot, losses, sums.target_cosine, sums.largest_negative,
                   reduction, loss.mutable_data_ptr(), sample_loss.mutable_data_ptr(),
                   target_cosine.mutable_data_ptr(), largest.mutable_data_ptr()});
  });
  on.finish();
  return {loss, sample_loss, target_cosine, largest, state, packed, kept};
}

// Backward of one call. With `take` the prototypes' gradient goes there and is not returned.
std::tuple<Tensor, Tensor> run_backward(OnDevice& on, const Call& call, Tensor grad_loss,
                                        const Tensor& state, const Tensor& packed,
                                        const Tensor& kept, bool want_embeddings,
                                        bool want_prototypes, bool compact, const TakeRows* take) {
  const Problem& p = call.problem;
  const Reduction reduction = call.options.reduction;
  check(packed.numel() == call.packed_size() && kept.numel() == call.kept_size &&
            state.numel() == p.batch * kSampleStateSize,
        "state, packed and kept must come from the forward call with the same arguments");
  grad_loss = torch::stable::contiguous(grad_loss);
  check(grad_loss.numel() == (reduction == Reduction::kNone ? p.batch : 1),
        "grad_loss must match the loss, got ", grad_loss.numel(), " values");
  check(grad_loss.scalar_type() == call.real(), "grad_loss must have the dtype of the loss, got ",
        torch::headeronly::toString(grad_loss.scalar_type()));
  check_device(grad_loss, call.embeddings, "grad_loss");
  check(!compact || call.class_index, "compact needs class_index");

  // Gradients start at zero, unless each of their values will be written.
  auto gradient = [&](const Tensor& like, const RowSource& source, int64_t rows, bool wanted,
                      bool all_rows) {
    const int64_t dim = wanted ? like.size(1) : 0;
    Tensor out = allocate(like, {wanted ? rows : 0, dim}, like.scalar_type());
    if (wanted && (!all_rows || source.columns != nullptr))
      on.queue.fill_zero(out.mutable_data_ptr(), rows * dim * bytes_of(source.dtype));
    return std::make_pair(out, RowSink{wanted ? out.mutable_data_ptr() : nullptr, source.dtype, dim,
                                       source.columns, source.dim});
  };
  const auto [grad_embeddings, embedding_sink] =
      gradient(call.embeddings, p.embeddings, p.batch, want_embeddings, false);
  const auto [grad_prototypes, prototype_sink] =
      gradient(call.prototypes, p.prototypes, compact ? p.bound : call.prototypes.size(0),
               want_prototypes, p.class_index == nullptr && p.batch > 0);
  const Gradients gradients{grad_loss.const_data_ptr(),
                            reduction,
                            static_cast<const SampleState*>(state.const_data_ptr()),
                            packed.const_data_ptr(),
                            kept.const_data_ptr(),
                            embedding_sink,
                            prototype_sink,
                            compact,
                            take,
                            call.prototypes.size(1)};
  call.with_unit([&](auto unit) {
    using Unit = decltype(unit);
    Tensor workspace = call.bytes(backward_workspace<Unit>(p, gradients));
    backward<Unit>(on.queue, p, gradients, workspace.mutable_data_ptr());
  });
  on.finish();
  return {grad_embeddings, grad_prototypes};
}

std::tuple<Tensor, Tensor> loss_backward_op(Tensor grad_loss, Tensor embeddings, Tensor slot,
                                            Tensor prototypes, std::optional<Tensor> class_index,
                                            std::optional<Tensor> count,
                                            std::optional<Tensor> feature_index, Tensor state,
                                            Tensor packed, Tensor kept, std::vector<double> reals,
                                            std::vector<int64_t> codes, bool want_embeddings,
                                            bool want_prototypes, bool compact) {
  const Call call(embeddings, slot, prototypes, class_index, count, feature_index, {reals, codes});
  OnDevice on(embeddings);
  return run_backward(on, call, grad_loss, state, packed, kept, want_embeddings, want_prototypes,
                      compact, nullptr);
}

// Backward that updates the prototypes: chunk by chunk, from rows that no one keeps. The host
// cannot see here whether the upstream gradient is 1, as the update needs it: otherwise nothing is
// updated, and the gradient of the embeddings is NaN.
template <class Update>
Tensor update_in_backward(OnDevice& on, const Call& call, const Tensor& grad_loss,
                          const Tensor& state, const Tensor& packed, const Tensor& kept,
                          bool want_embeddings, Update update,
                          int64_t (*workspace_of)(const Update&)) {
  check(call.options.reduction != Reduction::kNone,
        "prototypes are updated in the backward of a loss that is reduced");
  const Problem& p = call.problem;
  update.gradient = {p.class_index, nullptr, 0, call.prototypes.size(1), call.prototypes.size(0)};
  call.with_unit([&](auto unit) {
    update.gradient.count = std::min(p.bound, backward_chunk<decltype(unit)>(p));
  });
  Tensor workspace = call.bytes(workspace_of(update));
  update.workspace = workspace.mutable_data_ptr();
  const TakeRows take = [&](Queue& queue, const GradientRows& part) {
    update.gradient.rows = part.rows;
    update.gradient.first = part.first;
    update.gradient.count = part.count;
    update.gradient.upstream = part.upstream;
    update_rows(queue, update);
  };
  return std::get<0>(
      run_backward(on, call, grad_loss, state, packed, kept, want_embeddings, false, false, &take));
}

Tensor loss_backward_adamw_op(Tensor grad_loss, Tensor embeddings, Tensor slot, Tensor prototypes,
                              std::optional<Tensor> class_index, std::optional<Tensor> count,
                              std::optional<Tensor> feature_index, Tensor state, Tensor packed,
                              Tensor kept, std::vector<double> reals, std::vector<int64_t> codes,
                              bool want_embeddings, Tensor exp_avg, Tensor exp_avg_sq,
                              Tensor row_step, Tensor log_decay, double total_log_decay, double lr,
                              double beta1, double beta2, double eps, bool maximize) {
  const Call call(embeddings, slot, prototypes, class_index, count, feature_index, {reals, codes});
  const AdamWUpdate update = adamw_update(prototypes, exp_avg, exp_avg_sq, row_step, log_decay,
                                          total_log_decay, {lr, beta1, beta2, eps, maximize});
  OnDevice on(embeddings);
  return update_in_backward<AdamWUpdate>(
      on, call, grad_loss, state, packed, kept, want_embeddings, update,
      [](const AdamWUpdate& a) { return adamw_workspace(a.gradient.count, a.parameter.dtype); });
}

Tensor loss_backward_sgd_op(Tensor grad_loss, Tensor embeddings, Tensor slot, Tensor prototypes,
                            std::optional<Tensor> class_index, std::optional<Tensor> count,
                            std::optional<Tensor> feature_index, Tensor state, Tensor packed,
                            Tensor kept, std::vector<double> reals, std::vector<int64_t> codes,
                            bool want_embeddings, std::optional<Tensor> momentum_buffer,
                            std::optional<Tensor> log_decay, std::optional<Tensor> last_step,
                            std::optional<Tensor> history, double decay_before, double decay_after,
                            int64_t step, double lr, double momentum, double weight_decay,
                            bool nesterov, bool maximize) {
  const Call call(embeddings, slot, prototypes, class_index, count, feature_index, {reals, codes});
  const SgdUpdate update =
      sgd_update(prototypes, momentum_buffer, log_decay, last_step, history, decay_before,
                 decay_after, step, {lr, momentum, weight_decay, nesterov, maximize});
  OnDevice on(embeddings);
  return update_in_backward<SgdUpdate>(
      on, call, grad_loss, state, packed, kept, want_embeddings, update, [](const SgdUpdate& a) {
        return sgd_workspace(a.gradient.count, a.remembered, a.parameter.dtype);
      });
}

}  // namespace
}  // namespace unicom::cuda

#ifdef UNICOM_EMULATE_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(unicom_ext_emulated, m) {
  for (const char* schema : unicom::kLossSchemas) m.def(schema);
}
STABLE_TORCH_LIBRARY_IMPL(unicom_ext_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(unicom_ext, CUDA, m) {
#endif
  m.impl("loss", TORCH_BOX(&unicom::cuda::loss_op));
  m.impl("loss_backward", TORCH_BOX(&unicom::cuda::loss_backward_op));
  m.impl("loss_backward_adamw_", TORCH_BOX(&unicom::cuda::loss_backward_adamw_op));
  m.impl("loss_backward_sgd_", TORCH_BOX(&unicom::cuda::loss_backward_sgd_op));
  m.impl("loss_sums", TORCH_BOX(&unicom::cuda::loss_sums_op));
  m.impl("loss_merge", TORCH_BOX(&unicom::cuda::loss_merge_op));
}
