// What the Group-Mix kernels share: windows of tokens in shared memory, depthwise strips, products of pixels
// by a matrix, sums over the threads of a block in a fixed order.
#pragma once

#include "device.cuh"
#include "group_mix_params.h"

namespace lkconv::cuda {

constexpr int kPixels = 8;  // outputs of one row per thread in a depthwise convolution

LK_DEVICE int64_t min_long(int64_t a, int64_t b) { return a < b ? a : b; }

template <class A>
LK_DEVICE A hardswish(A a) {
  const A gate = a + A(3);
  // A NaN fails both comparisons and stays.
  return gate <= A(0) ? A(0) * a : gate >= A(6) ? a : a * gate * A(1.0 / 6);
}
template <class A>
LK_DEVICE A hardswish_slope(A a) {
  return a <= A(-3) ? A(0) : a >= A(3) ? A(1) : a * A(1.0 / 3) + A(0.5);
}

template <class A>
LK_DEVICE Vec4<A> load_vec4(const A* from) {
  return *reinterpret_cast<const Vec4<A>*>(from);
}

template <class T>
LK_DEVICE accumulator_t<T> read(const void* data, int64_t i) {
  return to_float(static_cast<const T*>(data)[i]);
}
// Four neighbours, `valid` of which exist; with `quads` all do, and they are aligned.
template <class T, class A>
LK_DEVICE void write4(void* data, int64_t i, const A (&values)[4], int valid, int quads) {
  Vec4<T> four;
#pragma unroll
  for (int b = 0; b < 4; ++b) from_float(values[b], four.v[b]);
  T* to = static_cast<T*>(data) + i;
  if (quads) {
    *reinterpret_cast<Vec4<T>*>(to) = four;
    return;
  }
#pragma unroll
  for (int b = 0; b < 4; ++b)
    if (b < valid) to[b] = four.v[b];
}
template <class T, class A>
LK_DEVICE void write(void* data, int64_t i, A value) {
  from_float(value, static_cast<T*>(data)[i]);
}

// ---- tiles of pixels ----

struct PixelTile {
  int64_t image;
  int y0, x0;
};

LK_DEVICE PixelTile pixel_tile(const TilePlan& t, int64_t unit) {
  const int per_image = t.tiles_y * t.tiles_x;
  const int64_t image = unit / per_image;
  const int tile = int(unit - image * per_image);
  return {image, tile / t.tiles_x * t.tile_h, tile % t.tiles_x * t.tile_w};
}

// i / divisor as a multiplication: exact while i * divisor < 2^22 and the quotient is below 2^10.
struct Divisor {
  int divisor;
  uint32_t factor;
};
LK_DEVICE Divisor make_divisor(int divisor) { return {divisor, (1u << 22) / uint32_t(divisor) + 1}; }
LK_DEVICE int quotient(int i, const Divisor& d) { return int((uint32_t(i) * d.factor) >> 22); }

// Channels of an image's tokens: element `first + token * stride + channel`.
struct TokenSlice {
  const void* data;
  int64_t first, stride;
};

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T v[2];
};

// V neighbouring channels of a token.
template <class T, class A, int V>
LK_DEVICE void load_channels(A (&to)[V], const TokenSlice& from, int64_t token, int c) {
  const T* at = static_cast<const T*>(from.data) + from.first + token * from.stride + c;
  if constexpr (V == 2) {
    const Pair<T> two = *reinterpret_cast<const Pair<T>*>(at);
    to[0] = to_float(two.v[0]), to[1] = to_float(two.v[1]);
  } else {
    to[0] = to_float(*at);
  }
}

template <class T, int V, class A>
LK_DEVICE void stage_window_by(A* window, const TilePlan& t, const PixelTile& tile, int halo, int valid,
                               const TokenSlice& from, const TokenSlice& factor) {
  const int shift = t.chunk_shift - (V - 1), lane = (int(threadIdx.x) & ((1 << shift) - 1)) * V;
  const int width = t.tile_w + 2 * halo, count = (t.tile_h + 2 * halo) * width;
  const Divisor by_width = make_divisor(width);
#pragma unroll 4
  for (int i = int(threadIdx.x) >> shift; i < count; i += kTokenThreads >> shift) {
    const int row = quotient(i, by_width), y = tile.y0 - halo + row, x = tile.x0 - halo + i - row * width;
    A values[V] = {};
    if (y >= 0 && y < t.height && x >= 0 && x < t.width && lane < valid) {
      const int64_t token = int64_t(y) * t.width + x;
      load_channels<T>(values, from, token, lane);
      if (factor.data) {
        A other[V];
        load_channels<T>(other, factor, token, lane);
#pragma unroll
        for (int j = 0; j < V; ++j) values[j] *= other[j];
      }
    }
    A* to = window + (i << t.chunk_shift) + lane;
#pragma unroll
    for (int j = 0; j < V; ++j) to[j] = values[j];
  }
}

// Shared memory [pixel of the window][chunk] <- `valid` channels of the tile and `halo` pixels around it,
// zero outside the image. With `pairs` every channel pair is aligned.
template <class T, class A>
LK_DEVICE void stage_window(A* window, const TilePlan& t, const PixelTile& tile, int halo, int valid,
                            int pairs, const TokenSlice& from, const TokenSlice& factor = {nullptr, 0, 0}) {
  if constexpr (sizeof(T) < 8)
    if (pairs) return stage_window_by<T, 2>(window, t, tile, halo, valid, from, factor);
  stage_window_by<T, 1>(window, t, tile, halo, valid, from, factor);
}

// Shared memory [tap][chunk] <- weights (channels, taps).
template <class A>
LK_DEVICE void stage_taps(A* taps, const void* weight, int count, int chunk, int chunk_shift, int valid) {
  for (int i = int(threadIdx.x); i < count * chunk; i += kTokenThreads) {
    const int tap = i >> chunk_shift, lane = i & (chunk - 1);
    taps[i] = lane < valid ? static_cast<const A*>(weight)[lane * count + tap] : A(0);
  }
}

// One channel of 8 neighbouring pixels: acc[r] += sum taps[u, v] window[u, r + v]. `window` points at the
// strip's first pixel of the window and `taps` at its channel; both step `chunk` elements.
template <int K, bool Flip, class A>
LK_DEVICE void depthwise_strip(A (&acc)[kPixels], const A* window, int row_pitch, int chunk, const A* taps) {
#pragma unroll 1
  for (int u = 0; u < K; ++u) {
    A in[kPixels + K - 1];
    const A* row = window + u * row_pitch;
#pragma unroll
    for (int i = 0; i < kPixels + K - 1; ++i) in[i] = row[i * chunk];
#pragma unroll
    for (int v = 0; v < K; ++v) {
      const A tap = taps[(Flip ? (K - 1 - u) * K + K - 1 - v : u * K + v) * chunk];
#pragma unroll
      for (int r = 0; r < kPixels; ++r) acc[r] = fused_multiply_add(tap, in[r + v], acc[r]);
    }
  }
}

// ---- products ----

// Where a thread stands in a product of pixels by `columns` * 4 output channels: pixels row, row + rows, ...
// (4 of them), channels 4 * column ... 4 * column + 3.
struct ProductThread {
  int column, row, rows;
};
LK_DEVICE ProductThread product_thread(int columns) {
  const int tid = int(threadIdx.x);
  return {tid % columns, tid / columns, kTokenThreads / columns};
}

// acc[a][b] += sum_k x[pixel a][k] weight(k, 4 * column + b), k < depth. `x` has `pitch` elements a pixel,
// zeros from `depth` on up to a multiple of four. weight(k, o) is asked for o < outs alone; `DepthFast` says
// which of the two neighbours in memory differ by. Begins with a barrier: `x` may just have been written.
template <bool DepthFast, class A, class Weight>
LK_DEVICE void multiply(A (&acc)[4][4], const A* x, int pitch, int pixels, int depth, int outs, A* stage,
                        const ProductThread& t, Weight weight) {
  int at[4];
#pragma unroll
  for (int a = 0; a < 4; ++a) at[a] = min_int(t.row + a * t.rows, pixels - 1) * pitch;
  const int width = min_int(kOutStep, (outs + 3) / 4 * 4);
  const Divisor by_width = make_divisor(width);
#pragma unroll 1
  for (int k0 = 0; k0 < depth; k0 += kDepthStep) {
    const int terms = min_int(kDepthStep, (depth - k0 + 3) / 4 * 4);
    const Divisor by_terms = make_divisor(terms);
    sync_block();
    for (int i = int(threadIdx.x); i < terms * width; i += kTokenThreads) {
      const int slow = quotient(i, DepthFast ? by_terms : by_width);
      const int fast = i - slow * (DepthFast ? terms : width);
      const int k = DepthFast ? fast : slow, o = DepthFast ? slow : fast;
      stage[k * kOutStep + o] = k0 + k < depth && o < outs ? weight(k0 + k, o) : A(0);
    }
    sync_block();
    if (t.column * 4 >= width) continue;
    for (int k = 0; k < terms; k += 4) {
      Vec4<A> in[4];
#pragma unroll
      for (int a = 0; a < 4; ++a) in[a] = load_vec4(x + at[a] + k0 + k);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Vec4<A> w = load_vec4(stage + (k + j) * kOutStep + t.column * 4);
#pragma unroll
        for (int a = 0; a < 4; ++a)
#pragma unroll
          for (int b = 0; b < 4; ++b) acc[a][b] = fused_multiply_add(in[a].v[j], w.v[b], acc[a][b]);
      }
    }
  }
}

// ---- moments ----

// Mean and sum of squared differences of `n` numbers, merged by Chan's formula: no cancellation.
template <class A>
LK_DEVICE void merge_moments(A n, A& mean, A& squares, A more, A more_mean, A more_squares) {
  if (more == A(0)) return;
  const A share = more / (n + more), delta = more_mean - mean;
  mean = n == A(0) ? more_mean : mean + delta * share;
  squares += more_squares + delta * delta * n * share;
}

// Sum over a warp's lanes, in every lane.
LK_DEVICE float sum_warp(float value) {
  for (int apart = 16; apart > 0; apart /= 2) {
    float other;
    const uint32_t bits = shuffle(float_bits(value), (int(threadIdx.x) ^ apart) & 31);
    __builtin_memcpy(&other, &bits, 4);
    value += other;
  }
  return value;
}
LK_DEVICE double sum_warp(double value) {
  for (int apart = 16; apart > 0; apart /= 2) {
    uint32_t halves[2];
    __builtin_memcpy(halves, &value, 8);
    const int lane = (int(threadIdx.x) ^ apart) & 31;
    halves[0] = shuffle(halves[0], lane), halves[1] = shuffle(halves[1], lane);
    double other;
    __builtin_memcpy(&other, halves, 8);
    value += other;
  }
  return value;
}

}  // namespace lkconv::cuda
