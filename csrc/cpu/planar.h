// Direct summation along the rows of a plane: lanes are neighbouring outputs, taps are broadcast. A pixel
// vector is loaded once for all the kernel rows that meet it, so a block of Y x X vectors of outputs takes
// (Y + K - 1) X loads for the Y X K multiply-adds of a column of K taps.
#pragma once

#include "planar_plan.h"
#include "element_vectors.h"

namespace lkconv::cpu::LKCONV_ISA {

// Rows of outputs and of pixels as a block sees them, in elements. Where rows of outputs are shorter than the
// block and follow each other without a gap, each row's last vector runs over into the next row, which is
// written after it; `last` lanes of the block's very last vector may be touched.
template <class T>
struct PlanarRows {
  T* out;
  int64_t out_row;
  const T* in;
  int64_t in_row;
  int64_t last;
};

// The taps of a block: tap (u, v) is taps[u * row + v * column]; columns[v] is where its pixels lie in the
// window.
template <class T>
struct PlanarTaps {
  const T* taps;
  int64_t row, column;
  const int64_t* columns;
  int64_t count;
};

template <class T, int Y, int X>
LKCONV_INLINE void store_sums(const Vec<T> (&a)[Y][X], const PlanarRows<T>& r) {
  constexpr int L = kLanes<T>;
#pragma GCC unroll 16
  for (int y = 0; y < Y; ++y)
#pragma GCC unroll 4
    for (int x = 0; x < X; ++x) {
      T* to = r.out + y * r.out_row + x * L;
      if (y + 1 == Y && x + 1 == X && r.last < L)
        store_part(to, a[y][x], r.last);
      else
        store(to, a[y][x]);
    }
}

template <class T>
LKCONV_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // exactly: adding zero would lose the sign of one
}

// Where a block's sums begin: at `initial`, or at what an earlier part of the kernel left in the output.
template <bool kAssign, class T, int Y, int X>
LKCONV_INLINE void begin_sums(Vec<T> (&a)[Y][X], const PlanarRows<T>& r, T initial) {
  constexpr int L = kLanes<T>;
#pragma GCC unroll 16
  for (int y = 0; y < Y; ++y)
#pragma GCC unroll 4
    for (int x = 0; x < X; ++x) {
      const T* from = r.out + y * r.out_row + x * L;
      const bool part = y + 1 == Y && x + 1 == X && r.last < L;
      a[y][x] = kAssign ? broadcast(initial) : part ? load_part(from, r.last, T()) : load(from);
    }
}

// out (+)= K kernel rows at unit vertical stride and dilation.
template <class T, int Y, int X, int K, bool kAssign>
void planar_unit(const PlanarRows<T>& r, const PlanarTaps<T>& w, T initial) {
  constexpr int L = kLanes<T>;
  Vec<T> a[Y][X];
  begin_sums<kAssign>(a, r, initial);
  const T* taps = w.taps;
  for (int64_t v = 0; v < w.count; ++v, taps += w.column) {
    const T* in = r.in + w.columns[v];
    Vec<T> k[K];
#pragma GCC unroll 8
    for (int u = 0; u < K; ++u) {
      k[u] = broadcast(taps[u * w.row]);
      keep(k[u]);
    }
#pragma GCC unroll 32
    for (int i = 0; i < Y + K - 1; ++i, in += r.in_row)
#pragma GCC unroll 4
      for (int x = 0; x < X; ++x) {
        Vec<T> p = load(in + x * L);
        keep(p);
#pragma GCC unroll 8
        for (int u = 0; u < K; ++u)
          if (i - u >= 0 && i - u < Y) a[i - u][x] += k[u] * p;
      }
  }
  store_sums(a, r);
}

// The same for any vertical stride and dilation, all kernel rows: one load per multiply-add.
template <class T, int Y, int X, bool kAssign>
void planar_strided(const PlanarRows<T>& r, const PlanarTaps<T>& w, T initial, int64_t rows, int64_t stride,
                    int64_t dil) {
  constexpr int L = kLanes<T>;
  Vec<T> a[Y][X];
  begin_sums<kAssign>(a, r, initial);
  for (int64_t v = 0; v < w.count; ++v) {
    const T *column = r.in + w.columns[v], *taps = w.taps + v * w.column;
    for (int64_t u = 0; u < rows; ++u, column += dil * r.in_row) {
      const Vec<T> k = broadcast(taps[u * w.row]);
      const T* in = column;
#pragma GCC unroll 16
      for (int y = 0; y < Y; ++y, in += stride * r.in_row)
#pragma GCC unroll 4
        for (int x = 0; x < X; ++x) a[y][x] += k * load(in + x * L);
    }
  }
  store_sums(a, r);
}

// The kernels of one block shape: those that begin sums and those that add to them. unit[k - 1] takes k
// kernel rows.
template <class T>
struct PlanarKernels {
  using Unit = void(const PlanarRows<T>&, const PlanarTaps<T>&, T);
  using Strided = void(const PlanarRows<T>&, const PlanarTaps<T>&, T, int64_t, int64_t, int64_t);
  Unit* unit[2][kMaxTaps];
  Strided* strided[2];
};
template <class T, int Y, int X, int... K>
constexpr PlanarKernels<T> planar_kernels(std::integer_sequence<int, K...>) {
  return {{{planar_unit<T, Y, X, K + 1, true>...}, {planar_unit<T, Y, X, K + 1, false>...}},
          {planar_strided<T, Y, X, true>, planar_strided<T, Y, X, false>}};
}
template <class T, size_t... B>
LKCONV_INLINE const PlanarKernels<T>& planar_kernels(int64_t block, std::index_sequence<B...>) {
  static constexpr PlanarKernels<T> kTable[] = {
      planar_kernels<T, int(kPlanarBlocks[B].rows), int(kPlanarBlocks[B].vectors)>(
          std::make_integer_sequence<int, kMaxTaps>())...};
  return kTable[block];
}
template <class T>
LKCONV_INLINE const PlanarKernels<T>& planar_kernels(int64_t block) {
  return planar_kernels<T>(block, std::make_index_sequence<planar_blocks(kRegisters >= 32)>());
}

// ---- rows between tensors and scratch ---------------------------------------------------------------------

// Elements 0, s, 2 s, ... of [a b] for s = 2: the even or the odd ones.
template <class T>
LKCONV_INLINE Vec<T> every_other(Vec<T> a, Vec<T> b, int odd) {
  return __builtin_shuffle(a, b, shuffle_index<T>([=](int j) { return 2 * j + odd; }));
}
// a0 b0 a1 b1 ...: the first or the second vector of it.
template <class T>
LKCONV_INLINE Vec<T> alternate(Vec<T> a, Vec<T> b, int half) {
  constexpr int L = kLanes<T>;
  return __builtin_shuffle(a, b, shuffle_index<T>([=](int j) { return half * L / 2 + j / 2 + j % 2 * L; }));
}

// Rows of a window: `stride` segments of which column i of the window is element i / stride of number
// i % stride.
template <class T>
struct PlanarWindow {
  T* rows;
  int64_t row, segment, stride;

  LKCONV_INLINE T* at(int64_t y, int64_t column) const {
    return rows + y * row + column % stride * segment + column / stride;
  }
};

// `rows` rows of `n` pixels to window columns from `column` on. A row's last vectors move left to stay whole;
// rows too short for that end in zeros, which lie in the halo or the slack behind it.
template <class T, class S>
LKCONV_INLINE void load_planar_rows(const PlanarWindow<T>& w, int64_t y, int64_t column, const S* from,
                                    int64_t step, int64_t rows, int64_t n) {
  constexpr int L = kLanes<T>;
  const int64_t whole = n / L * L, rest = n - whole;
  if (w.stride == 1) {
    T* to = w.at(y, column);
    for (int64_t r = 0; r < rows; ++r, to += w.row, from += step) {
      for (int64_t i = 0; i < whole; i += L) store(to + i, load_as(from + i, T()));
      if (rest && whole)
        store(to + n - L, load_as(from + n - L, T()));
      else if (rest)
        store(to, load_part(from, rest, T()));
    }
  } else if (w.stride == 2) {
    T *even = w.at(y, column), *odd = w.at(y, column + 1);
    for (int64_t r = 0; r < rows; ++r, even += w.row, odd += w.row, from += step) {
      int64_t i = 0;
      const auto deal = [&](Vec<T> a, Vec<T> b) {
        store(even + i / 2, every_other<T>(a, b, 0));
        store(odd + i / 2, every_other<T>(a, b, 1));
        i += 2 * L;
      };
      while (i + 2 * L <= n) deal(load_as(from + i, T()), load_as(from + i + L, T()));
      if (i + L <= n)
        deal(load_as(from + i, T()), rest ? load_part(from + i + L, rest, T()) : Vec<T>{});
      else if (i < n)
        deal(load_part(from + i, rest, T()), Vec<T>{});
    }
  } else {
    for (int64_t r = 0; r < rows; ++r, from += step)
      for (int64_t i = 0; i < n; ++i) *w.at(y + r, column + i) = T(scalar_load(from + i));
  }
}

// A row of an output from those of its column phases: out[s x + b] = from[b * phase + x].
template <class T, class S>
LKCONV_INLINE void store_planar_row(S* out, const T* from, int64_t phase, int64_t stride, int64_t n) {
  constexpr int L = kLanes<T>;
  const int64_t whole = n / L * L, rest = n - whole;
  if (stride == 1) {
    for (int64_t i = 0; i < whole; i += L) store_from(out + i, load(from + i));
    if (rest && whole)
      store_from(out + n - L, load(from + n - L));
    else if (rest)
      store_part(out, load(from), rest);
  } else if (stride == 2) {
    for (int64_t i = 0; i < n; i += 2 * L) {
      const Vec<T> a = load(from + i / 2), b = load(from + phase + i / 2);
      if (i + L <= n)
        store_from(out + i, alternate<T>(a, b, 0));
      else
        store_part(out + i, alternate<T>(a, b, 0), rest);
      if (i + 2 * L <= n)
        store_from(out + i + L, alternate<T>(a, b, 1));
      else if (i + L < n)
        store_part(out + i + L, alternate<T>(a, b, 1), rest);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) scalar_store(out + i, from[i % stride * phase + i / stride]);
  }
}

template <class Body>
LKCONV_INLINE void with_type(DType t, Body body) {
  if (t == DType::f32)
    body(static_cast<float*>(nullptr));
  else if (t == DType::bf16)
    body(static_cast<bf16*>(nullptr));
  else
    body(static_cast<f16*>(nullptr));
}

// ---- one plane --------------------------------------------------------------------------------------------

template <class T>
struct PlanarTask {
  const PlanarProblem& p;
  const Plan& plan;
  const PlanarSizes s;
  const PlanarKernels<T>& kernels;
  const PlanarBlock block;
  T *window, *taps, *out;
  int64_t* columns;

  PlanarTask(const PlanarProblem& p, const Plan& plan)
      : p(p),
        plan(plan),
        s(planar_sizes(p, plan)),
        kernels(planar_kernels<T>(plan.block)),
        block(kPlanarBlocks[plan.block]) {
    window = thread_scratch<T>(s.elements);
    taps = window + reduce() * s.rows * s.row;
    out = taps + reduce() * s.taps;
    columns = reinterpret_cast<int64_t*>(out + p.phases_h * p.phases_w * s.out_rows * s.out_pitch);
    zero(window, reduce() * s.rows * s.row / kLanes<T>);
    place_columns();
  }

  int64_t reduce() const { return p.phases[0].reduce; }

  // Where the columns of each column phase's taps lie in the window.
  void place_columns() {
    int64_t* at = columns;
    for (int64_t x = 0; x < p.phases_w; ++x) {
      const ForwardProblem& f = widest(x);
      for (int64_t v = 0; v < f.kernel_w; ++v) {
        const int64_t column = s.left - f.pad_w + v * f.dil_w;
        *at++ = column % f.stride_w * s.segment + column / f.stride_w;
      }
    }
  }
  // Row phases without taps have no columns; those with taps agree on them.
  const ForwardProblem& widest(int64_t x) const { return widest_phase(p, x); }

  // The kernels of one output channel: in the weight itself where it holds them as T, else in scratch.
  void load_taps(int64_t c) {
    if (taps_in_place()) return;
    for (int64_t j = 0; j < reduce(); ++j) {
      T* at = taps + j * s.taps;
      for (int64_t i = 0; i < p.phases_h * p.phases_w; ++i) {
        const ForwardProblem& f = p.phases[i];
        with_type(f.weight.dtype, [&](auto* type) {
          using S = std::remove_pointer_t<decltype(type)>;
          const S* from = element<S>(f.weight, 0, f.weight_channel(c, j), 0);
          for (int64_t u = 0; u < f.kernel_h; ++u, from += f.weight.stride_h)
            for (int64_t v = 0; v < f.kernel_w; ++v) *at++ = T(scalar_load(from + v * f.weight.stride_w));
        });
      }
    }
  }
  bool taps_in_place() const { return dtype_size(p.phases[0].weight.dtype) == sizeof(T); }

  // The kernel of input plane 0; `scratch` is where it would be in there, and `next` leads to that of
  // plane 1.
  PlanarTaps<T> taps_of(const ForwardProblem& f, int64_t c, const T* scratch, const int64_t* columns,
                        int64_t& next) const {
    if (!taps_in_place()) {
      next = s.taps;
      return {scratch, f.kernel_w, 1, columns, f.kernel_w};
    }
    next = f.weight.stride_c;
    return {element<T>(f.weight, 0, f.weight_channel(c, 0), 0), f.weight.stride_h, f.weight.stride_w, columns,
            f.kernel_w};
  }

  // Input rows of output rows [y0, ...) of every phase; rows outside the image become zero.
  void load_window(int64_t n, int64_t channel, int64_t y0, T* to) const {
    const ForwardProblem& f = p.phases[0];
    const int64_t first = y0 * f.stride_h - s.top;
    const int64_t begin = std::clamp<int64_t>(-first, 0, s.rows);
    const int64_t end = std::clamp<int64_t>(f.height - first, begin, s.rows);
    zero(to, begin * s.row / kLanes<T>);
    zero(to + end * s.row, (s.rows - end) * s.row / kLanes<T>);
    const int64_t a = std::max<int64_t>(0, -s.left), b = std::min(f.width, s.columns - s.left);
    if (a >= b || begin >= end) return;
    with_type(f.input.dtype, [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      load_planar_rows<T, S>({to, s.row, s.segment, f.stride_w}, begin, a + s.left,
                             element<S>(f.input, n, channel, first + begin) + a, f.input.stride_h,
                             end - begin, b - a);
    });
  }

  // One block: output rows from y of the tile that begins at y0, columns from x.
  void sum_block(const ForwardProblem& f, PlanarTaps<T> w, int64_t next, T initial, int64_t y0, int64_t y,
                 int64_t x, T* to, int64_t to_row) const {
    const int64_t first = (y0 + y) * f.stride_h - f.pad_h;
    int64_t u0, u1;
    clip_taps(first, first + (block.rows - 1) * f.stride_h, f.height, f.kernel_h, f.dil_h, u0, u1);
    const T* in = window + (y * f.stride_h + s.top - f.pad_h) * s.row + x;
    const T* kernel = w.taps;
    const int64_t width = block.vectors * kLanes<T>;
    PlanarRows<T> rows{to, to_row, in, s.row, kLanes<T> - std::max<int64_t>(0, width - to_row)};
    if (u1 <= u0) w.count = 0;
    const bool unit = f.stride_h == 1 && f.dil_h == 1 && u1 > u0;
    bool more = false;
    for (int64_t j = 0; j < reduce(); ++j) {
      int64_t u = u0;
      do {
        const int64_t part = unit ? taps_together(u1 - u) : u1 - u0;
        rows.in = in + j * s.rows * s.row + u * f.dil_h * s.row;
        w.taps = kernel + j * next + u * w.row;
        if (unit)
          kernels.unit[more][part - 1](rows, w, initial);
        else
          kernels.strided[more](rows, w, initial, part, f.stride_h, f.dil_h);
        more = true;
        u += part;
      } while (u < u1);
    }
  }

  // `count` output rows from y0 of one phase. The last blocks move up and left to stay whole; what they
  // compute twice comes out the same. Too few rows or columns for one block run over, into scratch.
  void sum_phase(const ForwardProblem& f, int64_t c, const T* scratch_taps, const int64_t* columns,
                 int64_t y0, int64_t count, T* to, int64_t to_row) const {
    const int64_t width = block.vectors * kLanes<T>;
    int64_t next;
    const PlanarTaps<T> w = taps_of(f, c, scratch_taps, columns, next);
    const T bias = initial(f, c);
    for (int64_t yb = 0; yb < count; yb += block.rows) {
      const int64_t y = std::max<int64_t>(0, std::min(yb, count - block.rows));
      for (int64_t xb = 0; xb < f.out_width; xb += width) {
        const int64_t x = std::max<int64_t>(0, std::min(xb, f.out_width - width));
        sum_block(f, w, next, bias, y0, y, x, to + y * to_row + x, to_row);
      }
    }
  }

  // Whether blocks can store their sums to the output itself.
  bool straight(const ForwardProblem& f, int64_t count) const {
    const int64_t over = block.vectors * kLanes<T> - f.out_width;
    return p.phases_h * p.phases_w == 1 && dtype_size(f.output.dtype) == sizeof(T) && count >= block.rows &&
           (over <= 0 || (f.output.stride_h == f.out_width && over < kLanes<T> && over <= f.out_width));
  }

  T initial(const ForwardProblem& f, int64_t c) const {
    if (!f.bias.data) return T(0);
    T value = 0;
    with_type(f.bias.dtype, [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      value = T(scalar_load(element<S>(f.bias, 0, c, 0)));
    });
    return value;
  }

  int64_t rows_of(int64_t ry, int64_t y0) const {
    return std::clamp<int64_t>(p.phase(ry, 0).out_height - y0, 0, plan.tile_h);
  }

  // Rows [y0, ...) of every phase to scratch.
  void sum_phases(int64_t c, int64_t y0) const {
    const T* at = taps;
    for (int64_t ry = 0; ry < p.phases_h; ++ry) {
      const int64_t* of_phase = columns;
      for (int64_t rx = 0; rx < p.phases_w; ++rx) {
        const ForwardProblem& f = p.phase(ry, rx);
        sum_phase(f, c, at, of_phase, y0, rows_of(ry, y0),
                  out + (ry * p.phases_w + rx) * s.out_rows * s.out_pitch, s.out_pitch);
        at += f.kernel_h * f.kernel_w;
        of_phase += widest(rx).kernel_w;
      }
    }
  }

  // Rows of the output in their order in memory, a row of each row phase in turn.
  void store_phases(int64_t n, int64_t c, int64_t y0) const {
    const int64_t step = s.out_rows * s.out_pitch;
    int64_t width = 0;
    for (int64_t rx = 0; rx < p.phases_w; ++rx) width += p.phase(0, rx).out_width;
    with_type(p.phases[0].output.dtype, [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      for (int64_t y = 0; y < rows_of(0, y0); ++y)
        for (int64_t ry = 0; ry < p.phases_h; ++ry)
          if (y < rows_of(ry, y0))
            store_planar_row(element<S>(p.phase(ry, 0).output, n, c, y0 + y),
                             out + ry * p.phases_w * step + y * s.out_pitch, step, p.phases_w, width);
    });
  }

  void run(int64_t n, int64_t c, int64_t tile) {
    const int64_t y0 = tile * plan.tile_h;
    const ForwardProblem& f = p.phases[0];
    for (int64_t j = 0; j < reduce(); ++j)
      load_window(n, f.input_channel(c, j), y0, window + j * s.rows * s.row);
    if (straight(f, rows_of(0, y0)))
      return sum_phase(f, c, taps, columns, y0, rows_of(0, y0), element<T>(f.output, n, c, y0),
                       f.output.stride_h);
    sum_phases(c, y0);
    store_phases(n, c, y0);
  }
};

// Task = (image, channel, tile of rows).
inline void forward_planar(const PlanarProblem& p, const Plan& plan, int64_t task0, int64_t task1) {
  PlanarTask<float> t(p, plan);
  const ForwardProblem& f = p.phases[0];
  const int64_t tiles = ceil_div(f.out_height, plan.tile_h);
  int64_t n = task0 / tiles / f.channels, c = task0 / tiles % f.channels, tile = task0 % tiles;
  t.load_taps(c);
  for (int64_t task = task0; task < task1; ++task) {
    t.run(n, c, tile);
    if (++tile < tiles) continue;
    tile = 0;
    if (++c == f.channels) c = 0, ++n;
    t.load_taps(c);
  }
}

}  // namespace lkconv::cpu::LKCONV_ISA
