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

struct WindowShape {
  int images, rows, cols;      // cols: a multiple of the copies' width
  int image_pitch, row_pitch;  // in elements
  int vector_bytes;            // of one copy: 16, 8, 4, or 2 for plain loads
};

// Where the window's element (0, 0, 0) comes from.
struct WindowSource {
  const void* plane;           // channel plane of the first image
  int64_t stride_n, stride_h;  // the row stride_w is 1
  int row0, col0, width;       // col0 >= 0; columns at or beyond `width` read as zero
};

// Calls visit(shared element offset, global element pointer, columns inside the image) for the vectors of the
// window that this thread moves. A thread meets the same vectors each time.
template <class T, class Visit>
LK_DEVICE void for_own_vectors(const WindowShape& s, const WindowSource& src, int vector, Visit visit) {
  const int per_row = s.cols / vector, count = s.images * s.rows * per_row;
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
    const int line = i / per_row, c = (i - line * per_row) * vector;
    const int image = line / s.rows, row = line - image * s.rows;
    const int inside = max_int(0, min_int(vector, src.width - src.col0 - c));
    const T* from = static_cast<const T*>(src.plane) + image * src.stride_n +
                    int64_t(src.row0 + row) * src.stride_h + (inside ? src.col0 + c : 0);
    visit(image * s.image_pitch + row * s.row_pitch + c, from, inside);
  }
}

template <class T, int Bytes>
LK_DEVICE void issue_copies(T* shared, const WindowShape& s, const WindowSource& src) {
  for_own_vectors<T>(s, src, Bytes / int(sizeof(T)), [&](int at, const T* from, int inside) {
    copy_async<Bytes>(shared + at, from, inside * int(sizeof(T)));
  });
}

// Starts bringing in the window. Two-byte rows (odd widths) are loaded plainly: no asynchronous copy is that
// small.
template <class T>
LK_DEVICE void issue_window(T* shared, const WindowShape& s, const WindowSource& src) {
  switch (s.vector_bytes) {
    case 16:
      return issue_copies<T, 16>(shared, s, src);
    case 8:
      return issue_copies<T, 8>(shared, s, src);
    case 4:
      return issue_copies<T, 4>(shared, s, src);
    default:
      for_own_vectors<T>(s, src, 1,
                         [&](int at, const T* from, int inside) { shared[at] = inside ? *from : T{}; });
  }
}

// float32 only: rounds what this thread brought in to tf32, once, instead of at each use.
template <class T>
LK_DEVICE void round_window(T*, const WindowShape&, const WindowSource&) {}
template <>
LK_DEVICE void round_window<float>(float* shared, const WindowShape& s, const WindowSource& src) {
  const int vector = s.vector_bytes / 4;
  for_own_vectors<float>(s, src, vector, [&](int at, const float*, int) {
    for (int i = 0; i < vector; ++i) shared[at + i] = round_to_tf32(shared[at + i]);
  });
}

LK_DEVICE void zero_words(void* shared, int bytes) {
  for (int i = int(threadIdx.x); i < bytes / 4; i += int(blockDim.x)) static_cast<uint32_t*>(shared)[i] = 0;
}

}  // namespace lkconv::cuda
