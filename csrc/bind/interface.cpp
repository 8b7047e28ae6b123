// What libunicom.so offers to a program in any language: the tensor-free core on plain arrays, and
// what this build is. unicom_ext/_engine.py calls it, and checks the arguments. Nothing here throws.
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#include "../core/margin.h"
#include "../core/random.h"
#include "../core/sampler.h"
#include "../core/selection.h"
#include "../core/softmax.h"
#include "../cpu/host/buffers.h"
#include "../cpu/host/parallel.h"
#include "../cpu/host/select.h"
#include "../cpu/kernels/kernels.h"

namespace unicom {
namespace {

// Threads of its own, each taking the next index: without torch there is no pool to borrow.
class Threads final : public cpu::Parallel {
 public:
  explicit Threads(int count) : count_(count) {}

  void run(int64_t items, const std::function<void(int64_t)>& body) const override {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
      for (int64_t i = next++; i < items; i = next++) body(i);
    };
    std::vector<std::thread> helpers;
    helpers.reserve(count_);
    try {
      while (static_cast<int>(helpers.size()) + 1 < count_) helpers.emplace_back(work);
    } catch (const std::system_error&) {
      // The system allows no more threads: these and this one do it all.
    }
    work();
    for (std::thread& helper : helpers) helper.join();
  }

  int threads() const override { return count_; }

 private:
  int count_;
};

template <class Real>
void margin_values(const Real* cosine, int64_t count, Real m1, Real m2, Real m3, bool exact,
                   bool linear, Real* psi, Real* slope) {
  for (int64_t i = 0; i < count; ++i) {
    const Margin<Real> margin = evaluate_margin(cosine[i], m1, m2, m3, exact, linear);
    psi[i] = margin.psi;
    slope[i] = margin.slope;
  }
}

// False where there is no memory for the call.
template <class Call>
bool has_memory(const Call& call) {
  try {
    call();
    return true;
  } catch (const std::bad_alloc&) {
  } catch (const std::length_error&) {  // of a vector
  }
  return false;
}

}  // namespace
}  // namespace unicom

using namespace unicom;

extern "C" {

int64_t unicom_block_size() { return kBlockSize; }

int64_t unicom_max_classes() { return kMaxClasses; }

// psi and its slope at each cosine, [count]; m2 in radians.
void unicom_margin_float32(const float* cosine, int64_t count, float m1, float m2, float m3,
                           bool exact, bool linear, float* psi, float* slope) {
  margin_values(cosine, count, m1, m2, m3, exact, linear, psi, slope);
}

void unicom_margin_float64(const double* cosine, int64_t count, double m1, double m2, double m3,
                           bool exact, bool linear, double* psi, double* slope) {
  margin_values(cosine, count, m1, m2, m3, exact, linear, psi, slope);
}

void unicom_bijection(const int64_t* index, int64_t count, int64_t size, uint64_t key,
                      int64_t* image) {
  const Bijection permute(size, key);
  for (int64_t i = 0; i < count; ++i) image[i] = permute(index[i]);
}

void unicom_block_order(uint64_t key, int64_t* positions /* [kBlockSize] */) {
  const BlockOrder order(key);
  for (int i = 0; i < kBlockSize; ++i) positions[i] = order(i);
}

// False where no constant can shift the logits.
bool unicom_constant_exponent(double scale, double count, int64_t* exponent) {
  return constant_exponent(scale, count, exponent);
}

int64_t unicom_sample_size(double rate, int64_t population) {
  return sample_size(rate, population);
}

void unicom_block_quotas(int64_t num_classes, int64_t count, int64_t seed, int64_t step,
                         int64_t* quotas /* one for each block */) {
  const ClassSampler sampler(num_classes, count, seed, step);
  for (int64_t b = 0; b < block_count(num_classes); ++b) quotas[b] = sampler.quota(b);
}

int64_t unicom_selection_bound(int64_t num_classes, int64_t count, int64_t batch, int64_t start,
                               int64_t stop) {
  return selection_bound(num_classes, count, batch, start, stop);
}

// labels: int64 or else int32, [batch].
int64_t unicom_find_bad_label(const void* labels, bool is_64_bit, int64_t batch,
                              int64_t num_classes, int64_t ignore_index) {
  return cpu::find_bad_label({.data = labels,
                              .is_64_bit = is_64_bit,
                              .count = batch,
                              .width = 0,
                              .num_classes = num_classes,
                              .ignore_index = ignore_index,
                              .start = 0,
                              .stop = num_classes});
}

// Into class_index [bound], of which the first `selected` count, and slot [batch].
bool unicom_select_classes(const void* labels, bool is_64_bit, int64_t batch, int64_t num_classes,
                           int64_t count, int64_t seed, int64_t step, int64_t ignore_index,
                           int64_t start, int64_t stop, int threads, int64_t bound,
                           int64_t* class_index, int64_t* selected, int64_t* slot) {
  return has_memory([&] {
    cpu::select_classes({.labels = {.data = labels,
                                    .is_64_bit = is_64_bit,
                                    .count = batch,
                                    .width = 0,
                                    .num_classes = num_classes,
                                    .ignore_index = ignore_index,
                                    .start = start,
                                    .stop = stop},
                         .count = count,
                         .seed = seed,
                         .step = &step,
                         .bound = bound,
                         .class_index = class_index,
                         .selected = selected,
                         .slot = slot},
                        Threads(threads));
  });
}

bool unicom_select_features(int64_t dim, int64_t count, int64_t seed, int64_t step,
                            int64_t* feature_index /* [count] */) {
  return has_memory([&] {
    cpu::select_features(
        {.dim = dim, .count = count, .seed = seed, .step = &step, .out = feature_index});
  });
}

int unicom_capabilities(const char** names /* [4] */) { return cpu::capabilities(names); }

const char* unicom_capability() { return cpu::capability(); }

bool unicom_set_capability(const char* name) { return cpu::set_capability(name); }

void unicom_advise_huge_pages(void* data, size_t bytes) { cpu::advise_huge_pages(data, bytes); }

const char* unicom_compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

int64_t unicom_cxx_standard() { return __cplusplus; }

const char* unicom_build_flags() { return UNICOM_BUILD_FLAGS; }

}  // extern "C"
