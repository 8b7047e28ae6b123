// The kernels of row_steps.h, written once; each kernels_*.cpp includes this with its own flags.
#pragma once

#include <type_traits>

#include "row_steps.h"
#include "simd.h"

namespace unicom::cpu {
namespace {

typedef uint16_t ShortVec __attribute__((vector_size(UNICOM_VECTOR_BYTES / 2)));
typedef uint16_t ShortLoad
    __attribute__((vector_size(UNICOM_VECTOR_BYTES / 2), aligned(2), may_alias));

struct VectorMath {
  static UNICOM_INLINE Vec<float> sqrt(Vec<float> x) {
#if defined(__AVX512F__) && UNICOM_VECTOR_BYTES == 64
    return reinterpret_cast<Vec<float>>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif defined(__AVX__) && UNICOM_VECTOR_BYTES == 32
    return reinterpret_cast<Vec<float>>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#else
    for (int i = 0; i < kWidth<float>; ++i) x[i] = std::sqrt(x[i]);
    return x;
#endif
  }
  static UNICOM_INLINE Vec<double> sqrt(Vec<double> x) {
    for (int i = 0; i < kWidth<double>; ++i) x[i] = std::sqrt(x[i]);
    return x;
  }
};

// ---- values in memory as vectors of Real

// Bits of a 16-bit type with a value.
struct Bf16Bits {
  uint16_t bits;
};

template <class Real, class T>
UNICOM_INLINE Vec<Real> load_as(const T* p) {
  if constexpr (std::is_same_v<T, Real>) {
    return load(p);
  } else if constexpr (std::is_same_v<T, Bf16Bits>) {
    const ShortVec shorts = *reinterpret_cast<const ShortLoad*>(p);
    return as_float(__builtin_convertvector(shorts, WordVec) << 16);
  } else {
    Real values[kWidth<Real>];
    for (int i = 0; i < kWidth<Real>; ++i) values[i] = static_cast<Real>(p[i]);
    return load(values);
  }
}

UNICOM_INLINE void store_shorts(Bf16Bits* p, WordVec words) {
  *reinterpret_cast<ShortLoad*>(p) = __builtin_convertvector(words, ShortVec);
}

template <class Real, class T>
UNICOM_INLINE void store_as(T* p, Vec<Real> v) {
  if constexpr (std::is_same_v<T, Real>) {
    store(p, v);
  } else if constexpr (std::is_same_v<T, Bf16Bits>) {
    store_shorts(p, round_to_bf16(v));
  } else {
    Real values[kWidth<Real>];
    store(values, v);
    for (int i = 0; i < kWidth<Real>; ++i) p[i] = static_cast<T>(values[i]);
  }
}

// A moment: like `store_as`, but bf16 is rounded by the sixteen random bits `dither` of each word.
template <class Real, class T>
UNICOM_INLINE void store_moment(T* p, Vec<Real> v, WordVec dither) {
  if constexpr (std::is_same_v<T, Bf16Bits>) {
    WordVec bits;
    std::memcpy(&bits, &v, sizeof(bits));
    const WordVec finite = (bits + dither) >> 16;
    const WordVec other = (bits >> 16) | ((bits & 0x7fffffu) != 0u ? WordVec{} + 0x40u : WordVec{});
    store_shorts(p, (bits & 0x7f800000u) == 0x7f800000u ? other : finite);
  } else {
    store_as<Real>(p, v);
  }
}

// Calls body(k, count) for the vectors of a row, count < kWidth in the last one. Remainders go
// through `Tail`, a padded copy, so that they are the same arithmetic.
template <class Real, class Body>
UNICOM_INLINE void for_vectors(int64_t dim, const Body& body) {
  constexpr int64_t kW = kWidth<Real>;
  int64_t k = 0;
  for (; k + kW <= dim; k += kW) body(k, std::integral_constant<int64_t, kW>{});
  if (k < dim) body(k, dim - k);
}

template <class T, class Count>
class Window {
 public:
  UNICOM_INLINE Window(T* data, int64_t k, Count count) : data_(data + k), count_(count) {
    if constexpr (std::is_same_v<Count, int64_t>) {
      std::memset(copy_, 0, sizeof(copy_));
      std::memcpy(copy_, data_, static_cast<size_t>(count_) * sizeof(T));
    }
  }
  UNICOM_INLINE T* get() {
    if constexpr (std::is_same_v<Count, int64_t>)
      return reinterpret_cast<T*>(copy_);
    else
      return data_;
  }
  UNICOM_INLINE void write_back() {
    if constexpr (std::is_same_v<Count, int64_t>)
      std::memcpy(data_, copy_, static_cast<size_t>(count_) * sizeof(T));
  }

 private:
  T* data_;
  Count count_;
  // Room for the widest vector of 16-bit values too.
  alignas(64) char copy_[std::is_same_v<Count, int64_t> ? UNICOM_VECTOR_BYTES : 1];
};

// Asks for the line of values [k, k + a vector).
template <class T>
UNICOM_INLINE void prefetch_values(const void* row, int64_t k) {
  __builtin_prefetch(static_cast<const T*>(row) + k, 1);
}

// ---- AdamW

template <class Real>
AdamWStep<Real> narrowed(const AdamWStep<double>& s) {
  return {static_cast<Real>(s.decay),     static_cast<Real>(s.sign),
          static_cast<Real>(s.gain1),     static_cast<Real>(s.beta2),
          static_cast<Real>(s.gain2),     static_cast<Real>(s.step_size),
          static_cast<Real>(s.root_gain), static_cast<Real>(s.eps)};
}

template <class Real, class T, class Moment, bool kSecondPerRow>
void adamw_row(const AdamWRow& row) {
  const AdamWStep<Real> s = narrowed<Real>(row.step);
  const Real* gradient = static_cast<const Real*>(row.gradient);
  Vec<Real> shared{};  // the row's one second moment
  if constexpr (kSecondPerRow) {
    Real* second = static_cast<Real*>(row.second);
    const double mean = sum_of_squares(gradient, row.dim) / static_cast<double>(row.dim);
    adamw_second_moment(s, static_cast<Real>(mean), second);
    shared = broadcast(*second);
  }
  for_vectors<Real>(row.dim, [&](int64_t k, auto count) {
    using Count = decltype(count);
    Window<const Real, Count> g(gradient, k, count);
    Window<T, Count> p(static_cast<T*>(row.parameter), k, count);
    Window<Moment, Count> m(static_cast<Moment*>(row.first), k, count);
    // Where the row has one second moment, this stands for nothing.
    Window<Moment, Count> v(static_cast<Moment*>(kSecondPerRow ? row.first : row.second), k, count);
    prefetch_values<T>(row.ahead[0], k);
    prefetch_values<Moment>(row.ahead[1], k);
    if (!kSecondPerRow) prefetch_values<Moment>(row.ahead[2], k);
    // All is read before anything is written: where parameter and moments lie a multiple of 4 kB
    // apart, CPUs take a read of one for what was just written to the other, and wait.
    const Vec<Real> slope = load(g.get()) * s.sign;
    Vec<Real> parameter = load_as<Real>(p.get()), first = load_as<Real>(m.get());
    Vec<Real> second = kSecondPerRow ? shared : load_as<Real>(v.get());
    WordVec bits{};
    if constexpr (std::is_same_v<Moment, Bf16Bits>) {
      WordVec column;
      for (int i = 0; i < kWidth<float>; ++i) column[i] = static_cast<uint32_t>(i);
      bits = rounding_bits(row.rounding_key, column + static_cast<uint32_t>(k));
    }
    adamw_first_moment(s, slope, &first);
    if (!kSecondPerRow) adamw_second_moment(s, slope * slope, &second);
    adamw_parameter<VectorMath>(s, first, second, &parameter);
    store_moment<Real>(m.get(), first, bits & 0xffffu);
    m.write_back();
    if (!kSecondPerRow) {
      store_moment<Real>(v.get(), second, bits >> 16);
      v.write_back();
    }
    store_as<Real>(p.get(), parameter);
    p.write_back();
  });
}

// ---- SGD

template <class Real>
SgdStep<Real> narrowed(const SgdStep<double>& s) {
  return {static_cast<Real>(s.pp),       static_cast<Real>(s.pb),           static_cast<Real>(s.bp),
          static_cast<Real>(s.bb),       static_cast<Real>(s.sign),         static_cast<Real>(s.lr),
          static_cast<Real>(s.momentum), static_cast<Real>(s.weight_decay), s.nesterov};
}

template <class Real, class T>
void sgd_row(const SgdRow& row) {
  const SgdStep<Real> s = narrowed<Real>(row.step);
  const Real* gradient = static_cast<const Real*>(row.gradient);
  for_vectors<Real>(row.dim, [&](int64_t k, auto count) {
    using Count = decltype(count);
    Window<const Real, Count> g(gradient, k, count);
    Window<T, Count> p(static_cast<T*>(row.parameter), k, count);
    prefetch_values<T>(row.ahead[0], k);
    prefetch_values<Real>(row.ahead[1], k);
    Vec<Real> parameter = load_as<Real>(p.get()), buffer{};
    if (row.buffer == nullptr) {
      sgd_value(s, load(g.get()), &parameter, &buffer);
    } else {
      Window<Real, Count> b(static_cast<Real*>(row.buffer), k, count);
      buffer = load(b.get());
      sgd_value(s, load(g.get()), &parameter, &buffer);
      store(b.get(), buffer);
      b.write_back();
    }
    store_as<Real>(p.get(), parameter);
    p.write_back();
  });
}

// ---- by type

// Calls f with a null pointer to the parameter's type, and one to its arithmetic.
template <class F>
UNICOM_INLINE void with_types(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32: return f(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
    case DType::kFloat64: return f(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
    case DType::kBFloat16: return f(static_cast<Bf16Bits*>(nullptr), static_cast<float*>(nullptr));
    case DType::kFloat16: return f(static_cast<_Float16*>(nullptr), static_cast<float*>(nullptr));
  }
}

template <class T>
using Pointee = std::remove_pointer_t<T>;

void adamw_kernel(const AdamWRow& row) {
  with_types(row.parameter_dtype, [&](auto* parameter, auto* real) {
    using T = Pointee<decltype(parameter)>;
    using Real = Pointee<decltype(real)>;
    const auto update = [&](auto* moment) {
      using Moment = Pointee<decltype(moment)>;
      return row.second_per_row ? adamw_row<Real, T, Moment, true>(row)
                                : adamw_row<Real, T, Moment, false>(row);
    };
    if constexpr (std::is_same_v<Real, float>)
      if (row.bf16_moments) return update(static_cast<Bf16Bits*>(nullptr));
    update(real);
  });
}

void sgd_kernel(const SgdRow& row) {
  with_types(row.parameter_dtype, [&](auto* parameter, auto* real) {
    sgd_row<Pointee<decltype(real)>, Pointee<decltype(parameter)>>(row);
  });
}

void add_row_kernel(const void* values, DType dtype, int64_t dim, bool first, void* sum) {
  with_types(dtype, [&](auto* type, auto* real) {
    using T = const Pointee<decltype(type)>;
    using Real = Pointee<decltype(real)>;
    for_vectors<Real>(dim, [&](int64_t k, auto count) {
      using Count = decltype(count);
      Window<T, Count> from(static_cast<T*>(values), k, count);
      Window<Real, Count> to(static_cast<Real*>(sum), k, count);
      const Vec<Real> value = load_as<Real>(from.get());
      store(to.get(), first ? value : load(to.get()) + value);
      to.write_back();
    });
  });
}

void put_row_kernel(const void* sum, DType dtype, int64_t dim, void* out) {
  with_types(dtype, [&](auto* type, auto* real) {
    using T = Pointee<decltype(type)>;
    using Real = Pointee<decltype(real)>;
    for_vectors<Real>(dim, [&](int64_t k, auto count) {
      using Count = decltype(count);
      Window<const Real, Count> from(static_cast<const Real*>(sum), k, count);
      Window<T, Count> to(static_cast<T*>(out), k, count);
      store_as<Real>(to.get(), load(from.get()));
      to.write_back();
    });
  });
}

constexpr UpdateKernels make_update_kernels() {
  return {adamw_kernel, sgd_kernel, add_row_kernel, put_row_kernel};
}

}  // namespace
}  // namespace unicom::cpu
