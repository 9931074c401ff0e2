// Binds the CPU kernels to torch tensors through the stable ABI.
#include <optional>
#include <vector>

#include "../aten_convolution.h"
#include "depthwise_conv2d.h"
#include "op_support.h"

namespace lkconv::cpu {
namespace {

Tensor op_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation) {
  OpCall c = forward_call(input, weight, bias, stride, padding, dilation, false);
  const Machine m = machine();
  if (prefers_aten(c.p, Pass::forward, c.first, c.out, m))
    return aten_forward(c, input, weight, bias, stride, padding, dilation);
  c.allocate(input);
  depthwise_conv2d(c.p, c.first, c.second, c.bias, c.out, m, parallel);
  return c.output;
}

Tensor op_backward_input(const Tensor& grad_output, const Tensor& weight,
                         const std::vector<int64_t>& input_size, const std::vector<int64_t>& stride,
                         const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  OpCall c = backward_input_call(grad_output, weight, input_size, stride, padding, dilation, false);
  const Machine m = machine();
  if (prefers_aten(c.p, Pass::backward_input, c.first, c.out, m))
    return aten_backward_input(c, grad_output, weight, stride, padding, dilation);
  c.allocate(grad_output);
  depthwise_conv2d_backward_input(c.p, c.first, c.second, c.out, m, parallel);
  return c.output;
}

Tensor op_backward_weight(const Tensor& grad_output, const Tensor& input,
                          const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                          const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  OpCall c = backward_weight_call(grad_output, input, kernel_size, stride, padding, dilation, false);
  c.allocate(grad_output);
  depthwise_conv2d_backward_weight(c.p, c.first, c.second, c.out, machine(), parallel);
  return c.output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lkconv, CPU, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&op_forward));
  m.impl("depthwise_conv2d_backward_input", TORCH_BOX(&op_backward_input));
  m.impl("depthwise_conv2d_backward_weight", TORCH_BOX(&op_backward_weight));
}

}  // namespace lkconv::cpu
