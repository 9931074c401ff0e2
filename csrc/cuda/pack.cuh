// Copies a strided 4-D tensor to another with other strides, through a transposing tile in shared memory:
// brings channels_last tensors (and any other whose rows are not contiguous) into planes for the Toeplitz
// kernels, and their outputs back.
#pragma once

#include "tile_io.cuh"

namespace lkconv::cuda {

// A thread's elements of a tile, kPackThreads / kPackTile channels or pixels apart. Indices advance by
// additions, because a division by the width takes several times what moving an element takes.
struct PackWalk {
  int channel, pixel, x;  // within the tile; column
  int64_t at;             // element offset
  int step_channel, step_pixel, width;
  int64_t advance, wrap;

  LK_DEVICE PackWalk(const PackParams& p, const GlobalView& view, int64_t n, int c0, int64_t pixel0,
                     bool channels_fast) {
    constexpr int kStep = kPackThreads / kPackTile;
    const int fast = int(threadIdx.x) % kPackTile, slow = int(threadIdx.x) / kPackTile;
    channel = channels_fast ? fast : slow, pixel = channels_fast ? slow : fast;
    const int64_t first = pixel0 + pixel;
    const int y = p.few_pixels ? divided_by(int(first), p.by_width) : int(first / p.width);
    width = p.width, x = int(first - int64_t(y) * width);
    at = n * view.stride_n + int64_t(c0 + channel) * view.stride_c + y * view.stride_h + x * view.stride_w;
    step_channel = channels_fast ? 0 : kStep, step_pixel = channels_fast ? kStep : 0;
    advance = channels_fast ? kStep * view.stride_w : kStep * view.stride_c;
    wrap = view.stride_h - width * view.stride_w;
  }
  LK_DEVICE void next() {
    channel += step_channel, pixel += step_pixel, x += step_pixel, at += advance;
#pragma unroll 1
    while (x >= width) x -= width, at += wrap;
  }
};

// `U` is an unsigned integer as wide as an element: values are moved, never interpreted.
template <class U>
__global__ void __launch_bounds__(kPackThreads) pack(const __grid_constant__ PackParams p) {
  constexpr int kEach = kPackTile * kPackTile / kPackThreads;
  U* tile =
      reinterpret_cast<U*>(dynamic_shared());  // [channel][pixel], rows one element apart from a power of two
  const int block = int(blockIdx.x), rest = divided_by(block, p.by_channel_tiles);
  const int c0 = (block - rest * p.channel_tiles) * kPackTile, image = divided_by(rest, p.by_pixel_tiles);
  const int64_t pixel0 = int64_t(rest - image * p.pixel_tiles) * kPackTile;
  const int channels = p.channels - c0;
  const int64_t pixels = int64_t(p.height) * p.width - pixel0;
  PackWalk from(p, p.from, image, c0, pixel0, p.from_channels_fast);
  U value[kEach];
  int target[kEach];
#pragma unroll
  for (int k = 0; k < kEach; ++k, from.next()) {
    const bool inside = from.channel < channels && from.pixel < pixels;
    target[k] = inside ? from.channel * (kPackTile + 1) + from.pixel : -1;
    if (inside) value[k] = static_cast<const U*>(p.from.data)[from.at];
  }
#pragma unroll
  for (int k = 0; k < kEach; ++k)
    if (target[k] >= 0) tile[target[k]] = value[k];
  sync_block();
  PackWalk to(p, p.to, image, c0, pixel0, p.to_channels_fast);
#pragma unroll
  for (int k = 0; k < kEach; ++k, to.next())
    if (to.channel < channels && to.pixel < pixels)
      static_cast<U*>(p.to.data)[to.at] = tile[to.channel * (kPackTile + 1) + to.pixel];
}

}  // namespace lkconv::cuda
