// Rows in place whose taps are held in registers: an odd number of them, at most 7, whatever the dilation, at
// a stride of 1 or 2. A vector of pixels is loaded once for all the taps that it meets. A block sums Q
// vectors of floats for each of its outputs: both parts of bfloat16, or one or two groups of channels.
#pragma once

namespace lkconv::cpu::LKCONV_ISA {

// The vectors of a pixel that a block sums, and where their sums go.
template <class Product, int Q, class T>
LKCONV_INLINE void take_vectors(Vec<float> (&p)[Q], const T* at, [[maybe_unused]] const T* below) {
  if constexpr (kFloatParts<T> == Q) {
    take_pixels<Product>(p, at, below);
  } else {
#pragma GCC unroll 2
    for (int q = 0; q < Q; ++q) p[q] = load(at + q * kElements<T>);
  }
}
template <int Q, int X>
LKCONV_INLINE void store_vectors(const InPlaceOutputs<float>& out, const Vec<float> (&sums)[Q][X]) {
#pragma GCC unroll 16
  for (int i = 0; i < X; ++i)
#pragma GCC unroll 2
    for (int q = 0; q < Q; ++q) store(out.at + i * out.step + q * kElements<float>, sums[q][i]);
}
template <int X>
LKCONV_INLINE void store_vectors(const InPlaceOutputs<bf16>& out, const Vec<float> (&sums)[2][X]) {
#pragma GCC unroll 16
  for (int i = 0; i < X; ++i) {
    const Vec<float> parts[2] = {sums[0][i], sums[1][i]};
    store_whole(out.at + i * out.step, put_together(parts, bf16()));
  }
}

// Each vector's sums of X outputs, of which small blocks of pairs have two to take turns (see chains).
constexpr int narrow_chains(int outputs, int taps) { return outputs <= 4 && taps <= 5 ? chains(outputs) : 1; }
template <int Q, int X, int V>
using NarrowSums = Vec<float>[narrow_chains(X, V)][Q][X];

// a[q][i] += sum over v < V of taps[u][v] * pixels[u][S i + v]. The first kLeft and the last kRight pixels
// are halo, which is not read.
template <class Product, int V, int S, int kLeft, int kRight, class T, int Q, int X>
LKCONV_INLINE void add_row_in_place(NarrowSums<Q, X, V>& a, const TensorRows<T>& pixels, int64_t u,
                                    const InPlaceTaps& taps) {
  const T *in = pixels.row(u) + kLeft * pixels.step, *below = pixels.row(u + 1) + kLeft * pixels.step;
  asm("" : "+r"(in), "+r"(below));  // else the compiler keeps X + V addresses of each
  const float* held = taps.base + u * taps.row;
  Vec<float> k[Q][V];
#pragma GCC unroll 2
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) k[q][v] = Product::value(load(held + q * taps.part + v * kLanes<float>));
#pragma GCC unroll 32
  for (int j = kLeft; j < S * (X - 1) + V - kRight; ++j, in += pixels.step, below += pixels.step) {
    Vec<float> p[Q];
    take_vectors<Product>(p, in, below);
#pragma GCC unroll 2
    for (int q = 0; q < Q; ++q) {
      if (V > 1) keep(p[q]);
#pragma GCC unroll 16
      for (int i = 0; i < X; ++i)
        if (j - S * i >= 0 && j - S * i < V)
          Product::add(a[(j - S * i) % narrow_chains(X, V)][q][i], k[q][j - S * i], p[q]);
    }
  }
}

// out[i] = sum over u < rows of add_row_in_place.
template <int Q, class T, int X, int V, int S, int kLeft, int kRight>
LKCONV_INLINE void in_place_tile(const InPlaceOutputs<T>& out, const TensorRows<T>& pixels,
                                 const InPlaceTaps& taps, int64_t rows) {
  constexpr int kChains = narrow_chains(X, V);
  NarrowSums<Q, X, V> a = {};
#pragma GCC unroll 2
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 16
    for (int i = 0; i < X; ++i) a[0][q][i] = out.initial[q];
  int64_t u = 0;
  for (; u + kRowsTogether <= rows; u += kRowsTogether)
    add_row_in_place<Rows, V, S, kLeft, kRight, T, Q, X>(a, pixels, u, taps);
  if (kRowsTogether > 1 && u < rows)
    add_row_in_place<LastRow, V, S, kLeft, kRight, T, Q, X>(a, pixels, u, taps);
  if constexpr (kChains > 1) {
#pragma GCC unroll 2
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 16
      for (int i = 0; i < X; ++i) a[0][q][i] += a[kChains - 1][q][i];
  }
  store_vectors(out, a[0]);
}

// Rows in blocks of X outputs of kGroups groups. A block reaches the halo at the left by the padding, or at
// the right by that or one pixel less.
template <class T, int G, int X, int V, int S>
struct NarrowRow {
  static constexpr int64_t kBlock = X, kGroups = G;

  LKCONV_INLINE static void block(const ForwardProblem&, const InPlaceColumns& c, int64_t i,
                                  const InPlaceOutputs<T>& out, const TensorRows<T>& pixels,
                                  const InPlaceTaps& taps, int64_t rows) {
    constexpr int Q = G * kFloatParts<T>, P = V / 2, kLess = P - (S > 1);
    const bool left = i == 0;
    const int64_t right = i == c.blocks - 1 ? c.right : 0;
    if (P == 0 || (!left && !right)) return in_place_tile<Q, T, X, V, S, 0, 0>(out, pixels, taps, rows);
    if (S > 1 && right == P)
      return left ? in_place_tile<Q, T, X, V, S, P, P>(out, pixels, taps, rows)
                  : in_place_tile<Q, T, X, V, S, 0, P>(out, pixels, taps, rows);
    if (!right) return in_place_tile<Q, T, X, V, S, P, 0>(out, pixels, taps, rows);
    left ? in_place_tile<Q, T, X, V, S, P, kLess>(out, pixels, taps, rows)
         : in_place_tile<Q, T, X, V, S, 0, kLess>(out, pixels, taps, rows);
  }
};

template <class T, int G, int X>
void narrow_columns(const ForwardProblem& p, const InPlaceSpan<T>& s, int64_t y, int64_t remainder) {
  constexpr bool kWhole = G * kFloatParts<T> == 1;  // registers for sums of one vector alone
  const InPlaceColumns c(p, remainder, X);
  if constexpr (X <= kMaxStridedBlock)
    if (p.stride_w == 2) {
      if (p.kernel_w == 3) return in_place_row<T, NarrowRow<T, G, X, 3, 2>>(p, s, y, c);
      if (p.kernel_w == 5) return in_place_row<T, NarrowRow<T, G, X, 5, 2>>(p, s, y, c);
      if constexpr (kWhole || X < 8) return in_place_row<T, NarrowRow<T, G, X, 7, 2>>(p, s, y, c);
    }
  if (p.kernel_w == 1) return in_place_row<T, NarrowRow<T, G, X, 1, 1>>(p, s, y, c);
  if (p.kernel_w == 3) return in_place_row<T, NarrowRow<T, G, X, 3, 1>>(p, s, y, c);
  if constexpr (X >= kLeastWideBlock) {
    if (p.kernel_w == 5) return in_place_row<T, NarrowRow<T, G, X, 5, 1>>(p, s, y, c);
    if constexpr (kWhole || X < 8) return in_place_row<T, NarrowRow<T, G, X, 7, 1>>(p, s, y, c);
  }
}

template <class T, int G, int... X>
void narrow_columns(const ForwardProblem& p, const InPlaceSpan<T>& s, int64_t block, int64_t y,
                    int64_t remainder, std::integer_sequence<int, X...>) {
  (void)((block == X && (narrow_columns<T, G, X>(p, s, y, remainder), true)) || ...);
}

template <class T, int G>
void narrow_row(const ForwardProblem& p, const InPlaceSpan<T>& s, const Plan& plan, int64_t y) {
  const int64_t wide = p.out_width % p.dil_w ? p.out_width % p.dil_w : p.dil_w;
  for (int64_t r = 0; r < std::min(p.dil_w, p.out_width); ++r) {
    const int64_t block = r < wide ? plan.block : plan.short_block;
    if constexpr (G * kFloatParts<T> == 1 && LKCONV_VECTOR_REGISTERS >= 32)
      narrow_columns<T, G>(p, s, block, y, r, std::integer_sequence<int, 14, 8, 7, 6, 5, 4, 3, 2>());
    else
      narrow_columns<T, G>(p, s, block, y, r, std::integer_sequence<int, 8, 7, 6, 5, 4, 3, 2>());
  }
}

template <class T>
void narrow_row(const ForwardProblem& p, const InPlaceSpan<T>& s, const Plan& plan, int64_t y) {
#if LKCONV_VECTOR_REGISTERS >= 32
  if constexpr (kFloatParts<T> == 1)
    if (plan.together == 2) return narrow_row<T, 2>(p, s, plan, y);
#endif
  narrow_row<T, 1>(p, s, plan, y);
}

}  // namespace lkconv::cpu::LKCONV_ISA
