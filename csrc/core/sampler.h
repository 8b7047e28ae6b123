// Random selection of classes and feature dimensions: a function of (seed, step, positives) alone,
// so that ranks agree without communication and nothing but the step is stored.
//
// The class ids are cut into blocks of 256. A block's set starts with the positives of the batch
// and is completed with the block's other classes, in a random order, until it holds the block's
// quota. Quotas sum to exactly the number of classes asked for. Everything here works on one block
// at a time, on a bitmap of four words.
#pragma once

#include "macros.h"
#include "random.h"

namespace unicom {

constexpr int64_t kBlockSize = 256;
constexpr int kBlockWords = 4;

// A label's slot is its position among the selected classes, or one of these.
constexpr int64_t kIgnoredSlot = -1;
constexpr int64_t kElsewhereSlot = -2;  // the class belongs to another shard
constexpr int64_t kInvalidSlot = -3;    // the label is no class: on GPUs, where nobody looks first

// Whether a sample takes part.
UNICOM_HD constexpr bool is_counted(int64_t slot) { return slot >= 0 || slot == kElsewhereSlot; }

// Quotas multiply two class counts in 64 bits.
constexpr int64_t kMaxClasses = (int64_t{1} << 32) - 1;

UNICOM_HD constexpr int64_t block_count(int64_t num_classes) {
  return (num_classes + kBlockSize - 1) / kBlockSize;
}

// The share `rate` (in [0, 1]) of a population, rounded half up.
UNICOM_HD inline int64_t sample_size(double rate, int64_t population) {
  return static_cast<int64_t>(rate * static_cast<double>(population) + 0.5);
}

// Room for the part in [start, stop) of any selection of `count` classes with the positives of
// `batch` samples: no block holds more than its quota and its positives together, and the quotas of
// neighbouring blocks add up to their share of `count`. Nor does a shard need more than its size.
UNICOM_HD inline int64_t selection_bound(int64_t num_classes, int64_t count, int64_t batch,
                                         int64_t start, int64_t stop) {
  const int64_t first_id = start / kBlockSize * kBlockSize;
  const int64_t last_id = min_of(block_count(stop) * kBlockSize, num_classes);
  const int64_t covered = last_id - first_id;
  const auto share = static_cast<uint64_t>(count) * static_cast<uint64_t>(covered) /
                     static_cast<uint64_t>(num_classes);
  // Where the diffusion of the quotas stands at the first block can make it one more.
  const int64_t quota = static_cast<int64_t>(share) + (covered < num_classes);
  return min_of(stop - start, quota + min_of(batch, covered));
}

// The set of one block is a bitmap `words[kBlockWords]`; position p is bit p % 64 of word p / 64.

UNICOM_HD inline bool block_contains(const uint64_t* words, int position) {
  return words[position >> 6] >> (position & 63) & 1u;
}

UNICOM_HD inline void block_insert(uint64_t* words, int position) {
  words[position >> 6] |= uint64_t{1} << (position & 63);
}

UNICOM_HD inline int block_members(const uint64_t* words) {
  int members = 0;
  for (int w = 0; w < kBlockWords; ++w) members += popcount64(words[w]);
  return members;
}

// How many members lie below `position`, which is in [0, kBlockSize).
UNICOM_HD inline int block_rank(const uint64_t* words, int position) {
  int rank = 0;
  for (int w = 0; w < (position >> 6); ++w) rank += popcount64(words[w]);
  const uint64_t below = (uint64_t{1} << (position & 63)) - 1;
  return rank + popcount64(words[position >> 6] & below);
}

// Drops the members outside [begin, end), 0 <= begin <= end <= kBlockSize.
UNICOM_HD inline void block_restrict(uint64_t* words, int begin, int end) {
  for (int w = 0; w < kBlockWords; ++w) {
    const int low = min_of(max_of(begin - 64 * w, 0), 64);
    const int high = min_of(max_of(end - 64 * w, 0), 64);
    const uint64_t below_high = high == 64 ? ~uint64_t{0} : (uint64_t{1} << high) - 1;
    const uint64_t below_low = low == 64 ? ~uint64_t{0} : (uint64_t{1} << low) - 1;
    words[w] &= below_high & ~below_low;
  }
}

// The members in increasing order, each plus `first_id`. Returns how many were written.
UNICOM_HD inline int block_list(const uint64_t* words, int64_t first_id, int64_t* out) {
  int written = 0;
  for (int w = 0; w < kBlockWords; ++w) {
    for (uint64_t rest = words[w]; rest != 0; rest &= rest - 1) {
      out[written++] = first_id + 64 * w + lowest_bit64(rest);
    }
  }
  return written;
}

// Draws `count` of `num_classes` classes (0 <= count <= num_classes <= kMaxClasses).
class ClassSampler {
 public:
  UNICOM_HD ClassSampler(int64_t num_classes, int64_t count, int64_t seed, int64_t step)
      : num_classes_(static_cast<uint64_t>(num_classes)),
        count_(static_cast<uint64_t>(count)),
        phase_(stream_key(Stream::kQuotaPhase, seed, step) % num_classes_),
        key_(stream_key(Stream::kClassOrder, seed, step)) {}

  UNICOM_HD int64_t length(int64_t block) const {
    return min_of(static_cast<int64_t>(num_classes_) - block * kBlockSize, kBlockSize);
  }

  // Integer error diffusion: block b gets what floor((count * id + phase) / num_classes) gains over
  // its ids. The phase moves with the step, so that a block's mean quota is exactly its fair share.
  UNICOM_HD int64_t quota(int64_t block) const {
    const uint64_t begin = static_cast<uint64_t>(block * kBlockSize);
    const uint64_t end = begin + static_cast<uint64_t>(length(block));
    return static_cast<int64_t>(diffused(end) - diffused(begin));
  }

  UNICOM_HD BlockOrder order(int64_t block) const {
    return BlockOrder(absorb(key_, static_cast<uint64_t>(block)));
  }

  // `words` holds the block's positives; adds negatives until the quota is met. A block with more
  // positives than its quota keeps them all. Walking the order past positions beyond the last class
  // makes it a bijection on the classes of a short block too.
  UNICOM_HD void complete(int64_t block, uint64_t* words) const {
    const int64_t size = length(block);
    const int64_t target = quota(block);
    if (target == size) {
      for (int w = 0; w < kBlockWords; ++w) words[w] = ~uint64_t{0};
      block_restrict(words, 0, static_cast<int>(size));
      return;
    }
    int64_t missing = target - block_members(words);
    if (missing <= 0) return;
    const BlockOrder ordered = order(block);
    for (int i = 0; missing > 0 && i < kBlockSize; ++i) {
      const int position = ordered(i);
      if (position >= size || block_contains(words, position)) continue;
      block_insert(words, position);
      --missing;
    }
  }

 private:
  UNICOM_HD uint64_t diffused(uint64_t id) const { return (count_ * id + phase_) / num_classes_; }

  uint64_t num_classes_, count_, phase_, key_;
};

// The order in which feature dimensions are drawn: the first d' of its outputs are the selection.
UNICOM_HD inline Bijection feature_order(int64_t dim, int64_t seed, int64_t step) {
  return Bijection(dim, stream_key(Stream::kFeatureOrder, seed, step));
}

}  // namespace unicom
