// The input window of the Toeplitz kernels: rows of one channel's planes in shared memory, brought in by
// asynchronous copies, padded so that ldmatrix meets no bank conflict, and zero outside the image.
#pragma once

#include "tile_io.cuh"

namespace lkconv::cuda {

// Matrix-unit shapes of an element type: `depth` is K of one mma.
template <class T>
struct MatrixUnit {
  static constexpr int depth = 16;
};
template <>
struct MatrixUnit<float> {
  static constexpr int depth = 8;
};

// Starts bringing in the window. Two-byte rows (odd widths) are loaded plainly: no asynchronous copy is that
// small.
template <class T>
LK_DEVICE void issue_window(T* shared, const WindowShape& s, const WindowSource& src, const WindowWalk& w) {
  switch (w.vector_bytes) {
    case 16:
      return issue_copies<T, 16>(shared, s, src, w);
    case 8:
      return issue_copies<T, 8>(shared, s, src, w);
    case 4:
      return issue_copies<T, 4>(shared, s, src, w);
    default:
      if constexpr (sizeof(T) == 2) load_vectors<T, 1>(shared, s, src, w);
  }
}

template <int Vector>
LK_DEVICE void round_vectors(float* shared, const WindowShape& s, const WindowSource& src,
                             const WindowWalk& w) {
  using Floats = Elements<float, Vector>;
  for_own_columns<float>(shared, s, src, w, 0, Vector, [&](ColumnWalk<float, float> walk) {
    if (walk.inside == 0) return;
    for (; walk.to < walk.end; walk.to += walk.advance_to) {
      Floats& floats = *reinterpret_cast<Floats*>(walk.to);
      Floats rounded = floats;
#pragma unroll
      for (int i = 0; i < Vector; ++i) rounded.v[i] = round_to_tf32(rounded.v[i]);
      floats = rounded;
    }
  });
}

// float32 only: rounds what this thread brought in to tf32, once, instead of at each use.
template <class T>
LK_DEVICE void round_window(T*, const WindowShape&, const WindowSource&, const WindowWalk&) {}
template <>
LK_DEVICE void round_window<float>(float* shared, const WindowShape& s, const WindowSource& src,
                                   const WindowWalk& w) {
  switch (w.vector_bytes) {
    case 16:
      return round_vectors<4>(shared, s, src, w);
    case 8:
      return round_vectors<2>(shared, s, src, w);
    default:
      return round_vectors<1>(shared, s, src, w);
  }
}

LK_DEVICE void zero_words(void* shared, int bytes) {
  for (int i = int(threadIdx.x); i < bytes / 4; i += int(blockDim.x)) static_cast<uint32_t*>(shared)[i] = 0;
}

}  // namespace lkconv::cuda
