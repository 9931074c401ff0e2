// Rows in place whose taps are held in registers: an odd number of them, at most 7, whatever the dilation, at
// a stride of 1 or 2. A vector of pixels is loaded once for all the taps that it meets.
#pragma once

namespace lkconv::cpu::LKCONV_ISA {

// a[i] += sum over v < V of taps[u][v] * pixels[u][S i + v] for one part, as in tile_unit: a vector of pixels
// is loaded once for all taps of a row. The first kLeft and the last kRight pixels are halo, which is not
// read.
template <class Product, int kPart, int V, int S, int kLeft, int kRight, class T, int X>
LKCONV_INLINE void add_row_in_place(Vec<float> (&a)[chains(X)][X], const TensorRows<T>& pixels, int64_t u,
                                    const InPlaceTaps& taps) {
  const T *in = pixels.row(u) + kLeft * pixels.step, *below = pixels.row(u + 1) + kLeft * pixels.step;
  asm("" : "+r"(in), "+r"(below));  // else the compiler keeps X + V addresses of each
  const float* held = taps.base + u * taps.row + kPart * taps.part;
  Vec<float> k[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) k[v] = Product::value(load(held + v * kLanes<float>));
#pragma GCC unroll 32
  for (int j = kLeft; j < S * (X - 1) + V - kRight; ++j, in += pixels.step, below += pixels.step) {
    Vec<float> p = take_part<Product, kPart>(in, below);
    if (V > 1) keep(p);
#pragma GCC unroll 16
    for (int i = 0; i < X; ++i)
      if (j - S * i >= 0 && j - S * i < V) Product::add(a[(j - S * i) % chains(X)][i], k[j - S * i], p);
  }
}

// One part of the sums of in_place_tile: both need more registers than there are.
template <int kPart, int V, int S, int kLeft, int kRight, class T, int X>
LKCONV_INLINE void in_place_sums(Vec<float> (&a)[X], const TensorRows<T>& pixels, const InPlaceTaps& taps,
                                 int64_t rows) {
  Vec<float> sums[chains(X)][X] = {};
#pragma GCC unroll 16
  for (int i = 0; i < X; ++i) sums[0][i] = a[i];
  int64_t u = 0;
  for (; u + kRowsTogether <= rows; u += kRowsTogether)
    add_row_in_place<Rows, kPart, V, S, kLeft, kRight>(sums, pixels, u, taps);
  if (kRowsTogether > 1 && u < rows)
    add_row_in_place<LastRow, kPart, V, S, kLeft, kRight>(sums, pixels, u, taps);
#pragma GCC unroll 16
  for (int i = 0; i < X; ++i) a[i] = chains(X) > 1 ? sums[0][i] + sums[chains(X) - 1][i] : sums[0][i];
}

// The same for one column of taps and both parts of bfloat16, which then share the loads of pixels.
template <class Product, int S, class T, int X>
LKCONV_INLINE void add_row_of_column(Vec<float> (&a)[2][X], const TensorRows<T>& pixels, int64_t u,
                                     const InPlaceTaps& taps) {
  const T *in = pixels.row(u), *below = pixels.row(u + 1);
  asm("" : "+r"(in), "+r"(below));
  const float* held = taps.base + u * taps.row;
  const Vec<float> k[2] = {Product::value(load(held)), Product::value(load(held + taps.part))};
#pragma GCC unroll 16
  for (int i = 0; i < X; ++i, in += S * pixels.step, below += S * pixels.step) {
    Vec<float> p[2];
    take_pixels<Product>(p, in, below);
#pragma GCC unroll 2
    for (int q = 0; q < 2; ++q) Product::add(a[q][i], k[q], p[q]);
  }
}

// out[i] = sum over u < rows of add_row_in_place.
template <class T, int X, int V, int S, int kLeft, int kRight>
LKCONV_INLINE void in_place_tile(const InPlaceOutputs<T>& out, const TensorRows<T>& pixels,
                                 const InPlaceTaps& taps, int64_t rows) {
  constexpr int P = kFloatParts<T>;
  Vec<float> a[P][X];
#pragma GCC unroll 2
  for (int q = 0; q < P; ++q)
#pragma GCC unroll 16
    for (int i = 0; i < X; ++i) a[q][i] = out.initial[q];
  if constexpr (V == 1 && P == 2) {
    int64_t u = 0;
    for (; u + kRowsTogether <= rows; u += kRowsTogether) add_row_of_column<Rows, S>(a, pixels, u, taps);
    if (kRowsTogether > 1 && u < rows) add_row_of_column<LastRow, S>(a, pixels, u, taps);
  } else {
    in_place_sums<0, V, S, kLeft, kRight>(a[0], pixels, taps, rows);
    if constexpr (P == 2) in_place_sums<1, V, S, kLeft, kRight>(a[1], pixels, taps, rows);
  }
#pragma GCC unroll 16
  for (int i = 0; i < X; ++i) {
    Vec<float> parts[P];
#pragma GCC unroll 2
    for (int q = 0; q < P; ++q) parts[q] = a[q][i];
    store_whole(out.at + i * out.step, put_together(parts, T()));
  }
}

// A block that reaches the halo at `left`, by the padding, or at `right`, by that or one pixel less.
template <class T, int X, int V, int S>
LKCONV_INLINE void in_place_block(const InPlaceOutputs<T>& out, const TensorRows<T>& pixels,
                                  const InPlaceTaps& taps, int64_t rows, bool left, int64_t right) {
  constexpr int P = V / 2, kLess = P - (S > 1);
  if (P == 0 || (!left && !right)) return in_place_tile<T, X, V, S, 0, 0>(out, pixels, taps, rows);
  if (S > 1 && right == P)
    return left ? in_place_tile<T, X, V, S, P, P>(out, pixels, taps, rows)
                : in_place_tile<T, X, V, S, 0, P>(out, pixels, taps, rows);
  if (!right) return in_place_tile<T, X, V, S, P, 0>(out, pixels, taps, rows);
  left ? in_place_tile<T, X, V, S, P, kLess>(out, pixels, taps, rows)
       : in_place_tile<T, X, V, S, 0, kLess>(out, pixels, taps, rows);
}

// Rows whose taps are held in registers.
template <class T, int X, int V, int S>
struct NarrowRow {
  static constexpr int64_t kBlock = X;

  LKCONV_INLINE static void block(const ForwardProblem& p, const InPlaceColumns& c, int64_t i,
                                  const InPlaceOutputs<T>& out, const TensorRows<T>& pixels,
                                  const InPlaceTaps& taps, int64_t rows) {
    in_place_block<T, X, V, S>(out, pixels, taps, rows, i == 0, i == c.blocks - 1 ? c.right : 0);
  }
};

template <class T, int X>
void narrow_row(const ForwardProblem& p, const InPlaceSpan<T>& s, int64_t y) {
  if constexpr (X <= kMaxStridedBlock)
    if (p.stride_w == 2 && p.kernel_w > 1) {
      if (p.kernel_w == 3) return in_place_row<T, NarrowRow<T, X, 3, 2>>(p, s, y);
      if (p.kernel_w == 5) return in_place_row<T, NarrowRow<T, X, 5, 2>>(p, s, y);
      return in_place_row<T, NarrowRow<T, X, 7, 2>>(p, s, y);
    }
  if (p.kernel_w == 1) return in_place_row<T, NarrowRow<T, X, 1, 1>>(p, s, y);
  if (p.kernel_w == 3) return in_place_row<T, NarrowRow<T, X, 3, 1>>(p, s, y);
  if constexpr (X >= 4) {
    if (p.kernel_w == 5) return in_place_row<T, NarrowRow<T, X, 5, 1>>(p, s, y);
    return in_place_row<T, NarrowRow<T, X, 7, 1>>(p, s, y);
  }
}

template <class T>
void narrow_row(const ForwardProblem& p, const InPlaceSpan<T>& s, int64_t block, int64_t y) {
  switch (block) {
#if LKCONV_VECTOR_REGISTERS >= 32
    case 14:
      return narrow_row<T, 14>(p, s, y);
#endif
    case 8:
      return narrow_row<T, 8>(p, s, y);
    case 7:
      return narrow_row<T, 7>(p, s, y);
    case 4:
      return narrow_row<T, 4>(p, s, y);
    case 3:
      return narrow_row<T, 3>(p, s, y);
    default:
      return narrow_row<T, 2>(p, s, y);
  }
}

}  // namespace lkconv::cpu::LKCONV_ISA
