// What the parts of the program `sanitized` share.
#pragma once

#include "cuda_emulation.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>

namespace unicom {

// The parts: each says what differs.
void check_rows();
void check_search();
void check_tiles();
void check_loss();

inline bool failed = false;

inline void expect(bool good, const std::string& what) {
  if (good) return;
  std::printf("differs: %s\n", what.c_str());
  failed = true;
}

inline uint16_t half_bits(double x) {
  return __builtin_bit_cast(uint16_t, static_cast<_Float16>(x));
}

// Exactly as large as asked for, so that the sanitizer sees the first byte beyond.
template <class T>
struct Array {
  std::unique_ptr<T[]> data;
  int64_t size;
  explicit Array(int64_t n) : data(new T[static_cast<size_t>(n)]()), size(n) {}
  T* get() const { return data.get(); }
};

inline double distance(const Array<float>& a, const Array<float>& b) {
  double error = 0, total = 0;
  for (int64_t i = 0; i < a.size; ++i) {
    error += (a.data[i] - b.data[i]) * double(a.data[i] - b.data[i]);
    total += b.data[i] * double(b.data[i]);
  }
  return total == 0 ? std::sqrt(error) : std::sqrt(error / total);
}

// Bit for bit.
template <class T>
bool same_bits(const Array<T>& a, const Array<T>& b) {
  return std::memcmp(a.get(), b.get(), sizeof(T) * static_cast<size_t>(a.size)) == 0;
}

}  // namespace unicom
