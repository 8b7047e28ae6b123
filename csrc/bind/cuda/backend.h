// The operators' steps on CUDA tensors. None of them waits for the device, so none can look at
// values: centroids have to be finite, a guess that is no centroid counts as none, and rows whose
// index is no sum are left out.
//
// The tests compile this too, over the emulation of CUDA: then the same operators take CPU tensors.
#pragma once

#include <string>
#include <tuple>

#include "../../core/sampler.h"
#include "../../cuda/host/loss.h"
#include "../../cuda/host/nearest.h"
#include "../../cuda/kernels/row_updates.h"
#include "../../cuda/kernels/select.h"
#include "../ops/updates.h"

#ifndef UNICOM_EMULATE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace unicom::cuda {
namespace {  // types of torch::stable are hidden

// The device of a call and its current stream.
class OnDevice {
 public:
#ifdef UNICOM_EMULATE_CUDA
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    queue.stream = static_cast<cudaStream_t>(stream);
  }
#endif

  // Raises the first error of the launches, if there was one.
  void finish() const {
    if (queue.error == cudaSuccess) return;
    std::string message =
        std::string("a CUDA kernel could not be started: ") + cudaGetErrorString(queue.error);
#ifndef UNICOM_EMULATE_CUDA
    if (queue.error == cudaErrorNoKernelImageForDevice ||
        queue.error == cudaErrorInvalidDeviceFunction ||
        queue.error == cudaErrorUnsupportedPtxVersion)
      message += ". unicom_ext needs a GPU of compute capability 8.0 (Ampere) or newer";
    cudaGetLastError();  // so that it is not reported again elsewhere
#endif
    throw std::runtime_error(message);
  }

  Queue queue;

 private:
#ifndef UNICOM_EMULATE_CUDA
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// Memory of the caching allocator. Through the stable ABI its errors have lost their type and their
// message: where the device still answers, it was out of memory, and unicom_ext/ops/library.py makes
// torch's error of ours.
inline Tensor allocate(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  try {
    return empty_like_device(like, sizes, dtype);
  } catch (const std::exception&) {
#ifndef UNICOM_EMULATE_CUDA
    size_t free = 0, total = 0;
    if (cudaMemGetInfo(&free, &total) != cudaSuccess) throw;
#endif
    std::ostringstream message;
    message << "CUDA out of memory. unicom_ext tried to allocate "
            << torch::headeronly::toString(dtype) << " [";
    const char* separator = "";
    for (int64_t size : sizes) {
      message << separator << size;
      separator = ", ";
    }
    message << "]";
    throw std::runtime_error(message.str());
  }
}

// The sorted keys, and where each of them was.
inline std::tuple<Tensor, Tensor> sort_stably(const Tensor& keys) {
  using torch::stable::detail::from;
  StableIValue stack[4] = {from(keys), from(std::optional<bool>(true)), from(int64_t{0}),
                           from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack, TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

class Backend {
 public:
  explicit Backend(const Tensor& like) : like_(like), on_(like) {}

  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    return allocate(like_, sizes, dtype);
  }
  Tensor large(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    return empty(sizes, dtype);
  }
  struct Doubles {
    Tensor tensor;
    double* get() const { return static_cast<double*>(tensor.mutable_data_ptr()); }
  };
  Doubles doubles(int64_t count) const { return {empty({count}, ScalarType::Double)}; }
  void finish() const { on_.finish(); }

  // ---- the loss

  static int64_t packed_bytes(const Problem& p) { return cuda::packed_bytes(p); }
  static int64_t kept_bytes(const Problem& p) { return cuda::kept_bytes(p); }
  static int64_t sampled(const Problem& p) { return p.bound; }
  static int64_t most_centers(const Problem& p) { return cuda::most_centers(p); }
  static void check_values(const Problem&) {}

  void forward(const Problem& p, const ShardSums& sums, const Saved& saved) {
    const Tensor workspace = bytes(forward_workspace(on_.queue, p));
    cuda::forward(on_.queue, p, sums, saved, workspace.mutable_data_ptr());
  }
  void join_targets(const JoinTargets& a) { cuda::join_targets(on_.queue, a); }
  void write_results(const WriteResults& a, bool is_double) {
    cuda::write_results(on_.queue, a, is_double);
  }
  void backward(const Problem& p, const Gradients& g) { run_backward(p, g, nullptr); }

  // Chunk by chunk, from rows that no one keeps. The host cannot see here whether the upstream
  // gradient is 1, as the update needs it: otherwise nothing is updated, and the gradient of the
  // embeddings is NaN.
  template <class Rows>
  void backward_with_update(const Problem& p, const Gradients& g, const Rows& rows) {
    const int64_t most = std::min(p.bound * p.centers, backward_chunk(on_.queue, p, g));
    const Tensor space = bytes(update_workspace(rows, most));
    const TakeRows take = [&](Queue& queue, const GradientRows& part) {
      update_rows(queue, rows,
                  {.ids = p.class_index,
                   .rows = part.rows,
                   .count = part.count,
                   .first = part.first,
                   .centers = p.centers,
                   .upstream = part.upstream},
                  space.mutable_data_ptr());
    };
    run_backward(p, g, &take);
  }

  // ---- row updates

  std::tuple<Tensor, Tensor> merge_rows(const SparseGradient& gradient) {
    const int64_t count = gradient.ids.numel(), dim = gradient.rows.size(1);
    Tensor keys = empty({count}, ScalarType::Long), order;
    Tensor ids = empty({count}, ScalarType::Long);
    Tensor rows = empty({count, dim}, gradient.rows.scalar_type());
    Merge merge{.ids = index_data(gradient.ids),
                .rows = gradient.rows.const_data_ptr(),
                .dtype = dtype_of(gradient.rows, "rows"),
                .count = count,
                .dim = dim,
                .keys = keys.mutable_data_ptr<int64_t>(),
                .order = nullptr,
                .merged_ids = ids.mutable_data_ptr<int64_t>(),
                .merged_rows = rows.mutable_data_ptr()};
    give_keys(on_.queue, merge);
    on_.finish();
    std::tie(keys, order) = sort_stably(keys);
    merge.keys = keys.mutable_data_ptr<int64_t>();
    merge.order = index_data(order);
    add_equal(on_.queue, merge);
    return {ids, rows};
  }
  template <class Rows>
  void update(const Rows& rows, const SparseGradient& gradient) {
    const int64_t count = gradient.ids.numel();
    const Tensor workspace = bytes(update_workspace(rows, count));
    update_rows(
        on_.queue, rows,
        {.ids = index_data(gradient.ids), .rows = gradient.rows.const_data_ptr(), .count = count},
        workspace.mutable_data_ptr());
  }

  // ---- selection

  static constexpr int64_t kMaxFeatures = cuda::kMaxFeatures;
  static void check_labels(const Labels&) {}
  static void check_sorted(const SlotSearch&) {}

  void select_classes(const ClassSelection& a) {
    const Tensor workspace = bytes(selection_workspace(a.labels));
    cuda::select_classes(on_.queue, a, workspace.mutable_data_ptr());
  }
  void find_slots(const SlotSearch& a) { cuda::find_slots(on_.queue, a); }
  void select_features(const FeatureSelection& a) { cuda::select_features(on_.queue, a); }

  // ---- the nearest centroid

  static int64_t packed_centroid_bytes(int64_t count, int64_t dim) {
    return cuda::packed_centroid_bytes(count, dim);
  }
  static void check_centroids(const FloatRows&) {}
  static void check_packed(const void*) {}
  static void check_index(const int64_t*, const char*, int64_t, int64_t) {}

  void pack_centroids(const FloatRows& centroids, void* packed) {
    const Tensor workspace = bytes(packing_workspace(centroids));
    cuda::pack_centroids(on_.queue, centroids, packed, workspace.mutable_data_ptr());
  }
  void nearest(const FloatRows& rows, const int64_t* guess, const FloatRows& centroids,
               const void* packed, int64_t* index, float* score) {
    const Tensor workspace = bytes(nearest_workspace(rows, centroids));
    cuda::nearest(on_.queue, rows, guess, centroids, packed, index, score,
                  workspace.mutable_data_ptr());
  }
  void add_unit_rows(const AddUnitRows& a) { cuda::add_unit_rows(on_.queue, a); }
  void directions(const Directions& a) { cuda::directions(on_.queue, a); }

 private:
  Tensor bytes(int64_t count) const { return empty({count}, ScalarType::Byte); }

  void run_backward(const Problem& p, const Gradients& g, const TakeRows* take) {
    const Tensor workspace = bytes(backward_workspace(on_.queue, p, g, take));
    cuda::backward(on_.queue, p, g, take, workspace.mutable_data_ptr());
  }

  const Tensor& like_;
  OnDevice on_;
};

}  // namespace
}  // namespace unicom::cuda
