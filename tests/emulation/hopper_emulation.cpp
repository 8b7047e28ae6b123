#include "hopper_emulation.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cuda/kernels/tensor_map.h"
#include "fibres.h"
#include "tensor_core.h"

namespace emulation {

namespace {

constexpr int kWarpgroup = 128;
constexpr int kBoxCols = 64;
constexpr int kLineBytes = 128;  // of a box
constexpr int kChunkBytes = 16;  // which the swizzle moves as a whole
constexpr int kRows = 64;        // of one product
constexpr int kMostCols = 256;
constexpr int kRegistersOfBlock = 65536;

std::string number(int64_t n) { return std::to_string(n); }

// Bytes of shared memory, as offsets.
struct Range {
  int begin, end;
  bool overlaps(const Range& other) const { return begin < other.end && other.begin < end; }
  std::string text() const { return "bytes " + number(begin) + " to " + number(end - 1); }
};

// Swizzle of 128 bytes: chunks of a line change places by the number of the line in its eight.
constexpr int swizzled(int offset) { return offset ^ (offset >> 3 & 0x70); }

// ---- shared memory as TMA and wgmma see it

class Mirror {
 public:
  Mirror()
      : bytes_(static_cast<size_t>(shared_bytes()), '\xff'),
        known_(bytes_.size() / kChunkBytes + 1) {}

  char* at(int offset) { return &bytes_[static_cast<size_t>(offset)]; }
  const char* at(int offset) const { return &bytes_[static_cast<size_t>(offset)]; }
  void refresh(const char* shared) {
    for_changes(shared, 0, shared_bytes(), 4096, [&](int begin, int bytes) {
      for_changes(shared, begin, bytes, kChunkBytes, [&](int chunk, int size) {
        std::memcpy(at(chunk), shared + chunk, static_cast<size_t>(size));
        set_known(chunk);
      });
    });
  }
  void set_known(int offset) { known_[static_cast<size_t>(offset / kChunkBytes)] = true; }
  bool known(int offset) const { return known_[static_cast<size_t>(offset / kChunkBytes)]; }

 private:
  // Calls f(offset, bytes) for each piece of a part that differs.
  template <class F>
  void for_changes(const char* shared, int begin, int bytes, int piece, const F& f) const {
    for (int i = begin; i < begin + bytes; i += piece) {
      const int size = std::min(piece, begin + bytes - i);
      if (std::memcmp(at(i), shared + i, static_cast<size_t>(size)) != 0) f(i, size);
    }
  }

  std::vector<char> bytes_;
  std::vector<char> known_;  // chunks that somebody has written
};

// ---- what the units are at

struct Load {
  TensorMap map;
  int col, row;
  int block;
  Range to;
  int barrier;
};

struct Store {
  TensorMap map;
  int col, row;
  int block;
  Range from;
  bool read = false, written = false;
  bool waited_for = false;  // that it be read
  std::vector<char> lines;
};

// Sums of a warpgroup that its products have not given back: [kRows][cols].
struct Sums {
  int cols;
  std::vector<float> values;
};

struct Product {
  int cols;
  bool a_in_registers, a_depth_inner, b_depth_inner, add;
  uint64_t a, b;
  Widen widen;
  std::shared_ptr<Sums> sums;
  std::vector<std::array<uint32_t, 4>> a_registers;  // of each thread
  Range a_range{0, 0}, b_range{0, 0};
};

struct Warpgroup {
  std::deque<Product> products;  // since the last one that somebody waited for
  int first = 0;                 // number of the first of them
  int done = 0, to_do = 0;       // products; to do: that all threads have committed
  int waited_for = 0;            // products
  std::vector<int> group_ends;   // products until the end of each committed group
  std::vector<int> committers;   // threads that have committed it

  int issued() const { return first + static_cast<int>(products.size()); }
  Product& product(int index) { return products[static_cast<size_t>(index - first)]; }
};

struct Thread {
  std::vector<int> new_barriers;  // that TMA does not know of yet
  std::vector<std::shared_ptr<Store>> stores;
  std::vector<std::vector<std::shared_ptr<Store>>> store_groups;

  bool begun = false;  // begin_products since the last wait
  int issued = 0, groups = 0;
  struct InFlight {
    float* at;
    std::shared_ptr<Sums> sums;
    int last;  // product
  };
  std::vector<InFlight> in_flight;

  int registers = 0;
  int cluster_arrivals = 0, cluster_waits = 0;
};

std::vector<std::unique_ptr<Mirror>> mirrors;
std::vector<Thread> threads;
std::vector<Warpgroup> warpgroups;
std::vector<Load> loads;
std::vector<std::shared_ptr<Store>> stores;
int work = 0;  // pieces of it that the units can do

Thread& me() { return threads[static_cast<size_t>(current_thread())]; }
int warpgroups_of_block() { return (threads_of_block() + kWarpgroup - 1) / kWarpgroup; }
int my_index_in_block() { return current_thread() % threads_of_block(); }
int my_warpgroup_index() {
  return current_block() * warpgroups_of_block() + my_index_in_block() / kWarpgroup;
}

Mirror& mirror_of(int block) {
  auto& mirror = mirrors[static_cast<size_t>(block)];
  if (mirror == nullptr) mirror = std::make_unique<Mirror>();
  return *mirror;
}

struct Place {
  int block, offset;
};
Place place_of(const char* shared, const char* what) {
  for (int block = 0; block < blocks_of_cluster(); ++block) {
    const auto offset = shared - shared_of(block);
    if (offset >= 0 && offset < shared_bytes()) return {block, static_cast<int>(offset)};
  }
  fail(std::string(what) + " is not in shared memory");
}
int own_offset(const char* shared, const char* what) {
  const Place place = place_of(shared, what);
  if (place.block != current_block()) fail(std::string(what) + " is another block's");
  return place.offset;
}

// ---- barriers

constexpr int kMostPending = 1 << 20;  // arrivals, bytes

// Marks of a barrier: of a new one, and of one that TMA and other blocks may know. Shared memory
// begins without, as 3.
constexpr uint64_t kNew = 1, kKnown = 2;
struct Mbarrier {
  uint64_t phase : 1;
  uint64_t arrivals : 20;  // of each phase
  uint64_t pending : 20;   // of this one
  int64_t bytes : 21;      // that this phase waits for
  uint64_t mark : 2;

  std::string text() const {
    return number(pending) + " of " + number(arrivals) + " arrivals and " + number(bytes) +
           " bytes of phase " + number(phase) + " have not come";
  }
};
static_assert(sizeof(Mbarrier) == 8);

Mbarrier& barrier_at(int block, int offset) {
  if (offset % 8 != 0) fail("a barrier is not aligned to 8 bytes");
  auto& barrier = *reinterpret_cast<Mbarrier*>(shared_of(block) + offset);
  if (barrier.mark != kNew && barrier.mark != kKnown)
    fail("there is no barrier at byte " + number(offset) + " of rank " + number(block));
  return barrier;
}
// For TMA and other blocks.
Mbarrier& known_barrier_at(int block, int offset) {
  if (block_has_ended(block))
    fail("the barrier at byte " + number(offset) + " is of rank " + number(block) +
         ", which has ended");
  Mbarrier& barrier = barrier_at(block, offset);
  if (barrier.mark != kKnown)
    fail("the barrier at byte " + number(offset) + " is used before barrier_init_done");
  return barrier;
}
void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.arrivals;
}
void arrive(Mbarrier& barrier, int offset, int arrivals) {
  if (barrier.pending < static_cast<uint64_t>(arrivals))
    fail("more arrivals than expected at the barrier at byte " + number(offset) + ": " +
         barrier.text());
  barrier.pending -= static_cast<uint64_t>(arrivals);
  end_phase_if_complete(barrier);
}

// What generic stores have left in shared memory must be what TMA and wgmma see.
void check_published(const Mirror& mirror, int block, int offset, int bytes, const char* reader) {
  if (std::memcmp(mirror.at(offset), shared_of(block) + offset, static_cast<size_t>(bytes)) != 0)
    fail(std::string(reader) + " reads byte " + number(offset) +
         " of shared memory, which was written without publish_stores, or before the reader was " +
         "waited for");
}

// ---- boxes

// Calls f(offset in shared memory, row of the matrix, column) for each chunk.
template <class F>
void for_chunks(const Range& box, int row, int col, const F& f) {
  for (int offset = box.begin; offset < box.end; offset += kChunkBytes) {
    const int line = (offset - box.begin) / kLineBytes;
    const int chunk = (offset - box.begin) % kLineBytes / kChunkBytes;
    f(swizzled(offset), int64_t{row} + line, int64_t{col} + chunk * 8);
  }
}
uint16_t* element(const TensorMap& map, int64_t row, int64_t col) {
  if (row < 0 || row >= map.rows || col < 0 || col >= map.cols) return nullptr;
  return const_cast<uint16_t*>(map.data) + row * map.stride + col;
}

void finish(const Load& load) {
  Mirror& mirror = mirror_of(load.block);
  for_chunks(load.to, load.row, load.col, [&](int offset, int64_t row, int64_t col) {
    uint16_t values[8];
    for (int i = 0; i < 8; ++i) {
      const uint16_t* from = element(load.map, row, col + i);
      values[i] = from == nullptr ? uint16_t{0} : *from;
    }
    std::memcpy(shared_of(load.block) + offset, values, kChunkBytes);
    std::memcpy(mirror.at(offset), values, kChunkBytes);
    mirror.set_known(offset);
  });
  Mbarrier& barrier = known_barrier_at(load.block, load.barrier);
  barrier.bytes -= load.to.end - load.to.begin;
  end_phase_if_complete(barrier);
}

void go_on(Store& store) {
  if (!store.read) {
    const int bytes = store.from.end - store.from.begin;
    const Mirror& mirror = mirror_of(store.block);
    check_published(mirror, store.block, store.from.begin, bytes, "a store of a box");
    store.lines.assign(mirror.at(store.from.begin), mirror.at(store.from.begin) + bytes);
    store.read = true;
    return;
  }
  for_chunks(store.from, store.row, store.col, [&](int offset, int64_t row, int64_t col) {
    uint16_t values[8];
    std::memcpy(values, &store.lines[static_cast<size_t>(offset - store.from.begin)], kChunkBytes);
    for (int i = 0; i < 8; ++i)
      if (uint16_t* to = element(store.map, row, col + i); to != nullptr) *to = values[i];
  });
  store.written = true;
}

// Whoever still reads or writes where a box is to be copied to.
void check_free(int block, const Range& box) {
  const std::string where = "a box is copied to " + box.text() + " of rank " + number(block);
  for (int i = 0; i < warpgroups_of_block(); ++i)
    for (const Product& product :
         warpgroups[static_cast<size_t>(block * warpgroups_of_block() + i)].products)
      if (box.overlaps(product.a_range) || box.overlaps(product.b_range))
        fail(where + ", which a product reads that warpgroup " + number(i) + " has not waited for");
  for (const Load& load : loads)
    if (load.block == block && box.overlaps(load.to))
      fail(where + ", to which another one is being copied");
  for (const auto& store : stores)
    if (store->block == block && !store->waited_for && box.overlaps(store->from))
      fail(where + ", which a store reads that has not been waited for");
}

Range box_range(const TensorMap& map, int offset) {
  if (offset % kLineBytes != 0) fail("a box does not begin at a multiple of 128 bytes");
  const Range range{offset, offset + map.box_rows * kLineBytes};
  if (range.end > shared_bytes()) fail("a box does not lie in shared memory: " + range.text());
  return range;
}

// ---- products

struct Descriptor {
  int start, leading, stride;  // bytes; start: in shared memory
  bool depth_inner;

  Descriptor(uint64_t bits, bool inner)
      : start(static_cast<int>((bits & 0x3fff) << 4) - static_cast<int>(kSharedWindow)),
        leading(static_cast<int>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<int>(bits >> 32 & 0x3fff) << 4),
        depth_inner(inner) {
    if (bits >> 62 != 1) fail("a descriptor is not of the swizzle of 128 bytes");
    if ((bits >> 49 & 7) != 0) fail("a descriptor has a base offset");
    const int begins_at = start & (inner ? 0x38f : 0x3ff);
    if (begins_at != 0)
      fail("an operand does not begin at a multiple of 1024 bytes, but at byte " + number(start));
  }
  // Before the swizzle.
  int offset(int row, int depth) const {
    if (depth_inner) return start + row / 8 * stride + row % 8 * kLineBytes + depth * 2;
    return start + row / kBoxCols * leading + depth / 8 * stride + depth % 8 * kLineBytes +
           row % kBoxCols * 2;
  }
  // All lines that are read.
  Range range(int rows) const {
    const int groups = depth_inner ? rows / 8 - 1 : (rows - 1) / kBoxCols;
    const int last = depth_inner ? groups * stride : groups * leading + stride;
    const int begin = start / kLineBytes * kLineBytes;
    const Range range{begin, begin + last + 8 * kLineBytes};
    if (range.begin < 0 || range.end > shared_bytes())
      fail("a product reads outside of shared memory: " + range.text() + " of " +
           number(shared_bytes()));
    return range;
  }
};

// An operand as [kDepth][rows].
void read_operand(double* out, int rows, const Descriptor& descriptor, Widen widen, int block) {
  const Mirror& mirror = mirror_of(block);
  for (int row = 0; row < rows; ++row)
    for (int depth = 0; depth < kDepth; ++depth) {
      const int offset = swizzled(descriptor.offset(row, depth));
      if (!mirror.known(offset))
        fail("a product reads shared memory that nobody has written for it: byte " +
             number(offset));
      check_published(mirror, block, offset, 2, "a product");
      uint16_t bits;
      std::memcpy(&bits, mirror.at(offset), 2);
      out[depth * rows + row] = widen(bits);
    }
}

// The registers of A, four of each thread.
void read_operand(double* out, const std::vector<std::array<uint32_t, 4>>& registers, Widen widen) {
  for (int thread = 0; thread < kWarpgroup; ++thread)
    for (int e = 0; e < 8; ++e) {
      const int row = thread / kWarp * 16 + e / 2 % 2 * 8 + thread % kWarp / 4;
      const int depth = e / 4 * 8 + thread % 4 * 2 + e % 2;
      const uint32_t word = registers[static_cast<size_t>(thread)][static_cast<size_t>(e / 2)];
      out[depth * kRows + row] = widen(static_cast<uint16_t>(word >> (e % 2 * 16)));
    }
}

// Where sum i of a thread of a warpgroup is.
int place_of_sum(int thread, int i, int cols) {
  const int row = thread / kWarp * 16 + i / 2 % 2 * 8 + thread % kWarp / 4;
  return row * cols + i / 4 * 8 + thread % 4 * 2 + i % 2;
}

void execute(const Product& product, int block) {
  static double a[kDepth * kRows], b[kDepth * kMostCols];
  if (product.a_in_registers)
    read_operand(a, product.a_registers, product.widen);
  else
    read_operand(a, kRows, {product.a, product.a_depth_inner}, product.widen, block);
  read_operand(b, product.cols, {product.b, product.b_depth_inner}, product.widen, block);
  std::vector<float>& sums = product.sums->values;
  if (!product.add) std::fill(sums.begin(), sums.end(), 0.0f);
  multiply_add(sums.data(), a, kRows, b, product.cols);
}

constexpr uint32_t kUnderWay = 0x7fc0bad0;  // NaN that sums are until they have been waited for

void issue(float* at, Product product) {
  if (threads_of_block() % kWarpgroup != 0) fail("products need whole warpgroups");
  Thread& thread = me();
  Warpgroup& group = warpgroups[static_cast<size_t>(my_warpgroup_index())];
  auto mine = std::find_if(thread.in_flight.begin(), thread.in_flight.end(),
                           [&](const auto& one) { return one.at == at; });
  const bool fresh = mine == thread.in_flight.end();
  if (fresh && !thread.begun) fail("begin_products is missing before a product");
  const int index = thread.issued++;
  const int size = product.cols / 2;
  if (index == group.issued()) {
    product.sums = fresh ? std::make_shared<Sums>(
                               Sums{product.cols, std::vector<float>(size_t(kRows * product.cols))})
                         : mine->sums;
    product.b_range = Descriptor(product.b, product.b_depth_inner).range(product.cols);
    if (product.a_in_registers)
      product.a_registers.resize(kWarpgroup);
    else
      product.a_range = Descriptor(product.a, product.a_depth_inner).range(kRows);
    for (const Load& load : loads)
      if (load.block == current_block() &&
          (load.to.overlaps(product.a_range) || load.to.overlaps(product.b_range)))
        fail("a product reads " + load.to.text() +
             " of shared memory, to which a box is being copied");
    group.products.push_back(product);
  }
  Product& shared = group.product(index);
  if (shared.cols != product.cols || shared.a != product.a || shared.b != product.b ||
      shared.add != product.add || shared.a_in_registers != product.a_in_registers ||
      shared.a_depth_inner != product.a_depth_inner ||
      shared.b_depth_inner != product.b_depth_inner || (!fresh && mine->sums != shared.sums))
    fail("threads of a warpgroup differ in their product");
  if (fresh) {
    thread.in_flight.push_back({at, shared.sums, index});
    for (int i = 0; i < size; ++i) {
      const int place = place_of_sum(my_index_in_block() % kWarpgroup, i, product.cols);
      shared.sums->values[static_cast<size_t>(place)] = at[i];
      std::memcpy(&at[i], &kUnderWay, sizeof(float));
    }
  } else {
    if (mine->sums->cols != product.cols) fail("products of the same sums differ in shape");
    mine->last = index;
  }
  if (product.a_in_registers)
    shared.a_registers[static_cast<size_t>(my_index_in_block() % kWarpgroup)] =
        product.a_registers[0];
}

void run_product(int index) {
  Warpgroup& group = warpgroups[static_cast<size_t>(index)];
  execute(group.product(group.done), index / warpgroups_of_block());
  ++group.done;
}

// Gives the thread those of its sums that are complete with the first `count` products.
void take_sums(int count) {
  Thread& thread = me();
  std::erase_if(thread.in_flight, [&](const Thread::InFlight& one) {
    if (one.last >= count) return false;
    for (int i = 0; i < one.sums->cols / 2; ++i) {
      if (std::memcmp(&one.at[i], &kUnderWay, sizeof(float)) != 0)
        fail("sums were written while products were under way");
      const int place = place_of_sum(my_index_in_block() % kWarpgroup, i, one.sums->cols);
      one.at[i] = one.sums->values[static_cast<size_t>(place)];
    }
    return true;
  });
}

}  // namespace

// ---- barriers

void barrier_init(char* barrier, int arrivals) {
  const int offset = own_offset(barrier, "a barrier");
  if (offset % 8 != 0) fail("a barrier is not aligned to 8 bytes");
  if (arrivals < 1 || arrivals >= kMostPending)
    fail("a barrier of " + number(arrivals) + " arrivals");
  *reinterpret_cast<Mbarrier*>(barrier) = {.phase = 0,
                                           .arrivals = static_cast<uint64_t>(arrivals),
                                           .pending = static_cast<uint64_t>(arrivals),
                                           .bytes = 0,
                                           .mark = kNew};
  me().new_barriers.push_back(offset);
}

void barrier_init_done() {
  for (int offset : me().new_barriers) barrier_at(current_block(), offset).mark = kKnown;
  me().new_barriers.clear();
}

char* at_rank(char* shared, int rank) {
  if (rank < 0 || rank >= blocks_of_cluster()) fail("the cluster has no rank " + number(rank));
  return shared_of(rank) + own_offset(shared, "an address for another block");
}

void barrier_arrive(char* barrier, int arrivals) {
  const Place place = place_of(barrier, "a barrier");
  const bool own = place.block == current_block();
  arrive(own ? barrier_at(place.block, place.offset) : known_barrier_at(place.block, place.offset),
         place.offset, arrivals);
  maybe_pause();
}

void barrier_expect(char* barrier, int bytes) {
  const int offset = own_offset(barrier, "a barrier");
  Mbarrier& here = barrier_at(current_block(), offset);
  if (bytes < 0 || here.bytes + bytes >= kMostPending)
    fail("a barrier cannot wait for " + number(bytes) + " bytes more");
  here.bytes += bytes;
  arrive(here, offset, 1);
  maybe_pause();
}

void barrier_wait(char* barrier, int phase) {
  struct PhaseOver final : Condition {
    int block, offset;
    uint64_t phase;
    bool holds() const override { return barrier_at(block, offset).phase != phase; }
    std::string text() const override {
      return "phase " + number(phase) + " of the barrier at byte " + number(offset) + ", where " +
             barrier_at(block, offset).text();
    }
  } over;
  over.block = current_block();
  over.offset = own_offset(barrier, "a barrier");
  over.phase = static_cast<uint64_t>(phase);
  if (phase != 0 && phase != 1) fail("phases are 0 and 1");
  if (!over.holds()) wait_for(over);
}

// ---- boxes

namespace {
int64_t loaded = 0;
}  // namespace

int64_t boxes_loaded() { return loaded; }

void load_box(char* to, const TensorMap* map, int col, int row, char* barrier, uint16_t ranks) {
  ++loaded;
  const Range box = box_range(*map, own_offset(to, "a box"));
  const int offset = own_offset(barrier, "a barrier");
  if (ranks == 0 || ranks >> blocks_of_cluster() != 0) fail("a box goes to ranks there are not");
  for (int block = 0; block < blocks_of_cluster(); ++block)
    if (ranks >> block & 1) {
      known_barrier_at(block, offset);
      check_free(block, box);
      loads.push_back({*map, col, row, block, box, offset});
      ++work;
    }
  maybe_pause();
}

void store_box(const TensorMap* map, int col, int row, const char* from) {
  auto store = std::make_shared<Store>();
  store->map = *map;
  store->col = col;
  store->row = row;
  store->block = current_block();
  store->from = box_range(*map, own_offset(from, "a box"));
  stores.push_back(store);
  work += 2;  // reading and writing
  me().stores.push_back(store);
  maybe_pause();
}

void commit_stores() {
  me().store_groups.push_back(std::move(me().stores));
  me().stores.clear();
}

void wait_stores(int pending, bool written) {
  struct Stored final : Condition {
    const std::vector<std::vector<std::shared_ptr<Store>>>& groups;
    size_t count;
    bool written;
    Stored(const Thread& thread, size_t n, bool w)
        : groups(thread.store_groups), count(n), written(w) {}
    bool holds() const override {
      for (size_t i = 0; i < count; ++i)
        for (const auto& store : groups[i])
          if (!(written ? store->written : store->read)) return false;
      return true;
    }
    std::string text() const override { return "its stores of boxes"; }
  };
  auto& groups = me().store_groups;
  const Stored stored(me(), groups.size() - std::min(groups.size(), size_t(pending)), written);
  if (!stored.holds()) wait_for(stored);
  for (size_t i = 0; i < stored.count; ++i)
    for (const auto& store : groups[i]) store->waited_for = true;
  const auto over = [](const auto& store) { return store->written && store->waited_for; };
  std::erase_if(groups,
                [&](const auto& group) { return std::all_of(group.begin(), group.end(), over); });
  std::erase_if(stores, over);
}

void publish_stores() { mirror_of(current_block()).refresh(shared_of(current_block())); }

// ---- products

uint32_t shared_window_address(const char* shared) {
  return kSharedWindow + static_cast<uint32_t>(own_offset(shared, "an operand"));
}

void begin_products() { me().begun = true; }

void add_product(float* sums, int cols, uint64_t a, bool a_depth_inner, uint64_t b,
                 bool b_depth_inner, bool add, Widen widen) {
  issue(sums, {.cols = cols,
               .a_in_registers = false,
               .a_depth_inner = a_depth_inner,
               .b_depth_inner = b_depth_inner,
               .add = add,
               .a = a,
               .b = b,
               .widen = widen,
               .sums = {},
               .a_registers = {}});
}
void add_product(float* sums, int cols, const uint32_t (&a)[4], uint64_t b, bool b_depth_inner,
                 bool add, Widen widen) {
  issue(sums, {.cols = cols,
               .a_in_registers = true,
               .a_depth_inner = true,
               .b_depth_inner = b_depth_inner,
               .add = add,
               .a = 0,
               .b = b,
               .widen = widen,
               .sums = {},
               .a_registers = {std::array<uint32_t, 4>{a[0], a[1], a[2], a[3]}}});
}

void commit_products() {
  Thread& thread = me();
  Warpgroup& group = warpgroups[static_cast<size_t>(my_warpgroup_index())];
  const auto index = static_cast<size_t>(thread.groups++);
  if (index == group.group_ends.size()) {
    group.group_ends.push_back(thread.issued);
    group.committers.push_back(0);
  }
  if (group.group_ends[index] != thread.issued)
    fail("threads of a warpgroup differ in what they commit");
  if (++group.committers[index] < kWarpgroup) return;
  work += thread.issued - group.to_do;
  group.to_do = thread.issued;
}

void wait_products(int pending) {
  Thread& thread = me();
  Warpgroup& group = warpgroups[static_cast<size_t>(my_warpgroup_index())];
  thread.begun = false;
  if (thread.groups <= pending) return;
  struct ProductsDone final : Condition {
    const Warpgroup& group;
    int count;
    ProductsDone(const Warpgroup& g, int n) : group(g), count(n) {}
    bool holds() const override { return group.done >= count; }
    std::string text() const override {
      return "products, of which " + number(group.done) + " of " + number(count) + " are done";
    }
  } const done(group, group.group_ends[static_cast<size_t>(thread.groups - pending - 1)]);
  if (!done.holds()) wait_for(done);
  take_sums(done.count);
  group.waited_for = std::max(group.waited_for, done.count);
  while (group.first < group.waited_for && !group.products.empty()) {
    group.products.pop_front();
    ++group.first;
  }
}

// ---- registers, clusters

// A block has as many as a launch of it can give evenly, and gives and takes them by warpgroups.
void set_registers(int registers, bool more) {
  if (registers % 8 != 0 || registers < 24 || registers > 256)
    fail("a thread cannot have " + number(registers) + " registers");
  struct Free final : Condition {
    int thread, registers;
    bool holds() const override {
      int all = registers;
      const int first = thread / threads_of_block() * threads_of_block();
      for (int i = first; i < first + threads_of_block(); ++i)
        if (i != thread) all += threads[static_cast<size_t>(i)].registers;
      return all <= kRegistersOfBlock;
    }
    std::string text() const override { return number(registers) + " registers"; }
  } free;
  free.thread = current_thread();
  free.registers = registers;
  if (more != (registers > me().registers))
    fail("a thread of " + number(me().registers) + " registers " +
         (more ? "takes " : "gives until ") + number(registers));
  while (more && !free.holds()) wait_for(free);  // another one may have taken them
  me().registers = registers;
}

int cluster_rank() { return current_block(); }

void cluster_arrive() {
  if (me().cluster_arrivals++ != me().cluster_waits) fail("cluster_arrive without cluster_wait");
  maybe_pause();
}

void cluster_wait() {
  struct AllArrived final : Condition {
    int count;
    mutable int first = 0;  // that may not have arrived
    bool holds() const override {
      for (; first < static_cast<int>(threads.size()); ++first)
        if (!has_ended(first) && threads[static_cast<size_t>(first)].cluster_arrivals < count)
          return false;
      return true;
    }
    std::string text() const override { return "the other threads of the cluster"; }
  } all_arrived;
  if (++me().cluster_waits != me().cluster_arrivals) fail("cluster_wait without cluster_arrive");
  all_arrived.count = me().cluster_arrivals;
  if (!all_arrived.holds()) wait_for(all_arrived);
}

// ---- for the scheduler

void reset_units() {
  const auto blocks = static_cast<size_t>(blocks_of_cluster());
  mirrors.clear();
  mirrors.resize(blocks);
  threads.assign(blocks * static_cast<size_t>(threads_of_block()), {});
  for (Thread& thread : threads)
    thread.registers = std::min(255, kRegistersOfBlock / threads_of_block() / 8 * 8);
  warpgroups.assign(blocks * static_cast<size_t>(warpgroups_of_block()), {});
  loads.clear();
  stores.clear();
  work = 0;
}

bool units_are_busy() { return work > 0; }

void run_units(uint64_t random) {
  std::vector<Store*> storing;
  for (const auto& store : stores)
    if (!store->written) storing.push_back(store.get());
  std::vector<int> multiplying;
  for (size_t i = 0; i < warpgroups.size(); ++i)
    if (warpgroups[i].done < warpgroups[i].to_do) multiplying.push_back(static_cast<int>(i));
  --work;
  auto pick = static_cast<size_t>(random % (loads.size() + storing.size() + multiplying.size()));
  if (pick < loads.size()) {
    const Load load = loads[pick];
    loads.erase(loads.begin() + static_cast<std::ptrdiff_t>(pick));
    return finish(load);
  }
  pick -= loads.size();
  if (pick < storing.size()) return go_on(*storing[pick]);
  run_product(multiplying[pick - storing.size()]);
}

void check_end_of_thread() {
  const Thread& thread = me();
  if (!thread.in_flight.empty()) fail("a thread ends before it has waited for its products");
  for (const auto& group : thread.store_groups)
    for (const auto& store : group)
      if (!store->waited_for) fail("a thread ends before it has waited for its stores");
  if (!thread.stores.empty()) fail("a thread ends before it has committed its stores");
}

void check_end_of_block() {
  for (const Load& load : loads)
    if (load.block == current_block())
      fail("a block ends while a box is copied to " + load.to.text() + " of its shared memory");
}

}  // namespace emulation

namespace unicom::cuda {

bool has_tensor_maps() { return true; }

bool make_tensor_map(TensorMap* map, const void* data, int64_t rows, int64_t cols, int64_t stride,
                     int box_rows) {
  constexpr int64_t kMost = int64_t{1} << 31;  // places are given in 32 bits
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || stride * 2 % 16 != 0 || stride < cols ||
      rows < 1 || cols < 1 || rows >= kMost || cols >= kMost || box_rows < 1 || box_rows > 256)
    return false;
  *map = {static_cast<const uint16_t*>(data), rows, cols, stride, box_rows};
  return true;
}

}  // namespace unicom::cuda
