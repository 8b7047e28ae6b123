#include "buffers.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace unicom {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kPoolBlocks = 32;

struct Header {
  size_t capacity;
};
static_assert(sizeof(Header) <= kAlignment);

struct Pool {
  std::mutex mutex;
  std::vector<Header*> free;  // oldest first
};
Pool& pool() {
  static Pool* instance = new Pool;  // never destroyed: tensors may outlive static destruction
  return *instance;
}

void* payload(Header* header) { return reinterpret_cast<char*>(header) + kAlignment; }
Header* header_of(void* block) {
  return reinterpret_cast<Header*>(static_cast<char*>(block) - kAlignment);
}

}  // namespace

void* acquire_block(size_t bytes) {
  {
    Pool& p = pool();
    std::lock_guard<std::mutex> lock(p.mutex);
    // The smallest free block that fits and is not more than a quarter too large.
    size_t best = p.free.size();
    for (size_t i = 0; i < p.free.size(); ++i) {
      const size_t capacity = p.free[i]->capacity;
      if (capacity >= bytes && capacity <= bytes + bytes / 4 + 4096 &&
          (best == p.free.size() || capacity < p.free[best]->capacity))
        best = i;
    }
    if (best < p.free.size()) {
      Header* header = p.free[best];
      p.free.erase(p.free.begin() + static_cast<std::ptrdiff_t>(best));
      return payload(header);
    }
  }
  const size_t capacity = (bytes + kAlignment - 1) / kAlignment * kAlignment + kAlignment;
  auto* header = static_cast<Header*>(std::aligned_alloc(kAlignment, capacity));
  if (header == nullptr) throw std::bad_alloc();
  header->capacity = capacity - kAlignment;
  return payload(header);
}

void release_block(void* block) {
  if (block == nullptr) return;
  Header* evicted = nullptr;
  {
    Pool& p = pool();
    std::lock_guard<std::mutex> lock(p.mutex);
    p.free.push_back(header_of(block));
    if (p.free.size() > kPoolBlocks) {
      evicted = p.free.front();
      p.free.erase(p.free.begin());
    }
  }
  std::free(evicted);
}

size_t pooled_bytes() {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  size_t total = 0;
  for (const Header* header : p.free) total += header->capacity;
  return total;
}

void trim_pool() {
  std::vector<Header*> all;
  {
    Pool& p = pool();
    std::lock_guard<std::mutex> lock(p.mutex);
    all.swap(p.free);
  }
  for (Header* header : all) std::free(header);
}

}  // namespace unicom
