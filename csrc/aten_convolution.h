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

// The gradients of input and weight, of which one is wanted and the other without meaning.
inline std::array<Tensor, 2> aten_gradients(bool of_input, const Tensor& grad_output, const Tensor& input,
                                            const Tensor& weight, const std::vector<int64_t>& stride,
                                            const std::vector<int64_t>& padding,
                                            const std::vector<int64_t>& dilation) {
  using torch::stable::detail::from;
  const bool wanted[] = {of_input, !of_input, false};
  const torch::headeronly::HeaderOnlyArrayRef<bool> mask(wanted, 3);
  const std::vector<int64_t> output_padding{0, 0};
  std::array<StableIValue, 11> stack{
      from(grad_output), from(input), from(weight),         from(std::nullopt),  from(stride), from(padding),
      from(dilation),    from(false), from(output_padding), from(input.size(1)), from(mask)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  using torch::stable::detail::to;
  const Tensor unused_bias = to<Tensor>(stack[2]);
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

inline Tensor aten_backward_input(OpCall& c, const Tensor& grad_output, const Tensor& weight,
                                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                  const std::vector<int64_t>& dilation) {
  // The input's values do not matter for its own gradient: the uninitialised result stands in for it.
  c.allocate(grad_output);
  const Tensor result =
      aten_gradients(true, grad_output, c.output, weight, stride, padding, dilation).front();
  return has_strides_of(result, c.out) ? result : torch::stable::copy_(c.output, result);
}

inline Tensor aten_backward_weight(OpCall& c, const Tensor& grad_output, const Tensor& input,
                                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                   const std::vector<int64_t>& dilation) {
  c.allocate(grad_output);  // stands in for the weight, likewise
  const Tensor result = aten_gradients(false, grad_output, input, c.output, stride, padding, dilation).back();
  return torch::stable::copy_(c.output, result);
}

}  // namespace lkconv
