// Binds the CPU kernels to torch tensors through the stable ABI.
#include <array>
#include <optional>
#include <vector>

#include "depthwise_conv2d.h"
#include "op_support.h"

namespace lkconv::cpu {
namespace {

// PyTorch's own convolution, for the shapes where the planner finds it faster.
Tensor aten_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                    const std::vector<int64_t>& dilation) {
  using torch::stable::detail::from;
  std::array<StableIValue, 7> stack{from(input),   from(weight),   from(bias),         from(stride),
                                    from(padding), from(dilation), from(input.size(1))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::conv2d", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor aten_backward_input(const Tensor& grad_output, const Tensor& grad_input, const Tensor& weight,
                           const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                           const std::vector<int64_t>& dilation) {
  using torch::stable::detail::from;
  const bool wanted[] = {true, false, false};
  const torch::headeronly::HeaderOnlyArrayRef<bool> mask(wanted, 3);
  const std::vector<int64_t> output_padding{0, 0};
  // The input's values do not matter for its own gradient: the uninitialised result stands in for it.
  std::array<StableIValue, 11> stack{from(grad_output),        from(grad_input), from(weight),
                                     from(std::nullopt),       from(stride),     from(padding),
                                     from(dilation),           from(false),      from(output_padding),
                                     from(grad_input.size(1)), from(mask)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  using torch::stable::detail::to;
  const Tensor unused_weight = to<Tensor>(stack[1]), unused_bias = to<Tensor>(stack[2]);
  return to<Tensor>(stack[0]);
}

// The output's layout is part of the op's contract, whichever kernel ran.
bool has_strides_of(const Tensor& t, const TensorView& v) {
  return t.stride(0) == v.stride_n && t.stride(1) == v.stride_c && t.stride(2) == v.stride_h &&
         t.stride(3) == v.stride_w;
}

Tensor op_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation) {
  OpCall c = forward_call(input, weight, bias, stride, padding, dilation, false);
  const Machine m = machine();
  if (prefers_aten(c.p, Pass::forward, c.first, c.out, m)) {
    const Tensor result = aten_forward(input, weight, bias, stride, padding, dilation);
    if (has_strides_of(result, c.out)) return result;
    c.allocate(input);
    return torch::stable::copy_(c.output, result);
  }
  c.allocate(input);
  depthwise_conv2d(c.p, c.first, c.second, c.bias, c.out, m, parallel);
  return c.output;
}

Tensor op_backward_input(const Tensor& grad_output, const Tensor& weight,
                         const std::vector<int64_t>& input_size, const std::vector<int64_t>& stride,
                         const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  OpCall c = backward_input_call(grad_output, weight, input_size, stride, padding, dilation, false);
  const Machine m = machine();
  if (prefers_aten(c.p, Pass::backward_input, c.first, c.out, m)) {
    c.allocate(grad_output);
    const Tensor result = aten_backward_input(grad_output, c.output, weight, stride, padding, dilation);
    return has_strides_of(result, c.out) ? result : torch::stable::copy_(c.output, result);
  }
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
