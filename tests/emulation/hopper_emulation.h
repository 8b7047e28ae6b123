// What csrc/cuda/kernels/hopper.cuh needs of Hopper's instructions.
//
//   copies of boxes   are done some time after they were asked for, in a random order
//   products          are done some time after they were committed; their sums are NaN until the
//                     thread has waited for them
//   shared memory     as TMA and wgmma see it is a copy of what the threads see, which
//                     publish_stores refreshes
//
// Shared memory is the dynamic one: its addresses are what a descriptor holds less
// kSharedWindow. Faults stop the program with a message that names them.
#pragma once

#include <cstdint>

namespace emulation {

constexpr uint32_t kSharedWindow = 1024;  // what a block has before its dynamic shared memory

// A matrix [rows][cols] of sixteen-bit values, rows `stride` values apart, in boxes of
// [box_rows][64].
struct alignas(64) TensorMap {
  const uint16_t* data;
  int64_t rows, cols, stride;
  int box_rows;
};

void barrier_init(char* barrier, int arrivals);
void barrier_init_done();
void barrier_arrive(char* barrier, int arrivals);
void barrier_expect(char* barrier, int bytes);
void barrier_wait(char* barrier, int phase);
char* at_rank(char* shared, int rank);

// How many boxes kernels have asked for so far: tells tests which kernels ran.
int64_t boxes_loaded();
void load_box(char* to, const TensorMap* map, int col, int row, char* barrier, uint16_t ranks);
void store_box(const TensorMap* map, int col, int row, const char* from);
void commit_stores();
void wait_stores(int pending, bool written);
void publish_stores();

uint32_t shared_window_address(const char* shared);
using Widen = float (*)(uint16_t bits);
void begin_products();
void commit_products();
void wait_products(int pending);
void add_product(float* sums, int cols, uint64_t a, bool a_depth_inner, uint64_t b,
                 bool b_depth_inner, bool add, Widen widen);
void add_product(float* sums, int cols, const uint32_t (&a)[4], uint64_t b, bool b_depth_inner,
                 bool add, Widen widen);

void meet(int barrier, int threads, bool wait);
void set_registers(int registers, bool more);
int cluster_rank();
void cluster_arrive();
void cluster_wait();

}  // namespace emulation
