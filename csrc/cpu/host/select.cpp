#include "select.h"

#include <algorithm>
#include <vector>

#include "../../core/sampler.h"

namespace unicom {

namespace {

constexpr int64_t kBlocksPerTask = 64;

// Kept between calls, because fresh memory costs more than the work done in it: a bitmap of the
// shard's blocks, and the position of each block's first class in the list.
struct Workspace {
  std::vector<uint64_t> bitmap;
  std::vector<int64_t> offset;
};

}  // namespace

template <class Label>
int64_t find_bad_label(const Label* labels, int64_t batch, int64_t num_classes,
                       int64_t ignore_index) {
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t label = labels[i];
    if ((label < 0 || label >= num_classes) && label != ignore_index) return i;
  }
  return -1;
}

template <class Label>
int64_t select_classes(const Label* labels, int64_t batch, int64_t num_classes, int64_t count,
                       int64_t seed, int64_t step, int64_t ignore_index, int64_t start,
                       int64_t stop, int64_t* class_index, int64_t* slot,
                       const Parallel& parallel) {
  static thread_local Workspace workspace;
  const ClassSampler sampler(num_classes, count, seed, step);
  // A border block is drawn whole, positives of the neighbour included, and cut afterwards.
  const int64_t first_block = start / kBlockSize;
  const int64_t blocks = stop > start ? block_count(stop) - first_block : 0;
  const int64_t first_id = first_block * kBlockSize;
  const int64_t last_id = first_id + blocks * kBlockSize;
  const int64_t tasks = (blocks + kBlocksPerTask - 1) / kBlocksPerTask;

  workspace.bitmap.assign(blocks * kBlockWords, 0);
  workspace.offset.resize(blocks + 1);
  uint64_t* bitmap = workspace.bitmap.data();
  int64_t* offset = workspace.offset.data();

  for (int64_t i = 0; i < batch; ++i) {
    const int64_t label = labels[i];
    if (label == ignore_index || label < first_id || label >= last_id) continue;
    block_insert(bitmap + (label - first_id) / kBlockSize * kBlockWords,
                 static_cast<int>(label % kBlockSize));
  }

  parallel.run(tasks, [&](int64_t task) {
    const int64_t end = std::min((task + 1) * kBlocksPerTask, blocks);
    for (int64_t b = task * kBlocksPerTask; b < end; ++b) {
      uint64_t* words = bitmap + b * kBlockWords;
      sampler.complete(first_block + b, words);
      const int64_t id = first_id + b * kBlockSize;
      if (id < start || id + kBlockSize > stop) {
        block_restrict(words, static_cast<int>(std::max<int64_t>(start - id, 0)),
                       static_cast<int>(std::min(stop - id, kBlockSize)));
      }
      offset[b + 1] = block_members(words);
    }
  });

  offset[0] = 0;
  for (int64_t b = 0; b < blocks; ++b) offset[b + 1] += offset[b];

  parallel.run(tasks, [&](int64_t task) {
    const int64_t end = std::min((task + 1) * kBlocksPerTask, blocks);
    for (int64_t b = task * kBlocksPerTask; b < end; ++b) {
      block_list(bitmap + b * kBlockWords, first_id + b * kBlockSize, class_index + offset[b]);
    }
  });

  for (int64_t i = 0; i < batch; ++i) {
    const int64_t label = labels[i];
    slot[i] = label == ignore_index ? kIgnoredSlot : kElsewhereSlot;
    if (label == ignore_index || label < start || label >= stop) continue;
    const int64_t b = (label - first_id) / kBlockSize;
    slot[i] =
        offset[b] + block_rank(bitmap + b * kBlockWords, static_cast<int>(label % kBlockSize));
  }
  return offset[blocks];
}

void select_features(int64_t dim, int64_t count, int64_t seed, int64_t step, int64_t* out) {
  const Bijection order = feature_order(dim, seed, step);
  const int64_t blocks = block_count(dim);
  std::vector<uint64_t> bitmap(blocks * kBlockWords, 0);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t feature = order(i);
    block_insert(bitmap.data() + feature / kBlockSize * kBlockWords,
                 static_cast<int>(feature % kBlockSize));
  }
  for (int64_t b = 0; b < blocks; ++b) {
    out += block_list(bitmap.data() + b * kBlockWords, b * kBlockSize, out);
  }
}

#define UNICOM_INSTANTIATE(Label)                                                            \
  template int64_t find_bad_label(const Label*, int64_t, int64_t, int64_t);                  \
  template int64_t select_classes(const Label*, int64_t, int64_t, int64_t, int64_t, int64_t, \
                                  int64_t, int64_t, int64_t, int64_t*, int64_t*, const Parallel&)
UNICOM_INSTANTIATE(int32_t);
UNICOM_INSTANTIATE(int64_t);
#undef UNICOM_INSTANTIATE

}  // namespace unicom
