// Direct summation over channels_last tensors of the kernels' own type, whose pixels are vectors as they lie
// in memory: no window of the input is copied, and pixels of the halo are never read.
#pragma once

#include "direct_in_place_rows.h"
// Kinds of rows, after what they share.
#include "direct_in_place_narrow.h"
#include "direct_in_place_wide.h"

namespace lkconv::cpu::LKCONV_ISA {

// The kernel and the bias of the channels [c, c + kElements), taken apart.
template <class T>
void load_parts(const ForwardProblem& p, int64_t c, float* kernel, Vec<float>* bias) {
  constexpr int L = kLanes<float>, P = kFloatParts<T>;
  for (int q = 0; q < P; ++q) {
    const auto channel = [=](int64_t lane) { return c + lane * P + q; };
    load_kernel(kernel + q * p.kernel_h * p.kernel_w * L, make_lanes<float>(p.weight, 0, 0, L, channel),
                p.kernel_h, p.kernel_w);
    for (int lane = 0; lane < L; ++lane)
      bias[q][lane] = p.bias.data ? as_float(*element<T>(p.bias, 0, channel(lane), 0)) : 0.0f;
  }
}

// Task = (span of channel groups, image, tile of rows), as in direct.h.
template <class T>
void forward_in_place(const ForwardProblem& p, const Plan& plan, int64_t task0, int64_t task1) {
  constexpr int64_t L = kElements<T>;
  const int64_t tiles = ceil_div(p.out_height, plan.tile_h), groups = channel_groups(p.channels, plan);
  const int64_t taps = p.kernel_h * p.kernel_w * L;
  float* kernels = thread_scratch<float>(taps * plan.span);
  InPlaceSpan<T> s;
  s.request = requests_rows(p, p.input.dtype);
  int64_t loaded = -1;
  for (int64_t task = task0; task < task1; ++task) {
    const int64_t g0 = task / (p.batch * tiles) * plan.span, n = task / tiles % p.batch;
    s.count = std::min(plan.span, groups - g0);
    for (int64_t g = 0; g < s.count; ++g) {
      const int64_t c = std::min((g0 + g) * L, p.channels - L);
      s.input[g] = element<const T>(p.input, n, c, 0);
      s.output[g] = element<T>(p.output, n, c, 0);
      s.kernel[g] = kernels + g * taps;
      if (g0 != loaded) load_parts<T>(p, c, kernels + g * taps, s.bias[g]);
    }
    loaded = g0;
    const int64_t y0 = task % tiles * plan.tile_h, y1 = std::min(y0 + plan.tile_h, p.out_height);
    for (int64_t y = y0; y < y1; ++y)
      narrow_rows(p) ? narrow_row(p, s, plan.block, y) : wide_row(p, s, plan.block, y);
  }
}

}  // namespace lkconv::cpu::LKCONV_ISA
