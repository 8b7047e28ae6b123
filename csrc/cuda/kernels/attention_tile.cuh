// What a block does in a pass in the shape of attention (attention.h): three warpgroups, of which one
// copies and two take 64 queries each. The queries stay in shared memory, tiles of keys come through a
// ring of stages. A warpgroup multiplies its queries by the keys, its threads make weights of the
// cosines, which are in their registers as the next product wants its first operand, and the weights
// are multiplied by the same keys. Warpgroups take turns in asking for products, so that those of one
// are done while the other makes weights: asked for together they would end together.
#pragma once

#include "attention.h"
#include "tile_hopper.cuh"

namespace unicom::cuda {

// What a kernel is given: its own arguments, and what TMA knows of the operands.
template <class Args>
struct Attending {
  Args args;
  TensorMap queries, keys;
};

// kDepth: of the operands, up to this; what is missing is multiplied as zeros.
template <class Unit, int kDepth>
class AttentionTile {
 public:
  using Real = float;
  // Of cosines. 128 columns would not leave wgmma the registers to run asynchronously.
  static constexpr int kRows = kConsumers * kBoxRows, kCols = kAttendedKeys;
  static constexpr int kThreadRows = 2, kThreadCols = kCols / 4;

  static constexpr int kBoxes = kDepth / kBoxCols;
  static constexpr int kQueryBytes = kBoxes * kBoxBytes;  // of a warpgroup
  static constexpr int kKeyBoxBytes = kCols * kBoxLineBytes;
  static constexpr int kStageBytes = kBoxes * kKeyBoxBytes;
  // One warpgroup reads the next tile's keys while the other one reads this one's, and one is copied.
  static constexpr int kStages = kDepth > 128 ? 3 : 6;
  static constexpr int kRingBegin = kConsumers * kQueryBytes;
  static constexpr int kBarriersBegin = kRingBegin + kStages * kStageBytes;
  static constexpr size_t kSharedBytes = kBarriersBegin + (2 * kStages + 1) * 8;

  template <class Args>
  static bool make_maps(Attending<Args>* to, const void* queries, int64_t query_rows,
                        const void* keys, int64_t key_rows, int64_t depth) {
    return make_tensor_map(&to->queries, queries, query_rows, depth, depth, kBoxRows) &&
           make_tensor_map(&to->keys, keys, key_rows, depth, depth, kCols);
  }

  // By all threads of the block, and all that it does: the queries from first_query on against
  // `tiles` of keys from first_key on. consumer(tile), by the threads that multiply, finds the cosines
  // of the first there, and calls add_weighted for each.
  template <class Args, class Consumer>
  UNICOM_DEVICE static void run(const Attending<Args>& given, int first_query, int first_key,
                                int tiles, const Consumer& consumer) {
    AttentionTile tile;
    if (threadIdx.x == 0) tile.init_barriers();
    __syncthreads();
    if (threadIdx.x / kWarpgroup == kConsumers) {
      give_registers<kProducerRegisters>();
      if (threadIdx.x % kWarpgroup == 0) tile.load(given, first_query, first_key, tiles);
    } else {
      take_registers<kConsumerRegisters>();
      barrier_wait(tile.queries_there(), 0);
      if (tiles > 0) tile.begin();
      consumer(tile);
    }
  }

  // Position in the tile of this thread's cosines.
  UNICOM_DEVICE int row(int i) const {
    return static_cast<int>(threadIdx.x) / kWarp * 16 + i * 8 + lane_index() / 4;
  }
  UNICOM_DEVICE int col(int j) const { return j / 2 * 8 + lane_index() % 4 * 2 + j % 2; }
  UNICOM_DEVICE float& at(int i, int j) { return cosines_[place(i, j)]; }

  // Makes the cosines those of the first tile.
  UNICOM_DEVICE void begin() {
    if (warpgroup() == 1) give_turn();
    barrier_wait(full(0), 0);
    take_turn();
    begin_products();
    add_cosines(0);
    give_turn();
    wait_products<0>();
  }

  // What each row's sums are to be multiplied by.
  UNICOM_DEVICE void scale_sums(const float (&by)[kThreadRows]) {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
      for (int j = 0; j < kDepth / 4; ++j) sums_[place(i, j)] *= by[i];
  }

  // Adds the keys, each by the weight that stands where its cosine did. Then the cosines are those of
  // the next tile, unless this is the last.
  UNICOM_DEVICE void add_weighted(bool last) {
    uint32_t weights[kCols / 16][4];
#pragma unroll
    for (int w = 0; w < kCols / 4; ++w)
      weights[w / 4][w % 4] = narrow<Unit>(cosines_[2 * w]).bits |
                              static_cast<uint32_t>(narrow<Unit>(cosines_[2 * w + 1]).bits) << 16;
    const int stage = stage_;
    advance();
    if (last) {
      take_turn();
      begin_products();
      add_keys(stage, weights);
      give_turn();
      wait_products<0>();
      return;
    }
    barrier_wait(full(stage_), phase_);
    take_turn();
    begin_products();
    add_keys(stage, weights);
    add_cosines(stage_);
    give_turn();
    wait_products<1>();
    release(stage);
    wait_products<0>();
  }

  // After the last tile: the sums of this thread's rows to [kRows][depth].
  UNICOM_DEVICE void write(float* to, int depth) {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
      for (int j = 0; j < kDepth / 4; j += 2)
        if (j * 4 < depth)
          *reinterpret_cast<Pack<float, 2>*>(to + row(i) * depth + col(j)) = {
              sums_[place(i, j)], sums_[place(i, j + 1)]};
  }

 private:
  UNICOM_DEVICE AttentionTile() : shared_(shared_address(dynamic_shared<Unit>())) {
#pragma unroll
    for (float& sum : sums_) sum = 0;
  }

  // Where a thread holds column j, of those it has, of its row i.
  UNICOM_DEVICE static constexpr int place(int i, int j) { return j / 2 * 4 + i * 2 + j % 2; }

  UNICOM_DEVICE SharedAddress keys(int stage) const {
    return shared_ + kRingBegin + stage * kStageBytes;
  }
  // A stage is full when its bytes are there, and empty when all warps that multiply have read it.
  UNICOM_DEVICE SharedAddress full(int stage) const { return shared_ + kBarriersBegin + stage * 8; }
  UNICOM_DEVICE SharedAddress empty(int stage) const { return full(kStages + stage); }
  UNICOM_DEVICE SharedAddress queries_there() const { return full(2 * kStages); }
  UNICOM_DEVICE void init_barriers() const {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(full(stage), 1);
      barrier_init(empty(stage), kConsumers * kWarpgroup / kWarp);
    }
    barrier_init(queries_there(), 1);
    barrier_init_done();
  }
  UNICOM_DEVICE void release(int stage) const {
    if (lane_index() == 0) barrier_arrive(empty(stage));
  }

  UNICOM_DEVICE void advance() {
    if (++stage_ < kStages) return;
    stage_ = 0;
    phase_ ^= 1;
  }

  UNICOM_DEVICE static int warpgroup() { return static_cast<int>(threadIdx.x) / kWarpgroup; }
  // Numbered barriers, one for the turns of each warpgroup.
  UNICOM_DEVICE static void take_turn() { meet(1 + warpgroup(), kConsumers * kWarpgroup); }
  UNICOM_DEVICE static void give_turn() { announce(2 - warpgroup(), kConsumers * kWarpgroup); }

  UNICOM_DEVICE void add_cosines(int stage) {
    const SharedAddress queries = shared_ + warpgroup() * kQueryBytes;
#pragma unroll
    for (int depth = 0; depth < kDepth; depth += 16) {
      const int box = depth / kBoxCols, within = depth % kBoxCols * 2;
      add_product<Unit, kCols, true, true>(
          cosines_, operand_descriptor(queries + box * kBoxBytes + within, 0, kSwizzleBytes),
          operand_descriptor(keys(stage) + box * kKeyBoxBytes + within, 0, kSwizzleBytes),
          depth > 0);
    }
    commit_products();
  }
  UNICOM_DEVICE void add_keys(int stage, const uint32_t (&weights)[kCols / 16][4]) {
#pragma unroll
    for (int key = 0; key < kCols; key += 16)
      add_product<Unit, kDepth, false>(
          sums_, weights[key / 16],
          operand_descriptor(keys(stage) + key * kBoxLineBytes, kKeyBoxBytes, kSwizzleBytes), true);
    commit_products();
  }

  // By one thread.
  template <class Args>
  UNICOM_DEVICE void load(const Attending<Args>& given, int first_query, int first_key, int tiles) {
    barrier_expect(queries_there(), kConsumers * kQueryBytes);
    for (int i = 0; i < kConsumers * kBoxes; ++i)
      load_box(shared_ + i * kBoxBytes, given.queries, i % kBoxes * kBoxCols,
               first_query + i / kBoxes * kBoxRows, queries_there());
    for (int t = 0; t < tiles; ++t) {
      barrier_wait(empty(stage_), phase_ ^ 1);
      barrier_expect(full(stage_), kStageBytes);
      for (int box = 0; box < kBoxes; ++box)
        load_box(keys(stage_) + box * kKeyBoxBytes, given.keys, box * kBoxCols,
                 first_key + t * kCols, full(stage_));
      advance();
    }
  }

  const SharedAddress shared_;
  int stage_ = 0, phase_ = 0;  // where in the ring this thread is, how often it was there, mod 2
  float cosines_[kCols / 2];
  float sums_[kDepth / 2];
};

}  // namespace unicom::cuda
