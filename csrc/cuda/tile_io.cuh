// Moves tiles between strided tensors in global memory and planes in shared memory, for the direct kernels.
#pragma once

#include "device.cuh"
#include "params.h"

namespace lkconv::cuda {

// Which planes a block works on and how they lie in shared memory: plane index = channel * images + image.
struct PlaneSet {
  int channels, images;        // present in this block (the last blocks of a grid may have fewer)
  int images_pitch;            // planes per channel in shared memory
  int plane_pitch, row_pitch;  // in elements
};

constexpr int kLoadsInFlight = 4;  // independent loads issued before the first is stored

struct Region {
  int row0, rows, col0, cols;  // of each plane; rows lie inside the image, columns may not
  int width;                   // columns outside [0, width) read as zero
};

// Shared planes <- region of `view` at image n0, in which channel(i) gives the channel of the i-th.
// Consecutive threads take consecutive columns: for tensors whose rows are contiguous. `row_lanes` is a power
// of two.
template <class T, class A, class ChannelOf>
LK_DEVICE void stage_by_rows(A* shared, const PlaneSet& s, const GlobalView& view, int64_t n0,
                             ChannelOf channel, const Region& r, int row_lanes) {
  const T* data = static_cast<const T*>(view.data);
  const int tid = int(threadIdx.x), lane = tid & (row_lanes - 1);
  const int first = tid / row_lanes, step = int(blockDim.x) / row_lanes;
  const int count = s.channels * s.images * r.rows;
  for (int c = lane; c < r.cols; c += row_lanes) {
    const int col = r.col0 + c;
    const bool inside = col >= 0 && col < r.width;
    for (int i0 = first; i0 < count; i0 += step * kLoadsInFlight) {
      A value[kLoadsInFlight];
      int target[kLoadsInFlight];
#pragma unroll
      for (int q = 0; q < kLoadsInFlight; ++q) {
        const int i = i0 + q * step;
        target[q] = -1;
        if (i >= count) continue;
        const int plane = i / r.rows, row = i - plane * r.rows;
        const int ch = plane / s.images, image = plane - ch * s.images;
        target[q] = (ch * s.images_pitch + image) * s.plane_pitch + row * s.row_pitch + c;
        value[q] = A(0);
        if (inside)
          value[q] = to_float(data[(n0 + image) * view.stride_n + channel(ch) * view.stride_c +
                                   int64_t(r.row0 + row) * view.stride_h + int64_t(col) * view.stride_w]);
      }
#pragma unroll
      for (int q = 0; q < kLoadsInFlight; ++q)
        if (target[q] >= 0) shared[target[q]] = value[q];
    }
  }
}

// The same for tensors whose channels are contiguous: consecutive threads take consecutive channels, and a
// group of `channel_lanes` (a power of two) threads takes a row.
template <class T, class A, class ChannelOf>
LK_DEVICE void stage_by_channels(A* shared, const PlaneSet& s, const GlobalView& view, int64_t n0,
                                 ChannelOf channel, const Region& r, int channel_lanes) {
  const T* data = static_cast<const T*>(view.data);
  const int tid = int(threadIdx.x), ch = tid & (channel_lanes - 1);
  if (ch >= s.channels) return;
  const int first = tid / channel_lanes, step = int(blockDim.x) / channel_lanes;
  const int64_t channel_offset = int64_t(channel(ch)) * view.stride_c;
  const int count = s.images * r.rows * r.cols;
  for (int i0 = first; i0 < count; i0 += step * kLoadsInFlight) {
    A value[kLoadsInFlight];
    int target[kLoadsInFlight];
#pragma unroll
    for (int q = 0; q < kLoadsInFlight; ++q) {
      const int i = i0 + q * step;
      target[q] = -1;
      if (i >= count) continue;
      const int line = i / r.cols, c = i - line * r.cols, image = line / r.rows, row = line - image * r.rows;
      const int col = r.col0 + c;
      target[q] = (ch * s.images_pitch + image) * s.plane_pitch + row * s.row_pitch + c;
      value[q] = A(0);
      if (col >= 0 && col < r.width)
        value[q] = to_float(data[(n0 + image) * view.stride_n + channel_offset +
                                 int64_t(r.row0 + row) * view.stride_h + int64_t(col) * view.stride_w]);
    }
#pragma unroll
    for (int q = 0; q < kLoadsInFlight; ++q)
      if (target[q] >= 0) shared[target[q]] = value[q];
  }
}

// `lanes` is row_lanes or channel_lanes of the function it chooses.
template <class T, class A, class ChannelOf>
LK_DEVICE void stage_planes(A* shared, const PlaneSet& s, const GlobalView& view, int64_t n0,
                            ChannelOf channel, const Region& r, bool by_channels, int lanes) {
  if (by_channels)
    stage_by_channels<T, A>(shared, s, view, n0, channel, r, lanes);
  else
    stage_by_rows<T, A>(shared, s, view, n0, channel, r, lanes);
}

// Region of `view` at image n, channels c0... <- shared planes (one image). All of the region is inside.
template <class T, class A>
LK_DEVICE void store_planes(const A* shared, const PlaneSet& s, const GlobalView& view, int64_t n, int64_t c0,
                            const Region& r, bool by_channels, int lanes) {
  T* data = static_cast<T*>(view.data) + n * view.stride_n + c0 * view.stride_c +
            int64_t(r.row0) * view.stride_h + int64_t(r.col0) * view.stride_w;
  const int tid = int(threadIdx.x), inner = tid & (lanes - 1), first = tid / lanes,
            step = int(blockDim.x) / lanes;
  if (by_channels) {
    if (inner >= s.channels) return;
    for (int i = first; i < r.rows * r.cols; i += step) {
      const int row = i / r.cols, col = i - row * r.cols;
      from_float(shared[inner * s.plane_pitch + row * s.row_pitch + col],
                 data[inner * view.stride_c + row * view.stride_h + col * view.stride_w]);
    }
    return;
  }
  for (int i = first; i < s.channels * r.rows; i += step) {
    const int ch = i / r.rows, row = i - ch * r.rows;
    for (int col = inner; col < r.cols; col += lanes)
      from_float(shared[ch * s.plane_pitch + row * s.row_pitch + col],
                 data[ch * view.stride_c + row * view.stride_h + col * view.stride_w]);
  }
}

}  // namespace lkconv::cuda
