// Direct weight gradient. A block keeps the gradients of one chunk of taps in registers - 8 neighbouring taps
// of one kernel row per thread - while it walks over its share of the images. Threads that own the same taps
// take different rows; their sums are added in a fixed order, and so are the shares of the blocks
// (reduce_splits): no atomics, bit-identical runs.
#pragma once

#include "direct.cuh"

namespace lkconv::cuda {

template <class A>
LK_DEVICE void correlate_unit(A (&acc)[kStrip], const A* x, const A* g, int cols) {
  A window[kStrip + 4], grad[4];
  load4(window, x);
  load4(window + 4, x + 4);
  int i = 0;
#pragma unroll 3
  for (; i + 4 <= cols; i += 4) {
    load4(window + 8, x + i + 8);
    load4(grad, g + i);
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int r = 0; r < kStrip; ++r) acc[r] = fused_multiply_add(grad[t], window[t + r], acc[r]);
#pragma unroll
    for (int k = 0; k < kStrip; ++k) window[k] = window[k + 4];
  }
  if (i == cols) return;
  load4(window + 8, x + i + 8);
  load4(grad, g + i);
#pragma unroll
  for (int t = 0; t < 3; ++t)
    if (i + t < cols)
#pragma unroll
      for (int r = 0; r < kStrip; ++r) acc[r] = fused_multiply_add(grad[t], window[t + r], acc[r]);
}

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
  const int per_row = ceil_div_int(p.kernel_w, kStrip);
  const int h = chunk / p.chunks_w * p.chunk_rows, w = chunk % p.chunks_w * p.chunk_groups;
  return {h, min_int(p.chunk_rows, p.kernel_h - h), w * kStrip, min_int(p.chunk_groups, per_row - w)};
}

struct WeightTile {
  int64_t n0;
  int images, y0, x0, rows, cols;
  Region window;
};

LK_DEVICE WeightTile weight_tile(const DirectWeightParams& p, int index, const TapBlock& taps) {
  WeightTile t;
  t.x0 = index % p.tiles_x * p.tile_w;
  index /= p.tiles_x;
  t.y0 = index % p.tiles_y * p.tile_h;
  t.n0 = int64_t(index / p.tiles_y) * p.tile_images;
  t.images = min_int(p.tile_images, int(p.batch - t.n0));
  t.rows = min_int(p.tile_h, p.out_height - t.y0), t.cols = min_int(p.tile_w, p.out_width - t.x0);
  const int first = t.y0 * p.stride_h - p.pad_h + taps.u0 * p.dil_h;
  const int last = first + (t.rows - 1) * p.stride_h + (taps.rows - 1) * p.dil_h;
  t.window.row0 = max_int(0, first);
  t.window.rows = max_int(0, min_int(p.height - 1, last) - t.window.row0 + 1);
  t.window.col0 = t.x0 * p.stride_w - p.pad_w + taps.v0 * p.dil_w;
  t.window.cols = (t.cols - 1) * p.stride_w + (taps.groups * kStrip - 1) * p.dil_w + 1;
  t.window.width = p.width;
  return t;
}

// Adds one staged tile to the thread's taps.
template <class A, bool Unit>
LK_DEVICE void correlate_tile(A (&acc)[kStrip], const DirectWeightParams& p, const WeightTile& t,
                              const A* window, const A* grad, int ch, int u, int v, int worker) {
  for (int i = worker; i < t.images * t.rows; i += p.row_workers) {
    const int image = i / t.rows, y = i - image * t.rows;
    const int iy = (t.y0 + y) * p.stride_h - p.pad_h + u * p.dil_h;
    if (iy < 0 || iy >= p.height) continue;
    const int plane = ch * p.tile_images + image;
    const A* x = window + plane * p.plane_pitch + (iy - t.window.row0) * p.row_pitch + v * p.dil_w;
    const A* g = grad + plane * p.grad_plane + y * p.grad_pitch;
    if constexpr (Unit)
      correlate_unit(acc, x, g, t.cols);
    else
      correlate_strided(acc, x, g, t.cols, p.stride_w, p.dil_w);
  }
}

template <class T, bool Unit>
__global__ void __launch_bounds__(kDirectThreads, direct_blocks<T>)
    direct_weight(const __grid_constant__ DirectWeightParams p) {
  using A = accumulator_t<T>;
  A* window = reinterpret_cast<A*>(dynamic_shared());
  A* grad = window + p.grad_offset;
  int64_t b = blockIdx.x;
  const int split = int(b % p.splits);
  b /= p.splits;
  const TapBlock taps = tap_block(p, int(b % (p.chunks_h * p.chunks_w)));
  const int c0 = int(b / (p.chunks_h * p.chunks_w)) * p.tile_channels;
  const int channels = min_int(p.tile_channels, p.channels - c0);
  const int tid = int(threadIdx.x), owned = p.chunk_rows * p.chunk_groups;
  const int group = tid % p.chunk_groups, u = tid / p.chunk_groups % p.chunk_rows;
  const int worker = tid / owned % p.row_workers, ch = tid / owned / p.row_workers;
  const bool active = group < taps.groups && u < taps.rows && ch < channels;
  const auto input_channel = [&](int i) { return int64_t((c0 + i) / p.channel_div); };
  const auto output_channel = [&](int i) { return int64_t(c0 + i); };
  A acc[kStrip] = {};
  const int tiles = p.tiles_n * p.tiles_y * p.tiles_x;
  const int end = min_int(tiles, (split + 1) * p.tiles_per_split);
  for (int i = split * p.tiles_per_split; i < end; ++i) {
    const WeightTile t = weight_tile(p, i, taps);
    const PlaneSet in{channels, t.images, p.tile_images, p.plane_pitch, p.row_pitch};
    const PlaneSet out{channels, t.images, p.tile_images, p.grad_plane, p.grad_pitch};
    sync_block();
    stage_planes<T>(window, in, p.input, t.n0, input_channel, t.window, p.by_channels, p.input_lanes);
    stage_planes<T>(grad, out, p.grad_output, t.n0, output_channel, {t.y0, t.rows, t.x0, t.cols, p.out_width},
                    p.by_channels, p.output_lanes);
    sync_block();
    if (active) correlate_tile<A, Unit>(acc, p, t, window, grad, ch, taps.u0 + u, group * kStrip, worker);
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
