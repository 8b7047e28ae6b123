// The signatures of the operators, the same for every device.
#pragma once

namespace unicom {

// What the loss is asked for, in two lists (Options in options.h):
//   reals = [m1, m2, m3 (0 where per sample), scale, filter (inf: none), label_smoothing]
//   codes = [exact_margin_grad, linear_beyond_pi, precision, reduction, multi_label,
//   workspace_bytes, sparse_grad, num_centers, wants_embeddings]
// prototypes is [C * num_centers, d], class by class; class_index holds classes.
// The tensor `scale` is there for its gradient alone; its value is in reals.
// slot is [B], or [B, P] for samples with several positives; what is told of each positive is like it.
inline constexpr const char* kLossSchemas[] = {
    "loss(Tensor embeddings, Tensor slot, Tensor prototypes, Tensor? class_index, Tensor? count, "
    "Tensor? feature_index, Tensor? m2, Tensor? m3, Tensor? scale, float[] reals, int[] codes) -> "
    "(Tensor loss, "
    "Tensor sample_loss, Tensor target_cosine, Tensor largest_negative, Tensor state, "
    "Tensor packed, Tensor kept)",
    "loss_backward(Tensor grad_loss, Tensor embeddings, Tensor slot, Tensor prototypes, "
    "Tensor? class_index, Tensor? count, Tensor? feature_index, Tensor state, Tensor packed, "
    "Tensor kept, float[] reals, int[] codes, bool want_embeddings, bool want_radial, "
    "bool want_prototypes, bool compact) -> (Tensor grad_embeddings, Tensor grad_prototypes, "
    "Tensor radial)",
    "loss_sums(Tensor embeddings, Tensor slot, Tensor prototypes, Tensor? class_index, "
    "Tensor? count, Tensor? feature_index, int total_sampled, float[] reals, int[] codes) -> "
    "(Tensor sums, Tensor exponent, Tensor largest_negative, Tensor inverse_norm, Tensor packed, "
    "Tensor kept)",
    "loss_merge(Tensor sums, Tensor exponent, Tensor inverse_norm, Tensor slot, Tensor? m2, "
    "Tensor? m3, float[] reals, int[] codes) -> (Tensor sample_loss, Tensor state)",
    "loss_backward_adamw_(Tensor grad_loss, Tensor embeddings, Tensor slot, "
    "Tensor(a!) prototypes, Tensor? class_index, Tensor? count, Tensor? feature_index, "
    "Tensor state, Tensor packed, Tensor kept, float[] reals, int[] codes, bool want_embeddings, "
    "bool want_radial, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) row_step, Tensor(e!) "
    "log_decay, "
    "float total_log_decay, float lr, float beta1, float beta2, float eps, bool maximize) "
    "-> (Tensor grad_embeddings, Tensor radial)",
    "loss_backward_sgd_(Tensor grad_loss, Tensor embeddings, Tensor slot, Tensor(a!) prototypes, "
    "Tensor? class_index, Tensor? count, Tensor? feature_index, Tensor state, Tensor packed, "
    "Tensor kept, float[] reals, int[] codes, bool want_embeddings, bool want_radial, Tensor(b!)? "
    "momentum_buffer, "
    "Tensor(c!)? log_decay, Tensor(d!)? last_step, Tensor? history, float decay_before, "
    "float decay_after, int step, float lr, float momentum, float weight_decay, bool nesterov, "
    "bool maximize) -> (Tensor grad_embeddings, Tensor radial)"};

inline constexpr const char* kUpdateSchemas[] = {
    "merge_rows(Tensor(a) ids, Tensor(b) rows) -> (Tensor(a) ids, Tensor(b) rows)",
    "row_adamw_(Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
    "Tensor(d!) row_step, Tensor(e!) log_decay, Tensor ids, Tensor rows, float total_log_decay, "
    "float lr, float beta1, float beta2, float eps, bool maximize) -> ()",
    "row_sgd_(Tensor(a!) param, Tensor(b!)? momentum_buffer, Tensor(c!)? log_decay, "
    "Tensor(d!)? last_step, Tensor? history, Tensor ids, Tensor rows, float decay_before, "
    "float decay_after, int step, float lr, float momentum, float weight_decay, bool nesterov, "
    "bool maximize) -> ()"};

inline constexpr const char* kSelectionSchemas[] = {
    "select_classes(Tensor labels, Tensor step, int num_classes, int num_sampled, int seed, "
    "int ignore_index, int start, int stop) -> (Tensor class_index, Tensor count, Tensor slot)",
    "select_features(Tensor step, int dim, int num_selected, int seed) -> Tensor",
    "label_slots(Tensor labels, Tensor? class_index, int num_classes, int ignore_index, int "
    "start, "
    "int stop) -> Tensor"};

inline constexpr const char* kNearestSchemas[] = {
    "pack_centroids(Tensor centroids) -> Tensor",
    "nearest(Tensor rows, Tensor centroids, Tensor packed, Tensor? guess=None) -> "
    "(Tensor index, Tensor score)",
    "add_unit_rows(Tensor(a!) sums, Tensor(b!) counts, Tensor rows, Tensor index, int shift, "
    "Tensor? before=None) -> ()",
    "directions(Tensor sums) -> Tensor"};

inline constexpr const char* kPrunedSearchSchemas[] = {
    // on CPUs only
    "largest_byte(Tensor like) -> int",
    "project_rows(Tensor rows, Tensor means, Tensor? axes, float step, float rest_step, "
    "int largest) -> Tensor",
    "order_centroids(Tensor centroids, Tensor order, Tensor? moved, Tensor means, Tensor? axes, "
    "float step, float rest_step, int largest) -> Tensor",
    "pruned_search(Tensor rows, Tensor projected, Tensor guess, Tensor? bound, Tensor centroids, "
    "Tensor packed, Tensor means, Tensor? axes, float step, float rest_step, int largest, "
    "float margin) -> (Tensor index, Tensor score, Tensor bound, Tensor work)"};

}  // namespace unicom
