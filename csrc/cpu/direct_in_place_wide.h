// Rows in place of any width, padding and parity: a pixel meets the taps that lead from it to each output of
// a block, which lie next to each other in memory. Of a row no product is computed that the padding would
// add.
#pragma once

namespace lkconv::cpu::LKCONV_ISA {

// Kernel rows too wide for registers: pixel r of a row, counted from the first one that the block's first
// output reads, is multiplied by the taps that lead from it to the outputs [first, last), which lie next to
// each other in memory.
template <class T, int X>
LKCONV_INLINE void multiply_pixel(Vec<float> (&a)[X][kFloatParts<T>], const TensorRows<T>& pixels, int64_t u,
                                  const InPlaceTaps& taps, int64_t r, int first, int last) {
  constexpr int L = kLanes<float>, P = kFloatParts<T>;
  Vec<float> p[P];
  take_apart(p, load_whole(pixels.row(u) + r * pixels.step));
  const float* k = taps.base + u * taps.row + r * L;
#pragma GCC unroll 2
  for (int q = 0; q < P; ++q)
#pragma GCC unroll 16
    for (int i = 0; i < X; ++i)
      if (i >= first && i < last) a[i][q] += load(k + q * taps.part - i * L) * p[q];
}

// out[i] = sum over u < rows, v < `taps_of_row` of taps[u][v] * pixels[u][i + v], of which only the pixels
// [begin, end) lie inside the image.
template <class T, int X>
LKCONV_INLINE void wide_tile(const InPlaceOutputs<T>& out, const TensorRows<T>& pixels,
                             const InPlaceTaps& taps, int64_t rows, int64_t taps_of_row, int64_t begin,
                             int64_t end) {
  constexpr int P = kFloatParts<T>;
  Vec<float> a[X][P];
#pragma GCC unroll 16
  for (int i = 0; i < X; ++i)
#pragma GCC unroll 2
    for (int q = 0; q < P; ++q) a[i][q] = out.initial[q];
  for (int64_t u = 0; u < rows; ++u) {
#pragma GCC unroll 16
    for (int r = 0; r < X - 1; ++r)
      if (r >= begin && r < end) multiply_pixel<T, X>(a, pixels, u, taps, r, 0, r + 1);
    const int64_t full = std::min(end, taps_of_row);
    for (int64_t r = std::max<int64_t>(begin, X - 1); r < full; ++r)
      multiply_pixel<T, X>(a, pixels, u, taps, r, 0, X);
#pragma GCC unroll 16
    for (int i = 1; i < X; ++i)
      if (const int64_t r = taps_of_row + i - 1; r >= begin && r < end)
        multiply_pixel<T, X>(a, pixels, u, taps, r, i, X);
  }
#pragma GCC unroll 16
  for (int i = 0; i < X; ++i) store_whole(out.at + i * out.step, put_together(a[i], T()));
}

template <class T, int X>
struct WideRow {
  static constexpr int64_t kBlock = X;

  LKCONV_INLINE static void block(const ForwardProblem& p, const InPlaceColumns& c, int64_t i,
                                  const InPlaceOutputs<T>& out, const TensorRows<T>& pixels,
                                  const InPlaceTaps& taps, int64_t rows) {
    const int64_t first = c.output(i, X) - p.pad_w;
    wide_tile<T, X>(out, pixels, taps, rows, p.kernel_w, std::max<int64_t>(0, -first),
                    std::min(p.width - first, p.kernel_w + X - 1));
  }
};

template <class T>
void wide_row(const ForwardProblem& p, const InPlaceSpan<T>& s, int64_t block, int64_t y) {
  switch (block) {
#if LKCONV_VECTOR_REGISTERS >= 32
    case 14:
      return in_place_row<T, WideRow<T, 14>>(p, s, y);
    case 12:
      return in_place_row<T, WideRow<T, 12>>(p, s, y);
#endif
    case 10:
      return in_place_row<T, WideRow<T, 10>>(p, s, y);
    case 8:
      return in_place_row<T, WideRow<T, 8>>(p, s, y);
    case 7:
      return in_place_row<T, WideRow<T, 7>>(p, s, y);
    default:
      return in_place_row<T, WideRow<T, 4>>(p, s, y);
  }
}

}  // namespace lkconv::cpu::LKCONV_ISA
