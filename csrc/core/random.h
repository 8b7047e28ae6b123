// Counter-based random numbers: pure functions of a key, the same on every device and rank.
#pragma once

#include "macros.h"

namespace unicom {

// Uses of randomness that must not share keys. The values are part of what a seed means: changing
// one changes the selections of resumed runs.
// 4 is taken by unicom_ext/loss/adaptive/noise.py.
enum class Stream : uint64_t { kQuotaPhase = 1, kClassOrder = 2, kFeatureOrder = 3 };

constexpr uint64_t kGoldenRatio = 0x9e3779b97f4a7c15u;  // 2^64 / phi, odd

// A bijection of 64-bit words in which each input bit flips each output bit half of the time: the
// finaliser of SplitMix64 (Steele, Lea, Flood 2014; constants from Stafford's "Mix13").
UNICOM_HD inline uint64_t mix64(uint64_t word) {
  word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9u;
  word = (word ^ (word >> 27)) * 0x94d049bb133111ebu;
  return word ^ (word >> 31);
}

UNICOM_HD inline uint64_t absorb(uint64_t key, uint64_t value) {
  return mix64((key ^ value) + kGoldenRatio);
}

UNICOM_HD inline uint64_t stream_key(Stream stream, int64_t seed, int64_t step) {
  const uint64_t key = absorb(static_cast<uint64_t>(stream), static_cast<uint64_t>(seed));
  return absorb(key, static_cast<uint64_t>(step));
}

// Rounds of the Feistel networks below. With rounds that are random functions the law of a pair of
// outputs is a small Markov chain on their difference, which can be computed exactly: on 8 bits the
// share of one difference among the first 26 outputs is off by up to 46 % after three rounds, 2.9 %
// after four, 0.2 % after six.
constexpr int kFeistelRounds = 6;

UNICOM_HD inline uint64_t round_key(uint64_t key, int round) {
  return mix64(key + static_cast<uint64_t>(round + 1) * kGoldenRatio);
}

// A keyed bijection on the 256 positions of a block. Each round function is drawn among all
// functions from 4 bits to 4 bits: it is the table of sixteen 4-bit values that one 64-bit word
// holds.
class BlockOrder {
 public:
  UNICOM_HD explicit BlockOrder(uint64_t key) {
    for (int r = 0; r < kFeistelRounds; ++r) table_[r] = round_key(key, r);
  }

  UNICOM_HD int operator()(int index) const {
    uint32_t low = static_cast<uint32_t>(index) & 15u;
    uint32_t high = static_cast<uint32_t>(index) >> 4;
    for (int r = 0; r < kFeistelRounds; r += 2) {
      high ^= static_cast<uint32_t>(table_[r] >> (4 * low)) & 15u;
      low ^= static_cast<uint32_t>(table_[r + 1] >> (4 * high)) & 15u;
    }
    return static_cast<int>(high << 4 | low);
  }

 private:
  uint64_t table_[kFeistelRounds];
};

// A keyed bijection on [0, size), 1 <= size <= 2^62: a Feistel network on the next power of two
// (halves differ by at most one bit) whose outputs outside the range are sent through it again. It
// has at least 8 bits, because on narrower halves the rounds mix too slowly; walking then costs at
// most 256 evaluations over all of [0, size).
class Bijection {
 public:
  UNICOM_HD Bijection(int64_t size, uint64_t key) : size_(static_cast<uint64_t>(size)) {
    int bits = 8;
    while ((uint64_t{1} << bits) < size_) ++bits;
    low_bits_ = bits / 2;
    high_bits_ = bits - low_bits_;
    for (int r = 0; r < kFeistelRounds; ++r) key_[r] = round_key(key, r);
  }

  UNICOM_HD int64_t operator()(int64_t index) const {
    uint64_t value = static_cast<uint64_t>(index);
    do {
      value = encrypt(value);
    } while (value >= size_);
    return static_cast<int64_t>(value);
  }

 private:
  UNICOM_HD uint64_t encrypt(uint64_t value) const {
    uint64_t low = value & ((uint64_t{1} << low_bits_) - 1);
    uint64_t high = value >> low_bits_;
    for (int r = 0; r < kFeistelRounds; r += 2) {
      high ^= absorb(key_[r], low) >> (64 - high_bits_);
      low ^= absorb(key_[r + 1], high) >> (64 - low_bits_);
    }
    return high << low_bits_ | low;
  }

  uint64_t size_;
  int low_bits_, high_bits_;
  uint64_t key_[kFeistelRounds];
};

}  // namespace unicom
