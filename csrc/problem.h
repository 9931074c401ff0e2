// The two problems every kernel solves. Each pass of the op reduces to them: forward, and backward_input (one
// forward problem per stride phase, over a flipped, sub-sampled kernel view), are ForwardProblem;
// backward_weight is WeightProblem. Strided views make the reductions free of copies.
#pragma once

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "conv_params.h"

namespace lkconv {

// Sizes common to both: `channels` counts output planes per image.
struct Geometry {
  int64_t batch, channels;
  int64_t height, width, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  bool dense = true;      // pixels follow each other without a gap: no slice of wider tensors
  bool rows = true;       // neighbouring pixels of a row are neighbours in memory (contiguous)
  bool adjacent = false;  // neighbouring channels are neighbours in memory (channels_last): for CPU planners
  // Of how many problems this is one, in all and along rows: backward_input has one per stride phase.
  int64_t phases = 1, phases_w = 1;
};

// output[n, c, y, x] = bias[c] + sum_j sum_{u,v} weight[wc(c,j), u, v]
//                      * input[n, ic(c,j), y*stride - pad + u*dil, ...]   for j < reduce
struct ForwardProblem : Geometry {
  int64_t channel_div, channel_mul, reduce;  // which input and weight planes an output plane reads
  TensorView input, weight, output, bias;    // weight: stride_n unused; bias: stride_c only, data may be null

  int64_t input_channel(int64_t c, int64_t j) const { return c / channel_div * channel_mul + j; }
  int64_t weight_channel(int64_t c, int64_t j) const { return c * channel_mul + j; }
};

// The same problem with rows and columns exchanged.
inline void exchange_axes(Geometry& g) {
  std::swap(g.height, g.width), std::swap(g.out_height, g.out_width), std::swap(g.kernel_h, g.kernel_w);
  std::swap(g.stride_h, g.stride_w), std::swap(g.pad_h, g.pad_w), std::swap(g.dil_h, g.dil_w);
}
inline void exchange_axes(ForwardProblem& f) {
  exchange_axes(static_cast<Geometry&>(f));
  for (TensorView* t : {&f.input, &f.weight, &f.output}) std::swap(t->stride_h, t->stride_w);
}

// grad_weight[c, u, v] = sum_{n,y,x} grad_output[n, c, y, x] * input[n, c / channel_div, y*stride - pad +
// u*dil, ...]
struct WeightProblem : Geometry {
  int64_t channel_div;
  TensorView input, grad_output, grad_weight;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline ForwardProblem forward_problem(const ConvParams& p) {
  ForwardProblem f{};
  f.batch = p.batch, f.channels = p.out_channels();
  f.height = p.height, f.width = p.width, f.out_height = p.out_height, f.out_width = p.out_width;
  f.kernel_h = p.kernel_h, f.kernel_w = p.kernel_w, f.stride_h = p.stride_h, f.stride_w = p.stride_w;
  f.pad_h = p.pad_h, f.pad_w = p.pad_w, f.dil_h = p.dil_h, f.dil_w = p.dil_w;
  f.channel_div = p.multiplier, f.channel_mul = 1, f.reduce = 1;
  return f;
}

inline WeightProblem weight_problem(const ConvParams& p) {
  WeightProblem w{};
  static_cast<Geometry&>(w) = forward_problem(p);
  w.channel_div = p.multiplier;
  return w;
}

// One axis of one stride phase: which taps reach the inputs i = first + stride * t, and with what geometry.
struct PhaseAxis {
  int64_t first, count;          // inputs of the phase
  int64_t tap0, tap_step, taps;  // taps tap0, tap0 + step, ...
  int64_t pad, dil;              // of the equivalent forward problem over grad_output, kernel flipped
};

// grad_input[i] = sum over u with (i + pad - u dil) = stride * y of weight[u] grad_output[y].
// For i = r + stride t the taps are u = u0 + q step with step = stride / gcd, y = t + y0 - q * (dil / gcd).
// Flipping q turns this into a forward problem with dilation dil / gcd.
inline PhaseAxis phase_axis(int64_t r, int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dil) {
  PhaseAxis a{};
  a.first = r;
  a.count = r < in ? ceil_div(in - r, stride) : 0;
  const int64_t gcd = std::gcd(stride, dil);
  a.tap_step = stride / gcd;
  a.dil = dil / gcd;
  for (a.tap0 = 0; a.tap0 < std::min(kernel, a.tap_step); ++a.tap0)
    if ((r + pad - a.tap0 * dil) % stride == 0) break;
  if (a.tap0 >= std::min(kernel, a.tap_step)) {
    a.taps = 0;
    return a;
  }
  a.taps = ceil_div(kernel - a.tap0, a.tap_step);
  const int64_t y0 = (r + pad - a.tap0 * dil) / stride;  // exact, may be negative
  a.pad = (a.taps - 1) * a.dil - y0;
  return a;
}

// The forward problems that backward_input consists of: one per stride phase.
inline std::vector<ForwardProblem> backward_input_phases(const ConvParams& p, const TensorView& grad_output,
                                                         const TensorView& weight,
                                                         const TensorView& grad_input) {
  std::vector<ForwardProblem> phases;
  for (int64_t ry = 0; ry < std::min(p.stride_h, p.height); ++ry)
    for (int64_t rx = 0; rx < std::min(p.stride_w, p.width); ++rx) {
      const PhaseAxis y = phase_axis(ry, p.height, p.kernel_h, p.stride_h, p.pad_h, p.dil_h);
      const PhaseAxis x = phase_axis(rx, p.width, p.kernel_w, p.stride_w, p.pad_w, p.dil_w);
      ForwardProblem f{};
      f.batch = p.batch, f.channels = p.channels;
      f.height = p.out_height, f.width = p.out_width, f.out_height = y.count, f.out_width = x.count;
      f.kernel_h = x.taps ? y.taps : 0, f.kernel_w = y.taps ? x.taps : 0;
      f.stride_h = f.stride_w = 1;
      f.pad_h = y.pad, f.pad_w = x.pad, f.dil_h = y.dil, f.dil_w = x.dil;
      f.channel_div = 1, f.channel_mul = p.multiplier, f.reduce = p.multiplier;
      f.input = grad_output;
      f.weight = weight;
      const int64_t last_y = y.tap0 + (y.taps - 1) * y.tap_step, last_x = x.tap0 + (x.taps - 1) * x.tap_step;
      if (f.kernel_h)
        f.weight.data = static_cast<char*>(weight.data) +
                        (last_y * weight.stride_h + last_x * weight.stride_w) * dtype_size(weight.dtype);
      f.weight.stride_h = -y.tap_step * weight.stride_h;
      f.weight.stride_w = -x.tap_step * weight.stride_w;
      f.output = grad_input;
      f.output.data = static_cast<char*>(grad_input.data) +
                      (ry * grad_input.stride_h + rx * grad_input.stride_w) * dtype_size(grad_input.dtype);
      f.output.stride_h *= p.stride_h;
      f.output.stride_w *= p.stride_w;
      phases.push_back(f);
    }
  for (ForwardProblem& f : phases)
    f.phases = int64_t(phases.size()), f.phases_w = std::min(p.stride_w, p.width);
  return phases;
}

}  // namespace lkconv
