// Options of the loss as the operators of every device take them: two lists, parsed and checked
// here alone. unicom_ext/loss writes them in the same order.
#pragma once

#include <limits>
#include <optional>
#include <vector>

#include "../../core/problem.h"
#include "tensors.h"

namespace unicom {
namespace {  // types of torch::stable are hidden

struct Options {
  MarginOptions margin;  // without its per-sample arrays
  double scale;
  double filter;  // infinity: none
  double label_smoothing;
  Precision precision;
  Reduction reduction;
  MultiLabel multi_label;
  int64_t workspace_bytes;
  int64_t num_centers;
  bool wants_embeddings;
  // And of the autograd formula, which hands both lists on as they are: is the prototypes' gradient
  // to hold the sampled rows alone?
  bool sparse_grad;

  Options(const std::vector<double>& reals, const std::vector<int64_t>& codes) {
    check(reals.size() == 6, "reals must be [m1, m2, m3, scale, filter, label_smoothing], got ",
          reals.size(), " values");
    check(codes.size() == 9,
          "codes must be [exact_margin_grad, linear_beyond_pi, precision, reduction, multi_label, "
          "workspace_bytes, sparse_grad, num_centers, wants_embeddings], got ",
          codes.size(), " values");
    margin = {.m1 = reals[0],
              .m2 = reals[1],
              .m3 = reals[2],
              .m2_of_each = nullptr,
              .m3_of_each = nullptr,
              .exact_grad = codes[0] != 0,
              .linear_beyond_pi = codes[1] != 0};
    scale = reals[3];
    filter = reals[4];
    label_smoothing = reals[5];
    check(label_smoothing >= 0 && label_smoothing < 1, "label_smoothing must be in [0, 1), got ",
          label_smoothing);
    check(codes[2] >= 0 && codes[2] <= 2, "precision must be 0, 1 or 2, got ", codes[2]);
    check(codes[3] >= 0 && codes[3] <= 2, "reduction must be 0, 1 or 2, got ", codes[3]);
    check(scale > 0 && scale < std::numeric_limits<double>::infinity(),
          "scale must be a finite number > 0, got ", scale);
    precision = static_cast<Precision>(codes[2]);
    reduction = static_cast<Reduction>(codes[3]);
    check(codes[4] >= 0 && codes[4] <= 1, "multi_label must be 0 or 1, got ", codes[4]);
    multi_label = static_cast<MultiLabel>(codes[4]);
    workspace_bytes = codes[5];
    check(workspace_bytes >= 0, "workspace_bytes must be at least 0, got ", workspace_bytes);
    sparse_grad = codes[6] != 0;
    num_centers = codes[7];
    wants_embeddings = codes[8] != 0;
    check(num_centers >= 1, "num_centers must be at least 1, got ", num_centers);
    check(num_centers == 1 || label_smoothing == 0,
          "label_smoothing must be 0 with several centers, got ", label_smoothing);
  }

  // With margins of each positive's own, like the slots; the tensors must outlive it.
  SampleLoss sample_loss(const std::optional<Tensor>& m2, const std::optional<Tensor>& m3,
                         const Tensor& slot, Tensor& state) const {
    SampleLoss all{.margin = margin,
                   .scale = scale,
                   .multi_label = multi_label,
                   .label_smoothing = label_smoothing,
                   .positives = positives_of(slot),
                   .states = states_of(state, slot)};
    all.margin.m2_of_each = of_each(m2, "m2", slot);
    all.margin.m3_of_each = of_each(m3, "m3", slot);
    return all;
  }

  // slot: [batch], or [batch, width].
  static int64_t width_of(const Tensor& slot) { return slot.dim() == 2 ? slot.size(1) : 1; }
  static Positives positives_of(const Tensor& slot) {
    return {.slots = index_data(slot), .width = width_of(slot)};
  }
  static States states_of(const Tensor& state, const Tensor& slot) {
    return {.data = static_cast<double*>(state.mutable_data_ptr()), .width = width_of(slot)};
  }
  static void check_slot(const Tensor& slot, int64_t batch) {
    check(slot.scalar_type() == ScalarType::Long && (slot.dim() == 1 || slot.dim() == 2) &&
              slot.size(0) == batch && width_of(slot) >= 1,
          "slot must be Long of shape [", batch, "] or [", batch, ", P] with P >= 1");
  }

 private:
  static const double* of_each(const std::optional<Tensor>& t, const char* name,
                               const Tensor& slot) {
    if (!t) return nullptr;
    bool same = t->dim() == slot.dim() && t->scalar_type() == ScalarType::Double;
    for (int64_t d = 0; same && d < slot.dim(); ++d) same = t->size(d) == slot.size(d);
    check(same, name, " must be Double of the shape of slot");
    check(t->is_contiguous(), name, " must be contiguous");
    return t->const_data_ptr<double>();
  }
};

}  // namespace
}  // namespace unicom
