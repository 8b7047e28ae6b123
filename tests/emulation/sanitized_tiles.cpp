// The kernels that multiply, alone: blocks that go through several tiles.
#include "sanitized.h"

#include <algorithm>
#include <limits>
#include <random>

#include "../../csrc/cuda/kernels/attention.h"
#include "../../csrc/cuda/kernels/logits.h"
#include "../../csrc/cuda/kernels/product.h"
#include "../../csrc/cuda/kernels/samples.h"

namespace unicom {

namespace {

// ---- the logits alone, so that blocks go through several tiles of classes

struct LogitCase {
  int64_t batch, bound, count, depth, runs, width;
  double scale, filter;
};

// Rows of about unit length, as halves.
Array<uint16_t> unit_rows(std::mt19937& random, int64_t rows, int64_t depth) {
  std::normal_distribution<float> normal;
  Array<uint16_t> out(rows * depth);
  for (int64_t i = 0; i < out.size; ++i)
    out.data[i] = half_bits(normal(random) / std::sqrt(double(depth)));
  return out;
}

Array<double> as_doubles(const Array<uint16_t>& halves) {
  Array<double> out(halves.size);
  std::transform(halves.get(), halves.get() + halves.size, out.get(), emulation::half_to_float);
  return out;
}

// Inputs of a case, and what comes of them in double precision.
struct LogitInputs {
  const LogitCase& c;
  int64_t rows, classes;
  double log2_scale;
  std::mt19937 random;
  Array<uint16_t> embeddings, prototypes;
  Array<double> exact_embeddings, exact_prototypes;
  Array<int64_t> slots;
  Array<double> cosines;  // [batch][classes], kNoCosine where there is no negative below the filter
  Array<double> sums, largest;
  Array<cuda::RowScale<float>> scales;

  explicit LogitInputs(const LogitCase& c_)
      : c(c_),
        rows(cuda::round_up(c.batch, cuda::kRowGranule)),
        classes(cuda::round_up(c.bound, cuda::kClassGranule)),
        log2_scale(c.scale / std::log(2.0)),
        random(static_cast<unsigned>(c.count)),
        embeddings(unit_rows(random, rows, c.depth)),
        prototypes(unit_rows(random, classes, c.depth)),
        exact_embeddings(as_doubles(embeddings)),
        exact_prototypes(as_doubles(prototypes)),
        slots(c.batch * c.width),
        cosines(c.batch * classes),
        sums(c.batch),
        largest(c.batch),
        scales(cuda::round_up(rows, cuda::kAttendedKeys)) {
    using cuda::kNoCosine;
    for (int64_t i = 0; i < slots.size; ++i)
      slots.data[i] = static_cast<int64_t>(random() % (c.count + 9)) - 9;  // negative: none here
    // Rows without gradient have an exponent that no exponential overflows (PrepareBackward).
    for (int64_t i = 0; i < scales.size; ++i)
      scales.data[i] = {0, static_cast<float>(std::ceil(log2_scale) + 1)};
    for (int64_t i = 0; i < c.batch; ++i) {
      largest.data[i] = kNoCosine;
      double* const row = cosines.get() + i * classes;
      for (int64_t j = 0; j < classes; ++j) {
        const int64_t* const own = slots.get() + i * c.width;
        row[j] = kNoCosine;
        if (j >= c.count || std::find(own, own + c.width, j) != own + c.width) continue;
        double cosine = 0;
        for (int64_t k = 0; k < c.depth; ++k) cosine += embedding(i, k) * prototype(j, k);
        largest.data[i] = std::max(largest.data[i], cosine);
        row[j] = cosine > c.filter ? kNoCosine : cosine;
        sums.data[i] += std::exp2(log2_scale * (cosine > c.filter ? 0 : cosine));
      }
      const double exponent = std::ceil(std::log2(sums.data[i]));
      scales.data[i] = {static_cast<float>(std::exp2(exponent) / sums.data[i]),
                        static_cast<float>(exponent)};
    }
  }
  double embedding(int64_t i, int64_t k) const { return exact_embeddings.data[i * c.depth + k]; }
  double prototype(int64_t j, int64_t k) const { return exact_prototypes.data[j * c.depth + k]; }
  // Of a class's exponential in its sample's sum.
  double share(int64_t i, int64_t j) const {
    const double cosine = cosines.data[i * classes + j];
    return cosine == cuda::kNoCosine ? 0 : std::exp2(log2_scale * cosine) / sums.data[i];
  }
  cuda::Logits logits() const {
    return {.embeddings = embeddings.get(),
            .prototypes = prototypes.get(),
            .order = cuda::ClassOrder::of<cuda::Half>(1),
            .rows = rows,
            .classes = classes,
            .depth = c.depth,
            .batch = c.batch,
            .positives = {.slots = slots.get(), .width = c.width},
            .count = &c.count,
            .bound = c.bound,
            .scale = c.scale,
            .filter = c.filter};
  }
  // Whether runs' sums are those of each row.
  void expect_sums(const Array<cuda::RowSum<float>>& out, const std::string& name) const {
    for (int64_t i = 0; i < c.batch; ++i) {
      double sum = 0, peak = cuda::kNoCosine;
      for (int64_t r = 0; r < c.runs; ++r) {
        const cuda::RowSum<float>& part = out.data[r * rows + i];
        if (part.sum > 0) sum += part.sum * std::exp2(double(part.exponent));
        peak = std::max(peak, double(part.largest));
      }
      const std::string of_row = name + ", row " + std::to_string(i);
      expect(std::fabs(sum / sums.data[i] - 1) < off(), of_row + ": sum");
      expect(std::fabs(peak - largest.data[i]) < 1e-6, of_row + ": largest cosine");
    }
  }
  double off() const { return 1e-6 * (c.scale + 3); }
};

struct LogitOutcome {
  Array<cuda::RowSum<float>> sums;
  Array<uint16_t> probabilities;
};

// Sums of exponentials and probabilities of all classes but those of the first tile, beside what
// they are in double precision.
void compare_logits(const LogitCase& c) {
  using namespace unicom::cuda;
  const LogitInputs in(c);
  const int64_t rows = in.rows, first = kClassGranule, chunk = in.classes - first;
  const std::string name = "logits of " + std::to_string(c.batch) + " x " +
                           std::to_string(c.count) + " x " + std::to_string(c.depth);
  const Logits logits = in.logits();
  auto run = [&](uint64_t schedule) {
    emulation::set_schedule(schedule);
    LogitOutcome out{Array<RowSum<float>>(c.runs * rows), Array<uint16_t>(rows * chunk)};
    Queue queue;
    sum_exp<Half>(queue, {.logits = logits,
                          .runs = c.runs,
                          .out = out.sums.get(),
                          .kept = nullptr,
                          .kept_classes = 0});
    probabilities<Half>(queue, {.logits = logits,
                                .first = first,
                                .chunk = chunk,
                                .kept = nullptr,
                                .kept_classes = 0,
                                .runs = c.runs,
                                .row = in.scales.get(),
                                .out = out.probabilities.get()});
    expect(queue.error == cudaSuccess, name + ": a launch");
    return out;
  };
  for (const int capability : {8, 9}) {
    emulation::set_compute_capability(capability);
    const int64_t boxes = emulation::boxes_loaded();
    const LogitOutcome in_order = run(0), out = run(12345);
    const std::string on = name + " on " + std::to_string(capability);
    expect((emulation::boxes_loaded() > boxes) == (capability == 9), on + ": which kernels run");
    expect(std::memcmp(out.sums.get(), in_order.sums.get(),
                       sizeof(RowSum<float>) * static_cast<size_t>(out.sums.size)) == 0 &&
               std::memcmp(out.probabilities.get(), in_order.probabilities.get(),
                           2 * static_cast<size_t>(out.probabilities.size)) == 0,
           on + ": two orders of the threads");
    in.expect_sums(out.sums, on);
    for (int64_t i = 0; i < c.batch; ++i) {
      const std::string of_row = on + ", row " + std::to_string(i);
      for (int64_t j = 0; j < std::min(chunk, round_up(c.count - first, kClassGranule)); ++j) {
        const double right = in.share(i, first + j) * UnitTraits<Half>::kProbabilityScale;
        const double got = emulation::half_to_float(out.probabilities.data[i * chunk + j]);
        if (std::fabs(got - right) > right * (1e-3 + in.off()) + 6e-8)
          return expect(false, of_row + ", class " + std::to_string(first + j) + ": " +
                                   std::to_string(got) + " for " + std::to_string(right));
      }
    }
  }
}

// Passes in the shape of attention alone: sums of exponentials, and both sums of unit rows by their
// probabilities, all samples alike, in chunks that begin at the first class.
void compare_attention(const LogitCase& c) {
  using namespace unicom::cuda;
  const LogitInputs in(c);
  const std::string name = "attention of " + std::to_string(c.batch) + " x " +
                           std::to_string(c.count) + " x " + std::to_string(c.depth);
  Array<int64_t> by_slot(in.slots.size);
  std::iota(by_slot.get(), by_slot.get() + by_slot.size, int64_t{0});
  std::stable_sort(by_slot.get(), by_slot.get() + by_slot.size,
                   [&](int64_t a, int64_t b) { return in.slots.data[a] < in.slots.data[b]; });
  // Samples of both signs, each lighter than the one before.
  auto weight = [](int64_t i) {
    return (i % 2 == 0 ? 1 : -1) * std::exp2(-static_cast<double>(i));
  };
  Array<RowScale<float>> weighted(in.scales.size);
  for (int64_t i = 0; i < weighted.size; ++i)
    weighted.data[i] = i < c.batch
                           ? RowScale<float>{in.scales.data[i].factor / (i % 2 == 0 ? 2 : -2),
                                             in.scales.data[i].exponent - 1 + static_cast<float>(i)}
                           : RowScale<float>{0, -kNoExponent};
  struct AttentionOutcome {
    Array<RowSum<float>> sums;
    Array<float> of_rows, exponent, of_classes;
  };
  emulation::set_compute_capability(9);
  auto run = [&](uint64_t schedule) {
    emulation::set_schedule(schedule);
    AttentionOutcome out{Array<RowSum<float>>(c.runs * in.rows), Array<float>(in.rows * c.depth),
                         Array<float>(in.rows), Array<float>(in.classes * c.depth)};
    Array<float> attended(c.runs * in.rows * c.depth);
    Queue queue;
    attend_classes<Half>(queue, {.logits = in.logits(),
                                 .runs = c.runs,
                                 .sums = out.sums.get(),
                                 .attended = attended.get()});
    merge_attended(queue, {.rows = in.rows,
                           .depth = c.depth,
                           .runs = c.runs,
                           .sums = out.sums.get(),
                           .attended = attended.get(),
                           .out = out.of_rows.get(),
                           .exponent = out.exponent.get()});
    attend_samples<Half>(queue, {.logits = in.logits(),
                                 .first = 0,
                                 .chunk = in.classes,
                                 .by_slot = by_slot.get(),
                                 .row = weighted.get(),
                                 .out = out.of_classes.get()});
    expect(queue.error == cudaSuccess, name + ": a launch");
    return out;
  };
  const AttentionOutcome in_order = run(0), out = run(12345);
  expect(std::memcmp(out.sums.get(), in_order.sums.get(),
                     sizeof(RowSum<float>) * static_cast<size_t>(out.sums.size)) == 0 &&
             same_bits(out.of_rows, in_order.of_rows) &&
             same_bits(out.of_classes, in_order.of_classes),
         name + ": two orders of the threads");
  in.expect_sums(out.sums, name);
  Array<double> of_classes(c.count * c.depth), size_of_classes(c.count * c.depth);
  const double off = 1e-3 + in.off();
  Array<double> shares(c.count);
  for (int64_t i = 0; i < c.batch; ++i) {
    for (int64_t j = 0; j < c.count; ++j) shares.data[j] = in.share(i, j);
    for (int64_t k = 0; k < c.depth; ++k) {
      double right = 0, size = 0;
      for (int64_t j = 0; j < c.count; ++j) {
        const double of_row = shares.data[j] * in.prototype(j, k);
        const double of_class = weight(i) * shares.data[j] * in.embedding(i, k);
        right += of_row;
        size += std::fabs(of_row);
        of_classes.data[j * c.depth + k] += of_class;
        size_of_classes.data[j * c.depth + k] += std::fabs(of_class);
      }
      const double got = out.of_rows.data[i * c.depth + k] *
                         std::exp2(double(out.exponent.data[i])) / in.sums.data[i];
      if (!(std::fabs(got - right) <= off * size))
        return expect(false, name + ", row " + std::to_string(i) + ": " + std::to_string(got) +
                                 " for " + std::to_string(right));
    }
  }
  for (int64_t at = 0; at < of_classes.size; ++at) {
    const double got = out.of_classes.data[at] / UnitTraits<Half>::kProbabilityScale;
    if (!(std::fabs(got - of_classes.data[at]) <= off * size_of_classes.data[at] + 1e-10))
      return expect(false, name + ", class " + std::to_string(at / c.depth) + ": " +
                               std::to_string(got) + " for " + std::to_string(of_classes.data[at]));
  }
}

// ---- the products of backward alone, so that blocks go through several tiles and parts of the sum
// may be empty

struct ProductCase {
  int64_t rows, first, chunk, count, depth, splits;
  bool accumulate;
};

// Of both kinds of GPUs, which add in the same order, beside what they are in double precision.
void compare_products(const ProductCase& c, cuda::ProductOf of) {
  using namespace unicom::cuda;
  const bool of_embeddings = of == ProductOf::kEmbeddings;
  const std::string name = std::string("product of ") +
                           (of_embeddings ? "embeddings " : "prototypes ") +
                           std::to_string(c.rows) + " x " + std::to_string(c.count) + " x " +
                           std::to_string(c.depth) + " in " + std::to_string(c.splits);
  std::mt19937 random(static_cast<unsigned>(c.count));
  std::uniform_real_distribution<float> uniform(0, 8);
  // As probabilities leave it: zeros up to the end of the last tile of classes, and behind it NaN.
  const int64_t valid = std::clamp<int64_t>(c.count - c.first, 0, c.chunk);
  const int64_t written = round_up(valid, kClassGranule);
  constexpr uint16_t kNan = 0x7fff;
  Array<uint16_t> p(c.rows * c.chunk);
  for (int64_t i = 0; i < p.size; ++i) {
    const int64_t j = i % c.chunk;
    p.data[i] = j < valid ? half_bits(uniform(random)) : j < written ? uint16_t{0} : kNan;
  }
  const Array<uint16_t> operand = unit_rows(random, of_embeddings ? c.chunk : c.rows, c.depth);
  // What all parts have for results that have a sum.
  const int64_t out_rows = of_embeddings ? c.rows : c.chunk;
  const int64_t sum_rows = of_embeddings ? c.rows : written;
  Array<float> before(c.splits * out_rows * c.depth);
  for (int64_t i = 0; i < before.size; ++i) before.data[i] = c.accumulate ? uniform(random) : NAN;
  Array<double> right(sum_rows * c.depth), size(sum_rows * c.depth);
  const Array<double> exact_p = as_doubles(p), exact_operand = as_doubles(operand);
  for (int64_t i = 0; i < right.size; ++i) {
    const int64_t row = i / c.depth, col = i % c.depth;
    for (int64_t k = 0; k < (of_embeddings ? valid : c.rows); ++k) {
      const double term = exact_p.data[of_embeddings ? row * c.chunk + k : k * c.chunk + row] *
                          exact_operand.data[k * c.depth + col];
      right.data[i] += term;
      size.data[i] += std::fabs(term);
    }
    for (int64_t part = 0; c.accumulate && part < c.splits; ++part)
      right.data[i] += before.data[part * out_rows * c.depth + i];
  }
  auto run = [&](int capability, uint64_t schedule) {
    emulation::set_compute_capability(capability);
    emulation::set_schedule(schedule);
    Array<float> out(before.size);
    std::copy_n(before.get(), before.size, out.get());
    Queue queue;
    product<Half>(queue, {.of = of,
                          .probabilities = p.get(),
                          .operand = operand.get(),
                          .rows = c.rows,
                          .chunk = c.chunk,
                          .depth = c.depth,
                          .order = ClassOrder::of<Half>(1),
                          .count = &c.count,
                          .bound = c.first + c.chunk,
                          .first = c.first,
                          .splits = c.splits,
                          .accumulate = c.accumulate,
                          .out = out.get()});
    expect(queue.error == cudaSuccess, name + ": a launch");
    return out;
  };
  const int64_t boxes = emulation::boxes_loaded();
  const Array<float> out = run(9, 0), other_order = run(9, 12345);
  const int64_t boxes_on_hopper = emulation::boxes_loaded();
  const Array<float> other_kind = run(8, 12345);
  const bool some = valid > 0;  // else there is nothing to load
  expect((boxes_on_hopper > boxes) == some && emulation::boxes_loaded() == boxes_on_hopper,
         name + ": which kernels run");
  for (int64_t i = 0; i < right.size; ++i) {
    double sum = 0;
    for (int64_t part = 0; part < c.splits; ++part) {
      const int64_t at = part * out_rows * c.depth + i;
      if (out.data[at] != other_order.data[at])
        return expect(false, name + ": two orders of the threads");
      if ((of_embeddings || i < valid * c.depth) && out.data[at] != other_kind.data[at])
        return expect(false, name + ": two kinds of GPUs");
      sum += out.data[at];
    }
    if (!(std::fabs(sum - right.data[i]) <= 2e-6 * (size.data[i] + 8 * c.splits)))
      return expect(false, name + ", result " + std::to_string(i) + ": " + std::to_string(sum) +
                               " for " + std::to_string(right.data[i]));
  }
  // What is behind the count stays as it was.
  for (int64_t part = 0; part < c.splits; ++part) {
    const size_t bytes = sizeof(float) * static_cast<size_t>((out_rows - sum_rows) * c.depth);
    const int64_t at = (part * out_rows + sum_rows) * c.depth;
    expect(std::memcmp(out.get() + at, before.get() + at, bytes) == 0, name + ": behind the count");
  }
}

}  // namespace

void check_tiles() {
  constexpr double kNone = std::numeric_limits<double>::infinity();
  compare_logits({1, 700, 513, 64, 1, 1, 64, kNone});
  compare_logits({130, 1300, 1200, 64, 1, 1, 64, 0.2});
  compare_logits({129, 1025, 1025, 256, 2, 3, 16, kNone});
  compare_logits({65, 800, 769, 384, 1, 0, 300, kNone});
  compare_logits({150, 600, 599, 576, 1, 1, 64, 0.05});
  compare_attention({130, 1300, 1200, 64, 1, 1, 64, 0.2});
  compare_attention({650, 160, 150, 64, 1, 3, 30, kNone});
  compare_attention({257, 640, 640, 128, 1, 0, 300, kNone});
  compare_attention({400, 512, 500, 256, 2, 2, 64, kNone});
  const ProductCase products[] = {
      {128, 0, 256, 256, 64, 1, false},   {128, 256, 512, 513, 128, 1, true},
      {256, 0, 512, 300, 192, 2, false},  {384, 256, 256, 300, 256, 1, true},
      {1280, 0, 256, 255, 64, 4, false},  {128, 256, 1280, 1100, 64, 2, true},
      {128, 0, 512, 1, 512, 2, false},    {128, 512, 256, 400, 64, 1, true},
      {128, 512, 256, 400, 64, 1, false},
  };
  for (const ProductCase& c : products)
    for (const auto of : {cuda::ProductOf::kEmbeddings, cuda::ProductOf::kPrototypes})
      compare_products(c, of);
}

}  // namespace unicom
