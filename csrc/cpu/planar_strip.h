// Kernels of a single row or column over contiguous planes, as products of matrices: a row of outputs is one
// of pixels times a band of taps, each further down moved by one, and a column likewise. A block of Y rows of
// X vectors takes Y scalars and X vectors for Y X multiply-adds, however long the kernel is, where a sum
// along the rows loads a vector for each. Taps outside the band are left out by masks, not multiplied.
#pragma once

#include "planar_in_place.h"

namespace lkconv::cpu::LKCONV_ISA {

#if LKCONV_AVX512

// A block of outputs from row y0 and column x0 on, of which rows have `last` columns in their last vector.
// Of a tall kernel, taps[i] is tap i; of a wide one, tap (count - 1 - i). Both lie between kStripSlack zeros.
template <class S>
struct StripBlock {
  const float* in;  // the plane
  int64_t in_row;
  const float* taps;
  int64_t count, pad, pixels;  // along the kernel's axis
  S* out;                      // of y0 and x0
  int64_t out_row;
  int64_t y0, x0;
  ElementMask last;
  float initial;
};

template <int Y, int X>
using StripSums = Vec<float>[Y][X];

// Bits [first, last) of those there are.
LKCONV_INLINE uint64_t bits_between(int64_t first, int64_t last) {
  const auto below = [](int64_t i) {
    return i >= 64 ? ~uint64_t(0) : (uint64_t(1) << std::max<int64_t>(0, i)) - 1;
  };
  return below(last) & ~below(first);
}

// Adds pixels [first, last) of the axis that the kernel lies along; with kEdges, to those outputs only whose
// windows hold them.
template <bool kTall, bool kEdges, int Y, int X, class S>
LKCONV_INLINE void add_to_strip(StripSums<Y, X>& sums, const StripBlock<S>& b, int64_t first, int64_t last) {
  constexpr int L = kLanes<float>;
  for (int64_t j = first; j < last; ++j) {
    // Tap (j + pad - output), which counts down along the outputs.
    const int64_t tap = j + b.pad - (kTall ? b.y0 : b.x0);
    const float* const vectors = kTall ? b.in + j * b.in_row + b.x0 : b.taps + (b.count - 1 - tap);
    Vec<float> v[X];
#pragma GCC unroll 4
    for (int x = 0; x < X; ++x) {
      Vec<float> loaded =
          kTall && x + 1 == X ? (Vec<float>)load_bits(vectors + x * L, b.last) : load(vectors + x * L);
      keep(loaded);
      v[x] = loaded;
    }
    // Outputs [tap - count + 1, tap] of the axis have a tap.
    const uint64_t holding = kEdges ? bits_between(tap - b.count + 1, tap + 1) : ~uint64_t(0);
#pragma GCC unroll 16
    for (int y = 0; y < Y; ++y) {
      const Vec<float> scalar = broadcast(kTall ? b.taps[tap - y] : b.in[(b.y0 + y) * b.in_row + j]);
#pragma GCC unroll 4
      for (int x = 0; x < X; ++x) {
        if constexpr (kEdges) {
          const __mmask16 mask = kTall ? __mmask16(-(holding >> y & 1)) : __mmask16(holding >> (x * L));
          sums[y][x] =
              (Vec<float>)_mm512_mask3_fmadd_ps((__m512)scalar, (__m512)v[x], (__m512)sums[y][x], mask);
        } else {
          sums[y][x] += scalar * v[x];
        }
      }
    }
  }
}

template <bool kTall, int Y, int X, class S>
void sum_strip(const StripBlock<S>& block) {
  constexpr int L = kLanes<float>;
  const StripBlock<S> b = block;  // no store can change it
  StripSums<Y, X> sums;
#pragma GCC unroll 16
  for (int y = 0; y < Y; ++y)
#pragma GCC unroll 4
    for (int x = 0; x < X; ++x) sums[y][x] = broadcast(b.initial);
  const int64_t columns = (X - 1) * L + __builtin_popcount(b.last);
  const StripRange r = strip_range(kTall ? b.y0 : b.x0, kTall ? Y : columns, b.pad, b.count, b.pixels);
  add_to_strip<kTall, true>(sums, b, r.first, r.inner);
  add_to_strip<kTall, false>(sums, b, r.inner, r.outer);
  add_to_strip<kTall, true>(sums, b, r.outer, r.last);
#pragma GCC unroll 16
  for (int y = 0; y < Y; ++y)
#pragma GCC unroll 4
    for (int x = 0; x < X; ++x) store_first(b.out + y * b.out_row + x * L, sums[y][x], columns - x * L);
}

// The kernels of each kind of block.
template <class S, bool kTall, size_t... B>
LKCONV_INLINE auto strip_kernel_of(int64_t block, std::index_sequence<B...>) {
  static constexpr void (*kTable[])(const StripBlock<S>&) = {
      sum_strip<kTall, int(kStripBlocks[B].rows), int(kStripBlocks[B].vectors), S>...};
  return kTable[block];
}

// Walks the planes of one convolution.
template <class T>
class StripTask {
 public:
  StripTask(const ForwardProblem& f, const Plan& plan)
      : f_(f), tall_(f.kernel_w == 1), shape_(kStripBlocks[plan.block]) {
    const StripSizes s = strip_sizes(f, sizeof(T));
    taps_ = thread_scratch<float>(s.taps + s.plane);
    plane_ = taps_ + s.taps;
    zero(taps_, s.taps / kLanes<float>);
    constexpr auto kBlocks = std::make_index_sequence<size_t(kStripBlockCount)>();
    kernel_ = tall_ ? strip_kernel_of<T, true>(plan.block, kBlocks)
                    : strip_kernel_of<T, false>(plan.block, kBlocks);
    const int64_t width = shape_.vectors * kLanes<float>;
    rows_ = ceil_div(f.out_height, shape_.rows), columns_ = ceil_div(f.out_width, width);
    ahead_ = {f.input,         f.height * f.width, f.output, f.out_height * f.out_width, f.batch * f.channels,
              rows_ * columns_};
  }

  void run(int64_t n, int64_t c) const {
    load_taps(c);
    const T* in = element<T>(f_.input, n, f_.input_channel(c, 0), 0);
    T* out = element<T>(f_.output, n, c, 0);
    StripBlock<T> b{};
    take_plane(b, in);
    b.taps = taps_ + kStripSlack;
    b.count = tall_ ? f_.kernel_h : f_.kernel_w, b.pad = tall_ ? f_.pad_h : f_.pad_w;
    b.pixels = tall_ ? f_.height : f_.width;
    b.out_row = f_.output.stride_h;
    b.initial = f_.bias.data ? as_float(*element<T>(f_.bias, 0, c, 0)) : 0.0f;
    const int64_t width = shape_.vectors * kLanes<float>;
    b.last = first_elements(std::min<int64_t>(kLanes<float>, f_.out_width - width + kLanes<float>));
    // The last blocks move up and left to stay whole; what they compute twice comes out the same.
    for (int64_t i = 0; i < rows_; ++i)
      for (int64_t k = 0; k < columns_; ++k) {
        ahead_.request(in, out, i * columns_ + k);
        b.y0 = std::min(i * shape_.rows, f_.out_height - shape_.rows);
        b.x0 = std::max<int64_t>(0, std::min(k * width, f_.out_width - width));
        b.out = out + b.y0 * b.out_row + b.x0;
        kernel_(b);
      }
  }

 private:
  void load_taps(int64_t c) const {
    const T* weight = element<T>(f_.weight, 0, f_.weight_channel(c, 0), 0);
    const int64_t count = f_.kernel_h * f_.kernel_w;
    const int64_t step = tall_ ? f_.weight.stride_h : f_.weight.stride_w;
    for (int64_t i = 0; i < count; ++i)
      taps_[kStripSlack + (tall_ ? i : count - 1 - i)] = as_float(weight[i * step]);
  }

  // Floats are read where they are; others become floats first.
  void take_plane(StripBlock<T>& b, const T* in) const {
    if constexpr (std::is_same_v<T, float>) {
      b.in = in, b.in_row = f_.input.stride_h;
    } else {
      load_planar_rows<float, T>({plane_, f_.width, 0, 1}, 0, 0, in, f_.input.stride_h, f_.height, f_.width);
      b.in = plane_, b.in_row = f_.width;
    }
  }

  const ForwardProblem& f_;
  const bool tall_;
  const PlanarBlock shape_;
  void (*kernel_)(const StripBlock<T>&);
  float *taps_, *plane_;
  int64_t rows_, columns_;  // of blocks
  PlanesAhead<T> ahead_;
};

#endif

}  // namespace lkconv::cpu::LKCONV_ISA
