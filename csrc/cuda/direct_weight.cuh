// Direct weight gradient. A block keeps the gradients of one chunk of taps in registers - 8 neighbouring taps
// of one kernel row per thread - while it walks over its share of the images. Threads that own the same taps
// take different rows; their sums are added in a fixed order, and so are the shares of the blocks
// (reduce_splits): no atomics, bit-identical runs.
#pragma once

#include "direct.cuh"

namespace lkconv::cuda {

template <class A>
LK_DEVICE void correlate_strided(A (&acc)[kStrip], const A* x, const A* g, int cols, int stride, int dil) {
  for (int i = 0; i < cols; ++i) {
    const A grad = g[i];
#pragma unroll
    for (int r = 0; r < kStrip; ++r) acc[r] = fused_multiply_add(grad, x[i * stride + r * dil], acc[r]);
  }
}

// The taps a block owns: rows [u0, u0 + rows), groups of kStrip taps from v0 on.
struct TapBlock {
  int u0, rows, v0, groups;
};

LK_DEVICE TapBlock tap_block(const DirectWeightParams& p, int chunk) {
  const int per_row = (p.kernel_w + kStrip - 1) / kStrip, row = divided_by(chunk, p.by_chunks_w);
  const int h = row * p.chunk_rows, w = (chunk - row * p.chunks_w) * p.chunk_groups;
  return {h, min_int(p.chunk_rows, p.kernel_h - h), w * kStrip, min_int(p.chunk_groups, per_row - w)};
}

struct WeightTile {
  int64_t n0;
  int images, y0, x0, rows, cols;
  int window_row0, window_rows, window_col0, window_cols, lead;  // see TapChunk
};

LK_DEVICE WeightTile weight_tile(const DirectWeightParams& p, int index, const TapBlock& taps) {
  WeightTile t;
  const int line = divided_by(index, p.by_tiles_x), tile_n = divided_by(line, p.by_tiles_y);
  t.x0 = (index - line * p.tiles_x) * p.tile_w;
  t.y0 = (line - tile_n * p.tiles_y) * p.tile_h;
  t.n0 = int64_t(tile_n) * p.tile_images;
  t.images = min_int(p.tile_images, int(p.batch - t.n0));
  t.rows = min_int(p.tile_h, p.out_height - t.y0), t.cols = min_int(p.tile_w, p.out_width - t.x0);
  const int first = t.y0 * p.stride_h - p.pad_h + taps.u0 * p.dil_h;
  const int last = first + (t.rows - 1) * p.stride_h + (taps.rows - 1) * p.dil_h;
  t.window_row0 = max_int(0, first);
  t.window_rows = max_int(0, min_int(p.height - 1, last) - t.window_row0 + 1);
  const int needed = t.x0 * p.stride_w - p.pad_w + taps.v0 * p.dil_w;
  t.lead = needed & (p.align - 1);
  t.window_col0 = needed - t.lead;
  t.window_cols = t.lead + (t.cols - 1) * p.stride_w + (taps.groups * kStrip - 1) * p.dil_w + 1;
  return t;
}

// Adds one staged tile to the thread's taps. Shift: see direct.cuh; kStrided for other strides and dilations.
template <int Shift, class A>
LK_DEVICE void correlate_rows(A (&acc)[kStrip], const DirectWeightParams& p, const WeightTile& t,
                              const A* window, const A* grad, int ch, int u, int v, int worker) {
  const int in = t.lead / 4 * 4 + v * p.dil_w;
  for (int i = worker; i < t.images * t.rows; i += p.row_workers) {
    const int image = divided_by(i, t.rows == p.tile_h ? p.by_rows : p.by_last_rows), y = i - image * t.rows;
    const int iy = (t.y0 + y) * p.stride_h - p.pad_h + u * p.dil_h;
    if (iy < 0 || iy >= p.height) continue;
    const int plane = ch * p.tile_images + image;
    const A* x = window + plane * p.plane_pitch + (iy - t.window_row0) * p.row_pitch + in;
    const A* g = grad + plane * p.grad_plane + y * p.grad_pitch;
    if constexpr (Shift == kStrided)
      correlate_strided(acc, x + t.lead % 4, g, t.cols, p.stride_w, p.dil_w);
    else
      slide_any<Shift>(acc, x, g, t.cols);
  }
}

template <bool Unit, class A>
LK_DEVICE void correlate_tile(A (&acc)[kStrip], const DirectWeightParams& p, const WeightTile& t,
                              const A* window, const A* grad, int ch, int u, int v, int worker) {
  if constexpr (!Unit) return correlate_rows<kStrided>(acc, p, t, window, grad, ch, u, v, worker);
  switch (t.lead % 4) {
    case 0:
      return correlate_rows<0>(acc, p, t, window, grad, ch, u, v, worker);
    case 1:
      return correlate_rows<1>(acc, p, t, window, grad, ch, u, v, worker);
    case 2:
      return correlate_rows<2>(acc, p, t, window, grad, ch, u, v, worker);
    default:
      return correlate_rows<3>(acc, p, t, window, grad, ch, u, v, worker);
  }
}

// Shared window and gradients <- what the tile needs of channels c0 on.
template <class T, class A>
LK_DEVICE void stage_tile(A* window, A* grad, const DirectWeightParams& p, const WeightTile& t, int c0,
                          int channels) {
  const GlobalView &in = p.input, &out = p.grad_output;
  const WindowShape shape{t.images, t.window_rows, t.window_cols, p.plane_pitch, p.row_pitch};
  const WindowShape grad_shape{t.images, t.rows, t.cols, p.grad_plane, p.grad_pitch};
  WindowSource source{static_cast<const T*>(in.data) + t.n0 * in.stride_n,
                      in.stride_n,
                      in.stride_h,
                      in.stride_w,
                      t.window_row0,
                      t.window_col0,
                      p.width};
  const T* grad_data = static_cast<const T*>(out.data) + t.n0 * out.stride_n + c0 * out.stride_c;
  const WindowSource grad_source{
      grad_data + t.x0 * out.stride_w, out.stride_n, out.stride_h, out.stride_w, t.y0, 0, t.cols};
  if (p.by_channels) {
    const auto offset = [&](int ch) { return int64_t(divided_by(c0 + ch, p.by_channel_div)) * in.stride_c; };
    stage_channels<T>(window, shape, source, channels, p.tile_images * p.plane_pitch, p.input_lanes, t.lead,
                      offset);
    stage_channels<T>(grad, grad_shape, grad_source, channels, p.tile_images * p.grad_plane, p.output_lanes,
                      0, [&](int ch) { return ch * out.stride_c; });
    return;
  }
  source.plane = static_cast<const T*>(source.plane) + divided_by(c0, p.by_channel_div) * in.stride_c;
  stage_rows<T>(window, shape, source, p.walk, t.lead);
  stage_rows<T>(grad, grad_shape, grad_source, p.grad_walk, 0);
}

template <class T, bool Unit>
__global__ void __launch_bounds__(kDirectThreads, direct_blocks<T>(kAnyWidth))
    direct_weight(const __grid_constant__ DirectWeightParams p) {
  using A = accumulator_t<T>;
  A* window = reinterpret_cast<A*>(dynamic_shared());
  A* grad = window + p.grad_offset;
  const int rest = divided_by(int(blockIdx.x), p.by_splits), split = int(blockIdx.x) - rest * p.splits;
  const int channel_group = divided_by(rest, p.by_chunks);
  const TapBlock taps = tap_block(p, rest - channel_group * p.chunks_h * p.chunks_w);
  const int c0 = channel_group * p.tile_channels;
  const int channels = min_int(p.tile_channels, p.channels - c0);
  const int tid = int(threadIdx.x), owned = p.chunk_rows * p.chunk_groups;
  const int line = divided_by(tid, p.by_chunk_groups), group = tid - line * p.chunk_groups;
  const int part = divided_by(line, p.by_chunk_rows), u = line - part * p.chunk_rows;
  const int ch = divided_by(part, p.by_row_workers), worker = part - ch * p.row_workers;
  const bool active = group < taps.groups && u < taps.rows && ch < channels;
  A acc[kStrip] = {};
  const int tiles = p.tiles_n * p.tiles_y * p.tiles_x;
  const int end = min_int(tiles, (split + 1) * p.tiles_per_split);
  for (int i = split * p.tiles_per_split; i < end; ++i) {
    const WeightTile t = weight_tile(p, i, taps);
    sync_block();
    stage_tile<T>(window, grad, p, t, c0, channels);
    sync_block();
    if (active) correlate_tile<Unit>(acc, p, t, window, grad, ch, taps.u0 + u, group * kStrip, worker);
  }
  sync_block();
  // Workers of a group, in order.
  A* sums = window + tid * (kStrip + 1);
#pragma unroll
  for (int r = 0; r < kStrip; ++r) sums[r] = acc[r];
  sync_block();
  if (!active || worker != 0) return;
  A* partial = static_cast<A*>(p.partial) +
               ((int64_t(split) * p.channels + c0 + ch) * p.kernel_h + taps.u0 + u) * p.kernel_w;
#pragma unroll
  for (int r = 0; r < kStrip; ++r) {
    A sum = A(0);
    for (int w = 0; w < p.row_workers; ++w) sum += sums[w * owned * (kStrip + 1) + r];
    const int v = taps.v0 + group * kStrip + r;
    if (v < p.kernel_w) partial[v] = sum;
  }
}

// grad_weight <- sum of the splits, in order: one thread per weight.
template <class T>
__global__ void __launch_bounds__(kDirectThreads)
    reduce_splits(const __grid_constant__ ReduceSplitsParams p) {
  using A = accumulator_t<T>;
  const int64_t count = int64_t(p.channels) * p.kernel_h * p.kernel_w;
  const int64_t i = int64_t(blockIdx.x) * kDirectThreads + threadIdx.x;
  if (i >= count) return;
  const A* partial = static_cast<const A*>(p.partial) + i;
  A sum = A(0);
  for (int s = 0; s < p.splits; ++s) sum += partial[s * count];
  const int v = int(i % p.kernel_w), u = int(i / p.kernel_w % p.kernel_h);
  const int64_t c = i / p.kernel_w / p.kernel_h;
  from_float(sum,
             static_cast<T*>(p.grad_weight.data)[c * p.grad_weight.stride_c + u * p.grad_weight.stride_h +
                                                 v * p.grad_weight.stride_w]);
}

}  // namespace lkconv::cuda
