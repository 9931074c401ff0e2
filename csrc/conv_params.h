// What every layer below the op needs to know of one depthwise convolution, filled once by the launcher.
// Knows nothing of torch, so that planners and kernels can be compiled and tested on their own.
#pragma once

#include <cstdint>

namespace lkconv {

enum class DType : int8_t { f64, f32, f16, bf16 };
enum class Pass : int8_t { forward, backward_input, backward_weight };

inline int64_t dtype_size(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

// Sizes of one depthwise convolution: input (batch, channels, height, width), weight
// (channels * multiplier, 1, kernel_h, kernel_w), output (batch, channels * multiplier, out_height,
// out_width).
struct ConvParams {
  int64_t batch, channels, multiplier;
  int64_t height, width, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;

  int64_t out_channels() const { return channels * multiplier; }
};

// A 4-D tensor (n, c, h, w) by address and element strides. Strides may be zero (expanded) or negative
// (flipped kernels).
struct TensorView {
  void* data;
  DType dtype;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

}  // namespace lkconv
