// Direct convolution on rows of channel vectors: windows of input rows, tiles of outputs, tasks.
#pragma once

#include "direct_tiles.h"
#include "direct_in_place.h"

namespace lkconv::cpu::LKCONV_ISA {

template <class T>
LKCONV_INLINE void zero(T* dst, int64_t vectors, int64_t step = kLanes<T>) {
  for (int64_t i = 0; i < vectors; ++i) store(dst + i * step, Vec<T>{});
}

// The input rows of one tile, one channel group: a ring of padded rows in scratch, filled as outputs advance.
template <class T>
struct Window {
  T* base;
  int64_t row, ring;  // floats per row, rows in the ring

  LKCONV_INLINE T* slot(const DirectTile& t, int64_t y) const { return base + (y - t.iy0) % ring * row; }
};

// Loads input rows [y0, y1) of `count` neighbouring channel groups into their windows; zero outside the
// image's columns. Groups whose channels follow each other in memory are read together, pixel by pixel: one
// sequential stream instead of `count` strided ones.
template <class T>
void load_window(const Window<T>* windows, const Lanes<T>* in, int64_t count, const DirectTile& t, int64_t y0,
                 int64_t y1, int64_t width) {
  constexpr int L = kLanes<T>;
  const int64_t a = std::clamp<int64_t>(0, t.ix0, t.ix1), b = std::clamp<int64_t>(width, a, t.ix1);
  for (int64_t y = y0; y < y1;) {
    // Rows up to the end of the ring lie one after the other.
    const int64_t rows = std::min(y1 - y, windows[0].ring - (y - t.iy0) % windows[0].ring);
    T* to[kMaxSpan];
    for (int64_t g = 0; g < count; ++g) {
      T* dst = windows[g].slot(t, y);
      to[g] = dst + (a - t.ix0) * L;
      for (int64_t r = 0; r < rows; ++r) {
        zero(dst + r * windows[g].row, a - t.ix0);
        zero(dst + r * windows[g].row + (b - t.ix0) * L, t.ix1 - b);
      }
    }
    load_rows(to, windows[0].row, L, in, count, y, y + rows, a, b);
    y += rows;
  }
}

// Memory that the next batch will load and this batch will store, requested while arithmetic runs. A
// channels_last pixel of one group is a cache line (or half of one) that hardware prefetchers do not foresee.
struct Prefetch {
  const char *in = nullptr, *out = nullptr;  // pixel t.x0 of a row, or null
  int64_t in_step = 0, out_step = 0;         // bytes per pixel

  template <int X>
  LKCONV_INLINE void pixels(int64_t x) const {
    if (in)
#pragma GCC unroll 16
      for (int i = 0; i < X; ++i) __builtin_prefetch(in + (x + i) * in_step, 0, 2);
    if (out)
#pragma GCC unroll 16
      for (int i = 0; i < X; ++i) __builtin_prefetch(out + (x + i) * out_step, 1, 2);
  }
};

constexpr int64_t kPrefetchBytes = 1 << 20;  // smaller tensors stay in a core's own cache

template <class T>
LKCONV_INLINE Prefetch prefetch_rows(const Geometry& p, const DirectTile& t, const Lanes<T>& in,
                                     const Lanes<T>& out, int64_t in_y, int64_t out_y) {
  Prefetch f;
  if (p.batch * p.channels * p.out_height * p.out_width * dtype_size(out.dtype) < kPrefetchBytes) return f;
  if (in.neighbours && in_y < t.iy1 && p.stride_w == 1) {
    f.in_step = in.stride_x * dtype_size(in.dtype);
    f.in = in.base[0] + in_y * in.stride_y * dtype_size(in.dtype) + std::max<int64_t>(t.ix0, 0) * f.in_step;
  }
  if (out.neighbours) {
    f.out_step = out.stride_x * dtype_size(out.dtype);
    f.out = out.base[0] + out_y * out.stride_y * dtype_size(out.dtype) + t.x0 * f.out_step;
  }
  return f;
}

// Whether every input column reaches every output column: then a row of the band matrix is full, and holding
// pixels while sliding over taps runs no multiply-add on the zero halo.
LKCONV_INLINE bool dense_columns(const Geometry& p) {
  return p.stride_w == 1 && p.dil_w == 1 && p.pad_w >= p.out_width - 1 && p.width - 1 + p.pad_w < p.kernel_w;
}

// Where finished blocks of one output row go: into scratch, or, where a pixel's lanes are neighbours in
// memory, straight to the tensor, which overlaps the stores with the arithmetic of the next block.
template <class T>
struct RowSink {
  T* scratch;
  const Lanes<T>* tensor;  // null: scratch
  int64_t y;
  Vec<T> bias;
  Prefetch prefetch;

  // A tensor of the kernel's own type takes the sums as they leave the registers; others are converted per
  // block.
  LKCONV_INLINE bool in_place() const {
    return tensor && tensor->count == kLanes<T> && dtype_size(tensor->dtype) == sizeof(T);
  }
  LKCONV_INLINE Outputs<T> outputs(const DirectTile& t, int64_t x, T* finished) const {
    if (in_place())
      return {reinterpret_cast<T*>(tensor->base[0]) + y * tensor->stride_y + x * tensor->stride_x,
              tensor->stride_x, bias};
    return {tensor ? finished : scratch + (x - t.x0) * kLanes<T>, kLanes<T>, Vec<T>{}};
  }
};

// One row of outputs of a tile; rows[i] is input row max(0, top) + i.
template <class T, int X>
void direct_row(const Geometry& p, const DirectTile& t, int64_t y, const T* const* rows, const T* kernel,
                const RowSink<T>& sink) {
  constexpr int L = kLanes<T>;
  alignas(64) T finished[X * L];
  const int64_t top = y * p.stride_h - p.pad_h;
  int64_t u0, u1;
  clip_taps(top, top, p.height, p.kernel_h, p.dil_h, u0, u1);
  const bool unit = p.stride_w == 1 && p.dil_w == 1;
  const bool dense = dense_columns(p), halo = known_halo(p);
  for (int64_t xb = t.x0; xb < t.x1; xb += X) {
    // The last block moves left to stay whole; what it computes twice comes out the same.
    const int64_t x = std::max(t.x0, std::min(xb, t.x1 - X));
    const int64_t left = x * p.stride_w - p.pad_w;
    int64_t v0, v1;
    clip_taps(left, left + (X - 1) * p.stride_w, p.width, p.kernel_w, p.dil_w, v0, v1);
    const Outputs<T> to = sink.outputs(t, x, finished);
    sink.prefetch.template pixels<X>(x - t.x0);
    const RowTable<T> pixels{rows, p.dil_h, (left + v0 * p.dil_w - t.ix0) * L};
    const RowStep<T> taps{kernel + (u0 * p.kernel_w + v0) * L, p.kernel_w * L};
    if (u1 <= u0 || v1 <= v0)
      for (int i = 0; i < X; ++i) store(to.at + i * to.step, to.initial);
    else if (dense) {
      const RowTable<T> image{rows, p.dil_h, (0 - t.ix0) * L};
      const RowStep<T> slid{kernel + (u0 * p.kernel_w + p.pad_w - (x + X - 1)) * L, p.kernel_w * L};
      block_unit<T, X, true>(to, slid, image, u1 - u0, p.width);
    } else if (halo && (x == 0 || x + X == p.out_width))
      block_at_edge<T, X>(to, {rows, p.dil_h, (left - t.ix0) * L},
                          {kernel + u0 * p.kernel_w * L, p.kernel_w * L}, u1 - u0, p.kernel_w, x == 0,
                          x + X == p.out_width);
    else if (unit)
      block_unit<T, X, false>(to, pixels, taps, u1 - u0, v1 - v0);
    else
      tile_strided<T, X>(to, pixels, taps, u1 - u0, v1 - v0, p.stride_w, p.dil_w);
    if (sink.tensor && !sink.in_place())
      store_rows(finished, 0, L, sink.bias, *sink.tensor, sink.y, sink.y + 1, x, x + X);
  }
}

template <class T>
void direct_row(const Geometry& p, const DirectTile& t, int64_t block, int64_t y, const T* const* rows,
                const T* kernel, const RowSink<T>& sink) {
  switch (block) {
#if LKCONV_VECTOR_REGISTERS >= 32
    case 14:
      return direct_row<T, 14>(p, t, y, rows, kernel, sink);
#endif
    case 8:
      return direct_row<T, 8>(p, t, y, rows, kernel, sink);
    case 7:
      return direct_row<T, 7>(p, t, y, rows, kernel, sink);
    case 4:
      return direct_row<T, 4>(p, t, y, rows, kernel, sink);
    case 2:
      return direct_row<T, 2>(p, t, y, rows, kernel, sink);
    default:
      return direct_row<T, 1>(p, t, y, rows, kernel, sink);
  }
}

// Outputs per register block for a row of `width` outputs: the block with the least waste.
inline int64_t direct_block(int64_t width) {
  constexpr int64_t sizes[] = {14, 8, 7, 4, 2, 1};
  int64_t best = 1, best_cost = INT64_MAX;
  for (int64_t x : sizes) {
    if (x > width || (x == 14 && kRegisters < 32)) continue;
    const int64_t cost = ceil_div(width, x) * (x + 2);
    if (cost < best_cost) best = x, best_cost = cost;
  }
  return best;
}

// Input rows from the first that output row y0 reads to the last that output row y1 - 1 reads, inside the
// tile.
LKCONV_INLINE int64_t rows_needed(const Geometry& p, const DirectTile& t, int64_t y1) {
  return std::clamp<int64_t>(
      (y1 - 1) * p.stride_h - p.pad_h + std::max<int64_t>(p.kernel_h - 1, 0) * p.dil_h + 1, t.iy0, t.iy1);
}

// Scratch of one direct task: per channel group of the span its kernels, its window and a batch of output
// rows.
template <class T>
struct DirectScratch {
  int64_t row, ring, kernel_size, out_size, table_size;
  T *kernels, *windows, *out, *sum;
  const T** table;
  static constexpr int64_t kPointerSlots = int64_t((sizeof(void*) + sizeof(T) - 1) / sizeof(T));

  DirectScratch(const ForwardProblem& p, const Plan& plan) {
    constexpr int L = kLanes<T>;
    const DirectTile first = direct_tile(p, plan, 0, 0);
    row = (first.ix1 - first.ix0) * L;
    ring = direct_ring_rows(p, plan);
    kernel_size = p.kernel_h * p.kernel_w * L;
    out_size = plan.batch_rows * plan.tile_w * L;
    table_size = std::max<int64_t>(p.kernel_h - 1, 0) * p.dil_h + 1;
    const int64_t per_group = kernel_size * p.reduce + row * ring + out_size * (1 + (p.reduce > 1));
    kernels = thread_scratch<T>(per_group * plan.span + table_size * kPointerSlots);
    windows = kernels + kernel_size * p.reduce * plan.span;
    out = windows + row * ring * plan.span;
    sum = p.reduce > 1 ? out + out_size * plan.span : out;
    table = reinterpret_cast<const T**>(kernels + per_group * plan.span);
  }
};

// The channel groups a task handles together, and their addresses.
template <class T>
struct Span {
  int64_t count;
  Lanes<T> input[kMaxSpan], output[kMaxSpan];
  Window<T> window[kMaxSpan];
  Vec<T> bias[kMaxSpan];
};

template <class T>
void load_span_kernels(const ForwardProblem& p, const DirectScratch<T>& s, int64_t g0, int64_t count) {
  constexpr int L = kLanes<T>;
  for (int64_t g = 0; g < count; ++g)
    for (int64_t j = 0; j < p.reduce; ++j)
      load_kernel(s.kernels + (g * p.reduce + j) * s.kernel_size,
                  make_lanes<T>(p.weight, 0, (g0 + g) * L, p.channels,
                                [&](int64_t c) { return p.weight_channel(c, j); }),
                  p.kernel_h, p.kernel_w);
}

template <class T>
LKCONV_INLINE bool stores_straight(const ForwardProblem& p, const Lanes<T>& output) {
  return p.reduce == 1 && output.neighbours;
}

// Output rows [y0, y1) of group g of the span, from rows already in its window; `loaded` ends those.
template <class T>
void direct_batch(const ForwardProblem& p, const DirectScratch<T>& s, const DirectTile& t,
                  const Span<T>& span, int64_t g, const T* kernel, int64_t y0, int64_t y1, int64_t loaded) {
  constexpr int L = kLanes<T>;
  const Window<T>& window = span.window[g];
  T* out = s.out + g * s.out_size;
  const T* ring_end = window.base + s.ring * s.row;
  const bool straight = stores_straight(p, span.output[g]);
  const int64_t block = direct_block(t.x1 - t.x0), out_row = (t.x1 - t.x0) * L;
  for (int64_t y = y0; y < y1; ++y) {
    const int64_t top = y * p.stride_h - p.pad_h;
    int64_t u0, u1;
    clip_taps(top, top, p.height, p.kernel_h, p.dil_h, u0, u1);
    const T* at = u0 < u1 ? window.slot(t, top + u0 * p.dil_h) : nullptr;
    for (int64_t i = 0; i <= (u1 - u0 - 1) * p.dil_h; ++i) {
      s.table[i] = at;
      at += s.row;
      if (at == ring_end) at = window.base;
    }
    const RowSink<T> sink{out + (y - y0) * out_row, straight ? &span.output[g] : nullptr, y, span.bias[g],
                          prefetch_rows(p, t, span.input[g], span.output[g], loaded + (y - y0) * p.stride_h,
                                        std::min(y + 1, t.y1 - 1))};
    direct_row(p, t, block, y, s.table, kernel, sink);
  }
}

// All output rows of one tile for the groups of a span.
template <class T>
void direct_tile_rows(const ForwardProblem& p, const Plan& plan, const DirectScratch<T>& s,
                      const DirectTile& t, int64_t n, int64_t c0, Span<T>& span) {
  constexpr int L = kLanes<T>;
  const int64_t out_row = (t.x1 - t.x0) * L;
  int64_t loaded = t.iy0;
  for (int64_t y0 = t.y0; y0 < t.y1; y0 += plan.batch_rows) {
    const int64_t y1 = std::min(y0 + plan.batch_rows, t.y1);
    for (int64_t j = 0; j < p.reduce; ++j) {
      for (int64_t g = 0; g < span.count; ++g) {
        span.input[g] = make_lanes<T>(p.input, n, c0 + g * L, p.channels,
                                      [&](int64_t c) { return p.input_channel(c, j); });
        ask_ahead(span.input[g], p.input, requests_planes(p, p.input.dtype));
      }
      // With several input planes per output the ring holds one plane at a time and is filled anew for each.
      const int64_t begin =
          p.reduce == 1 ? loaded : std::clamp<int64_t>(y0 * p.stride_h - p.pad_h, t.iy0, t.iy1);
      const int64_t end = std::max(begin, rows_needed(p, t, y1));
      load_window(span.window, span.input, span.count, t, begin, end, p.width);
      if (p.reduce == 1) loaded = end;
      for (int64_t g = 0; g < span.count; ++g) {
        direct_batch(p, s, t, span, g, s.kernels + (g * p.reduce + j) * s.kernel_size, y0, y1, end);
        if (p.reduce == 1) continue;
        T *out = s.out + g * s.out_size, *sum = s.sum + g * s.out_size;
        for (int64_t i = 0; i < (y1 - y0) * out_row; i += L)
          store(sum + i, j ? load(sum + i) + load(out + i) : load(out + i));
      }
    }
    for (int64_t g = 0; g < span.count; ++g)
      if (!stores_straight(p, span.output[g]))
        store_rows(s.sum + g * s.out_size, out_row, L, span.bias[g], span.output[g], y0, y1, t.x0, t.x1);
  }
}

template <class T>
void forward_direct(const ForwardProblem& p, const Plan& plan, int64_t task0, int64_t task1) {
  constexpr int L = kLanes<T>;
  if constexpr (std::is_same_v<T, float>)
    if (plan.in_place) {
#if LKCONV_VECTOR_REGISTERS >= 32
      if (p.input.dtype == DType::bf16) return forward_in_place<bf16>(p, plan, task0, task1);
#endif
      return forward_in_place<float>(p, plan, task0, task1);
    }
  const int64_t tiles_x = ceil_div(p.out_width, plan.tile_w),
                tiles = ceil_div(p.out_height, plan.tile_h) * tiles_x;
  const int64_t groups = channel_groups(p.channels, plan);
  const DirectScratch<T> s(p, plan);
  Span<T> span;
  int64_t loaded_group = -1;
  for (int64_t task = task0; task < task1; ++task) {
    const int64_t g0 = task / (p.batch * tiles) * plan.span, n = task / tiles % p.batch, tile = task % tiles;
    const int64_t c0 = g0 * L;
    span.count = std::min(plan.span, groups - g0);
    if (g0 != loaded_group) load_span_kernels(p, s, g0, span.count);
    loaded_group = g0;
    for (int64_t g = 0; g < span.count; ++g) {
      span.output[g] = make_lanes<T>(p.output, n, c0 + g * L, p.channels, [](int64_t c) { return c; });
      ask_ahead(span.output[g], p.output, requests_planes(p, p.input.dtype));
      span.window[g] = {s.windows + g * s.row * s.ring, s.row, s.ring};
      span.bias[g] = load_bias<T>(p.bias, c0 + g * L, p.channels);
    }
    direct_tile_rows(p, plan, s, direct_tile(p, plan, tile / tiles_x, tile % tiles_x), n, c0, span);
  }
}

}  // namespace lkconv::cpu::LKCONV_ISA
