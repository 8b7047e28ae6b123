#include "cuda_emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "fibres are written for x86-64"
#endif

// Saves the callee's registers and stack pointer, and goes on where `to` was saved.
extern "C" void unicom_switch_fibre(void** from, void* to);
asm(R"(
.text
.globl unicom_switch_fibre
.type unicom_switch_fibre, @function
unicom_switch_fibre:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size unicom_switch_fibre, .-unicom_switch_fibre
)");

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kWarp = 32;

[[noreturn]] void fail(const char* problem) {
  std::fprintf(stderr, "CUDA emulation: %s (block %u %u %u, thread %u)\n", problem, blockIdx.x,
               blockIdx.y, blockIdx.z, threadIdx.x);
  std::fflush(stderr);
  std::abort();
}

enum class State { kReady, kAtBarrier, kInCollective, kDone };

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fibre {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  State state = State::kReady;
  uint64_t collectives = 0;  // how many it took part in
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> copies;
};

struct WarpExchange {
  alignas(16) char values[2][kWarp * kExchangeBytes];  // the last collective may still be read
  int arrived = 0;
};

uint64_t schedule = 1;
std::vector<Fibre> fibres;
std::vector<WarpExchange> warps;
std::unique_ptr<char[]> shared;
int limit_of_shared = 227 << 10;
const std::function<void()>* body = nullptr;
void* scheduler_stack_pointer = nullptr;
int current = 0;
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
#endif

void to_scheduler(bool last) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, scheduler_stack, scheduler_stack_bytes);
  unicom_switch_fibre(&fibres[current].stack_pointer, scheduler_stack_pointer);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  (void)last;
  unicom_switch_fibre(&fibres[current].stack_pointer, scheduler_stack_pointer);
#endif
}

void fibre_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  (*body)();
  if (!fibres[current].copies.empty() || !fibres[current].groups.empty()) wait_copies(0);
  fibres[current].state = State::kDone;
  to_scheduler(true);
  fail("a finished thread ran on");
}

void run_fibre(int index) {
  current = index;
  threadIdx = dim3(static_cast<unsigned>(index));
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fibres[index].stack, kStackBytes);
  unicom_switch_fibre(&scheduler_stack_pointer, fibres[index].stack_pointer);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  unicom_switch_fibre(&scheduler_stack_pointer, fibres[index].stack_pointer);
#endif
}

void prepare(Fibre& fibre) {
  if (fibre.stack == nullptr)
    fibre.stack = static_cast<char*>(
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fibre.stack, kStackBytes);  // what the last fibre left
#endif
  // As if fibre_main had been interrupted at its start: six registers and a return address, and
  // the stack aligned as a call leaves it.
  void** top = reinterpret_cast<void**>(fibre.stack + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fibre_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fibre.stack_pointer = top;
  fibre.state = State::kReady;
  fibre.collectives = 0;
  fibre.copies.clear();
  fibre.groups.clear();
}

uint64_t next_random(uint64_t& state) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

void run_block(int threads, size_t shared_bytes) {
  // NaN as a double, a float and half precision.
  if (shared_bytes > 0) std::memset(shared.get(), 0xff, shared_bytes);
  for (int i = 0; i < threads; ++i) prepare(fibres[i]);
  for (auto& warp : warps) warp.arrived = 0;
  uint64_t random = schedule * 0x9e3779b97f4a7c15u + 1;
  std::vector<int> order;
  for (int done = 0; done < threads;) {
    order.clear();
    int at_barrier = 0;
    for (int i = 0; i < threads; ++i) {
      if (fibres[i].state == State::kReady) order.push_back(i);
      at_barrier += fibres[i].state == State::kAtBarrier;
    }
    if (order.empty()) {
      if (at_barrier < threads) fail("threads wait for others that ended or wait elsewhere");
      for (int i = 0; i < threads; ++i) fibres[i].state = State::kReady;
      continue;
    }
    if (schedule != 0)
      for (size_t i = order.size(); i > 1; --i)
        std::swap(order[i - 1], order[next_random(random) % i]);
    for (int i : order) {
      run_fibre(i);
      done += fibres[i].state == State::kDone;
    }
  }
}

}  // namespace

void set_schedule(uint64_t seed) { schedule = seed; }

void run_grid(const std::function<void()>& kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const int threads = static_cast<int>(block.x);
  if (block.y != 1 || block.z != 1 || threads < 1 || threads > 1024 || threads % kWarp != 0)
    fail("blocks must be whole warps along x");
  if (static_cast<int>(fibres.size()) < threads) fibres.resize(static_cast<size_t>(threads));
  warps.resize(static_cast<size_t>(threads / kWarp));
  shared.reset(shared_bytes > 0 ? new char[shared_bytes] : nullptr);
  body = &kernel;
  blockDim = block;
  gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block(threads, shared_bytes);
      }
}

void* dynamic_shared() { return shared.get(); }
void set_shared_limit(int bytes) { limit_of_shared = bytes; }
int shared_limit() { return limit_of_shared; }

void barrier() {
  fibres[current].state = State::kAtBarrier;
  to_scheduler(false);
}

bool barrier_or(bool predicate) {
  static std::vector<char> votes;
  votes.resize(blockDim.x);
  votes[static_cast<size_t>(current)] = predicate;
  barrier();
  const bool any = std::count(votes.begin(), votes.end(), 1) > 0;
  barrier();  // before anybody votes again
  return any;
}

const char* exchange(const void* mine, int bytes) {
  Fibre& fibre = fibres[current];
  const int first = current / kWarp * kWarp;
  WarpExchange& warp = warps[current / kWarp];
  char* values = warp.values[fibre.collectives++ % 2];
  if (bytes > kExchangeBytes) fail("too many bytes in a collective");
  std::memcpy(values + (current - first) * kExchangeBytes, mine, static_cast<size_t>(bytes));
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    for (int i = first; i < first + kWarp; ++i) {
      if (fibres[i].collectives != fibre.collectives) fail("lanes differ in their collectives");
      fibres[i].state = State::kReady;
    }
  } else {
    fibre.state = State::kInCollective;
    to_scheduler(false);
  }
  return values;
}

void copy_async(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 ||
      reinterpret_cast<uintptr_t>(from) % bytes != 0)
    fail("an asynchronous copy is not aligned");
  fibres[current].copies.push_back({to, from, bytes});
}

void commit_copies() {
  Fibre& fibre = fibres[current];
  fibre.groups.push_back(std::move(fibre.copies));
  fibre.copies.clear();
}

void wait_copies(int pending) {
  auto& groups = fibres[current].groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front())
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    groups.erase(groups.begin());
  }
}

}  // namespace emulation
