// Small matrix products on scratch: rows of pixels times vectors of channels, in register tiles. The result
// of each register goes to a functor, so that whatever follows the product happens while it is in a register.
#pragma once

namespace lkconv::cpu::LKCONV_ISA::group_mix {

// A(i, k) = a[i * row + k * depth]; row = 1 multiplies by the transpose.
template <class T>
struct Left {
  const T* a;
  int64_t row, depth;
};

// The values of k: `runs` runs of `length`, `gap` apart; gaps are padding, which need not be multiplied.
struct Depth {
  int64_t length, runs = 1, gap = 0;
};

// out(i, j, init[j * L] + sum_k A(i, k) * b[k * b_row + j * L]) for i0 <= i < i0 + M and j0 <= j < j0 + J
template <class T, int M, int J, class Out>
LKCONV_INLINE void gemm_tile(const Left<T>& left, const T* b, int64_t b_row, const Depth& depth,
                             int64_t i0, int64_t j0, int64_t rows, const T* init, Out&& out) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[M][J];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) acc[i][j] = init ? load(init + (j0 + j) * L) : Vec<T>{};
  const T* a = left.a + i0 * left.row;
  b += j0 * L;
  for (int64_t run = 0; run < depth.runs; ++run, a += depth.gap * left.depth, b += depth.gap * b_row)
    for (int64_t k = 0; k < depth.length; ++k, a += left.depth, b += b_row) {
      Vec<T> w[J];
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) w[j] = load(b + j * L);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const T x = a[i * left.row];
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) acc[i][j] += w[j] * x;
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

template <class T, Rows R, int J, class Out>
LKCONV_INLINE void gemm_columns(const Left<T>& left, const T* b, int64_t b_row, const Depth& depth,
                                int64_t j0, int64_t rows, const T* init, Out&& out) {
  constexpr int M = kTileRows<R, J>;
  int64_t i = 0;
  for (; i + M / 2 < rows; i += M) gemm_tile<T, M, J>(left, b, b_row, depth, i, j0, rows, init, out);
  for (; i < rows; i += (M + 1) / 2)
    gemm_tile<T, (M + 1) / 2, J>(left, b, b_row, depth, i, j0, rows, init, out);
}

// A is read up to kRowSlack rows past the last: scratch must have them.
constexpr int64_t kRowSlack = 16;

template <class T, Rows R, class Out>
LKCONV_INLINE void gemm(const Left<T>& left, const T* b, int64_t b_row, const Depth& depth, int64_t rows,
                        int64_t vectors, const T* init, Out&& out) {
  for (int64_t j = 0; j < vectors;) {
    const int64_t left_over = vectors - j;
    if constexpr (LKCONV_VECTOR_REGISTERS >= 32) {
      if (left_over == 3 || left_over > 4) {
        gemm_columns<T, R, 3>(left, b, b_row, depth, j, rows, init, out);
        j += 3;
        continue;
      }
    }
    if (left_over >= 2) {
      gemm_columns<T, R, 2>(left, b, b_row, depth, j, rows, init, out);
      j += 2;
    } else {
      gemm_columns<T, R, 1>(left, b, b_row, depth, j, rows, init, out);
      j += 1;
    }
  }
}

// c[i * c_row + j] += sum over n < depth of a[n * a_row + i] * b[n * b_row + j]: a sum over pixels.
template <class T>
void gemm_accumulate(T* c, int64_t c_row, const T* a, int64_t a_row, const T* b, int64_t b_row, int64_t rows,
                     int64_t vectors, int64_t depth) {
  constexpr int L = kLanes<T>;
  gemm<T, Rows::channels>(Left<T>{a, 1, a_row}, b, b_row, {depth}, rows, vectors,
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

}  // namespace lkconv::cpu::LKCONV_ISA::group_mix
