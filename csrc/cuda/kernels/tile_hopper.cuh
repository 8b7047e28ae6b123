// Tile of sixteen-bit operands on Hopper's tensor cores, with the meaning of Tile (tile.cuh): three
// warpgroups, of which one copies and two multiply 64 rows each by all of the columns. Operands come
// as boxes of 64 x 64 through a ring of stages, one step of 64 in depth in each. While one warpgroup
// is in its epilogue, the other one's products have the tensor cores.
//
// Blocks side by side in a cluster share their columns: each loads a part of B for all of them. So
// they must go through the same tiles and steps of B.
#pragma once

#include <algorithm>

#include "fragments.cuh"
#include "hopper.cuh"

namespace unicom::cuda {

constexpr int kConsumers = 2;  // warpgroups that multiply
constexpr int kHopperThreads = (kConsumers + 1) * kWarpgroup;
// Registers of their threads: what the compiler can give all, 168, goes from one to the others.
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;

constexpr int kBoxRows = 64;
constexpr int kBoxBytes = kBoxRows * kBoxLineBytes;

// How a launch cuts shared memory, and what TMA knows of the operands.
struct HopperPlan {
  int stages;
  bool keeps_a;  // all of A stays there, for every tile
  int ranks;     // blocks of a cluster
  size_t bytes;
};
struct HopperOperands {
  TensorMap a, b;
  HopperPlan plan;
};

// What a kernel is given.
template <class Args>
struct OnHopper {
  Args args;
  HopperOperands operands;
};

// Where a tile's operands begin in their matrices.
struct HopperOrigin {
  int row, col, depth;
};

template <class Unit, int kCols_, bool kADepthInner, bool kBDepthInner>
class HopperTile {
 public:
  using Real = float;
  static constexpr int kRows = kConsumers * kBoxRows, kCols = kCols_, kDepth = kBoxCols;
  static constexpr int kThreadRows = 2, kThreadCols = kCols / 4, kRun = 2;
  static constexpr int kABytes = kRows / kBoxRows * kBoxBytes;  // of a step
  static constexpr int kBBytes = kCols / kBoxRows * kBoxBytes;

  // steps: those of a tile if A is the same for all tiles, else 0; rows: of all blocks. A that stays
  // spares a third of what comes from the second-level cache, but the ring has to hold what one
  // warpgroup is ahead of the other and what is under way.
  static HopperPlan plan(size_t limit, int64_t steps, int64_t rows) {
    constexpr size_t kLeastStages = 4, kMostStages = 8;
    constexpr size_t kBarriers = kMostStages * 2 * 8;
    const size_t room = limit - kBarriers, kept = static_cast<size_t>(steps) * kABytes;
    const bool keeps = steps > 0 && kept + kLeastStages * kBBytes <= room;
    const size_t first = keeps ? kept : 0, stage = keeps ? kBBytes : kABytes + kBBytes;
    const size_t stages = std::min(kMostStages, (room - first) / stage);
    const int ranks = rows / kRows % 2 == 0 ? 2 : 1;
    return {static_cast<int>(stages), keeps, ranks, first + stages * stage + kBarriers};
  }

  // Of matrices that lie with the depth innermost, [rows][depth], or outermost, [depth][rows].
  static bool make_operands(HopperOperands* to, const Unit* a, int64_t rows, int64_t a_stride,
                            const Unit* b, int64_t cols, int64_t b_stride, int64_t depth) {
    return make_tensor_map(&to->a, a, kADepthInner ? rows : depth, kADepthInner ? depth : rows,
                           a_stride, kBoxRows) &&
           make_tensor_map(&to->b, b, kBDepthInner ? cols : depth, kBDepthInner ? depth : cols,
                           b_stride, kBoxRows);
  }

  // By all threads of the block, and all that it does: source(tile) gives the HopperOrigin of each
  // of `tiles` products over `steps`; consumer(tile), by the threads that multiply, calls multiply()
  // for each of them, in their order.
  template <class Source, class Consumer>
  UNICOM_DEVICE static void run(const HopperOperands& operands, int tiles, int steps,
                                const Source& source, const Consumer& consumer) {
    HopperTile tile(operands.plan, steps);
    if (threadIdx.x == 0) tile.init_barriers();
    cluster_arrive();
    cluster_wait();
    if (threadIdx.x / kWarpgroup == kConsumers) {
      give_registers<kProducerRegisters>();
      if (threadIdx.x % kWarpgroup == 0) tile.load(operands, tiles, source);
    } else {
      take_registers<kConsumerRegisters>();
      if (tiles > 0) tile.stagger(tiles);
      consumer(tile);
    }
    // A block stays while another one may arrive at its barriers.
    cluster_arrive();
    cluster_wait();
  }

  // Position in the tile of this thread's results.
  UNICOM_DEVICE int row(int i) const {
    return static_cast<int>(threadIdx.x) / kWarp * 16 + i * 8 + lane_index() / 4;
  }
  UNICOM_DEVICE int col(int j) const { return j / 2 * 8 + lane_index() % 4 * 2 + j % 2; }
  UNICOM_DEVICE float& at(int i, int j) { return sums_[j / 2 * 4 + i * 2 + j % 2]; }

  // Makes the results those of the next tile.
  UNICOM_DEVICE void multiply() {
    int last = 0;  // stage whose products are under way
    for (int step = 0; step < steps_; ++step) {
      barrier_wait(full(stage_), phase_);
      const SharedAddress stage = stages_ + stage_ * stage_bytes_;
      const SharedAddress a = (keeps_a_ ? kept_ + step * kABytes : stage) +
                              static_cast<int>(threadIdx.x) / kWarpgroup * kBoxBytes;
      const SharedAddress b = keeps_a_ ? stage : stage + kABytes;
      begin_products();
#pragma unroll
      for (int depth = 0; depth < kDepth; depth += 16)
        add_product<Unit, kCols, kADepthInner, kBDepthInner>(sums_, operand<kADepthInner>(a, depth),
                                                             operand<kBDepthInner>(b, depth),
                                                             step > 0 || depth > 0);
      commit_products();
      if (step > 0) {
        wait_products<1>();
        release(last);
      }
      last = stage_;
      advance();
    }
    wait_products<0>();
    pin(sums_);
    release(last);
  }

  // See Tile.
  template <class Convert>
  UNICOM_DEVICE void store(Unit* to, int64_t stride, const Convert& convert) {
    store_fragments(*this, to, stride, convert);
  }

 private:
  UNICOM_DEVICE HopperTile(const HopperPlan& plan, int steps)
      : kept_(shared_address(dynamic_shared<Unit>())),
        stages_(kept_ + (plan.keeps_a ? steps * kABytes : 0)),
        steps_(steps),
        count_(plan.stages),
        stage_bytes_(plan.keeps_a ? kBBytes : kABytes + kBBytes),
        ranks_(plan.ranks),
        keeps_a_(plan.keeps_a) {}

  // A stage is full when its bytes are there, and empty when all warps of all blocks of the cluster
  // that multiply have read it: every block writes to all of them.
  UNICOM_DEVICE SharedAddress full(int stage) const {
    return stages_ + count_ * stage_bytes_ + stage * 8;
  }
  UNICOM_DEVICE SharedAddress empty(int stage) const { return full(count_ + stage); }
  UNICOM_DEVICE void init_barriers() const {
    for (int stage = 0; stage < count_; ++stage) {
      barrier_init(full(stage), 1);
      barrier_init(empty(stage), ranks_ * kConsumers * kWarpgroup / kWarp);
    }
    barrier_init_done();
  }
  UNICOM_DEVICE void advance() {
    if (++stage_ < count_) return;
    stage_ = 0;
    phase_ ^= 1;
  }
  UNICOM_DEVICE void release(int stage) const {
    const int rank = lane_index();
    if (rank < ranks_) barrier_arrive_at(empty(stage), rank);
  }

  // The second warpgroup begins when half of the ring is full, which is when the first one is so far:
  // so much they stay apart. No result depends on it.
  UNICOM_DEVICE void stagger(int tiles) const {
    if (threadIdx.x / kWarpgroup == 1)
      barrier_wait(full(min_of(count_ / 2, tiles * steps_ - 1)), 0);
  }

  // What a matrix instruction takes at `depth` of a step, of boxes that lie one after another.
  template <bool kDepthInner>
  UNICOM_DEVICE static uint64_t operand(SharedAddress boxes, int depth) {
    return operand_descriptor(boxes + depth * (kDepthInner ? 2 : kBoxLineBytes), kBoxBytes,
                              kSwizzleBytes);
  }

  // By one thread.
  template <class Source>
  UNICOM_DEVICE void load(const HopperOperands& operands, int tiles, const Source& source) {
    const int rank = cluster_rank();
    const auto all_ranks = static_cast<uint16_t>((1 << ranks_) - 1);
    for (int t = 0; t < tiles; ++t) {
      const HopperOrigin from = source(t);
      const bool loads_a = !keeps_a_ || t == 0;
      for (int step = 0; step < steps_; ++step) {
        barrier_wait(empty(stage_), phase_ ^ 1);
        const SharedAddress stage = stages_ + stage_ * stage_bytes_, done = full(stage_);
        const SharedAddress a = keeps_a_ ? kept_ + step * kABytes : stage;
        const SharedAddress b = keeps_a_ ? stage : stage + kABytes;
        const int depth = from.depth + step * kDepth;
        barrier_expect(done, (loads_a ? kABytes : 0) + kBBytes);
        for (int i = 0; loads_a && i < kRows / kBoxRows; ++i) {
          const int row = from.row + i * kBoxRows;
          load_box(a + i * kBoxBytes, operands.a, kADepthInner ? depth : row,
                   kADepthInner ? row : depth, done);
        }
        for (int i = rank; i < kCols / kBoxRows; i += ranks_) {
          const int row = from.col + i * kBoxRows;
          const int x = kBDepthInner ? depth : row, y = kBDepthInner ? row : depth;
          if (ranks_ == 1)
            load_box(b + i * kBoxBytes, operands.b, x, y, done);
          else
            load_box_to(all_ranks, b + i * kBoxBytes, operands.b, x, y, done);
        }
        advance();
      }
    }
  }

  const SharedAddress kept_, stages_;
  const int steps_, count_, stage_bytes_, ranks_;
  const bool keeps_a_;
  // Where in the ring this thread is, and whether it has been there an odd number of times.
  int stage_ = 0, phase_ = 0;
  float sums_[kCols / 2];
};

// All blocks of a grid, in clusters as planned.
template <class Args>
void launch_tiles(Queue& queue, void (*kernel)(OnHopper<Args>), dim3 grid,
                  const OnHopper<Args>& given) {
  const HopperPlan& plan = given.operands.plan;
  queue.launch(kernel, grid, kHopperThreads, plan.bytes, given, plan.ranks);
}

}  // namespace unicom::cuda
