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
template <class T, int V>
LKCONV_INLINE void correlate_strided(T* acc, const T* grad, const T* in, int64_t n, int64_t stride,
                                     int64_t dil) {
  constexpr int L = kLanes<T>;
  Vec<T> a[V] = {};
  for (int64_t x = 0; x < n; ++x) {
    Vec<T> d = load(grad + x * L);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) a[v] += d * load(in + (x * stride + v * dil) * L);
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) store(acc + v * L, load(acc + v * L) + a[v]);
}

// Kernel rows handled together: enough independent sums to hide the latency of a multiply-add.
constexpr int rows_together(int taps) { return taps <= 3 ? 3 : taps <= 5 ? 2 : 1; }

template <class T, int V>
void correlate_rows(T* acc, int64_t acc_row, const T* grad, const T* in, int64_t in_row, int64_t rows,
                    int64_t n) {
  constexpr int U = rows_together(V);
  int64_t u = 0;
  for (; u + U <= rows; u += U)
    correlate_unit<T, U, V>(acc + u * acc_row, acc_row, grad, in + u * in_row, in_row, n);
  for (; u < rows; ++u) correlate_unit<T, 1, V>(acc + u * acc_row, acc_row, grad, in + u * in_row, in_row, n);
}

// All taps of kernel rows [0, rows) against one row of grad_output.
template <class T>
void correlate(T* acc, int64_t acc_row, const T* grad, const T* in, int64_t in_row, int64_t rows,
               int64_t taps, int64_t n, int64_t stride, int64_t dil) {
  constexpr int L = kLanes<T>;
  const bool unit = stride == 1 && dil == 1;
  while (taps > 0) {
    const int64_t part = taps <= kMaxTaps ? taps : taps <= 2 * kMaxTaps ? (taps + 1) / 2 : kMaxTaps;
    switch (part) {
#define LKCONV_CASE(V)                                                                     \
  case V:                                                                                  \
    if (unit)                                                                              \
      correlate_rows<T, V>(acc, acc_row, grad, in, in_row, rows, n);                       \
    else                                                                                   \
      for (int64_t u = 0; u < rows; ++u)                                                   \
        correlate_strided<T, V>(acc + u * acc_row, grad, in + u * in_row, n, stride, dil); \
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

// Task = (channel group, split of the batch); writes partial[split][group][tap][lane].
template <class T>
void weight_direct(const WeightProblem& p, const Plan& plan, T* partial, int64_t task0, int64_t task1) {
  constexpr int L = kLanes<T>;
  const int64_t tiles_y = ceil_div(p.out_height, plan.tile_h), tiles_x = ceil_div(p.out_width, plan.tile_w);
  const DirectTile first = direct_tile(p, plan, 0, 0);
  const int64_t row = (first.ix1 - first.ix0) * L;
  const int64_t max_rows =
      std::min(p.height, (plan.tile_h - 1) * p.stride_h + (p.kernel_h - 1) * p.dil_h + 1);
  const int64_t taps = p.kernel_h * p.kernel_w;
  const Window<T> window{thread_scratch<T>(row * max_rows + plan.tile_h * plan.tile_w * L + taps * L), row,
                         std::max<int64_t>(1, max_rows)};
  T* grad = window.base + row * max_rows;
  T* image = grad + plan.tile_h * plan.tile_w * L;
  const int64_t groups = channel_groups(p.channels, plan);
  for (int64_t task = task0; task < task1; ++task) {
    const int64_t g = task / plan.splits, s = task % plan.splits, c0 = g * L;
    T* total = partial + (s * groups + g) * taps * L;
    zero(total, taps);
    for (int64_t n = p.batch * s / plan.splits; n < p.batch * (s + 1) / plan.splits; ++n) {
      const Lanes<T> in =
          make_lanes<T>(p.input, n, c0, p.channels, [&](int64_t c) { return c / p.channel_div; });
      const Lanes<T> out = make_lanes<T>(p.grad_output, n, c0, p.channels, [](int64_t c) { return c; });
      zero(image, taps);
      for (int64_t tile = 0; tile < tiles_y * tiles_x; ++tile) {
        const DirectTile t = direct_tile(p, plan, tile / tiles_x, tile % tiles_x);
        const int64_t grad_row = (t.x1 - t.x0) * L;
        load_window(&window, &in, 1, t, t.iy0, t.iy1, p.width);
        load_rows(grad, grad_row, L, out, t.y0, t.y1, t.x0, t.x1);
        for (int64_t y = t.y0; y < t.y1; ++y) {
          const int64_t top = y * p.stride_h - p.pad_h;
          int64_t u0, u1;
          clip_taps(top, top, p.height, p.kernel_h, p.dil_h, u0, u1);
          if (u1 <= u0) continue;
          correlate(image + u0 * p.kernel_w * L, p.kernel_w * L, grad + (y - t.y0) * grad_row,
                    window.base + (top + u0 * p.dil_h - t.iy0) * row, row * p.dil_h, u1 - u0, p.kernel_w,
                    t.x1 - t.x0, p.stride_w, p.dil_w);
        }
      }
      for (int64_t i = 0; i < taps; ++i) store(total + i * L, load(total + i * L) + load(image + i * L));
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
