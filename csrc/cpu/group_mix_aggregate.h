// Group aggregation, forward: depthwise convolution, pointwise product, normalisation and hardswish of one
// strip of an image while it is in cache.
#pragma once

namespace lkconv::cpu::LKCONV_ISA::group_mix {

template <class T, class F>
LKCONV_INLINE void with_storage(DType dtype, F&& f) {
  if constexpr (std::is_same_v<T, double>) {
    f(double());
  } else {
    if constexpr (LKCONV_BF16_PRODUCTS)
      f(bf16());
    else if (dtype == DType::f32)
      f(float());
    else if (dtype == DType::bf16)
      f(bf16());
    else
      f(f16());
  }
}

template <class T>
constexpr GroupMixSizes kSizes{kLanes<T>};

// a * clamp(a + 3, 0, 6) / 6; a NaN stays one.
template <class T>
LKCONV_INLINE Vec<T> hard_swish(Vec<T> a) {
  const Vec<T> zero{};
  return a * at_most<T>(at_least<T>(a + T(3), zero), zero + T(6)) * T(1.0 / 6);
}

// 0 up to -3, 1 from 3 on, a / 3 + 1 / 2 between.
template <class T>
LKCONV_INLINE Vec<T> hard_swish_slope(Vec<T> a) {
  const Vec<T> zero{}, one = zero + T(1);
  Vec<T> r = a * T(1.0 / 3) + T(0.5);
  r = a <= zero - T(3) ? zero : r;
  return a >= zero + T(3) ? one : r;
}

template <class T>
LKCONV_INLINE T sum_lanes(Vec<T> v) {
  T s = 0;
  for (int l = 0; l < kLanes<T>; ++l) s += v[l];
  return s;
}

inline int64_t kind_parts(int64_t kind) { return kind == kLocalKind ? kParts : 1; }

// Segment `kind` of part `part` of one image of (B, N, 3, 5, d).
template <class S>
Tokens<S> segment_tokens(const TokenShape& t, S* qkv, int64_t image, int64_t part, int64_t kind) {
  const int64_t d = t.segment, token = kParts * kKinds * d;
  return {qkv + image * t.tokens() * token + (part * kKinds + kind) * d, token};
}

// Channels from `channel` on of one image of (3, B, N, width).
template <class S>
Tokens<S> part_tokens(const TokenShape& t, S* data, int64_t image, int64_t part, int64_t width,
                      int64_t channel) {
  return {data + (part * t.batch + image) * t.tokens() * width + channel, width};
}

template <class S>
Tokens<S> local_tokens(const TokenShape& t, S* data, int64_t image, int64_t token) {
  return {data + image * t.tokens() * token, token};
}

// Merges one tile's mean and squared differences into the running ones (Chan, Golub, LeVeque 1979).
template <class T>
void merge_statistics(T* statistics, int64_t padded, const T* u, int64_t count) {
  constexpr int L = kLanes<T>;
  const T before = statistics[0], total = before + T(count);
  for (int64_t c = 0; c < padded; c += L) {
    Vec<T> sum{}, squares{};
    for (int64_t i = 0; i < count; ++i) sum += load(u + i * padded + c);
    const Vec<T> mean = sum / T(count);
    for (int64_t i = 0; i < count; ++i) {
      const Vec<T> d = load(u + i * padded + c) - mean;
      squares += d * d;
    }
    T* to = statistics + padded + c;
    const Vec<T> delta = mean - load(to);
    store(to, load(to) + delta * (T(count) / total));
    store(to + padded, load(to + padded) + squares + delta * delta * (before * T(count) / total));
  }
  statistics[0] = total;
}

// LayerNorm over the d channels of a token: u becomes its normalised value; returns 1 / standard deviation.
template <class T>
LKCONV_INLINE T standardise(T* u, int64_t channels, T eps) {
  constexpr int L = kLanes<T>;
  Vec<T> sum{}, squares{};
  for (int64_t c = 0; c < channels; c += L) sum += load(u + c);  // padding holds zeros
  const T mean = sum_lanes<T>(sum) / T(channels);
  for (int64_t c = 0; c < channels; c += L) {
    const Vec<T> d = lanes_below<T>(channels - c, load(u + c) - mean);
    squares += d * d;
    store(u + c, d);
  }
  const T rstd = T(1) / std::sqrt(sum_lanes<T>(squares) / T(channels) + eps);
  for (int64_t c = 0; c < channels; c += L) store(u + c, load(u + c) * rstd);
  return rstd;
}

// What D(z) is kept as between the two convolutions: of bfloat16 tensors it is rounded as they are where the
// processor multiplies pairs of them.
template <class T>
using Between = std::conditional_t<LKCONV_BF16_PRODUCTS != 0, bf16, T>;

// U = P T of `count` pixels, T being rows of `parts` times `padded` channels: each register of U, `init`
// added, goes to keep(pixel, vector, U).
template <class T, class Keep>
LKCONV_INLINE void multiply_pointwise(const AggregateProblem<T>& p, int64_t kind, const Between<T>* tile,
                                      int64_t count, const T* init, Keep&& keep) {
  constexpr int L = kLanes<T>;
  const int64_t padded = kSizes<T>.padded(p.segment), parts = kind_parts(kind), depth = parts * padded;
#if LKCONV_BF16_PRODUCTS
  const Left<Bf16Pair> pairs{reinterpret_cast<const Bf16Pair*>(tile), depth / 2, 1};
  gemm<Bf16Pair, Rows::pixels>(pairs, p.weights[kind].in_out_pairs, padded,
                               {p.segment / 2, parts, (padded - p.segment) / 2}, count, padded / L, init,
                               keep);
#else
  gemm<T, Rows::pixels>(Left<T>{tile, depth, 1}, p.weights[kind].in_out, padded,
                        {p.segment, parts, padded - p.segment}, count, padded / L, init, keep);
#endif
}

// The same into rows of padded channels.
template <class T>
void multiply_pointwise(const AggregateProblem<T>& p, int64_t kind, const Between<T>* tile, int64_t count,
                        T* u) {
  constexpr int L = kLanes<T>;
  const int64_t padded = kSizes<T>.padded(p.segment);
  multiply_pointwise<T>(p, kind, tile, count, nullptr,
                        [=](int64_t i, int64_t j, Vec<T> v)
                            __attribute__((always_inline)) { store(u + i * padded + j * L, v); });
}

// T = D(z) of one strip, tile by tile: done(first token, tokens, T, U), U being room for rows of padded
// channels.
template <class T, class S, class Done>
void convolve_strip(const AggregateProblem<T>& p, int64_t kind, const Strip& strip, Done&& done) {
  constexpr int L = kLanes<T>;
  const int64_t padded = kSizes<T>.padded(p.segment), groups = padded / L, parts = kind_parts(kind);
  const int64_t kernel = kKindKernel[kind], r = kernel / 2, depth = parts * padded;
  Window<T> w{nullptr, strip.y0 - r, strip.y1 - strip.y0 + 2 * r, p.width, p.height, r};
  const int64_t rows = std::min(rows_at_once<T>(p.width, depth), strip.y1 - strip.y0);
  const int64_t pixels = rows * p.width + kRowSlack;
  T* u = thread_scratch<T>(pixels * (depth + padded) + parts * groups * w.group_size());
  auto* tile = reinterpret_cast<Between<T>*>(u + pixels * padded);
  w.data = u + pixels * (padded + depth);
  for (int64_t i = 0; i < parts; ++i)
    load_window(
        w, i * groups, groups,
        segment_tokens(p, static_cast<const S*>(p.qkv), strip.image, parts == 1 ? strip.part : i, kind),
        p.segment);
  // Of the rows that products read past the last, nothing is used.
  std::memset(static_cast<void*>(tile + rows * p.width * depth), 0,
              size_t(kRowSlack * depth) * sizeof(*tile));
  const T* weight = p.weights[kind].depthwise;
  for (int64_t y = strip.y0; y < strip.y1; y += rows) {
    const int64_t y1 = std::min(y + rows, strip.y1), count = (y1 - y) * p.width;
    for (int64_t g = 0; g < parts * groups; ++g)
      depthwise_rows(w, g, kernel, weight + g * kernel * kernel * L, Vec<T>{}, y, y1, tile + g * L, depth);
    done(y * p.width, count, tile, u);
  }
}

// Segment 0, which is not convolved: the same interface.
template <class T, class S, class Done>
void copy_strip(const AggregateProblem<T>& p, const Strip& strip, Done&& done) {
  const int64_t padded = kSizes<T>.padded(p.segment),
                step = std::max<int64_t>(1, 16384 / int64_t(sizeof(T)) / padded);
  T* u = thread_scratch<T>(step * padded);
  std::memset(u, 0, size_t(step * padded) * sizeof(T));
  const auto from = segment_tokens(p, static_cast<const S*>(p.qkv), strip.image, strip.part, 0);
  for (int64_t n = strip.y0 * p.width; n < strip.y1 * p.width; n += step) {
    const int64_t count = std::min(step, strip.y1 * p.width - n);
    load_tokens(u, padded, from, n, count, p.segment);
    done(n, count, u);
  }
}

// L = hardswish(LayerNorm(U)) of a tile; U itself is kept for the backward pass when prelocal asks for it.
template <class T, class S>
void finish_local(const AggregateProblem<T>& p, int64_t image, int64_t n, int64_t count, T* u) {
  constexpr int L = kLanes<T>;
  const int64_t d = p.segment, padded = kSizes<T>.padded(d);
  const T *weight = p.layer_norm, *bias = weight + padded;
  const T eps = p.layer_norm_eps;
  const auto to = local_tokens(p, static_cast<S*>(p.local), image, p.segment);
  if (p.prelocal)
    store_tokens(local_tokens(p, static_cast<S*>(p.prelocal), image, p.segment), n, count, p.segment, u,
                 padded);
  for (int64_t i = 0; i < count; ++i, u += padded) {
    standardise(u, d, eps);
    for (int64_t c = 0; c < d; c += L)
      store_channels<T>(to.at(n + i) + c, d - c,
                        hard_swish<T>(load(u + c) * load(weight + c) + load(bias + c)));
  }
}

template <class T, class S>
void local_strip(const AggregateProblem<T>& p, const Strip& strip) {
  convolve_strip<T, S>(p, kLocalKind, strip, [&](int64_t n, int64_t count, const Between<T>* tile, T* u) {
    multiply_pointwise(p, kLocalKind, tile, count, u);
    finish_local<T, S>(p, strip.image, n, count, u);
  });
}

// hardswish(P T) of `count` pixels of a convolved segment, BatchNorm included, straight from registers.
template <class T, class S>
void multiply_activated(const AggregateProblem<T>& p, int64_t kind, const Between<T>* tile, int64_t count,
                        const Tokens<S>& to) {
  constexpr int L = kLanes<T>;
  const int64_t d = p.segment, padded = kSizes<T>.padded(d);
  const T *scale = p.scale + kind * padded, *shift = p.shift + kind * padded;
  if constexpr (LKCONV_BF16_PRODUCTS)
    multiply_pointwise<T>(p, kind, tile, count, nullptr,
                          [=](int64_t i, int64_t j, Vec<T> v) __attribute__((always_inline)) {
                            const Vec<T> a = v * load(scale + j * L) + load(shift + j * L);
                            store_channels<T>(to.at(i) + j * L, d - j * L, hard_swish<T>(a));
                          });
  else  // weights hold the scale
    multiply_pointwise<T>(p, kind, tile, count, shift,
                          [=](int64_t i, int64_t j, Vec<T> v) __attribute__((always_inline)) {
                            store_channels<T>(to.at(i) + j * L, d - j * L, hard_swish<T>(v));
                          });
}

// hardswish(scale * U + shift) of one segment of a token.
template <class T, class S>
LKCONV_INLINE void normalize_segment(const AggregateProblem<T>& p, int64_t s, const S* from, S* to) {
  constexpr int L = kLanes<T>;
  const int64_t d = p.segment, at = s * kSizes<T>.padded(d);
  for (int64_t c = 0; c < d; c += L) {
    const Vec<T> u = load_channels<T>(from + c, d - c);
    store_channels<T>(to + c, d - c, hard_swish<T>(u * load(p.scale + at + c) + load(p.shift + at + c)));
  }
}

// Segment 0 of one strip, which is not convolved.
template <class T, class S>
void normalize_strip(const AggregateProblem<T>& p, const Strip& strip, const Tokens<S>& to) {
  const auto from = segment_tokens(p, static_cast<const S*>(p.qkv), strip.image, strip.part, 0);
  const int64_t end = strip.y1 * p.width;
  for (int64_t n = strip.y0 * p.width; n < end; ++n) {
    request_token(from, n, end, p.segment);
    request_token(to, n, end, p.segment);
    normalize_segment<T, S>(p, 0, from.at(n), to.at(n));
  }
}

// Evaluation: BatchNorm is folded into the pointwise product, one pass.
template <class T>
void aggregate(const AggregateProblem<T>& p, int64_t kind, int64_t begin, int64_t end) {
  with_storage<T>(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    for (int64_t i = begin; i < end; ++i) {
      const Strip strip = p.plan[kind].at(i, p.height);
      if (kind == kLocalKind) {
        local_strip<T, S>(p, strip);
        continue;
      }
      const auto to = part_tokens(p, static_cast<S*>(p.mixed), strip.image, strip.part, kMixed * p.segment,
                                  kind * p.segment);
      if (kind == 0)
        normalize_strip<T, S>(p, strip, to);
      else
        convolve_strip<T, S>(p, kind, strip, [&](int64_t n, int64_t count, const Between<T>* tile, T*) {
          multiply_activated(p, kind, tile, count, Tokens<S>{to.at(n), to.token});
        });
    }
  });
}

// Training, first pass: U and its statistics; the non-attention branch whole.
template <class T>
void mix(const AggregateProblem<T>& p, int64_t kind, int64_t begin, int64_t end, T* statistics) {
  const int64_t padded = kSizes<T>.padded(p.segment);
  with_storage<T>(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    for (int64_t i = begin; i < end; ++i) {
      const Strip strip = p.plan[kind].at(i, p.height);
      auto gather = [&](int64_t, int64_t count, T* u) { merge_statistics(statistics, padded, u, count); };
      if (kind == kLocalKind) {
        local_strip<T, S>(p, strip);
      } else if (kind == 0) {
        copy_strip<T, S>(p, strip, gather);
      } else {
        const auto to = part_tokens(p, static_cast<S*>(p.premix), strip.image, strip.part,
                                    (kMixed - 1) * p.segment, (kind - 1) * p.segment);
        convolve_strip<T, S>(p, kind, strip, [&](int64_t n, int64_t count, const Between<T>* tile, T* u) {
          multiply_pointwise(p, kind, tile, count, u);
          store_tokens(to, n, count, p.segment, u, padded);
          gather(n, count, u);
        });
      }
    }
  });
}

// Training, second pass. Tokens are counted over (3, B, N).
template <class T>
void normalize(const AggregateProblem<T>& problem, int64_t begin, int64_t end) {
  const AggregateProblem<T> p = problem;  // no store can change it: its members stay in registers
  const int64_t d = p.segment, tokens = p.tokens();
  with_storage<T>(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    for (int64_t i = begin; i < end;) {
      const int64_t part = i / (p.batch * tokens), image = i / tokens % p.batch, n = i % tokens;
      const int64_t count = std::min(end - i, tokens - n);
      const auto plain = segment_tokens(p, static_cast<const S*>(p.qkv), image, part, 0);
      const auto pre = part_tokens(p, static_cast<const S*>(p.premix), image, part, (kMixed - 1) * d, 0);
      const auto to = part_tokens(p, static_cast<S*>(p.mixed), image, part, kMixed * d, 0);
      for (int64_t j = n; j < n + count; ++j) {
        request_token(plain, j, tokens, d);
        request_token(pre, j, tokens, (kMixed - 1) * d);
        request_token(to, j, tokens, kMixed * d);
        normalize_segment<T, S>(p, 0, plain.at(j), to.at(j));
        for (int64_t s = 1; s < kMixed; ++s)
          normalize_segment<T, S>(p, s, pre.at(j) + (s - 1) * d, to.at(j) + s * d);
      }
      i += count;
    }
  });
}

}  // namespace lkconv::cpu::LKCONV_ISA::group_mix
