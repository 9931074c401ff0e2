// Direct depthwise convolution: a block stages the input window of a tile in shared memory, in the type it
// accumulates in, and each thread computes strips of 8 outputs with a window that slides over the taps in
// registers. Forward, and backward_input as forward over a flipped kernel.
//
// Copies are vectors, so the window's first column is one of the image's that a vector may start at, up to 7
// before the first that is needed: the `lead`. Its multiple of 4 goes into addresses; the rest, the `shift`,
// into the indices of the registers that hold the window, and so it is a template argument.
#pragma once

#include "tile_io.cuh"

namespace lkconv::cuda {

// A constant rather than a call, which device code may not make.
template <int WidthClass>
constexpr bool kFixedWidth = is_fixed(WidthClass);

// Threads of a block, and blocks that share an SM. The latter are said aloud, because without it the compiler
// aims at more and spills. Fixed widths hold three rows of sums and taps, 24 registers each at a width of 7.
constexpr int direct_threads(int width_class) {
  return is_fixed(width_class) ? kFixedThreads : kDirectThreads;
}
template <class T>
constexpr int direct_blocks(int width_class) {
  if (sizeof(accumulator_t<T>) == 8) return 2;
  return is_fixed(width_class) ? (width_class < 7 ? 5 : 4) : 3;
}

template <class A>
LK_DEVICE void load4(A* to, const A* from) {
  const Vec4<A> four = *reinterpret_cast<const Vec4<A>*>(from);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = four.v[i];
}

// acc[r] += sum_v w[v] x[Shift + r + v]: four taps at a time, and the remaining ones apart, so that no input
// outside an output's window ever meets it, not even multiplied by zero.
template <int Shift, class A>
LK_DEVICE void slide_any(A (&acc)[kStrip], const A* x, const A* w, int kw) {
  constexpr int kHeld = (kStrip - 1 + Shift + 3) / 4 * 4;  // loaded before the first tap
  A window[kHeld + 4], taps[4];
#pragma unroll
  for (int i = 0; i < kHeld; i += 4) load4(window + i, x + i);
  int v = 0;
#pragma unroll 3
  for (; v + 4 <= kw; v += 4) {
    load4(window + kHeld, x + v + kHeld);
    load4(taps, w + v);
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int r = 0; r < kStrip; ++r) acc[r] = fused_multiply_add(taps[t], window[Shift + t + r], acc[r]);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) window[i] = window[i + 4];
  }
  if (v == kw) return;
  load4(window + kHeld, x + v + kHeld);
  load4(taps, w + v);
#pragma unroll
  for (int t = 0; t < 3; ++t)
    if (v + t < kw)
#pragma unroll
      for (int r = 0; r < kStrip; ++r) acc[r] = fused_multiply_add(taps[t], window[Shift + t + r], acc[r]);
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
  int n, images;                         // a block walks over these
  int c0, channels, y0, x0, rows, cols;  // outputs
};

// A chunk of taps, and the input window it needs: rows clipped to the image, columns not.
struct TapChunk {
  int u0, v0, kernel_h, kernel_w;
  int pad_h, pad_w;  // of the convolution with this chunk alone
  int row0, rows, col0, cols, lead;
};

LK_DEVICE DirectTile direct_tile(const DirectForwardParams& p) {
  DirectTile t;
  int b = int(blockIdx.x), group = 0, next;
  // Neighbouring blocks share cache lines: along channels where those are contiguous, else along the plane.
  if (p.by_channels) next = divided_by(b, p.by_channel_groups), group = b - next * p.channel_groups, b = next;
  next = divided_by(b, p.by_tiles_x);
  t.x0 = (b - next * p.tiles_x) * p.tile_w, b = next;
  next = divided_by(b, p.by_tiles_y);
  t.y0 = (b - next * p.tiles_y) * p.tile_h, b = next;
  next = divided_by(b, p.by_image_groups);
  t.n = (b - next * p.image_groups) * p.images_per_block;
  if (!p.by_channels) group = next;
  t.images = min_int(p.images_per_block, p.batch - t.n);
  t.c0 = group * p.tile_channels;
  t.channels = min_int(p.tile_channels, p.channels - t.c0);
  t.rows = min_int(p.tile_h, p.out_height - t.y0), t.cols = min_int(p.tile_w, p.out_width - t.x0);
  return t;
}

LK_DEVICE TapChunk tap_chunk(const DirectForwardParams& p, const DirectTile& t, int u0, int v0) {
  TapChunk c;
  c.u0 = u0, c.v0 = v0;
  c.kernel_h = min_int(p.chunk_h, p.kernel_h - u0), c.kernel_w = min_int(p.chunk_w, p.kernel_w - v0);
  c.pad_h = p.pad_h - u0 * p.dil_h, c.pad_w = p.pad_w - v0 * p.dil_w;
  const int first = t.y0 * p.stride_h - c.pad_h;
  const int end = min_int(p.height, first + (t.rows - 1) * p.stride_h + (c.kernel_h - 1) * p.dil_h + 1);
  c.row0 = max_int(0, first);
  c.rows = max_int(0, end - c.row0);
  const int needed = t.x0 * p.stride_w - c.pad_w;
  c.lead = needed & (p.align - 1);
  c.col0 = needed - c.lead;
  c.cols = c.lead + (t.cols - 1) * p.stride_w + (c.kernel_w - 1) * p.dil_w + 1;
  return c;
}

// Shared weights <- the chunk's taps of the block's kernels, rows padded to whole vectors.
template <class T, class A>
LK_DEVICE void stage_weights(A* shared, const DirectForwardParams& p, const DirectTile& t,
                             const TapChunk& chunk, int j) {
  const T* data = static_cast<const T*>(p.weight.data);
  const int count = t.channels * p.chunk_h * p.weight_pitch;
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
    const int line = divided_by(i, p.by_weight_pitch), v = i - line * p.weight_pitch;
    const int ch = divided_by(line, p.by_chunk_h), u = line - ch * p.chunk_h;
    const int64_t channel = int64_t(t.c0 + ch) * p.channel_mul + j;
    shared[i] =
        u < chunk.kernel_h && v < chunk.kernel_w
            ? A(to_float(data[channel * p.weight.stride_c + int64_t(chunk.u0 + u) * p.weight.stride_h +
                              int64_t(chunk.v0 + v) * p.weight.stride_w]))
            : A(0);
  }
}

// Shared window <- what the chunk needs of image n.
template <class T, class A>
LK_DEVICE void stage_window(A* window, const DirectForwardParams& p, const DirectTile& t,
                            const TapChunk& chunk, int n, int j) {
  const GlobalView& in = p.input;
  const T* image = static_cast<const T*>(in.data) + n * in.stride_n + j * in.stride_c;
  WindowShape shape{1, chunk.rows, chunk.cols, p.plane_pitch, p.row_pitch};
  WindowSource source{image, 0, in.stride_h, in.stride_w, chunk.row0, chunk.col0, p.width};
  if (p.by_channels) {
    const auto offset = [&](int ch) {
      return int64_t(divided_by(t.c0 + ch, p.by_channel_div)) * p.channel_mul * in.stride_c;
    };
    stage_channels<T>(window, shape, source, t.channels, p.plane_pitch, p.input_lanes, chunk.lead, offset);
    return;
  }
  source.plane = image + int64_t(divided_by(t.c0, p.by_channel_div)) * p.channel_mul * in.stride_c;
  source.stride_n = p.channel_mul * in.stride_c;
  shape.images = ceil_divided_by(t.channels, p.by_channel_div);
  stage_rows<T>(window, shape, source, p.walk, chunk.lead);
}

// Where a strip of outputs lies: row `y` of channel `ch` on, strip of columns.
struct DirectStrip {
  int ch, y, strip;
};

// The block's strips are numbered columns first. `Rows`: of one strip.
template <int Rows>
LK_DEVICE DirectStrip direct_strip(const DirectForwardParams& p, int index) {
  const int line = divided_by(index, p.by_strips), ch = divided_by(line, p.by_row_groups);
  return {ch, (line - ch * p.row_groups) * Rows, index - line * p.strips};
}

// One row of outputs, any kernel width.
template <int Shift, class A>
LK_DEVICE void sum_rows_any(A (&acc)[kStrip], const A* x, const A* w, int rows, int down, int weight_pitch,
                            int kw) {
  for (int u = 0; u < rows; ++u, x += down, w += weight_pitch) slide_any<Shift>(acc, x, w, kw);
}

template <class A, bool Strided>
LK_DEVICE void sum_any(A (&acc)[1][kStrip], const DirectForwardParams& p, const DirectTile& t,
                       const TapChunk& chunk, const A* weights, const A* window, const DirectStrip& at) {
  const int top = (t.y0 + at.y) * p.stride_h - chunk.pad_h;  // input row of the chunk's first tap
  const int u0 = ceil_divided_by(max_int(0, -top), p.by_dil_h), below = p.height - 1 - top;
  const int u1 = below < 0 ? 0 : min_int(chunk.kernel_h, divided_by(below, p.by_dil_h) + 1);
  const int plane = p.by_channels ? at.ch : divided_by(at.ch, p.by_channel_div);
  const A* w = weights + (at.ch * p.chunk_h + u0) * p.weight_pitch;
  const A* x = window + plane * p.plane_pitch + (top + u0 * p.dil_h - chunk.row0) * p.row_pitch;
  const int down = p.dil_h * p.row_pitch, rows = u1 - u0;
  if constexpr (Strided) {
    x += chunk.lead + at.strip * p.stride_w;
    for (int u = 0; u < rows; ++u, x += down, w += p.weight_pitch)
      slide_strided(acc[0], x, w, chunk.kernel_w, p.dil_w, p.strips * p.stride_w);
  } else {
    x += chunk.lead / 4 * 4 + at.strip * kStrip;
    switch (chunk.lead % 4) {
      case 0:
        return sum_rows_any<0>(acc[0], x, w, rows, down, p.weight_pitch, chunk.kernel_w);
      case 1:
        return sum_rows_any<1>(acc[0], x, w, rows, down, p.weight_pitch, chunk.kernel_w);
      case 2:
        return sum_rows_any<2>(acc[0], x, w, rows, down, p.weight_pitch, chunk.kernel_w);
      default:
        return sum_rows_any<3>(acc[0], x, w, rows, down, p.weight_pitch, chunk.kernel_w);
    }
  }
}

// acc[q] += the input row times kernel row `taps`, both in registers.
template <class A, int KW, int Shift, int Inputs, int Weights>
LK_DEVICE void slide_fixed(A (&acc)[kStrip], const A (&window)[Inputs], const A (&taps)[Weights]) {
#pragma unroll
  for (int v = 0; v < KW; ++v)
#pragma unroll
    for (int r = 0; r < kStrip; ++r) acc[r] = fused_multiply_add(taps[v], window[Shift + v + r], acc[r]);
}

// One row of inputs, in registers, and the kernel rows that meet it: kernel row `u - q` for output row q.
// `taps` holds the last kFixedRows kernel rows in turns; `inside` tells whether a kernel row exists.
template <int KW, int Shift, class A, int Weights, class Inside>
LK_DEVICE void sum_input_row(A (&acc)[kFixedRows][kStrip], const A* x, const A (&taps)[kFixedRows][Weights],
                             int turn, Inside inside) {
  constexpr int kInputs = (Shift + KW + kStrip - 1 + 3) / 4 * 4;
  A inputs[kInputs];
#pragma unroll
  for (int c = 0; c < kInputs; c += 4) load4(inputs + c, x + c);
#pragma unroll
  for (int q = 0; q < kFixedRows; ++q)
    if (inside(q))
#pragma unroll
      for (int v = 0; v < KW; ++v)
#pragma unroll
        for (int r = 0; r < kStrip; ++r)
          acc[q][r] = fused_multiply_add(taps[(turn - q + kFixedRows) % kFixedRows][v], inputs[Shift + v + r],
                                         acc[q][r]);
}

// A strip of kFixedRows rows of a kernel of known width, stride and dilation 1, padded as for "same". Inputs
// pass through registers once, and so do taps. Kernels as high as wide are unrolled whole.
template <class A, int KW>
LK_DEVICE void sum_fixed(A (&acc)[kFixedRows][kStrip], const DirectForwardParams& p, const DirectTile& t,
                         const TapChunk& chunk, const A* weights, const A* window, const DirectStrip& at) {
  constexpr int kShift = (4 - KW / 2 % 4) % 4, kWeights = (KW + 3) / 4 * 4;
  const int plane = p.by_channels ? at.ch : divided_by(at.ch, p.by_channel_div);
  const int row = t.y0 + at.y - chunk.pad_h - chunk.row0;  // in the window
  const A* w = weights + at.ch * p.chunk_h * p.weight_pitch;
  const A* x = window + plane * p.plane_pitch + row * p.row_pitch + chunk.lead / 4 * 4 + at.strip * kStrip;
  A taps[kFixedRows][kWeights];
  const auto load_taps = [&](int turn, int u) {
#pragma unroll
    for (int v = 0; v < kWeights; v += 4) load4(taps[turn] + v, w + u * p.weight_pitch + v);
  };
  if (KW < 7 && p.kernel_h == KW) {
#pragma unroll
    for (int u = 0; u < KW + kFixedRows - 1; ++u, x += p.row_pitch) {
      if (u < KW) load_taps(u % kFixedRows, u);
      if (unsigned(row + u) < unsigned(chunk.rows))
        sum_input_row<KW, kShift>(acc, x, taps, u % kFixedRows, [&](int q) { return u >= q && u - q < KW; });
    }
    return;
  }
#pragma unroll 1
  for (int u = 0; u < p.kernel_h + kFixedRows - 1; u += kFixedRows)
#pragma unroll
    for (int i = 0; i < kFixedRows; ++i, x += p.row_pitch) {
      if (u + i < p.kernel_h) load_taps(i, u + i);
      if (unsigned(row + u + i) < unsigned(chunk.rows))
        sum_input_row<KW, kShift>(acc, x, taps, i,
                                  [&](int q) { return unsigned(u + i - q) < unsigned(p.kernel_h); });
    }
}

// The same at a stride of 2 for kernels of 3x3: 7 rows of inputs, 17 columns each, for 3 rows of outputs.
template <class A>
LK_DEVICE void sum_stride2(A (&acc)[kFixedRows][kStrip], const DirectForwardParams& p, const DirectTile& t,
                           const TapChunk& chunk, const A* weights, const A* window, const DirectStrip& at) {
  constexpr int kWidth = 3, kShift = 3, kInputs = kShift + 2 * (kStrip - 1) + kWidth;
  const int plane = p.by_channels ? at.ch : divided_by(at.ch, p.by_channel_div);
  const int row = 2 * (t.y0 + at.y) - chunk.pad_h - chunk.row0;  // in the window
  const A* w = weights + at.ch * kWidth * p.weight_pitch;
  const A* x =
      window + plane * p.plane_pitch + row * p.row_pitch + chunk.lead / 4 * 4 + at.strip * 2 * kStrip;
  A taps[kWidth][4];
#pragma unroll
  for (int u = 0; u < kWidth; ++u) load4(taps[u], w + u * p.weight_pitch);
#pragma unroll
  for (int u = 0; u < 2 * (kFixedRows - 1) + kWidth; ++u, x += p.row_pitch) {
    if (unsigned(row + u) >= unsigned(chunk.rows)) continue;
    A inputs[kInputs];
#pragma unroll
    for (int c = 0; c < kInputs; c += 4) load4(inputs + c, x + c);
#pragma unroll
    for (int q = 0; q < kFixedRows; ++q)
      if (u >= 2 * q && u - 2 * q < kWidth)
#pragma unroll
        for (int v = 0; v < kWidth; ++v)
#pragma unroll
          for (int r = 0; r < kStrip; ++r)
            acc[q][r] = fused_multiply_add(taps[u - 2 * q][v], inputs[kShift + v + 2 * r], acc[q][r]);
  }
}

// Outputs of one row from registers, `Bytes` a store; `left` columns are inside.
template <int Bytes, class T, class A>
LK_DEVICE void store_strip(T* out, const A (&acc)[kStrip], A bias, int left) {
  constexpr int kPart = Bytes / int(sizeof(T));
#pragma unroll
  for (int r = 0; r < kStrip; r += kPart) {
    Elements<T, kPart> part;
#pragma unroll
    for (int i = 0; i < kPart; ++i) from_float(acc[r + i] + bias, part.v[i]);
    if (r < left) *reinterpret_cast<Elements<T, kPart>*>(out + r) = part;
  }
}

// The thread's outputs, from registers.
template <class T, int Rows, class A>
LK_DEVICE void store_strips(const A (&acc)[Rows][kStrip], const DirectForwardParams& p, const DirectTile& t,
                            const DirectStrip& at, A bias, int n) {
  const GlobalView& to = p.output;
  const int left = t.cols - at.strip * kStrip;
  T* out = static_cast<T*>(to.data) + n * to.stride_n + int64_t(t.c0 + at.ch) * to.stride_c +
           int64_t(t.y0 + at.y) * to.stride_h + t.x0 + at.strip * kStrip;
#pragma unroll
  for (int q = 0; q < Rows; ++q, out += to.stride_h) {
    if (at.y + q >= t.rows) break;
    if (p.store_bytes == 16)
      store_strip<16>(out, acc[q], bias, left);
    else
      store_strip<8>(out, acc[q], bias, left);
  }
}

// The strip's outputs -> shared memory, as planes of tile_h x (strips * kStrip).
template <int KW, int Rows, class A>
LK_DEVICE void spread_outputs(A* shared, const A (&acc)[Rows][kStrip], const DirectForwardParams& p,
                              const DirectTile& t, const DirectStrip& at, A bias) {
  const int row_pitch = p.strips * kStrip;
  A* out = shared + (at.ch * p.tile_h + at.y) * row_pitch + at.strip * (KW == kStrided ? 1 : kStrip);
#pragma unroll
  for (int q = 0; q < Rows; ++q)
    if (at.y + q < t.rows)
#pragma unroll
      for (int r = 0; r < kStrip; ++r)
        out[q * row_pitch + r * (KW == kStrided ? p.strips : 1)] = acc[q][r] + bias;
}

// Outputs of image n <- what spread_outputs left.
template <class T, class A>
LK_DEVICE void store_spread(const A* shared, const DirectForwardParams& p, const DirectTile& t, int n) {
  const GlobalView& to = p.output;
  const int row_pitch = p.strips * kStrip, plane_pitch = p.tile_h * row_pitch;
  T* image = static_cast<T*>(to.data) + n * to.stride_n;
  const OutputTile<T> tile{
      image + t.c0 * to.stride_c + int64_t(t.y0) * to.stride_h + int64_t(t.x0) * to.stride_w,
      to.stride_c,
      to.stride_h,
      to.stride_w,
      t.channels,
      t.rows,
      t.cols};
  if (p.by_channels)
    store_by_channels(shared, tile, plane_pitch, row_pitch, p.output_lanes);
  else
    store_by_rows(shared, tile, plane_pitch, row_pitch, p.output_lanes);
}

template <class T>
LK_DEVICE accumulator_t<T> bias_of(const DirectForwardParams& p, int channel) {
  if (!p.bias.data) return 0;
  return to_float(static_cast<const T*>(p.bias.data)[int64_t(channel) * p.bias.stride_c]);
}

// Fixed widths: one chunk holds all taps, and a thread computes one strip after the other, so that there are
// more elements to a thread than strips to a block.
template <class T, int KW, class A>
LK_DEVICE void run_fixed(A* shared, const DirectForwardParams& p, const DirectTile& t) {
  A *window = shared + p.window_offset, *outputs = shared + p.output_offset;
  const TapChunk chunk = tap_chunk(p, t, 0, 0);
  const int strips = t.channels * p.row_groups * p.strips;
  stage_weights<T>(shared, p, t, chunk, 0);
  for (int n = t.n; n < t.n + t.images; ++n) {
    stage_window<T>(window, p, t, chunk, n, 0);
    sync_block();
#pragma unroll 1
    for (int i = int(threadIdx.x); i < strips; i += int(blockDim.x)) {
      const DirectStrip at = direct_strip<kFixedRows>(p, i);
      if (at.y >= t.rows) continue;
      A acc[kFixedRows][kStrip] = {};
      if constexpr (KW == kThreeStride2)
        sum_stride2(acc, p, t, chunk, shared, window, at);
      else
        sum_fixed<A, KW>(acc, p, t, chunk, shared, window, at);
      const A bias = bias_of<T>(p, t.c0 + at.ch);
      if (p.store_bytes)
        store_strips<T>(acc, p, t, at, bias, n);
      else
        spread_outputs<KW>(outputs, acc, p, t, at, bias);
    }
    sync_block();  // the window is read no more, and outputs are complete
    if (!p.store_bytes) store_spread<T>(outputs, p, t, n);
  }
}

template <class T, bool Strided, class A>
LK_DEVICE void run_any(A* shared, const DirectForwardParams& p, const DirectTile& t) {
  A* window = shared + p.window_offset;
  const DirectStrip at = direct_strip<1>(p, int(threadIdx.x));
  const bool active = at.y < t.rows && at.ch < t.channels;
  for (int n = t.n; n < t.n + t.images; ++n) {
    A acc[1][kStrip] = {};
    for (int j = 0; j < p.reduce; ++j)
      for (int u0 = 0; u0 < p.kernel_h; u0 += p.chunk_h)
        for (int v0 = 0; v0 < p.kernel_w; v0 += p.chunk_w) {
          const TapChunk chunk = tap_chunk(p, t, u0, v0);
          sync_block();  // the previous chunk, or image, is read no more
          if (n == t.n || !p.one_chunk) stage_weights<T>(shared, p, t, chunk, j);
          stage_window<T>(window, p, t, chunk, n, j);
          sync_block();
          if (active) sum_any<A, Strided>(acc, p, t, chunk, shared, window, at);
        }
    const A bias = active ? bias_of<T>(p, t.c0 + at.ch) : A(0);
    if (!Strided && p.store_bytes) {
      if (active) store_strips<T>(acc, p, t, at, bias, n);
      continue;
    }
    sync_block();  // the window is read no more: outputs take its place
    if (active) spread_outputs<Strided ? int(kStrided) : int(kAnyWidth)>(window, acc, p, t, at, bias);
    sync_block();
    store_spread<T>(window, p, t, n);
  }
}

template <class T, int KW>
__global__ void __launch_bounds__(direct_threads(KW), direct_blocks<T>(KW))
    direct_forward(const __grid_constant__ DirectForwardParams p) {
  auto* shared = reinterpret_cast<accumulator_t<T>*>(dynamic_shared());  // weights, the window, outputs
  const DirectTile t = direct_tile(p);
  if constexpr (kFixedWidth<KW>)
    run_fixed<T, KW>(shared, p, t);
  else
    run_any<T, KW == kStrided>(shared, p, t);
}

}  // namespace lkconv::cuda
