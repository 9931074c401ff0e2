// Direct backward_weight: correlations of grad_output rows with input rows, U kernel rows by V taps at a
// time. Sums are kept at three levels (row in registers, image, batch) so that rounding grows slowly.
#pragma once

namespace lkconv::cpu::LKCONV_ISA {

// How far pixels of grad_output and of the input are apart: in scratch ...
template <class T>
struct ScratchSteps {
  static constexpr int64_t grad() { return kLanes<T>; }
  static constexpr int64_t in() { return kLanes<T>; }
};
// ... and in tensors that are read where they are.
struct TensorSteps {
  int64_t grad_step, in_step;
  LKCONV_INLINE int64_t grad() const { return grad_step; }
  LKCONV_INLINE int64_t in() const { return in_step; }
};

// a[u][v] += sum over x < B of grad[x] * in[u][x + v]. The first kLeft and the last kRight of the B + V - 1
// pixels of a row are zeros, which are left out.
template <class T, int B, int kLeft, int kRight, int U, int V, class Steps>
LKCONV_INLINE void correlate_block(Vec<T> (&a)[U][V], const T* grad, const T* in, int64_t in_row,
                                   const Steps& steps) {
  Vec<T> d[B];
#pragma GCC unroll 8
  for (int i = 0; i < B; ++i, grad += steps.grad()) d[i] = load(grad);
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u, in += in_row) {
    const T* at = in + kLeft * steps.in();
#pragma GCC unroll 16
    for (int j = kLeft; j < B + V - 1 - kRight; ++j, at += steps.in()) {
      Vec<T> p = load(at);
      if (V > 1) keep(p);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v)
        if (j - v >= 0 && j - v < B) a[u][v] += d[j - v] * p;
    }
  }
}

// One value of x, of whose taps those outside [v0, v1) meet zeros.
template <class T, int U, int V, class Steps>
LKCONV_INLINE void correlate_pixel(Vec<T> (&a)[U][V], const T* grad, const T* in, int64_t in_row, int64_t v0,
                                   int64_t v1, const Steps& steps) {
  const Vec<T> d = load(grad);
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u, in += in_row)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v)
      if (v >= v0 && v < v1) a[u][v] += d * load(in + v * steps.in());
}

// acc[u][v] += sum over x < n of grad[x] * in[u][x + v], B values of x at a time. With kHalo the row of grad
// is as wide as the image, and V / 2 pixels at either end of `in` are halo, which is not read.
template <class T, int U, int V, int B, bool kHalo, class Steps>
LKCONV_INLINE void correlate_unit(T* acc, int64_t acc_row, const T* grad, const T* in, int64_t in_row,
                                  int64_t n, const Steps& steps) {
  constexpr int L = kLanes<T>, P = kHalo ? V / 2 : 0;
  const int64_t dg = steps.grad(), di = steps.in();
  Vec<T> a[U][V] = {};
  int64_t x = 0;
  if (kHalo && n == B) {
    correlate_block<T, B, P, P>(a, grad, in, in_row, steps);
    x = B;
  } else if (kHalo && n >= B + P) {
    correlate_block<T, B, P, 0>(a, grad, in, in_row, steps);
    x = B;
  }
  for (; kHalo && x < P && x < n; ++x)
    correlate_pixel(a, grad + x * dg, in + x * di, in_row, P - x, n + P - x, steps);
  for (; x + B + P <= n; x += B) correlate_block<T, B, 0, 0>(a, grad + x * dg, in + x * di, in_row, steps);
  if (kHalo && x > 0 && x + B == n) {
    correlate_block<T, B, 0, P>(a, grad + x * dg, in + x * di, in_row, steps);
    x = n;
  }
  for (; B > 4 && x + 4 + P <= n; x += 4)
    correlate_block<T, 4, 0, 0>(a, grad + x * dg, in + x * di, in_row, steps);
  for (; x < n; ++x) correlate_pixel(a, grad + x * dg, in + x * di, in_row, 0, kHalo ? n + P - x : V, steps);
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(acc + u * acc_row + v * L, load(acc + u * acc_row + v * L) + a[u][v]);
}

// Values of x at a time: as many as registers hold, and such that they divide the rows of most networks.
template <class T, int U, int V, bool kHalo, class Steps>
LKCONV_INLINE void correlate_unit(T* acc, int64_t acc_row, const T* grad, const T* in, int64_t in_row,
                                  int64_t n, const Steps& steps) {
  if constexpr (kRegisters < 32)
    correlate_unit<T, U, V, 4, kHalo>(acc, acc_row, grad, in, in_row, n, steps);
  else if (n % 7 == 0)
    correlate_unit<T, U, V, 7, kHalo>(acc, acc_row, grad, in, in_row, n, steps);
  else
    correlate_unit<T, U, V, 8, kHalo>(acc, acc_row, grad, in, in_row, n, steps);
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
constexpr int rows_together(int taps) { return taps <= 3 ? 3 : taps <= (kRegisters >= 32 ? 7 : 5) ? 2 : 1; }

// How a row of grad_output meets rows of the input.
struct RowMatch {
  int64_t n, stride, dil;
  bool halo;  // known_halo of problem.h
};

template <class T, int U, int V>
LKCONV_INLINE void correlate_some(T* acc, int64_t acc_row, const T* grad, const T* in, int64_t in_row,
                                  const RowMatch& m) {
  constexpr bool kOdd = V == 3 || V == 5 || V == 7;
  if (m.stride != 1 || m.dil != 1)
    correlate_strided<T, U, V>(acc, acc_row, grad, in, in_row, m.n, m.stride, m.dil);
  else if (kOdd && m.halo)
    correlate_unit<T, U, V, kOdd>(acc, acc_row, grad, in, in_row, m.n, ScratchSteps<T>());
  else
    correlate_unit<T, U, V, false>(acc, acc_row, grad, in, in_row, m.n, ScratchSteps<T>());
}

template <class T, int V>
void correlate_rows(T* acc, int64_t acc_row, const T* grad, const T* in, int64_t in_row, int64_t rows,
                    const RowMatch& m) {
  constexpr int U = rows_together(V);
  int64_t u = 0;
  for (; u + U <= rows; u += U)
    correlate_some<T, U, V>(acc + u * acc_row, acc_row, grad, in + u * in_row, in_row, m);
  for (; u < rows; ++u) correlate_some<T, 1, V>(acc + u * acc_row, acc_row, grad, in + u * in_row, in_row, m);
}

// All taps of kernel rows [0, rows) against one row of grad_output.
template <class T>
void correlate(T* acc, int64_t acc_row, const T* grad, const T* in, int64_t in_row, int64_t rows,
               int64_t taps, const RowMatch& m) {
  constexpr int L = kLanes<T>;
  while (taps > 0) {
    const int64_t part = taps_together(taps);
    switch (part) {
#define LKCONV_CASE(V)                                             \
  case V:                                                          \
    correlate_rows<T, V>(acc, acc_row, grad, in, in_row, rows, m); \
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
    in += part * m.dil * L;
  }
}

// The same where both tensors are read in place: odd rows of at most 7 taps, whose halo is not read.
template <class T, int V>
void correlate_rows_in_place(T* acc, const T* grad, const T* in, int64_t in_row, int64_t rows, int64_t n,
                             const TensorSteps& steps) {
  constexpr int U = rows_together(V), L = kLanes<T>;
  int64_t u = 0;
  for (; u + U <= rows; u += U)
    correlate_unit<T, U, V, (V > 1)>(acc + u * V * L, V * L, grad, in + u * in_row, in_row, n, steps);
  for (; u < rows; ++u)
    correlate_unit<T, 1, V, (V > 1)>(acc + u * V * L, V * L, grad, in + u * in_row, in_row, n, steps);
}

template <class T>
void correlate_in_place(T* acc, const T* grad, const T* in, int64_t in_row, int64_t rows, int64_t taps,
                        int64_t n, const TensorSteps& steps) {
  switch (taps) {
    case 1:
      return correlate_rows_in_place<T, 1>(acc, grad, in, in_row, rows, n, steps);
    case 3:
      return correlate_rows_in_place<T, 3>(acc, grad, in, in_row, rows, n, steps);
    case 5:
      return correlate_rows_in_place<T, 5>(acc, grad, in, in_row, rows, n, steps);
    default:
      return correlate_rows_in_place<T, 7>(acc, grad, in, in_row, rows, n, steps);
  }
}

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
    if (plan.in_place) {
      const int64_t sums = (p.kernel_h * p.kernel_w + 1) * L;  // a shifted group reads beyond its last tap
      image[0] = thread_scratch<T>(sums * plan.span);
      for (int64_t g = 1; g < plan.span; ++g) image[g] = image[0] + g * sums;
      return;
    }
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
  for (int64_t y = t.y0; y < t.y1; ++y) {
    const int64_t top = y * p.stride_h - p.pad_h;
    int64_t u0, u1;
    clip_taps(top, top, p.height, p.kernel_h, p.dil_h, u0, u1);
    if (u1 <= u0) continue;
    correlate(s.image[g] + u0 * p.kernel_w * L, p.kernel_w * L, s.grad[g] + (y - t.y0) * grad_row,
              w.base + (top + u0 * p.dil_h - t.iy0) * w.row, w.row * p.dil_h, u1 - u0, p.kernel_w, match);
  }
}

// The sums of one image for the groups of a span.
template <class T>
void correlate_image(const WeightProblem& p, const Plan& plan, DirectWeightScratch<T>& s, int64_t n,
                     int64_t c0) {
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

// The sums of one image, of tensors that are read in place. The last group of a tensor moves left to be
// whole.
template <class T>
void correlate_image_in_place(const WeightProblem& p, const DirectWeightScratch<T>& s, int64_t n,
                              int64_t c0) {
  constexpr int L = kLanes<T>;
  const TensorView &in = p.input, &grad = p.grad_output;
  const TensorSteps steps{grad.stride_w, in.stride_w};
  const bool request = requests_rows(p, in.dtype);
  for (int64_t g = 0; g < s.count; ++g) zero(s.image[g], p.kernel_h * p.kernel_w + 1);
  for (int64_t y = 0; y < p.out_height; ++y) {
    const int64_t top = y * p.stride_h - p.pad_h;
    int64_t u0, u1;
    clip_taps(top, top, p.height, p.kernel_h, p.dil_h, u0, u1);
    const int64_t next = top + (p.kernel_h - 1) * p.dil_h + p.stride_h;
    for (int64_t g = 0; g < s.count && u0 < u1; ++g) {
      const int64_t c = std::min(c0 + g * L, p.channels - L);
      const T* grads = static_cast<const T*>(grad.data) + n * grad.stride_n + y * grad.stride_h + c;
      const T* image = static_cast<const T*>(in.data) + n * in.stride_n + c;
      if (request && next >= 0 && next < p.height)
        request_pixels<0>(image + next * in.stride_h, in.stride_w, p.width);
      if (request && y + 1 < p.out_height)
        request_pixels<0>(grads + grad.stride_h, grad.stride_w, p.out_width);
      correlate_in_place(s.image[g] + u0 * p.kernel_w * L, grads,
                         image + (top + u0 * p.dil_h) * in.stride_h - p.pad_w * in.stride_w,
                         in.stride_h * p.dil_h, u1 - u0, p.kernel_w, p.out_width, steps);
    }
  }
}

// Task = (span of channel groups, split of the batch); writes partial[split][group][tap][lane].
template <class T>
void weight_direct(const WeightProblem& p, const Plan& plan, T* partial, int64_t task0, int64_t task1) {
  constexpr int L = kLanes<T>;
  DirectWeightScratch<T> s(p, plan);
  const int64_t taps = p.kernel_h * p.kernel_w, groups = channel_groups(p.channels, plan);
  for (int64_t task = task0; task < task1; ++task) {
    const int64_t g0 = task / plan.splits * plan.span, split = task % plan.splits;
    s.count = std::min(plan.span, groups - g0);
    T* total = partial + (split * groups + g0) * taps * L;
    zero(total, taps * s.count);
    const int64_t n0 = p.batch * split / plan.splits, n1 = p.batch * (split + 1) / plan.splits;
    for (int64_t n = n0; n < n1; ++n) {
      if constexpr (std::is_same_v<T, float>) {
        if (plan.in_place) correlate_image_in_place(p, s, n, g0 * L);
      }
      if (!plan.in_place) correlate_image(p, plan, s, n, g0 * L);
      for (int64_t g = 0; g < s.count; ++g) {
        const int64_t moved = plan.in_place ? std::max<int64_t>(0, (g0 + g + 1) * L - p.channels) : 0;
        for (int64_t i = 0; i < taps * L; i += L) {
          T* to = total + g * taps * L + i;
          store(to, load(to) + load(s.image[g] + i + moved));
        }
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
