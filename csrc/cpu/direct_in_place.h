// Direct summation over channels_last tensors of the kernels' own type, whose pixels are vectors as they lie
// in memory, or over such copies (direct_gather.h): no window is padded, and pixels of the halo are never
// read.
#pragma once

#include "direct_gather.h"
#include "direct_windows.h"
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
    const auto channel = [=](int64_t lane) { return c + element_of_part(kRowsTogether > 1, q, lane, P); };
    float* to = kernel + q * p.kernel_h * p.kernel_w * L;
    load_kernel(to, make_lanes<float>(p.weight, 0, 0, L, channel), p.kernel_h, p.kernel_w);
#if LKCONV_ROW_PAIRS
    pair_rows(to, p.kernel_w * L, p.kernel_h, p.kernel_w);
#endif
    for (int lane = 0; lane < L; ++lane)
      bias[q][lane] = p.bias.data ? as_float(*element<T>(p.bias, 0, channel(lane), 0)) : 0.0f;
  }
}

// Copies of a group's tensors (Plan::gather), and the problem as kernels then see it.
template <class T>
class InPlaceCopies {
  static constexpr int64_t L = kElements<T>;

 public:
  InPlaceCopies(const ForwardProblem& p, const Plan& plan) : p_(p), plan_(plan), seen_(p) {
    if (plan.gather == Gather::none) return;
    in_ = (p.height * p.width + kSlackPixels) * L;
    place(seen_.input, p.width);
    if (plan.gather != Gather::planes) return;
    out_ = (p.out_height * p.out_width + kSlackPixels) * L;
    place(seen_.output, p.out_width);
  }
  const ForwardProblem& problem() const { return seen_; }
  int64_t elements() const { return plan_.span * (in_ + out_); }
  void use(T* scratch) { scratch_ = scratch; }

  // What a tile of a span's groups, which begin at channels c[g], reads ...
  void fetch(InPlaceSpan<T>& s, const int64_t* c, int64_t n, int64_t tile) const {
    if (plan_.gather == Gather::none) return;
    const DirectTile t = direct_tile(p_, plan_, tile, 0);
    for (int64_t g = 0; g < s.count; ++g) {
      T* copy = scratch_ + g * (in_ + out_);
      T* to = copy + t.iy0 * seen_.input.stride_h;
      if (plan_.gather == Gather::pixels) gather_pixels(to, s.input[g], p_.input, p_.width, t.iy0, t.iy1);
#if LKCONV_AVX512
      else
        gather_planes(
            to, p_.input, n, [&](int64_t i) { return p_.input_channel(c[g] + i, 0); }, p_.width, t.iy0,
            t.iy1);
#endif
      s.input[g] = copy;
      if (plan_.gather == Gather::planes) s.output[g] = copy + in_;
    }
  }
  // ... and rows [y0, y1) of their sums, back to the output.
  void store(const InPlaceSpan<T>& s, const int64_t* c, int64_t n, int64_t y0, int64_t y1) const {
#if LKCONV_AVX512
    for (int64_t g = 0; g < s.count && plan_.gather == Gather::planes; ++g)
      scatter_planes<T>(s.output[g] + y0 * seen_.output.stride_h, p_.output, n, c[g], p_.out_width, y0, y1);
#endif
  }

 private:
  static void place(TensorView& t, int64_t width) { t.stride_c = 1, t.stride_w = L, t.stride_h = L * width; }

  const ForwardProblem& p_;
  const Plan& plan_;
  ForwardProblem seen_;
  int64_t in_ = 0, out_ = 0;  // elements of a group
  T* scratch_ = nullptr;
};

// Task = (span of channel groups, image, tile of rows), as in direct.h.
template <class T>
void forward_in_place(const ForwardProblem& problem, const Plan& plan, int64_t task0, int64_t task1) {
  constexpr int64_t L = kElements<T>;
  InPlaceCopies<T> copies(problem, plan);
  const ForwardProblem& p = copies.problem();
  const int64_t tiles = ceil_div(p.out_height, plan.tile_h), groups = channel_groups(p.channels, plan);
  const int64_t taps = p.kernel_h * p.kernel_w * L;
  float* kernels = thread_scratch<float>(taps * plan.span + copies.elements() / kFloatParts<T>);
  copies.use(reinterpret_cast<T*>(kernels + taps * plan.span));
  InPlaceSpan<T> s;
  s.ahead = plan.gather == Gather::none ? requests_ahead(p, p.input.dtype) : Ahead::nothing;
  int64_t loaded = -1, channels[kMaxSpanInPlace];
  for (int64_t task = task0; task < task1; ++task) {
    const int64_t g0 = task / (p.batch * tiles) * plan.span, n = task / tiles % p.batch;
    s.count = std::min(plan.span, groups - g0);
    for (int64_t g = 0; g < s.count; ++g) {
      const int64_t c = channels[g] = std::min((g0 + g) * L, p.channels - L);
      s.input[g] = element<const T>(problem.input, n, problem.input_channel(c, 0), 0);
      s.output[g] = element<T>(problem.output, n, c, 0);
      s.kernel[g] = kernels + g * taps;
      if (g0 != loaded) load_parts<T>(p, c, kernels + g * taps, s.bias + g * kFloatParts<T>);
    }
    loaded = g0;
    const int64_t y0 = task % tiles * plan.tile_h, y1 = std::min(y0 + plan.tile_h, p.out_height);
    copies.fetch(s, channels, n, task % tiles);
    for (int64_t y = y0; y < y1; ++y)
      narrow_rows(p) ? narrow_row(p, s, plan, y) : wide_row(p, s, plan.block, y);
    copies.store(s, channels, n, y0, y1);
  }
}

}  // namespace lkconv::cpu::LKCONV_ISA
