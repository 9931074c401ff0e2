// What the ops hand to PyTorch where no kernel of theirs runs, as CPU ops of their own, so that it can be
// tested where the CUDA ops, which take gradients from it, cannot run.
#include "aten_convolution.h"

namespace lkconv {

// Of the library's allocations; here torch's own error will do.
void throw_error_of_empty(const std::vector<int64_t>&, ScalarType, const Tensor&) {}

namespace {

using Sizes = std::vector<int64_t>;

Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
               const Sizes& stride, const Sizes& padding, const Sizes& dilation) {
  OpCall c = forward_call(input, weight, bias, stride, padding, dilation, false);
  return aten_forward(c, input, weight, bias, stride, padding, dilation);
}

Tensor backward_input(const Tensor& grad_output, const Tensor& weight, const Sizes& input_size,
                      const Sizes& stride, const Sizes& padding, const Sizes& dilation) {
  OpCall c = backward_input_call(grad_output, weight, input_size, stride, padding, dilation, false);
  return aten_backward_input(c, grad_output, weight, stride, padding, dilation);
}

Tensor backward_weight(const Tensor& grad_output, const Tensor& input, const Sizes& kernel_size,
                       const Sizes& stride, const Sizes& padding, const Sizes& dilation) {
  OpCall c = backward_weight_call(grad_output, input, kernel_size, stride, padding, dilation, false);
  return aten_backward_weight(c, grad_output, input, stride, padding, dilation);
}

}  // namespace

STABLE_TORCH_LIBRARY(lkconv_aten, m) {
  m.def("forward(Tensor x, Tensor w, Tensor? bias, int[] stride, int[] padding, int[] dilation) -> Tensor");
  m.def(
      "backward_input(Tensor g, Tensor w, int[] size, int[] stride, int[] padding, int[] dilation) -> "
      "Tensor");
  m.def(
      "backward_weight(Tensor g, Tensor x, int[] size, int[] stride, int[] padding, int[] dilation) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lkconv_aten, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward_input", TORCH_BOX(&backward_input));
  m.impl("backward_weight", TORCH_BOX(&backward_weight));
}

}  // namespace lkconv
