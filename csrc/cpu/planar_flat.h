// Direct summation over small planes that a padding leaves their size: outputs are counted through row after
// row, so that vectors are full whatever the width. Rows of a plane lie next to each other in scratch,
// between rows of zeros; there, a tap's pixels are the outputs' own numbers and a distance. Each column of
// taps is summed apart. Its sums are moved by its distance, all kernel rows at once, and join the output's,
// where a mask leaves out the lanes whose pixels lie beside the image.
#pragma once

#include "planar_in_place.h"

namespace lkconv::cpu::LKCONV_ISA {

#if LKCONV_AVX512

// Kernel rows of KH that one product takes (row_products.h).
template <class T, int KH>
constexpr int kFlatRows = std::is_same_v<T, bf16> && KH > 1 ? kRowsTogether : 1;

// The taps of one channel: tap (u, v) is at[u * row + v * column].
template <class T>
struct FlatTaps {
  const T* at;
  int64_t row, column;

  // What a product takes of them: a float, or those of two kernel rows.
  template <int KH>
  LKCONV_INLINE uint32_t product(int u, int v) const {
    const T* tap = at + u * row + v * column;
    if constexpr (kFlatRows<T, KH> == 2) return tap->bits | (u + 1 < KH ? uint32_t(tap[row].bits) << 16 : 0);
    const float value = as_float(*tap);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
  }
};

LKCONV_INLINE Vec<float> broadcast_bits(uint32_t bits) { return (Vec<float>)(VU32{} + bits); }

// The pixels of a product of `kRows` kernel rows: of the one at `from`, and of the one at `below` if there
// is.
template <int kRows>
LKCONV_INLINE Vec<float> flat_pixels(const float* from, const float*, bool) {
  return load(from);
}
template <int kRows>
LKCONV_INLINE Vec<float> flat_pixels(const bf16* from, [[maybe_unused]] const bf16* below,
                                     [[maybe_unused]] bool last) {
#if LKCONV_ROW_PAIRS
  const auto half = [](const bf16* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
  const Vec<int16_t> order = shuffle_index<u16>([](int j) { return j / 2 + j % 2 * kLanes<u16>; });
  if (kRows == 2 && last) return (Vec<float>)_mm512_cvtepu16_epi32(half(from));
  if (kRows == 2)
    return (Vec<float>)_mm512_permutex2var_epi16(_mm512_castsi256_si512(half(from)), (__m512i)order,
                                                 _mm512_castsi256_si512(half(below)));
#endif
  return load_as(from, 0.0f);
}

template <int kRows>
LKCONV_INLINE void add_flat_product(Vec<float>& sum, Vec<float> tap, Vec<float> pixels) {
  std::conditional_t<kRows == 2, Rows, OneRow>::add(sum, tap, pixels);
}

// Output i of `count` reads, for tap (u, v), pixel in[i + u * row + v * dil]; masks[i / L * KW + v] says for
// which of a vector's outputs there is one. Behind the last pixel some more may be read.
template <class T, class S>
struct FlatPlane {
  const T* in;
  int64_t row, dil;
  S* out;
  int64_t count;
  const FlatMask* masks;
  FlatTaps<T> taps;
  uint32_t* products;  // where taps are kept that registers cannot hold
  float initial;
  const S* ahead;  // outputs to come, asked for a vector of floats at a time
  int64_t ahead_step;
};

// The sums of KW columns of taps, for one vector of outputs.
template <int KW>
using ColumnSums = Vec<float>[KW];

// Those of X neighbouring vectors, for which taps are loaded once, or held in registers.
template <class T, int KH, int KW, int X, bool kHeld>
LKCONV_INLINE void sum_columns(ColumnSums<KW> (&sums)[X], const T* in, int64_t row, const uint32_t* products,
                               const Vec<float>* held, Vec<float> initial) {
#pragma GCC unroll 2
  for (int x = 0; x < X; ++x)
#pragma GCC unroll 8
    for (int v = 0; v < KW; ++v) sums[x][v] = v == KW / 2 ? initial : Vec<float>{};
  constexpr int R = kFlatRows<T, KH>;
#pragma GCC unroll 8
  for (int u = 0; u < KH; u += R, in += R * row) {
    Vec<float> pixels[X];
#pragma GCC unroll 2
    for (int x = 0; x < X; ++x) {
      const T* from = in + x * kLanes<float>;
      Vec<float> p = flat_pixels<R>(from, from + row, u + 1 == KH);
      keep(p);
      pixels[x] = p;
    }
#pragma GCC unroll 8
    for (int v = 0; v < KW; ++v) {
      const int i = u / R * KW + v;
      Vec<float> tap = kHeld ? held[i] : broadcast_bits(products[i]);
      if (X > 1) keep(tap);
#pragma GCC unroll 2
      for (int x = 0; x < X; ++x) add_flat_product<R>(sums[x][v], tap, pixels[x]);
    }
  }
}

// One vector of outputs from the columns' sums for it and for the next one.
template <int KW>
LKCONV_INLINE Vec<float> join_columns(const ColumnSums<KW>& now, const ColumnSums<KW>& next,
                                      const Vec<int32_t> (&moves)[KW], const FlatMask* masks) {
  const auto moved = [&](int v) {
    return v == 0 ? now[0]
                  : (Vec<float>)__builtin_shuffle((Vec<int32_t>)now[v], (Vec<int32_t>)next[v], moves[v]);
  };
  Vec<float> sum = moved(KW / 2);
#pragma GCC unroll 8
  for (int v = 0; v < KW; ++v)
    if (v != KW / 2)
      sum = (Vec<float>)_mm512_mask_add_ps((__m512)sum, __mmask16(masks[v]), (__m512)sum, (__m512)moved(v));
  return sum;
}

// One vector of outputs at a time where registers hold all taps and the columns' sums, else two.
template <class T, class S, int KH, int KW>
void sum_flat_plane(const FlatPlane<T, S>& plane) {
  constexpr int L = kLanes<float>, R = kFlatRows<T, KH>, kProducts = (KH + R - 1) / R * KW;
  constexpr int X = flat_taps_are_held(kProducts, KW) ? 1 : 2;
  FlatPlane<T, S> p = plane;  // no store can change it
  const Vec<float> initial = broadcast(p.initial);
  Vec<float> held[X == 1 ? kProducts : 1];
#pragma GCC unroll 8
  for (int u = 0; u < KH; u += R)
#pragma GCC unroll 8
    for (int v = 0; v < KW; ++v) {
      const uint32_t bits = p.taps.template product<KH>(u, v);
      if constexpr (X == 1) {
        Vec<float> tap = broadcast_bits(bits);
        keep(tap);
        held[u / R * KW + v] = tap;
      } else {
        p.products[u / R * KW + v] = bits;
      }
    }
  Vec<int32_t> moves[KW];
#pragma GCC unroll 8
  for (int v = 0; v < KW; ++v) moves[v] = shuffle_index<float>([](int j) { return j; }) + int32_t(v * p.dil);

  ColumnSums<KW> now[1];
  sum_columns<T, KH, KW, 1, X == 1>(now, p.in, p.row, p.products, held, initial);
  for (p.in += L; p.count > 0; p.in += X * L, p.out += X * L, p.masks += X * KW, p.count -= X * L) {
    ColumnSums<KW> next[X];
    sum_columns<T, KH, KW, X, X == 1>(next, p.in, p.row, p.products, held, initial);
#pragma GCC unroll 2
    for (int x = 0; x < X; ++x) {
      const Vec<float> sum = join_columns<KW>(x ? next[x - 1] : now[0], next[x], moves, p.masks + x * KW);
      __builtin_prefetch(p.ahead, 1, 2);
      p.ahead += p.ahead_step;
      store_first(p.out + x * L, sum, p.count - x * L);
    }
#pragma GCC unroll 8
    for (int v = 0; v < KW; ++v) now[0][v] = next[X - 1][v];
  }
}

template <class T, class S>
using FlatKernel = void(const FlatPlane<T, S>&);
template <class T, class S, int KW, int... KH>
LKCONV_INLINE FlatKernel<T, S>* flat_kernel_of(int64_t rows, std::integer_sequence<int, KH...>) {
  static constexpr FlatKernel<T, S>* kTable[] = {sum_flat_plane<T, S, KH + 1, KW>...};
  return kTable[rows - 1];
}
template <class T, class S>
FlatKernel<T, S>* flat_kernel_of(int64_t rows, int64_t columns) {
  constexpr auto kRows = std::make_integer_sequence<int, int(kMostFlatTaps)>();
  return columns == 1   ? flat_kernel_of<T, S, 1>(rows, kRows)
         : columns == 3 ? flat_kernel_of<T, S, 3>(rows, kRows)
         : columns == 5 ? flat_kernel_of<T, S, 5>(rows, kRows)
                        : flat_kernel_of<T, S, 7>(rows, kRows);
}

template <class T>
LKCONV_INLINE void copy_elements(T* to, const T* from, int64_t n) {
  constexpr int L = kElements<T>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store_whole(to + i, load_whole(from + i));
  if (const ElementMask rest = first_elements(n - i)) store_bits(to + i, load_bits(from + i, rest), rest);
}

// Rows that lie `step` apart, next to each other.
template <class T>
LKCONV_INLINE void copy_rows(T* to, const T* from, int64_t step, int64_t rows, int64_t width) {
  if (step == width) return copy_elements(to, from, rows * width);
  for (int64_t y = 0; y < rows; ++y) copy_elements(to + y * width, from + y * step, width);
}

// Walks planes: while one is summed the next one is in scratch already.
template <class T>
class FlatTask {
 public:
  FlatTask(const ForwardProblem& f, const Plan& plan)
      : f_(f), sizes_(flat_sizes(f, sizeof(T))), width_(f.out_width) {
    char* at = static_cast<char*>(thread_scratch_bytes(size_t(plan.scratch_bytes)));
    std::memset(at, 0, size_t(2 * sizes_.window));
    windows_[0] = reinterpret_cast<T*>(at);
    windows_[1] = reinterpret_cast<T*>(at += sizes_.window);
    products_ = reinterpret_cast<uint32_t*>(at += sizes_.window);
    finished_ = reinterpret_cast<float*>(at += sizes_.products);
    masks_ = reinterpret_cast<FlatMask*>(at + sizes_.finished);
    place_masks();
    const int64_t plane = f.out_height * width_ * int64_t(sizeof(T));
    if (f.batch * f.channels * plane >= kRequestBytes) {
      ahead_step_ = kLanes<float>;
      ahead_ = f.output.stride_c * ceil_div(kAheadBytes, plane);
    }
  }

  // Planes [first, last), counted over (image, channel).
  void run(int64_t first, int64_t last) const {
    Plane p{first / f_.channels, first % f_.channels};
    load_plane(p, windows_[0]);
    for (int64_t i = 0; i < last - first; ++i) {
      const Plane next = p.c + 1 < f_.channels ? Plane{p.n, p.c + 1} : Plane{p.n + 1, 0};
      if (first + i + 1 < last) load_plane(next, windows_[(i + 1) % 2]);
      sum_plane(p, windows_[i % 2]);
      p = next;
    }
  }

 private:
  void load_plane(Plane p, T* window) const {
    copy_rows(window + sizes_.image, element<T>(f_.input, p.n, f_.input_channel(p.c, 0), 0),
              f_.input.stride_h, sizes_.rows, width_);
  }

  void sum_plane(Plane p, const T* window) const {
    T* out = element<T>(f_.output, p.n, p.c, 0);
    if (f_.output.stride_h == width_) return sum_to(out, out + ahead_, ahead_step_, p.c, window);
    sum_to(finished_, finished_, 0, p.c, window);
    for (int64_t y = 0; y < f_.out_height; ++y)
      store_planar_row(out + y * f_.output.stride_h, finished_ + y * width_, 0, 1, width_);
  }

  template <class S>
  void sum_to(S* out, const S* ahead, int64_t ahead_step, int64_t c, const T* window) const {
    FlatPlane<T, S> plane;
    plane.in = window + sizes_.image - f_.pad_h * width_ - f_.pad_w;
    plane.row = f_.dil_h * width_, plane.dil = f_.dil_w;
    plane.out = out, plane.count = f_.out_height * width_;
    plane.masks = masks_, plane.products = products_;
    plane.taps = {element<T>(f_.weight, 0, f_.weight_channel(c, 0), 0), f_.weight.stride_h,
                  f_.weight.stride_w};
    plane.initial = f_.bias.data ? as_float(*element<T>(f_.bias, 0, c, 0)) : 0.0f;
    plane.ahead = ahead, plane.ahead_step = ahead_step;
    flat_kernel_of<T, S>(f_.kernel_h, f_.kernel_w)(plane);
  }

  // For each vector of outputs and column of taps.
  void place_masks() const {
    FlatMask* mask = masks_;
    for (int64_t i = 0; i < f_.out_height * width_; i += kLanes<float>)
      for (int64_t v = 0; v < f_.kernel_w; ++v)
        *mask++ = FlatMask(bits_in_row(i % width_, v * f_.dil_w - f_.pad_w, width_, kLanes<float>));
  }

  static constexpr int64_t kAheadBytes = 16 << 10;
  const ForwardProblem& f_;
  const FlatSizes sizes_;
  const int64_t width_;
  T* windows_[2];
  uint32_t* products_;
  float* finished_;
  FlatMask* masks_;
  int64_t ahead_ = 0, ahead_step_ = 0;  // elements
};

// Task = (image, channel).
template <class T>
void forward_flat(const ForwardProblem& f, const Plan& plan, int64_t task0, int64_t task1) {
  if (task0 < task1) FlatTask<T>(f, plan).run(task0, task1);
}

#endif

}  // namespace lkconv::cpu::LKCONV_ISA
