// Tensors of any layout over exactly as much memory as they need, and depthwise convolution in float64.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/half.h"
#include "cpu/problem.h"

namespace emulation {

using lkconv::ConvParams;
using lkconv::DType;
using lkconv::TensorView;
using lkconv::cpu::bfloat_to_float;
using lkconv::cpu::float_to_bfloat;

enum class Layout { contiguous, channels_last, channel_slice, space_slice, transposed, last_slice, expanded };
constexpr int kLayouts = 6;  // those that can be written

// A 4-D tensor whose elements outside the view are NaN and whose last element ends the allocation.
class Tensor {
 public:
  int64_t size[4];
  TensorView view;

  Tensor(int64_t n, int64_t c, int64_t h, int64_t w, Layout layout, DType dtype = DType::bf16)
      : size{n, c, h, w} {
    int64_t stride[4], start = 0;
    const auto dense = [&](std::initializer_list<int> order, int64_t extra_inner) {
      int64_t step = 1;
      bool first = true;
      for (int d : order) {
        stride[d] = step;
        step *= size[d] + (first ? extra_inner : 0);
        first = false;
      }
    };
    switch (layout) {
      case Layout::contiguous:
        dense({3, 2, 1, 0}, 0);
        break;
      case Layout::channels_last:
        dense({1, 3, 2, 0}, 0);
        break;
      case Layout::channel_slice:
        dense({3, 2, 1, 0}, 0), stride[0] += 2 * h * w, start = h * w;
        break;
      case Layout::space_slice:
        dense({3, 2, 1, 0}, 3), start = 1;
        break;
      case Layout::transposed:
        dense({2, 3, 1, 0}, 0);
        break;
      case Layout::last_slice:
        dense({1, 3, 2, 0}, 5), start = 3;
        break;
      case Layout::expanded:
        stride[0] = 0, stride[1] = 0, stride[2] = 0, stride[3] = 0;
        break;
    }
    int64_t last = start;
    for (int d = 0; d < 4; ++d) last += std::max<int64_t>(0, size[d] - 1) * stride[d];
    const bool wide = dtype == DType::f32;
    if (wide)
      floats_.assign(size_t(last + 1), std::numeric_limits<float>::quiet_NaN());
    else
      halves_.assign(size_t(last + 1), 0x7fc1);
    halves_.shrink_to_fit();
    floats_.shrink_to_fit();
    void* data =
        wide ? static_cast<void*>(floats_.data() + start) : static_cast<void*>(halves_.data() + start);
    view = {data, dtype, stride[0], stride[1], stride[2], stride[3]};
  }
  Tensor(const Tensor&) = delete;

  int64_t offset(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return n * view.stride_n + c * view.stride_c + h * view.stride_h + w * view.stride_w;
  }
  double at(int64_t n, int64_t c, int64_t h, int64_t w) const {
    const int64_t i = offset(n, c, h, w);
    if (view.dtype == DType::f32) return static_cast<const float*>(view.data)[i];
    return bfloat_to_float(static_cast<const uint16_t*>(view.data)[i]);
  }
  void set(int64_t n, int64_t c, int64_t h, int64_t w, float v) {
    static_cast<uint16_t*>(view.data)[offset(n, c, h, w)] = float_to_bfloat(v);
  }
  void fill(std::mt19937_64& rng) {
    std::normal_distribution<float> normal;
    for (int64_t n = 0; n < size[0]; ++n)
      for (int64_t c = 0; c < size[1]; ++c)
        for (int64_t h = 0; h < size[2]; ++h)
          for (int64_t w = 0; w < size[3]; ++w) set(n, c, h, w, normal(rng));
  }

 private:
  std::vector<uint16_t> halves_;
  std::vector<float> floats_;
};

// A result in float64, and the sum of the absolute values of its terms, for error bounds.
struct Exact {
  double value = 0, magnitude = 0;
  void add(double term) { value += term, magnitude += std::fabs(term); }
};
using Results = std::vector<Exact>;  // contiguous NCHW

// Calls body(n, output channel, y, x, u, v, input y, input x) for every product inside the image.
template <class Body>
void for_each_product(const ConvParams& p, Body body) {
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t c = 0; c < p.out_channels(); ++c)
      for (int64_t y = 0; y < p.out_height; ++y)
        for (int64_t u = 0; u < p.kernel_h; ++u) {
          const int64_t iy = y * p.stride_h - p.pad_h + u * p.dil_h;
          if (iy < 0 || iy >= p.height) continue;
          for (int64_t x = 0; x < p.out_width; ++x)
            for (int64_t v = 0; v < p.kernel_w; ++v) {
              const int64_t ix = x * p.stride_w - p.pad_w + v * p.dil_w;
              if (ix >= 0 && ix < p.width) body(n, c, y, x, u, v, iy, ix);
            }
        }
}

inline Results exact_forward(const ConvParams& p, const Tensor& input, const Tensor& weight,
                             const Tensor* bias) {
  Results r(size_t(p.batch * p.out_channels() * p.out_height * p.out_width));
  const auto at = [&](int64_t n, int64_t c, int64_t y, int64_t x) -> Exact& {
    return r[size_t(((n * p.out_channels() + c) * p.out_height + y) * p.out_width + x)];
  };
  for_each_product(
      p, [&](int64_t n, int64_t c, int64_t y, int64_t x, int64_t u, int64_t v, int64_t iy, int64_t ix) {
        at(n, c, y, x).add(input.at(n, c / p.multiplier, iy, ix) * weight.at(c, 0, u, v));
      });
  if (bias)
    for (int64_t n = 0; n < p.batch; ++n)
      for (int64_t c = 0; c < p.out_channels(); ++c)
        for (int64_t i = 0; i < p.out_height * p.out_width; ++i) at(n, c, 0, i).add(bias->at(0, c, 0, 0));
  return r;
}

inline Results exact_backward_input(const ConvParams& p, const Tensor& grad, const Tensor& weight) {
  Results r(size_t(p.batch * p.channels * p.height * p.width));
  for_each_product(
      p, [&](int64_t n, int64_t c, int64_t y, int64_t x, int64_t u, int64_t v, int64_t iy, int64_t ix) {
        r[size_t(((n * p.channels + c / p.multiplier) * p.height + iy) * p.width + ix)].add(
            grad.at(n, c, y, x) * weight.at(c, 0, u, v));
      });
  return r;
}

inline Results exact_backward_weight(const ConvParams& p, const Tensor& grad, const Tensor& input) {
  Results r(size_t(p.out_channels() * p.kernel_h * p.kernel_w));
  for_each_product(
      p, [&](int64_t n, int64_t c, int64_t y, int64_t x, int64_t u, int64_t v, int64_t iy, int64_t ix) {
        r[size_t((c * p.kernel_h + u) * p.kernel_w + v)].add(grad.at(n, c, y, x) *
                                                             input.at(n, c / p.multiplier, iy, ix));
      });
  return r;
}

}  // namespace emulation
