#include "cuda_emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "fibres.h"

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
// Stacks begin at as many places of the caches: at one they would drive each other out.
constexpr size_t kStackStep = 320, kStackPlaces = 256;

enum class State { kReady, kPaused, kWaiting, kInCollective, kDone };

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fibre {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  unsigned thread = 0;  // of its block
  int block = 0;
  State state = State::kReady;
  int pause = 0;                         // rounds of the scheduler that it lets pass
  const Condition* condition = nullptr;  // that it waits for
  uint64_t collectives = 0;              // how many it took part in
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> copies;
};

struct WarpExchange {
  alignas(16) char values[2][kWarp * kExchangeBytes];  // the last collective may still be read
  int arrived = 0;
};

// Barriers of a block by number; 0 is that of __syncthreads.
constexpr int kNumberedBarriers = 16;
struct NumberedBarrier {
  int expected = 0, arrived = 0;
  int times = 0;                 // that all have come
  int lanes[1024 / kWarp] = {};  // that have come, of each warp
};

struct Block {
  dim3 index;
  std::unique_ptr<char[], void (*)(char*)> shared{nullptr, nullptr};
  NumberedBarrier barriers[kNumberedBarriers];
  int running = 0;
};

uint64_t schedule = 1;
uint64_t pause_random = 1;
std::vector<Fibre> fibres;
std::vector<WarpExchange> warps;
std::vector<Block> blocks;
int bytes_of_shared = 0;
int limit_of_shared = 227 << 10;
int architecture = 9;
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
  check_end_of_thread();
  fibres[current].state = State::kDone;
  if (--blocks[current_block()].running == 0) check_end_of_block();
  to_scheduler(true);
  fail("a finished thread ran on");
}

void run_fibre(int index) {
  current = index;
  threadIdx = dim3(fibres[index].thread);
  blockIdx = blocks[fibres[index].block].index;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fibres[index].stack, kStackBytes);
  unicom_switch_fibre(&scheduler_stack_pointer, fibres[index].stack_pointer);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  unicom_switch_fibre(&scheduler_stack_pointer, fibres[index].stack_pointer);
#endif
}

void prepare(int index) {
  Fibre& fibre = fibres[index];
  fibre.block = index / threads_of_block();
  fibre.thread = static_cast<unsigned>(index % threads_of_block());
  if (fibre.stack == nullptr)
    fibre.stack = static_cast<char*>(
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  void** top = reinterpret_cast<void**>(fibre.stack + kStackBytes -
                                        kStackStep * (static_cast<size_t>(index) % kStackPlaces));
#if defined(__SANITIZE_ADDRESS__)
  // The frames in which the last fibre ended; those below them have returned.
  if (fibre.stack_pointer != nullptr)
    __asan_unpoison_memory_region(fibre.stack_pointer,
                                  sizeof(void*) * (top - static_cast<void**>(fibre.stack_pointer)));
#endif
  // As if fibre_main had been interrupted at its start: six registers and a return address, and
  // the stack aligned as a call leaves it.
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fibre_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fibre.stack_pointer = top;
  fibre.state = State::kReady;
  fibre.collectives = 0;
  fibre.copies.clear();
  fibre.groups.clear();
}

// "0 to 31, 64, ..."
std::string ranges(const std::vector<int>& numbers) {
  constexpr int kMost = 4;
  std::string text;
  int count = 0;
  for (size_t i = 0, end; i < numbers.size(); i = end) {
    for (end = i + 1; end < numbers.size() && numbers[end] == numbers[end - 1] + 1;) ++end;
    if (count > 0) text += ", ";
    if (count++ == kMost) return text + "...";
    text += std::to_string(numbers[i]);
    if (end - i > 1) text += " to " + std::to_string(numbers[end - 1]);
  }
  return text;
}

[[noreturn]] void stop(const std::string& problem) {
  std::fprintf(stderr, "CUDA emulation: %s\n", problem.c_str());
  std::fflush(stderr);
  std::abort();
}

// Says who waits for what; threads of a block that wait for the same are named together.
[[noreturn]] void fail_of_deadlock(int threads) {
  std::map<int, std::map<std::string, std::vector<int>>> waiting;
  for (int i = 0; i < threads; ++i) {
    const Fibre& fibre = fibres[i];
    auto& block = waiting[i / threads_of_block()];
    const std::string text = fibre.state == State::kDone ? "ended"
                             : fibre.state == State::kInCollective
                                 ? "wait for the other lanes of the warp"
                                 : "wait for " + fibre.condition->text();
    block[text].push_back(i % threads_of_block());
  }
  std::string report = "no thread can go on";
  for (const auto& [rank, block] : waiting)
    for (const auto& [text, numbers] : block)
      report += "\n  rank " + std::to_string(rank) +
                (numbers.size() > 1 ? ", threads " : ", thread ") + ranges(numbers) + ": " + text;
  stop(report);
}

// Blocks of a cluster run at once. `first`: the index of the first.
void run_cluster(dim3 first, dim3 cluster) {
  int rank = 0;
  for (unsigned z = 0; z < cluster.z; ++z)
    for (unsigned y = 0; y < cluster.y; ++y)
      for (unsigned x = 0; x < cluster.x; ++x) {
        Block& block = blocks[rank++];
        block.index = dim3(first.x + x, first.y + y, first.z + z);
        // NaN as a double, a float and half precision.
        if (bytes_of_shared > 0) std::memset(block.shared.get(), 0xff, bytes_of_shared);
        for (NumberedBarrier& barrier : block.barriers) barrier = {};
        block.running = threads_of_block();
      }
  const int threads = rank * threads_of_block();
  for (int i = 0; i < threads; ++i) prepare(i);
  for (auto& warp : warps) warp.arrived = 0;
  reset_units();
  uint64_t random = schedule * 0x9e3779b97f4a7c15u + 1;
  pause_random = random;
  std::vector<int> order;
  for (int done = 0; done < threads;) {
    order.clear();
    bool paused = false;
    for (int i = 0; i < threads; ++i) {
      Fibre& fibre = fibres[i];
      if ((fibre.state == State::kPaused && --fibre.pause <= 0) ||
          (fibre.state == State::kWaiting && fibre.condition->holds()))
        fibre.state = State::kReady;
      paused |= fibre.state == State::kPaused;
      if (fibre.state == State::kReady) order.push_back(i);
    }
    if (order.empty()) {
      if (units_are_busy())
        run_units(schedule == 0 ? 0 : next_random(random));
      else if (!paused)
        fail_of_deadlock(threads);
      continue;
    }
    if (schedule != 0)
      for (size_t i = order.size(); i > 1; --i)
        std::swap(order[i - 1], order[next_random(random) % i]);
    for (int i : order) {
      run_fibre(i);
      done += fibres[i].state == State::kDone;
      if (schedule != 0 && units_are_busy() && next_random(random) % 8 == 0)
        run_units(next_random(random));
    }
  }
}

}  // namespace

void fail(const std::string& problem) {
  const auto text = [](const dim3& at) {
    return std::to_string(at.x) + " " + std::to_string(at.y) + " " + std::to_string(at.z);
  };
  stop(problem + " (block " + text(blockIdx) + ", thread " + std::to_string(threadIdx.x) + ")");
}

uint64_t next_random(uint64_t& state) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

void wait_for(const Condition& condition) {
  fibres[current].condition = &condition;
  fibres[current].state = State::kWaiting;
  to_scheduler(false);
}

void maybe_pause() {
  if (schedule == 0 || next_random(pause_random) % 8 != 0) return;
  fibres[current].pause = static_cast<int>(next_random(pause_random) % 8) + 1;
  fibres[current].state = State::kPaused;
  to_scheduler(false);
}

int current_thread() { return current; }
int current_block() { return fibres[current].block; }
int threads_of_block() { return static_cast<int>(blockDim.x); }
int blocks_of_cluster() { return static_cast<int>(blocks.size()); }
bool has_ended(int thread) { return fibres[thread].state == State::kDone; }
bool block_has_ended(int block) { return blocks[block].running == 0; }
char* shared_of(int block) { return blocks[block].shared.get(); }
int shared_bytes() { return bytes_of_shared; }

void set_schedule(uint64_t seed) { schedule = seed; }

void run_grid(const std::function<void()>& kernel, dim3 grid, dim3 block, dim3 cluster,
              size_t shared_bytes) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const int threads = static_cast<int>(block.x);
  if (block.y != 1 || block.z != 1 || threads < 1 || threads > 1024 || threads % kWarp != 0)
    fail("blocks must be whole warps along x");
  blocks.clear();
  blocks.resize(size_t{cluster.x} * cluster.y * cluster.z);
  const size_t all = blocks.size() * block.x;
  if (fibres.size() < all) fibres.resize(all);
  warps.resize(all / kWarp);
  bytes_of_shared = static_cast<int>(shared_bytes);
  constexpr std::align_val_t kAlignment{kSharedAlignment};
  for (Block& one : blocks)
    if (shared_bytes > 0)
      one.shared = {new (kAlignment) char[shared_bytes],
                    [](char* p) { operator delete[](p, kAlignment); }};
  body = &kernel;
  blockDim = block;
  gridDim = grid;
  for (unsigned z = 0; z < grid.z; z += cluster.z)
    for (unsigned y = 0; y < grid.y; y += cluster.y)
      for (unsigned x = 0; x < grid.x; x += cluster.x) run_cluster(dim3(x, y, z), cluster);
}

void* dynamic_shared() { return shared_of(current_block()); }
void set_shared_limit(int bytes) { limit_of_shared = bytes; }
int shared_limit() { return limit_of_shared; }
void set_compute_capability(int major) { architecture = major; }
int compute_capability() { return architecture; }

void barrier() { meet(0, threads_of_block(), true); }

void meet(int number, int threads, bool wait) {
  if (number < 0 || number >= kNumberedBarriers) fail("a block has 16 barriers");
  NumberedBarrier& barrier = blocks[current_block()].barriers[number];
  if (barrier.arrived > 0 && barrier.expected != threads)
    fail("threads come to barrier " + std::to_string(number) + " for " + std::to_string(threads) +
         " of them, others for " + std::to_string(barrier.expected));
  barrier.expected = threads;
  struct AllCame final : Condition {
    const NumberedBarrier& barrier;
    const int number, times;
    AllCame(const NumberedBarrier& b, int n) : barrier(b), number(n), times(b.times) {}
    bool holds() const override { return barrier.times > times; }
    std::string text() const override {
      return "barrier " + std::to_string(number) + ", to which " + std::to_string(barrier.arrived) +
             " of " + std::to_string(barrier.expected) + " threads have come";
    }
  } const all_came(barrier, number);
  ++barrier.lanes[threadIdx.x / kWarp];
  if (++barrier.arrived == threads) {
    for (int& lanes : barrier.lanes) {
      if (lanes % kWarp != 0) fail("a part of a warp comes to barrier " + std::to_string(number));
      lanes = 0;
    }
    barrier.arrived = 0;
    ++barrier.times;
  }
  if (wait)
    wait_for(all_came);
  else
    maybe_pause();
}

bool barrier_or(bool predicate) {
  static std::vector<char> votes;
  votes.resize(fibres.size());
  votes[static_cast<size_t>(current)] = predicate;
  barrier();
  const auto first = votes.begin() + current_block() * threads_of_block();
  const bool any = std::count(first, first + threads_of_block(), 1) > 0;
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

// For tests in Python.
extern "C" void unicom_emulate(int compute_capability, uint64_t schedule) {
  emulation::set_compute_capability(compute_capability);
  emulation::set_schedule(schedule);
}
extern "C" int64_t unicom_boxes_loaded() { return emulation::boxes_loaded(); }
