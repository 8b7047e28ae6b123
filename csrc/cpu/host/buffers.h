// Memory that is used again. First touch of fresh memory costs more than the arithmetic done on it,
// so workspaces, saved operands and gradients come from a pool of warm blocks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace unicom::cpu {

// Thread-safe. Blocks are aligned to 64 bytes and hold arbitrary bytes. The pool keeps what was
// released until a request of another size needs the room, at most kPoolBlocks blocks.
void* acquire_block(size_t bytes);
void release_block(void* block);

// Asks the system for huge pages where a large block of fresh memory lies: it is first touched at
// several times the speed then, and scattered rows are found with fewer misses of the page tables.
void advise_huge_pages(void* data, size_t bytes);

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(acquire_block(sizeof(T) * static_cast<size_t>(count)))) {}
  ~Buffer() { release_block(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

}  // namespace unicom::cpu
