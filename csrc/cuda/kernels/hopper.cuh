// The instructions that came with Hopper (sm_90a), named: barriers that count bytes, copies of boxes
// by the tensor memory accelerator (TMA), products of a warpgroup on operands in shared memory
// (wgmma), clusters of blocks. For sm_90a only: kernels have a body under UNICOM_HAS_HOPPER and none
// in what is compiled for other GPUs.
//
// A box of TMA is [rows][64] sixteen-bit values, 128 bytes a line, swizzled: chunk c of 16 bytes of
// line l lies at chunk c ^ (l % 8). Boxes begin at multiples of 1024 bytes, which the swizzle and
// the descriptors of wgmma rely on.
#pragma once

#include "tensor_core.cuh"
#include "tensor_map.h"

#if defined(UNICOM_EMULATE_CUDA) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define UNICOM_HAS_HOPPER
#endif

namespace unicom::cuda {

constexpr int kWarpgroup = 128;  // threads that issue a product together
constexpr int kBoxCols = 64;     // sixteen-bit values of a line of a box
constexpr int kBoxLineBytes = 128;
constexpr int kSwizzleBytes = 1024;  // after which the swizzle repeats: eight lines

// ---- barriers ---------------------------------------------------------------------------------
// A barrier has 8 bytes of shared memory. A phase ends when all arrivals have come and all bytes
// that were expected have been written; phases are numbered 0, 1, 0, 1, ...; a wait for phase p
// returns once the phase of that parity is over.

#ifdef UNICOM_EMULATE_CUDA

UNICOM_DEVICE void barrier_init(SharedAddress barrier, int arrivals) {
  emulation::barrier_init(barrier, arrivals);
}
UNICOM_DEVICE void barrier_init_done() { emulation::barrier_init_done(); }
UNICOM_DEVICE void barrier_arrive(SharedAddress barrier) { emulation::barrier_arrive(barrier, 1); }
UNICOM_DEVICE void barrier_arrive_at(SharedAddress barrier, int rank) {
  emulation::barrier_arrive(emulation::at_rank(barrier, rank), 1);
}
UNICOM_DEVICE void barrier_expect(SharedAddress barrier, int bytes) {
  emulation::barrier_expect(barrier, bytes);
}
UNICOM_DEVICE void barrier_wait(SharedAddress barrier, int phase) {
  emulation::barrier_wait(barrier, phase);
}

UNICOM_DEVICE void load_box(SharedAddress to, const TensorMap& map, int col, int row,
                            SharedAddress barrier) {
  emulation::load_box(to, &map, col, row, barrier, 1u << emulation::cluster_rank());
}
UNICOM_DEVICE void load_box_to(uint16_t ranks, SharedAddress to, const TensorMap& map, int col,
                               int row, SharedAddress barrier) {
  emulation::load_box(to, &map, col, row, barrier, ranks);
}
UNICOM_DEVICE void store_box(const TensorMap& map, int col, int row, SharedAddress from) {
  emulation::store_box(&map, col, row, from);
}
UNICOM_DEVICE void commit_stores() { emulation::commit_stores(); }
template <int kPending>
UNICOM_DEVICE void wait_stores_read() {
  emulation::wait_stores(kPending, false);
}
template <int kPending>
UNICOM_DEVICE void wait_stores() {
  emulation::wait_stores(kPending, true);
}
UNICOM_DEVICE void publish_stores() { emulation::publish_stores(); }

UNICOM_DEVICE uint32_t window_address(SharedAddress p) {
  return emulation::shared_window_address(p);
}
UNICOM_DEVICE void begin_products() { emulation::begin_products(); }
UNICOM_DEVICE void commit_products() { emulation::commit_products(); }
template <int kPending>
UNICOM_DEVICE void wait_products() {
  emulation::wait_products(kPending);
}
template <class Unit, int kCols, bool kADepthInner, bool kBDepthInner>
UNICOM_DEVICE void add_product(float (&sums)[kCols / 2], uint64_t a, uint64_t b, bool add) {
  emulation::add_product(sums, kCols, a, kADepthInner, b, kBDepthInner, add,
                         [](uint16_t bits) { return unicom::cuda::widen(Unit{bits}); });
}
template <class Unit, int kCols, bool kBDepthInner>
UNICOM_DEVICE void add_product(float (&sums)[kCols / 2], const uint32_t (&a)[4], uint64_t b,
                               bool add) {
  emulation::add_product(sums, kCols, a, b, kBDepthInner, add,
                         [](uint16_t bits) { return unicom::cuda::widen(Unit{bits}); });
}

UNICOM_DEVICE void meet(int barrier, int threads) { emulation::meet(barrier, threads, true); }
UNICOM_DEVICE void announce(int barrier, int threads) { emulation::meet(barrier, threads, false); }
template <int kRegisters>
UNICOM_DEVICE void give_registers() {
  emulation::set_registers(kRegisters, false);
}
template <int kRegisters>
UNICOM_DEVICE void take_registers() {
  emulation::set_registers(kRegisters, true);
}
UNICOM_DEVICE int cluster_rank() { return emulation::cluster_rank(); }
UNICOM_DEVICE void cluster_arrive() { emulation::cluster_arrive(); }
UNICOM_DEVICE void cluster_wait() { emulation::cluster_wait(); }

#else

// By one thread, before any other thread knows of it.
UNICOM_DEVICE void barrier_init(SharedAddress barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After barrier_init, by the same thread: TMA and the other blocks of the cluster see it, once they
// have met this thread.
UNICOM_DEVICE void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
UNICOM_DEVICE void barrier_arrive(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// At the barrier that lies at the same place in the block `rank` of the cluster. Says that this
// thread has read, not that it has written: released to the whole cluster it would wait for all of
// its memory accesses.
UNICOM_DEVICE void barrier_arrive_at(SharedAddress barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// Arrives, and adds bytes that the phase waits for.
UNICOM_DEVICE void barrier_expect(SharedAddress barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(bytes)
               : "memory");
}
// What TMA has written is there then, whichever block asked for it. Acquired from the whole cluster,
// each wait would empty the first-level cache (CCTL.IVALL).
UNICOM_DEVICE void barrier_wait(SharedAddress barrier, int phase) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n}" ::"r"(barrier),
      "r"(phase)
      : "memory");
}

// ---- copies of boxes --------------------------------------------------------------------------
// By one thread. Columns and rows count in values of the matrix that the map describes; what lies
// outside of it is zero, and its bytes count all the same.

// Its bytes count at the barrier.
UNICOM_DEVICE void load_box(SharedAddress to, const TensorMap& map, int col, int row,
                            SharedAddress barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&map), "r"(col), "r"(row), "r"(barrier)
      : "memory");
}
// To the same place in all blocks of the cluster whose bits are set; in each of them the bytes count
// at the barrier that lies at the same place.
UNICOM_DEVICE void load_box_to(uint16_t ranks, SharedAddress to, const TensorMap& map, int col,
                               int row, SharedAddress barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(col), "r"(row), "r"(barrier), "h"(ranks)
      : "memory");
}
UNICOM_DEVICE void store_box(const TensorMap& map, int col, int row, SharedAddress from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
      "r"(col), "r"(row), "r"(from)
      : "memory");
}
UNICOM_DEVICE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most kPending of this thread's committed groups have not read shared memory yet.
template <int kPending>
UNICOM_DEVICE void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Until at most kPending have not been written.
template <int kPending>
UNICOM_DEVICE void wait_stores() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
// What this thread has stored in shared memory is what wgmma and TMA find there, once whoever
// issues them has met this thread.
UNICOM_DEVICE void publish_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- products ---------------------------------------------------------------------------------
// sums[64][kCols] += A[64][16] B[kCols][16], transposed. All threads of a warpgroup together, with
// the same descriptors. Thread t has sums[i] of row t / 32 * 16 + i / 2 % 2 * 8 + t % 32 / 4 and
// column i / 4 * 8 + t % 4 * 2 + i % 2.

UNICOM_DEVICE uint32_t window_address(SharedAddress p) { return p; }
// Before the first product after registers of sums or of A were written.
UNICOM_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
UNICOM_DEVICE void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kPending of the committed groups are under way. Only then sums may be read, and
// operands be overwritten.
template <int kPending>
UNICOM_DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define UNICOM_TEN(t)                                                                              \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t \
  "9"
#define UNICOM_PLACES_30 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " UNICOM_TEN(1) ", " UNICOM_TEN(2)
#define UNICOM_PLACES_60 UNICOM_PLACES_30 ", " UNICOM_TEN(3) ", " UNICOM_TEN(4) ", " UNICOM_TEN(5)
#define UNICOM_PLACES_120                                                                    \
  UNICOM_PLACES_60 ", " UNICOM_TEN(6) ", " UNICOM_TEN(7) ", " UNICOM_TEN(8) ", " UNICOM_TEN( \
      9) ", " UNICOM_TEN(10) ", " UNICOM_TEN(11)
#define UNICOM_PLACES_OF_64 UNICOM_PLACES_30 ", %30, %31"
#define UNICOM_PLACES_OF_96 \
  UNICOM_PLACES_30 ", " UNICOM_TEN(3) ", %40, %41, %42, %43, %44, %45, %46, %47"
#define UNICOM_PLACES_OF_128 UNICOM_PLACES_60 ", %60, %61, %62, %63"
#define UNICOM_PLACES_OF_256 UNICOM_PLACES_120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define UNICOM_SUMS_8(i)                                                                     \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), \
      "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define UNICOM_SUMS_32(i) \
  UNICOM_SUMS_8(i), UNICOM_SUMS_8(i + 8), UNICOM_SUMS_8(i + 16), UNICOM_SUMS_8(i + 24)
#define UNICOM_SUMS_OF_64 UNICOM_SUMS_32(0)
#define UNICOM_SUMS_OF_96 UNICOM_SUMS_32(0), UNICOM_SUMS_8(32), UNICOM_SUMS_8(40)
#define UNICOM_SUMS_OF_128 UNICOM_SUMS_32(0), UNICOM_SUMS_32(32)
#define UNICOM_SUMS_OF_256 UNICOM_SUMS_OF_128, UNICOM_SUMS_32(64), UNICOM_SUMS_32(96)

// Operands behind the sums.
#define UNICOM_AFTER_32 "%32", "%33", "%34", "%35", "%36", "%37", "%38"
#define UNICOM_AFTER_48 "%48", "%49", "%50", "%51", "%52", "%53", "%54"
#define UNICOM_AFTER_64 "%64", "%65", "%66", "%67", "%68", "%69", "%70"
#define UNICOM_AFTER_128 "%128", "%129", "%130", "%131", "%132", "%133", "%134"
#define UNICOM_PRODUCT(COLS, TYPE, SUMS) UNICOM_PRODUCT_(COLS, TYPE, UNICOM_AFTER_##SUMS)
#define UNICOM_PRODUCT_(...) UNICOM_PRODUCT__(__VA_ARGS__)
#define UNICOM_PRODUCT_FROM(COLS, TYPE, SUMS) UNICOM_PRODUCT_FROM_(COLS, TYPE, UNICOM_AFTER_##SUMS)
#define UNICOM_PRODUCT_FROM_(...) UNICOM_PRODUCT_FROM__(__VA_ARGS__)
#define UNICOM_PRODUCT__(COLS, TYPE, A, B, ADD, TA, TB, ...)                                 \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD                                   \
               ", 0;\n"                                                                      \
               "wgmma.mma_async.sync.aligned.m64n" #COLS "k16.f32." TYPE "." TYPE            \
               " {" UNICOM_PLACES_OF_##COLS "}, " A ", " B ", add, 1, 1, " TA ", " TB ";\n}" \
               : UNICOM_SUMS_OF_##COLS                                                       \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(kADepthInner ? 0 : 1),      \
                 "n"(kBDepthInner ? 0 : 1))
#define UNICOM_PRODUCT_FROM__(COLS, TYPE, A0, A1, A2, A3, B, ADD, TB)                            \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD                                       \
               ", 0;\n"                                                                          \
               "wgmma.mma_async.sync.aligned.m64n" #COLS "k16.f32." TYPE "." TYPE                \
               " {" UNICOM_PLACES_OF_##COLS "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B            \
                                            ", add, 1, 1, " TB ";\n}"                            \
               : UNICOM_SUMS_OF_##COLS                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), \
                 "n"(kBDepthInner ? 0 : 1))

template <class Unit, int kCols, bool kADepthInner, bool kBDepthInner>
UNICOM_DEVICE void add_product(float (&sums)[kCols / 2], uint64_t a, uint64_t b, bool add) {
  static_assert(kCols == 64 || kCols == 96 || kCols == 128 || kCols == 256);
  if constexpr (std::is_same_v<Unit, Half>) {
    if constexpr (kCols == 64) UNICOM_PRODUCT(64, "f16", 32);
    if constexpr (kCols == 96) UNICOM_PRODUCT(96, "f16", 48);
    if constexpr (kCols == 128) UNICOM_PRODUCT(128, "f16", 64);
    if constexpr (kCols == 256) UNICOM_PRODUCT(256, "f16", 128);
  } else {
    if constexpr (kCols == 64) UNICOM_PRODUCT(64, "bf16", 32);
    if constexpr (kCols == 96) UNICOM_PRODUCT(96, "bf16", 48);
    if constexpr (kCols == 128) UNICOM_PRODUCT(128, "bf16", 64);
    if constexpr (kCols == 256) UNICOM_PRODUCT(256, "bf16", 128);
  }
}
// The same with A in registers, four for each thread: rows as above, columns t % 4 * 2 + {0, 1}
// and eight further: {row, column}, {row + 8, column}, {row, column + 8}, {row + 8, column + 8}.
template <class Unit, int kCols, bool kBDepthInner>
UNICOM_DEVICE void add_product(float (&sums)[kCols / 2], const uint32_t (&a)[4], uint64_t b,
                               bool add) {
  static_assert(kCols == 64 || kCols == 128 || kCols == 256);
  if constexpr (std::is_same_v<Unit, Half>) {
    if constexpr (kCols == 64) UNICOM_PRODUCT_FROM(64, "f16", 32);
    if constexpr (kCols == 128) UNICOM_PRODUCT_FROM(128, "f16", 64);
    if constexpr (kCols == 256) UNICOM_PRODUCT_FROM(256, "f16", 128);
  } else {
    if constexpr (kCols == 64) UNICOM_PRODUCT_FROM(64, "bf16", 32);
    if constexpr (kCols == 128) UNICOM_PRODUCT_FROM(128, "bf16", 64);
    if constexpr (kCols == 256) UNICOM_PRODUCT_FROM(256, "bf16", 128);
  }
}
#undef UNICOM_PRODUCT
#undef UNICOM_PRODUCT_FROM

// ---- roles of warps, clusters -----------------------------------------------------------------

// Waits until `threads` have come to a numbered barrier (1 to 15; 0 is __syncthreads), or
// announces only that these have come.
UNICOM_DEVICE void meet(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
UNICOM_DEVICE void announce(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Registers of each thread, by all of a warpgroup: down to, or up to, so many.
template <int kRegisters>
UNICOM_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
UNICOM_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
UNICOM_DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// By all threads of all blocks of the cluster, also where a warp is not together.
UNICOM_DEVICE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
UNICOM_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

#endif

// The compiler takes products for done as soon as they are issued. This keeps what it does with
// registers of sums behind wait_products, and what it does with those of A before begin_products.
template <class T, int kCount>
UNICOM_DEVICE void pin(T (&registers)[kCount]) {
#ifdef UNICOM_EMULATE_CUDA
  (void)registers;
#else
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<T, float>)
      asm volatile("" : "+f"(registers[i])::"memory");
    else
      asm volatile("" : "+r"(registers[i])::"memory");
  }
#endif
}

// Where an operand begins, in boxes. With the depth inside (a line is 64 of the depth): eight lines
// further is `stride_bytes`, usually 1024; the leading offset is not used, and 16 of the depth further
// is 32 bytes. With the depth outside (a line is 64 rows of one depth): eight of the depth further is
// stride_bytes, usually 1024; the next 64 rows are `leading_bytes` further.
UNICOM_DEVICE uint64_t operand_descriptor(SharedAddress start, int leading_bytes,
                                          int stride_bytes) {
  constexpr uint64_t kSwizzle128 = 1;
  return uint64_t{(window_address(start) & 0x3ffff) >> 4} |
         static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | kSwizzle128 << 62;
}

}  // namespace unicom::cuda
