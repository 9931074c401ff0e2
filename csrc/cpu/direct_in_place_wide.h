// Rows in place of any width, padding and parity: a few columns of taps at a time are held in registers. Of a
// row no product is computed that the padding would add.
#pragma once

namespace lkconv::cpu::LKCONV_ISA {

// Columns of taps, or of pixels, that registers hold beside the sums.
constexpr int kWideColumns = kRegisters >= 32 ? 8 : 4;

// What one or two rows of pixels give: pixel j is `step` elements from pixel j - 1, and lies in the image if
// bit j of `inside` is set.
template <class T>
struct WidePixels {
  const T *row, *below;
  int64_t step;
  uint32_t inside;
};

// a[i] += sum over v < V of taps[v] * pixels[i + v]: one part of each. Where every pixel meets every output,
// pixels are held and taps slid over: a[i] += sum over v < V of pixels[v] * taps[i + v].
template <class Product, bool kHoldPixels, int kPart, class T, int X, int V>
LKCONV_INLINE void add_columns(Vec<float> (&a)[chains(X)][X], WidePixels<T> in, const float* taps) {
  constexpr int L = kLanes<float>;
  asm("" : "+r"(in.row), "+r"(in.below));  // else the compiler keeps X + V addresses of each
  const auto pixel = [&](int64_t j) __attribute__((always_inline)) {
    return take_part<Product, kPart>(in.row + j * in.step, in.below + j * in.step);
  };
  const auto tap = [&](int64_t v)
                       __attribute__((always_inline)) { return Product::value(load(taps + v * L)); };
  Vec<float> held[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    held[v] = kHoldPixels ? pixel(v) : tap(v);
    if (kHoldPixels) keep(held[v]);
  }
#pragma GCC unroll 32
  for (int j = 0; j < X + V - 1; ++j) {
    if (kHoldPixels || (in.inside & (1u << j))) {
      Vec<float> slid = kHoldPixels ? tap(j) : pixel(0);
      keep(slid);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        if (j - v >= 0 && j - v < X) Product::add(a[v % chains(X)][j - v], held[v], slid);
    }
    if (!kHoldPixels) in.row += in.step, in.below += in.step;
  }
}

// V columns and all rows of one part of the sums of X outputs.
template <class T>
using WideColumns = void(float* sums, const TensorRows<T>& pixels, const InPlaceTaps& taps, int64_t rows,
                         uint32_t inside);
template <bool kHoldPixels, int kPart, class T, int X, int V>
void wide_columns(float* sums, const TensorRows<T>& pixels, const InPlaceTaps& taps, int64_t rows,
                  uint32_t inside) {
  constexpr int L = kLanes<float>;
  const auto at = [&](int i)
                      __attribute__((always_inline)) { return sums + (kHoldPixels ? X - 1 - i : i) * L; };
  Vec<float> a[chains(X)][X] = {};
#pragma GCC unroll 16
  for (int i = 0; i < X; ++i) a[0][i] = load(at(i));
  const auto in = [&](int64_t u) __attribute__((always_inline)) {
    return WidePixels<T>{pixels.row(u), pixels.row(u + 1), pixels.step, inside};
  };
  int64_t u = 0;
  for (; u + kRowsTogether <= rows; u += kRowsTogether)
    add_columns<Rows, kHoldPixels, kPart, T, X, V>(a, in(u), taps.base + u * taps.row);
  if (kRowsTogether > 1 && u < rows)
    add_columns<LastRow, kHoldPixels, kPart, T, X, V>(a, in(u), taps.base + u * taps.row);
#pragma GCC unroll 16
  for (int i = 0; i < X; ++i) store(at(i), chains(X) > 1 ? a[0][i] + a[chains(X) - 1][i] : a[0][i]);
}

// The kernels of each part for 1, 2, ... columns.
template <class T>
using WideParts = WideColumns<T> * [kFloatParts<T>];
template <bool kHoldPixels, class T, int X, int... V>
LKCONV_INLINE const WideParts<T>& wide_parts(int64_t columns, std::integer_sequence<int, V...>) {
  if constexpr (kFloatParts<T> == 1) {
    static constexpr WideParts<T> kTable[] = {{wide_columns<kHoldPixels, 0, T, X, V + 1>}...};
    return kTable[columns - 1];
  } else {
    static constexpr WideParts<T> kTable[] = {
        {wide_columns<kHoldPixels, 0, T, X, V + 1>, wide_columns<kHoldPixels, 1, T, X, V + 1>}...};
    return kTable[columns - 1];
  }
}

// sums[i] += sum over u < rows, v < V of taps[u][v] * pixels[u][i + v] for every part.
template <bool kHoldPixels, class T, int X>
LKCONV_INLINE void add_wide(float (*sums)[X * kLanes<float>], const TensorRows<T>& pixels, InPlaceTaps taps,
                            int64_t rows, int64_t columns, uint32_t inside) {
  const WideParts<T>& kernels =
      wide_parts<kHoldPixels, T, X>(columns, std::make_integer_sequence<int, kWideColumns>());
  for (int q = 0; q < kFloatParts<T>; ++q, taps.base += taps.part)
    kernels[q](sums[q], pixels, taps, rows, inside);
}

// out[i] = sum over u < rows, v < `taps_of_row` of taps[u][v] * pixels[u][i + v], of which only the pixels
// [begin, end) lie inside the image.
template <class T, int X>
LKCONV_INLINE void wide_tile(const InPlaceOutputs<T>& out, TensorRows<T> pixels, InPlaceTaps taps,
                             int64_t rows, int64_t taps_of_row, int64_t begin, int64_t end) {
  constexpr int P = kFloatParts<T>, L = kLanes<float>;
  alignas(64) float sums[P][X * L];
  for (int q = 0; q < P; ++q)
    for (int i = 0; i < X; ++i) store(sums[q] + i * L, out.initial[q]);
  if (begin >= X - 1 && end <= taps_of_row) {
    // Every pixel meets every output: pixel j and output i by tap j - i.
    const int64_t most = even_part(end - begin, kWideColumns);
    for (int64_t j = begin, v; j < end; j += v) {
      v = std::min(end - j, most);
      add_wide<true, T, X>(sums, {pixels.base + j * pixels.step, pixels.row_step, pixels.step},
                           {taps.base + (j - (X - 1)) * L, taps.row, taps.part}, rows, v, 0);
    }
  } else {
    const int64_t most = even_part(taps_of_row, kWideColumns);
    for (int64_t k = 0, v; k < taps_of_row; k += v) {
      v = std::min(taps_of_row - k, most);
      const int64_t first = std::clamp<int64_t>(begin - k, 0, X + v - 1),
                    last = std::clamp<int64_t>(end - k, first, X + v - 1);
      if (first < last)
        add_wide<false, T, X>(sums, {pixels.base + k * pixels.step, pixels.row_step, pixels.step},
                              {taps.base + k * L, taps.row, taps.part}, rows, v,
                              (1u << last) - (1u << first));
    }
  }
  for (int i = 0; i < X; ++i) {
    Vec<float> parts[P];
    for (int q = 0; q < P; ++q) parts[q] = load(sums[q] + i * L);
    store_whole(out.at + i * out.step, put_together(parts, T()));
  }
}

template <class T, int X>
struct WideRow {
  static constexpr int64_t kBlock = X, kGroups = 1;

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
      return in_place_row<T, WideRow<T, 14>>(p, s, y, {p, 0, 14});
    case 12:
      return in_place_row<T, WideRow<T, 12>>(p, s, y, {p, 0, 12});
#endif
    case 10:
      return in_place_row<T, WideRow<T, 10>>(p, s, y, {p, 0, 10});
    case 8:
      return in_place_row<T, WideRow<T, 8>>(p, s, y, {p, 0, 8});
    case 7:
      return in_place_row<T, WideRow<T, 7>>(p, s, y, {p, 0, 7});
    default:
      return in_place_row<T, WideRow<T, 4>>(p, s, y, {p, 0, 4});
  }
}

}  // namespace lkconv::cpu::LKCONV_ISA
