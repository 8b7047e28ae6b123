// Chooses the kernels at run time: one binary runs on any x86-64 and uses what the CPU has.
#include <atomic>
#include <cstring>

#include "kernels.h"
#include "row_steps.h"

#if defined(UNICOM_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace unicom::cpu {

extern const Kernels<double> kernels_fp64_portable;
#define UNICOM_DECLARE(isa)                        \
  extern const Kernels<float> kernels_fp32_##isa;  \
  extern const Kernels<BfPair> kernels_bf16_##isa; \
  extern const NearestKernels nearest_##isa;       \
  extern const UpdateKernels update_##isa;
UNICOM_DECLARE(portable)
UNICOM_DECLARE(emulated_avx512)
#if defined(UNICOM_X86)
UNICOM_DECLARE(avx2)
UNICOM_DECLARE(avx512)
UNICOM_DECLARE(avx512_bf16)
extern const Kernels<BfPair> kernels_bf16_amx;
extern const NearestKernels nearest_amx;
#endif
extern const Kernels<BfPair> kernels_bf16_emulated_amx;
extern const NearestKernels nearest_emulated_amx;
#undef UNICOM_DECLARE

namespace {

#define UNICOM_SET(isa)                                                              \
  {#isa,           &kernels_fp32_##isa, &kernels_bf16_##isa, &kernels_fp64_portable, \
   &nearest_##isa, &update_##isa}
const KernelSet kSets[] = {
    UNICOM_SET(portable),
#if defined(UNICOM_X86)
    UNICOM_SET(avx2),
    UNICOM_SET(avx512),
    UNICOM_SET(avx512_bf16),
    {"amx", &kernels_fp32_avx512_bf16, &kernels_bf16_amx, &kernels_fp64_portable, &nearest_amx,
     &update_avx512_bf16},
#endif
};
constexpr int kSetCount = sizeof(kSets) / sizeof(kSets[0]);

// The code of the 512-bit kernels lowered to what any CPU has. Never chosen by itself: it lets the
// tests run their register tiles, panel groups and remainders on machines without AVX-512.
const KernelSet kEmulated[] = {
    UNICOM_SET(emulated_avx512),
    {"emulated_amx", &kernels_fp32_emulated_avx512, &kernels_bf16_emulated_amx,
     &kernels_fp64_portable, &nearest_emulated_amx, &update_emulated_avx512},
};
#undef UNICOM_SET

#if defined(UNICOM_X86)
// Asks the system for the registers of the matrix unit, which it saves for processes that have
// asked alone. False where the CPU has none, or the system does not know of it.
bool has_matrix_unit() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24, kBytes = 1u << 25;
  constexpr unsigned kAll = kBf16 | kTiles | kBytes;
  constexpr long kAskForRegisters = 0x1023, kTileData = 18;
  return (d & kAll) == kAll && syscall(SYS_arch_prctl, kAskForRegisters, kTileData) == 0;
}
#endif

bool supported(int set) {
#if defined(UNICOM_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool bf16 =
      avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  static const bool amx = bf16 && has_matrix_unit();
  const bool have[] = {true, avx2, avx512, bf16, amx};
  return have[set];
#else
  return set == 0;
#endif
}

int best() {
  int chosen = 0;
  for (int i = 0; i < kSetCount; ++i)
    if (supported(i)) chosen = i;
  return chosen;
}

std::atomic<const KernelSet*>& current() {
  static std::atomic<const KernelSet*> chosen{&kSets[best()]};
  return chosen;
}

}  // namespace

const KernelSet& kernels() { return *current().load(std::memory_order_relaxed); }

const UpdateKernels& update_kernels() { return *kernels().update; }

int capabilities(const char** names) {
  int count = 0;
  for (int i = 0; i < kSetCount; ++i)
    if (supported(i)) names[count++] = kSets[i].name;
  return count;
}

const char* capability() { return kernels().name; }

bool set_capability(const char* name) {
  for (int i = 0; i < kSetCount; ++i)
    if (supported(i) && std::strcmp(kSets[i].name, name) == 0) {
      current().store(&kSets[i]);
      return true;
    }
  for (const KernelSet& emulated : kEmulated)
    if (std::strcmp(emulated.name, name) == 0) {
      current().store(&emulated);
      return true;
    }
  return false;
}

}  // namespace unicom::cpu
