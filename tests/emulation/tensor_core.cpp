#include "tensor_core.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulation {

namespace {

// Four sums at once.
template <class T>
using Four [[gnu::vector_size(4 * sizeof(T))]] = T;
using Doubles = Four<double>;
using Floats = Four<float>;
using Integers = Four<int32_t>;
using Bits = Four<int64_t>;

// Of any address.
template <class T>
struct [[gnu::packed, gnu::may_alias]] Unaligned {
  Four<T> value;
};
template <class T>
[[gnu::always_inline]] inline Four<T> load(const T* from) {
  return reinterpret_cast<const Unaligned<T>*>(from)->value;
}

[[gnu::always_inline]] inline Doubles absolute(Doubles x) { return (Doubles)((Bits)x & INT64_MAX); }

[[gnu::always_inline]] inline void add_truncated(float* sums, const Doubles (&terms)[kDepth]) {
  const Doubles start = __builtin_convertvector(load(sums), Doubles);
  // Where all is zero, any digit will do.
  Doubles exact = start, largest = absolute(start) + 0x1p-900;
  for (const Doubles& term : terms) {
    exact += term;
    largest = absolute(term) > largest ? absolute(term) : largest;
  }
  constexpr int kFraction = 52;  // bits of it
  const Bits digit = ((Bits)largest >> kFraction << kFraction) - (int64_t{23} << kFraction);
  const Doubles digits = (Doubles)((int64_t{2046} << kFraction) - digit);
  Integers sum = __builtin_convertvector(start * digits, Integers);
  for (const Doubles& term : terms) sum += __builtin_convertvector(term * digits, Integers);
  // Clears the digits that a float does not hold: as many as |sum| has above 24 bits.
  const Integers sign = sum >> 31, size = (sum ^ sign) - sign;
  Integers beyond = size >> 24;
  for (int step = 1; step <= 4; step *= 2) beyond |= beyond >> step;
  sum = ((size & ~beyond) ^ sign) - sign;
  const Doubles truncated = __builtin_convertvector(sum, Doubles) * (Doubles)digit;
  const Bits finite = absolute(exact) <= 0x1.fffffffffffffp1023;
  reinterpret_cast<Unaligned<float>*>(sums)->value =
      __builtin_convertvector(finite ? truncated : exact, Floats);
}

}  // namespace

// For the CPU at hand: most of the emulation's time is here.
#define FOR_EACH_CPU [[gnu::target_clones("avx2", "default")]]

FOR_EACH_CPU void multiply_add(float* sums, const double* a, int rows, const double* b, int cols) {
  for (int row = 0; row < rows; ++row)
    for (int col = 0; col < cols; col += 4) {
      Doubles terms[kDepth];
      for (int k = 0; k < kDepth; ++k) terms[k] = a[k * rows + row] * load(b + k * cols + col);
      add_truncated(sums + row * cols + col, terms);
    }
}

FOR_EACH_CPU void multiply_add(float (&c)[4], int lane, const Fragments (&all)[32]) {
  // Of this lane's rows and columns, two each.
  Doubles terms[kDepth];
  for (int holder = 0; holder < 4; ++holder) {  // within a group of four lanes
    const auto& rows = all[lane / 4 * 4 + holder].of;
    const auto& first = all[lane % 4 * 8 + holder].of;
    const auto& second = all[lane % 4 * 8 + 4 + holder].of;
    for (int part = 0; part < 2; ++part)
      for (int half = 0; half < 2; ++half) {
        const double row[2] = {rows[2 * part][half], rows[2 * part + 1][half]};
        const double col[2] = {first[4 + part][half], second[4 + part][half]};
        terms[part * 8 + holder * 2 + half] =
            Doubles{row[0], row[0], row[1], row[1]} * Doubles{col[0], col[1], col[0], col[1]};
      }
  }
  add_truncated(c, terms);
}

float half_to_float(uint16_t bits) {
  // By table: the compiler's own conversion is a slow call.
  static const auto table = [] {
    std::vector<float> values(1 << 16);
    for (std::size_t i = 0; i < values.size(); ++i)
      values[i] = static_cast<float>(__builtin_bit_cast(_Float16, static_cast<uint16_t>(i)));
    return values;
  }();
  return table[bits];
}

}  // namespace emulation
