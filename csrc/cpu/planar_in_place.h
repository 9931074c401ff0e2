// planar.h's sums with the pixels read where they are: no window is filled. Columns of halo are lanes that a
// masked load leaves out, rows of halo are left out of the sums. For float32 tensors at stride 1, with masked
// loads that never touch the lanes they leave out.
#pragma once

#include "planar_plan.h"

namespace lkconv::cpu::LKCONV_ISA {

#if LKCONV_AVX512

// One block of outputs: Y rows of X vectors, of which `rows` rows exist. Tap (u, v) of output row y reads
// row y + u * dil of those that begin at `in`, `in_row` apart, at columns[v]; masks[v * X + x] says which
// lanes of vector x lie in the image.
struct PixelBlock {
  float* out;
  int64_t out_row, rows;
  int64_t row_lanes, last_lanes;  // of a row's last vector that may be written, and of the last row's
  const float* in;
  int64_t in_row;
  uint32_t inside;        // bit i: whether the image has the row at in + i * in_row
  int64_t first, height;  // the image's row that `in` is, and how many there are
  const int64_t* columns;
  const uint16_t* masks;
  int64_t count;  // columns of taps
  const float* taps;
  int64_t tap_row, tap_column;
};

template <int X>
LKCONV_INLINE void load_masks(__mmask16 (&m)[X], const uint16_t* from) {
#pragma GCC unroll 4
  for (int x = 0; x < X; ++x) m[x] = from[x];
}

LKCONV_INLINE Vec<float> load_lanes(const float* from, __mmask16 mask) {
  return (Vec<float>)_mm512_maskz_loadu_ps(mask, from);
}

// Bit i: whether first + i * step lies in [0, size).
LKCONV_INLINE uint32_t bits_inside(int64_t first, int64_t step, int64_t size, int64_t count) {
  int64_t a = -first, b = size - first;
  if (step > 1) a = ceil_div(std::max<int64_t>(0, a), step), b = ceil_div(std::max<int64_t>(0, b), step);
  a = std::clamp<int64_t>(a, 0, count), b = std::clamp<int64_t>(b, a, count);
  return uint32_t((uint64_t(1) << b) - (uint64_t(1) << a));
}

// The same bits, which the compiler takes for new ones: else it spreads them over the stack beforehand.
LKCONV_INLINE uint32_t in_register(uint32_t bits) {
  asm volatile("" : "+r"(bits));
  return bits;
}

// Lanes of row y's last vector that may be read and written.
LKCONV_INLINE int64_t lanes_of_row(const PixelBlock& r, int y) {
  return y + 1 < r.rows ? r.row_lanes : y + 1 == r.rows ? r.last_lanes : 0;
}

template <bool kAssign, int Y, int X>
LKCONV_INLINE void begin_pixel_sums(Vec<float> (&a)[Y][X], const PixelBlock& r, float initial) {
  constexpr int L = kLanes<float>;
#pragma GCC unroll 16
  for (int y = 0; y < Y; ++y)
#pragma GCC unroll 4
    for (int x = 0; x < X; ++x) {
      a[y][x] = broadcast(initial);
      if (!kAssign)
        a[y][x] = load_part(r.out + y * r.out_row + x * L,
                            x + 1 == X   ? lanes_of_row(r, y)
                            : y < r.rows ? L
                                         : 0,
                            0.0f);
    }
}

template <int Y, int X>
LKCONV_INLINE void store_pixel_sums(const Vec<float> (&a)[Y][X], const PixelBlock& r) {
  constexpr int L = kLanes<float>;
  const bool whole = r.rows == Y && r.row_lanes == L;
  float* to = r.out;
#pragma GCC unroll 16
  for (int y = 0; y < Y; ++y, to += r.out_row)
#pragma GCC unroll 4
    for (int x = 0; x < X; ++x) {
      const bool last = x + 1 == X;
      if (whole && !(last && y + 1 == Y))
        store(to + x * L, a[y][x]);
      else
        store_part(to + x * L, a[y][x], last ? lanes_of_row(r, y) : y < r.rows ? L : 0);
    }
}

// out (+)= K kernel rows without gaps: a pixel vector is loaded once for all of them that meet it.
template <int Y, int X, int K, bool kAssign>
void pixels_unit(const PixelBlock& r, float initial) {
  constexpr int L = kLanes<float>;
  Vec<float> a[Y][X];
  begin_pixel_sums<kAssign>(a, r, initial);
  const float* taps = r.taps;
  for (int64_t v = 0; v < r.count; ++v, taps += r.tap_column) {
    __mmask16 masks[X];
    load_masks(masks, r.masks + v * X);
    Vec<float> k[K];
#pragma GCC unroll 8
    for (int u = 0; u < K; ++u) {
      k[u] = broadcast(taps[u * r.tap_row]);
      keep(k[u]);
    }
    const float* in = r.in + r.columns[v];
    const uint32_t inside = in_register(r.inside);
#pragma GCC unroll 32
    for (int i = 0; i < Y + K - 1; ++i, in += r.in_row) {
      if (!(inside & (1u << i))) continue;
#pragma GCC unroll 4
      for (int x = 0; x < X; ++x) {
        Vec<float> p = load_lanes(in + x * L, masks[x]);
        keep(p);
#pragma GCC unroll 8
        for (int u = 0; u < K; ++u)
          if (i - u >= 0 && i - u < Y) a[i - u][x] += k[u] * p;
      }
    }
  }
  store_pixel_sums(a, r);
}

// The same for kernel rows `dil` apart: one load per multiply-add.
template <int Y, int X, bool kAssign>
void pixels_dilated(const PixelBlock& r, float initial, int64_t rows, int64_t dil) {
  constexpr int L = kLanes<float>;
  Vec<float> a[Y][X];
  begin_pixel_sums<kAssign>(a, r, initial);
  for (int64_t u = 0; u < rows; ++u) {
    const uint32_t image = bits_inside(r.first + u * dil, 1, r.height, Y);
    for (int64_t v = 0; v < r.count; ++v) {
      __mmask16 masks[X];
      load_masks(masks, r.masks + v * X);
      const Vec<float> k = broadcast(r.taps[u * r.tap_row + v * r.tap_column]);
      const float* in = r.in + u * dil * r.in_row + r.columns[v];
      const uint32_t inside = in_register(image);
#pragma GCC unroll 16
      for (int y = 0; y < Y; ++y, in += r.in_row) {
        if (!(inside & (1u << y))) continue;
#pragma GCC unroll 4
        for (int x = 0; x < X; ++x) a[y][x] += k * load_lanes(in + x * L, masks[x]);
      }
    }
  }
  store_pixel_sums(a, r);
}

// Two planes whose rows fit half a vector each: the second plane's lanes follow the first one's. It lies
// `in`, `out` and `taps` elements from the first, less the lanes its rows begin at.
struct PixelPair {
  PixelBlock first;
  int64_t in, out, taps;
  float initial[2];
};
constexpr int kHalf = kLanes<float> / 2;
constexpr __mmask16 kUpper = __mmask16(0xffff << kHalf);

LKCONV_INLINE Vec<float> load_halves(const float* from, int64_t distance, __mmask16 mask) {
  const __m512 a = _mm512_maskz_loadu_ps(mask, from);
  return (Vec<float>)_mm512_mask_loadu_ps(a, __mmask16(mask << kHalf), from + distance);
}
LKCONV_INLINE Vec<float> broadcast_halves(float a, float b) {
  return (Vec<float>)_mm512_mask_blend_ps(kUpper, _mm512_set1_ps(a), _mm512_set1_ps(b));
}

template <int Y, int K, bool kAssign>
void pixels_pair(const PixelPair& pair) {
  const PixelBlock& r = pair.first;
  const auto lanes = [&](int y) { return __mmask16(y < r.rows ? (1u << r.last_lanes) - 1 : 0); };
  Vec<float> a[Y];
#pragma GCC unroll 16
  for (int y = 0; y < Y; ++y)
    a[y] = kAssign ? broadcast_halves(pair.initial[0], pair.initial[1])
                   : load_halves(r.out + y * r.out_row, pair.out, lanes(y));
  const float* taps = r.taps;
  for (int64_t v = 0; v < r.count; ++v, taps += r.tap_column) {
    const __mmask16 mask = r.masks[v];
    Vec<float> k[K];
#pragma GCC unroll 8
    for (int u = 0; u < K; ++u) {
      k[u] = broadcast_halves(taps[u * r.tap_row], taps[u * r.tap_row + pair.taps]);
      keep(k[u]);
    }
    const float* in = r.in + r.columns[v];
    const uint32_t inside = in_register(r.inside);
#pragma GCC unroll 32
    for (int i = 0; i < Y + K - 1; ++i, in += r.in_row) {
      if (!(inside & (1u << i))) continue;
      Vec<float> p = load_halves(in, pair.in, mask);
      keep(p);
#pragma GCC unroll 8
      for (int u = 0; u < K; ++u)
        if (i - u >= 0 && i - u < Y) a[i - u] += k[u] * p;
    }
  }
  float* out = r.out;
#pragma GCC unroll 16
  for (int y = 0; y < Y; ++y, out += r.out_row) {
    _mm512_mask_storeu_ps(out, lanes(y), (__m512)a[y]);
    _mm512_mask_storeu_ps(out + pair.out, __mmask16(lanes(y) << kHalf), (__m512)a[y]);
  }
}

using PairKernel = void(const PixelPair&);
template <int Y, bool kAssign, int... K>
LKCONV_INLINE PairKernel* pair_kernel_of(int64_t rows, std::integer_sequence<int, K...>) {
  static constexpr PairKernel* kTable[] = {pixels_pair<Y, K + 1, kAssign>...};
  return kTable[rows - 1];
}

struct PixelKernels {
  using Unit = void(const PixelBlock&, float);
  using Dilated = void(const PixelBlock&, float, int64_t, int64_t);
  Unit* unit[2][kMaxTaps];
  Dilated* dilated[2];
};
template <int Y, int X, int... K>
constexpr PixelKernels pixel_kernels(std::integer_sequence<int, K...>) {
  return {{{pixels_unit<Y, X, K + 1, true>...}, {pixels_unit<Y, X, K + 1, false>...}},
          {pixels_dilated<Y, X, true>, pixels_dilated<Y, X, false>}};
}
template <size_t... B>
LKCONV_INLINE const PixelKernels& pixel_kernels(int64_t block, std::index_sequence<B...>) {
  static constexpr PixelKernels kTable[] = {
      pixel_kernels<int(kPlanarBlocks[B].rows), int(kPlanarBlocks[B].vectors)>(
          std::make_integer_sequence<int, kMaxTaps>())...};
  return kTable[block];
}

// The planes of one convolution.
class PixelTask {
 public:
  PixelTask(const ForwardProblem& f, const Plan& plan)
      : f_(f),
        kernels_(pixel_kernels(plan.block, std::make_index_sequence<kPlanarBlockCount>())),
        block_(kPlanarBlocks[plan.block]),
        width_(block_.vectors * kLanes<float>),
        lanes_(std::min<int64_t>(kLanes<float>, f.out_width - width_ + kLanes<float>)),
        step_(planar_row_step(f)),
        pairs_(planar_pairs(f, f.reduce, plan)),
        // A short row's last vector may run over into the next row, if that is written after it.
        row_lanes_(step_ == 1 && f.output.stride_h == f.out_width && 2 * f.out_width >= width_ ? kLanes<float>
                                                                                               : lanes_) {
    const PixelSizes s = pixel_sizes(f, plan);
    char* at = static_cast<char*>(thread_scratch_bytes(size_t(s.bytes)));
    columns_ = reinterpret_cast<int64_t*>(at);
    ranges_ = reinterpret_cast<Range*>(at += s.columns);
    rows_ = reinterpret_cast<Rows*>(at += s.ranges);
    masks_ = reinterpret_cast<uint16_t*>(at + s.rows);
    place_rows();
    place_columns();
  }

  // Planes [first, last), counted over (image, channel).
  void run(int64_t first, int64_t last) const {
    Plane p{first / f_.channels, first % f_.channels};
    for (int64_t rest = last - first; rest > 0;) {
      const Plane next = after(p);
      const bool pair = pairs_ && rest > 1;
      if (pair)
        sum_pair(p, next);
      else
        sum_plane(p.n, p.c);
      rest -= pair ? 2 : 1;
      p = pair ? after(next) : next;
    }
  }

 private:
  struct Plane {
    int64_t n, c;
  };
  Plane after(Plane p) const { return p.c + 1 < f_.channels ? Plane{p.n, p.c + 1} : Plane{p.n + 1, 0}; }

  void sum_plane(int64_t n, int64_t c) const {
    const float bias = f_.bias.data ? *element<float>(f_.bias, 0, c, 0) : 0.0f;
    for (int64_t i = 0; i < row_blocks_; ++i)
      for (int64_t b = 0; b * width_ < f_.out_width; ++b) sum_block(n, c, rows_[i], b, bias);
  }

  // `count` output rows from y on, and the kernel rows that meet the image there.
  struct Rows {
    int64_t y, count, u0, u1;
  };
  // The columns of taps that meet the image in one block of columns.
  struct Range {
    int64_t first, count;
  };

  // The first column of a block; the last one moves left to stay whole.
  int64_t column_of(int64_t b) const {
    return std::max<int64_t>(0, std::min(b * width_, f_.out_width - width_));
  }

  // Blocks of rows: those of the first row modulo step_, then those of the next.
  void place_rows() {
    row_blocks_ = 0;
    for (int64_t first = 0; first < std::min(step_, f_.out_height); ++first) {
      const int64_t count = ceil_div(f_.out_height - first, step_);
      for (int64_t i = 0; i < count; i += block_.rows) {
        // The last block moves up to stay whole; what it computes twice comes out the same.
        const int64_t k = std::max<int64_t>(0, std::min(i, count - block_.rows));
        Rows& r = rows_[row_blocks_++];
        r.y = first + k * step_, r.count = std::min(block_.rows, count - k);
        const int64_t top = r.y - f_.pad_h;
        clip_taps(top, top + (r.count - 1) * step_, f_.height, f_.kernel_h, f_.dil_h, r.u0, r.u1);
      }
    }
  }

  // Where each column of taps reads, and for each block of columns which lanes lie in the image.
  void place_columns() {
    for (int64_t v = 0; v < f_.kernel_w; ++v) columns_[v] = v * f_.dil_w - f_.pad_w;
    uint16_t* mask = masks_;
    const int64_t lanes = pairs_ ? kHalf : kLanes<float>;  // those of one plane
    for (int64_t b = 0; b * width_ < f_.out_width; ++b) {
      const int64_t x0 = column_of(b), last = std::min(f_.out_width, x0 + width_) - 1;
      int64_t v0, v1;
      clip_taps(x0 - f_.pad_w, last - f_.pad_w, f_.width, f_.kernel_w, f_.dil_w, v0, v1);
      ranges_[b] = {v0, v1 - v0};
      for (int64_t v = 0; v < f_.kernel_w; ++v)
        for (int64_t x = 0; x < width_; x += kLanes<float>)
          *mask++ = uint16_t(bits_inside(x0 + x + columns_[v], 1, f_.width, lanes));
    }
  }

  void sum_block(int64_t n, int64_t c, const Rows& rows, int64_t b, float bias) const {
    const Range range = ranges_[b];
    PixelBlock r{};
    r.out = element<float>(f_.output, n, c, rows.y) + column_of(b);
    r.out_row = step_ * f_.output.stride_h, r.rows = rows.count;
    r.row_lanes = row_lanes_, r.last_lanes = lanes_;
    r.in_row = step_ * f_.input.stride_h, r.height = f_.height;
    r.columns = columns_ + range.first, r.count = rows.u1 > rows.u0 ? range.count : 0;
    r.masks = masks_ + (b * f_.kernel_w + range.first) * block_.vectors;
    r.tap_row = f_.weight.stride_h, r.tap_column = f_.weight.stride_w;
    bool more = false;
    for (int64_t j = 0; j < f_.reduce; ++j) {
      const float* plane = element<float>(f_.input, n, f_.input_channel(c, j), 0) + column_of(b);
      const float* taps =
          element<float>(f_.weight, 0, f_.weight_channel(c, j), 0) + range.first * r.tap_column;
      int64_t u = rows.u0;
      do {
        const bool unit = f_.dil_h == step_ && rows.u1 > rows.u0;
        const int64_t part = unit ? taps_together(rows.u1 - u) : rows.u1 - rows.u0;
        r.first = rows.y - f_.pad_h + u * f_.dil_h;
        r.in = plane + r.first * f_.input.stride_h;
        r.inside = bits_inside(r.first, step_, f_.height, block_.rows + part - 1);
        r.taps = taps + u * r.tap_row;
        if (unit)
          kernels_.unit[more][part - 1](r, bias);
        else
          kernels_.dilated[more](r, bias, part, f_.dil_h);
        more = true;
        u += part;
      } while (u < rows.u1);
    }
  }

  struct Addresses {
    const float *in, *taps;
    float *out, bias;
  };
  Addresses addresses(Plane p) const {
    return {element<float>(f_.input, p.n, f_.input_channel(p.c, 0), 0),
            element<float>(f_.weight, 0, f_.weight_channel(p.c, 0), 0),
            element<float>(f_.output, p.n, p.c, 0),
            f_.bias.data ? *element<float>(f_.bias, 0, p.c, 0) : 0.0f};
  }

  // Two planes next to each other, whole rows at a time: see PixelPair.
  void sum_pair(Plane a, Plane b) const {
    const Addresses x = addresses(a), y = addresses(b);
    PixelPair pair;
    pair.in = y.in - x.in - kHalf, pair.out = y.out - x.out - kHalf, pair.taps = y.taps - x.taps;
    pair.initial[0] = x.bias, pair.initial[1] = y.bias;
    const Range range = ranges_[0];
    PixelBlock& r = pair.first;
    r = {};
    r.out_row = f_.output.stride_h, r.in_row = f_.input.stride_h, r.last_lanes = f_.out_width;
    r.columns = columns_ + range.first, r.masks = masks_ + range.first;
    r.tap_row = f_.weight.stride_h, r.tap_column = f_.weight.stride_w;
    for (int64_t i = 0; i < row_blocks_; ++i) {
      const Rows& rows = rows_[i];
      r.out = x.out + rows.y * r.out_row, r.rows = rows.count;
      r.count = rows.u1 > rows.u0 ? range.count : 0;
      bool more = false;
      int64_t u = rows.u0;
      do {
        const int64_t part = r.count ? taps_together(rows.u1 - u) : 1, top = rows.y - f_.pad_h + u;
        r.in = x.in + top * r.in_row;
        r.inside = bits_inside(top, 1, f_.height, block_.rows + part - 1);
        r.taps = x.taps + range.first * r.tap_column + u * r.tap_row;
        pair_kernel(part, more)(pair);
        more = true;
        u += part;
      } while (u < rows.u1);
    }
  }
  PairKernel* pair_kernel(int64_t part, bool more) const {
    constexpr auto kParts = std::make_integer_sequence<int, kMaxTaps>();
    if (block_.rows == 7)
      return more ? pair_kernel_of<7, false>(part, kParts) : pair_kernel_of<7, true>(part, kParts);
    return more ? pair_kernel_of<8, false>(part, kParts) : pair_kernel_of<8, true>(part, kParts);
  }

  const ForwardProblem& f_;
  const PixelKernels& kernels_;
  const PlanarBlock block_;
  const int64_t width_;              // columns of a block
  const int64_t step_;               // from one of its rows to the next
  const bool pairs_;                 // of planes in one vector
  const int64_t lanes_, row_lanes_;  // see PixelBlock
  int64_t* columns_;
  Rows* rows_;
  int64_t row_blocks_;
  Range* ranges_;
  uint16_t* masks_;
};

#endif

}  // namespace lkconv::cpu::LKCONV_ISA
