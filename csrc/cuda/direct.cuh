// Direct depthwise convolution: a block stages the input window of a tile in shared memory, in the type it
// accumulates in, and each thread computes a strip of 8 outputs of one row with a window that slides over the
// taps in registers. Forward, and backward_input as forward over a flipped kernel.
#pragma once

#include "tile_io.cuh"

namespace lkconv::cuda {

// Blocks of kDirectThreads that share an SM. Said aloud, because without it the compiler aims at four and
// spills.
template <class T>
constexpr int direct_blocks = sizeof(accumulator_t<T>) == 8 ? 2 : 3;

template <class A>
LK_DEVICE void load4(A* to, const A* from) {
  const Vec4<A> four = *reinterpret_cast<const Vec4<A>*>(from);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = four.v[i];
}

// acc[r] += sum_v w[v] x[r + v], the width known: inputs and weights pass through registers once.
template <class A, int KW>
LK_DEVICE void slide_fixed(A (&acc)[kStrip], const A* x, const A* w) {
  constexpr int kInputs = (KW + kStrip - 1 + 3) / 4 * 4, kWeights = (KW + 3) / 4 * 4;
  A window[kInputs], taps[kWeights];
#pragma unroll
  for (int i = 0; i < kInputs; i += 4) load4(window + i, x + i);
#pragma unroll
  for (int i = 0; i < kWeights; i += 4) load4(taps + i, w + i);
#pragma unroll
  for (int v = 0; v < KW; ++v)
#pragma unroll
    for (int r = 0; r < kStrip; ++r) acc[r] = fused_multiply_add(taps[v], window[v + r], acc[r]);
}

// The same for any width: four taps at a time, and the remaining ones apart, so that no input outside an
// output's window ever meets it, not even multiplied by zero.
template <class A>
LK_DEVICE void slide_any(A (&acc)[kStrip], const A* x, const A* w, int kw) {
  A window[kStrip + 4], taps[4];
  load4(window, x);
  load4(window + 4, x + 4);
  int v = 0;
#pragma unroll 3
  for (; v + 4 <= kw; v += 4) {
    load4(window + 8, x + v + 8);
    load4(taps, w + v);
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int r = 0; r < kStrip; ++r) acc[r] = fused_multiply_add(taps[t], window[t + r], acc[r]);
#pragma unroll
    for (int i = 0; i < kStrip; ++i) window[i] = window[i + 4];
  }
  if (v == kw) return;
  load4(window + 8, x + v + 8);
  load4(taps, w + v);
#pragma unroll
  for (int t = 0; t < 3; ++t)
    if (v + t < kw)
#pragma unroll
      for (int r = 0; r < kStrip; ++r) acc[r] = fused_multiply_add(taps[t], window[t + r], acc[r]);
}

// Any stride and dilation: output r of the thread lies `apart` inputs after output r - 1.
template <class A>
LK_DEVICE void slide_strided(A (&acc)[kStrip], const A* x, const A* w, int kw, int dil, int apart) {
  for (int v = 0; v < kw; ++v) {
    const A tap = w[v];
#pragma unroll
    for (int r = 0; r < kStrip; ++r) acc[r] = fused_multiply_add(tap, x[v * dil + r * apart], acc[r]);
  }
}

struct DirectTile {
  int64_t n;
  int c0, channels, y0, x0, rows, cols;  // outputs
};

// A chunk of taps, and the input window it needs: rows clipped to the image, columns not.
struct TapChunk {
  int u0, v0, kernel_h, kernel_w, weight_pitch;
  int pad_h, pad_w;  // of the convolution with this chunk alone
  Region window;
};

LK_DEVICE DirectTile direct_tile(const DirectForwardParams& p) {
  DirectTile t;
  int64_t b = blockIdx.x;
  // Neighbouring blocks share cache lines: along channels where those are contiguous, else along the plane.
  int group = 0;
  if (p.by_channels) group = int(b % p.channel_groups), b /= p.channel_groups;
  const int tx = int(b % p.tiles_x);
  b /= p.tiles_x;
  const int ty = int(b % p.tiles_y);
  b /= p.tiles_y;
  t.n = b % p.batch;
  if (!p.by_channels) group = int(b / p.batch);
  t.c0 = group * p.tile_channels;
  t.channels = min_int(p.tile_channels, p.channels - t.c0);
  t.y0 = ty * p.tile_h, t.x0 = tx * p.tile_w;
  t.rows = min_int(p.tile_h, p.out_height - t.y0), t.cols = min_int(p.tile_w, p.out_width - t.x0);
  return t;
}

LK_DEVICE TapChunk tap_chunk(const DirectForwardParams& p, const DirectTile& t, int u0, int v0) {
  TapChunk c;
  c.u0 = u0, c.v0 = v0;
  c.kernel_h = min_int(p.chunk_h, p.kernel_h - u0), c.kernel_w = min_int(p.chunk_w, p.kernel_w - v0);
  c.weight_pitch = (c.kernel_w + 3) / 4 * 4;
  c.pad_h = p.pad_h - u0 * p.dil_h, c.pad_w = p.pad_w - v0 * p.dil_w;
  const int first = t.y0 * p.stride_h - c.pad_h;
  const int end = min_int(p.height, first + (t.rows - 1) * p.stride_h + (c.kernel_h - 1) * p.dil_h + 1);
  c.window.row0 = max_int(0, first);
  c.window.rows = max_int(0, end - c.window.row0);
  c.window.col0 = t.x0 * p.stride_w - c.pad_w;
  c.window.cols = (t.cols - 1) * p.stride_w + (c.kernel_w - 1) * p.dil_w + 1;
  c.window.width = p.width;
  return c;
}

// Shared weights <- the chunk's taps of the block's kernels, rows padded to whole vectors.
template <class T, class A>
LK_DEVICE void stage_weights(A* shared, const DirectForwardParams& p, const DirectTile& t,
                             const TapChunk& chunk, int j) {
  const T* data = static_cast<const T*>(p.weight.data);
  const int count = t.channels * chunk.kernel_h * chunk.weight_pitch;
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
    const int v = i % chunk.weight_pitch, line = i / chunk.weight_pitch;
    const int u = line % chunk.kernel_h, ch = line / chunk.kernel_h;
    const int64_t channel = int64_t(t.c0 + ch) * p.channel_mul + j;
    shared[i] =
        v < chunk.kernel_w
            ? A(to_float(data[channel * p.weight.stride_c + int64_t(chunk.u0 + u) * p.weight.stride_h +
                              int64_t(chunk.v0 + v) * p.weight.stride_w]))
            : A(0);
  }
}

// The thread's strip: row y of channel ch, from the staged window.
template <class A, int KW>
LK_DEVICE void direct_strip(A (&acc)[kStrip], const DirectForwardParams& p, const DirectTile& t,
                            const TapChunk& chunk, const A* weights, const A* window, int ch, int y,
                            int strip) {
  const int top = (t.y0 + y) * p.stride_h - chunk.pad_h;  // input row of the chunk's first tap
  const int u0 = top >= 0 ? 0 : ceil_div_int(-top, p.dil_h);
  const int u1 = p.height - 1 - top < 0 ? 0 : min_int(chunk.kernel_h, (p.height - 1 - top) / p.dil_h + 1);
  const A* w = weights + (ch * chunk.kernel_h + u0) * chunk.weight_pitch;
  const A* x = window + ch * p.plane_pitch + (top + u0 * p.dil_h - chunk.window.row0) * p.row_pitch;
  const int down = p.dil_h * p.row_pitch;
  x += KW == kStrided ? strip * p.stride_w : strip * kStrip;
  for (int u = u0; u < u1; ++u, x += down, w += chunk.weight_pitch) {
    if constexpr (KW == kStrided)
      slide_strided(acc, x, w, chunk.kernel_w, p.dil_w, p.strips * p.stride_w);
    else if constexpr (KW == kAnyWidth)
      slide_any(acc, x, w, chunk.kernel_w);
    else
      slide_fixed<A, KW>(acc, x, w);
  }
}

// The thread's bias-added outputs -> shared memory, as planes of tile_h x (strips * kStrip).
template <class T, int KW, class A>
LK_DEVICE void spread_outputs(A* shared, const A (&acc)[kStrip], const DirectForwardParams& p,
                              const DirectTile& t, int ch, int y, int strip) {
  A bias = A(0);
  if (p.bias.data) bias = to_float(static_cast<const T*>(p.bias.data)[int64_t(t.c0 + ch) * p.bias.stride_c]);
  A* out = shared + (ch * p.tile_h + y) * p.strips * kStrip;
#pragma unroll
  for (int r = 0; r < kStrip; ++r)
    out[KW == kStrided ? strip + r * p.strips : strip * kStrip + r] = acc[r] + bias;
}

template <class T, int KW>
__global__ void __launch_bounds__(kDirectThreads, direct_blocks<T>)
    direct_forward(const __grid_constant__ DirectForwardParams p) {
  using A = accumulator_t<T>;
  A* weights = reinterpret_cast<A*>(dynamic_shared());
  A* window = weights + p.window_offset;
  const DirectTile t = direct_tile(p);
  const int tid = int(threadIdx.x);
  const int strip = tid % p.strips, y = tid / p.strips % p.tile_h, ch = tid / p.strips / p.tile_h;
  const bool active = y < t.rows && ch < t.channels;
  const PlaneSet planes{t.channels, 1, 1, p.plane_pitch, p.row_pitch};
  A acc[kStrip] = {};
  for (int j = 0; j < p.reduce; ++j)
    for (int u0 = 0; u0 < p.kernel_h; u0 += p.chunk_h)
      for (int v0 = 0; v0 < p.kernel_w; v0 += p.chunk_w) {
        const TapChunk chunk = tap_chunk(p, t, u0, v0);
        sync_block();  // the previous chunk is read no more
        stage_weights<T>(weights, p, t, chunk, j);
        const auto channel = [&](int i) { return int64_t((t.c0 + i) / p.channel_div) * p.channel_mul + j; };
        stage_planes<T>(window, planes, p.input, t.n, channel, chunk.window, p.by_channels, p.input_lanes);
        sync_block();
        if (active) direct_strip<A, KW>(acc, p, t, chunk, weights, window, ch, y, strip);
      }
  sync_block();  // the window is read no more: outputs take its place
  if (active) spread_outputs<T, KW>(window, acc, p, t, ch, y, strip);
  sync_block();
  const PlaneSet staged{t.channels, 1, 1, p.tile_h * p.strips * kStrip, p.strips * kStrip};
  store_planes<T>(window, staged, p.output, t.n, t.c0, {t.y0, t.rows, t.x0, t.cols, t.cols}, p.by_channels,
                  p.output_lanes);
}

}  // namespace lkconv::cuda
