// The instructions of tensor cores since Ampere, named; and asynchronous copies to shared memory.
// Fragment layouts are those of PTX's mma.m16n8k16 and ldmatrix.
#pragma once

#include "device.cuh"

namespace unicom::cuda {

#ifdef UNICOM_EMULATE_CUDA

using SharedAddress = char*;
UNICOM_DEVICE SharedAddress shared_address(void* p) { return static_cast<char*>(p); }
UNICOM_DEVICE void copy_async(SharedAddress to, const void* from) {
  emulation::copy_async(to, from, 16);
}
UNICOM_DEVICE void commit_copies() { emulation::commit_copies(); }
template <int kPending>
UNICOM_DEVICE void wait_copies() {
  emulation::wait_copies(kPending);
}
UNICOM_DEVICE void load_matrices(uint32_t (&r)[4], SharedAddress row) {
  emulation::load_matrices(r, row, false);
}
UNICOM_DEVICE void load_matrices_transposed(uint32_t (&r)[4], SharedAddress row) {
  emulation::load_matrices(r, row, true);
}
template <class Unit>
UNICOM_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::multiply_add(c, a, b0, b1,
                          [](uint16_t bits) { return unicom::cuda::widen(Unit{bits}); });
}
UNICOM_DEVICE float exp2_fast(float x) { return emulation::exp2_fast(x); }

#else

using SharedAddress = uint32_t;
UNICOM_DEVICE SharedAddress shared_address(void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// Sixteen bytes, past the first-level cache.
UNICOM_DEVICE void copy_async(SharedAddress to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
UNICOM_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's committed groups are under way.
template <int kPending>
UNICOM_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
UNICOM_DEVICE void load_matrices(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
UNICOM_DEVICE void load_matrices_transposed(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
template <class Unit>
UNICOM_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
UNICOM_DEVICE void multiply_add<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                      uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
UNICOM_DEVICE void multiply_add<BFloat>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// 2^x to about 2 units in the last place; results below the normal range are 0.
UNICOM_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif

}  // namespace unicom::cuda
