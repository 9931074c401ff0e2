// Register tiles of direct summation on rows of channel vectors: X outputs by V taps.
// One tile loads X + V - 1 pixels and V taps for X * V multiply-adds, so loads stay far below arithmetic.
#pragma once

namespace lkconv::cpu::LKCONV_ISA {

constexpr int kRegisters = LKCONV_VECTOR_REGISTERS;
constexpr int kMaxTaps = kRegisters >= 32 ? 8 : 7;
static_assert(kMaxTaps >= 7);

// Where the vectors of kernel row u are: rows[u * dil] + offset (image rows in a ring) ...
template <class T>
struct RowTable {
  const T* const* rows;
  int64_t dil, offset;

  LKCONV_INLINE const T* row(int64_t u) const {
    const T* p = rows[u * dil] + offset;
    asm(""
        : "+r"(p));  // one base register: else the compiler keeps base and offset apart, in X + V registers
    return p;
  }
  LKCONV_INLINE void advance(int64_t floats) { offset += floats; }
  static constexpr int64_t pixel() { return kLanes<T>; }
};
// ... or base + u * step (rows of the kernel).
template <class T>
struct RowStep {
  const T* base;
  int64_t step;

  LKCONV_INLINE const T* row(int64_t u) const { return base + u * step; }
  LKCONV_INLINE void advance(int64_t floats) { base += floats; }
  static constexpr int64_t pixel() { return kLanes<T>; }
};

// Where a block of outputs goes, `step` elements apart, and what its sums begin with.
template <class T>
struct Outputs {
  T* at;
  int64_t step;
  Vec<T> initial;
};

// out[i] (+)= sum over u < rows, v < V of fixed[u][v] * sliding[u][i + v]; assigns when kAssign, and writes
// the outputs in reverse order when kReverse. A convolution slides over pixels and holds taps; the dense form
// below slides over taps and holds pixels.
// The first kLeft and the last kRight of the X + V - 1 values slid over are zeros, which are left out.
template <class T, int X, int V, bool kAssign, bool kReverse, int kLeft = 0, int kRight = 0, class Sliding,
          class Fixed>
LKCONV_INLINE void tile_unit(const Outputs<T>& out, const Sliding& sliding, const Fixed& fixed,
                             int64_t rows) {
  constexpr int L = kLanes<T>;
  Vec<T> a[X];
#pragma GCC unroll 16
  for (int i = 0; i < X; ++i)
    a[i] = kAssign ? out.initial : load(out.at + (kReverse ? X - 1 - i : i) * out.step);
  for (int64_t u = 0; u < rows; ++u) {
    const int64_t pixel = sliding.pixel();
    const T *in = sliding.row(u) + kLeft * pixel, *held = fixed.row(u);
    Vec<T> k[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) k[v] = load(held + v * L);
#pragma GCC unroll 32
    for (int j = kLeft; j < X + V - 1 - kRight; ++j, in += pixel) {
      Vec<T> p = load(in);
      if (V > 1) keep(p);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v)
        if (j - v >= 0 && j - v < X) a[j - v] += k[v] * p;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < X; ++i) store(out.at + (kReverse ? X - 1 - i : i) * out.step, a[i]);
}

// The same for any stride and dilation, all taps: one pixel load per multiply-add.
template <class T, int X>
void tile_strided(const Outputs<T>& out, const RowTable<T>& pixels, const RowStep<T>& kernel, int64_t rows,
                  int64_t taps, int64_t stride, int64_t dil) {
  constexpr int L = kLanes<T>;
  Vec<T> a[X];
#pragma GCC unroll 16
  for (int i = 0; i < X; ++i) a[i] = out.initial;
  for (int64_t u = 0; u < rows; ++u) {
    const T *p = pixels.row(u), *w = kernel.row(u);
    for (int64_t v = 0; v < taps; ++v, p += dil * L) {
      Vec<T> k = load(w + v * L);
#pragma GCC unroll 16
      for (int i = 0; i < X; ++i) a[i] += k * load(p + i * stride * L);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < X; ++i) store(out.at + i * out.step, a[i]);
}

// Taps of a kernel row that one register tile takes: split evenly, so that 9 taps become 5 + 4, not 8 + 1.
inline int64_t taps_together(int64_t taps) {
  return taps <= kMaxTaps ? taps : taps <= 2 * kMaxTaps ? (taps + 1) / 2 : kMaxTaps;
}

template <class T, int X, bool kAssign, bool kReverse, class Sliding, class Fixed>
LKCONV_INLINE void tile_unit(int64_t held, const Outputs<T>& out, const Sliding& sliding, const Fixed& fixed,
                             int64_t rows) {
  switch (held) {
#define LKCONV_CASE(V) \
  case V:              \
    return tile_unit<T, X, V, kAssign, kReverse>(out, sliding, fixed, rows);
    LKCONV_CASE(1)
    LKCONV_CASE(2)
    LKCONV_CASE(3)
    LKCONV_CASE(4)
    LKCONV_CASE(5)
    LKCONV_CASE(6)
    LKCONV_CASE(7)
#if LKCONV_VECTOR_REGISTERS >= 32
    LKCONV_CASE(8)
#endif
#undef LKCONV_CASE
  }
}

// One block of X outputs at unit stride, `held` taps (or pixels) in all.
template <class T, int X, bool kReverse, class Sliding, class Fixed>
void block_unit(const Outputs<T>& out, Sliding sliding, Fixed fixed, int64_t rows, int64_t held) {
  constexpr int L = kLanes<T>;
  int64_t part = taps_together(held);
  tile_unit<T, X, true, kReverse>(part, out, sliding, fixed, rows);
  while ((held -= part) > 0) {
    sliding.advance(part * L);
    fixed.advance(part * L);
    part = taps_together(held);
    tile_unit<T, X, false, kReverse>(part, out, sliding, fixed, rows);
  }
}

constexpr int kLeastEdgeBlock = 4;  // smaller ones are for images that small

template <class T, int X, int V, class Pixels>
LKCONV_INLINE void tile_at_edge(const Outputs<T>& out, const Pixels& pixels, const RowStep<T>& taps,
                                int64_t rows, bool left, bool right) {
  constexpr int P = V / 2;
  if (left && right)
    tile_unit<T, X, V, true, false, P, P>(out, pixels, taps, rows);
  else if (left)
    tile_unit<T, X, V, true, false, P, 0>(out, pixels, taps, rows);
  else
    tile_unit<T, X, V, true, false, 0, P>(out, pixels, taps, rows);
}

template <class T, int X>
void block_at_edge(const Outputs<T>& out, const RowTable<T>& pixels, const RowStep<T>& taps, int64_t rows,
                   int64_t width, bool left, bool right) {
  if constexpr (X < kLeastEdgeBlock)
    block_unit<T, X, false>(out, pixels, taps, rows, width);
  else if (width == 3)
    tile_at_edge<T, X, 3>(out, pixels, taps, rows, left, right);
  else if (width == 5)
    tile_at_edge<T, X, 5>(out, pixels, taps, rows, left, right);
  else
    tile_at_edge<T, X, 7>(out, pixels, taps, rows, left, right);
}

}  // namespace lkconv::cpu::LKCONV_ISA
