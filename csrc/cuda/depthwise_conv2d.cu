// The CUDA implementations of the lkconv::depthwise_conv2d ops: tensors to problems, and launches on torch's
// current stream of the tensors' device. Nothing here waits for the device, so calls can be captured in a
// graph.
#include "depthwise_conv2d.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "../op_arguments.h"
#include "run.h"

namespace lkconv::cuda {
namespace {

std::atomic<const std::function<bool()>*> tf32_query{nullptr};

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "lkconv: ", what, " failed: ", cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr a, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, a, device), "cudaDeviceGetAttribute");
  return value;
}

Machine machine_of(int device) {
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
    const int64_t size[] = {bytes};
    kept_.push_back(torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(size, 1), ScalarType::Byte,
                                         std::nullopt, like_.device()));
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

Switches switches_for(DType dtype) {
  Switches s = switches_from_environment();
  const std::function<bool()>* query = tf32_query.load();
  s.tf32 = dtype == DType::f32 && s.toeplitz && query && (*query)();
  return s;
}

Tensor op_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation) {
  StreamExecutor e(input);
  const OpCall c = forward_call(input, weight, bias, stride, padding, dilation, true);
  ForwardProblem f = forward_problem(c.p);
  f.input = c.first, f.weight = c.second, f.bias = c.bias, f.output = c.out;
  run_forward(e, f, switches_for(c.first.dtype));
  return c.output;
}

Tensor op_backward_input(const Tensor& grad_output, const Tensor& weight,
                         const std::vector<int64_t>& input_size, const std::vector<int64_t>& stride,
                         const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  StreamExecutor e(grad_output);
  const OpCall c = backward_input_call(grad_output, weight, input_size, stride, padding, dilation, true);
  const Switches s = switches_for(c.first.dtype);
  for (const ForwardProblem& f : backward_input_phases(c.p, c.first, c.second, c.out)) run_forward(e, f, s);
  return c.output;
}

Tensor op_backward_weight(const Tensor& grad_output, const Tensor& input,
                          const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                          const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  StreamExecutor e(grad_output);
  const OpCall c = backward_weight_call(grad_output, input, kernel_size, stride, padding, dilation, true);
  WeightProblem w = weight_problem(c.p);
  w.grad_output = c.first, w.input = c.second, w.grad_weight = c.out;
  run_weight(e, w, switches_for(c.first.dtype));
  return c.output;
}

std::vector<KernelName> all_kernels() {
  std::vector<KernelName> names;
  append_direct_kernels(names);
  append_toeplitz_kernels(names);
  return names;
}

}  // namespace

void set_tf32_query(std::function<bool()> query) {
  // Never freed: another thread may be asking.
  tf32_query.store(new std::function<bool()>(std::move(query)));
}

Switches switches_from_environment() {
  Switches s;
  const char* toeplitz = std::getenv("LKCONV_TOEPLITZ");
  s.toeplitz = !toeplitz || std::strcmp(toeplitz, "0") != 0;
  const char* direct = std::getenv("LKCONV_DIRECT");
  s.direct = !direct || std::strcmp(direct, "0") != 0;
  return s;
}

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const KernelName& k : all_kernels()) names.push_back(k.name);
  return names;
}

std::vector<KernelResources> kernel_resources() {
  std::vector<KernelResources> out;
  for (const KernelName& k : all_kernels()) {
    cudaFuncAttributes a{};
    check(cudaFuncGetAttributes(&a, k.address), k.name.c_str());
    out.push_back({k.name, a.numRegs, int(a.localSizeBytes), int(a.sharedSizeBytes), a.maxThreadsPerBlock,
                   a.binaryVersion, a.ptxVersion});
  }
  return out;
}

Machine current_machine() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return machine_of(device);
}

std::vector<std::string> compiled_architectures() {
  std::vector<std::string> names;
  for (const int arch : {__CUDA_ARCH_LIST__}) names.push_back("sm_" + std::to_string(arch / 10));
  return names;
}

std::string toolkit_version() {
  return std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__);
}

STABLE_TORCH_LIBRARY_IMPL(lkconv, CUDA, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&op_forward));
  m.impl("depthwise_conv2d_backward_input", TORCH_BOX(&op_backward_input));
  m.impl("depthwise_conv2d_backward_weight", TORCH_BOX(&op_backward_weight));
}

}  // namespace lkconv::cuda
