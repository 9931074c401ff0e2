// Moves tiles between strided tensors in global memory and planes in shared memory.
//
// No thread divides to find its elements: it keeps its column (or its channel) and walks down the rows by
// additions. A division by a number that the compiler does not know takes some 25 instructions, several times
// what moving an element takes.
#pragma once

#include "device.cuh"
#include "params.h"

namespace lkconv::cuda {

constexpr int kLoadsInFlight = 4;  // independent loads issued before the first is stored

// floor(n / d) for n >= 0. With l = ceil(log2 d) and multiplier m = floor(2^32 (2^l - d) / d) + 1, it is
// (floor(m n / 2^32) + n) / 2^l for any 32-bit n (Granlund and Montgomery, 1994); n < 2^31 keeps the sum
// within 32 bits.
LK_DEVICE int divided_by(int n, const LaunchDivisor& d) {
  return int((uint32_t(uint64_t(d.multiplier) * uint32_t(n) >> 32) + uint32_t(n)) >> d.shift);
}
LK_DEVICE int ceil_divided_by(int n, const LaunchDivisor& d) { return divided_by(n + d.divisor - 1, d); }

// ---- by rows: neighbouring threads take neighbouring columns ----

struct WindowShape {
  int images, rows, cols;      // cols: a multiple of the copies' width
  int image_pitch, row_pitch;  // in elements
};

// Where the window's element (0, 0, 0) comes from. Columns outside [0, width) read as zero; col0 is a
// multiple of the copies' width, and may be negative.
struct WindowSource {
  const void* plane;                     // of the first image, in the image's first row and column
  int64_t stride_n, stride_h, stride_w;  // stride_w is 1 where copies are wider than an element
  int row0, col0, width;
};

// A thread's way through one column of vectors of the window, by additions alone: `from` and `to` advance
// together until `to` has passed `end`. Where images follow each other without gaps, in both memories, they
// are one long image. Where several fit the block's threads, a thread takes the same row of every few images.
// Else it takes every few rows of one image after the other (`outer`).
template <class T, class A>
struct ColumnWalk {
  const T* from;
  A *to, *end;
  int64_t advance, outer_advance;
  int advance_to, outer_advance_to, outer;
  int inside;  // elements of a vector that lie inside the image

  LK_DEVICE ColumnWalk(A* shared, const WindowShape& s, const WindowSource& src, const WindowWalk& w,
                       int first, int c, int vector) {
    const int rows = w.by_rows.divisor, col = src.col0 + c;
    const bool gapless = s.images == 1 || (s.rows == rows && src.stride_n == rows * src.stride_h &&
                                           s.image_pitch == rows * s.row_pitch);
    int image = 0, row = first, limit = s.rows * s.row_pitch;
    advance = w.step * src.stride_h, advance_to = w.step * s.row_pitch, outer = 1;
    if (gapless) {
      limit *= s.images;
    } else if (w.step_images > 0) {
      image = divided_by(first, w.by_rows), row = first - image * rows;
      advance = w.step_images * src.stride_n, advance_to = w.step_images * s.image_pitch;
      limit = row < s.rows && image < w.step_images ? s.images * s.image_pitch : 0;
    } else {
      outer = s.images;
    }
    outer_advance = src.stride_n, outer_advance_to = s.image_pitch;
    inside = col < 0 ? 0 : max_int(0, min_int(vector, src.width - col));
    from = static_cast<const T*>(src.plane) + image * src.stride_n + int64_t(src.row0 + row) * src.stride_h +
           (inside ? col * src.stride_w : 0);
    to = shared + image * s.image_pitch + row * s.row_pitch + c;
    end = shared + limit;
  }
  LK_DEVICE void next() { from += advance, to += advance_to; }
};

// Calls visit(walk) for every column of vectors of this thread from column `c0` on, and every image where
// those are taken one after the other. A thread meets the same vectors each time.
template <class T, class A, class Visit>
LK_DEVICE void for_own_columns(A* shared, const WindowShape& s, const WindowSource& src, const WindowWalk& w,
                               int c0, int vector, Visit visit) {
  const int first = divided_by(int(threadIdx.x), w.by_lanes), lanes = w.by_lanes.divisor;
  if (first >= w.step) return;  // threads left over by whole rows
#pragma unroll 1
  for (int c = c0 + (int(threadIdx.x) - first * lanes) * vector; c < s.cols; c += lanes * vector) {
    ColumnWalk<T, A> walk(shared, s, src, w, first, c, vector);
#pragma unroll 1
    for (int i = 0; i < walk.outer; ++i) {
      visit(walk);
      walk.from += walk.outer_advance, walk.to += walk.outer_advance_to, walk.end += walk.outer_advance_to;
    }
  }
}

template <class A, int N>
struct alignas(N * sizeof(A)) Elements {
  A v[N];
};

// `N` elements as they are loaded: in whole registers, where two of 16 bits share one.
template <class T, int N, bool Words = (N * sizeof(T) >= 4)>
struct Loaded {
  Packet<int(N * sizeof(T))> packet;

  LK_DEVICE void load(const T* from) { packet = *reinterpret_cast<const Packet<int(N * sizeof(T))>*>(from); }
  LK_DEVICE T element(int i) const { return T{uint16_t(packet.words[i / 2] >> i % 2 * 16)}; }
};
template <class T, int N>
struct Loaded<T, N, false> {
  T only;

  LK_DEVICE void load(const T* from) { only = *from; }
  LK_DEVICE T element(int) const { return only; }
};

template <class A, class T>
LK_DEVICE void convert(T value, A& out) {
  if constexpr (sizeof(A) == sizeof(T))
    out = value;
  else
    out = to_float(value);
}

// Up to four elements a store: as many as an access of 16 bytes holds in float.
template <int N, class A, class T>
LK_DEVICE void store_converted(A* shared, const Loaded<T, N>& value) {
  constexpr int kPart = N < 4 ? N : 4;
#pragma unroll
  for (int i = 0; i < N; i += kPart) {
    Elements<A, kPart> part;
#pragma unroll
    for (int k = 0; k < kPart; ++k) convert(value.element(i + k), part.v[k]);
    *reinterpret_cast<Elements<A, kPart>*>(shared + i) = part;
  }
}

template <class T, int Bytes>
LK_DEVICE void issue_copies(T* shared, const WindowShape& s, const WindowSource& src, const WindowWalk& w,
                            int c0 = 0) {
  for_own_columns<T>(shared, s, src, w, c0, Bytes / int(sizeof(T)), [&](ColumnWalk<T, T> walk) {
    for (; walk.to < walk.end; walk.next())
      copy_async<Bytes>(walk.to, walk.from, walk.inside * int(sizeof(T)));
  });
}

// By plain loads of `Vector` elements of 16 bits, converted on the way. A vector is inside the image or
// outside.
template <class T, int Vector, class A>
LK_DEVICE void load_vectors(A* shared, const WindowShape& s, const WindowSource& src, const WindowWalk& w,
                            int c0 = 0) {
  for_own_columns<T>(shared, s, src, w, c0, Vector, [&](ColumnWalk<T, A> walk) {
    if (walk.inside == 0) {
      for (; walk.to < walk.end; walk.to += walk.advance_to)
        store_converted<Vector>(walk.to, Loaded<T, Vector>{});
      return;
    }
    constexpr int kInFlight = Vector < 8 ? kLoadsInFlight : 2;  // as many bytes, and fewer registers
    while (walk.to < walk.end) {
      Loaded<T, Vector> value[kInFlight] = {};  // left undefined, they take more registers
      A* to = walk.to;
#pragma unroll
      for (int q = 0; q < kInFlight; ++q, walk.next())
        if (walk.to < walk.end) value[q].load(walk.from);
#pragma unroll
      for (int q = 0; q < kInFlight; ++q, to += walk.advance_to)
        if (to < walk.end) store_converted<Vector>(to, value[q]);
    }
  });
}

// Zeroes what the window has to the left of column `c0` and from column `c1` on, from column `needed` to its
// end. A thread takes whole rows.
template <class A>
LK_DEVICE void zero_sides(A* shared, const WindowShape& s, const WindowWalk& w, int needed, int c0, int c1) {
  const Vec4<A> zeros{};
  const int left = min_int(c0, s.cols);
  for (int i = int(threadIdx.x); i < s.images * w.by_rows.divisor; i += int(blockDim.x)) {
    const int image = divided_by(i, w.by_rows), row = i - image * w.by_rows.divisor;
    if (row >= s.rows) continue;
    A* to = shared + image * s.image_pitch + row * s.row_pitch;
#pragma unroll 1
    for (int c = needed / 4 * 4; c < left; c += 4) *reinterpret_cast<Vec4<A>*>(to + c) = zeros;
    int c = c1;
#pragma unroll 1
    for (; c % 4 != 0 && c < s.cols; ++c) to[c] = A(0);
#pragma unroll 1
    for (; c < s.cols; c += 4) *reinterpret_cast<Vec4<A>*>(to + c) = zeros;
  }
}

// Shared window <- the image's rows, in the type that is accumulated in; columns from `needed` on.
template <class T, class A>
LK_DEVICE void stage_rows(A* shared, const WindowShape& s, const WindowSource& src, const WindowWalk& w,
                          int needed) {
  const int vector = w.vector_bytes / int(sizeof(T)), c0 = max_int(0, -src.col0);
  WindowShape inside = s;
  inside.cols = min_int(s.cols, src.width - src.col0);
  if constexpr (sizeof(T) == sizeof(A)) {
    if (w.vector_bytes == 16)
      issue_copies<T, 16>(shared, inside, src, w, c0);
    else if (w.vector_bytes == 8)
      issue_copies<T, 8>(shared, inside, src, w, c0);
    else if constexpr (sizeof(T) == 4)
      issue_copies<T, 4>(shared, inside, src, w, c0);
    commit_copies();
  } else {
    if (vector == 8)
      load_vectors<T, 8>(shared, inside, src, w, c0);
    else if (vector == 4)
      load_vectors<T, 4>(shared, inside, src, w, c0);
    else if (vector == 2)
      load_vectors<T, 2>(shared, inside, src, w, c0);
    else
      load_vectors<T, 1>(shared, inside, src, w, c0);
  }
  const int end = (max_int(0, inside.cols) + vector - 1) & -vector;  // what the vectors have filled
  if (needed < c0 || end < s.cols)
    zero_sides(shared, s, w, needed, c0, max_int(c0, max_int(needed / 4 * 4, end)));
  if constexpr (sizeof(T) == sizeof(A)) wait_copies<0>();
}

// ---- by channels: neighbouring threads take neighbouring channels, which are neighbours in memory ----

// A thread's way through pixels of images of `rows` x `cols`, `step` pixels on each time: offsets in global
// and shared memory follow by additions.
struct PixelWalk {
  int image, row, col, rows, cols, step_rows, step_cols;
  int64_t from, advance, wrap_col, wrap_row;
  int at, advance_at, wrap_at_col, wrap_at_row;

  LK_DEVICE PixelWalk(int rows_, int cols_, int64_t stride_n, int64_t stride_h, int64_t stride_w,
                      int image_pitch, int row_pitch, int first, int step)
      : image(0), rows(rows_), cols(cols_) {
    row = first / cols, col = first - row * cols;
    step_rows = step / cols, step_cols = step - step_rows * cols;
    from = row * stride_h + col * stride_w, at = row * row_pitch + col;
    advance = step_rows * stride_h + step_cols * stride_w, advance_at = step_rows * row_pitch + step_cols;
    wrap_col = stride_h - cols * stride_w, wrap_at_col = row_pitch - cols;
    wrap_row = stride_n - rows * stride_h, wrap_at_row = image_pitch - rows * row_pitch;
    wrap();
  }
  LK_DEVICE void wrap() {
    while (row >= rows) row -= rows, ++image, from += wrap_row, at += wrap_at_row;
  }
  LK_DEVICE void next() {
    row += step_rows, col += step_cols, from += advance, at += advance_at;
    if (col >= cols) col -= cols, ++row, from += wrap_col, at += wrap_at_col;
    wrap();
  }
};

// The same as stage_rows for channels [0, channels) of `src`, each `channel_offset(i)` elements further on.
// `channel_pitch` is that of channels in shared memory; `lanes`, a power of two, threads take a pixel.
template <class T, class A, class ChannelOffset>
LK_DEVICE void stage_channels(A* shared, const WindowShape& s, const WindowSource& src, int channels,
                              int channel_pitch, int lanes, int needed, ChannelOffset channel_offset) {
  const int ch = int(threadIdx.x) & (lanes - 1), cols = s.cols - needed;
  if (ch >= channels || s.rows <= 0 || cols <= 0) return;
  const int col0 = src.col0 + needed;
  const T* data =
      static_cast<const T*>(src.plane) + channel_offset(ch) + src.row0 * src.stride_h + col0 * src.stride_w;
  shared += ch * channel_pitch + needed;
  PixelWalk walk(s.rows, cols, src.stride_n, src.stride_h, src.stride_w, s.image_pitch, s.row_pitch,
                 int(threadIdx.x) / lanes, int(blockDim.x) / lanes);
  while (walk.image < s.images) {
    A value[kLoadsInFlight];
    int target[kLoadsInFlight];
#pragma unroll
    for (int q = 0; q < kLoadsInFlight; ++q, walk.next()) {
      target[q] = walk.image < s.images ? walk.at : -1;
      value[q] = A(0);
      if (target[q] >= 0 && unsigned(col0 + walk.col) < unsigned(src.width))
        value[q] = to_float(data[walk.from]);
    }
#pragma unroll
    for (int q = 0; q < kLoadsInFlight; ++q)
      if (target[q] >= 0) shared[target[q]] = value[q];
  }
}

// ---- outputs ----

// Where a block's outputs lie: channels of one image, rows and columns; `data` is the first.
template <class T>
struct OutputTile {
  T* data;
  int64_t stride_c, stride_h, stride_w;
  int channels, rows, cols;
};

// Outputs <- shared planes. `lanes`, a power of two, threads take a row.
template <class T, class A>
LK_DEVICE void store_by_rows(const A* shared, const OutputTile<T>& t, int plane_pitch, int row_pitch,
                             int lanes) {
  const int inner = int(threadIdx.x) & (lanes - 1), step = int(blockDim.x) / lanes;
  if (t.rows <= 0) return;
  PixelWalk walk(t.rows, 1, t.stride_c, t.stride_h, 0, plane_pitch, row_pitch, int(threadIdx.x) / lanes,
                 step);
  for (; walk.image < t.channels; walk.next())  // a channel is an image here
    for (int col = inner; col < t.cols; col += lanes)
      from_float(shared[walk.at + col], t.data[walk.from + col * t.stride_w]);
}

// The same where channels are neighbours in memory: `lanes` threads take a pixel.
template <class T, class A>
LK_DEVICE void store_by_channels(const A* shared, const OutputTile<T>& t, int plane_pitch, int row_pitch,
                                 int lanes) {
  const int ch = int(threadIdx.x) & (lanes - 1);
  if (ch >= t.channels) return;
  T* data = t.data + ch * t.stride_c;
  shared += ch * plane_pitch;
  PixelWalk walk(t.rows, t.cols, 0, t.stride_h, t.stride_w, 0, row_pitch, int(threadIdx.x) / lanes,
                 int(blockDim.x) / lanes);
  for (; walk.image < 1; walk.next()) from_float(shared[walk.at], data[walk.from]);
}

}  // namespace lkconv::cuda
