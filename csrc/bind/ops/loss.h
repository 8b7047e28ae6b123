// The loss as operators: in one call for one shard, or in three with collectives between them.
#pragma once

#include <tuple>
#include <vector>

#include "options.h"
#include "row_states.h"

namespace unicom {
namespace {  // types of torch::stable are hidden

// A Backend has:
//
//   static int64_t packed_bytes(const Problem&), kept_bytes(const Problem&)
//   static int64_t sampled(const Problem&)     the sampled classes, or at least as many
//   static int64_t most_centers(const Problem&)
//   static void check_values(const Problem&)
//   doubles(count)                             scratch; .get() points to it
//   forward(const Problem&, const ShardSums&, const Saved&)
//   join_targets(const JoinTargets&), write_results(const WriteResults&, bool is_double)
//   backward(const Problem&, const Gradients&)
//   backward_with_update(const Problem&, const Gradients&, const AdamWRows& or SgdRows&)
template <class Backend>
struct LossOps {
  // Everything the operators share, checked; keeps the tensors alive that `problem` points into.
  struct Call {
    Tensor embeddings, prototypes, slot;
    MaybeTensor class_index, count, feature_index;
    Options options;
    Problem problem;

    Call(const Tensor& embeddings_in, const Tensor& slot_in, const Tensor& prototypes_in,
         const MaybeTensor& class_index_in, const MaybeTensor& count_in,
         const MaybeTensor& feature_index_in, const std::vector<double>& reals,
         const std::vector<int64_t>& codes, std::optional<int64_t> total_sampled = {})
        : embeddings(rows(embeddings_in, "embeddings")),
          prototypes(rows(prototypes_in, "prototypes")),
          slot(torch::stable::contiguous(slot_in)),
          class_index(vector(class_index_in, "class_index")),
          count(class_index ? count_in : std::nullopt),
          feature_index(vector(feature_index_in, "feature_index")),
          options(reals, codes) {
      const int64_t batch = embeddings.size(0), dim = embeddings.size(1);
      check(prototypes.size(1) == dim, "prototypes must be [C, ", dim,
            "] like the embeddings, got [", prototypes.size(0), ", ", prototypes.size(1), "]");
      Options::check_slot(slot, batch);
      check_device(prototypes, embeddings, "prototypes");
      check_device(slot, embeddings, "slot");
      if (count) {
        check(count->numel() == 1 && count->scalar_type() == ScalarType::Long,
              "count must be one int64 value");
        check_device(*count, embeddings, "count");
      }
      const int64_t num_classes = prototypes.size(0) / options.num_centers;
      check(prototypes.size(0) == num_classes * options.num_centers,
            "prototypes must have num_centers = ", options.num_centers,
            " rows for each class, got ", prototypes.size(0));
      problem = {.embeddings = source(embeddings, "embeddings"),
                 .prototypes = source(prototypes, "prototypes"),
                 .batch = batch,
                 .num_classes = num_classes,
                 .centers = options.num_centers,
                 .dim = dim,
                 .class_index = class_index ? index_data(*class_index) : nullptr,
                 .count = count ? index_data(*count) : nullptr,
                 .bound = class_index ? class_index->numel() : num_classes,
                 .positives = Options::positives_of(slot),
                 .scale = options.scale,
                 .filter = options.filter,
                 .label_smoothing = options.label_smoothing,
                 .total_sampled = 0,
                 .precision = options.precision,
                 .keep_bytes = options.workspace_bytes,
                 .wants_embeddings = options.wants_embeddings};
      check(problem.embeddings.dim >= 1,
            "feature_index must hold at least one dimension, got none");
      problem.total_sampled = total_sampled.value_or(Backend::sampled(problem));
      const int64_t most = Backend::most_centers(problem);
      check(problem.centers <= most, "num_centers must be at most ", most,
            " in this precision on this device, got ", problem.centers);
      Backend::check_values(problem);
    }

    ScalarType real() const { return problem.is_double() ? ScalarType::Double : ScalarType::Float; }

   private:
    static Tensor rows(const Tensor& t, const char* name) {
      check_matrix(t, name);
      const bool unit_stride = t.size(1) <= 1 || t.stride(1) == 1;
      return unit_stride && t.stride(0) >= 0 ? t : torch::stable::contiguous(t);
    }
    MaybeTensor vector(const MaybeTensor& t, const char* name) const {
      if (!t) return {};
      check(t->dim() == 1 && t->scalar_type() == ScalarType::Long, name,
            " must be an int64 vector");
      check_device(*t, embeddings, name);
      return torch::stable::contiguous(*t);
    }
    RowSource source(const Tensor& t, const char* name) const {
      return {.data = t.const_data_ptr(),
              .dtype = dtype_of(t, name),
              .row_stride = t.stride(0),
              .columns = feature_index ? index_data(*feature_index) : nullptr,
              .dim = feature_index ? feature_index->numel() : t.size(1)};
    }
  };

  struct SavedTensors {
    Tensor packed, kept;
    Saved saved;

    SavedTensors(Backend& on, const Problem& p)
        : packed(on.large({Backend::packed_bytes(p)}, ScalarType::Byte)),
          kept(on.large({Backend::kept_bytes(p)}, ScalarType::Byte)),
          saved{.packed = packed.mutable_data_ptr(), .kept = kept.mutable_data_ptr()} {}
  };

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sums(
      Tensor embeddings, Tensor slot, Tensor prototypes, MaybeTensor class_index, MaybeTensor count,
      MaybeTensor feature_index, int64_t total_sampled, std::vector<double> reals,
      std::vector<int64_t> codes) {
    const Call call(embeddings, slot, prototypes, class_index, count, feature_index, reals, codes,
                    total_sampled);
    Backend on(call.embeddings);
    const int64_t batch = call.problem.batch;
    const int64_t width = call.problem.positives.width;
    Tensor sums = on.empty({batch, ShardSums::row_size(width)}, ScalarType::Double);
    Tensor exponent = on.empty({batch}, ScalarType::Double);
    Tensor largest = on.empty({batch}, ScalarType::Double);
    Tensor inverse_norm = on.empty({batch}, ScalarType::Double);
    SavedTensors out(on, call.problem);
    on.forward(call.problem,
               shard_sums(sums, exponent, inverse_norm, largest.mutable_data_ptr<double>(), width),
               out.saved);
    on.finish();
    return {sums, exponent, largest, inverse_norm, out.packed, out.kept};
  }

  static std::tuple<Tensor, Tensor> merge(Tensor sums, Tensor exponent, Tensor inverse_norm,
                                          Tensor slot, MaybeTensor m2, MaybeTensor m3,
                                          std::vector<double> reals, std::vector<int64_t> codes) {
    const Options options(reals, codes);
    const int64_t batch = slot.size(0), width = Options::width_of(slot);
    Options::check_slot(slot, batch);
    check_vector(exponent, "exponent", batch, ScalarType::Double);
    check_vector(inverse_norm, "inverse_norm", batch, ScalarType::Double);
    const int64_t row_size = ShardSums::row_size(width);
    check(sums.dim() == 2 && sums.size(0) == batch && sums.size(1) == row_size &&
              sums.scalar_type() == ScalarType::Double,
          "sums must be Double of shape [", batch, ", ", row_size, "]");
    for (Tensor* t : {&sums, &exponent, &inverse_norm, &slot}) *t = torch::stable::contiguous(*t);
    Backend on(sums);
    Tensor loss = on.empty({batch}, ScalarType::Double);
    Tensor state = on.empty({batch, state_size(width)}, ScalarType::Double);
    on.join_targets({.of = options.sample_loss(m2, m3, slot, state),
                     .batch = batch,
                     .sums = shard_sums(sums, exponent, inverse_norm, nullptr, width),
                     .loss = loss.mutable_data_ptr<double>()});
    on.finish();
    return {loss, state};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> loss(
      Tensor embeddings, Tensor slot, Tensor prototypes, MaybeTensor class_index, MaybeTensor count,
      MaybeTensor feature_index, MaybeTensor m2, MaybeTensor m3, MaybeTensor /* scale */,
      std::vector<double> reals, std::vector<int64_t> codes) {
    const Call call(embeddings, slot, prototypes, class_index, count, feature_index, reals, codes);
    const Problem& p = call.problem;
    const int64_t batch = p.batch, width = p.positives.width;
    const Reduction reduction = call.options.reduction;
    Backend on(call.embeddings);
    Tensor loss =
        reduction == Reduction::kNone ? on.empty({batch}, call.real()) : on.empty({}, call.real());
    Tensor sample_loss = on.empty({batch}, call.real());
    Tensor target_cosine = call.slot.dim() == 2 ? on.empty({batch, width}, call.real())
                                                : on.empty({batch}, call.real());
    Tensor largest = on.empty({batch}, call.real());
    Tensor state = on.empty({batch, state_size(width)}, ScalarType::Double);
    const SampleLoss sample = call.options.sample_loss(m2, m3, call.slot, state);
    SavedTensors out(on, p);
    const auto scratch = on.doubles((4 + ShardSums::row_size(width)) * batch);
    double* const values = scratch.get();
    double* const losses = values + 3 * batch;
    const ShardSums sums{.sums = values + 4 * batch,
                         .exponent = values,
                         .inverse_norm = values + batch,
                         .largest_negative = values + 2 * batch,
                         .width = width};
    on.forward(p, sums, out.saved);
    on.join_targets({.of = sample, .batch = batch, .sums = sums, .loss = losses});
    on.write_results({.batch = batch,
                      .positives = p.positives,
                      .sample_loss = losses,
                      .sums = sums,
                      .reduction = reduction,
                      .loss = loss.mutable_data_ptr(),
                      .sample_loss_out = sample_loss.mutable_data_ptr(),
                      .target_cosine_out = target_cosine.mutable_data_ptr(),
                      .largest_negative_out = largest.mutable_data_ptr()},
                     p.is_double());
    on.finish();
    return {loss, sample_loss, target_cosine, largest, state, out.packed, out.kept};
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(
      Tensor grad_loss, Tensor embeddings, Tensor slot, Tensor prototypes, MaybeTensor class_index,
      MaybeTensor count, MaybeTensor feature_index, Tensor state, Tensor packed, Tensor kept,
      std::vector<double> reals, std::vector<int64_t> codes, bool want_embeddings, bool want_radial,
      bool want_prototypes, bool compact) {
    const Call call(embeddings, slot, prototypes, class_index, count, feature_index, reals, codes);
    check(!compact || call.class_index, "compact needs class_index");
    GradientTensors g(call, grad_loss, state, packed, kept);
    Backend on(call.embeddings);
    g.want_embeddings(on, call, want_embeddings);
    g.want_radial(on, call, want_radial);
    g.want_prototypes(on, call, want_prototypes, compact);
    on.backward(call.problem, g.gradients);
    on.finish();
    return {g.embeddings, g.prototypes, g.radial};
  }

  static std::tuple<Tensor, Tensor> backward_adamw(
      Tensor grad_loss, Tensor embeddings, Tensor slot, Tensor prototypes, MaybeTensor class_index,
      MaybeTensor count, MaybeTensor feature_index, Tensor state, Tensor packed, Tensor kept,
      std::vector<double> reals, std::vector<int64_t> codes, bool want_embeddings, bool want_radial,
      Tensor exp_avg, Tensor exp_avg_sq, Tensor row_step, Tensor log_decay, double total_log_decay,
      double lr, double beta1, double beta2, double eps, bool maximize) {
    const Call call(embeddings, slot, prototypes, class_index, count, feature_index, reals, codes);
    const AdamWRows rows =
        adamw_rows(prototypes, exp_avg, exp_avg_sq, row_step, log_decay, total_log_decay,
                   {.lr = lr, .beta1 = beta1, .beta2 = beta2, .eps = eps, .maximize = maximize});
    return backward_with(call, grad_loss, state, packed, kept, want_embeddings, want_radial, rows);
  }

  static std::tuple<Tensor, Tensor> backward_sgd(
      Tensor grad_loss, Tensor embeddings, Tensor slot, Tensor prototypes, MaybeTensor class_index,
      MaybeTensor count, MaybeTensor feature_index, Tensor state, Tensor packed, Tensor kept,
      std::vector<double> reals, std::vector<int64_t> codes, bool want_embeddings, bool want_radial,
      MaybeTensor momentum_buffer, MaybeTensor log_decay, MaybeTensor last_step,
      MaybeTensor history, double decay_before, double decay_after, int64_t step, double lr,
      double momentum, double weight_decay, bool nesterov, bool maximize) {
    const Call call(embeddings, slot, prototypes, class_index, count, feature_index, reals, codes);
    const SgdRows rows = sgd_rows(prototypes, momentum_buffer, log_decay, last_step, history,
                                  decay_before, decay_after, step,
                                  {.lr = lr,
                                   .momentum = momentum,
                                   .weight_decay = weight_decay,
                                   .nesterov = nesterov,
                                   .maximize = maximize});
    return backward_with(call, grad_loss, state, packed, kept, want_embeddings, want_radial, rows);
  }

 private:
  // What backward is given and what it fills; tensors that are not wanted are empty.
  struct GradientTensors {
    Tensor grad_loss, embeddings, prototypes, radial;
    Gradients gradients;

    GradientTensors(const Call& call, const Tensor& grad_loss_in, const Tensor& state,
                    const Tensor& packed, const Tensor& kept)
        : grad_loss(torch::stable::contiguous(grad_loss_in)) {
      const Problem& p = call.problem;
      const Reduction reduction = call.options.reduction;
      check(packed.numel() == Backend::packed_bytes(p) && kept.numel() == Backend::kept_bytes(p) &&
                state.numel() == p.batch * state_size(p.positives.width),
            "state, packed and kept must come from the forward call with the same arguments");
      check(grad_loss.numel() == (reduction == Reduction::kNone ? p.batch : 1),
            "grad_loss must match the loss, got ", grad_loss.numel(), " values");
      check(grad_loss.scalar_type() == call.real(),
            "grad_loss must have the dtype of the loss, got ",
            torch::headeronly::toString(grad_loss.scalar_type()));
      check_device(grad_loss, call.embeddings, "grad_loss");
      gradients = {.grad_loss = grad_loss.const_data_ptr(),
                   .reduction = reduction,
                   .states = Options::states_of(state, call.slot),
                   .packed = packed.const_data_ptr(),
                   .kept = kept.const_data_ptr(),
                   .embeddings = nullptr,
                   .radial = nullptr,
                   .prototypes = nullptr,
                   .compact = false};
    }
    void want_embeddings(Backend& on, const Call& call, bool wanted) {
      embeddings = make(on, call.embeddings, call.problem.batch, wanted);
      if (wanted) gradients.embeddings = embeddings.mutable_data_ptr();
    }
    void want_radial(Backend& on, const Call& call, bool wanted) {
      radial = on.empty({wanted ? call.problem.batch : 0}, ScalarType::Double);
      if (wanted) gradients.radial = radial.mutable_data_ptr<double>();
    }
    void want_prototypes(Backend& on, const Call& call, bool wanted, bool compact) {
      const Problem& p = call.problem;
      const int64_t classes = compact ? p.bound : p.num_classes;
      prototypes = make(on, call.prototypes, classes * p.centers, wanted);
      if (wanted) gradients.prototypes = prototypes.mutable_data_ptr();
      gradients.compact = compact;
    }

   private:
    static Tensor make(Backend& on, const Tensor& like, int64_t rows, bool wanted) {
      const auto dtype = like.scalar_type();
      return wanted ? on.large({rows, like.size(1)}, dtype) : on.empty({0, 0}, dtype);
    }
  };

  template <class Rows>
  static std::tuple<Tensor, Tensor> backward_with(const Call& call, const Tensor& grad_loss,
                                                  const Tensor& state, const Tensor& packed,
                                                  const Tensor& kept, bool want_embeddings,
                                                  bool want_radial, const Rows& rows) {
    check(call.options.reduction != Reduction::kNone,
          "prototypes are updated in the backward of a loss that is reduced");
    GradientTensors g(call, grad_loss, state, packed, kept);
    Backend on(call.embeddings);
    g.want_embeddings(on, call, want_embeddings);
    g.want_radial(on, call, want_radial);
    on.backward_with_update(call.problem, g.gradients, rows);
    on.finish();
    return {g.embeddings, g.radial};
  }

  // Sums and cosines are the columns of one matrix, which ranks add up in one message.
  static ShardSums shard_sums(Tensor& sums, Tensor& exponent, Tensor& inverse_norm,
                              double* largest_negative, int64_t width) {
    return {.sums = sums.mutable_data_ptr<double>(),
            .exponent = exponent.mutable_data_ptr<double>(),
            .inverse_norm = inverse_norm.mutable_data_ptr<double>(),
            .largest_negative = largest_negative,
            .width = width};
  }
};

}  // namespace
}  // namespace unicom
