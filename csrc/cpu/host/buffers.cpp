#include "buffers.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace unicom::cpu {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kPoolBlocks = 32;
// Large blocks are few and dear, small ones many: each kind has a pool of its own, so that neither
// drives the other out.
constexpr size_t kLarge = size_t{1} << 20;
constexpr size_t kHugePage = size_t{2} << 20;

struct Header {
  size_t capacity;
};
static_assert(sizeof(Header) <= kAlignment);

struct Pool {
  std::mutex mutex;
  std::vector<Header*> free;  // oldest first
};
Pool& pool(bool large) {
  static Pool* instance = new Pool[2];  // never destroyed: tensors may outlive static destruction
  return instance[large];
}

void* allocate(size_t bytes) {
  if (bytes < 2 * kHugePage) return std::aligned_alloc(kAlignment, bytes);
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* memory = std::aligned_alloc(kHugePage, bytes);
  if (memory != nullptr) advise_huge_pages(memory, bytes);
  return memory;
}

void* payload(Header* header) { return reinterpret_cast<char*>(header) + kAlignment; }
Header* header_of(void* block) {
  return reinterpret_cast<Header*>(static_cast<char*>(block) - kAlignment);
}

}  // namespace

void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + bytes) / kHugePage * kHugePage;
  // No harm where the system refuses.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

void* acquire_block(size_t bytes) {
  {
    Pool& p = pool(bytes >= kLarge);
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
  auto* header = static_cast<Header*>(allocate(capacity));
  if (header == nullptr) throw std::bad_alloc();
  header->capacity = capacity - kAlignment;
  return payload(header);
}

void release_block(void* block) {
  if (block == nullptr) return;
  Header* evicted = nullptr;
  {
    Pool& p = pool(header_of(block)->capacity >= kLarge);
    std::lock_guard<std::mutex> lock(p.mutex);
    p.free.push_back(header_of(block));
    if (p.free.size() > kPoolBlocks) {
      evicted = p.free.front();
      p.free.erase(p.free.begin());
    }
  }
  std::free(evicted);
}

}  // namespace unicom::cpu
