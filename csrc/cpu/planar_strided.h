// planar_in_place.h for a stride of 2 along the rows: the forward pass deals the pixels of two vectors to
// even and odd ones, backward_input sums both column phases and interleaves them. Any vertical stride.
#pragma once

#include "planar_in_place.h"

namespace lkconv::cpu::LKCONV_ISA {

#if LKCONV_AVX512

// Rows of a block of one vector: the sums of two phases, or the taps of two columns, fit in registers.
constexpr int kStridedRows = 7;

// ---- backward_input ----

// a += the K kernel rows of one column phase.
template <int Y, int K>
LKCONV_INLINE void add_phase(Vec<float> (&a)[Y], const PixelBlock& r) {
  const float* taps = r.taps;
  for (int64_t v = 0; v < r.count; ++v, taps += r.tap_column) {
    Vec<float> k[K];
#pragma GCC unroll 8
    for (int u = 0; u < K; ++u) {
      k[u] = broadcast(taps[u * r.tap_row]);
      keep(k[u]);
    }
    const float* in = r.in + r.columns[v];
    const uint32_t inside = in_register(r.inside);
    const __mmask16 mask = r.masks[v];
#pragma GCC unroll 32
    for (int i = 0; i < Y + K - 1; ++i, in += r.in_row) {
      if (!(inside & (1u << i))) continue;
      Vec<float> p = load_lanes(in, mask);
      keep(p);
#pragma GCC unroll 8
      for (int u = 0; u < K; ++u)
        if (i - u >= 0 && i - u < Y) a[i - u] += k[u] * p;
    }
  }
}

// Y rows of one row phase: element 2 x of a row is the even phase's sum x, element 2 x + 1 the odd one's.
// `lanes` elements of a row exist.
template <int K>
void pixels_interleaved(const PixelBlock& even, const PixelBlock& odd, int64_t lanes) {
  constexpr int L = kLanes<float>, Y = kStridedRows;
  Vec<float> a[Y] = {}, b[Y] = {};
  add_phase<Y, K>(a, even);
  add_phase<Y, K>(b, odd);
  float* out = even.out;
#pragma GCC unroll 16
  for (int y = 0; y < Y; ++y, out += even.out_row) {
    const int64_t n = y < even.rows ? lanes : 0;
    store_part(out, alternate<float>(a[y], b[y], 0), std::min<int64_t>(n, L));
    if (n > L) store_part(out + L, alternate<float>(a[y], b[y], 1), n - L);
  }
}

using InterleavedKernel = void(const PixelBlock&, const PixelBlock&, int64_t);
template <int... K>
LKCONV_INLINE InterleavedKernel* interleaved_kernel(int64_t rows, std::integer_sequence<int, K...>) {
  static constexpr InterleavedKernel* kTable[] = {pixels_interleaved<K + 1>...};
  return kTable[rows - 1];
}

// Columns and masks of one column phase, in the scratch of its task.
struct PhaseColumns {
  int64_t* columns;
  uint16_t* masks;  // of each block of columns
};

// Every stride phase of backward_input.
class PhaseTask {
 public:
  PhaseTask(const PlanarProblem& p, const Plan& plan) : p_(p) {
    const int64_t blocks = ceil_div(p.phase(0, 0).out_width, kLanes<float>);
    char* at = static_cast<char*>(thread_scratch_bytes(size_t(plan.scratch_bytes)));
    for (int64_t x = 0; x < 2; ++x) {
      const ForwardProblem& f = widest_phase(p, x);
      columns_[x].columns = reinterpret_cast<int64_t*>(at);
      columns_[x].masks =
          reinterpret_cast<uint16_t*>(at += round_up(f.kernel_w * int64_t(sizeof(int64_t)), 64));
      at += round_up(blocks * f.kernel_w * int64_t(sizeof(uint16_t)), 64);
      uint16_t* mask = columns_[x].masks;
      for (int64_t v = 0; v < f.kernel_w; ++v) columns_[x].columns[v] = v * f.dil_w - f.pad_w;
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t v = 0; v < f.kernel_w; ++v)
          *mask++ =
              uint16_t(bits_inside(b * kLanes<float> + columns_[x].columns[v], 1, f.width, kLanes<float>));
    }
  }

  void run(int64_t n, int64_t c) const {
    for (int64_t ry = 0; ry < p_.phases_h; ++ry)
      for (int64_t y = 0; y < p_.phase(ry, 0).out_height; y += kStridedRows)
        for (int64_t b = 0; b * kLanes<float> < p_.phase(ry, 0).out_width; ++b) sum_block(n, c, ry, y, b);
  }

 private:
  void sum_block(int64_t n, int64_t c, int64_t ry, int64_t y, int64_t b) const {
    const ForwardProblem& f = p_.phase(ry, 0);
    const int64_t kernel_h = std::max(f.kernel_h, p_.phase(ry, 1).kernel_h);
    const int64_t rows = std::min<int64_t>(kStridedRows, f.out_height - y);
    PixelBlock blocks[2];
    for (int64_t x = 0; x < 2; ++x) {
      const ForwardProblem& phase = p_.phase(ry, x);
      PixelBlock& r = blocks[x] = {};
      r.first = y - phase.pad_h, r.in_row = phase.input.stride_h;
      r.in = element<float>(phase.input, n, phase.input_channel(c, 0), 0) + r.first * r.in_row +
             b * kLanes<float>;
      r.inside = bits_inside(r.first, 1, phase.height, kStridedRows + kernel_h - 1);
      r.columns = columns_[x].columns, r.count = phase.kernel_h ? phase.kernel_w : 0;
      r.masks = columns_[x].masks + b * phase.kernel_w;
      r.taps = element<float>(phase.weight, 0, phase.weight_channel(c, 0), 0);
      r.tap_row = phase.weight.stride_h, r.tap_column = phase.weight.stride_w;
    }
    blocks[0].rows = rows, blocks[0].out_row = f.output.stride_h;
    blocks[0].out = element<float>(f.output, n, c, y) + 2 * b * kLanes<float>;
    const int64_t width = f.out_width + p_.phase(ry, 1).out_width - 2 * b * kLanes<float>;
    interleaved_kernel(std::max<int64_t>(1, kernel_h), std::make_integer_sequence<int, kMaxTaps>())(
        blocks[0], blocks[1], std::min<int64_t>(width, 2 * kLanes<float>));
  }

  const PlanarProblem& p_;
  PhaseColumns columns_[2];
};

// ---- forward ----

// Output row y reads rows 2 y + u or, with kStep 1, rows y + u: pixels of `in` by pairs of tap columns, 2 x
// and 2 x + 1 behind columns[v]. Masks: two for each pair.
template <int K, int kStep>
void pixels_strided(const PixelBlock& r, float initial) {
  constexpr int L = kLanes<float>, Y = kStridedRows;
  Vec<float> a[Y];
#pragma GCC unroll 16
  for (int y = 0; y < Y; ++y) a[y] = broadcast(initial);
  const float* taps = r.taps;
  for (int64_t v = 0; v < r.count; v += 2, taps += 2 * r.tap_column) {
    const bool both = v + 1 < r.count;
    Vec<float> k[2][K];
#pragma GCC unroll 8
    for (int u = 0; u < K; ++u) {
      k[0][u] = broadcast(taps[u * r.tap_row]);
      k[1][u] = both ? broadcast(taps[u * r.tap_row + r.tap_column]) : Vec<float>{};
    }
    const float* in = r.in + r.columns[v];
    const uint32_t inside = in_register(r.inside);
    const __mmask16 low = r.masks[v], high = r.masks[v + 1];
#pragma GCC unroll 32
    for (int i = 0; i < (Y - 1) * kStep + K; ++i, in += r.in_row) {
      if (!(inside & (1u << i))) continue;
      const Vec<float> p = load_lanes(in, low), q = load_lanes(in + L, high);
      const Vec<float> even = every_other<float>(p, q, 0);
#pragma GCC unroll 8
      for (int u = 0; u < K; ++u)
        if (i - u >= 0 && (i - u) % kStep == 0 && (i - u) / kStep < Y) a[(i - u) / kStep] += k[0][u] * even;
      if (!both) continue;
      const Vec<float> odd = every_other<float>(p, q, 1);
#pragma GCC unroll 8
      for (int u = 0; u < K; ++u)
        if (i - u >= 0 && (i - u) % kStep == 0 && (i - u) / kStep < Y) a[(i - u) / kStep] += k[1][u] * odd;
    }
  }
  float* out = r.out;
#pragma GCC unroll 16
  for (int y = 0; y < Y; ++y, out += r.out_row) store_part(out, a[y], y < r.rows ? r.last_lanes : 0);
}

using StridedKernel = void(const PixelBlock&, float);
template <int kStep, int... K>
LKCONV_INLINE StridedKernel* strided_kernel(int64_t rows, std::integer_sequence<int, K...>) {
  static constexpr StridedKernel* kTable[] = {pixels_strided<K + 1, kStep>...};
  return kTable[rows - 1];
}

// The planes of a convolution whose stride is 2 along rows, and 1 or 2 down.
class StridedTask {
 public:
  StridedTask(const ForwardProblem& f, const Plan& plan)
      : f_(f), pairs_(round_up(f.kernel_w, 2)), blocks_(ceil_div(f.out_width, kLanes<float>)) {
    char* at = static_cast<char*>(thread_scratch_bytes(size_t(plan.scratch_bytes)));
    columns_ = reinterpret_cast<int64_t*>(at);
    masks_ = reinterpret_cast<uint16_t*>(at + round_up(pairs_ * int64_t(sizeof(int64_t)), 64));
    for (int64_t v = 0; v < pairs_; ++v) columns_[v] = v - f.pad_w;
    uint16_t* mask = masks_;
    for (int64_t b = 0; b < blocks_; ++b)
      for (int64_t v = 0; v < pairs_; ++v)
        *mask++ = uint16_t(bits_inside(2 * b * kLanes<float> + columns_[v / 2 * 2] + v % 2 * kLanes<float>, 1,
                                       f.width, kLanes<float>));
    kernel_ = f.stride_h == 1
                  ? strided_kernel<1>(f.kernel_h, std::make_integer_sequence<int, kMaxStridedTaps>())
                  : strided_kernel<2>(f.kernel_h, std::make_integer_sequence<int, kMaxStridedTaps>());
  }

  void run(int64_t n, int64_t c) const {
    const float bias = f_.bias.data ? *element<float>(f_.bias, 0, c, 0) : 0.0f;
    PixelBlock r{};
    r.in_row = f_.input.stride_h, r.out_row = f_.output.stride_h;
    r.columns = columns_, r.count = f_.kernel_w;
    r.tap_row = f_.weight.stride_h, r.tap_column = f_.weight.stride_w;
    r.taps = element<float>(f_.weight, 0, f_.weight_channel(c, 0), 0);
    const float* plane = element<float>(f_.input, n, f_.input_channel(c, 0), 0);
    for (int64_t y = 0; y < f_.out_height; y += kStridedRows) {
      const int64_t first = y * f_.stride_h - f_.pad_h;
      r.rows = std::min<int64_t>(kStridedRows, f_.out_height - y);
      r.inside = bits_inside(first, 1, f_.height, (r.rows - 1) * f_.stride_h + f_.kernel_h);
      for (int64_t b = 0; b < blocks_; ++b) {
        const int64_t x = b * kLanes<float>;
        r.in = plane + first * r.in_row + 2 * x;
        r.masks = masks_ + b * pairs_;
        r.out = element<float>(f_.output, n, c, y) + x;
        r.last_lanes = std::min<int64_t>(kLanes<float>, f_.out_width - x);
        kernel_(r, bias);
      }
    }
  }

 private:
  const ForwardProblem& f_;
  const int64_t pairs_, blocks_;
  int64_t* columns_;
  uint16_t* masks_;
  StridedKernel* kernel_;
};

template <class Task>
void run_planes(const Task& task, const ForwardProblem& f, int64_t first, int64_t last) {
  int64_t n = first / f.channels, c = first % f.channels;
  for (int64_t plane = first; plane < last; ++plane) {
    task.run(n, c);
    if (++c == f.channels) c = 0, ++n;
  }
}

// All planar sums in place; task = (image, channel).
inline void forward_pixels(const PlanarProblem& p, const Plan& plan, int64_t task0, int64_t task1) {
  const ForwardProblem& f = p.phases[0];
  if (p.phases_w == 2)
    run_planes(PhaseTask(p, plan), f, task0, task1);
  else if (f.stride_w == 2)
    run_planes(StridedTask(f, plan), f, task0, task1);
  else
    PixelTask(f, plan).run(task0, task1);
}

#endif

}  // namespace lkconv::cpu::LKCONV_ISA
