// PyTorch's own convolution in place of lkconv's kernels, through the stable ABI: for the shapes where the
// CPU planner finds it faster, and for those that no CUDA kernel takes. The output's layout is part of the
// ops' contract, whichever kernel ran.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "op_arguments.h"

namespace lkconv {

inline bool has_strides_of(const Tensor& t, const TensorView& v) {
  return t.stride(0) == v.stride_n && t.stride(1) == v.stride_c && t.stride(2) == v.stride_h &&
         t.stride(3) == v.stride_w;
}

inline Tensor aten_forward(OpCall& c, const Tensor& input, const Tensor& weight,
                           const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                           const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  using torch::stable::detail::from;
  std::array<StableIValue, 7> stack{from(input),   from(weight),   from(bias),         from(stride),
                                    from(padding), from(dilation), from(input.size(1))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::conv2d", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor result = torch::stable::detail::to<Tensor>(stack[0]);
  if (has_strides_of(result, c.out)) return result;
  c.allocate(input);
  return torch::stable::copy_(c.output, result);
}

// As a transposed convolution, which unlike `aten::convolution_backward` asks for no input: an uninitialised
// tensor in its place would be as large as the result.
inline Tensor aten_backward_input(OpCall& c, const Tensor& grad_output, const Tensor& weight,
                                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                  const std::vector<int64_t>& dilation) {
  using torch::stable::detail::from;
  const auto left_over = [&](int64_t in, int64_t out, int64_t kernel, size_t axis) {
    return in - ((out - 1) * stride[axis] - 2 * padding[axis] + (kernel - 1) * dilation[axis] + 1);
  };
  const ConvParams& p = c.p;
  const std::vector<int64_t> output_padding{left_over(p.height, p.out_height, p.kernel_h, 0),
                                            left_over(p.width, p.out_width, p.kernel_w, 1)};
  std::array<StableIValue, 8> stack{from(grad_output), from(weight),  from(std::nullopt),
                                    from(stride),      from(padding), from(output_padding),
                                    from(p.channels),  from(dilation)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::conv_transpose2d", "input", stack.data(), TORCH_ABI_VERSION));
  const Tensor result = torch::stable::detail::to<Tensor>(stack[0]);
  if (has_strides_of(result, c.out)) return result;
  c.allocate(grad_output);
  return torch::stable::copy_(c.output, result);
}

inline Tensor aten_backward_weight(OpCall& c, const Tensor& grad_output, const Tensor& input,
                                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                   const std::vector<int64_t>& dilation) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  c.allocate(grad_output);  // stands in for the weight, whose values do not matter for its own gradient
  const bool wanted[] = {false, true, false};
  const torch::headeronly::HeaderOnlyArrayRef<bool> mask(wanted, 3);
  const std::vector<int64_t> output_padding{0, 0};
  std::array<StableIValue, 11> stack{
      from(grad_output), from(input), from(c.output),       from(std::nullopt),  from(stride), from(padding),
      from(dilation),    from(false), from(output_padding), from(input.size(1)), from(mask)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor unused_input = to<Tensor>(stack[0]), result = to<Tensor>(stack[1]),
               unused_bias = to<Tensor>(stack[2]);
  return torch::stable::copy_(c.output, result);
}

}  // namespace lkconv
