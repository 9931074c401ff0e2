// planar.h's sums with the pixels read where they are: no window is filled. Columns of halo are lanes that a
// masked load leaves out, rows of halo are left out of the sums. For float32 and bfloat16 tensors, with
// masked loads that never touch the lanes they leave out. planar_in_place_task.h walks a plane.
#pragma once

#include "planar_plan.h"
#include "planes_ahead.h"

namespace lkconv::cpu::LKCONV_ISA {

#if LKCONV_AVX512

// One block of outputs: Y rows of X vectors, of which `rows` rows exist. Tap (u, v) of output row y reads
// row y + u * dil of those that begin at `in`, `in_row` apart, at columns[v]; masks[v * X + x] says which
// elements of vector x lie in the image.
template <class T>
struct PixelBlock {
  T* out;
  int64_t out_row, rows;
  int64_t row_lanes, last_lanes;  // of a row's last vector that may be written, and of the last row's
  const T* in;
  int64_t in_row;
  uint32_t inside;        // bit i: whether the image has the row at in + i * in_row
  int64_t first, height;  // the image's row that `in` is, and how many there are
  const int64_t* columns;
  const ElementMask* masks;
  int64_t count;  // columns of taps
  const T* taps;
  int64_t tap_row, tap_column;
};

// Bit i: whether first + i * step lies in [0, size).
LKCONV_INLINE uint32_t bits_inside(int64_t first, int64_t step, int64_t size, int64_t count) {
  int64_t a = -first, b = size - first;
  if (step > 1) a = ceil_div(std::max<int64_t>(0, a), step), b = ceil_div(std::max<int64_t>(0, b), step);
  a = std::clamp<int64_t>(a, 0, count), b = std::clamp<int64_t>(b, a, count);
  return uint32_t((uint64_t(1) << b) - (uint64_t(1) << a));
}

// Elements counted through row after row, from column x on: those whose neighbour `move` columns on is in the
// same row. Of each row they are neighbours themselves.
LKCONV_INLINE uint32_t bits_in_row(int64_t x, int64_t move, int64_t width, int64_t count) {
  uint32_t bits = 0;
  for (int64_t row = -x; row < count; row += width)
    bits |= bits_inside(-row, 1, width, count) & bits_inside(move - row, 1, width, count);
  return bits;
}

// The first n elements of a vector, or all; none if n is not positive.
template <class S>
LKCONV_INLINE void store_first(S* to, Vec<float> v, int64_t n) {
  if (n >= kLanes<float>)
    store_from(to, v);
  else if (n > 0)
    store_part(to, v, n);
}

// The same bits, which the compiler takes for new ones: else it spreads them over the stack beforehand.
LKCONV_INLINE uint32_t in_register(uint32_t bits) {
  asm volatile("" : "+r"(bits));
  return bits;
}

// Elements of row y's last vector that may be read and written.
template <class T>
LKCONV_INLINE int64_t lanes_of_row(const PixelBlock<T>& r, int y) {
  return y + 1 < r.rows ? r.row_lanes : y + 1 == r.rows ? r.last_lanes : 0;
}

// Sums of Y rows of X vectors of T.
template <class T, int Y, int X>
using PixelSums = Vec<float>[Y][X * kFloatParts<T>];

// Sums begin at `initial`, or, where the kernel's rows are summed in parts, at what the output holds; parts
// are of float32, as a rounded sum is no beginning.
template <bool kAssign, class T, int Y, int X>
LKCONV_INLINE void begin_pixel_sums(PixelSums<T, Y, X>& a, const PixelBlock<T>& r, float initial) {
  static_assert(kAssign || kFloatParts<T> == 1);
#pragma GCC unroll 16
  for (int y = 0; y < Y; ++y)
#pragma GCC unroll 4
    for (int x = 0; x < X * kFloatParts<T>; ++x) {
      a[y][x] = broadcast(initial);
      if constexpr (!kAssign)
        a[y][x] = load_part(r.out + y * r.out_row + x * kElements<T>,
                            x + 1 == X   ? lanes_of_row(r, y)
                            : y < r.rows ? kElements<T>
                                         : 0,
                            0.0f);
    }
}

template <class T, int Y, int X>
LKCONV_INLINE void store_pixel_sums(const PixelSums<T, Y, X>& a, const PixelBlock<T>& r) {
  constexpr int L = kElements<T>, P = kFloatParts<T>;
  const bool whole = r.rows == Y && r.row_lanes == L;
  T* to = r.out;
#pragma GCC unroll 16
  for (int y = 0; y < Y; ++y, to += r.out_row)
#pragma GCC unroll 4
    for (int x = 0; x < X; ++x) {
      const bool last = x + 1 == X;
      const VU32 bits = put_together(&a[y][x * P], T());
      if (whole && !(last && y + 1 == Y))
        store_whole(to + x * L, bits);
      else
        store_bits(to + x * L, bits, first_elements(last ? lanes_of_row(r, y) : y < r.rows ? L : 0));
    }
}

// One vector of pixels as floats, each kept in its register.
template <class T>
LKCONV_INLINE void load_pixels(Vec<float> (&p)[kFloatParts<T>], const T* from, ElementMask mask) {
  take_apart(p, load_bits(from, mask));
#pragma GCC unroll 2
  for (int q = 0; q < kFloatParts<T>; ++q) keep(p[q]);
}

// out (+)= K kernel rows without gaps: a pixel vector is loaded once for all of them that meet it.
template <class T, int Y, int X, int K, bool kAssign>
void pixels_unit(const PixelBlock<T>& r, float initial) {
  constexpr int L = kElements<T>, P = kFloatParts<T>;
  PixelSums<T, Y, X> a;
  begin_pixel_sums<kAssign, T, Y, X>(a, r, initial);
  const T* taps = r.taps;
  for (int64_t v = 0; v < r.count; ++v, taps += r.tap_column) {
    ElementMask masks[X];
#pragma GCC unroll 4
    for (int x = 0; x < X; ++x) masks[x] = r.masks[v * X + x];
    Vec<float> k[K];
#pragma GCC unroll 8
    for (int u = 0; u < K; ++u) {
      k[u] = broadcast(as_float(taps[u * r.tap_row]));
      keep(k[u]);
    }
    const T* in = r.in + r.columns[v];
    const uint32_t inside = in_register(r.inside);
#pragma GCC unroll 32
    for (int i = 0; i < Y + K - 1; ++i, in += r.in_row) {
      if (!(inside & (1u << i))) continue;
#pragma GCC unroll 4
      for (int x = 0; x < X; ++x) {
        Vec<float> p[P];
        load_pixels(p, in + x * L, masks[x]);
#pragma GCC unroll 8
        for (int u = 0; u < K; ++u)
#pragma GCC unroll 2
          for (int q = 0; q < P; ++q)
            if (i - u >= 0 && i - u < Y) a[i - u][x * P + q] += k[u] * p[q];
      }
    }
  }
  store_pixel_sums<T, Y, X>(a, r);
}

// The same for kernel rows `dil` apart: one load per multiply-add.
template <class T, int Y, int X, bool kAssign>
void pixels_dilated(const PixelBlock<T>& r, float initial, int64_t rows, int64_t dil) {
  constexpr int L = kElements<T>, P = kFloatParts<T>;
  PixelSums<T, Y, X> a;
  begin_pixel_sums<kAssign, T, Y, X>(a, r, initial);
  for (int64_t u = 0; u < rows; ++u) {
    const uint32_t image = bits_inside(r.first + u * dil, 1, r.height, Y);
    for (int64_t v = 0; v < r.count; ++v) {
      ElementMask masks[X];
#pragma GCC unroll 4
      for (int x = 0; x < X; ++x) masks[x] = r.masks[v * X + x];
      const Vec<float> k = broadcast(as_float(r.taps[u * r.tap_row + v * r.tap_column]));
      const T* in = r.in + u * dil * r.in_row + r.columns[v];
      const uint32_t inside = in_register(image);
#pragma GCC unroll 16
      for (int y = 0; y < Y; ++y, in += r.in_row) {
        if (!(inside & (1u << y))) continue;
#pragma GCC unroll 4
        for (int x = 0; x < X; ++x) {
          Vec<float> p[P];
          take_apart(p, load_bits(in + x * L, masks[x]));
#pragma GCC unroll 2
          for (int q = 0; q < P; ++q) a[y][x * P + q] += k * p[q];
        }
      }
    }
  }
  store_pixel_sums<T, Y, X>(a, r);
}

// Two planes whose rows fit half a vector each: the second plane's elements follow the first one's. It lies
// `in`, `out` and `taps` elements from the first, less the elements its rows begin at.
template <class T>
struct PixelPair {
  PixelBlock<T> first;
  int64_t in, out, taps;
  float initial[2];
};
template <class T>
constexpr int kHalf = kElements<T> / 2;

template <class T>
LKCONV_INLINE VU32 load_halves(const T* from, int64_t distance, ElementMask mask) {
  return load_bits(load_bits(from, mask), from + distance, mask << kHalf<T>);
}
LKCONV_INLINE Vec<float> broadcast_halves(float a, float b) {
  constexpr int L = kLanes<float>;
  return (Vec<float>)_mm512_mask_blend_ps(__mmask16(0xffff << L / 2), _mm512_set1_ps(a), _mm512_set1_ps(b));
}

template <class T, int Y, int K, bool kAssign>
void pixels_pair(const PixelPair<T>& pair) {
  constexpr int P = kFloatParts<T>;
  static_assert(kAssign || P == 1);
  const PixelBlock<T>& r = pair.first;
  const auto lanes = [&](int y) { return first_elements(y < r.rows ? r.last_lanes : 0); };
  PixelSums<T, Y, 1> a;
#pragma GCC unroll 16
  for (int y = 0; y < Y; ++y)
#pragma GCC unroll 2
    for (int q = 0; q < P; ++q)
      a[y][q] = kAssign ? broadcast_halves(pair.initial[0], pair.initial[1])
                        : (Vec<float>)load_halves(r.out + y * r.out_row, pair.out, lanes(y));
  const T* taps = r.taps;
  for (int64_t v = 0; v < r.count; ++v, taps += r.tap_column) {
    const ElementMask mask = r.masks[v];
    Vec<float> k[K];
#pragma GCC unroll 8
    for (int u = 0; u < K; ++u) {
      k[u] = broadcast_halves(as_float(taps[u * r.tap_row]), as_float(taps[u * r.tap_row + pair.taps]));
      keep(k[u]);
    }
    const T* in = r.in + r.columns[v];
    const uint32_t inside = in_register(r.inside);
#pragma GCC unroll 32
    for (int i = 0; i < Y + K - 1; ++i, in += r.in_row) {
      if (!(inside & (1u << i))) continue;
      Vec<float> p[P];
      take_apart(p, load_halves(in, pair.in, mask));
#pragma GCC unroll 2
      for (int q = 0; q < P; ++q) keep(p[q]);
#pragma GCC unroll 8
      for (int u = 0; u < K; ++u)
#pragma GCC unroll 2
        for (int q = 0; q < P; ++q)
          if (i - u >= 0 && i - u < Y) a[i - u][q] += k[u] * p[q];
    }
  }
  T* out = r.out;
#pragma GCC unroll 16
  for (int y = 0; y < Y; ++y, out += r.out_row) {
    const VU32 bits = put_together(a[y], T());
    store_bits(out, bits, lanes(y));
    store_bits(out + pair.out, bits, lanes(y) << kHalf<T>);
  }
}

// One channel of one image.
struct Plane {
  int64_t n, c;
};

// body(plane, the next one or null) over planes [first, last), counted over (image, channel).
template <class Body>
void for_planes(const ForwardProblem& f, int64_t first, int64_t last, bool pairs, Body&& body) {
  const auto after = [&](Plane p) { return p.c + 1 < f.channels ? Plane{p.n, p.c + 1} : Plane{p.n + 1, 0}; };
  Plane p{first / f.channels, first % f.channels};
  for (int64_t rest = last - first; rest > 0;) {
    const Plane next = after(p);
    const bool pair = pairs && rest > 1;
    body(p, pair ? &next : nullptr);
    rest -= pair ? 2 : 1;
    p = pair ? after(next) : next;
  }
}

// ---- tables of the kernels --------------------------------------------------------------------------------

// `more` kernels add to what the output holds.
template <class T>
struct PixelKernels {
  using Unit = void(const PixelBlock<T>&, float);
  using Dilated = void(const PixelBlock<T>&, float, int64_t, int64_t);
  Unit *unit[kMaxTaps], *unit_more[kMaxTaps];
  Dilated *dilated, *dilated_more;
};
template <class T, int Y, int X, int... K>
constexpr PixelKernels<T> pixel_kernels(std::integer_sequence<int, K...>) {
  PixelKernels<T> k{{pixels_unit<T, Y, X, K + 1, true>...}, {}, pixels_dilated<T, Y, X, true>, {}};
  if constexpr (kFloatParts<T> == 1) {
    ((k.unit_more[K] = pixels_unit<T, Y, X, K + 1, false>), ...);
    k.dilated_more = pixels_dilated<T, Y, X, false>;
  }
  return k;
}
template <class T, size_t... B>
LKCONV_INLINE const PixelKernels<T>& pixel_kernels(int64_t block, std::index_sequence<B...>) {
  static constexpr PixelKernels<T> kTable[] = {
      pixel_kernels<T, int(kPlanarBlocks[B].rows), int(kPlanarBlocks[B].vectors)>(
          std::make_integer_sequence<int, kMaxTaps>())...};
  return kTable[block];
}
template <class T>
LKCONV_INLINE const PixelKernels<T>& pixel_kernels(int64_t block) {
  constexpr size_t kCount = kFloatParts<T> == 1 ? kPlanarBlockCount : kPlanarBlocksOfParts;
  return pixel_kernels<T>(block, std::make_index_sequence<kCount>());
}

template <class T>
using PairKernel = void(const PixelPair<T>&);
template <class T, int Y, bool kAssign, int... K>
LKCONV_INLINE PairKernel<T>* pair_kernel_of(int64_t rows, std::integer_sequence<int, K...>) {
  static constexpr PairKernel<T>* kTable[] = {pixels_pair<T, Y, K + 1, kAssign>...};
  return kTable[rows - 1];
}
template <class T, int Y>
LKCONV_INLINE PairKernel<T>* pair_kernel_of(int64_t rows, bool more) {
  constexpr auto kRows = std::make_integer_sequence<int, kMaxTaps>();
  if constexpr (kFloatParts<T> == 1)
    if (more) return pair_kernel_of<T, Y, false>(rows, kRows);
  return pair_kernel_of<T, Y, true>(rows, kRows);
}
template <class T>
LKCONV_INLINE PairKernel<T>* pair_kernel_of(int64_t block_rows, int64_t rows, bool more) {
  return block_rows == 7 ? pair_kernel_of<T, 7>(rows, more) : pair_kernel_of<T, 8>(rows, more);
}

#endif

}  // namespace lkconv::cpu::LKCONV_ISA
