// Small matrix products on scratch: rows of pixels times vectors of channels, in register tiles. The result
// of each register goes to a functor, so that whatever follows the product happens while it is in a register.
#pragma once

namespace lkconv::cpu::LKCONV_ISA::group_mix {

// What a product is made of. Numbers are multiplied and summed in their own type; pairs of bfloat16, which
// stand for two neighbouring values of k, in float32.
template <class E>
struct Element {
  using Sum = E;
  static LKCONV_INLINE Vec<E> vector(const E* p) { return load(p); }
  static LKCONV_INLINE void add(Vec<E>& sum, Vec<E> w, E x) { sum += w * x; }
};

#if LKCONV_BF16_PRODUCTS
template <>
struct Element<Bf16Pair> {
  using Sum = float;
  static LKCONV_INLINE __m512i vector(const Bf16Pair* p) { return _mm512_loadu_si512(p); }
  static LKCONV_INLINE void add(Vec<float>& sum, __m512i w, Bf16Pair x) {
    sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(int(x.bits)));
  }
};
#endif

template <class E>
using Sum = typename Element<E>::Sum;

// A(i, k) = a[i * row + k * depth]; row = 1 multiplies by the transpose.
template <class E>
struct Left {
  const E* a;
  int64_t row, depth;
};

// The values of k: `runs` runs of `length`, `gap` apart; gaps are padding, which need not be multiplied.
struct Depth {
  int64_t length, runs = 1, gap = 0;
};

// out(i, j, init[j * L] + sum_k A(i, k) * b[k * b_row + j * L]) for i0 <= i < i0 + M and j0 <= j < j0 + J
template <class E, int M, int J, class Out>
LKCONV_INLINE void gemm_tile(const Left<E>& left, const E* b, int64_t b_row, const Depth& depth, int64_t i0,
                             int64_t j0, int64_t rows, const Sum<E>* init, Out&& out) {
  using T = Sum<E>;
  constexpr int L = kLanes<T>;
  Vec<T> acc[M][J];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) acc[i][j] = init ? load(init + (j0 + j) * L) : Vec<T>{};
  const E* a = left.a + i0 * left.row;
  b += j0 * L;
  for (int64_t run = 0; run < depth.runs; ++run, a += depth.gap * left.depth, b += depth.gap * b_row)
    for (int64_t k = 0; k < depth.length; ++k, a += left.depth, b += b_row) {
      decltype(Element<E>::vector(b)) w[J];
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) w[j] = Element<E>::vector(b + j * L);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const E x = a[i * left.row];
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) Element<E>::add(acc[i][j], w[j], x);
      }
    }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
    if (i0 + i < rows)
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) out(i0 + i, j0 + j, acc[i][j]);
}

// What the rows of a product are: pixels, whose counts are multiples of 7 (feature maps are 7, 14, 28, 56
// wide), or channels, whose counts are multiples of 8.
enum class Rows { pixels, channels };

// Rows of a register tile of J vectors.
template <Rows R, int J>
constexpr int kTileRows =
    R == Rows::pixels ? (LKCONV_VECTOR_REGISTERS >= 32 ? (J <= 2 ? 14 : 7) : (J == 1 ? 7 : 6))
                      : (LKCONV_VECTOR_REGISTERS >= 32 ? (J == 1 ? 16 : 8) : (J == 1 ? 8 : 4));

template <class E, Rows R, int J, class Out>
LKCONV_INLINE void gemm_columns(const Left<E>& left, const E* b, int64_t b_row, const Depth& depth,
                                int64_t j0, int64_t rows, const Sum<E>* init, Out&& out) {
  constexpr int M = kTileRows<R, J>;
  int64_t i = 0;
  for (; i + M / 2 < rows; i += M) gemm_tile<E, M, J>(left, b, b_row, depth, i, j0, rows, init, out);
  for (; i < rows; i += (M + 1) / 2)
    gemm_tile<E, (M + 1) / 2, J>(left, b, b_row, depth, i, j0, rows, init, out);
}

// A is read up to kRowSlack rows past the last: scratch must have them.
constexpr int64_t kRowSlack = 16;

template <class E, Rows R, class Out>
LKCONV_INLINE void gemm(const Left<E>& left, const E* b, int64_t b_row, const Depth& depth, int64_t rows,
                        int64_t vectors, const Sum<E>* init, Out&& out) {
  for (int64_t j = 0; j < vectors;) {
    const int64_t left_over = vectors - j;
    if constexpr (LKCONV_VECTOR_REGISTERS >= 32) {
      if (left_over == 3 || left_over > 4) {
        gemm_columns<E, R, 3>(left, b, b_row, depth, j, rows, init, out);
        j += 3;
        continue;
      }
    }
    if (left_over >= 2) {
      gemm_columns<E, R, 2>(left, b, b_row, depth, j, rows, init, out);
      j += 2;
    } else {
      gemm_columns<E, R, 1>(left, b, b_row, depth, j, rows, init, out);
      j += 1;
    }
  }
}

// c[i * c_row + j] += sum over n < depth of a[n * a_row + i] * b[n * b_row + j]: a sum over pixels, or over
// pairs of them.
template <class E>
void gemm_accumulate(Sum<E>* c, int64_t c_row, const E* a, int64_t a_row, const E* b, int64_t b_row,
                     int64_t rows, int64_t vectors, int64_t depth) {
  using T = Sum<E>;
  constexpr int L = kLanes<T>;
  gemm<E, Rows::channels>(Left<E>{a, 1, a_row}, b, b_row, {depth}, rows, vectors,
                          static_cast<const T*>(nullptr),
                          [=](int64_t i, int64_t j, Vec<T> v) __attribute__((always_inline)) {
                            T* to = c + i * c_row + j * L;
                            store(to, load(to) + v);
                          });
}

// dst[c * dst_row + r] = src[r * columns + c]; the padding of dst is left alone.
template <class T>
void transpose_weight(T* dst, int64_t dst_row, const T* src, int64_t rows, int64_t columns) {
  constexpr int L = kLanes<T>;
  for (int64_t r = 0; r < rows; r += L)
    for (int64_t c = 0; c < columns; c += L) {
      if (r + L <= rows && c + L <= columns) {
        Vec<T> block[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) block[i] = load(src + (r + i) * columns + c);
        transpose<T>(block);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store(dst + (c + i) * dst_row + r, block[i]);
      } else {
        for (int64_t i = r; i < std::min<int64_t>(rows, r + L); ++i)
          for (int64_t j = c; j < std::min<int64_t>(columns, c + L); ++j)
            dst[j * dst_row + i] = src[i * columns + j];
      }
    }
}

#if LKCONV_BF16_PRODUCTS
LKCONV_INLINE void store_pairs(Bf16Pair* to, VU16 first, VU16 second) {
  _mm512_storeu_si512(to, (__m512i)(widen(first) | widen(second) << 16));
}

template <class T>
void pack_pairs(Bf16Pair* dst, const T* src, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += 2, src += 2 * columns, dst += columns)
    for (int64_t c = 0; c < columns; c += kLanes<T>)
      store_pairs(dst + c, round_to_bf16(load(src + c)), round_to_bf16(load(src + columns + c)));
}
template <class T>
constexpr auto kPackPairs = pack_pairs<T>;
#else
template <class T>
constexpr decltype(GroupMixKernels<T>::pack_pairs) kPackPairs = nullptr;
#endif

}  // namespace lkconv::cpu::LKCONV_ISA::group_mix
