// Binds the fold of branch kernels to torch tensors through the stable ABI.
#include "../merge_arguments.h"
#include "merge_depthwise_kernels.h"
#include "op_support.h"

namespace lkconv::cpu {
namespace {

std::tuple<Tensor, Tensor> op_merge(const Tensors& weights, const Tensors& scales, const Tensors& biases,
                                    const std::vector<int64_t>& kernel_size,
                                    const std::vector<int64_t>& offset, const std::vector<int64_t>& step,
                                    ScalarType dtype) {
  return merge_call(weights, scales, biases, kernel_size, offset, step, dtype, false,
                    [](const MergeProblem& p) { merge_depthwise_kernels(p, active_isa(), parallel); });
}

std::tuple<Tensors, Tensors, Tensors> op_merge_backward(const Tensor& grad_weight, const Tensor& grad_bias,
                                                        const Tensors& weights, const Tensors& scales,
                                                        const Tensors& biases,
                                                        const std::vector<int64_t>& offset,
                                                        const std::vector<int64_t>& step) {
  return merge_backward_call(
      grad_weight, grad_bias, weights, scales, biases, offset, step, false,
      [](const MergeProblem& p) { merge_depthwise_kernels_backward(p, active_isa(), parallel); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lkconv, CPU, m) {
  m.impl("merge_depthwise_kernels", TORCH_BOX(&op_merge));
  m.impl("merge_depthwise_kernels_backward", TORCH_BOX(&op_merge_backward));
}

}  // namespace lkconv::cpu
