// The CUDA implementations of the lkconv::depthwise_conv2d ops: tensors to problems, and launches on torch's
// current stream of the tensors' device. Nothing here waits for the device, so calls can be captured in a
// graph.
#include "depthwise_conv2d.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <sstream>

#include "../aten_convolution.h"
#include "group_mix_kernels.h"
#include "run.h"
#include "stream_executor.h"

namespace lkconv::cuda {
namespace {

std::atomic<const std::function<bool()>*> tf32_query{nullptr};

// What PyTorch makes of a call that no kernel takes: compiled graphs reach the ops without a question to the
// planner, and the planner's answer for sliced tensors may differ from that for dense ones.
template <class Run, class Aten>
Tensor or_aten(Run run, Aten aten) {
  try {
    return run();
  } catch (const NoKernel&) {
    return aten();
  }
}

Tensor op_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation) {
  StreamExecutor e(input);
  OpCall c = forward_call(input, weight, bias, stride, padding, dilation, true);
  const auto run = [&] {
    c.allocate(input);
    ForwardProblem f = forward_problem(c.p);
    f.input = c.first, f.weight = c.second, f.bias = c.bias, f.output = c.out;
    run_forward(e, f, switches_for(c.first.dtype));
    return c.output;
  };
  return or_aten(run, [&] { return aten_forward(c, input, weight, bias, stride, padding, dilation); });
}

Tensor op_backward_input(const Tensor& grad_output, const Tensor& weight,
                         const std::vector<int64_t>& input_size, const std::vector<int64_t>& stride,
                         const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  StreamExecutor e(grad_output);
  OpCall c = backward_input_call(grad_output, weight, input_size, stride, padding, dilation, true);
  const auto run = [&] {
    c.allocate(grad_output);
    const Switches s = switches_for(c.first.dtype);
    for (const ForwardProblem& f : backward_input_phases(c.p, c.first, c.second, c.out)) run_forward(e, f, s);
    return c.output;
  };
  return or_aten(run, [&] { return aten_backward_input(c, grad_output, weight, stride, padding, dilation); });
}

Tensor op_backward_weight(const Tensor& grad_output, const Tensor& input,
                          const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                          const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  StreamExecutor e(grad_output);
  OpCall c = backward_weight_call(grad_output, input, kernel_size, stride, padding, dilation, true);
  const auto run = [&] {
    c.allocate(grad_output);
    WeightProblem w = weight_problem(c.p);
    w.grad_output = c.first, w.input = c.second, w.grad_weight = c.out;
    run_weight(e, w, switches_for(c.first.dtype));
    return c.output;
  };
  return or_aten(run, [&] { return aten_backward_weight(c, grad_output, input, stride, padding, dilation); });
}

std::vector<KernelName> all_kernels() {
  std::vector<KernelName> names;
  append_direct_kernels(names);
  append_toeplitz_kernels(names);
  append_merge_kernels(names);
  append_group_mix_kernels(names);
  append_group_mix_attention_kernels(names);
  return names;
}

}  // namespace

void set_tf32_query(std::function<bool()> query) {
  // Never freed: another thread may be asking.
  tf32_query.store(new std::function<bool()>(std::move(query)));
}

Switches switches_for(DType dtype) {
  Switches s = switches_from_environment();
  const std::function<bool()>* query = tf32_query.load();
  s.tf32 = dtype == DType::f32 && s.toeplitz && query && (*query)();
  return s;
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

#ifndef LKCONV_CUDA_IMAGES
#error "setup.py defines LKCONV_CUDA_IMAGES: what nvcc was asked for, such as sm_80+sm_90a+compute_90a"
#endif
#define LKCONV_TEXT(...) #__VA_ARGS__
#define LKCONV_EXPANDED_TEXT(...) LKCONV_TEXT(__VA_ARGS__)

std::vector<std::string> compiled_architectures() {
  std::vector<std::string> names;
  std::stringstream all(LKCONV_EXPANDED_TEXT(LKCONV_CUDA_IMAGES));
  for (std::string name; std::getline(all, name, '+');) names.push_back(name);
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
