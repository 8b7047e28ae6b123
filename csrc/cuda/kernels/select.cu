#include "select.h"

#include "../../core/sampler.h"
#include "device.cuh"

namespace unicom::cuda {

namespace {

using Word = unsigned long long;  // what atomicOr takes

// The blocks of classes that a shard touches; border blocks are drawn whole and cut afterwards.
struct Span {
  int64_t first_block, blocks, first_id, last_id;

  UNICOM_HD explicit Span(const Labels& l)
      : first_block(l.start / kBlockSize),
        blocks(l.stop > l.start ? block_count(l.stop) - first_block : 0),
        first_id(first_block * kBlockSize),
        last_id(first_id + blocks * kBlockSize) {}
};

struct Drawing : ClassSelection {
  uint64_t* workspace;
};

struct Workspace {
  uint64_t* bitmap;  // [blocks][kBlockWords]
  int64_t* offset;   // [blocks + 1] position of each block's first class in the list

  UNICOM_HD Workspace(const Drawing& a, const Span& span)
      : bitmap(a.workspace),
        offset(reinterpret_cast<int64_t*>(a.workspace + span.blocks * kBlockWords)) {}
};

UNICOM_DEVICE int64_t label_at(const Labels& l, int64_t i) {
  return l.is_64_bit ? static_cast<const int64_t*>(l.data)[i]
                     : static_cast<int64_t>(static_cast<const int32_t*>(l.data)[i]);
}

// What a label is when it is no class of the shard; 0 when it is one.
UNICOM_DEVICE int64_t special_slot(const Labels& l, int64_t label) {
  if (label == l.ignore_index) return kIgnoredSlot;
  if (label < 0 || label >= l.num_classes) return kInvalidSlot;
  return label < l.start || label >= l.stop ? kElsewhereSlot : 0;
}

__global__ void mark_positives_kernel(__grid_constant__ const Drawing a) {
  const Span span(a.labels);
  const int64_t i = global_thread();
  if (i >= a.labels.count) return;
  const int64_t label = label_at(a.labels, i);
  if (label == a.labels.ignore_index || label < span.first_id || label >= span.last_id) return;
  const int64_t offset = label - span.first_id;
  atomicOr(reinterpret_cast<Word*>(Workspace(a, span).bitmap) + offset / 64, static_cast<Word>(1)
                                                                                 << (offset % 64));
}

// A warp draws one block of classes: 32 positions of its order at a time.
__global__ void complete_blocks_kernel(__grid_constant__ const Drawing a) {
  const Span span(a.labels);
  const Workspace space(a, span);
  const int64_t b = global_warp();
  if (b >= span.blocks) return;
  const int lane = lane_index();
  uint64_t* stored = space.bitmap + b * kBlockWords;
  uint64_t words[kBlockWords], drawn[kBlockWords] = {};
  for (int w = 0; w < kBlockWords; ++w) words[w] = stored[w];

  const ClassSampler sampler(a.labels.num_classes, a.count, a.seed, *a.step);
  const int64_t block = span.first_block + b;
  const int size = static_cast<int>(sampler.length(block));
  const int quota = static_cast<int>(sampler.quota(block));
  if (quota == size) {
    for (int w = 0; w < kBlockWords; ++w) words[w] = ~uint64_t{0};
    block_restrict(words, 0, size);
  } else {
    int missing = quota - block_members(words);
    const BlockOrder order = sampler.order(block);
    for (int i = 0; missing > 0 && i < kBlockSize; i += kWarp) {
      const int position = order(i + lane);
      const bool eligible = position < size && !block_contains(words, position);
      const unsigned votes = __ballot_sync(kAllLanes, eligible);
      const int before = __popc(votes & ((1u << lane) - 1));
      if (eligible && before < missing) block_insert(drawn, position);
      missing -= __popc(votes);
    }
    for (int w = 0; w < kBlockWords; ++w) words[w] |= warp_or(drawn[w]);
  }
  const int64_t id = block * kBlockSize;
  block_restrict(words, static_cast<int>(max_of<int64_t>(a.labels.start - id, 0)),
                 static_cast<int>(min_of(a.labels.stop - id, kBlockSize)));
  if (lane == 0) {
    for (int w = 0; w < kBlockWords; ++w) stored[w] = words[w];
    space.offset[b + 1] = block_members(words);
  }
}

constexpr int kScanThreads = 1024;

// offset[b + 1] from members of block b to members of blocks 0 to b; one block of threads, each
// with a stretch of its own.
__global__ void scan_kernel(__grid_constant__ const Drawing a) {
  const Span span(a.labels);
  int64_t* offset = Workspace(a, span).offset;
  __shared__ int64_t sums[2][kScanThreads];
  const int t = static_cast<int>(threadIdx.x);
  const int64_t stretch = (span.blocks + kScanThreads - 1) / kScanThreads;
  const int64_t begin = min_of(t * stretch, span.blocks);
  const int64_t end = min_of(begin + stretch, span.blocks);
  int64_t sum = 0;
  for (int64_t b = begin; b < end; ++b) sum += offset[b + 1];
  sums[0][t] = sum;
  int from = 0;
  for (int step = 1; step < kScanThreads; step *= 2, from ^= 1) {
    __syncthreads();
    sums[from ^ 1][t] = sums[from][t] + (t >= step ? sums[from][t - step] : 0);
  }
  int64_t total = sums[from][t] - sum;
  for (int64_t b = begin; b < end; ++b) {
    total += offset[b + 1];
    offset[b + 1] = total;
  }
  if (t == 0) offset[0] = 0;
}

__global__ void list_classes_kernel(__grid_constant__ const Drawing a) {
  const Span span(a.labels);
  const Workspace space(a, span);
  const int64_t b = global_warp();
  if (b >= span.blocks) return;
  const uint64_t* words = space.bitmap + b * kBlockWords;
  for (int position = lane_index(); position < kBlockSize; position += kWarp)
    if (block_contains(words, position))
      a.class_index[space.offset[b] + block_rank(words, position)] =
          span.first_id + b * kBlockSize + position;
}

// Each label's slot, the count, and the rest of the list.
__global__ void finish_selection_kernel(__grid_constant__ const Drawing a) {
  const Span span(a.labels);
  const Workspace space(a, span);
  const int64_t i = global_thread();
  const int64_t selected = span.blocks > 0 ? space.offset[span.blocks] : 0;
  if (i == 0) *a.selected = selected;
  if (i < a.labels.count) {
    const int64_t label = label_at(a.labels, i);
    int64_t slot = special_slot(a.labels, label);
    if (slot == 0) {
      const int64_t b = (label - span.first_id) / kBlockSize;
      slot = space.offset[b] +
             block_rank(space.bitmap + b * kBlockWords, static_cast<int>(label % kBlockSize));
    }
    a.slot[i] = slot;
  }
  if (i >= selected && i < a.bound)
    a.class_index[i] = selected > 0 ? a.class_index[selected - 1] : 0;
}

__global__ void find_slots_kernel(__grid_constant__ const SlotSearch a) {
  const int64_t i = global_thread();
  if (i >= a.labels.count) return;
  const int64_t label = label_at(a.labels, i);
  int64_t slot = special_slot(a.labels, label);
  if (slot == 0) {
    slot = label - a.labels.start;
    if (a.class_index != nullptr) {
      int64_t low = 0, high = a.count;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (a.class_index[middle] < label)
          low = middle + 1;
        else
          high = middle;
      }
      slot = low < a.count && a.class_index[low] == label ? low : kInvalidSlot;
    }
  }
  a.slot[i] = slot;
}

__global__ void select_features_kernel(__grid_constant__ const FeatureSelection a) {
  Word* words = dynamic_shared<Word>();
  const int count = static_cast<int>((a.dim + 63) / 64);
  const int t = static_cast<int>(threadIdx.x);
  for (int w = t; w < count; w += kThreads) words[w] = 0;
  __syncthreads();
  const Bijection order = feature_order(a.dim, a.seed, *a.step);
  for (int64_t i = t; i < a.count; i += kThreads) {
    const int64_t feature = order(i);
    atomicOr(words + feature / 64, static_cast<Word>(1) << (feature % 64));
  }
  __syncthreads();
  for (int w = t; w < count; w += kThreads) {
    int64_t place = 0;
    for (int before = 0; before < w; ++before) place += popcount64(words[before]);
    for (uint64_t rest = words[w]; rest != 0; rest &= rest - 1)
      a.out[place++] = 64 * static_cast<int64_t>(w) + lowest_bit64(rest);
  }
}

}  // namespace

int64_t selection_workspace(const Labels& labels) {
  return (Span(labels).blocks * (kBlockWords + 1) + 1) * static_cast<int64_t>(sizeof(uint64_t));
}

void select_classes(Queue& queue, const ClassSelection& selection, void* workspace) {
  const Drawing a{selection, static_cast<uint64_t*>(workspace)};
  const Span span(a.labels);
  queue.fill_zero(a.workspace, span.blocks * kBlockWords * static_cast<int64_t>(sizeof(uint64_t)));
  if (span.blocks > 0) {
    queue.launch(mark_positives_kernel, thread_grid(a.labels.count), kThreads, 0, a);
    queue.launch(complete_blocks_kernel, warp_grid(span.blocks), kThreads, 0, a);
    queue.launch(scan_kernel, dim3(1), kScanThreads, 0, a);
    queue.launch(list_classes_kernel, warp_grid(span.blocks), kThreads, 0, a);
  }
  const int64_t items = max_of(max_of(a.labels.count, a.bound), int64_t{1});
  queue.launch(finish_selection_kernel, thread_grid(items), kThreads, 0, a);
}

void find_slots(Queue& queue, const SlotSearch& a) {
  queue.launch(find_slots_kernel, thread_grid(a.labels.count), kThreads, 0, a);
}

void select_features(Queue& queue, const FeatureSelection& a) {
  const auto bytes = static_cast<size_t>((a.dim + 63) / 64 * 8);
  queue.launch(select_features_kernel, dim3(1), kThreads, bytes, a);
}

}  // namespace unicom::cuda
