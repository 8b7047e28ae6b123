// One call of the loss, as the bindings hand it to a device. Every pointer is the caller's and
// points to memory of that device.
#pragma once

#include <cstdint>
#include <limits>

#include "rows.h"
#include "target.h"

namespace unicom {

// Of the operands that are multiplied; float64 operands are always multiplied as they are.
enum class Precision : int64_t { kFp32, kFp16, kBf16 };

// The operation on one shard of the classes.
struct Problem {
  RowSource embeddings;  // [batch, d] with the selected columns
  RowSource prototypes;  // [num_classes * centers, d] with the selected columns
  int64_t batch;
  int64_t num_classes;  // C, of this shard
  // Sub-centres: class j has the prototypes [j * centers, (j + 1) * centers), of which the nearest
  // to a sample counts, of equals the first. Not with label smoothing.
  int64_t centers = 1;
  int64_t dim;                 // d, selected or not
  const int64_t* class_index;  // [bound] ascending class ids, or nullptr: all classes
  const int64_t* count;        // [1] how many of them are valid, or nullptr: all
  int64_t bound;               // length of class_index, num_classes without one
  Positives positives;         // of each sample, as positions in class_index
  double scale;
  double filter = std::numeric_limits<double>::infinity();  // infinity: none
  double label_smoothing = 0;
  // At least the sampled classes of all shards together: fixes the constant exponent.
  int64_t total_sampled;
  Precision precision = Precision::kFp32;
  // Forward may keep so many bytes of cosines for backward, which multiplies the others again.
  int64_t keep_bytes = 0;
  bool wants_embeddings = false;  // their gradient, later: forward may prepare it

  // What sums, losses and gradients are computed and returned in: float64 or float32.
  bool is_double() const {
    return embeddings.dtype == DType::kFloat64 || prototypes.dtype == DType::kFloat64;
  }
  bool smooths() const { return label_smoothing > 0; }
  // Row j is that centre of class j.
  RowSource rows_of_center(int64_t center) const {
    RowSource rows = prototypes;
    rows.data = row_of(prototypes, center);
    rows.row_stride *= centers;
    return rows;
  }
};

// What a shard knows of each sample. Shards merge by adding the rows of `sums`, after bringing the
// first column to a common exponent where exponents are not the constant one.
struct ShardSums {
  double* sums;          // [batch][row_size()]: over this shard's negatives of
  double* exponent;      //   exp(scale * cosine), as sum * 2^exponent (-inf without classes above
                         //   the constant range); then the positives' cosines, 0 where ignored
                         //   or elsewhere; then Negatives, 0 without label smoothing
  double* inverse_norm;  // [batch] of the embedding's selected part
  double* largest_negative;  // [batch] cosine; -inf where there is none
  int64_t width;             // of Positives

  // The same with label smoothing and without, so that shards can tell each other that they differ.
  UNICOM_HD static constexpr int64_t row_size(int64_t width) {
    return 1 + width + static_cast<int64_t>(sizeof(Negatives) / sizeof(double));
  }
  UNICOM_HD double* row(int64_t i) const { return sums + i * row_size(width); }
  UNICOM_HD double& sum(int64_t i) const { return *row(i); }
  UNICOM_HD double* cosines(int64_t i) const { return row(i) + 1; }
  UNICOM_HD Negatives& negatives(int64_t i) const {
    return *reinterpret_cast<Negatives*>(row(i) + 1 + width);
  }
};

// What forward leaves for backward, in the device's own layout.
struct Saved {
  void* packed;  // unit prototypes, their inverse norms and, with label smoothing, their sum
  void* kept;    // cosines
};

// The loss of each sample and what backward needs of it, from the sums of all shards. Ignored
// samples have loss 0.
struct JoinTargets {
  SampleLoss of;
  int64_t batch;
  ShardSums sums;  // but for largest_negative
  double* loss;
};

// Results in the type that the caller sees (Problem::is_double); the mean is over the samples that
// are not ignored.
struct WriteResults {
  int64_t batch;
  Positives positives;
  const double* sample_loss;  // [batch]
  ShardSums sums;
  Reduction reduction;
  void* loss;                  // [batch] or [1]
  void* sample_loss_out;       // [batch]
  void* target_cosine_out;     // [batch][width]
  void* largest_negative_out;  // [batch]
};

// What backward reads beside the problem, and the gradients that it writes, every value of them.
struct Gradients {
  const void* grad_loss;  // as the loss: of float64 or float32, [batch] or [1]
  Reduction reduction;
  States states;
  const void *packed, *kept;  // see Saved
  void* embeddings;           // [batch, d] of the embeddings' type; nullptr: not wanted
  double* radial;    // [batch] push * the mean of the negatives' cosines by their softmax, of which
                     // this shard's part; nullptr: not wanted
  void* prototypes;  // [num_classes * centers, d] of theirs, or [bound * centers, d], class by
                     // class, when compact; nullptr: not wanted, or taken by an optimizer
  bool compact;
};

}  // namespace unicom
