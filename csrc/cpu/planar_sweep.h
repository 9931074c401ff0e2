// planar_in_place.h's sums row after row: a row of pixels is read once for all the kernel rows that meet it,
// and adds to the sums of as many rows of outputs, of which it finishes one. There is nothing to set up
// between rows, so that wide planes of small kernels take little more than their memory does.
#pragma once

#include "planar_in_place.h"

namespace lkconv::cpu::LKCONV_ISA {

#if LKCONV_AVX512

// What of a plane to come is asked for while one is swept: `lines` a row, while there are any.
template <class T, int kWrite>
struct LinesAhead {
  static constexpr int64_t kLine = 64 / int64_t(sizeof(T));
  const T* at;
  int64_t lines, rest;

  LKCONV_INLINE void request() {
    const T* const end = at + std::min(lines, rest) * kLine;
    rest -= lines;
    for (; at < end; at += kLine) __builtin_prefetch(at, kWrite, 2);
  }
  void skip(int64_t rows) {
    const int64_t asked = std::clamp<int64_t>(rest, 0, lines * rows);
    at += asked * kLine, rest -= asked;
  }
};

// The rows of one plane that share input rows (all, or every dil_h-th), and X vectors of their columns. Output
// row y reads rows y to y + K - 1 of those that begin at `in`, of which [begin, end) lie in the image, at
// columns[v]; masks[v * X + x] says which elements of vector x do. Those between the first vector and the
// last lie in it whole.
template <class T>
struct RowSweep {
  const T* in;
  int64_t in_row, begin, end;
  T* out;
  int64_t out_row, rows;
  int64_t row_lanes, last_lanes;  // of a row's last vector that may be written, and of the last row's
  const int64_t* columns;
  const ElementMask* masks;
  int64_t count;      // columns of taps
  const float* taps;  // [count][K]
  float initial;
  LinesAhead<T, 0> ahead_in;
  LinesAhead<T, 1> ahead_out;
};

// The first and the last vector's masks at a column of taps.
struct EndMasks {
  ElementMask first, last;
};

// sums[K - 1 - u] += kernel row u of a row of pixels, for one column of taps.
template <class T, int X, int K>
LKCONV_INLINE void sweep_column(PixelSums<T, K, X>& sums, const T* in, EndMasks masks,
                                const Vec<float> (&taps)[K]) {
  constexpr int L = kElements<T>, P = kFloatParts<T>;
#pragma GCC unroll 4
  for (int x = 0; x < X; ++x) {
    const VU32 bits = x == 0       ? load_bits(in, masks.first)
                      : x + 1 == X ? load_bits(in + x * L, masks.last)
                                   : load_whole(in + x * L);
    Vec<float> p[P];
    take_apart(p, bits);
#pragma GCC unroll 2
    for (int q = 0; q < P; ++q) keep(p[q]);
#pragma GCC unroll 8
    for (int u = 0; u < K; ++u)
#pragma GCC unroll 2
      for (int q = 0; q < P; ++q) sums[K - 1 - u][x * P + q] += taps[u] * p[q];
  }
}

// The finished row of sums goes out, the others move up, and a new one begins.
template <class T, int X, int K>
LKCONV_INLINE void store_swept(T* to, const PixelSums<T, K, X>& sums, int64_t lanes) {
  constexpr int L = kElements<T>, P = kFloatParts<T>;
#pragma GCC unroll 4
  for (int x = 0; x < X; ++x) {
    const VU32 bits = put_together(&sums[0][x * P], T());
    if (x + 1 < X || lanes == L)
      store_whole(to + x * L, bits);
    else
      store_bits(to + x * L, bits, first_elements(lanes));
  }
}
template <class T, int X, int K>
LKCONV_INLINE void move_up(PixelSums<T, K, X>& sums, Vec<float> initial) {
#pragma GCC unroll 8
  for (int x = 0; x < X * kFloatParts<T>; ++x) {
#pragma GCC unroll 8
    for (int j = 0; j + 1 < K; ++j) sums[j][x] = sums[j + 1][x];
    sums[K - 1][x] = initial;
  }
}

// V columns of taps, whose taps and masks then stay in registers, or any number if 0.
template <class T, int X, int K, int V>
void sweep_rows(const RowSweep<T>& sweep) {
  RowSweep<T> s = sweep;  // no store can change it
  const Vec<float> initial = broadcast(s.initial);
  PixelSums<T, K, X> sums;
#pragma GCC unroll 8
  for (int j = 0; j < K; ++j) move_up<T, X, K>(sums, initial);
  Vec<float> taps[V ? V : 1][K];
  EndMasks masks[V ? V : 1];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    masks[v] = {s.masks[v * X], s.masks[v * X + X - 1]};
#pragma GCC unroll 8
    for (int u = 0; u < K; ++u) taps[v][u] = broadcast(s.taps[v * K + u]), keep(taps[v][u]);
  }
  for (int64_t i = 0; i < s.rows + K - 1; ++i, s.in += s.in_row) {
    if (i >= s.begin && i < s.end) {
      if constexpr (V > 0) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sweep_column<T, X, K>(sums, s.in + s.columns[v], masks[v], taps[v]);
      } else {
        for (int64_t v = 0; v < s.count; ++v) {
#pragma GCC unroll 8
          for (int u = 0; u < K; ++u) taps[0][u] = broadcast(s.taps[v * K + u]);
          sweep_column<T, X, K>(sums, s.in + s.columns[v], {s.masks[v * X], s.masks[v * X + X - 1]}, taps[0]);
        }
      }
    }
    if (i >= K - 1) {
      s.ahead_in.request();
      s.ahead_out.request();
      store_swept<T, X, K>(s.out, sums, i + 1 < s.rows + K - 1 ? s.row_lanes : s.last_lanes);
      s.out += s.out_row;
    }
    move_up<T, X, K>(sums, initial);
  }
}

template <class T>
using SweepKernel = void(const RowSweep<T>&);
// The kernel of X vectors, or of as many as `rows` kernel rows leave registers for.
template <class T, int X, int... K>
LKCONV_INLINE SweepKernel<T>* sweep_kernel_of(int64_t rows, int64_t count, std::integer_sequence<int, K...>) {
  static constexpr SweepKernel<T>* kAny[] = {
      sweep_rows<T, int(std::min<int64_t>(X, most_swept(K + 1, kFloatParts<T>))), K + 1, 0>...};
  return rows == 3 && count == 3 ? sweep_rows<T, X, 3, 3> : kAny[rows - 1];
}
template <class T>
LKCONV_INLINE SweepKernel<T>* sweep_kernel_of(int64_t vectors, int64_t rows, int64_t count) {
  constexpr auto kRows = std::make_integer_sequence<int, int(kMaxSweptRows)>();
  if constexpr (kFloatParts<T> == 1) {
    if (vectors == 4) return sweep_kernel_of<T, 4>(rows, count, kRows);
    if (vectors == 3) return sweep_kernel_of<T, 3>(rows, count, kRows);
  }
  return vectors == 2 ? sweep_kernel_of<T, 2>(rows, count, kRows) : sweep_kernel_of<T, 1>(rows, count, kRows);
}

// Walks the planes of one convolution by sweeps.
template <class T>
class SweepTask {
 public:
  SweepTask(const ForwardProblem& f, const Plan& plan)
      : f_(f),
        vectors_(plan.swept),
        width_(vectors_ * kElements<T>),
        count_(ceil_div(f.out_width, width_)),
        lanes_(std::min<int64_t>(kElements<T>, f.out_width - width_ + kElements<T>)),
        step_(f.dil_h),
        // A short row's last vector may run over into the next row, which is written after it.
        row_lanes_(step_ == 1 && f.output.stride_h == f.out_width && 2 * f.out_width >= width_ ? kElements<T>
                                                                                               : lanes_) {
    const SweepSizes s = sweep_sizes(f, plan);
    char* at = static_cast<char*>(thread_scratch_bytes(size_t(s.bytes)));
    columns_ = reinterpret_cast<int64_t*>(at);
    blocks_ = reinterpret_cast<Block*>(at += s.columns);
    masks_ = reinterpret_cast<ElementMask*>(at += s.blocks);
    taps_ = reinterpret_cast<float*>(at + s.masks);
    for (int64_t v = 0; v < f.kernel_w; ++v) columns_[v] = v * f.dil_w - f.pad_w;
    for (int64_t b = 0; b < count_; ++b) place_block(b);
    ask_ahead();
  }

  void run(int64_t n, int64_t c) const {
    const T* plane = element<T>(f_.input, n, f_.input_channel(c, 0), 0);
    T* out = element<T>(f_.output, n, c, 0);
    load_taps(c);
    RowSweep<T> s;
    s.in_row = step_ * f_.input.stride_h, s.out_row = step_ * f_.output.stride_h;
    s.row_lanes = row_lanes_, s.last_lanes = lanes_;
    s.initial = f_.bias.data ? as_float(*element<T>(f_.bias, 0, c, 0)) : 0.0f;
    s.ahead_in = {plane + distance_in_, lines_in_.row, lines_in_.plane};
    s.ahead_out = {out + distance_out_, lines_out_.row, lines_out_.plane};
    for (int64_t y = 0; y < std::min(step_, f_.out_height); ++y) {
      const int64_t first = y - f_.pad_h;  // row of the image
      s.rows = ceil_div(f_.out_height - y, step_);
      s.begin = ceil_div(std::max<int64_t>(0, -first), step_);
      s.end = ceil_div(std::max<int64_t>(0, f_.height - first), step_);
      for (int64_t b = 0; b < count_; ++b) {
        const Block& block = blocks_[b];
        s.in = plane + first * f_.input.stride_h + block.x;
        s.out = out + y * f_.output.stride_h + block.x;
        s.columns = columns_ + block.first, s.count = block.count;
        s.masks = masks_ + (b * f_.kernel_w + block.first) * vectors_;
        s.taps = taps_ + block.first * f_.kernel_h;
        block.kernel(s);
        s.ahead_in.skip(s.rows), s.ahead_out.skip(s.rows);
      }
    }
  }

 private:
  // Vectors of columns from x on, and the columns of taps that meet the image there.
  struct Block {
    int64_t x, first, count;
    SweepKernel<T>* kernel;
  };
  static_assert(sizeof(Block) == kSweepBlockBytes);
  struct Lines {
    int64_t row = 0, plane = 0;
  };

  // The last block moves left to stay whole.
  void place_block(int64_t b) {
    const int64_t x0 = std::max<int64_t>(0, std::min(b * width_, f_.out_width - width_)),
                  last = std::min(f_.out_width, x0 + width_) - 1;
    int64_t v0, v1;
    clip_taps(x0 - f_.pad_w, last - f_.pad_w, f_.width, f_.kernel_w, f_.dil_w, v0, v1);
    blocks_[b] = {x0, v0, v1 - v0, sweep_kernel_of<T>(vectors_, f_.kernel_h, v1 - v0)};
    ElementMask* mask = masks_ + b * f_.kernel_w * vectors_;
    for (int64_t v = 0; v < f_.kernel_w; ++v)
      for (int64_t x = 0; x < width_; x += kElements<T>)
        *mask++ = bits_inside(x0 + x + columns_[v], 1, f_.width, kElements<T>);
  }

  // The plane after this one, or one that is further away if planes are small; nothing of small tensors.
  void ask_ahead() {
    const auto lines = [](int64_t elements) { return ceil_div(elements * int64_t(sizeof(T)), 64); };
    lines_in_.plane = lines(f_.height * f_.width), lines_out_.plane = lines(f_.out_height * f_.out_width);
    distance_in_ = f_.input.stride_c * ceil_div(kAheadLines, lines_in_.plane);
    distance_out_ = f_.output.stride_c * ceil_div(kAheadLines, lines_out_.plane);
    if ((lines_in_.plane + lines_out_.plane) * 64 * f_.batch * f_.channels < kRequestBytes)
      lines_in_ = lines_out_ = {};
    lines_in_.row = ceil_div(lines_in_.plane, count_ * f_.out_height);
    lines_out_.row = ceil_div(lines_out_.plane, count_ * f_.out_height);
  }

  void load_taps(int64_t c) const {
    const T* weight = element<T>(f_.weight, 0, f_.weight_channel(c, 0), 0);
    float* to = taps_;
    for (int64_t v = 0; v < f_.kernel_w; ++v)
      for (int64_t u = 0; u < f_.kernel_h; ++u)
        *to++ = as_float(weight[u * f_.weight.stride_h + v * f_.weight.stride_w]);
  }

  static constexpr int64_t kAheadLines = 128;

  const ForwardProblem& f_;
  const int64_t vectors_;        // of a block ...
  const int64_t width_, count_;  // ... its columns, and the number of blocks
  const int64_t lanes_;          // see RowSweep
  const int64_t step_;           // from one row of a sweep to the next
  const int64_t row_lanes_;      // see RowSweep
  int64_t* columns_;
  Block* blocks_;
  ElementMask* masks_;
  float* taps_;
  Lines lines_in_, lines_out_;
  int64_t distance_in_, distance_out_;
};

#endif

}  // namespace lkconv::cpu::LKCONV_ISA
