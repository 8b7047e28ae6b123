// The loss as operators: in one call for one shard, or in three with collectives between them.
#include <limits>
#include <tuple>

#include "../../cpu/host/loss.h"
#include "../ops/options.h"
#include "../ops/schemas.h"
#include "row_updates.h"

namespace unicom {
namespace {

// Everything the operators share, checked; keeps the tensors alive that Problem points into.
struct Call {
  Tensor embeddings, prototypes, slot;
  std::optional<Tensor> class_index, feature_index;
  std::vector<uint16_t> column_bits;
  Problem problem;
  bool is_double;
  Options options;

  Call(const Tensor& embeddings_in, const Tensor& slot_in, const Tensor& prototypes_in,
       const std::optional<Tensor>& class_index_in, const std::optional<Tensor>& count,
       const std::optional<Tensor>& feature_index_in, const Options& options_in)
      : embeddings(rows(embeddings_in, "embeddings")),
        prototypes(rows(prototypes_in, "prototypes")),
        slot(torch::stable::contiguous(slot_in)),
        class_index(class_index_in),
        feature_index(feature_index_in),
        options(options_in) {
    const int64_t batch = embeddings.size(0), dim = embeddings.size(1);
    const int64_t num_classes = prototypes.size(0);
    check(prototypes.size(1) == dim, "prototypes must be [C, ", dim, "] like the embeddings, got [",
          num_classes, ", ", prototypes.size(1), "]");
    check_vector(slot, "slot", batch, ScalarType::Long);

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
      column_bits.resize(static_cast<size_t>(cpu::ceil_div(dim, cpu::kLanes)));
      for (int64_t k = 0; k < selected; ++k)
        column_bits[static_cast<size_t>(columns[k] / cpu::kLanes)] |=
            static_cast<uint16_t>(1u << (columns[k] % cpu::kLanes));
    }
    check(selected >= 1, "feature_index must hold at least one dimension, got none");

    const auto source = [&](const Tensor& t, const char* name) {
      return cpu::RowSource{t.const_data_ptr(), dtype_of(t, name),
                            t.stride(0),        columns,
                            selected,           columns != nullptr ? column_bits.data() : nullptr};
    };
    problem.embeddings = source(embeddings, "embeddings");
    problem.prototypes = source(prototypes, "prototypes");
    is_double = problem.embeddings.dtype == cpu::DType::kFloat64 ||
                problem.prototypes.dtype == cpu::DType::kFloat64;
    problem.batch = batch;
    problem.slot = slots;
    problem.scale = options.scale;
    problem.filter = options.filter;
    problem.total_sampled = problem.sampled;
    problem.rounding =
        options.precision == Precision::kFp16 ? cpu::Rounding::kFloat16 : cpu::Rounding::kNone;
    if (is_double) problem.rounding = cpu::Rounding::kNone;
    problem.kept_panels = kept_panels(bound(), batch, real_bytes(), options.workspace_bytes);
  }

  int64_t bytes_per_value() const {
    return is_double ? 8 : options.precision == Precision::kBf16 ? 2 : 4;
  }
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
    else if (options.precision == Precision::kBf16)
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
};

int64_t count_kept(const Problem& p) {
  int64_t kept = 0;
  for (int64_t i = 0; i < p.batch; ++i) kept += p.slot[i] != kIgnoredSlot;
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

void run_forward(const Call& call, const ShardSums& sums) {
  call.with_unit([&](auto unit) { forward<decltype(unit)>(call.problem, sums, TorchParallel()); });
}

SampleState* state_data(Tensor& state) {
  return static_cast<SampleState*>(state.mutable_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> loss_sums_op(
    Tensor embeddings, Tensor slot, Tensor prototypes, std::optional<Tensor> class_index,
    std::optional<Tensor> count, std::optional<Tensor> feature_index, int64_t total_sampled,
    std::vector<double> reals, std::vector<int64_t> codes) {
  Call call(embeddings, slot, prototypes, class_index, count, feature_index, {reals, codes});
  check(total_sampled >= call.problem.sampled, "total_sampled must be at least ",
        call.problem.sampled, ", the classes of this shard, got ", total_sampled);
  call.problem.total_sampled = total_sampled;
  const int64_t batch = call.problem.batch;
  auto doubles = [&](std::initializer_list<int64_t> sizes) {
    return empty_like_device(embeddings, sizes, ScalarType::Double);
  };
  Tensor sums = doubles({batch, 2});
  Tensor exponent = doubles({batch}), largest = doubles({batch}), inverse_norm = doubles({batch});
  Tensor packed = pooled(embeddings, {call.packed_size()}, ScalarType::Byte, 1);
  Tensor kept = pooled(embeddings, {call.kept_size()}, ScalarType::Byte, 1);
  double* pairs = sums.mutable_data_ptr<double>();
  run_forward(call, {pairs, exponent.mutable_data_ptr<double>(), pairs + 1,
                     largest.mutable_data_ptr<double>(), inverse_norm.mutable_data_ptr<double>(), 2,
                     packed.mutable_data_ptr(), kept.mutable_data_ptr()});
  return {sums, exponent, largest, inverse_norm, packed, kept};
}

std::tuple<Tensor, Tensor> loss_merge_op(Tensor sums, Tensor exponent, Tensor inverse_norm,
                                         Tensor slot, std::optional<Tensor> m2,
                                         std::optional<Tensor> m3, std::vector<double> reals,
                                         std::vector<int64_t> codes) {
  const int64_t batch = prepare_merge(sums, exponent, inverse_norm, slot);
  const Options options(reals, codes);
  const MarginOptions margin = options.margin_of(m2, m3, batch);
  Tensor loss = empty_like_device(sums, {batch}, ScalarType::Double);
  Tensor state = empty_like_device(sums, {batch, kSampleStateSize}, ScalarType::Double);
  double* pairs = sums.mutable_data_ptr<double>();  // only read
  merge(margin, options.scale, batch, index_data(slot),
        {pairs, exponent.mutable_data_ptr<double>(), pairs + 1, nullptr,
         inverse_norm.mutable_data_ptr<double>(), 2, nullptr, nullptr},
        loss.mutable_data_ptr<double>(), state_data(state));
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
  const ScalarType real = call.is_double ? ScalarType::Double : ScalarType::Float;
  Buffer<double> sample(6 * batch);
  Tensor state = empty_like_device(embeddings, {batch, kSampleStateSize}, ScalarType::Double);
  Tensor packed = pooled(embeddings, {call.packed_size()}, ScalarType::Byte, 1);
  Tensor kept = pooled(embeddings, {call.kept_size()}, ScalarType::Byte, 1);
  double* values = sample.get();
  double* sample_loss = values + 5 * batch;
  const ShardSums sums{values,
                       values + batch,
                       values + 2 * batch,
                       values + 3 * batch,
                       values + 4 * batch,
                       1,
                       packed.mutable_data_ptr(),
                       kept.mutable_data_ptr()};
  run_forward(call, sums);
  merge(margin, call.problem.scale, batch, call.problem.slot, sums, sample_loss, state_data(state));

  auto vector_of = [&](const double* from) {
    Tensor out = empty_like_device(embeddings, {batch}, real);
    with_real(out, [&](auto* data) {
      for (int64_t i = 0; i < batch; ++i)
        data[i] = static_cast<std::decay_t<decltype(*data)>>(from[i]);
    });
    return out;
  };
  Tensor loss;
  if (reduction == Reduction::kNone) {
    loss = vector_of(sample_loss);
  } else {
    double total = 0;
    for (int64_t i = 0; i < batch; ++i) total += sample_loss[i];
    total *= mean_factor(call.problem, reduction);
    loss = empty_like_device(embeddings, {}, real);
    with_real(loss, [&](auto* data) { *data = static_cast<std::decay_t<decltype(*data)>>(total); });
  }
  return {loss,
          vector_of(sample_loss),
          vector_of(sums.target_cosine),
          vector_of(sums.largest_negative),
          state,
          packed,
          kept};
}

// Backward of one call. With `update` the prototypes are updated at once, and have no gradient.
std::tuple<Tensor, Tensor> run_backward(const Call& call, Tensor grad_loss, const Tensor& state,
                                        const Tensor& packed, const Tensor& kept,
                                        bool want_embeddings, bool want_prototypes, bool compact,
                                        const RowUpdate* update) {
  const Problem& p = call.problem;
  const Reduction reduction = call.options.reduction;
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
          p.slot[i] == kIgnoredSlot
              ? 0.0
              : factor * static_cast<double>(reduction == Reduction::kNone ? grad[i] : grad[0]);
  });

  const TorchParallel parallel;
  // Zeros, but for the leading rows of which backward writes every value.
  auto gradient = [&](const Tensor& like, const cpu::RowSource& source, int64_t rows, bool wanted,
                      int64_t written) {
    const int64_t dim = like.size(1), bytes = dim * cpu::bytes_of(source.dtype);
    rows = wanted ? rows : 0;
    written = p.batch > 0 ? std::min(written, rows) : 0;
    Tensor out =
        pooled(like, {rows, wanted ? dim : 0}, like.scalar_type(), cpu::bytes_of(source.dtype));
    char* data = static_cast<char*>(out.mutable_data_ptr());
    fill_zero(data + written * bytes, (rows - written) * bytes, parallel);
    return std::make_pair(
        out, RowSink{wanted ? data : nullptr, source.dtype, dim, source.columns, source.dim});
  };
  check(!compact || call.class_index, "compact needs class_index");
  const bool whole_rows = p.embeddings.columns == nullptr;
  const bool all_classes = whole_rows && !call.class_index;
  const int64_t num_classes = call.prototypes.size(0);
  const auto [grad_embeddings, embedding_sink] =
      gradient(call.embeddings, p.embeddings, p.batch, want_embeddings,
               whole_rows && count_kept(p) == p.batch ? p.batch : 0);
  const auto [grad_prototypes, prototype_sink] =
      gradient(call.prototypes, p.prototypes, compact ? call.class_index->numel() : num_classes,
               want_prototypes,
               compact       ? p.sampled
               : all_classes ? num_classes
                             : 0);
  const BackwardArgs args{static_cast<const SampleState*>(state.const_data_ptr()),
                          packed.const_data_ptr(),
                          kept.const_data_ptr(),
                          weight.get(),
                          embedding_sink,
                          prototype_sink,
                          compact,
                          update};
  call.with_unit([&](auto unit) { backward<decltype(unit)>(p, args, parallel); });
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
  return run_backward(call, grad_loss, state, packed, kept, want_embeddings, want_prototypes,
                      compact, nullptr);
}

Tensor loss_backward_adamw_op(Tensor grad_loss, Tensor embeddings, Tensor slot, Tensor prototypes,
                              std::optional<Tensor> class_index, std::optional<Tensor> count,
                              std::optional<Tensor> feature_index, Tensor state, Tensor packed,
                              Tensor kept, std::vector<double> reals, std::vector<int64_t> codes,
                              bool want_embeddings, Tensor exp_avg, Tensor exp_avg_sq,
                              Tensor row_step, Tensor log_decay, double total_log_decay, double lr,
                              double beta1, double beta2, double eps, bool maximize) {
  const Call call(embeddings, slot, prototypes, class_index, count, feature_index, {reals, codes});
  const RowAdamW update = row_adamw(prototypes, exp_avg, exp_avg_sq, row_step, log_decay,
                                    total_log_decay, {lr, beta1, beta2, eps, maximize});
  return std::get<0>(
      run_backward(call, grad_loss, state, packed, kept, want_embeddings, false, false, &update));
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
  RowSgd update = row_sgd(prototypes, momentum_buffer, log_decay, decay_before, decay_after,
                          {lr, momentum, weight_decay, nesterov, maximize});
  const Problem& p = call.problem;
  const auto missed =
      replay(prototypes, last_step, history, step, p.class_index, p.sampled, &update);
  return std::get<0>(
      run_backward(call, grad_loss, state, packed, kept, want_embeddings, false, false, &update));
}

}  // namespace
}  // namespace unicom

STABLE_TORCH_LIBRARY_FRAGMENT(unicom_ext, m) {
  for (const char* schema : unicom::kLossSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(unicom_ext, CPU, m) {
  m.impl("loss", TORCH_BOX(&unicom::loss_op));
  m.impl("loss_backward", TORCH_BOX(&unicom::loss_backward_op));
  m.impl("loss_backward_adamw_", TORCH_BOX(&unicom::loss_backward_adamw_op));
  m.impl("loss_backward_sgd_", TORCH_BOX(&unicom::loss_backward_sgd_op));
  m.impl("loss_sums", TORCH_BOX(&unicom::loss_sums_op));
  m.impl("loss_merge", TORCH_BOX(&unicom::loss_merge_op));
}
