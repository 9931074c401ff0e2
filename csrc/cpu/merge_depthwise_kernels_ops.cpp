// Binds the fold of branch kernels to torch tensors through the stable ABI.
#include "../merge_arguments.h"
#include "merge_depthwise_kernels.h"

namespace lkconv::cpu {
namespace {

void parallel(int64_t tasks, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (tasks <= grain) return body(0, tasks);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t a, int64_t b) { body(a, b); });
}

std::tuple<Tensor, Tensor> op_merge(const Tensors& weights, const Tensors& scales, const Tensors& biases,
                                    const std::vector<int64_t>& kernel_size,
                                    const std::vector<int64_t>& offset, const std::vector<int64_t>& step,
                                    ScalarType dtype) {
  STD_TORCH_CHECK(kernel_size.size() == 2, "lkconv: kernel_size must have two elements");
  const MergeCall call(weights, scales, biases, kernel_size[0], kernel_size[1], offset, step, false);
  const Tensor& like = weights[0];
  Tensor kernel = empty_contiguous({like.size(0), 1, kernel_size[0], kernel_size[1]}, dtype, like);
  Tensor bias = empty_contiguous({like.size(0)}, dtype, like);
  merge_depthwise_kernels(call.problem(kernel, bias, true), active_isa(), parallel);
  return {kernel, bias};
}

std::tuple<Tensors, Tensors, Tensors> op_merge_backward(const Tensor& grad_weight, const Tensor& grad_bias,
                                                        const Tensors& weights, const Tensors& scales,
                                                        const Tensors& biases,
                                                        const std::vector<int64_t>& offset,
                                                        const std::vector<int64_t>& step) {
  STD_TORCH_CHECK(grad_weight.dim() == 4 && grad_weight.is_cpu() && grad_bias.is_cpu(),
                  "lkconv: the merged kernel's gradient must be a 4-D tensor on the CPU");
  const Tensor dense = torch::stable::contiguous(grad_weight);
  MergeCall call(weights, scales, biases, dense.size(2), dense.size(3), offset, step, false);
  auto gradients = call.gradients(weights, scales, biases);
  merge_depthwise_kernels_backward(call.problem(dense, grad_bias, false), active_isa(), parallel);
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lkconv, CPU, m) {
  m.impl("merge_depthwise_kernels", TORCH_BOX(&op_merge));
  m.impl("merge_depthwise_kernels_backward", TORCH_BOX(&op_merge_backward));
}

}  // namespace lkconv::cpu
