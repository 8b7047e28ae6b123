#include "select.h"

#include <algorithm>
#include <vector>

#include "../../core/sampler.h"

namespace unicom::cpu {

namespace {

constexpr int64_t kBlocksPerTask = 64;

// Kept between calls, because fresh memory costs more than the work done in it: a bitmap of the
// shard's blocks, and the position of each block's first class in the list.
struct Workspace {
  std::vector<uint64_t> bitmap;
  std::vector<int64_t> offset;
};

template <class Label>
void select(const ClassSelection& a, const Label* labels, const Parallel& parallel) {
  const int64_t start = a.labels.start, stop = a.labels.stop;
  static thread_local Workspace workspace;
  const ClassSampler sampler(a.labels.num_classes, a.count, a.seed, *a.step);
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

  for (int64_t i = 0; i < a.labels.count; ++i) {
    const int64_t label = labels[i];
    if (label == a.labels.ignore_index || label < first_id || label >= last_id) continue;
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
      block_list(bitmap + b * kBlockWords, first_id + b * kBlockSize, a.class_index + offset[b]);
    }
  });

  for (int64_t i = 0; i < a.labels.count; ++i) {
    const int64_t label = labels[i];
    const bool ignored = label == a.labels.ignore_index;
    a.slot[i] = ignored ? kIgnoredSlot : kElsewhereSlot;
    if (ignored || label < start || label >= stop) continue;
    const int64_t b = (label - first_id) / kBlockSize;
    a.slot[i] =
        offset[b] + block_rank(bitmap + b * kBlockWords, static_cast<int>(label % kBlockSize));
  }
  const int64_t selected = offset[blocks];
  *a.selected = selected;
  std::fill(a.class_index + selected, a.class_index + a.bound,
            selected > 0 ? a.class_index[selected - 1] : 0);
}

}  // namespace

int64_t find_bad_label(const Labels& a) {
  return with_labels(a, [&](const auto* labels) -> int64_t {
    for (int64_t i = 0; i < a.count; ++i) {
      const int64_t label = labels[i];
      if ((label < 0 || label >= a.num_classes) && label != a.ignore_index) return i;
    }
    return -1;
  });
}

void select_classes(const ClassSelection& a, const Parallel& parallel) {
  with_labels(a.labels, [&](const auto* labels) { select(a, labels, parallel); });
}

int64_t find_slots(const SlotSearch& a) {
  return with_labels(a.labels, [&](const auto* labels) -> int64_t {
    const int64_t* end = a.class_index + a.count;
    for (int64_t i = 0; i < a.labels.count; ++i) {
      const int64_t label = labels[i];
      if (label == a.labels.ignore_index) {
        a.slot[i] = kIgnoredSlot;
      } else if (label < a.labels.start || label >= a.labels.stop) {
        a.slot[i] = kElsewhereSlot;
      } else if (a.class_index == nullptr) {
        a.slot[i] = label - a.labels.start;
      } else {
        const int64_t* found = std::lower_bound(a.class_index, end, label);
        if (found == end || *found != label) return i;
        a.slot[i] = found - a.class_index;
      }
    }
    return -1;
  });
}

void select_features(const FeatureSelection& a) {
  const Bijection order = feature_order(a.dim, a.seed, *a.step);
  const int64_t blocks = block_count(a.dim);
  std::vector<uint64_t> bitmap(blocks * kBlockWords, 0);
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t feature = order(i);
    block_insert(bitmap.data() + feature / kBlockSize * kBlockWords,
                 static_cast<int>(feature % kBlockSize));
  }
  int64_t* out = a.out;
  for (int64_t b = 0; b < blocks; ++b)
    out += block_list(bitmap.data() + b * kBlockWords, b * kBlockSize, out);
}

}  // namespace unicom::cpu
