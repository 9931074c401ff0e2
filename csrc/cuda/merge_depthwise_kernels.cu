// The CUDA implementations of the lkconv::merge_depthwise_kernels ops.
#include "../merge_arguments.h"
#include "merge_run.h"
#include "stream_executor.h"

namespace lkconv::cuda {
namespace {

std::tuple<Tensor, Tensor> op_merge(const Tensors& weights, const Tensors& scales, const Tensors& biases,
                                    const std::vector<int64_t>& kernel_size,
                                    const std::vector<int64_t>& offset, const std::vector<int64_t>& step,
                                    ScalarType dtype) {
  STD_TORCH_CHECK(!weights.empty() && weights[0].is_cuda(), "lkconv: expected weights on a CUDA device");
  StreamExecutor e(weights[0]);
  return merge_call(weights, scales, biases, kernel_size, offset, step, dtype, true,
                    [&](const MergeProblem& p) { run_merge(e, p, false); });
}

std::tuple<Tensors, Tensors, Tensors> op_merge_backward(const Tensor& grad_weight, const Tensor& grad_bias,
                                                        const Tensors& weights, const Tensors& scales,
                                                        const Tensors& biases,
                                                        const std::vector<int64_t>& offset,
                                                        const std::vector<int64_t>& step) {
  STD_TORCH_CHECK(grad_weight.is_cuda(), "lkconv: expected a gradient on a CUDA device");
  StreamExecutor e(grad_weight);
  return merge_backward_call(grad_weight, grad_bias, weights, scales, biases, offset, step, true,
                             [&](const MergeProblem& p) { run_merge(e, p, true); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lkconv, CUDA, m) {
  m.impl("merge_depthwise_kernels", TORCH_BOX(&op_merge));
  m.impl("merge_depthwise_kernels_backward", TORCH_BOX(&op_merge_backward));
}

}  // namespace lkconv::cuda
