// Copies a strided 4-D tensor to another with other strides, through a transposing tile in shared memory:
// brings channels_last tensors (and any other whose rows are not contiguous) into planes for the Toeplitz
// kernels, and their outputs back.
#pragma once

#include "tile_io.cuh"

namespace lkconv::cuda {

// `U` is an unsigned integer as wide as an element: values are moved, never interpreted.
template <class U>
__global__ void __launch_bounds__(kPackThreads) pack(const __grid_constant__ PackParams p) {
  U* tile =
      reinterpret_cast<U*>(dynamic_shared());  // [channel][pixel], rows one element apart from a power of two
  int64_t b = blockIdx.x;
  const int c0 = int(b % p.channel_tiles) * kPackTile;
  b /= p.channel_tiles;
  const int64_t pixel0 = b % p.pixel_tiles * kPackTile, n = b / p.pixel_tiles;
  const int64_t pixels = int64_t(p.height) * p.width;
  const auto element = [&](const GlobalView& view, int c, int64_t pixel) {
    return static_cast<U*>(view.data) + n * view.stride_n + int64_t(c) * view.stride_c +
           pixel / p.width * view.stride_h + pixel % p.width * view.stride_w;
  };
  for (int step = 0; step < 2; ++step) {
    const bool channels_fast = step == 0 ? p.from_channels_fast : p.to_channels_fast;
    for (int i = int(threadIdx.x); i < kPackTile * kPackTile; i += kPackThreads) {
      const int fast = i % kPackTile, slow = i / kPackTile;
      const int c = channels_fast ? fast : slow, pixel = channels_fast ? slow : fast;
      if (c0 + c >= p.channels || pixel0 + pixel >= pixels) continue;
      U& staged = tile[c * (kPackTile + 1) + pixel];
      if (step == 0)
        staged = *element(p.from, c0 + c, pixel0 + pixel);
      else
        *element(p.to, c0 + c, pixel0 + pixel) = staged;
    }
    sync_block();
  }
}

}  // namespace lkconv::cuda
