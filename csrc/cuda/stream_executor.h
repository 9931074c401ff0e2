// Launches kernels on torch's current stream. Nothing here waits for the device, so calls can be captured in
// a graph.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "../op_arguments.h"
#include "kernels.h"
#include "planner.h"

namespace lkconv::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "lkconv: ", what, " failed: ", cudaGetErrorString(error));
}

inline int attribute(cudaDeviceAttr a, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, a, device), "cudaDeviceGetAttribute");
  return value;
}

inline Machine machine_of(int device) {
  return {attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)};
}

// Launches on the current stream of a tensor's device, which is current while this lives.
class StreamExecutor {
 public:
  explicit StreamExecutor(const Tensor& on) : like_(on), guard_(on.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  Machine machine() const { return machine_of(like_.get_device_index()); }

  // From torch's allocator, which hands memory out again in stream order: it may be released before it is
  // used.
  void* workspace(int64_t bytes) {
    kept_.push_back(empty_tensor({bytes}, ScalarType::Byte, like_, std::nullopt));
    return kept_.back().mutable_data_ptr();
  }

  template <class P>
  void launch(const char* name, Kernel<P> kernel, const LaunchShape& s, const P& params) {
    STD_TORCH_CHECK(kernel != nullptr, "lkconv: no kernel ", name, " for this dtype");
    STD_TORCH_CHECK(s.blocks <= INT32_MAX, "lkconv: ", name, " would need ", s.blocks, " blocks");
    if (s.shared_bytes > 48 * 1024)
      check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, int(s.shared_bytes)),
            name);
    kernel<<<unsigned(s.blocks), unsigned(s.threads), size_t(s.shared_bytes), stream_>>>(params);
    check(cudaGetLastError(), name);
  }

 private:
  Tensor like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  std::vector<Tensor> kept_;
};

}  // namespace lkconv::cuda
