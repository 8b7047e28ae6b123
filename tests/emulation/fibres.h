// Threads of a cluster as fibres, which take turns. For the sources of the emulation only.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cuda_emulation.h"

namespace emulation {

constexpr int kWarp = 32;

[[noreturn]] void fail(const std::string& problem);

// What a thread waits for; lives on its stack.
class Condition {
 public:
  virtual bool holds() const = 0;
  virtual std::string text() const = 0;  // as the object of "waits for"

 protected:
  ~Condition() = default;
};
void wait_for(const Condition& condition);
// Lets others run, at random for a while: after what tells them to go on, so that who told them too
// early is found.
void maybe_pause();

// Threads of a cluster are numbered through its blocks.
int current_thread();
int current_block();
int threads_of_block();
int blocks_of_cluster();
bool has_ended(int thread);
bool block_has_ended(int block);

// Dynamic shared memory of a block of the cluster; it begins at a multiple of kSharedAlignment.
constexpr int kSharedAlignment = 1024;
char* shared_of(int block);
int shared_bytes();

uint64_t next_random(uint64_t& state);

// What the scheduler asks of the asynchronous units (hopper_emulation.cpp). They begin anew with
// each cluster.
void reset_units();
bool units_are_busy();
// Does a piece of the work that was given to them; which one follows from `random`.
void run_units(uint64_t random);
// Finds what the current thread may not leave behind when it ends, and its block when all do.
void check_end_of_thread();
void check_end_of_block();

}  // namespace emulation
