// planar_in_place.h for a stride of 2 along the rows: the forward pass deals the pixels of two vectors of
// floats to even and odd ones, backward_input sums both column phases and interleaves them. Any vertical
// stride. Between a vector of bfloat16 and its two parts that is no work at all.
#pragma once

#include "planar_in_place.h"

namespace lkconv::cpu::LKCONV_ISA {

#if LKCONV_AVX512

// Rows of a block of one vector: the sums of two phases, or the taps of two columns, fit in registers.
constexpr int kStridedRows = 7;

// ---- backward_input ----

// kLanes<float> pixels as floats.
LKCONV_INLINE Vec<float> load_as_floats(const float* from, ElementMask mask) {
  return (Vec<float>)load_bits(from, mask);
}
LKCONV_INLINE Vec<float> load_as_floats(const bf16* from, ElementMask mask) {
  return (Vec<float>)(widen((VU16)_mm256_maskz_loadu_epi16(__mmask16(mask), from)) << 16);
}

// The first n of the elements even[0], odd[0], even[1], ...
LKCONV_INLINE void store_interleaved(float* to, const Vec<float>& even, const Vec<float>& odd, int64_t n) {
  constexpr int L = kLanes<float>;
  store_part(to, alternate<float>(even, odd, 0), std::min<int64_t>(n, L));
  if (n > L) store_part(to + L, alternate<float>(even, odd, 1), n - L);
}
LKCONV_INLINE void store_interleaved(bf16* to, const Vec<float>& even, const Vec<float>& odd, int64_t n) {
  const Vec<float> part[] = {even, odd};
  store_bits(to, put_together(part, bf16()), first_elements(n));
}

// a += the K kernel rows of one column phase.
template <class T, int Y, int K>
LKCONV_INLINE void add_phase(Vec<float> (&a)[Y], const PixelBlock<T>& r) {
  const T* taps = r.taps;
  for (int64_t v = 0; v < r.count; ++v, taps += r.tap_column) {
    Vec<float> k[K];
#pragma GCC unroll 8
    for (int u = 0; u < K; ++u) {
      k[u] = broadcast(as_float(taps[u * r.tap_row]));
      keep(k[u]);
    }
    const T* in = r.in + r.columns[v];
    const uint32_t inside = in_register(r.inside);
    const ElementMask mask = r.masks[v];
#pragma GCC unroll 32
    for (int i = 0; i < Y + K - 1; ++i, in += r.in_row) {
      if (!(inside & (1u << i))) continue;
      Vec<float> p = load_as_floats(in, mask);
      keep(p);
#pragma GCC unroll 8
      for (int u = 0; u < K; ++u)
        if (i - u >= 0 && i - u < Y) a[i - u] += k[u] * p;
    }
  }
}

// Y rows of one row phase: element 2 x of a row is the even phase's sum x, element 2 x + 1 the odd one's.
// `lanes` elements of a row exist.
template <class T, int K>
void pixels_interleaved(const PixelBlock<T>& even, const PixelBlock<T>& odd, int64_t lanes) {
  constexpr int Y = kStridedRows;
  Vec<float> a[Y] = {}, b[Y] = {};
  add_phase<T, Y, K>(a, even);
  add_phase<T, Y, K>(b, odd);
  T* out = even.out;
#pragma GCC unroll 16
  for (int y = 0; y < Y; ++y, out += even.out_row)
    store_interleaved(out, a[y], b[y], y < even.rows ? lanes : 0);
}

template <class T>
using InterleavedKernel = void(const PixelBlock<T>&, const PixelBlock<T>&, int64_t);
template <class T, int... K>
LKCONV_INLINE InterleavedKernel<T>* interleaved_kernel(int64_t rows, std::integer_sequence<int, K...>) {
  static constexpr InterleavedKernel<T>* kTable[] = {pixels_interleaved<T, K + 1>...};
  return kTable[rows - 1];
}

// Columns and masks of one column phase, in the scratch of its task.
struct PhaseColumns {
  int64_t* columns;
  ElementMask* masks;  // of each block of columns
};

// Every stride phase of backward_input.
template <class T>
class PhaseTask {
 public:
  PhaseTask(const PlanarProblem& p, const Plan& plan)
      : p_(p),
        blocks_(ceil_div(p.phase(0, 0).out_width, kLanes<float>)),
        ahead_(p.phase(0, 0).input, p.phase(0, 0).height * p.phase(0, 0).width, p.phase(0, 0).output,
               output_rows() * output_columns(), p.phase(0, 0).batch * p.phase(0, 0).channels,
               row_blocks() * blocks_) {
    const int64_t blocks = blocks_;
    char* at = static_cast<char*>(thread_scratch_bytes(size_t(plan.scratch_bytes)));
    for (int64_t x = 0; x < 2; ++x) {
      const ForwardProblem& f = widest_phase(p, x);
      columns_[x].columns = reinterpret_cast<int64_t*>(at);
      at += round_up(f.kernel_w * int64_t(sizeof(int64_t)), 64);
      columns_[x].masks = reinterpret_cast<ElementMask*>(at);
      at += round_up(blocks * f.kernel_w * int64_t(sizeof(ElementMask)), 64);
      ElementMask* mask = columns_[x].masks;
      for (int64_t v = 0; v < f.kernel_w; ++v) columns_[x].columns[v] = v * f.dil_w - f.pad_w;
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t v = 0; v < f.kernel_w; ++v)
          *mask++ = bits_inside(b * kLanes<float> + columns_[x].columns[v], 1, f.width, kLanes<float>);
    }
  }

  void run(int64_t n, int64_t c) const {
    const ForwardProblem& f = p_.phase(0, 0);
    const T* in = element<T>(f.input, n, f.input_channel(c, 0), 0);
    const Plane plane{in, element<T>(f.output, n, c, 0), c};
    int64_t step = 0;
    for (int64_t ry = 0; ry < p_.phases_h; ++ry) step = sum_rows(n, plane, ry, step);
  }

 private:
  int64_t output_rows() const {
    int64_t rows = 0;
    for (int64_t ry = 0; ry < p_.phases_h; ++ry) rows += p_.phase(ry, 0).out_height;
    return rows;
  }
  int64_t output_columns() const { return p_.phase(0, 0).out_width + p_.phase(0, 1).out_width; }
  int64_t row_blocks() const {
    int64_t blocks = 0;
    for (int64_t ry = 0; ry < p_.phases_h; ++ry) blocks += ceil_div(p_.phase(ry, 0).out_height, kStridedRows);
    return blocks;
  }

  struct Plane {
    const T* in;
    T* out;
    int64_t c;
  };

  // What all blocks of one plane and row phase share.
  PixelBlock<T> block_of(const ForwardProblem& phase, int64_t x, int64_t c) const {
    PixelBlock<T> r{};
    r.in_row = phase.input.stride_h;
    r.columns = columns_[x].columns, r.count = phase.kernel_h ? phase.kernel_w : 0;
    r.taps = element<T>(phase.weight, 0, phase.weight_channel(c, 0), 0);
    r.tap_row = phase.weight.stride_h, r.tap_column = phase.weight.stride_w;
    return r;
  }

  // The blocks of one row phase; returns the step after them.
  int64_t sum_rows(int64_t n, const Plane& plane, int64_t ry, int64_t step) const {
    const ForwardProblem &even = p_.phase(ry, 0), &odd = p_.phase(ry, 1);
    const int64_t kernel_h = std::max(even.kernel_h, odd.kernel_h);
    const auto kernel =
        interleaved_kernel<T>(std::max<int64_t>(1, kernel_h), std::make_integer_sequence<int, kMaxTaps>());
    PixelBlock<T> r[] = {block_of(even, 0, plane.c), block_of(odd, 1, plane.c)};
    const int64_t pads[] = {even.pad_h, odd.pad_h}, widths[] = {even.kernel_w, odd.kernel_w};
    T* out = element<T>(even.output, n, plane.c, 0);
    r[0].out_row = even.output.stride_h;
    for (int64_t y = 0; y < even.out_height; y += kStridedRows) {
      r[0].rows = std::min<int64_t>(kStridedRows, even.out_height - y);
      for (int x = 0; x < 2; ++x) {
        r[x].first = y - pads[x];
        r[x].inside = bits_inside(r[x].first, 1, even.height, kStridedRows + kernel_h - 1);
      }
      for (int64_t b = 0; b < blocks_; ++b) {
        ahead_.request(plane.in, plane.out, step++);
        for (int x = 0; x < 2; ++x) {
          r[x].in = plane.in + r[x].first * r[x].in_row + b * kLanes<float>;
          r[x].masks = columns_[x].masks + b * widths[x];
        }
        r[0].out = out + y * r[0].out_row + 2 * b * kLanes<float>;
        const int64_t width = even.out_width + odd.out_width - 2 * b * kLanes<float>;
        kernel(r[0], r[1], std::min<int64_t>(width, 2 * kLanes<float>));
      }
    }
    return step;
  }

  const PlanarProblem& p_;
  const int64_t blocks_;  // of columns
  const PlanesAhead<T> ahead_;
  PhaseColumns columns_[2];
};

// ---- forward ----

// Which of the 2 kLanes<float> pixels at `from` lie in the image, as masks of as many vectors.
struct DealtMasks {
  ElementMask low, high;  // high: of floats alone
};
LKCONV_INLINE void load_dealt(Vec<float>& even, Vec<float>& odd, const float* from, const DealtMasks& m) {
  const Vec<float> p = load_as_floats(from, m.low), q = load_as_floats(from + kLanes<float>, m.high);
  even = every_other<float>(p, q, 0), odd = every_other<float>(p, q, 1);
}
LKCONV_INLINE void load_dealt(Vec<float>& even, Vec<float>& odd, const bf16* from, const DealtMasks& m) {
  Vec<float> part[2];
  take_apart(part, load_bits(from, m.low));
  even = part[0], odd = part[1];
}
template <class T>
LKCONV_INLINE DealtMasks dealt_masks(int64_t first, int64_t width) {
  constexpr int L = kLanes<float>;
  if (kFloatParts<T> == 2) return {bits_inside(first, 1, width, 2 * L), 0};
  return {bits_inside(first, 1, width, L), bits_inside(first + L, 1, width, L)};
}

// Output row y reads rows 2 y + u or, with kStep 1, rows y + u: pixels of `in` by pairs of tap columns, 2 x
// and 2 x + 1 behind columns[v]. Masks: two for each pair.
template <class T, int K, int kStep>
void pixels_strided(const PixelBlock<T>& r, float initial) {
  constexpr int Y = kStridedRows;
  Vec<float> a[Y];
#pragma GCC unroll 16
  for (int y = 0; y < Y; ++y) a[y] = broadcast(initial);
  const T* taps = r.taps;
  for (int64_t v = 0; v < r.count; v += 2, taps += 2 * r.tap_column) {
    const bool both = v + 1 < r.count;
    Vec<float> k[2][K];
#pragma GCC unroll 8
    for (int u = 0; u < K; ++u) {
      k[0][u] = broadcast(as_float(taps[u * r.tap_row]));
      k[1][u] = both ? broadcast(as_float(taps[u * r.tap_row + r.tap_column])) : Vec<float>{};
    }
    const T* in = r.in + r.columns[v];
    const uint32_t inside = in_register(r.inside);
    const DealtMasks masks{r.masks[v], r.masks[v + 1]};
#pragma GCC unroll 32
    for (int i = 0; i < (Y - 1) * kStep + K; ++i, in += r.in_row) {
      if (!(inside & (1u << i))) continue;
      Vec<float> even, odd;
      load_dealt(even, odd, in, masks);
#pragma GCC unroll 8
      for (int u = 0; u < K; ++u)
        if (i - u >= 0 && (i - u) % kStep == 0 && (i - u) / kStep < Y) a[(i - u) / kStep] += k[0][u] * even;
      if (!both) continue;
#pragma GCC unroll 8
      for (int u = 0; u < K; ++u)
        if (i - u >= 0 && (i - u) % kStep == 0 && (i - u) / kStep < Y) a[(i - u) / kStep] += k[1][u] * odd;
    }
  }
  T* out = r.out;
#pragma GCC unroll 16
  for (int y = 0; y < Y; ++y, out += r.out_row) store_part(out, a[y], y < r.rows ? r.last_lanes : 0);
}

template <class T>
using StridedKernel = void(const PixelBlock<T>&, float);
template <class T, int kStep, int... K>
LKCONV_INLINE StridedKernel<T>* strided_kernel(int64_t rows, std::integer_sequence<int, K...>) {
  static constexpr StridedKernel<T>* kTable[] = {pixels_strided<T, K + 1, kStep>...};
  return kTable[rows - 1];
}

// The planes of a convolution whose stride is 2 along rows, and 1 or 2 down.
template <class T>
class StridedTask {
 public:
  StridedTask(const ForwardProblem& f, const Plan& plan)
      : f_(f),
        pairs_(round_up(f.kernel_w, 2)),
        blocks_(ceil_div(f.out_width, kLanes<float>)),
        ahead_(f.input, f.height * f.width, f.output, f.out_height * f.out_width, f.batch * f.channels,
               ceil_div(f.out_height, kStridedRows) * blocks_) {
    char* at = static_cast<char*>(thread_scratch_bytes(size_t(plan.scratch_bytes)));
    columns_ = reinterpret_cast<int64_t*>(at);
    masks_ = reinterpret_cast<ElementMask*>(at + round_up(pairs_ * int64_t(sizeof(int64_t)), 64));
    for (int64_t v = 0; v < pairs_; ++v) columns_[v] = v - f.pad_w;
    ElementMask* mask = masks_;
    for (int64_t b = 0; b < blocks_; ++b)
      for (int64_t v = 0; v < pairs_; v += 2) {
        const DealtMasks m = dealt_masks<T>(2 * b * kLanes<float> + columns_[v], f.width);
        *mask++ = m.low, *mask++ = m.high;
      }
    constexpr auto kRows = std::make_integer_sequence<int, kMaxStridedTaps>();
    kernel_ =
        f.stride_h == 1 ? strided_kernel<T, 1>(f.kernel_h, kRows) : strided_kernel<T, 2>(f.kernel_h, kRows);
  }

  void run(int64_t n, int64_t c) const {
    const float bias = f_.bias.data ? as_float(*element<T>(f_.bias, 0, c, 0)) : 0.0f;
    PixelBlock<T> r{};
    r.in_row = f_.input.stride_h, r.out_row = f_.output.stride_h;
    r.columns = columns_, r.count = f_.kernel_w;
    r.tap_row = f_.weight.stride_h, r.tap_column = f_.weight.stride_w;
    r.taps = element<T>(f_.weight, 0, f_.weight_channel(c, 0), 0);
    const T* plane = element<T>(f_.input, n, f_.input_channel(c, 0), 0);
    T* out = element<T>(f_.output, n, c, 0);
    int64_t step = 0;
    for (int64_t y = 0; y < f_.out_height; y += kStridedRows) {
      const int64_t first = y * f_.stride_h - f_.pad_h;
      r.rows = std::min<int64_t>(kStridedRows, f_.out_height - y);
      r.inside = bits_inside(first, 1, f_.height, (r.rows - 1) * f_.stride_h + f_.kernel_h);
      for (int64_t b = 0; b < blocks_; ++b) {
        const int64_t x = b * kLanes<float>;
        ahead_.request(plane, out, step++);
        r.in = plane + first * r.in_row + 2 * x;
        r.masks = masks_ + b * pairs_;
        r.out = out + y * r.out_row + x;
        r.last_lanes = std::min<int64_t>(kLanes<float>, f_.out_width - x);
        kernel_(r, bias);
      }
    }
  }

 private:
  const ForwardProblem& f_;
  const int64_t pairs_, blocks_;
  const PlanesAhead<T> ahead_;
  int64_t* columns_;
  ElementMask* masks_;
  StridedKernel<T>* kernel_;
};

#endif

}  // namespace lkconv::cpu::LKCONV_ISA
