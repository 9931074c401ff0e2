// Direct summation over channels_last tensors of the kernels' own type, whose pixels are vectors as they lie
// in memory: no window of the input is copied. Pixels of the halo are never read, so every block must know
// which of its pixels they are: odd kernel rows of at most 7 taps that keep the width of the image.
#pragma once

#include "element_vectors.h"

namespace lkconv::cpu::LKCONV_ISA {

// Rows of a tensor, `row_step` elements apart, of pixels `step` apart.
template <class T>
struct TensorRows {
  const T* base;
  int64_t row_step, step;

  LKCONV_INLINE const T* row(int64_t u) const { return base + u * row_step; }
  LKCONV_INLINE int64_t pixel() const { return step; }
};

// Asks for `count` pixels of the row of outputs that comes next: pixels of one group are single lines, far
// from each other, which hardware prefetchers do not foresee.
template <int kWrite, class T>
LKCONV_INLINE void request_pixels(const T* at, int64_t step, int64_t count) {
  for (int64_t i = 0; i < count; ++i) __builtin_prefetch(at + i * step, kWrite, 2);
}

constexpr int64_t kRequestBytes = 1 << 20;  // smaller tensors stay in a core's own cache

// Whether the next rows of an image are asked for.
LKCONV_INLINE bool requests_rows(const Geometry& p, DType dtype) {
  return p.batch * p.height * p.width * p.channels * dtype_size(dtype) >= kRequestBytes;
}

// The channel groups a task handles together, kElements channels each. The last one of a tensor moves left to
// be whole: what it computes twice comes out the same, and from the same task. Kernels and biases are floats,
// in the parts of element_vectors.h: [part][tap][lane].
template <class T>
struct InPlaceSpan {
  int64_t count;
  bool request;
  const T* input[kMaxSpanInPlace];
  T* output[kMaxSpanInPlace];
  const float* kernel[kMaxSpanInPlace];
  Vec<float> bias[kMaxSpanInPlace][kFloatParts<T>];
};

// Where a block of X outputs goes, and what its sums begin with.
template <class T>
struct InPlaceOutputs {
  T* at;
  int64_t step;
  const Vec<float>* initial;
};
// Kernel rows, `row` floats apart, of which each part has its own.
struct InPlaceTaps {
  const float* base;
  int64_t row, part;
};

// out[i] = sum over u < rows, v < V of taps[u][v] * pixels[u][S i + v], as in tile_unit: a vector of pixels
// is loaded once for all taps of a row. The first kLeft and the last kRight pixels are halo, which is not
// read.
template <class T, int X, int V, int S, int kLeft, int kRight>
LKCONV_INLINE void in_place_tile(const InPlaceOutputs<T>& out, const TensorRows<T>& pixels,
                                 const InPlaceTaps& taps, int64_t rows) {
  constexpr int L = kLanes<float>, P = kFloatParts<T>;
  Vec<float> a[X][P];
#pragma GCC unroll 16
  for (int i = 0; i < X; ++i)
#pragma GCC unroll 2
    for (int q = 0; q < P; ++q) a[i][q] = out.initial[q];
  for (int64_t u = 0; u < rows; ++u) {
    const T* in = pixels.row(u) + kLeft * pixels.step;
    const float* held = taps.base + u * taps.row;
    Vec<float> k[V][P];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 2
      for (int q = 0; q < P; ++q) k[v][q] = load(held + q * taps.part + v * L);
#pragma GCC unroll 32
    for (int j = kLeft; j < S * (X - 1) + V - kRight; ++j, in += pixels.step) {
      Vec<float> p[P];
      take_apart(p, load_whole(in));
#pragma GCC unroll 2
      for (int q = 0; q < P; ++q) {
        if (V > 1) keep(p[q]);
#pragma GCC unroll 16
        for (int i = 0; i < X; ++i)
          if (j - S * i >= 0 && j - S * i < V) a[i][q] += k[j - S * i][q] * p[q];
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < X; ++i) store_whole(out.at + i * out.step, put_together(a[i], T()));
}

// A block that reaches the halo at `left`, by the padding, or at `right`, by that or one pixel less.
template <class T, int X, int V, int S>
LKCONV_INLINE void in_place_block(const InPlaceOutputs<T>& out, const TensorRows<T>& pixels,
                                  const InPlaceTaps& taps, int64_t rows, bool left, int64_t right) {
  constexpr int P = V / 2, kLess = P - (S > 1);
  if (P == 0 || (!left && !right)) return in_place_tile<T, X, V, S, 0, 0>(out, pixels, taps, rows);
  if (S > 1 && right == P)
    return left ? in_place_tile<T, X, V, S, P, P>(out, pixels, taps, rows)
                : in_place_tile<T, X, V, S, 0, P>(out, pixels, taps, rows);
  if (!right) return in_place_tile<T, X, V, S, P, 0>(out, pixels, taps, rows);
  left ? in_place_tile<T, X, V, S, P, kLess>(out, pixels, taps, rows)
       : in_place_tile<T, X, V, S, 0, kLess>(out, pixels, taps, rows);
}

// One row of outputs of a channel group, X at a time: columns that the dilation keeps apart follow each
// other.
struct InPlaceColumns {
  int64_t first, count, step;  // outputs of one remainder modulo the dilation
  int64_t blocks, right;       // pixels of halo that the last block reaches

  InPlaceColumns(const ForwardProblem& p, int64_t remainder, int64_t block)
      : first(remainder),
        count(ceil_div(p.out_width - remainder, p.dil_w)),
        step(p.dil_w),
        blocks(ceil_div(count, block)) {
    const int64_t last = (count - 1) * p.stride_w + p.kernel_w - 1 - p.pad_w / p.dil_w;
    right = std::max<int64_t>(0, last - (ceil_div(p.width - remainder, p.dil_w) - 1));
  }
  // Blocks are evenly apart, so that none but the first and the last reaches the halo.
  int64_t output(int64_t i, int64_t block) const {
    return blocks > 1 ? i * (count - block) / (blocks - 1) : 0;
  }
};

// Rows whose taps are held in registers.
template <class T, int X, int V, int S>
struct NarrowRow {
  static constexpr int64_t kBlock = X;

  LKCONV_INLINE static void block(const ForwardProblem& p, const InPlaceColumns& c, int64_t i,
                                  const InPlaceOutputs<T>& out, const TensorRows<T>& pixels,
                                  const InPlaceTaps& taps, int64_t rows) {
    in_place_block<T, X, V, S>(out, pixels, taps, rows, i == 0, i == c.blocks - 1 ? c.right : 0);
  }
};

// Asks for what a block of X outputs of the next row writes and, of its rows of pixels, for those that this
// row does not read.
template <class T>
LKCONV_INLINE void request_next_row(const ForwardProblem& p, const InPlaceSpan<T>& s, int64_t g, int64_t y,
                                    int64_t pixel, const InPlaceOutputs<T>& to, int64_t X) {
  request_pixels<1>(to.at + p.output.stride_h, to.step, X);
  const int64_t last = (y + 1) * p.stride_h - p.pad_h + (p.kernel_h - 1) * p.dil_h;
  for (int64_t row = last + 1 - p.stride_h; row <= last; ++row)
    if (row >= 0 && row < p.height)
      request_pixels<0>(s.input[g] + row * p.input.stride_h + pixel * p.input.stride_w,
                        p.input.stride_w * p.dil_w, X * p.stride_w);
}

// One row of outputs; all groups of a block, whose pixels are neighbours in memory, follow each other.
template <class T, class Row>
void in_place_row(const ForwardProblem& p, const InPlaceSpan<T>& s, int64_t y, const InPlaceColumns& c) {
  constexpr int L = kLanes<float>, X = Row::kBlock;
  const TensorView &in = p.input, &out = p.output;
  const int64_t top = y * p.stride_h - p.pad_h, row = p.kernel_w * L;
  int64_t u0, u1;
  clip_taps(top, top, p.height, p.kernel_h, p.dil_h, u0, u1);
  const int64_t first_row = (top + u0 * p.dil_h) * in.stride_h;
  const bool request = s.request && y + 1 < p.out_height;
  for (int64_t i = 0; i < c.blocks; ++i) {
    const int64_t x = c.output(i, X), column = c.first + x * c.step;
    const int64_t tap = c.first + (x * p.stride_w - p.pad_w / p.dil_w) * c.step;  // the pixel of the first
    for (int64_t g = 0; g < s.count; ++g) {
      const InPlaceOutputs<T> to{s.output[g] + y * out.stride_h + column * out.stride_w,
                                 out.stride_w * c.step, s.bias[g]};
      if (u1 <= u0) {
        for (int j = 0; j < X; ++j) store_whole(to.at + j * to.step, put_together(to.initial, T()));
        continue;
      }
      const TensorRows<T> pixels{s.input[g] + first_row + tap * in.stride_w, in.stride_h * p.dil_h,
                                 in.stride_w * c.step};
      if (request) request_next_row(p, s, g, y, tap, to, X);
      Row::block(p, c, i, to, pixels, {s.kernel[g] + u0 * row, row, p.kernel_h * row}, u1 - u0);
    }
  }
}

template <class T, class Row>
void in_place_row(const ForwardProblem& p, const InPlaceSpan<T>& s, int64_t y) {
  for (int64_t remainder = 0; remainder < p.dil_w; ++remainder)
    in_place_row<T, Row>(p, s, y, InPlaceColumns(p, remainder, Row::kBlock));
}

template <class T, int X>
void narrow_row(const ForwardProblem& p, const InPlaceSpan<T>& s, int64_t y) {
  if constexpr (X <= kMaxStridedBlock)
    if (p.stride_w == 2 && p.kernel_w > 1) {
      if (p.kernel_w == 3) return in_place_row<T, NarrowRow<T, X, 3, 2>>(p, s, y);
      if (p.kernel_w == 5) return in_place_row<T, NarrowRow<T, X, 5, 2>>(p, s, y);
      return in_place_row<T, NarrowRow<T, X, 7, 2>>(p, s, y);
    }
  if (p.kernel_w == 1) return in_place_row<T, NarrowRow<T, X, 1, 1>>(p, s, y);
  if (p.kernel_w == 3) return in_place_row<T, NarrowRow<T, X, 3, 1>>(p, s, y);
  if constexpr (X >= 4) {
    if (p.kernel_w == 5) return in_place_row<T, NarrowRow<T, X, 5, 1>>(p, s, y);
    return in_place_row<T, NarrowRow<T, X, 7, 1>>(p, s, y);
  }
}

template <class T>
void narrow_row(const ForwardProblem& p, const InPlaceSpan<T>& s, int64_t block, int64_t y) {
  switch (block) {
#if LKCONV_VECTOR_REGISTERS >= 32
    case 14:
      if constexpr (kFloatParts<T> == 1) return narrow_row<T, 14>(p, s, y);
#endif
    case 8:
      return narrow_row<T, 8>(p, s, y);
    case 7:
      return narrow_row<T, 7>(p, s, y);
    case 4:
      return narrow_row<T, 4>(p, s, y);
    case 3:
      return narrow_row<T, 3>(p, s, y);
    default:
      return narrow_row<T, 2>(p, s, y);
  }
}

// Kernel rows too wide for registers: pixel r of a row, counted from the first one that the block's first
// output reads, is multiplied by the taps that lead from it to the outputs [first, last), which lie next to
// each other in memory.
template <class T, int X>
LKCONV_INLINE void multiply_pixel(Vec<float> (&a)[X][kFloatParts<T>], const TensorRows<T>& pixels, int64_t u,
                                  const InPlaceTaps& taps, int64_t r, int first, int last) {
  constexpr int L = kLanes<float>, P = kFloatParts<T>;
  Vec<float> p[P];
  take_apart(p, load_whole(pixels.row(u) + r * pixels.step));
  const float* k = taps.base + u * taps.row + r * L;
#pragma GCC unroll 2
  for (int q = 0; q < P; ++q)
#pragma GCC unroll 16
    for (int i = 0; i < X; ++i)
      if (i >= first && i < last) a[i][q] += load(k + q * taps.part - i * L) * p[q];
}

// out[i] = sum over u < rows, v < `taps_of_row` of taps[u][v] * pixels[u][i + v], of which only the pixels
// [begin, end) lie inside the image.
template <class T, int X>
LKCONV_INLINE void wide_tile(const InPlaceOutputs<T>& out, const TensorRows<T>& pixels,
                             const InPlaceTaps& taps, int64_t rows, int64_t taps_of_row, int64_t begin,
                             int64_t end) {
  constexpr int P = kFloatParts<T>;
  Vec<float> a[X][P];
#pragma GCC unroll 16
  for (int i = 0; i < X; ++i)
#pragma GCC unroll 2
    for (int q = 0; q < P; ++q) a[i][q] = out.initial[q];
  for (int64_t u = 0; u < rows; ++u) {
#pragma GCC unroll 16
    for (int r = 0; r < X - 1; ++r)
      if (r >= begin && r < end) multiply_pixel<T, X>(a, pixels, u, taps, r, 0, r + 1);
    const int64_t full = std::min(end, taps_of_row);
    for (int64_t r = std::max<int64_t>(begin, X - 1); r < full; ++r)
      multiply_pixel<T, X>(a, pixels, u, taps, r, 0, X);
#pragma GCC unroll 16
    for (int i = 1; i < X; ++i)
      if (const int64_t r = taps_of_row + i - 1; r >= begin && r < end)
        multiply_pixel<T, X>(a, pixels, u, taps, r, i, X);
  }
#pragma GCC unroll 16
  for (int i = 0; i < X; ++i) store_whole(out.at + i * out.step, put_together(a[i], T()));
}

template <class T, int X>
struct WideRow {
  static constexpr int64_t kBlock = X;

  LKCONV_INLINE static void block(const ForwardProblem& p, const InPlaceColumns& c, int64_t i,
                                  const InPlaceOutputs<T>& out, const TensorRows<T>& pixels,
                                  const InPlaceTaps& taps, int64_t rows) {
    const int64_t first = c.output(i, X) - p.pad_w;
    wide_tile<T, X>(out, pixels, taps, rows, p.kernel_w, std::max<int64_t>(0, -first),
                    std::min(p.width - first, p.kernel_w + X - 1));
  }
};

template <class T>
void wide_row(const ForwardProblem& p, const InPlaceSpan<T>& s, int64_t block, int64_t y) {
  switch (block) {
#if LKCONV_VECTOR_REGISTERS >= 32
    case 14:
      return in_place_row<T, WideRow<T, 14>>(p, s, y);
    case 12:
      return in_place_row<T, WideRow<T, 12>>(p, s, y);
#endif
    case 10:
      return in_place_row<T, WideRow<T, 10>>(p, s, y);
    case 8:
      return in_place_row<T, WideRow<T, 8>>(p, s, y);
    case 7:
      return in_place_row<T, WideRow<T, 7>>(p, s, y);
    default:
      return in_place_row<T, WideRow<T, 4>>(p, s, y);
  }
}

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
