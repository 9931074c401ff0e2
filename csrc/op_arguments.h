// What the lkconv::depthwise_conv2d ops do with their arguments on every device: views of the tensors, sizes
// of the convolution, and new outputs. Arguments were validated in Python; the checks here guard memory
// safety alone.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <vector>

#include "allocation.h"
#include "conv_params.h"

namespace lkconv {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      STD_TORCH_CHECK(false, "lkconv: dtype must be float64, float32, float16 or bfloat16");
  }
}

// What sums of t's elements are kept in.
inline ScalarType accumulation_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline TensorView view_of(const Tensor& t, bool writable) {
  STD_TORCH_CHECK(t.dim() == 4, "lkconv: expected a 4-D tensor");
  return {writable ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr()),
          dtype_of(t),
          t.stride(0),
          t.stride(1),
          t.stride(2),
          t.stride(3)};
}

// A weight is (C*m, 1, kh, kw): its planes follow each other along dimension 0.
inline TensorView weight_view_of(const Tensor& t, bool writable) {
  TensorView v = view_of(t, writable);
  v.stride_c = v.stride_n;
  return v;
}

// The memory format torch would suggest: channels_last exactly when the strides say so unambiguously.
inline MemoryFormat suggested_format(const Tensor& t) {
  int64_t min = 0;
  if (t.stride(1) == 0) return MemoryFormat::Contiguous;
  for (int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) == 0 || t.stride(d) < min) return MemoryFormat::Contiguous;
    if (d == 0 && min == t.stride(1)) return MemoryFormat::Contiguous;
    min = t.stride(d) * std::max<int64_t>(t.size(d), 1);
  }
  return MemoryFormat::ChannelsLast;
}

inline Tensor empty_like_format(std::initializer_list<int64_t> size, const Tensor& like,
                                MemoryFormat format) {
  return empty_tensor(size, like.scalar_type(), like, format);
}

inline Tensor empty_contiguous(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  return empty_tensor(sizes, dtype, like, std::nullopt);
}

constexpr int64_t kLargestReach = int64_t(1) << 60;  // sums of a few such numbers still fit 64 bits

inline ConvParams params_of(int64_t batch, int64_t channels, int64_t height, int64_t width,
                            int64_t out_channels, int64_t kernel_h, int64_t kernel_w,
                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation) {
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "lkconv: stride, padding and dilation must have two elements");
  STD_TORCH_CHECK(stride[0] > 0 && stride[1] > 0 && dilation[0] > 0 && dilation[1] > 0 && padding[0] >= 0 &&
                      padding[1] >= 0 && kernel_h > 0 && kernel_w > 0,
                  "lkconv: kernel size, stride and dilation must be positive and padding non-negative");
  STD_TORCH_CHECK(channels > 0 ? out_channels % channels == 0 : out_channels == 0, "lkconv: weight has ",
                  out_channels, " channels, not a multiple of the input's ", channels);
  ConvParams p{};
  p.batch = batch, p.channels = channels, p.multiplier = channels ? out_channels / channels : 1;
  p.height = height, p.width = width, p.kernel_h = kernel_h, p.kernel_w = kernel_w;
  p.stride_h = stride[0], p.stride_w = stride[1], p.pad_h = padding[0], p.pad_w = padding[1];
  p.dil_h = dilation[0], p.dil_w = dilation[1];
  for (const int i : {0, 1}) {
    const int64_t steps = (i ? kernel_w : kernel_h) - 1;
    STD_TORCH_CHECK(padding[i] <= kLargestReach && stride[i] <= kLargestReach &&
                        steps <= kLargestReach / dilation[i] && (i ? width : height) <= kLargestReach,
                    "lkconv: sizes, stride, padding and dilation * (kernel size - 1) must be at most 2^60");
  }
  const int64_t reach_h = height + 2 * p.pad_h - p.dil_h * (kernel_h - 1) - 1;
  const int64_t reach_w = width + 2 * p.pad_w - p.dil_w * (kernel_w - 1) - 1;
  STD_TORCH_CHECK(reach_h >= 0 && reach_w >= 0, "lkconv: the output would be empty");
  p.out_height = reach_h / p.stride_h + 1, p.out_width = reach_w / p.stride_w + 1;
  const double outputs = double(batch) * double(out_channels) * double(p.out_height) * double(p.out_width);
  STD_TORCH_CHECK(outputs <= double(kLargestReach), "lkconv: the output would have more than 2^60 elements");
  return p;
}

inline void check_grad_output(const Tensor& g, const ConvParams& p) {
  STD_TORCH_CHECK(g.size(0) == p.batch && g.size(1) == p.out_channels() && g.size(2) == p.out_height &&
                      g.size(3) == p.out_width,
                  "lkconv: grad_output's sizes do not match the convolution's output");
}

// Both tensors on one device, and that device of the kind the caller computes on.
inline void check_same_place(const Tensor& a, const Tensor& b, bool cuda) {
  STD_TORCH_CHECK((cuda ? a.is_cuda() && b.is_cuda() : a.is_cpu() && b.is_cpu()) &&
                      a.get_device_index() == b.get_device_index(),
                  "lkconv: all tensors must be on one ", cuda ? "CUDA device" : "CPU");
}

// One call of an op: its checked arguments and the layout of its output. A launcher allocates the output once
// it knows that its own kernels will run.
struct OpCall {
  ConvParams p;
  TensorView first, second, bias;  // input and weight, or grad_output and weight, or grad_output and input
  std::array<int64_t, 4> size;     // of the output
  MemoryFormat format;             // of the output
  TensorView out;                  // without data until allocated
  Tensor output = Tensor();

  void allocate(const Tensor& like) {
    output = empty_like_format({size[0], size[1], size[2], size[3]}, like, format);
    out.data = output.mutable_data_ptr();
  }
};

// A dense tensor of this format as torch allocates it.
inline TensorView dense_view(const std::array<int64_t, 4>& size, MemoryFormat format, DType dtype) {
  const auto [n, c, h, w] = size;
  if (format == MemoryFormat::ChannelsLast) return {nullptr, dtype, h * w * c, 1, w * c, c};
  return {nullptr, dtype, c * h * w, h * w, w, 1};
}

inline OpCall forward_call(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                           const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                           const std::vector<int64_t>& dilation, bool cuda) {
  check_same_place(input, weight, cuda);
  const TensorView x = view_of(input, false), w = weight_view_of(weight, false);
  STD_TORCH_CHECK(weight.size(1) == 1 && x.dtype == w.dtype,
                  "lkconv: weight must be (C*m, 1, kh, kw) of input's dtype");
  const ConvParams p = params_of(input.size(0), input.size(1), input.size(2), input.size(3), weight.size(0),
                                 weight.size(2), weight.size(3), stride, padding, dilation);
  TensorView b{};
  if (bias) {
    check_same_place(input, *bias, cuda);
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == p.out_channels() && dtype_of(*bias) == x.dtype,
                    "lkconv: bias must have one element per output channel and input's dtype");
    b.data = const_cast<void*>(bias->const_data_ptr());
    b.dtype = x.dtype;
    b.stride_c = bias->stride(0);
  }
  const std::array<int64_t, 4> size{p.batch, p.out_channels(), p.out_height, p.out_width};
  const MemoryFormat format = suggested_format(input);
  return {p, x, w, b, size, format, dense_view(size, format, x.dtype)};
}

inline OpCall backward_input_call(const Tensor& grad_output, const Tensor& weight,
                                  const std::vector<int64_t>& input_size, const std::vector<int64_t>& stride,
                                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                  bool cuda) {
  check_same_place(grad_output, weight, cuda);
  const TensorView g = view_of(grad_output, false), w = weight_view_of(weight, false);
  STD_TORCH_CHECK(
      weight.size(1) == 1 && g.dtype == w.dtype && input_size.size() == 4,
      "lkconv: weight must be (C*m, 1, kh, kw) of grad_output's dtype and input_size (N, C, H, W)");
  const ConvParams p = params_of(input_size[0], input_size[1], input_size[2], input_size[3], weight.size(0),
                                 weight.size(2), weight.size(3), stride, padding, dilation);
  check_grad_output(grad_output, p);
  const std::array<int64_t, 4> size{p.batch, p.channels, p.height, p.width};
  const MemoryFormat format = suggested_format(grad_output);
  return {p, g, w, {}, size, format, dense_view(size, format, g.dtype)};
}

inline OpCall backward_weight_call(const Tensor& grad_output, const Tensor& input,
                                   const std::vector<int64_t>& kernel_size,
                                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                   const std::vector<int64_t>& dilation, bool cuda) {
  check_same_place(grad_output, input, cuda);
  const TensorView g = view_of(grad_output, false), x = view_of(input, false);
  STD_TORCH_CHECK(g.dtype == x.dtype && kernel_size.size() == 2,
                  "lkconv: grad_output must have input's dtype and kernel_size two elements");
  const ConvParams p =
      params_of(input.size(0), input.size(1), input.size(2), input.size(3), grad_output.size(1),
                kernel_size[0], kernel_size[1], stride, padding, dilation);
  check_grad_output(grad_output, p);
  const std::array<int64_t, 4> size{p.out_channels(), 1, p.kernel_h, p.kernel_w};
  TensorView out = dense_view(size, MemoryFormat::Contiguous, g.dtype);
  out.stride_c = out.stride_n, out.stride_n = 0;  // output channels are the kernels' channels
  return {p, g, x, {}, size, MemoryFormat::Contiguous, out};
}

}  // namespace lkconv
