// Moving image rows between a tensor of any dtype and strides and the kernels' own layout: one vector per
// pixel, whose lanes are channels. All conversion and all layout handling of the CPU kernels is in this file.
#pragma once

namespace lkconv::cpu::LKCONV_ISA {

// The planes behind the lanes of one vector: byte addresses, and how their elements are reached.
template <class T>
struct Lanes {
  char* base[kLanes<T>];
  int count;        // lanes in use
  bool neighbours;  // base[l] is base[0] + l elements: one vector load takes all lanes
  int reach;        // all lanes lie in so many elements from base[0] on, one vector at most; else 0
  DType dtype;
  int64_t stride_y, stride_x;  // in elements
  int64_t ahead;               // see ask_ahead
};

// Planes are read and written sixteen at a time, more streams than hardware prefetchers follow. Those of
// large tensors are asked for so many elements ahead: small ones in the next image, which tasks take next,
// others some way down the plane, which is kDownThePlane until the width of the rows is known.
constexpr int64_t kSmallPlaneBytes = 4096, kDownThePlane = -1, kDownBytes = 512;
template <class T>
LKCONV_INLINE void ask_ahead(Lanes<T>& lanes, const TensorView& t, bool large) {
  if (!large || lanes.neighbours || t.stride_w != 1) return;
  const bool small = t.stride_c * dtype_size(t.dtype) < kSmallPlaneBytes;
  lanes.ahead = small ? t.stride_n : kDownThePlane;
}
// The distance for rows that do or do not follow each other without a gap.
template <class S, class T>
LKCONV_INLINE int64_t distance_ahead(const Lanes<T>& lanes, bool joined) {
  if (lanes.ahead != kDownThePlane) return lanes.ahead;
  return joined ? kDownBytes / int64_t(sizeof(S)) : lanes.stride_y;
}
// One line of every plane; half types fill it with two blocks.
template <int kWrite, class S, class T>
LKCONV_INLINE void request_lines(const Lanes<T>& lanes, int64_t offset, int64_t ahead) {
  if (!ahead || (sizeof(S) < sizeof(T) && offset / kLanes<T> % 2)) return;
  for (int l = 0; l < lanes.count; ++l)
    __builtin_prefetch(reinterpret_cast<const S*>(lanes.base[l]) + offset + ahead, kWrite, 2);
}

template <class T, class Channel>
LKCONV_INLINE Lanes<T> make_lanes(const TensorView& t, int64_t n, int64_t c0, int64_t channels,
                                  Channel channel) {
  Lanes<T> lanes;
  const int64_t size = dtype_size(t.dtype);
  lanes.count = int(std::min<int64_t>(kLanes<T>, channels - c0));
  lanes.dtype = t.dtype;
  lanes.stride_y = t.stride_h;
  lanes.stride_x = t.stride_w;
  lanes.ahead = 0;
  lanes.neighbours = true;
  for (int l = 0; l < lanes.count; ++l) {
    lanes.base[l] = static_cast<char*>(t.data) + (n * t.stride_n + channel(c0 + l) * t.stride_c) * size;
    lanes.neighbours &= lanes.base[l] == lanes.base[0] + l * size;
  }
  // Channels that a multiplier repeats are in order.
  const int64_t last = t.stride_c == 1 ? channel(c0 + lanes.count - 1) - channel(c0) : kLanes<T>;
  lanes.reach = last < kLanes<T> ? int(last) + 1 : 0;
  return lanes;
}

// A run of `rows` x `cols` pixels starting at one address of every lane, walked by blocks of kLanes pixels.
// Where rows follow each other without gaps in every plane the run is one long row, so that blocks may span
// several rows of a narrow image.
struct PixelRun {
  int64_t cols, segments, length;  // pixels per row; number of separately contiguous pieces, and their length
  PixelRun(int64_t rows, int64_t cols, int64_t stride_y) : cols(cols) {
    const bool joined = stride_y == cols;
    segments = joined ? 1 : rows;
    length = joined ? rows * cols : cols;
  }
};

// Steps through the destinations of consecutive pixels: row by row, column by column.
template <class P>
struct PixelCursor {
  P* row_begin;
  int64_t row_step, step, cols, col = 0;
  PixelCursor(P* begin, int64_t row_step, int64_t step, int64_t cols, int64_t pixel)
      : row_begin(begin + pixel / cols * row_step),
        row_step(row_step),
        step(step),
        cols(cols),
        col(pixel % cols) {}
  LKCONV_INLINE P* next() {
    P* at = row_begin + col * step;
    if (++col == cols) col = 0, row_begin += row_step;
    return at;
  }
};

// One block of kLanes pixels (or `n` fewer) of every lane, transposed: r[i] becomes pixel i.
template <class T, class S>
LKCONV_INLINE void load_block(Vec<T>* r, const Lanes<T>& in, int64_t offset, int64_t n) {
  constexpr int L = kLanes<T>;
  if (n == L && in.count == L) {
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) r[l] = load_as(reinterpret_cast<const S*>(in.base[l]) + offset, T());
  } else {
    // A constant trip count keeps r in registers; unused lanes have no address to compute with.
    for (int l = 0; l < L; ++l) {
      const S* p = l < in.count ? reinterpret_cast<const S*>(in.base[l]) + offset : nullptr;
      r[l] = !p ? Vec<T>{} : n == L ? load_as(p, T()) : load_part(p, n, T());
    }
  }
  transpose<T>(r);
}

template <class T, class S>
LKCONV_INLINE void store_block(Vec<T>* r, const Lanes<T>& out, int64_t offset, int64_t n) {
  constexpr int L = kLanes<T>;
  transpose<T>(r);
  if (n == L && out.count == L) {
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) store_from(reinterpret_cast<S*>(out.base[l]) + offset, r[l]);
    return;
  }
  for (int l = 0; l < out.count; ++l) {
    S* p = reinterpret_cast<S*>(out.base[l]) + offset;
    if (n == L)
      store_from(p, r[l]);
    else
      store_part(p, r[l], n);
  }
}

// Lanes that are neither neighbours nor contiguous along x: element by element.
template <class T, class S>
void load_rows_scalar(T* dst, int64_t row_step, int64_t step, const Lanes<T>& in, int64_t y0, int64_t y1,
                      int64_t x0, int64_t x1) {
  for (int64_t y = y0; y < y1; ++y)
    for (int64_t x = x0; x < x1; ++x) {
      Vec<T> v{};
      for (int l = 0; l < in.count; ++l)
        v[l] = T(scalar_load(reinterpret_cast<const S*>(in.base[l]) + y * in.stride_y + x * in.stride_x));
      store(dst + (y - y0) * row_step + (x - x0) * step, v);
    }
}

template <class T, class S>
void store_rows_scalar(const T* src, int64_t row_step, int64_t step, Vec<T> bias, const Lanes<T>& out,
                       int64_t y0, int64_t y1, int64_t x0, int64_t x1) {
  for (int64_t y = y0; y < y1; ++y)
    for (int64_t x = x0; x < x1; ++x) {
      Vec<T> v = load(src + (y - y0) * row_step + (x - x0) * step) + bias;
      for (int l = 0; l < out.count; ++l)
        scalar_store(reinterpret_cast<S*>(out.base[l]) + y * out.stride_y + x * out.stride_x, v[l]);
    }
}

// Lanes that repeat the channels of one vector, as a channel multiplier has it. Unused lanes take the zero
// behind the elements that are read.
template <class T, class S>
void load_rows_repeated(T* dst, int64_t row_step, int64_t step, const Lanes<T>& in, int64_t y0, int64_t y1,
                        int64_t x0, int64_t x1) {
  auto index = shuffle_index<T>([](int) { return 0; });
  for (int l = 0; l < kLanes<T>; ++l)
    index[l] = l < in.count ? (in.base[l] - in.base[0]) / int64_t(sizeof(S)) : in.reach;
  for (int64_t y = y0; y < y1; ++y, dst += row_step) {
    const S* p = reinterpret_cast<const S*>(in.base[0]) + y * in.stride_y + x0 * in.stride_x;
    T* to = dst;
    for (int64_t x = x0; x < x1; ++x, p += in.stride_x, to += step)
      store(to, (Vec<T>)__builtin_shuffle(load_part(p, in.reach, T()), index));
  }
}

template <class T, class S>
void load_rows_as(T* dst, int64_t row_step, int64_t step, const Lanes<T>& in, int64_t y0, int64_t y1,
                  int64_t x0, int64_t x1) {
  constexpr int L = kLanes<T>;
  if (in.neighbours) {
    for (int64_t y = y0; y < y1; ++y, dst += row_step) {
      const S* p = reinterpret_cast<const S*>(in.base[0]) + y * in.stride_y + x0 * in.stride_x;
      T* to = dst;
      if (in.count == L)
        for (int64_t x = x0; x < x1; ++x, p += in.stride_x, to += step) store(to, load_as(p, T()));
      else
        for (int64_t x = x0; x < x1; ++x, p += in.stride_x, to += step)
          store(to, load_part(p, in.count, T()));
    }
    return;
  }
  if (in.reach) return load_rows_repeated<T, S>(dst, row_step, step, in, y0, y1, x0, x1);
  if (in.stride_x != 1) return load_rows_scalar<T, S>(dst, row_step, step, in, y0, y1, x0, x1);
  const PixelRun run(y1 - y0, x1 - x0, in.stride_y);
  const int64_t ahead = distance_ahead<S>(in, run.segments == 1);
  for (int64_t s = 0; s < run.segments; ++s) {
    const int64_t from = (y0 + s) * in.stride_y + x0;
    for (int64_t q = 0; q < run.length; q += L) {
      const int64_t n = std::min<int64_t>(L, run.length - q);
      request_lines<0, S>(in, from + q, ahead);
      Vec<T> r[L];
      load_block<T, S>(r, in, from + q, n);
      PixelCursor<T> to(dst + s * row_step, row_step, step, run.cols, q);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i)
        if (i < n) store(to.next(), r[i]);
    }
  }
}

template <class T, class S>
void store_rows_as(const T* src, int64_t row_step, int64_t step, Vec<T> bias, const Lanes<T>& out, int64_t y0,
                   int64_t y1, int64_t x0, int64_t x1) {
  constexpr int L = kLanes<T>;
  if (out.neighbours) {
    for (int64_t y = y0; y < y1; ++y, src += row_step) {
      S* p = reinterpret_cast<S*>(out.base[0]) + y * out.stride_y + x0 * out.stride_x;
      const T* from = src;
      if (out.count == L)
        for (int64_t x = x0; x < x1; ++x, p += out.stride_x, from += step) store_from(p, load(from) + bias);
      else
        for (int64_t x = x0; x < x1; ++x, p += out.stride_x, from += step)
          store_part(p, load(from) + bias, out.count);
    }
    return;
  }
  if (out.stride_x != 1) return store_rows_scalar<T, S>(src, row_step, step, bias, out, y0, y1, x0, x1);
  const PixelRun run(y1 - y0, x1 - x0, out.stride_y);
  const int64_t ahead = distance_ahead<S>(out, run.segments == 1);
  for (int64_t s = 0; s < run.segments; ++s) {
    const int64_t to = (y0 + s) * out.stride_y + x0;
    for (int64_t q = 0; q < run.length; q += L) {
      const int64_t n = std::min<int64_t>(L, run.length - q);
      request_lines<1, S>(out, to + q, ahead);
      PixelCursor<const T> from(src + s * row_step, row_step, step, run.cols, q);
      Vec<T> r[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) r[i] = i < n ? load(from.next()) + bias : Vec<T>{};
      store_block<T, S>(r, out, to + q, n);
    }
  }
}

// dst[(y - y0) * row_step + (x - x0) * step + lane] = plane[lane][y, x]; unused lanes become zero.
template <class T>
void load_rows(T* dst, int64_t row_step, int64_t step, const Lanes<T>& in, int64_t y0, int64_t y1, int64_t x0,
               int64_t x1) {
  if (y0 >= y1 || x0 >= x1) return;
  if constexpr (std::is_same_v<T, double>) {
    load_rows_as<double, double>(dst, row_step, step, in, y0, y1, x0, x1);
  } else {
    if (in.dtype == DType::f32)
      load_rows_as<float, float>(dst, row_step, step, in, y0, y1, x0, x1);
    else if (in.dtype == DType::bf16)
      load_rows_as<float, bf16>(dst, row_step, step, in, y0, y1, x0, x1);
    else
      load_rows_as<float, f16>(dst, row_step, step, in, y0, y1, x0, x1);
  }
}

// plane[lane][y, x] = src[(y - y0) * row_step + (x - x0) * step + lane] + bias[lane]; unused lanes write
// nothing.
template <class T>
void store_rows(const T* src, int64_t row_step, int64_t step, Vec<T> bias, const Lanes<T>& out, int64_t y0,
                int64_t y1, int64_t x0, int64_t x1) {
  if (y0 >= y1 || x0 >= x1) return;
  if constexpr (std::is_same_v<T, double>) {
    store_rows_as<double, double>(src, row_step, step, bias, out, y0, y1, x0, x1);
  } else {
    if (out.dtype == DType::f32)
      store_rows_as<float, float>(src, row_step, step, bias, out, y0, y1, x0, x1);
    else if (out.dtype == DType::bf16)
      store_rows_as<float, bf16>(src, row_step, step, bias, out, y0, y1, x0, x1);
    else
      store_rows_as<float, f16>(src, row_step, step, bias, out, y0, y1, x0, x1);
  }
}

// Whether the lanes of several groups follow each other in memory.
template <class T>
LKCONV_INLINE bool adjacent(const Lanes<T>* lanes, int64_t count) {
  for (int64_t g = 0; g < count; ++g)
    if (!lanes[g].neighbours || lanes[g].count != kLanes<T> ||
        lanes[g].base[0] != lanes[0].base[0] + g * kLanes<T> * dtype_size(lanes[0].dtype))
      return false;
  return count > 1;
}

// load_rows for `count` groups at once. Adjacent groups are walked pixel by pixel, so that memory is read as
// one sequential stream.
template <class T, class S, int G>
void load_adjacent_groups(T* const* dst, int64_t row_step, int64_t step, const Lanes<T>& in, int64_t y0,
                          int64_t y1, int64_t x0, int64_t x1) {
  T* to[G];
  for (int g = 0; g < G; ++g) to[g] = dst[g];
  for (int64_t y = y0; y < y1; ++y) {
    const S* p = reinterpret_cast<const S*>(in.base[0]) + y * in.stride_y + x0 * in.stride_x;
    for (int64_t i = 0; i < (x1 - x0) * step; i += step, p += in.stride_x)
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) store(to[g] + i, load_as(p + g * kLanes<T>, T()));
    for (int g = 0; g < G; ++g) to[g] += row_step;
  }
}

template <class T, class S>
void load_adjacent_as(T* const* dst, int64_t row_step, int64_t step, const Lanes<T>* in, int64_t count,
                      int64_t y0, int64_t y1, int64_t x0, int64_t x1) {
  while (count > 0) {
    const int64_t part = count >= 4 ? 4 : count >= 2 ? 2 : 1;
    if (part == 4)
      load_adjacent_groups<T, S, 4>(dst, row_step, step, *in, y0, y1, x0, x1);
    else if (part == 2)
      load_adjacent_groups<T, S, 2>(dst, row_step, step, *in, y0, y1, x0, x1);
    else
      load_adjacent_groups<T, S, 1>(dst, row_step, step, *in, y0, y1, x0, x1);
    dst += part, in += part, count -= part;
  }
}

template <class T>
void load_rows(T* const* dst, int64_t row_step, int64_t step, const Lanes<T>* in, int64_t count, int64_t y0,
               int64_t y1, int64_t x0, int64_t x1) {
  if (!adjacent(in, count)) {
    for (int64_t g = 0; g < count; ++g) load_rows(dst[g], row_step, step, in[g], y0, y1, x0, x1);
    return;
  }
  if constexpr (std::is_same_v<T, double>) {
    load_adjacent_as<double, double>(dst, row_step, step, in, count, y0, y1, x0, x1);
  } else {
    const DType t = in[0].dtype;
    if (t == DType::f32)
      load_adjacent_as<float, float>(dst, row_step, step, in, count, y0, y1, x0, x1);
    else if (t == DType::bf16)
      load_adjacent_as<float, bf16>(dst, row_step, step, in, count, y0, y1, x0, x1);
    else
      load_adjacent_as<float, f16>(dst, row_step, step, in, count, y0, y1, x0, x1);
  }
}

template <class T>
LKCONV_INLINE Vec<T> load_bias(const TensorView& bias, int64_t c0, int64_t channels) {
  if (!bias.data) return Vec<T>{};
  T buffer[kLanes<T>];
  load_rows(buffer, 0, kLanes<T>, make_lanes<T>(bias, 0, c0, channels, [](int64_t c) { return c; }), 0, 1, 0,
            1);
  return load(buffer);
}

// The kernel of the lanes' channels as [kernel_h][kernel_w] vectors. A flipped view (negative x stride) is
// read forwards and written backwards, so that it takes the fast path too.
template <class T>
void load_kernel(T* dst, const Lanes<T>& weight, int64_t kernel_h, int64_t kernel_w) {
  constexpr int L = kLanes<T>;
  if (weight.stride_x >= 0) return load_rows(dst, kernel_w * L, L, weight, 0, kernel_h, 0, kernel_w);
  Lanes<T> w = weight;
  for (int l = 0; l < w.count; ++l)
    w.base[l] += ((kernel_h - 1) * w.stride_y + (kernel_w - 1) * w.stride_x) * dtype_size(w.dtype);
  w.stride_x = -w.stride_x;
  w.stride_y = -w.stride_y;
  load_rows(dst + (kernel_h * kernel_w - 1) * L, -kernel_w * L, -L, w, 0, kernel_h, 0, kernel_w);
}

}  // namespace lkconv::cpu::LKCONV_ISA
