// Hopper's instructions over their emulation, in small kernels: what must be right, and planted
// faults that must be found. `hopper_checks CASE SCHEDULE` says "right", or what is wrong, or stops
// with what the emulation found. Driven by tests/cuda/test_hopper_emulation.py.
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

// Runs `kernel` in one cluster of blocks.
template <class Kernel>
void run(int blocks, int threads, int64_t shared_bytes, const Kernel& kernel) {
  const dim3 all(static_cast<unsigned>(blocks));
  emulation::run_grid(kernel, all, dim3(static_cast<unsigned>(threads)), all,
                      static_cast<size_t>(shared_bytes));
}

int thread() { return static_cast<int>(threadIdx.x); }
SharedAddress shared_bytes() { return shared_address(dynamic_shared<char>()); }

bool wrong(const char* what, double value, double right) {
  std::printf("wrong: %s is %g, not %g\n", what, value, right);
  return false;
}

// An operand [rows][depth], or [depth][rows], in lines that are longer than the matrix: beyond it
// there is NaN, which nobody may see.
template <class Unit>
struct Matrix {
  std::vector<Unit> values;
  int64_t lines, length, stride;
  bool depth_inner;

  Matrix(int64_t rows, int64_t depth, bool inner)
      : lines(inner ? rows : depth),
        length(inner ? depth : rows),
        stride(round_up(length, 8) + 8),
        depth_inner(inner) {
    std::mt19937 random(static_cast<unsigned>(rows + depth));
    std::normal_distribution<float> normal;
    values.resize(static_cast<size_t>(lines * stride), narrow<Unit>(NAN));
    for (int64_t i = 0; i < lines; ++i)
      for (int64_t j = 0; j < length; ++j)
        values[static_cast<size_t>(i * stride + j)] = narrow<Unit>(normal(random));
  }
  Unit at(int64_t row, int64_t k) const {
    const int64_t line = depth_inner ? row : k, place = depth_inner ? k : row;
    if (line >= lines || place >= length) return narrow<Unit>(0.0f);
    return values[static_cast<size_t>(line * stride + place)];
  }
  TensorMap map(int box_rows) const {
    TensorMap map;
    if (!make_tensor_map(&map, values.data(), lines, length, stride, box_rows)) std::abort();
    return map;
  }
};

// ---- products ---------------------------------------------------------------------------------

enum class Fault {
  kNone,
  kWrongPhase,
  kFullAtOnce,
  kReleasedTooEarly,
  kBoxesForgotten,
  kWrongStride,
  kWrongLeading,
  kNotAligned,
  kSumsReadEarly,
  kSumsWritten,
  kNoBegin,
  kNoWait,
  kThreadsDiffer,
};

// Where A comes from: boxes of TMA, ordinary stores, registers.
enum class From { kBoxes, kStores, kStoresUnpublished, kStoresTooEarly, kRegisters };

// A[64][depth] B[kCols][depth], transposed, by two warpgroups: one multiplies, and the first thread
// of the other one copies.
template <class Unit, int kCols, bool kADepthInner, bool kBDepthInner>
bool gemm(int rows, int cols, int depth, Fault fault = Fault::kNone, From from = From::kBoxes) {
  constexpr int kStages = 2, kStep = 64, kABytes = 64 * kBoxLineBytes;
  constexpr int kBBoxes = kBDepthInner ? 1 : (kCols + 63) / 64;
  constexpr int kBBytes = (kBDepthInner ? kCols : kBBoxes * 64) * kBoxLineBytes;
  constexpr int kStageBytes = kABytes + kBBytes;
  const int steps = static_cast<int>(ceil_div(depth, kStep));
  const Matrix<Unit> a(rows, depth, kADepthInner), b(cols, depth, kBDepthInner);
  const TensorMap a_map = a.map(64), b_map = b.map(kBDepthInner ? kCols : 64);
  std::vector<float> out(64 * kCols);

  const auto kernel = [&] {
    const SharedAddress stages = shared_bytes() + (fault == Fault::kNotAligned ? 512 : 0);
    const SharedAddress full = stages + kStages * kStageBytes, empty = full + kStages * 8;
    if (thread() == 0) {
      for (int i = 0; i < kStages; ++i) {
        barrier_init(full + i * 8, 1);
        barrier_init(empty + i * 8, kWarpgroup);
      }
      barrier_init_done();
    }
    __syncthreads();
    if (thread() == kWarpgroup) {
      for (int step = 0; step < steps; ++step) {
        const int stage = step % kStages, at = step * kStep;
        const SharedAddress to_a = stages + stage * kStageBytes, to_b = to_a + kABytes;
        const SharedAddress done = full + stage * 8;
        if (fault != Fault::kFullAtOnce) barrier_wait(empty + stage * 8, (step / kStages + 1) % 2);
        barrier_expect(done, from == From::kBoxes ? kStageBytes : kBBytes);
        if (from == From::kBoxes)
          load_box(to_a, a_map, kADepthInner ? at : 0, kADepthInner ? 0 : at, done);
        for (int i = 0; i < (fault == Fault::kBoxesForgotten ? 0 : kBBoxes); ++i)
          load_box(to_b + i * 64 * kBoxLineBytes, b_map, kBDepthInner ? at : i * 64,
                   kBDepthInner ? 0 : at, done);
      }
    }
    if (thread() >= kWarpgroup) return;

    const int row = thread() / 32 * 16 + thread() % 32 / 4, col = thread() % 4 * 2;
    float sums[kCols / 2];
    for (int step = 0; step < steps; ++step) {
      const int stage = step % kStages;
      const SharedAddress of_a = stages + stage * kStageBytes, of_b = of_a + kABytes;
      // A thread has half of a line of A, swizzled.
      const auto store_a = [&](float scale) {
        for (int k = thread() % 2 * 32; k < thread() % 2 * 32 + 32; ++k) {
          const int line = thread() / 2;
          const Unit value = narrow<Unit>(scale * widen(a.at(line, step * kStep + k)));
          const int chunk = (k / 8) ^ (line % 8);
          std::memcpy(of_a + line * kBoxLineBytes + chunk * 16 + k % 8 * 2, &value, 2);
        }
      };
      barrier_wait(full + stage * 8, step / kStages % 2 ^ (fault == Fault::kWrongPhase));
      if (from == From::kStores || from == From::kStoresTooEarly) {
        store_a(1);
        publish_stores();
      }
      if (from == From::kStoresUnpublished) {
        publish_stores();
        store_a(1);
      }
      meet(1, kWarpgroup);
      if (fault != Fault::kNoBegin) begin_products();
      for (int k = 0; k < kStep; k += 16) {
        const bool wrong_leading =
            fault == Fault::kWrongLeading || (fault == Fault::kThreadsDiffer && thread() >= 64);
        const uint64_t right =
            operand_descriptor(of_b + k * (kBDepthInner ? 2 : kBoxLineBytes),
                               wrong_leading ? kSwizzleBytes : 64 * kBoxLineBytes,
                               fault == Fault::kWrongStride ? kSwizzleBytes / 2 : kSwizzleBytes);
        const bool add = step > 0 || k > 0;
        if (from == From::kRegisters) {
          uint32_t left[4];
          for (int i = 0; i < 8; ++i) {
            const Unit value =
                a.at(row + i / 2 % 2 * 8, step * kStep + k + i / 4 * 8 + col + i % 2);
            std::memcpy(reinterpret_cast<char*>(left) + i * 2, &value, 2);
          }
          add_product<Unit, kCols, kBDepthInner>(sums, left, right, add);
        } else {
          const SharedAddress begin = of_a + k * (kADepthInner ? 2 : kBoxLineBytes);
          add_product<Unit, kCols, kADepthInner, kBDepthInner>(
              sums, operand_descriptor(begin, 64 * kBoxLineBytes, kSwizzleBytes), right, add);
        }
      }
      commit_products();
      if (fault == Fault::kReleasedTooEarly) barrier_arrive(empty + stage * 8);
      if (fault == Fault::kSumsWritten) sums[3] = 1;
      if (from == From::kStoresTooEarly) store_a(2);
      if (fault == Fault::kNoWait) return;
      if (fault == Fault::kSumsReadEarly) out[static_cast<size_t>(row * kCols + col)] = sums[0];
      wait_products<0>();
      if (fault != Fault::kReleasedTooEarly) barrier_arrive(empty + stage * 8);
    }
    for (int i = fault == Fault::kSumsReadEarly; i < kCols / 2; ++i)
      out[static_cast<size_t>((row + i / 2 % 2 * 8) * kCols + i / 4 * 8 + col + i % 2)] = sums[i];
  };
  run(1, 2 * kWarpgroup, kStages * kStageBytes + kStages * 16 + 512, kernel);

  for (int i = 0; i < 64; ++i)
    for (int j = 0; j < kCols; ++j) {
      double right = 0;
      for (int64_t k = 0; k < depth; ++k) right += double{widen(a.at(i, k))} * widen(b.at(j, k));
      const float value = out[static_cast<size_t>(i * kCols + j)];
      if (!(std::fabs(value - right) < 1e-3)) return wrong("a sum", value, right);
    }
  return true;
}

template <class Unit, int kCols>
bool in_all_majors(int rows, int cols, int depth) {
  return gemm<Unit, kCols, true, true>(rows, cols, depth) &&
         gemm<Unit, kCols, true, false>(rows, cols, depth) &&
         gemm<Unit, kCols, false, true>(rows, cols, depth) &&
         gemm<Unit, kCols, false, false>(rows, cols, depth);
}
template <class Unit, int kCols>
bool from_registers(int rows, int cols, int depth) {
  return gemm<Unit, kCols, true, true>(rows, cols, depth, Fault::kNone, From::kRegisters) &&
         gemm<Unit, kCols, true, false>(rows, cols, depth, Fault::kNone, From::kRegisters);
}

bool with(Fault fault) { return gemm<Half, 128, true, false>(64, 128, 320, fault); }
bool with(From from) { return gemm<Half, 64, true, true>(64, 64, 128, Fault::kNone, from); }

// Two warpgroups with two products each under way: 64 rows of A each.
bool two_sums_at_once() {
  const Matrix<Half> a(128, 64, true), b(128, 64, true);
  const TensorMap a_map = a.map(128), b_map = b.map(128);
  constexpr int kBytes = 128 * kBoxLineBytes;
  std::vector<float> out(128 * 128);
  run(1, 2 * kWarpgroup, 2 * kBytes + 8, [&] {
    const SharedAddress of_a = shared_bytes(), of_b = of_a + kBytes, full = of_b + kBytes;
    if (thread() == 0) {
      barrier_init(full, 1);
      barrier_init_done();
      barrier_expect(full, 2 * kBytes);
      load_box(of_a, a_map, 0, 0, full);
      load_box(of_b, b_map, 0, 0, full);
    }
    __syncthreads();
    barrier_wait(full, 0);
    float sums[2][32];
    begin_products();
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < 64; k += 16)
        add_product<Half, 64, true, true>(
            sums[half],
            operand_descriptor(of_a + thread() / kWarpgroup * 64 * kBoxLineBytes + k * 2, 0, 1024),
            operand_descriptor(of_b + half * 64 * kBoxLineBytes + k * 2, 0, 1024), k > 0);
      commit_products();
    }
    for (int half = 0; half < 2; ++half) {
      if (half == 0)
        wait_products<1>();
      else
        wait_products<0>();
      for (int i = 0; i < 32; ++i) {
        const int row = thread() / 32 * 16 + i / 2 % 2 * 8 + thread() % 32 / 4;
        const int col = half * 64 + i / 4 * 8 + thread() % 4 * 2 + i % 2;
        out[static_cast<size_t>(row * 128 + col)] = sums[half][i];
      }
    }
  });
  for (int i = 0; i < 128; ++i)
    for (int j = 0; j < 128; ++j) {
      double right = 0;
      for (int64_t k = 0; k < 64; ++k) right += double{widen(a.at(i, k))} * widen(b.at(j, k));
      const float value = out[static_cast<size_t>(i * 128 + j)];
      if (!(std::fabs(value - right) < 1e-3)) return wrong("a sum", value, right);
    }
  return true;
}

// ---- boxes ------------------------------------------------------------------------------------

// Values that say where they are.
struct Numbers {
  int rows, cols;
  std::vector<uint16_t> values;
  Numbers(int r, int c) : rows(r), cols(c), values(static_cast<size_t>(r * c)) {
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint16_t>(i + 1);
  }
  int at(int row, int col) const {
    if (row < 0 || row >= rows || col < 0 || col >= cols) return 0;
    return values[static_cast<size_t>(row * cols + col)];
  }
  TensorMap map(int box_rows) const {
    TensorMap map;
    if (!make_tensor_map(&map, values.data(), rows, cols, cols, box_rows)) std::abort();
    return map;
  }
};

uint16_t value_at(SharedAddress p) {
  uint16_t value;
  std::memcpy(&value, p, 2);
  return value;
}
SharedAddress place_in_box(SharedAddress box, int line, int col) {
  return box + line * kBoxLineBytes + ((col / 8) ^ (line % 8)) * 16 + col % 8 * 2;
}

// A barrier at the start of shared memory, whose first box begins at kSwizzleBytes.
void begin_with_barrier(int arrivals) {
  if (thread() == 0) {
    barrier_init(shared_bytes(), arrivals);
    barrier_init_done();
  }
  cluster_arrive();
  cluster_wait();
}

bool boxes_at_edges() {
  const Numbers numbers(40, 72);
  bool right = true;
  for (const auto& [row, col] :
       {std::pair{0, 0}, {8, 64}, {-3, -5}, {39, 71}, {-16, 0}, {40, 0}, {0, 72}, {20, -64}})
    run(1, 32, kSwizzleBytes + 16 * kBoxLineBytes, [&] {
      begin_with_barrier(1);
      const SharedAddress box = shared_bytes() + kSwizzleBytes;
      if (thread() == 0) {
        barrier_expect(shared_bytes(), 16 * kBoxLineBytes);
        load_box(box, numbers.map(16), col, row, shared_bytes());
      }
      barrier_wait(shared_bytes(), 0);
      for (int line = 0; line < 16; ++line)
        for (int c = thread(); c < kBoxCols; c += 32) {
          const int value = value_at(place_in_box(box, line, c)),
                    there = numbers.at(row + line, col + c);
          if (value != there) right = wrong("a value of a box", value, there);
        }
    });
  return right;
}

// Each of two blocks copies half of the lines to both.
bool multicast() {
  const Numbers numbers(32, 64);
  bool right = true;
  run(2, 32, kSwizzleBytes + 32 * kBoxLineBytes, [&] {
    begin_with_barrier(1);
    const SharedAddress box = shared_bytes() + kSwizzleBytes;
    if (thread() == 0) {
      barrier_expect(shared_bytes(), 32 * kBoxLineBytes);
      const int first = cluster_rank() * 16;
      load_box_to(3, box + first * kBoxLineBytes, numbers.map(16), 0, first, shared_bytes());
    }
    barrier_wait(shared_bytes(), 0);
    for (int line = 0; line < 32; ++line)
      for (int c = thread(); c < kBoxCols; c += 32) {
        const int value = value_at(place_in_box(box, line, c));
        if (value != numbers.at(line, c)) right = wrong("a value", value, numbers.at(line, c));
      }
    cluster_arrive();
    cluster_wait();
  });
  return right;
}

// The other block may have ended.
bool copies_to_an_ended_block() {
  const Numbers numbers(16, 64);
  run(2, 32, kSwizzleBytes + 16 * kBoxLineBytes, [&] {
    begin_with_barrier(1);
    if (cluster_rank() == 1) return;
    for (int i = 0; i < 20; ++i) meet(1, 32);  // so that the other one has ended
    if (thread() == 0)
      load_box_to(2, shared_bytes() + kSwizzleBytes, numbers.map(16), 0, 0, shared_bytes());
  });
  return true;
}

enum class StoreFault { kNone, kUnpublished, kTooEarly, kOverwritten, kNoWait, kNoCommit };

// A box into the corner of a matrix that has less room.
bool stores(StoreFault fault) {
  const Numbers source(16, 64);
  Numbers numbers(10, 40);
  const Numbers before = numbers;
  run(1, 64, kSwizzleBytes + 16 * kBoxLineBytes, [&] {
    begin_with_barrier(1);
    const SharedAddress box = shared_bytes() + kSwizzleBytes;
    const auto fill = [&](int value) {
      for (int line = 0; line < 16; ++line) {
        const auto number = static_cast<uint16_t>(value + line * 64 + thread());
        std::memcpy(place_in_box(box, line, thread()), &number, 2);
      }
    };
    fill(1000);
    if (fault != StoreFault::kUnpublished) publish_stores();
    __syncthreads();
    if (thread() == 0) {
      store_box(numbers.map(16), 24, 3, box);
      if (fault != StoreFault::kNoCommit) commit_stores();
      if (fault == StoreFault::kTooEarly) {
        const uint16_t other = 0;
        std::memcpy(place_in_box(box, 5, 5), &other, 2);
      }
      if (fault == StoreFault::kOverwritten) {
        barrier_expect(shared_bytes(), 16 * kBoxLineBytes);
        load_box(box, source.map(16), 0, 0, shared_bytes());
      }
      if (fault != StoreFault::kNoWait) wait_stores_read<0>();
    }
    __syncthreads();
    if (fault == StoreFault::kNone) fill(0);
    if (thread() == 0 && fault != StoreFault::kNoWait) wait_stores<0>();
  });
  for (int row = 0; row < 10; ++row)
    for (int col = 0; col < 40; ++col) {
      const bool in_box = row >= 3 && col >= 24;
      const int right = in_box ? 1000 + (row - 3) * 64 + col - 24 : before.at(row, col);
      if (numbers.at(row, col) != right) return wrong("a value", numbers.at(row, col), right);
    }
  return true;
}

// ---- a second opinion -------------------------------------------------------------------------

// Where CuTe has element (row, depth) of an operand: Layout_K_SW128_Atom and Layout_MN_SW128_Atom
// of halves, tiled to [256][64] with the atoms along the depth first (tile_to_shape; CUTLASS 4.2).
struct Fact {
  int row, depth, offset;
};
constexpr Fact kDepthInside[] = {{0, 0, 0},        {0, 8, 16},      {1, 0, 144},   {1, 9, 130},
                                 {2, 33, 354},     {7, 63, 910},    {8, 0, 1024},  {13, 16, 1776},
                                 {63, 40, 8096},   {37, 58, 4772},  {64, 3, 8198}, {63, 63, 8078},
                                 {100, 21, 12906}, {255, 63, 32654}};
constexpr Fact kDepthOutside[] = {{0, 0, 0},        {0, 8, 1024},    {1, 0, 2},     {1, 9, 1170},
                                  {2, 33, 4244},    {7, 63, 8190},   {8, 0, 16},    {13, 16, 2074},
                                  {63, 40, 5246},   {37, 58, 7530},  {64, 3, 8624}, {63, 63, 8078},
                                  {100, 21, 10904}, {255, 63, 32654}};
// make_gmma_desc of the first 16 of the depth, but for the address and, with the depth inside, the
// leading offset, which no instruction reads.
constexpr uint64_t kDescriptorInside = 0x4000004000000000, kDescriptorOutside = 0x4000004002000000;

bool as_cute_has_it() {
  bool right = true;
  const Numbers inside(256, 64), outside(64, 256);
  run(1, 32, 256 * kBoxLineBytes + 8, [&] {
    const SharedAddress box = shared_bytes(), full = box + 256 * kBoxLineBytes;
    if (thread() != 0) return;
    barrier_init(full, 1);
    barrier_init_done();
    barrier_expect(full, 256 * kBoxLineBytes);
    load_box(box, inside.map(256), 0, 0, full);
    barrier_wait(full, 0);
    for (const Fact& fact : kDepthInside)
      if (value_at(box + fact.offset) != inside.at(fact.row, fact.depth))
        right = wrong("a value", value_at(box + fact.offset), inside.at(fact.row, fact.depth));
    barrier_expect(full, 256 * kBoxLineBytes);
    for (int i = 0; i < 4; ++i)
      load_box(box + i * 64 * kBoxLineBytes, outside.map(64), i * 64, 0, full);
    barrier_wait(full, 1);
    for (const Fact& fact : kDepthOutside)
      if (value_at(box + fact.offset) != outside.at(fact.depth, fact.row))
        right = wrong("a value", value_at(box + fact.offset), outside.at(fact.depth, fact.row));
    const uint64_t start = emulation::kSharedWindow / 16;
    if (operand_descriptor(box, 0, kSwizzleBytes) != (kDescriptorInside | start) ||
        operand_descriptor(box + 96, 64 * kBoxLineBytes, kSwizzleBytes) !=
            (kDescriptorOutside | (start + 6)))
      right = wrong("a descriptor", 0, 0);
  });
  return right;
}

// ---- barriers, registers ----------------------------------------------------------------------

// Two warps hand a number to and fro.
bool hand_over() {
  int number = 0;
  run(1, 64, 8, [&] {
    const int warp = thread() / 32;
    for (int round = 0; round < 3; ++round) {
      if (warp == 0) {
        if (thread() == 0) number += 2;
        announce(1, 64);
        meet(2, 64);
      } else {
        meet(1, 64);
        if (thread() == 32) number *= 3;
        announce(2, 64);
      }
    }
  });
  return number == 78 || wrong("the number", number, 78);
}

template <int kLess, int kMore>
void change_registers() {
  run(1, 3 * kWarpgroup, 8, [] {
    if (thread() < kWarpgroup)
      give_registers<kLess>();
    else
      take_registers<kMore>();
  });
}

enum class BarrierFault { kNone, kNotKnown, kNoInit, kTooFew, kNotAligned };

// Arrivals of both blocks of a cluster at the first one's barrier.
bool barriers(BarrierFault fault) {
  run(2, 32, 16, [fault] {
    const SharedAddress barrier = shared_bytes() + (fault == BarrierFault::kNotAligned ? 4 : 0);
    if (thread() == 0 && fault != BarrierFault::kNoInit) {
      barrier_init(barrier, fault == BarrierFault::kTooFew ? 65 : 64);
      if (fault != BarrierFault::kNotKnown) barrier_init_done();
    }
    cluster_arrive();
    cluster_wait();
    barrier_arrive_at(barrier, 0);
    if (cluster_rank() == 0) barrier_wait(barrier, 0);
    cluster_arrive();
    cluster_wait();
  });
  return true;
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
    {"half_registers", [] { return from_registers<Half, 64>(64, 64, 128); }},
    {"bfloat_registers", [] { return from_registers<BFloat, 256>(50, 256, 90); }},
    {"half_128_registers", [] { return from_registers<Half, 128>(64, 128, 64); }},
    {"stores_then_products", [] { return with(From::kStores); }},
    {"two_sums_at_once", two_sums_at_once},
    {"boxes_at_edges", boxes_at_edges},
    {"multicast", multicast},
    {"stores", [] { return stores(StoreFault::kNone); }},
    {"as_cute_has_it", as_cute_has_it},
    {"hand_over", hand_over},
    {"barriers", [] { return barriers(BarrierFault::kNone); }},
    {"registers", [] { return change_registers<24, 240>(), true; }},

    {"wrong_phase", [] { return with(Fault::kWrongPhase); }},
    {"full_at_once", [] { return with(Fault::kFullAtOnce); }},
    {"released_too_early", [] { return with(Fault::kReleasedTooEarly); }},
    {"boxes_forgotten", [] { return with(Fault::kBoxesForgotten); }},
    {"wrong_stride", [] { return with(Fault::kWrongStride); }},
    {"wrong_leading", [] { return with(Fault::kWrongLeading); }},
    {"not_aligned", [] { return with(Fault::kNotAligned); }},
    {"sums_read_early", [] { return with(Fault::kSumsReadEarly); }},
    {"sums_written", [] { return with(Fault::kSumsWritten); }},
    {"no_begin", [] { return with(Fault::kNoBegin); }},
    {"no_wait", [] { return with(Fault::kNoWait); }},
    {"threads_differ", [] { return with(Fault::kThreadsDiffer); }},
    {"unpublished", [] { return with(From::kStoresUnpublished); }},
    {"stored_too_early", [] { return with(From::kStoresTooEarly); }},
    {"copies_to_an_ended_block", copies_to_an_ended_block},
    {"box_unpublished", [] { return stores(StoreFault::kUnpublished); }},
    {"box_stored_too_early", [] { return stores(StoreFault::kTooEarly); }},
    {"box_overwritten", [] { return stores(StoreFault::kOverwritten); }},
    {"box_not_waited_for", [] { return stores(StoreFault::kNoWait); }},
    {"box_not_committed", [] { return stores(StoreFault::kNoCommit); }},
    {"barrier_not_known", [] { return barriers(BarrierFault::kNotKnown); }},
    {"no_barrier", [] { return barriers(BarrierFault::kNoInit); }},
    {"too_few_arrivals", [] { return barriers(BarrierFault::kTooFew); }},
    {"barrier_not_aligned", [] { return barriers(BarrierFault::kNotAligned); }},
    {"part_of_a_warp",
     [] {
       run(1, 64, 8, [] {
         if (thread() % 32 < 16) meet(1, 32);
       });
       return true;
     }},
    {"too_few_threads",
     [] {
       run(1, 96, 8, [] {
         if (thread() < 64) meet(1, 96);
       });
       return true;
     }},
    {"too_many_registers", [] { return change_registers<40, 240>(), true; }},
};

}  // namespace
}  // namespace unicom::cuda

int main(int, char** argv) {
  emulation::set_schedule(std::strtoull(argv[2], nullptr, 10));
  const bool right = unicom::cuda::kCases.at(argv[1])();
  if (right) std::printf("right\n");
  return right ? 0 : 1;
}
