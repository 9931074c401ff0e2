// Direct backward_weight: correlations of grad_output rows with input rows, U kernel rows by V taps at a
// time. Sums are kept at three levels (row in registers, image, batch) so that rounding grows slowly.
#pragma once

namespace lkconv::cpu::LKCONV_ISA {

// acc[u][v] += sum over x < n of grad[x] * in[u][x + v]
template <class T, int U, int V>
LKCONV_INLINE void correlate_unit(T* acc, int64_t acc_row, const T* grad, const T* in, int64_t in_row,
                                  int64_t n) {
  constexpr int L = kLanes<T>, B = 4;
  Vec<T> a[U][V] = {};
  int64_t x = 0;
  for (; x + B <= n; x += B) {
    Vec<T> d[B];
#pragma GCC unroll 4
    for (int i = 0; i < B; ++i) d[i] = load(grad + (x + i) * L);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
#pragma GCC unroll 16
      for (int j = 0; j < B + V - 1; ++j) {
        Vec<T> p = load(in + u * in_row + (x + j) * L);
        if (V > 1) keep(p);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v)
          if (j - v >= 0 && j - v < B) a[u][v] += d[j - v] * p;
      }
    }
  }
  for (; x < n; ++x) {
    Vec<T> d = load(grad + x * L);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) a[u][v] += d * load(in + u * in_row + (x + v) * L);
  }
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(acc + u * acc_row + v * L, load(acc + u * acc_row + v * L) + a[u][v]);
}

// The same for any stride and dilation.
template <class T, int U, int V>
LKCONV_INLINE void correlate_strided(T* acc, int64_t acc_row, const T* grad, const T* in, int64_t in_row,
                                     int64_t n, int64_t stride, int64_t dil) {
  constexpr int L = kLanes<T>;
  Vec<T> a[U][V] = {};
  for (int64_t x = 0; x < n; ++x, in += stride * L) {
    const Vec<T> d = load(grad + x * L);
    const T* row = in;
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u, row += in_row)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) a[u][v] += d * load(row + v * dil * L);
  }
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(acc + u * acc_row + v * L, load(acc + u * acc_row + v * L) + a[u][v]);
}

// Kernel rows handled together: enough independent sums to hide the latency of a multiply-add.
constexpr int rows_together(int taps) { return taps <= 3 ? 3 : taps <= 5 ? 2 : 1; }

template <class T, int V>
void correlate_rows(T* acc, int64_t acc_row, const T* grad, const T* in, int64_t in_row, int64_t rows,
                    int64_t n, int64_t stride, int64_t dil) {
  constexpr int U = rows_together(V);
  const bool unit = stride == 1 && dil == 1;
  for (int64_t u = 0; u < rows;) {
    T* to = acc + u * acc_row;
    const T* from = in + u * in_row;
    const bool together = u + U <= rows;
    if (unit && together)
      correlate_unit<T, U, V>(to, acc_row, grad, from, in_row, n);
    else if (unit)
      correlate_unit<T, 1, V>(to, acc_row, grad, from, in_row, n);
    else if (together)
      correlate_strided<T, U, V>(to, acc_row, grad, from, in_row, n, stride, dil);
    else
      correlate_strided<T, 1, V>(to, acc_row, grad, from, in_row, n, stride, dil);
    u += together ? U : 1;
  }
}

// All taps of kernel rows [0, rows) against one row of grad_output.
template <class T>
void correlate(T* acc, int64_t acc_row, const T* grad, const T* in, int64_t in_row, int64_t rows,
               int64_t taps, int64_t n, int64_t stride, int64_t dil) {
  constexpr int L = kLanes<T>;
  while (taps > 0) {
    const int64_t part = taps <= kMaxTaps ? taps : taps <= 2 * kMaxTaps ? (taps + 1) / 2 : kMaxTaps;
    switch (part) {
#define LKCONV_CASE(V)                                                          \
  case V:                                                                       \
    correlate_rows<T, V>(acc, acc_row, grad, in, in_row, rows, n, stride, dil); \
    break;
      LKCONV_CASE(1)
      LKCONV_CASE(2)
      LKCONV_CASE(3)
      LKCONV_CASE(4)
      LKCONV_CASE(5)
      LKCONV_CASE(6)
      LKCONV_CASE(7)
#if LKCONV_VECTOR_REGISTERS >= 32
      LKCONV_CASE(8)
#endif
#undef LKCONV_CASE
    }
    taps -= part;
    acc += part * L;
    in += part * dil * L;
  }
}

// Scratch of one task of the weight kernel, per channel group of its span: an input window, the tile's rows
// of grad_output, and the sums of one image.
template <class T>
struct WeightScratch {
  int64_t count = 0;
  Window<T> window[kMaxSpan];
  Lanes<T> input[kMaxSpan], grad_output[kMaxSpan];
  T *grad[kMaxSpan], *image[kMaxSpan];

  WeightScratch(const WeightProblem& p, const Plan& plan) {
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
void correlate_tile(const WeightProblem& p, const WeightScratch<T>& s, const DirectTile& t, int64_t g) {
  constexpr int L = kLanes<T>;
  const Window<T>& w = s.window[g];
  const int64_t grad_row = (t.x1 - t.x0) * L;
  for (int64_t y = t.y0; y < t.y1; ++y) {
    const int64_t top = y * p.stride_h - p.pad_h;
    int64_t u0, u1;
    clip_taps(top, top, p.height, p.kernel_h, p.dil_h, u0, u1);
    if (u1 <= u0) continue;
    correlate(s.image[g] + u0 * p.kernel_w * L, p.kernel_w * L, s.grad[g] + (y - t.y0) * grad_row,
              w.base + (top + u0 * p.dil_h - t.iy0) * w.row, w.row * p.dil_h, u1 - u0, p.kernel_w,
              t.x1 - t.x0, p.stride_w, p.dil_w);
  }
}

// The sums of one image for the groups of a span.
template <class T>
void correlate_image(const WeightProblem& p, const Plan& plan, WeightScratch<T>& s, int64_t n, int64_t c0) {
  constexpr int L = kLanes<T>;
  for (int64_t g = 0; g < s.count; ++g) {
    const int64_t c = c0 + g * L;
    s.input[g] = make_lanes<T>(p.input, n, c, p.channels, [&](int64_t c) { return c / p.channel_div; });
    s.grad_output[g] = make_lanes<T>(p.grad_output, n, c, p.channels, [](int64_t c) { return c; });
    zero(s.image[g], p.kernel_h * p.kernel_w);
  }
  const int64_t tiles_x = ceil_div(p.out_width, plan.tile_w),
                tiles = ceil_div(p.out_height, plan.tile_h) * tiles_x;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const DirectTile t = direct_tile(p, plan, tile / tiles_x, tile % tiles_x);
    load_window(s.window, s.input, s.count, t, t.iy0, t.iy1, p.width);
    load_rows(s.grad, (t.x1 - t.x0) * L, L, s.grad_output, s.count, t.y0, t.y1, t.x0, t.x1);
    for (int64_t g = 0; g < s.count; ++g) correlate_tile(p, s, t, g);
  }
}

// Task = (span of channel groups, split of the batch); writes partial[split][group][tap][lane].
template <class T>
void weight_direct(const WeightProblem& p, const Plan& plan, T* partial, int64_t task0, int64_t task1) {
  constexpr int L = kLanes<T>;
  WeightScratch<T> s(p, plan);
  const int64_t taps = p.kernel_h * p.kernel_w, groups = channel_groups(p.channels, plan);
  for (int64_t task = task0; task < task1; ++task) {
    const int64_t g0 = task / plan.splits * plan.span, split = task % plan.splits;
    s.count = std::min(plan.span, groups - g0);
    T* total = partial + (split * groups + g0) * taps * L;
    zero(total, taps * s.count);
    const int64_t n0 = p.batch * split / plan.splits, n1 = p.batch * (split + 1) / plan.splits;
    for (int64_t n = n0; n < n1; ++n) {
      correlate_image(p, plan, s, n, g0 * L);
      for (int64_t g = 0; g < s.count; ++g)
        for (int64_t i = 0; i < taps * L; i += L) {
          T* to = total + g * taps * L + i;
          store(to, load(to) + load(s.image[g] + i));
        }
    }
  }
}

// Adds the splits in order and writes the gradient of the groups [g0, g1).
template <class T>
void weight_reduce(const WeightProblem& p, const Plan& plan, T* partial, int64_t g0, int64_t g1) {
  constexpr int L = kLanes<T>;
  const int64_t taps = p.kernel_h * p.kernel_w, groups = channel_groups(p.channels, plan);
  for (int64_t g = g0; g < g1; ++g) {
    T* sum = partial + g * taps * L;
    for (int64_t s = 1; s < plan.splits; ++s) {
      const T* part = partial + (s * groups + g) * taps * L;
      for (int64_t i = 0; i < taps; ++i) store(sum + i * L, load(sum + i * L) + load(part + i * L));
    }
    const Lanes<T> to = make_lanes<T>(p.grad_weight, 0, g * L, p.channels, [](int64_t c) { return c; });
    store_rows(sum, p.kernel_w * L, L, Vec<T>{}, to, 0, p.kernel_h, 0, p.kernel_w);
  }
}

}  // namespace lkconv::cpu::LKCONV_ISA
