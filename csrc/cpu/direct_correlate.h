// Correlations of rows of grad_output with rows of the input, U kernel rows by V taps at a time: the sums of
// backward_weight in registers.
#pragma once

#include "pixels_ahead.h"

namespace lkconv::cpu::LKCONV_ISA {

template <class T>
LKCONV_INLINE void add_vectors(T* sum, const T* more, int64_t vectors) {
  for (int64_t i = 0; i < vectors * kLanes<T>; i += kLanes<T>) store(sum + i, load(sum + i) + load(more + i));
}

// What the next row of grad_output will read, asked for beside the products of this one: as many pixels at a
// time as are multiplied.
struct RowsAhead {
  static constexpr int64_t kMaxRows = 2;  // of the input
  PixelsAhead grad, in[kMaxRows];
  int64_t rows, pixels;  // of the input that are new with each pixel of grad_output
  int64_t left = 0;      // of these pixels
  int64_t lines = 0;     // for each of them: groups whose products are computed together
  bool own = false;      // whether all lines are of one group

  LKCONV_INLINE void request(int64_t count) {
    const int64_t n = std::min(count, left);
    if (n <= 0) return;
    left -= n;
    if (own) {  // beside few products
      grad.request_own(n);
      return in[0].request_own(n);
    }
    grad.request(n * lines);
    for (int64_t r = 0; r < rows; ++r) in[r].request(n * pixels * lines);
  }
};

// How far pixels of grad_output and of the input are apart: in scratch ...
template <class T>
struct ScratchSteps {
  static constexpr int64_t grad() { return kLanes<T>; }
  static constexpr int64_t in() { return kLanes<T>; }
  static constexpr void request(int64_t) {}
};
// ... and in tensors that are read where they are.
struct TensorSteps {
  int64_t grad_step, in_step;
  RowsAhead* ahead;
  LKCONV_INLINE int64_t grad() const { return grad_step; }
  LKCONV_INLINE int64_t in() const { return in_step; }
  LKCONV_INLINE void request(int64_t count) const { ahead->request(count); }
};

// Keeps a pointer that is stepped in one register, where the compiler would keep the address of every step.
template <class Pixels>
LKCONV_INLINE void pin(Pixels&) {}

// `Pixels` is a pointer to vectors of T, or to parts of vectors of another type (element_vectors.h).
// a[u][v] += sum over x < B of grad[x] * in[u][x + v]. The first kLeft and the last kRight of the B + V - 1
// pixels of a row are zeros, which are left out.
template <class Product, class T, int B, int kLeft, int kRight, int U, int V, class Pixels, class Steps>
LKCONV_INLINE void correlate_block(Vec<T> (&a)[U][V], Pixels grad, Pixels in, int64_t in_row,
                                   const Steps& steps) {
  steps.request(B);
  pin(grad);
  pin(in);
  Vec<T> d[B];
#pragma GCC unroll 8
  for (int i = 0; i < B; ++i, grad += steps.grad()) d[i] = Product::value(load(grad));
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u, in += in_row) {
    Pixels at = in + kLeft * steps.in();
#pragma GCC unroll 16
    for (int j = kLeft; j < B + V - 1 - kRight; ++j, at += steps.in()) {
      Vec<T> p = Product::value(load(at));
      if (V > 1) keep(p);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v)
        if (j - v >= 0 && j - v < B) Product::add(a[u][v], d[j - v], p);
    }
  }
}

// One value of x, of whose taps those outside [v0, v1) meet zeros.
template <class Product, class Value, int U, int V, class Pixels, class Steps>
LKCONV_INLINE void correlate_pixel(Value (&a)[U][V], Pixels grad, Pixels in, int64_t in_row, int64_t v0,
                                   int64_t v1, const Steps& steps) {
  steps.request(1);
  const Value d = Product::value(load(grad));
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u, in += in_row)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v)
      if (v >= v0 && v < v1) Product::add(a[u][v], d, Product::value(load(in + v * steps.in())));
}

// acc[u][v] += sum over x < n of grad[x] * in[u][x + v], 4 values of x at a time. With kHalo the row of grad
// is as wide as the image, and V / 2 pixels at either end of `in` are halo, which is not read.
template <class Product, class T, int U, int V, bool kHalo, class Pixels, class Steps>
LKCONV_INLINE void correlate_blocks(T* acc, int64_t acc_row, Pixels grad, Pixels in, int64_t in_row,
                                    int64_t n, const Steps& steps) {
  constexpr int P = kHalo ? V / 2 : 0, B = 4;
  const int64_t dg = steps.grad(), di = steps.in();
  Vec<T> a[U][V] = {};
  int64_t x = 0;
  if (kHalo && n == B) {
    correlate_block<Product, T, B, P, P>(a, grad, in, in_row, steps);
    x = B;
  } else if (kHalo && n >= B + P) {
    correlate_block<Product, T, B, P, 0>(a, grad, in, in_row, steps);
    x = B;
  }
  for (; kHalo && x < P && x < n; ++x)
    correlate_pixel<Product, Vec<T>>(a, grad + x * dg, in + x * di, in_row, P - x, n + P - x, steps);
  for (; x + B + P <= n; x += B)
    correlate_block<Product, T, B, 0, 0>(a, grad + x * dg, in + x * di, in_row, steps);
  if (kHalo && x > 0 && x + B == n) {
    correlate_block<Product, T, B, 0, P>(a, grad + x * dg, in + x * di, in_row, steps);
    x = n;
  }
  for (; x < n; ++x)
    correlate_pixel<Product, Vec<T>>(a, grad + x * dg, in + x * di, in_row, 0, kHalo ? n + P - x : V, steps);
  add_sums(acc, acc_row, a);
}

// A sweep takes the pixels of a row one after the other. A pixel meets the V values of grad that registers
// keep until it has passed: U + 1 loads for U V multiply-adds. These are the taps [V0, V1) of pixel `in`.
template <class Product, int V0, int V1, class T, int U, int V, class Pixels>
LKCONV_INLINE void sweep_pixel(Vec<T> (&a)[U][V], const Vec<T> (&d)[V], Pixels in, int64_t in_row) {
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u, in += in_row) {
    Vec<T> p = Product::value(load(in));
    keep(p);
#pragma GCC unroll 8
    for (int v = V0; v < V1; ++v) Product::add(a[u][v], d[v], p);
  }
}
// Moves on to the next value of grad, if there is one.
template <class Product, class T, int V, class Pixels>
LKCONV_INLINE void next_value(Vec<T> (&d)[V], Pixels& grad, int64_t step, bool more) {
#pragma GCC unroll 8
  for (int v = V - 1; v > 0; --v) d[v] = d[v - 1];
  if (more) d[0] = Product::value(load(grad)), grad += step;
}

// The first pixels of a row meet one value of grad after the other, and the last ones leave them.
template <class Product, class T, int U, int V, class Pixels, int... n>
LKCONV_INLINE void sweep_first_pixels(Vec<T> (&a)[U][V], Vec<T> (&d)[V], Pixels& grad, int64_t grad_step,
                                      Pixels& in, int64_t in_step, int64_t in_row,
                                      std::integer_sequence<int, n...>) {
  ((n > 0 ? next_value<Product, T>(d, grad, grad_step, true) : void(),
    sweep_pixel<Product, 0, V - int(sizeof...(n)) + n, T>(a, d, in, in_row), in += in_step),
   ...);
}
template <class Product, class T, int U, int V, class Pixels, int... n>
LKCONV_INLINE void sweep_last_pixels(Vec<T> (&a)[U][V], Vec<T> (&d)[V], Pixels& in, int64_t in_step,
                                     int64_t in_row, std::integer_sequence<int, n...>) {
  ((next_value<Product, T>(d, in, 0, false), sweep_pixel<Product, n + 1, V, T>(a, d, in, in_row),
    in += in_step),
   ...);
}

// a[u][v] += sum over x < n of grad[x] * in[u][x + v]; see correlate_blocks for kHalo. n is at least V.
template <class Product, class T, int U, int V, bool kHalo, class Pixels, class Steps>
LKCONV_INLINE void sweep_row(Vec<T> (&a)[U][V], Pixels grad, Pixels in, int64_t in_row, int64_t n,
                             const Steps& steps) {
  constexpr int P = kHalo ? V / 2 : 0, kEdge = V - 1 - P, kAsked = 7;
  constexpr auto kEdges = std::make_integer_sequence<int, kEdge>();
  const int64_t dg = steps.grad(), di = steps.in();
  Vec<T> d[V] = {};  // d[v]: the value v pixels back
  in += P * di;
#pragma GCC unroll 8
  for (int v = 0; v <= P; ++v) next_value<Product, T>(d, grad, dg, true);
  steps.request(2 * kEdge);
  sweep_first_pixels<Product, T>(a, d, grad, dg, in, di, in_row, kEdges);
  for (int64_t x = kEdge; x < n - P;) {
    const int64_t stop = std::min(x + kAsked, n - P);
    steps.request(stop - x);
    for (; x < stop; ++x, in += di) {
      if (kEdge > 0 || x > 0) next_value<Product, T>(d, grad, dg, true);
      sweep_pixel<Product, 0, V, T>(a, d, in, in_row);
    }
  }
  sweep_last_pixels<Product, T>(a, d, in, di, in_row, kEdges);
}

// Rows of grad and of the input that meet, one after the other.
struct RowSteps {
  int64_t rows, grad, in;  // elements from one to the next
};

// The same for some rows, whose sums stay in registers.
template <class Product, class T, int U, int V, bool kHalo, class Pixels, class Steps>
LKCONV_INLINE void sweep_rows(T* acc, int64_t acc_row, Pixels grad, Pixels in, int64_t in_row, int64_t n,
                              const RowSteps& rows, const Steps& steps) {
  Vec<T> a[U][V] = {};
  for (int64_t y = 0; y < rows.rows; ++y)
    sweep_row<Product, T, U, V, kHalo>(a, grad + y * rows.grad, in + y * rows.in, in_row, n, steps);
  add_sums(acc, acc_row, a);
}

// The same for rows of any length, and for processors with few registers, which are given single rows.
template <class Product, class T, int U, int V, bool kHalo, class Pixels, class Steps>
LKCONV_INLINE void correlate_unit(T* acc, int64_t acc_row, Pixels grad, Pixels in, int64_t in_row, int64_t n,
                                  const Steps& steps, const RowSteps& rows = {1, 0, 0}) {
  if constexpr (kRegisters < 32)
    return correlate_blocks<Product, T, U, V, kHalo>(acc, acc_row, grad, in, in_row, n, steps);
  if (n >= V) return sweep_rows<Product, T, U, V, kHalo>(acc, acc_row, grad, in, in_row, n, rows, steps);
  for (int64_t y = 0; y < rows.rows; ++y)
    correlate_blocks<Product, T, U, V, kHalo>(acc, acc_row, grad + y * rows.grad, in + y * rows.in, in_row, n,
                                              steps);
}

// The same for any stride and dilation.
template <class T, int U, int V>
LKCONV_INLINE void correlate_strided(T* acc, int64_t acc_row, const T* grad, const T* in, int64_t in_row,
                                     int64_t n, int64_t stride, int64_t dil) {
  constexpr int L = kLanes<T>;
  Vec<T> a[U][V] = {};
  for (int64_t x = 0; x < n; ++x, in += stride * L) {
    const Vec<T> d = load(grad + x * L);
    const T* row = in;
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u, row += in_row)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) a[u][v] += d * load(row + v * dil * L);
  }
  add_sums(acc, acc_row, a);
}

// Kernel rows handled together: enough independent sums to hide the latency of a multiply-add, and with 32
// registers as many as they hold beside a row's values of grad.
constexpr int rows_together(int taps) {
  if (kRegisters < 32) return taps <= 3 ? 3 : taps <= 5 ? 2 : 1;
  return taps <= 5 ? 5 : taps <= 7 ? 3 : 2;
}
// Calls each(u, part) for `rows` kernel rows in even parts of at most kMost, whose size is a constant: single
// rows are few sums.
template <int kMost, class Each>
LKCONV_INLINE void for_rows_together(int64_t rows, Each&& each) {
  for (int64_t u = 0, part; u < rows; u += part) {
    part = even_part(rows - u, kMost);
    if constexpr (kMost >= 5) {
      if (part == 4) each(u, std::integral_constant<int, 4>());
      if (part == 5) each(u, std::integral_constant<int, 5>());
    }
    if constexpr (kMost >= 3)
      if (part == 3) each(u, std::integral_constant<int, 3>());
    if constexpr (kMost >= 2)
      if (part == 2) each(u, std::integral_constant<int, 2>());
    if (part == 1) each(u, std::integral_constant<int, 1>());
  }
}

// How a row of grad_output meets rows of the input.
struct RowMatch {
  int64_t n, stride, dil;
  bool halo;  // known_halo of problem.h
};

template <class Product, class T, int U, int V>
LKCONV_INLINE void correlate_some(T* acc, int64_t acc_row, const T* grad, const T* in, int64_t in_row,
                                  const RowMatch& m) {
  constexpr bool kOdd = V == 3 || V == 5 || V == 7;
  if (kRowsTogether == 1 && (m.stride != 1 || m.dil != 1))
    correlate_strided<T, U, V>(acc, acc_row, grad, in, in_row, m.n, m.stride, m.dil);
  else if (kOdd && m.halo)
    correlate_unit<Product, T, U, V, kOdd>(acc, acc_row, grad, in, in_row, m.n, ScratchSteps<T>());
  else
    correlate_unit<Product, T, U, V, false>(acc, acc_row, grad, in, in_row, m.n, ScratchSteps<T>());
}

template <class Product, class T, int V>
void correlate_rows(T* acc, int64_t acc_row, const T* grad, const T* in, int64_t in_row, int64_t rows,
                    const RowMatch& m) {
  for_rows_together<rows_together(V)>(rows, [&](int64_t u, auto part) __attribute__((always_inline)) {
    correlate_some<Product, T, part(), V>(acc + u * acc_row, acc_row, grad, in + u * in_row, in_row, m);
  });
}

// All taps of kernel rows [0, rows) against one row of grad_output, or against two.
template <class Product, class T>
void correlate(T* acc, int64_t acc_row, const T* grad, const T* in, int64_t in_row, int64_t rows,
               int64_t taps, const RowMatch& m) {
  constexpr int L = kLanes<T>;
  while (taps > 0) {
    const int64_t part = taps_together(taps);
    switch (part) {
#define LKCONV_CASE(V)                                                      \
  case V:                                                                   \
    correlate_rows<Product, T, V>(acc, acc_row, grad, in, in_row, rows, m); \
    break;
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
    taps -= part;
    acc += part * L;
    in += part * m.dil * L;
  }
}

// add(product, y, u0, u1) for rows [y0, y1) of grad_output and the kernel rows that meet the image there;
// where products are of two rows at once, for row y and the one below it, and then for what only one of them
// meets.
template <class Add>
LKCONV_INLINE void for_steps_over_rows(const Geometry& p, int64_t y0, int64_t y1, Add&& add) {
  struct Taps {
    int64_t u0, u1;
  };
  const auto taps_of = [&](int64_t y) {
    const int64_t top = y * p.stride_h - p.pad_h;
    Taps t;
    clip_taps(top, top, p.height, p.kernel_h, p.dil_h, t.u0, t.u1);
    return t;
  };
  const auto step = [&](auto product, int64_t y, int64_t u0, int64_t u1) {
    if (u0 < u1) add(product, y, u0, u1);
  };
  for (int64_t y = y0; y < y1; y += kRowsTogether) {
    const Taps row = taps_of(y);
    if (kRowsTogether == 1 || y + 1 == y1) {
      step(LastRow(), y, row.u0, row.u1);
      continue;
    }
    const Taps below = taps_of(y + 1);
    const int64_t end = std::max(row.u0, std::min(row.u1, below.u1));
    step(Rows(), y, row.u0, end);
    step(LastRow(), y, end, row.u1);
    step(LastRow(), y + 1, below.u0, std::min(row.u0, below.u1));
  }
}

}  // namespace lkconv::cpu::LKCONV_ISA
