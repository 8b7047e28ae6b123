// Hopper's instructions over their emulation, in small kernels: products that must be right, and
// planted faults that must be found. `hopper_checks CASE SCHEDULE` runs one of the cases, says
// "right" or "wrong", or stops with what the emulation found. Driven by
// tests/cuda/test_hopper_emulation.py.
#include "cuda_emulation.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/kernels/hopper.cuh"

namespace unicom::cuda {
namespace {

enum class Fault {
  kNone,
};

// C[64][kCols] = A B, transposed, of one block: a warpgroup that multiplies, and one whose first
// thread copies.
constexpr int kStages = 2, kStepDepth = 64, kABytes = 64 * kBoxLineBytes;

struct Gemm {
  TensorMap a, b;
  float* out;  // [64][kCols]
  int steps;
  Fault fault;
};

template <class Unit, int kCols, bool kADepthInner, bool kBDepthInner>
__global__ void gemm_kernel(const __grid_constant__ Gemm g) {
  constexpr int kBBoxes = kBDepthInner ? 1 : (kCols + 63) / 64;
  constexpr int kBBytes = (kBDepthInner ? kCols : kBBoxes * 64) * kBoxLineBytes;
  constexpr int kStageBytes = kABytes + kBBytes;
  const SharedAddress shared = shared_address(dynamic_shared<char>());
  const SharedAddress full = shared + kStages * kStageBytes, empty = full + kStages * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + i * 8, 1);
      barrier_init(empty + i * 8, kWarpgroup);
    }
    barrier_init_done();
  }
  __syncthreads();
  if (threadIdx.x == kWarpgroup) {
    for (int step = 0; step < g.steps; ++step) {
      const int stage = step % kStages, depth = step * kStepDepth;
      const SharedAddress a = shared + stage * kStageBytes, b = a + kABytes,
                          done = full + stage * 8;
      barrier_wait(empty + stage * 8, (step / kStages + 1) % 2);
      barrier_expect(done, kStageBytes);
      load_box(a, g.a, kADepthInner ? depth : 0, kADepthInner ? 0 : depth, done);
      for (int i = 0; i < kBBoxes; ++i)
        load_box(b + i * 64 * kBoxLineBytes, g.b, kBDepthInner ? depth : i * 64,
                 kBDepthInner ? 0 : depth, done);
    }
  } else if (threadIdx.x < kWarpgroup) {
    float sums[kCols / 2];
    for (int step = 0; step < g.steps; ++step) {
      const int stage = step % kStages;
      const SharedAddress a = shared + stage * kStageBytes, b = a + kABytes;
      barrier_wait(full + stage * 8, step / kStages % 2);
      begin_products();
      for (int k = 0; k < kStepDepth; k += 16)
        add_product<Unit, kCols, kADepthInner, kBDepthInner>(
            sums, operand_descriptor(a + k * (kADepthInner ? 2 : kBoxLineBytes), 0, kSwizzleBytes),
            operand_descriptor(b + k * (kBDepthInner ? 2 : kBoxLineBytes), 64 * kBoxLineBytes,
                               kSwizzleBytes),
            step > 0 || k > 0);
      commit_products();
      wait_products<0>();
      barrier_arrive(empty + stage * 8);
    }
    for (int i = 0; i < kCols / 2; ++i) {
      const auto t = static_cast<int>(threadIdx.x);
      const int row = t / 32 * 16 + i / 2 % 2 * 8 + t % 32 / 4, col = i / 4 * 8 + t % 4 * 2 + i % 2;
      g.out[row * kCols + col] = sums[i];
    }
  }
}

template <class Unit>
struct Matrix {
  std::vector<Unit> values;
  int64_t lines, length, stride;
  bool depth_inner;

  // [rows][depth], or [depth][rows].
  Matrix(int64_t rows, int64_t depth, bool inner, std::mt19937& random)
      : lines(inner ? rows : depth),
        length(inner ? depth : rows),
        stride(round_up(length, 8) + 8),
        depth_inner(inner) {
    values.resize(static_cast<size_t>(lines * stride), narrow<Unit>(NAN));
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < lines; ++i)
      for (int64_t j = 0; j < length; ++j)
        values[static_cast<size_t>(i * stride + j)] = narrow<Unit>(normal(random));
  }
  double at(int64_t row, int64_t k) const {
    const int64_t line = depth_inner ? row : k, place = depth_inner ? k : row;
    return line < lines && place < length
               ? widen(values[static_cast<size_t>(line * stride + place)])
               : 0;
  }
  TensorMap map(int box_rows) const {
    TensorMap map;
    if (!make_tensor_map(&map, values.data(), lines, length, stride, box_rows)) std::abort();
    return map;
  }
};

template <class Unit, int kCols, bool kADepthInner, bool kBDepthInner>
bool gemm(int rows, int cols, int depth, Fault fault) {
  std::mt19937 random(7);
  const Matrix<Unit> a(rows, depth, kADepthInner, random), b(cols, depth, kBDepthInner, random);
  std::vector<float> out(64 * kCols, NAN);
  const Gemm args{.a = a.map(64),
                  .b = b.map(kBDepthInner ? kCols : 64),
                  .out = out.data(),
                  .steps = static_cast<int>(ceil_div(depth, kStepDepth)),
                  .fault = fault};
  Queue queue;
  queue.launch(&gemm_kernel<Unit, kCols, kADepthInner, kBDepthInner>, dim3(1), 2 * kWarpgroup,
               kStages * (kABytes + round_up(kCols, 64) * kBoxLineBytes) + kStages * 16, args);
  if (queue.error != cudaSuccess) std::abort();
  for (int i = 0; i < 64; ++i)
    for (int j = 0; j < kCols; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < depth; ++k) sum += a.at(i, k) * b.at(j, k);
      if (!(std::fabs(out[static_cast<size_t>(i * kCols + j)] - sum) < 1e-3)) {
        std::printf("wrong: %d %d is %g, not %g\n", i, j, out[static_cast<size_t>(i * kCols + j)],
                    sum);
        return false;
      }
    }
  return true;
}

template <class Unit, int kCols>
bool in_all_majors(int rows, int cols, int depth) {
  return gemm<Unit, kCols, true, true>(rows, cols, depth, Fault::kNone) &&
         gemm<Unit, kCols, true, false>(rows, cols, depth, Fault::kNone) &&
         gemm<Unit, kCols, false, true>(rows, cols, depth, Fault::kNone) &&
         gemm<Unit, kCols, false, false>(rows, cols, depth, Fault::kNone);
}

const std::map<std::string, bool (*)()> kCases{
    {"half_64", [] { return in_all_majors<Half, 64>(64, 64, 192); }},
    {"half_96", [] { return in_all_majors<Half, 96>(60, 90, 150); }},
    {"half_128", [] { return in_all_majors<Half, 128>(64, 128, 64); }},
    {"half_256", [] { return in_all_majors<Half, 256>(9, 256, 320); }},
    {"bfloat_64", [] { return in_all_majors<BFloat, 64>(64, 64, 192); }},
    {"bfloat_96", [] { return in_all_majors<BFloat, 96>(64, 1, 8); }},
    {"bfloat_128", [] { return in_all_majors<BFloat, 128>(64, 128, 72); }},
    {"bfloat_256", [] { return in_all_majors<BFloat, 256>(64, 256, 128); }},
};

}  // namespace
}  // namespace unicom::cuda

int main(int, char** argv) {
  emulation::set_schedule(std::strtoull(argv[2], nullptr, 10));
  const bool right = unicom::cuda::kCases.at(argv[1])();
  if (right) std::printf("right\n");
  return right ? 0 : 1;
}
