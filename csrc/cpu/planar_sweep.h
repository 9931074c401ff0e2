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

// How much that is for each plane of a convolution, and how far away: the plane after this one (`together`
// are swept at a time), or one that is further away if planes are small; nothing of small tensors.
template <class T>
class SweepAhead {
 public:
  SweepAhead() = default;
  // `rows` requests are made for each block of columns.
  SweepAhead(const ForwardProblem& f, int64_t blocks, int64_t together, int64_t rows) {
    const auto lines = [=](int64_t elements) {
      return ceil_div(together * elements * int64_t(sizeof(T)), 64);
    };
    const int64_t in = lines(f.height * f.width), out = lines(f.out_height * f.out_width);
    distance_in_ = f.input.stride_c * together * ceil_div(kAheadLines, std::max<int64_t>(1, in));
    distance_out_ = f.output.stride_c * together * ceil_div(kAheadLines, std::max<int64_t>(1, out));
    if ((in + out) * 64 * f.batch * f.channels < kRequestBytes * together) return;
    in_ = {ceil_div(in, blocks * rows), in}, out_ = {ceil_div(out, blocks * rows), out};
  }
  LinesAhead<T, 0> in(const T* plane) const { return {plane + distance_in_, in_.row, in_.plane}; }
  LinesAhead<T, 1> out(const T* plane) const { return {plane + distance_out_, out_.row, out_.plane}; }

 private:
  static constexpr int64_t kAheadLines = 128;
  struct Lines {
    int64_t row = 0, plane = 0;
  };
  Lines in_, out_;
  int64_t distance_in_ = 0, distance_out_ = 0;
};

// The rows of one plane that share input rows (all, or every dil_h-th), and X vectors of their columns.
// Output row y reads rows y to y + K - 1 of those that begin at `in`, of which [begin, end) lie in the image,
// at columns[v]; masks[v * X + x] says which elements of vector x do. Those between the first vector and the
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
  // Of a second plane whose elements fill the upper halves of the vectors (see PixelPair).
  int64_t second_in, second_out;
  const float* second_taps;
  float second_initial;
};

// The first and the last vector's masks at a column of taps.
struct EndMasks {
  ElementMask first, last;
};

// sums[K - 1 - u] += kernel row u of a row of pixels, for one column of taps.
template <class T, int X, int K, bool kPair>
LKCONV_INLINE void sweep_column(PixelSums<T, K, X>& sums, const T* in, int64_t second, EndMasks masks,
                                const Vec<float> (&taps)[K]) {
  constexpr int L = kElements<T>, P = kFloatParts<T>;
#pragma GCC unroll 4
  for (int x = 0; x < X; ++x) {
    const VU32 bits = kPair        ? load_halves(in, second, masks.first)
                      : x == 0     ? load_bits(in, masks.first)
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
template <class T, int K>
LKCONV_INLINE void store_swept_pair(T* to, int64_t second, const PixelSums<T, K, 1>& sums, int64_t lanes) {
  const VU32 bits = put_together(sums[0], T());
  store_bits(to, bits, first_elements(lanes));
  store_bits(to + second, bits, first_elements(lanes) << kHalf<T>);
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

// Taps, or what sums begin at, of one plane or of a pair.
template <bool kPair>
LKCONV_INLINE Vec<float> broadcast_planes(float first, const float* second) {
  if constexpr (kPair)
    return broadcast_halves(first, *second);
  else
    return broadcast(first);
}

// V columns of taps, whose taps and masks then stay in registers, or any number if 0.
template <class T, int X, int K, int V, bool kPair>
void sweep_rows(const RowSweep<T>& sweep) {
  RowSweep<T> s = sweep;  // no store can change it
  const Vec<float> initial = broadcast_planes<kPair>(s.initial, &s.second_initial);
  PixelSums<T, K, X> sums;
#pragma GCC unroll 8
  for (int j = 0; j < K; ++j) move_up<T, X, K>(sums, initial);
  Vec<float> taps[V ? V : 1][K];
  EndMasks masks[V ? V : 1];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    masks[v] = {s.masks[v * X], s.masks[v * X + X - 1]};
#pragma GCC unroll 8
    for (int u = 0; u < K; ++u) {
      taps[v][u] = broadcast_planes<kPair>(s.taps[v * K + u], s.second_taps + v * K + u);
      keep(taps[v][u]);
    }
  }
  for (int64_t i = 0; i < s.rows + K - 1; ++i, s.in += s.in_row) {
    if (i >= s.begin && i < s.end) {
      if constexpr (V > 0) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
          sweep_column<T, X, K, kPair>(sums, s.in + s.columns[v], s.second_in, masks[v], taps[v]);
      } else {
        for (int64_t v = 0; v < s.count; ++v) {
#pragma GCC unroll 8
          for (int u = 0; u < K; ++u)
            taps[0][u] = broadcast_planes<kPair>(s.taps[v * K + u], s.second_taps + v * K + u);
          sweep_column<T, X, K, kPair>(sums, s.in + s.columns[v], s.second_in,
                                       {s.masks[v * X], s.masks[v * X + X - 1]}, taps[0]);
        }
      }
    }
    if (i >= K - 1) {
      s.ahead_in.request();
      s.ahead_out.request();
      if constexpr (kPair)
        store_swept_pair<T, K>(s.out, s.second_out, sums, s.last_lanes);
      else
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
      sweep_rows<T, int(std::min<int64_t>(X, most_swept(K + 1, kFloatParts<T>))), K + 1, 0, false>...};
  return rows == 3 && count == 3 ? sweep_rows<T, X, 3, 3, false> : kAny[rows - 1];
}
template <class T, int... K>
LKCONV_INLINE SweepKernel<T>* pair_sweep_of(int64_t rows, int64_t count, std::integer_sequence<int, K...>) {
  static constexpr SweepKernel<T>* kAny[] = {sweep_rows<T, 1, K + 1, 0, true>...};
  return rows == 3 && count == 3 ? sweep_rows<T, 1, 3, 3, true> : kAny[rows - 1];
}
constexpr auto kSweptRows = std::make_integer_sequence<int, int(kMaxSweptRows)>();
template <class T>
LKCONV_INLINE SweepKernel<T>* pair_sweep_of(int64_t rows, int64_t count) {
  return pair_sweep_of<T>(rows, count, kSweptRows);
}
template <class T>
LKCONV_INLINE SweepKernel<T>* sweep_kernel_of(int64_t vectors, int64_t rows, int64_t count) {
  if constexpr (kFloatParts<T> == 1) {
    if (vectors == 4) return sweep_kernel_of<T, 4>(rows, count, kSweptRows);
    if (vectors == 3) return sweep_kernel_of<T, 3>(rows, count, kSweptRows);
  }
  return vectors == 2 ? sweep_kernel_of<T, 2>(rows, count, kSweptRows)
                      : sweep_kernel_of<T, 1>(rows, count, kSweptRows);
}

// The taps of one channel, [column][row].
template <class T>
void load_sweep_taps(const ForwardProblem& f, int64_t c, float* to) {
  const T* weight = element<T>(f.weight, 0, f.weight_channel(c, 0), 0);
  for (int64_t v = 0; v < f.kernel_w; ++v)
    for (int64_t u = 0; u < f.kernel_h; ++u)
      *to++ = as_float(weight[u * f.weight.stride_h + v * f.weight.stride_w]);
}

// Where a plane of outputs and the pixels it reads begin, and what its sums begin at.
template <class T>
struct SweptPlanes {
  const T* in;
  T* out;
  float initial;
  SweptPlanes(const ForwardProblem& f, Plane p)
      : in(element<T>(f.input, p.n, f.input_channel(p.c, 0), 0)),
        out(element<T>(f.output, p.n, p.c, 0)),
        initial(f.bias.data ? as_float(*element<T>(f.bias, 0, p.c, 0)) : 0.0f) {}
};

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
        pairs_(planar_pairs(f, f.reduce, plan)),
        // A short row's last vector may run over into the next row, which is written after it.
        row_lanes_(step_ == 1 && !pairs_ && f.output.stride_h == f.out_width && 2 * f.out_width >= width_
                       ? kElements<T>
                       : lanes_) {
    const SweepSizes s = sweep_sizes(f, plan);
    char* at = static_cast<char*>(thread_scratch_bytes(size_t(s.bytes)));
    columns_ = reinterpret_cast<int64_t*>(at);
    blocks_ = reinterpret_cast<Block*>(at += s.columns);
    masks_ = reinterpret_cast<ElementMask*>(at += s.blocks);
    taps_ = reinterpret_cast<float*>(at + s.masks);
    for (int64_t v = 0; v < f.kernel_w; ++v) columns_[v] = v * f.dil_w - f.pad_w;
    for (int64_t b = 0; b < count_; ++b) place_block(b);
    ahead_ = {f, count_, pairs_ ? 2 : 1, f.out_height};
  }

  // Planes [first, last), counted over (image, channel).
  void run(int64_t first, int64_t last) const {
    for_planes(f_, first, last, pairs_, [this](Plane p, const Plane* second) { sweep(p, second); });
  }

 private:
  // One plane, or two next to each other.
  void sweep(Plane p, const Plane* second) const {
    const SweptPlanes<T> planes(f_, p);
    RowSweep<T> s{};
    s.in_row = step_ * f_.input.stride_h, s.out_row = step_ * f_.output.stride_h;
    s.row_lanes = row_lanes_, s.last_lanes = lanes_;
    load_sweep_taps<T>(f_, p.c, taps_);
    s.initial = planes.initial;
    s.ahead_in = ahead_.in(planes.in), s.ahead_out = ahead_.out(planes.out);
    if (second) {
      const SweptPlanes<T> others(f_, *second);
      s.second_in = others.in - planes.in - kHalf<T>, s.second_out = others.out - planes.out - kHalf<T>;
      load_sweep_taps<T>(f_, second->c, taps_ + f_.kernel_h * f_.kernel_w);
      s.second_initial = others.initial;
    }
    for (int64_t y = 0; y < std::min(step_, f_.out_height); ++y) {
      const int64_t first = y - f_.pad_h;  // row of the image
      s.rows = ceil_div(f_.out_height - y, step_);
      s.begin = ceil_div(std::max<int64_t>(0, -first), step_);
      s.end = ceil_div(std::max<int64_t>(0, f_.height - first), step_);
      for (int64_t b = 0; b < count_; ++b) {
        const Block& block = blocks_[b];
        s.in = planes.in + first * f_.input.stride_h + block.x;
        s.out = planes.out + y * f_.output.stride_h + block.x;
        s.columns = columns_ + block.first, s.count = block.count;
        s.masks = masks_ + (b * f_.kernel_w + block.first) * vectors_;
        s.taps = taps_ + block.first * f_.kernel_h;
        s.second_taps = s.taps + f_.kernel_h * f_.kernel_w;
        (second ? pair_kernel_ : block.kernel)(s);
        s.ahead_in.skip(s.rows), s.ahead_out.skip(s.rows);
      }
    }
  }

  // Vectors of columns from x on, and the columns of taps that meet the image there.
  struct Block {
    int64_t x, first, count;
    SweepKernel<T>* kernel;
  };
  static_assert(sizeof(Block) == kSweepBlockBytes);

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
        *mask++ = bits_inside(x0 + x + columns_[v], 1, f_.width, pairs_ ? kHalf<T> : kElements<T>);
    if (pairs_) pair_kernel_ = pair_sweep_of<T>(f_.kernel_h, v1 - v0);
  }

  const ForwardProblem& f_;
  const int64_t vectors_;        // of a block ...
  const int64_t width_, count_;  // ... its columns, and the number of blocks
  const int64_t lanes_;          // see RowSweep
  const int64_t step_;           // from one row of a sweep to the next
  const bool pairs_;             // of planes in one vector
  const int64_t row_lanes_;      // see RowSweep
  SweepKernel<T>* pair_kernel_ = nullptr;
  int64_t* columns_;
  Block* blocks_;
  ElementMask* masks_;
  float* taps_;
  SweepAhead<T> ahead_;
};

#endif

}  // namespace lkconv::cpu::LKCONV_ISA
