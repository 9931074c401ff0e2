// Moving channels of tokens between tensors and scratch, windows of padded image rows, and the two depthwise
// convolutions and the correlation that run on them. One vector is L channels of one pixel.
#pragma once

namespace lkconv::cpu::LKCONV_ISA::group_mix {

template <class T>
LKCONV_INLINE Vec<T> lanes_below(int64_t count, Vec<T> v) {
  constexpr int L = kLanes<T>;
  using I = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  typedef I VI __attribute__((vector_size(LKCONV_VECTOR_BYTES)));
  VI lane;
  for (int i = 0; i < L; ++i) lane[i] = i;
  return lane < I(count) ? v : Vec<T>{};
}

// The first `count` channels at p, zeros after, and writing them; neither touches what lies past them.
template <class T, class S>
LKCONV_INLINE Vec<T> load_channels(const S* p, int64_t count) {
  return count >= kLanes<T> ? load_as(p, T()) : load_part(p, count, T());
}
template <class T, class S>
LKCONV_INLINE void store_channels(S* p, int64_t count, Vec<T> v) {
  if (count >= kLanes<T>)
    store_from(p, v);
  else
    store_part(p, v, count);
}

// A tensor of tokens, `token` elements from one to the next.
template <class S>
struct Tokens {
  S* data;
  int64_t token;
  S* at(int64_t n) const { return data + n * token; }
};

// A segment of a token is a short run far from the next token's, which hardware prefetchers do not foresee:
// asks for the token kAhead after n, or the last of those before `end`.
constexpr int64_t kAhead = 16;

template <class S>
LKCONV_INLINE void request_lines(S* first, int64_t channels) {
  constexpr intptr_t kLine = 64;
  constexpr int kWrite = std::is_const_v<S> ? 0 : 1;
  const auto at = reinterpret_cast<intptr_t>(first);
  for (intptr_t line = at & -kLine; line < at + channels * intptr_t(sizeof(S)); line += kLine)
    __builtin_prefetch(reinterpret_cast<const char*>(line), kWrite, 3);
}
template <class S>
LKCONV_INLINE void request_token(const Tokens<S>& tokens, int64_t n, int64_t end, int64_t channels) {
  request_lines(tokens.at(std::min(n + kAhead, end - 1)), channels);
}

// dst[i][0, padded channels) = the channels of token n0 + i
template <class T, class S>
void load_tokens(T* dst, int64_t dst_row, const Tokens<const S>& src, int64_t n0, int64_t count,
                 int64_t channels) {
  constexpr int L = kLanes<T>;
  for (int64_t i = 0; i < count; ++i, dst += dst_row) {
    request_token(src, n0 + i, n0 + count, channels);
    for (int64_t c = 0; c < channels; c += L)
      store(dst + c, load_channels<T>(src.at(n0 + i) + c, channels - c));
  }
}

#if LKCONV_BF16_PRODUCTS
inline void load_tokens(bf16* dst, int64_t dst_row, const Tokens<const bf16>& src, int64_t n0, int64_t count,
                        int64_t channels) {
  for (int64_t i = n0; i < n0 + count; ++i, dst += dst_row) {
    request_token(src, i, n0 + count, channels);
    std::memcpy(dst, src.at(i), size_t(channels) * sizeof(bf16));
  }
}
#endif

template <class T, class S>
void store_tokens(const Tokens<S>& dst, int64_t n0, int64_t count, int64_t channels, const T* src,
                  int64_t src_row) {
  constexpr int L = kLanes<T>;
  for (int64_t i = 0; i < count; ++i, src += src_row)
    for (int64_t c = 0; c < channels; c += L)
      store_channels<T>(dst.at(n0 + i) + c, channels - c, load(src + c));
}

// Rows [top, top + rows) of an image as [group][row][column][lane], with `radius` columns of zeros on either
// side. Rows outside the image have a place, but are neither written nor read.
template <class T>
struct Window {
  T* data;
  int64_t top, rows, width, height, radius;

  // The part of rows [y0, y0 + count) that lies in the image, counted from y0.
  struct Part {
    int64_t begin, end;
  };
  Part inside(int64_t y0, int64_t count) const {
    return {std::max<int64_t>(0, -y0), std::min(count, height - y0)};
  }

  int64_t row_size() const { return (width + 2 * radius) * kLanes<T>; }
  int64_t group_size() const { return rows * row_size(); }
  // pixel x of image row y; x may be in the margin
  T* at(int64_t group, int64_t y, int64_t x) const {
    return data + group * group_size() + (y - top) * row_size() + (x + radius) * kLanes<T>;
  }
};

template <class T>
void clear_rows(const Window<T>& w, int64_t group, int64_t groups, int64_t y0, int64_t y1) {
  for (int64_t g = group; g < group + groups; ++g)
    if (y1 > y0) std::memset(w.at(g, y0, -w.radius), 0, size_t((y1 - y0) * w.row_size()) * sizeof(T));
}

// Zeros on either side of rows [y0, y1).
template <class T>
void clear_margins(const Window<T>& w, int64_t group, int64_t groups, int64_t y0, int64_t y1) {
  const int64_t right = (w.radius + w.width) * kLanes<T>;
  for (int64_t g = group; g < group + groups; ++g)
    for (int64_t y = y0; y < y1; ++y) {
      T* row = w.at(g, y, -w.radius);
      for (int64_t i = 0; i < w.radius * kLanes<T>; i += kLanes<T>)
        store(row + i, Vec<T>{}), store(row + right + i, Vec<T>{});
    }
}

// `groups` may be more than the channels fill: the rest is zeros.
template <class T, class S>
void load_window(const Window<T>& w, int64_t group, int64_t groups, const Tokens<const S>& image,
                 int64_t channels) {
  constexpr int L = kLanes<T>;
  const auto part = w.inside(w.top, w.rows);
  const int64_t y0 = w.top + part.begin, y1 = w.top + part.end;
  const int64_t used = ceil_div(channels, L), step = w.group_size();
  clear_margins(w, group, used, y0, y1);
  clear_rows(w, group + used, groups - used, y0, y1);
  for (int64_t y = y0; y < y1; ++y) {
    T* to = w.at(group, y, 0);
    for (int64_t x = 0; x < w.width; ++x, to += L) {
      const S* from = image.at(y * w.width + x);
      request_token(image, y * w.width + x, y1 * w.width, channels);
      for (int64_t g = 0; g < used; ++g)
        store(to + g * step, load_channels<T>(from + g * L, channels - g * L));
    }
  }
}

// Outputs of the depthwise convolution are kept as they are, or as bfloat16 for products of pairs: the
// processor's own rounding takes one instruction, but turns subnormal numbers into zeros.
template <class T>
LKCONV_INLINE void keep_output(T* to, Vec<T> v) {
  store(to, v);
}
#if LKCONV_BF16_PRODUCTS
LKCONV_INLINE void keep_output(bf16* to, VF v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
#endif

// out[i] = init + sum over u < rows, v < V of w[u][v] * in[u][i + v], for i < X: a register tile, as in
// direct.h.
template <class T, int X, int V, class O>
LKCONV_INLINE void depthwise_block(const T* in, int64_t in_row, int64_t rows, const T* w, Vec<T> init, O* out,
                                   int64_t out_step) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[X];
#pragma GCC unroll 16
  for (int i = 0; i < X; ++i) acc[i] = init;
  for (int64_t u = 0; u < rows; ++u, in += in_row, w += V * L) {
    Vec<T> k[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) k[v] = load(w + v * L);
#pragma GCC unroll 32
    for (int j = 0; j < X + V - 1; ++j) {
      Vec<T> p = load(in + j * L);
      keep(p);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v)
        if (j - v >= 0 && j - v < X) acc[j - v] += k[v] * p;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < X; ++i) keep_output(out + i * out_step, acc[i]);
}

template <class T, int V, class O>
void depthwise_row(const T* in, int64_t in_row, int64_t rows, const T* w, Vec<T> init, O* out,
                   int64_t out_step, int64_t width, int64_t block) {
  constexpr int L = kLanes<T>;
  for (int64_t xb = 0; xb < width; xb += block) {
    const int64_t x =
        std::min(xb, width - block);  // the last block repeats outputs rather than reading past the row
    const T* from = in + x * L;
    O* to = out + x * out_step;
    switch (block) {
#if LKCONV_VECTOR_REGISTERS >= 32
      case 14:
        depthwise_block<T, 14, V>(from, in_row, rows, w, init, to, out_step);
        break;
#endif
      case 8:
        depthwise_block<T, 8, V>(from, in_row, rows, w, init, to, out_step);
        break;
      case 7:
        depthwise_block<T, 7, V>(from, in_row, rows, w, init, to, out_step);
        break;
      case 4:
        depthwise_block<T, 4, V>(from, in_row, rows, w, init, to, out_step);
        break;
      case 2:
        depthwise_block<T, 2, V>(from, in_row, rows, w, init, to, out_step);
        break;
      default:
        depthwise_block<T, 1, V>(from, in_row, rows, w, init, to, out_step);
        break;
    }
  }
}

// out[(y - y0) * width + x][...] = init + depthwise k x k of the window's group, for rows [y0, y1).
template <class T, class O>
void depthwise_rows(const Window<T>& in, int64_t group, int64_t kernel, const T* weight, Vec<T> init,
                    int64_t y0, int64_t y1, O* out, int64_t out_step) {
  const int64_t r = kernel / 2, block = direct_block(in.width);
  for (int64_t y = y0; y < y1; ++y, out += in.width * out_step) {
    const auto part = in.inside(y - r, kernel);
    const int64_t rows = part.end - part.begin;
    const T* from = in.at(group, y - r + part.begin, -r);
    const T* w = weight + part.begin * kernel * kLanes<T>;
    switch (kernel) {
      case 3:
        depthwise_row<T, 3>(from, in.row_size(), rows, w, init, out, out_step, in.width, block);
        break;
      case 5:
        depthwise_row<T, 5>(from, in.row_size(), rows, w, init, out, out_step, in.width, block);
        break;
      default:
        depthwise_row<T, 7>(from, in.row_size(), rows, w, init, out, out_step, in.width, block);
        break;
    }
  }
}

// sum[tap] += sum over rows [y0, y1) of grad[y, x] * in[y + u - r, x + v - r]: the gradient of the weight.
template <class T>
void correlate_window(T* sum, const Window<T>& grad, const Window<T>& in, int64_t group, int64_t kernel,
                      int64_t y0, int64_t y1) {
  constexpr int L = kLanes<T>;
  const int64_t r = kernel / 2;
  for (int64_t y = y0; y < y1; ++y) {
    const auto part = in.inside(y - r, kernel);
    correlate<OneRow>(sum + part.begin * kernel * L, kernel * L, grad.at(group, y, 0),
                      in.at(group, y - r + part.begin, -r), in.row_size(), part.end - part.begin, kernel,
                      {in.width, 1, 1, true});
  }
}

// Rows of images handled at once, so that their pixels fill `bytes` of first-level cache.
template <class T>
int64_t rows_at_once(int64_t width, int64_t channels, int64_t bytes = 16384) {
  return std::max<int64_t>(1, bytes / int64_t(sizeof(T)) / channels / width);
}

}  // namespace lkconv::cpu::LKCONV_ISA::group_mix
