// Group aggregation, backward. With A = scale * U + shift and dA = dY hardswish'(A), the gradient through
// BatchNorm is dU = scale * dA + slope * U + offset; then dT = P^T dU, dP = sum dU T^T, dZ = D^T dT and
// dD = correlation of dT with z, T = D(z) being computed again.
#pragma once

namespace lkconv::cpu::LKCONV_ISA::group_mix {

// One token's dA of segment s, and U.
template <class T, class S>
struct ActivationGrad {
  Vec<T> u, grad;
};

template <class T, class S>
LKCONV_INLINE ActivationGrad<T, S> activation_grad(const AggregateBackwardProblem<T>& p, int64_t s, int64_t c,
                                                   const S* u_at, const S* g_at) {
  const int64_t at = s * kSizes<T>.padded(p.segment) + c, left = p.segment - c;
  const Vec<T> u = load_channels<T>(u_at + c, left);
  const Vec<T> a = u * load(p.scale + at) + load(p.shift + at);
  return {u, load_channels<T>(g_at + c, left) * hard_swish_slope<T>(a)};
}

// U of segment s: segment 0 is the input itself.
template <class T, class S>
Tokens<const S> premix_tokens(const AggregateBackwardProblem<T>& p, int64_t image, int64_t part, int64_t s) {
  if (s == 0) return segment_tokens(p, static_cast<const S*>(p.qkv), image, part, 0);
  return part_tokens(p, static_cast<const S*>(p.premix), image, part, (kMixed - 1) * p.segment,
                     (s - 1) * p.segment);
}

// dY of segment s.
template <class T, class S>
Tokens<const S> grad_tokens(const AggregateBackwardProblem<T>& p, int64_t image, int64_t part, int64_t s) {
  return part_tokens(p, static_cast<const S*>(p.grad_mixed[part]), image, 0, kMixed * p.segment,
                     s * p.segment);
}

// dU of `count` tokens from n on, as rows of padded channels.
template <class T, class S>
void fill_grad(const AggregateBackwardProblem<T>& problem, int64_t s, const Strip& strip, int64_t n,
               int64_t count, T* du) {
  constexpr int L = kLanes<T>;
  const AggregateBackwardProblem<T> p = problem;  // no store can change it: its members stay in registers
  const int64_t padded = kSizes<T>.padded(p.segment);
  const auto from = premix_tokens<T, S>(p, strip.image, strip.part, s);
  const Tokens<const S> grad = grad_tokens<T, S>(p, strip.image, strip.part, s);
  for (int64_t i = n; i < n + count; ++i, du += padded) {
    request_token(from, i, p.tokens(), p.segment);
    request_token(grad, i, p.tokens(), p.segment);
    for (int64_t c = 0; c < p.segment; c += L) {
      const auto a = activation_grad<T, S>(p, s, c, from.at(i), grad.at(i));
      const int64_t at = s * padded + c;
      store(du + c, load(p.scale + at) * a.grad + load(p.slope + at) * a.u + load(p.offset + at));
    }
  }
}

// The same for the non-attention branch, through hardswish and LayerNorm. Where `sums` (2, padded) is given,
// the gradients of LayerNorm's weight and bias are added to it.
template <class T, class S>
void fill_local_grad(const AggregateBackwardProblem<T>& p, const Strip& strip, int64_t n, int64_t count,
                     T* du, T* sums) {
  constexpr int L = kLanes<T>;
  const int64_t padded = kSizes<T>.padded(p.segment), d = p.segment;
  const auto from = local_tokens(p, static_cast<const S*>(p.prelocal), strip.image, d);
  const auto grad = local_tokens(p, static_cast<const S*>(p.grad_local), strip.image, p.local_stride);
  T u[512];  // padded segments are far smaller: checked by the launcher
  std::memset(u, 0, size_t(padded) * sizeof(T));
  for (int64_t i = n; i < n + count; ++i, du += padded) {
    load_tokens(u, padded, from, i, 1, d);
    const T rstd = standardise(u, d, p.layer_norm_eps);
    Vec<T> mean{}, product{};
    for (int64_t c = 0; c < d; c += L) {
      const Vec<T> x = load(u + c), weight = load(p.layer_norm + c);
      const Vec<T> a = x * weight + load(p.layer_norm + padded + c);
      const Vec<T> da = load_channels<T>(grad.at(i) + c, d - c) * hard_swish_slope<T>(a);
      if (sums) {
        store(sums + c, load(sums + c) + da * x);
        store(sums + padded + c, load(sums + padded + c) + da);
      }
      const Vec<T> dx = da * weight;
      mean += dx;
      product += dx * x;
      store(du + c, dx);
    }
    const T m = sum_lanes<T>(mean) / T(d), q = sum_lanes<T>(product) / T(d);
    for (int64_t c = 0; c < d; c += L)
      store(du + c, lanes_below<T>(d - c, (load(du + c) - m - load(u + c) * q) * rstd));
  }
}

// Scratch of one strip's backward pass.
template <class T>
struct BackwardScratch {
  int64_t rows, padded, groups, parts, depth;
  Window<T> z, dt;
  T *tile, *du;
  int64_t* place;  // where the tile's pixels are in dt's first group
};

template <class T>
BackwardScratch<T> backward_scratch(const AggregateBackwardProblem<T>& p, int64_t kind, const Strip& strip) {
  BackwardScratch<T> s;
  s.padded = kSizes<T>.padded(p.segment);
  s.groups = s.padded / kLanes<T>;
  s.parts = kind_parts(kind);
  s.depth = s.parts * s.padded;
  s.rows = std::min(rows_at_once<T>(p.width, s.depth), strip.y1 - strip.y0);
  const int64_t r = kKindKernel[kind] / 2, pixels = s.rows * p.width + kRowSlack;
  s.z = s.dt = {nullptr, strip.y0 - r, strip.y1 - strip.y0 + 2 * r, p.width, p.height, r};
  const int64_t window = s.parts * s.groups * s.z.group_size();
  s.tile = thread_scratch<T>(pixels * (s.depth + s.padded) + 2 * window +
                             pixels * int64_t(sizeof(int64_t) / sizeof(T)));
  s.du = s.tile + pixels * s.depth;
  s.z.data = s.du + pixels * s.padded;
  s.dt.data = s.z.data + window;
  s.place = reinterpret_cast<int64_t*>(s.dt.data + window);
  // Of the rows that products read past the last, nothing is used.
  std::memset(s.du + s.rows * p.width * s.padded, 0, size_t(kRowSlack * s.padded) * sizeof(T));
  return s;
}

// dT of rows [y0, y1) into its window; inside the strip also the gradient of the pointwise weight.
template <class T, class S>
void backward_rows(const AggregateBackwardProblem<T>& p, int64_t kind, const Strip& strip,
                   const BackwardScratch<T>& s, int64_t y0, int64_t y1, T* grads) {
  constexpr int L = kLanes<T>;
  const bool inside = y0 == strip.y0;
  const int64_t kernel = kKindKernel[kind];
  const MixWeights<T>& weights = p.weights[kind];
  for (int64_t y = y0; y < y1; y += s.rows) {
    const int64_t end = std::min(y + s.rows, y1), count = (end - y) * p.width;
    if (kind == kLocalKind)
      fill_local_grad<T, S>(p, strip, y * p.width, count, s.du,
                            inside ? grads + s.padded * s.depth + s.depth * kernel * kernel : nullptr);
    else
      fill_grad<T, S>(p, kind, strip, y * p.width, count, s.du);
    int64_t* to_place = s.place;
    for (int64_t row = y; row < end; ++row) {
      const int64_t first = s.dt.at(0, row, 0) - s.dt.data;
      for (int64_t x = 0; x < p.width; ++x) *to_place++ = first + x * L;
    }
    const int64_t step = s.dt.group_size();
    T* to = s.dt.data;
    const int64_t* place = s.place;
    gemm<T, Rows::pixels>(Left<T>{s.du, s.padded, 1}, weights.out_in, s.depth, {p.segment}, count,
                          s.parts * s.groups, static_cast<const T*>(nullptr),
                          [=](int64_t i, int64_t j, Vec<T> v)
                              __attribute__((always_inline)) { store(to + place[i] + j * step, v); });
    if (!inside) continue;
    for (int64_t g = 0; g < s.parts * s.groups; ++g)
      depthwise_rows(s.z, g, kernel, weights.depthwise + g * kernel * kernel * L, Vec<T>{}, y, end,
                     s.tile + g * L, s.depth);
    gemm_accumulate(grads, s.depth, s.du, s.padded, s.tile, s.depth, p.segment, s.parts * s.groups, count);
  }
}

template <class T, class S>
void backward_strip(const AggregateBackwardProblem<T>& p, int64_t kind, const Strip& strip, T* grads) {
  constexpr int L = kLanes<T>;
  const BackwardScratch<T> s = backward_scratch(p, kind, strip);
  const int64_t kernel = kKindKernel[kind], r = kernel / 2, taps = kernel * kernel;
  for (int64_t i = 0; i < s.parts; ++i)
    load_window(
        s.z, i * s.groups, s.groups,
        segment_tokens(p, static_cast<const S*>(p.qkv), strip.image, s.parts == 1 ? strip.part : i, kind),
        p.segment);
  const int64_t top = std::max<int64_t>(0, strip.y0 - r), bottom = std::min(p.height, strip.y1 + r);
  clear_margins(s.dt, 0, s.parts * s.groups, top, bottom);
  backward_rows<T, S>(p, kind, strip, s, top, strip.y0, grads);
  backward_rows<T, S>(p, kind, strip, s, strip.y0, strip.y1, grads);
  backward_rows<T, S>(p, kind, strip, s, strip.y1, bottom, grads);
  T* grad_depthwise = grads + s.padded * s.depth;
  for (int64_t g = 0; g < s.parts * s.groups; ++g)
    correlate_window(grad_depthwise + g * taps * L, s.dt, s.z, g, kernel, strip.y0, strip.y1);
  for (int64_t y = strip.y0; y < strip.y1; y += s.rows) {
    const int64_t end = std::min(y + s.rows, strip.y1);
    for (int64_t g = 0; g < s.parts * s.groups; ++g)
      depthwise_rows(s.dt, g, kernel, p.weights[kind].flipped + g * taps * L, Vec<T>{}, y, end,
                     s.tile + g * L, s.depth);
    for (int64_t i = 0; i < s.parts; ++i)
      store_tokens(
          segment_tokens(p, static_cast<S*>(p.grad_qkv), strip.image, s.parts == 1 ? strip.part : i, kind),
          y * p.width, (end - y) * p.width, p.segment, s.tile + i * s.padded, s.depth);
  }
}

template <class T>
void aggregate_backward(const AggregateBackwardProblem<T>& p, int64_t kind, int64_t begin, int64_t end,
                        T* grads) {
  const int64_t padded = kSizes<T>.padded(p.segment);
  with_storage<T>(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    for (int64_t i = begin; i < end; ++i) {
      const Strip strip = p.plan[kind].at(i, p.height);
      if (kind) {
        backward_strip<T, S>(p, kind, strip, grads);
        continue;
      }
      const int64_t n = strip.y0 * p.width, count = strip.y1 * p.width - n;
      const int64_t step = std::max<int64_t>(1, 16384 / int64_t(sizeof(T)) / padded);
      T* du = thread_scratch<T>(step * padded);
      const auto to = segment_tokens(p, static_cast<S*>(p.grad_qkv), strip.image, strip.part, 0);
      for (int64_t a = n; a < n + count; a += step) {
        const int64_t m = std::min(step, n + count - a);
        fill_grad<T, S>(p, 0, strip, a, m, du);
        store_tokens(to, a, m, p.segment, du, padded);
      }
    }
  });
}

// Adds the sums of tokens [n, n + count) of one image to `sums` (2, 4, padded segment). Few tokens are summed
// in registers: the more, the less evenly memory is asked for what comes next.
template <class T, class S>
void reduce_tokens(const AggregateBackwardProblem<T>& problem, int64_t image, int64_t part, int64_t n,
                   int64_t count, T* sums) {
  constexpr int L = kLanes<T>;
  const AggregateBackwardProblem<T> p = problem;  // no store can change it: its members stay in registers
  constexpr int64_t kTokens = 4;
  const int64_t d = p.segment, padded = kSizes<T>.padded(d), product_at = kMixed * padded;
  const Tokens<const S> grads = grad_tokens<T, S>(p, image, part, 0);
  const Tokens<const S> u[2] = {premix_tokens<T, S>(p, image, part, 0),
                                premix_tokens<T, S>(p, image, part, 1)};
  for (int64_t i = n; i < n + count; i += kTokens) {
    const int64_t end = std::min(i + kTokens, n + count);
    for (int64_t j = i; j < end; ++j) {
      request_token(u[0], j, p.tokens(), d);
      request_token(u[1], j, p.tokens(), (kMixed - 1) * d);
      request_token(grads, j, p.tokens(), kMixed * d);
    }
    for (int64_t s = 0; s < kMixed; ++s) {
      const Tokens<const S>& from = u[s > 0];
      const int64_t first = s ? (s - 1) * d : 0;
      for (int64_t c = 0; c < d; c += L) {
        T* to = sums + s * padded + c;
        const Vec<T> mean = load(p.mean + s * padded + c);
        Vec<T> sum = load(to), product = load(to + product_at);
        for (int64_t j = i; j < end; ++j) {
          const auto a = activation_grad<T, S>(p, s, c, from.at(j) + first, grads.at(j) + s * d);
          sum += a.grad;
          product += a.grad * (a.u - mean);
        }
        store(to, sum);
        store(to + product_at, product);
      }
    }
  }
}

// Sums of dA and dA * (U - mean) per channel, for BatchNorm's gradients. Tokens are counted over (3, B, N).
template <class T>
void backward_reduce(const AggregateBackwardProblem<T>& p, int64_t begin, int64_t end, double* sums) {
  constexpr int64_t kBlock = 64;  // more are summed in double precision
  const int64_t size = 2 * kMixed * kSizes<T>.padded(p.segment), tokens = p.tokens();
  T* block = thread_scratch<T>(size);
  with_storage<T>(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    for (int64_t i = begin; i < end;) {
      const int64_t part = i / (p.batch * tokens), image = i / tokens % p.batch, n = i % tokens;
      const int64_t count = std::min<int64_t>({kBlock, end - i, tokens - n});
      std::memset(block, 0, size_t(size) * sizeof(T));
      reduce_tokens<T, S>(p, image, part, n, count, block);
      for (int64_t c = 0; c < size; ++c) sums[c] += block[c];
      i += count;
    }
  });
}

}  // namespace lkconv::cpu::LKCONV_ISA::group_mix
