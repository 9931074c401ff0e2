// Direct backward_weight. Sums are kept at three levels (row in registers, image, batch) so that rounding
// grows slowly.
#pragma once

#include "direct_correlate.h"
#include "direct_weight_in_place.h"

namespace lkconv::cpu::LKCONV_ISA {

// Scratch of one task of the weight kernel, per channel group of its span: an input window, the tile's rows
// of grad_output, and the sums of one image.
template <class T>
struct DirectWeightScratch {
  int64_t count = 0;
  Window<T> window[kMaxSpan];
  Lanes<T> input[kMaxSpan], grad_output[kMaxSpan];
  T *grad[kMaxSpan], *image[kMaxSpan];

  DirectWeightScratch(const WeightProblem& p, const Plan& plan) {
    constexpr int L = kLanes<T>;
    const DirectTile first = direct_tile(p, plan, 0, 0);
    const int64_t row = (first.ix1 - first.ix0) * L;
    const int64_t ring = std::max<int64_t>(
        1, std::min(p.height, (plan.tile_h - 1) * p.stride_h + (p.kernel_h - 1) * p.dil_h + 1));
    const int64_t grads = plan.tile_h * plan.tile_w * L, taps = p.kernel_h * p.kernel_w * L;
    T* at = thread_scratch<T>((row * ring + grads + taps) * plan.span);
    for (int64_t g = 0; g < plan.span; ++g, at += row * ring + grads + taps) {
      window[g] = {at, row, ring};
      grad[g] = at + row * ring;
      image[g] = grad[g] + grads;
    }
  }
};

// Adds one tile's products to the sums of its image.
template <class T>
void correlate_tile(const WeightProblem& p, const DirectWeightScratch<T>& s, const DirectTile& t, int64_t g) {
  constexpr int L = kLanes<T>;
  const Window<T>& w = s.window[g];
  const int64_t width = t.x1 - t.x0, grad_row = width * L;
  const RowMatch match{width, p.stride_w, p.dil_w, known_halo(p) && width == p.width};
  for_steps_over_rows(p, t.y0, t.y1, [&](auto product, int64_t y, int64_t u0, int64_t u1) {
    const int64_t first = y * p.stride_h - p.pad_h + u0 * p.dil_h;
    correlate<decltype(product)>(s.image[g] + u0 * p.kernel_w * L, p.kernel_w * L,
                                 s.grad[g] + (y - t.y0) * grad_row, w.base + (first - t.iy0) * w.row,
                                 w.row * p.dil_h, u1 - u0, p.kernel_w, match);
  });
}

// The sums of one image for the groups of a span.
template <class T>
void correlate_image(const WeightProblem& p, const Plan& plan, DirectWeightScratch<T>& s, int64_t n,
                     int64_t c0) {
  constexpr int L = kLanes<T>;
  const bool large = requests_planes(p, p.input.dtype);
  for (int64_t g = 0; g < s.count; ++g) {
    const int64_t c = c0 + g * L;
    s.input[g] = make_lanes<T>(p.input, n, c, p.channels, [&](int64_t c) { return c / p.channel_div; });
    s.grad_output[g] = make_lanes<T>(p.grad_output, n, c, p.channels, [](int64_t c) { return c; });
    ask_ahead(s.input[g], p.input, large);
    ask_ahead(s.grad_output[g], p.grad_output, large);
    zero(s.image[g], p.kernel_h * p.kernel_w);
  }
  const int64_t tiles_x = ceil_div(p.out_width, plan.tile_w),
                tiles = ceil_div(p.out_height, plan.tile_h) * tiles_x;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const DirectTile t = direct_tile(p, plan, tile / tiles_x, tile % tiles_x);
    load_window(s.window, s.input, s.count, t, t.iy0, t.iy1, p.width);
    load_rows(s.grad, (t.x1 - t.x0) * L, L, s.grad_output, s.count, t.y0, t.y1, t.x0, t.x1);
#if LKCONV_ROW_PAIRS
    for (int64_t g = 0; g < s.count; ++g) {
      pair_rows(s.window[g].base, s.window[g].row, t.iy1 - t.iy0, s.window[g].row / kLanes<T>);
      pair_rows(s.grad[g], (t.x1 - t.x0) * L, t.y1 - t.y0, t.x1 - t.x0);
    }
#endif
    for (int64_t g = 0; g < s.count; ++g) correlate_tile(p, s, t, g);
  }
}

// Task = (span of channel groups, split of the batch); writes partial[split][group][tap][lane].
template <class T>
void weight_direct(const WeightProblem& p, const Plan& plan, T* partial, int64_t task0, int64_t task1) {
  constexpr int L = kLanes<T>;
  if constexpr (std::is_same_v<T, float>)
    if (plan.in_place) return weight_in_place(p, plan, partial, task0, task1);
  DirectWeightScratch<T> s(p, plan);
  const int64_t taps = p.kernel_h * p.kernel_w, groups = channel_groups(p.channels, plan);
  for (int64_t task = task0; task < task1; ++task) {
    const int64_t g0 = task / plan.splits * plan.span, split = task % plan.splits;
    s.count = std::min(plan.span, groups - g0);
    T* total = partial + (split * groups + g0) * taps * L;
    zero(total, taps * s.count);
    const int64_t n0 = p.batch * split / plan.splits, n1 = p.batch * (split + 1) / plan.splits;
    for (int64_t n = n0; n < n1; ++n) {
      correlate_image(p, plan, s, n, g0 * L);
      for (int64_t g = 0; g < s.count; ++g) add_vectors(total + g * taps * L, s.image[g], taps);
    }
  }
}

#if !LKCONV_ROW_PAIRS

// Adds the splits in order and writes the gradient of the groups [g0, g1).
template <class T>
void weight_reduce(const WeightProblem& p, const Plan& plan, T* partial, int64_t g0, int64_t g1) {
  constexpr int L = kLanes<T>;
  const int64_t taps = p.kernel_h * p.kernel_w, groups = channel_groups(p.channels, plan);
  for (int64_t g = g0; g < g1; ++g) {
    T* sum = partial + g * taps * plan.lanes;
    for (int64_t s = 1; s < plan.splits; ++s)
      add_vectors(sum, partial + (s * groups + g) * taps * plan.lanes, taps * plan.lanes / L);
    if constexpr (std::is_same_v<T, float>)
      if (plan.in_place && plan.algorithm == Algorithm::direct) {
        store_sums_in_place(p, plan, sum, g);
        continue;
      }
    const Lanes<T> to = make_lanes<T>(p.grad_weight, 0, g * L, p.channels, [](int64_t c) { return c; });
    store_rows(sum, p.kernel_w * L, L, Vec<T>{}, to, 0, p.kernel_h, 0, p.kernel_w);
  }
}

#endif

}  // namespace lkconv::cpu::LKCONV_ISA
