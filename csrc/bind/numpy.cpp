// unicom_ext._core: the tensor-free core over NumPy arrays, and what this build is.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#include "../core/margin.h"
#include "../core/random.h"
#include "../core/sampler.h"
#include "../core/softmax.h"
#include "../cpu/host/buffers.h"
#include "../cpu/host/parallel.h"
#include "../cpu/host/select.h"
#include "../cpu/kernels/kernels.h"

#ifndef UNICOM_BUILD_FLAGS
#define UNICOM_BUILD_FLAGS ""
#endif

namespace py = pybind11;

namespace unicom {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

void require_sample(const char* what, int64_t size, int64_t count, int64_t least) {
  require(size >= 1, std::string(what) + " must be at least 1, got " + std::to_string(size));
  require(count >= least && count <= size, "count must be in [" + std::to_string(least) + ", " +
                                               std::to_string(size) + "], got " +
                                               std::to_string(count));
}

void require_classes(int64_t num_classes, int64_t count) {
  require_sample("num_classes", num_classes, count, 0);
  require(num_classes <= kMaxClasses, "num_classes must be at most " + std::to_string(kMaxClasses) +
                                          ", got " + std::to_string(num_classes));
}

template <class T>
void require_vector(const char* what, const Array<T>& array) {
  require(array.ndim() == 1, std::string(what) + " must be one-dimensional, got " +
                                 std::to_string(array.ndim()) + " dimensions");
}

// Threads of its own, each taking the next index: a module without torch has no pool to borrow.
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
py::tuple margin_values(const Array<Real>& cosine, Real m1, Real m2, Real m3, bool exact,
                        bool linear) {
  require(m1 > 0 && m1 <= std::numeric_limits<Real>::max(),
          "m1 must be positive and finite, got " + std::to_string(m1));
  const std::vector<py::ssize_t> shape(cosine.shape(), cosine.shape() + cosine.ndim());
  Array<Real> psi(shape), slope(shape);
  const Real* in = cosine.data();
  Real* psi_out = psi.mutable_data();
  Real* slope_out = slope.mutable_data();
  for (py::ssize_t i = 0; i < cosine.size(); ++i) {
    const Margin<Real> margin = evaluate_margin(in[i], m1, m2, m3, exact, linear);
    psi_out[i] = margin.psi;
    slope_out[i] = margin.slope;
  }
  return py::make_tuple(psi, slope);
}

py::array bijection(const Array<int64_t>& index, int64_t size, uint64_t key) {
  constexpr int64_t kLargest = int64_t{1} << 62;
  require(size >= 1 && size <= kLargest, "size must be in [1, 2**62], got " + std::to_string(size));
  const Bijection permute(size, key);
  const std::vector<py::ssize_t> shape(index.shape(), index.shape() + index.ndim());
  Array<int64_t> image(shape);
  const int64_t* in = index.data();
  int64_t* out = image.mutable_data();
  for (py::ssize_t i = 0; i < index.size(); ++i) {
    require(in[i] >= 0 && in[i] < size, "index must be in [0, size = " + std::to_string(size) +
                                            "), got " + std::to_string(in[i]));
    out[i] = permute(in[i]);
  }
  return image;
}

std::optional<int64_t> shift_exponent(double scale, double count) {
  int64_t exponent = 0;
  if (!constant_exponent(scale, count, &exponent)) return std::nullopt;
  return exponent;
}

py::array block_order(uint64_t key) {
  const BlockOrder order(key);
  Array<int64_t> positions(kBlockSize);
  int64_t* out = positions.mutable_data();
  for (int i = 0; i < kBlockSize; ++i) out[i] = order(i);
  return positions;
}

py::array block_quotas(int64_t num_classes, int64_t count, int64_t seed, int64_t step) {
  require_classes(num_classes, count);
  const ClassSampler sampler(num_classes, count, seed, step);
  Array<int64_t> quotas(block_count(num_classes));
  int64_t* out = quotas.mutable_data();
  for (int64_t b = 0; b < quotas.size(); ++b) out[b] = sampler.quota(b);
  return quotas;
}

template <class Label>
Labels labels_of(const Array<Label>& labels, int64_t num_classes, int64_t ignore_index,
                 int64_t start, int64_t stop) {
  return {.data = labels.data(),
          .is_64_bit = std::is_same_v<Label, int64_t>,
          .count = labels.size(),
          .width = 0,
          .num_classes = num_classes,
          .ignore_index = ignore_index,
          .start = start,
          .stop = stop};
}

template <class Label>
int64_t bad_label(const Array<Label>& labels, int64_t num_classes, int64_t ignore_index) {
  require_vector("labels", labels);
  return cpu::find_bad_label(labels_of(labels, num_classes, ignore_index, 0, num_classes));
}

template <class Label>
py::tuple class_selection(const Array<Label>& labels, int64_t num_classes, int64_t count,
                          int64_t seed, int64_t step, int64_t ignore_index, int64_t start,
                          int64_t stop, int threads) {
  require_vector("labels", labels);
  require_classes(num_classes, count);
  require(0 <= start && start <= stop && stop <= num_classes,
          "start and stop must satisfy 0 <= start <= stop <= num_classes = " +
              std::to_string(num_classes) + ", got " + std::to_string(start) + " and " +
              std::to_string(stop));
  require(threads >= 1, "threads must be at least 1, got " + std::to_string(threads));
  const int64_t batch = labels.size();
  const int64_t bound = selection_bound(num_classes, count, batch, start, stop);
  Array<int64_t> class_index(bound), slot(batch);
  int64_t selected = 0;
  const ClassSelection selection{
      .labels = labels_of(labels, num_classes, ignore_index, start, stop),
      .count = count,
      .seed = seed,
      .step = &step,
      .bound = bound,
      .class_index = class_index.mutable_data(),
      .selected = &selected,
      .slot = slot.mutable_data()};
  {
    py::gil_scoped_release release;
    cpu::select_classes(selection, Threads(threads));
  }
  class_index.resize({selected});
  return py::make_tuple(class_index, slot);
}

py::array feature_selection(int64_t dim, int64_t count, int64_t seed, int64_t step) {
  require_sample("dim", dim, count, 1);
  Array<int64_t> feature_index(count);
  cpu::select_features({.dim = dim,
                        .count = count,
                        .seed = seed,
                        .step = &step,
                        .out = feature_index.mutable_data()});
  return feature_index;
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = std::string("gcc ") + __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["cxx_standard"] = static_cast<int64_t>(__cplusplus);
  info["flags"] = UNICOM_BUILD_FLAGS;
  return info;
}

std::vector<std::string> cpu_capabilities() {
  const char* names[4];
  const int count = cpu::capabilities(names);
  return {names, names + count};
}

template <class Real>
void bind_margin(py::module_& m) {
  m.def(
      "margin", &margin_values<Real>, py::arg("cosine").noconvert(std::is_same_v<Real, float>),
      py::arg("m1") = Real(1), py::arg("m2") = Real(0), py::arg("m3") = Real(0),
      py::arg("exact") = false, py::arg("linear") = false,
      "(psi, slope) of the combined margin at each cosine, in float32 or float64; m2 in radians.");
}

template <class Label>
void bind_labels(py::module_& m) {
  m.def("find_bad_label", &bad_label<Label>, py::arg("labels").noconvert(), py::arg("num_classes"),
        py::arg("ignore_index"),
        "Position of the first label neither in [0, num_classes) nor ignore_index; -1 if none.");
  m.def("select_classes", &class_selection<Label>, py::arg("labels").noconvert(),
        py::arg("num_classes"), py::arg("count"), py::arg("seed"), py::arg("step"),
        py::arg("ignore_index"), py::arg("start"), py::arg("stop"), py::arg("threads") = 1,
        "(class_index, slot): sorted ids in [start, stop), and each label's position among them.");
}

}  // namespace
}  // namespace unicom

PYBIND11_MODULE(_core, m) {
  using namespace unicom;
  m.doc() = "The tensor-free core of unicom_ext over NumPy arrays.";
  m.attr("BLOCK_SIZE") = kBlockSize;
  m.attr("MAX_CLASSES") = kMaxClasses;

  bind_margin<float>(m);
  bind_margin<double>(m);
  m.def("bijection", &bijection, py::arg("index"), py::arg("size"), py::arg("key"),
        "The image of each index under the keyed bijection on [0, size).");
  m.def("block_order", &block_order, py::arg("key"),
        "The keyed order of the 256 positions of a block.");
  m.def("constant_exponent", &shift_exponent, py::arg("scale"), py::arg("count"),
        "Power of two that shifts the logits of `count` classes, None where no constant can.");
  m.def("sample_size", &sample_size, py::arg("rate"), py::arg("population"),
        "rate * population, rounded half up.");
  m.def("block_quotas", &block_quotas, py::arg("num_classes"), py::arg("count"), py::arg("seed"),
        py::arg("step"), "How many classes each block of 256 draws when it holds no positives.");
  bind_labels<int32_t>(m);
  bind_labels<int64_t>(m);
  m.def("select_features", &feature_selection, py::arg("dim"), py::arg("count"), py::arg("seed"),
        py::arg("step"), "Sorted feature dimensions, `count` of `dim`.");
  m.def("cpu_capabilities", &cpu_capabilities,
        "Instruction sets with kernels that this CPU can run, the best last.");
  m.def("cpu_capability", &cpu::capability, "The instruction set in use.");
  m.def(
      "set_cpu_capability",
      [](const std::string& name) { return cpu::set_capability(name.c_str()); }, py::arg("name"),
      "Chooses an instruction set; False if this CPU or build does not have it.");
  m.def(
      "advise_huge_pages",
      [](uintptr_t address, size_t bytes) {
        cpu::advise_huge_pages(reinterpret_cast<void*>(address), bytes);
      },
      "Asks for huge pages where fresh memory lies.");
  m.def("pooled_bytes", &cpu::pooled_bytes,
        "Bytes in free blocks that the operators keep for reuse.");
  m.def("trim_pool", &cpu::trim_pool, "Gives the free blocks back to the system.");
  m.def("build_info", &build_info, "Compiler, C++ standard and flags this module was built with.");
}
