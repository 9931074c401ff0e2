// backward_input of 3x3 kernels at a stride of 2 both ways, in sweeps: of the rows of its output every other
// one meets one row of taps and the others two, and so do the columns. Two rows of pixels, the second of
// which is the next step's first, give two rows of outputs, whose even and odd columns are summed apart and
// interleaved.
#pragma once

#include "planar_sweep_strided.h"

namespace lkconv::cpu::LKCONV_ISA {

#if LKCONV_AVX512

// Taps [single, double 0, double 1] of rows by columns: those that meet one pixel, and two neighbouring ones.
constexpr int kPhaseTaps = 9;

template <class T>
struct PhaseSweep {
  const T* in;                 // the first row's pixels that the double column phase begins at
  int64_t in_row, begin, end;  // rows of pixels counted from there, and those in the image
  T* single;                   // rows of outputs that meet one row of pixels ...
  T* both;                     // ... and two
  int64_t out_row, single_rows, double_rows;
  int64_t lanes;  // of the outputs of a row, both column phases
  ElementMask masks[2];
  const float *taps, *second_taps;
  int64_t second_in, second_out;  // of a second plane, whose pixels fill the upper half of a vector
  LinesAhead<T, 0> ahead_in;
  LinesAhead<T, 1> ahead_out;
};

// kLanes<float> pixels of one plane, or as many halves of two.
template <bool kPair, class T>
LKCONV_INLINE Vec<float> load_phase_pixels(const T* from, int64_t second, ElementMask mask) {
  if constexpr (!kPair)
    return load_as_floats(from, mask);
  else if constexpr (std::is_same_v<T, float>)
    return (Vec<float>)load_halves(from, second - kHalf<float>, mask);
  else {
    constexpr int kHalfLanes = kLanes<float> / 2;
    const __m256i first = _mm256_maskz_loadu_epi16(__mmask16(mask), from);
    return (Vec<float>)(widen((VU16)_mm256_mask_loadu_epi16(first, __mmask16(mask << kHalfLanes),
                                                            from + second - kHalfLanes))
                        << 16);
  }
}

// A row of interleaved outputs, of one plane or of each of two.
template <bool kPair>
LKCONV_INLINE void store_phases(float* to, int64_t second, Vec<float> even, Vec<float> odd, int64_t lanes) {
  if constexpr (kPair) {
    store_part(to, alternate<float>(even, odd, 0), lanes);
    store_part(to + second, alternate<float>(even, odd, 1), lanes);
  } else {
    store_interleaved(to, even, odd, lanes);
  }
}
template <bool kPair>
LKCONV_INLINE void store_phases(bf16* to, int64_t second, Vec<float> even, Vec<float> odd, int64_t lanes) {
  if constexpr (kPair) {
    const Vec<float> part[] = {even, odd};
    const VU32 bits = put_together(part, bf16());
    store_bits(to, bits, first_elements(lanes));
    store_bits(to + second - kHalf<bf16>, bits, first_elements(lanes) << kHalf<bf16>);
  } else {
    store_interleaved(to, even, odd, lanes);
  }
}

// A row of pixels where the double column phase begins, and one column on.
struct PhasePixels {
  Vec<float> at[2];
  bool inside;
};

// R, C: where the single phase lies, at the first (and then its outputs are the even ones) or at the second
// of the two rows or columns of pixels of the double one (the odd ones).
template <class T, int R, int C, bool kPair>
void sweep_phases(const PhaseSweep<T>& sweep) {
  PhaseSweep<T> s = sweep;  // no store can change it
  Vec<float> k[kPhaseTaps];
#pragma GCC unroll 9
  for (int t = 0; t < kPhaseTaps; ++t)
    k[t] = broadcast_planes<kPair>(s.taps[t], s.second_taps + t), keep(k[t]);
  const auto load_row = [&](int64_t i) __attribute__((always_inline)) {
    PhasePixels p{{}, i >= s.begin && i < s.end};
    if (p.inside) {
      const T* from = s.in + i * s.in_row;
      p.at[0] = load_phase_pixels<kPair>(from, s.second_in, s.masks[0]);
      p.at[1] = load_phase_pixels<kPair>(from + 1, s.second_in, s.masks[1]);
    }
    return p;
  };
  // Adds the row of taps from k[t] on.
  const auto add = [&](Vec<float>& single, Vec<float>& both, const PhasePixels& p, int t)
                       __attribute__((always_inline)) {
                         if (!p.inside) return;
                         single += k[t] * p.at[C];
                         both += k[t + 1] * p.at[0];
                         both += k[t + 2] * p.at[1];
                       };
  const auto store_row = [&](T* to, Vec<float> single, Vec<float> both) __attribute__((always_inline)) {
    store_phases<kPair>(to, s.second_out, C ? both : single, C ? single : both, s.lanes);
  };
  PhasePixels first = load_row(0);
  for (int64_t i = 0; i < std::max(s.single_rows, s.double_rows); ++i) {
    const PhasePixels second = load_row(i + 1);
    s.ahead_in.request();
    s.ahead_out.request();
    if (i < s.single_rows) {
      Vec<float> single{}, both{};
      add(single, both, R ? second : first, 0);
      store_row(s.single + i * s.out_row, single, both);
    }
    if (i < s.double_rows) {
      Vec<float> single{}, both{};
      add(single, both, first, 3);
      add(single, both, second, 6);
      store_row(s.both + i * s.out_row, single, both);
    }
    first = second;
  }
}

// Of two phases along one axis, which has two taps, and where the other one lies.
struct PhaseAxis {
  int64_t both, single, at;
  bool fits;
  PhaseAxis(int64_t kernel0, int64_t kernel1, int64_t pad0, int64_t pad1) {
    both = kernel1 == 2 ? 1 : 0, single = 1 - both;
    at = both ? pad1 - pad0 : pad0 - pad1;
    fits = kernel0 + kernel1 == 3 && std::min(kernel0, kernel1) == 1 && at == single;
  }
};
inline PhaseAxis row_phases(const PlanarProblem& p) {
  const ForwardProblem &a = p.phase(0, 0), &b = p.phase(1, 0);
  return {a.kernel_h, b.kernel_h, a.pad_h, b.pad_h};
}
inline PhaseAxis column_phases(const PlanarProblem& p) {
  const ForwardProblem &a = p.phase(0, 0), &b = p.phase(0, 1);
  return {a.kernel_w, b.kernel_w, a.pad_w, b.pad_w};
}
inline bool phases_are_swept(const PlanarProblem& p) {
  return p.phases_h == 2 && p.phases_w == 2 && row_phases(p).fits && column_phases(p).fits;
}

// The planes of backward_input, two at a time where a vector holds the pixels of both.
template <class T>
class PhaseSweepTask {
 public:
  explicit PhaseSweepTask(const PlanarProblem& p)
      : p_(p),
        rows_(row_phases(p)),
        columns_(column_phases(p)),
        width_(p.phase(0, 0).out_width),  // of the phase that may be one wider
        blocks_(ceil_div(width_, kLanes<float>)),
        pairs_(2 * width_ <= kLanes<float>),
        kernel_(kernel_of(false)),
        pair_kernel_(kernel_of(true)) {
    const ForwardProblem& f = p.phase(0, 0);
    ForwardProblem whole = f;  // with the output's own size
    whole.out_height = f.out_height + p.phase(1, 0).out_height;
    whole.out_width = f.out_width + p.phase(0, 1).out_width;
    out_width_ = whole.out_width;
    ahead_ = {whole, blocks_, pairs_ ? 2 : 1, f.out_height};
  }

  // Planes [first, last), counted over (image, channel).
  void run(int64_t first, int64_t last) const {
    for_planes(p_.phase(0, 0), first, last, pairs_,
               [this](Plane p, const Plane* second) { sweep(p, second); });
  }

 private:
  using Kernel = void(const PhaseSweep<T>&);
  Kernel* kernel_of(bool pair) const {
    static constexpr Kernel* kTable[2][2][2] = {
        {{sweep_phases<T, 0, 0, false>, sweep_phases<T, 0, 1, false>},
         {sweep_phases<T, 1, 0, false>, sweep_phases<T, 1, 1, false>}},
        {{sweep_phases<T, 0, 0, true>, sweep_phases<T, 0, 1, true>},
         {sweep_phases<T, 1, 0, true>, sweep_phases<T, 1, 1, true>}}};
    return kTable[pair][rows_.at][columns_.at];
  }

  void load_taps(int64_t c, float* to) const {
    for (int64_t ry : {rows_.single, rows_.both})
      for (int64_t u = 0; u < p_.phase(ry, 0).kernel_h; ++u)
        for (int64_t rx : {columns_.single, columns_.both}) {
          const ForwardProblem& f = p_.phase(ry, rx);
          const T* weight = element<T>(f.weight, 0, f.weight_channel(c, 0), 0);
          for (int64_t v = 0; v < f.kernel_w; ++v)
            *to++ = as_float(weight[u * f.weight.stride_h + v * f.weight.stride_w]);
        }
  }

  const T* input(Plane p) const {
    const ForwardProblem& f = p_.phase(0, 0);
    return element<T>(f.input, p.n, f.input_channel(p.c, 0), 0);
  }
  T* output(Plane p, int64_t ry) const { return element<T>(p_.phase(ry, 0).output, p.n, p.c, 0); }

  void sweep(Plane p, const Plane* second) const {
    const ForwardProblem& f = p_.phase(rows_.both, columns_.both);
    const T* in = input(p);
    float taps[2 * kPhaseTaps] = {};
    PhaseSweep<T> s{};
    load_taps(p.c, taps);
    s.taps = taps, s.second_taps = taps + kPhaseTaps;
    if (second) {
      load_taps(second->c, taps + kPhaseTaps);
      s.second_in = input(*second) - in, s.second_out = output(*second, 0) - output(p, 0);
    }
    s.in_row = f.input.stride_h, s.out_row = p_.phase(0, 0).output.stride_h;
    s.begin = f.pad_h, s.end = f.height + f.pad_h;
    s.single_rows = p_.phase(rows_.single, 0).out_height, s.double_rows = f.out_height;
    s.ahead_in = ahead_.in(in), s.ahead_out = ahead_.out(output(p, 0));
    for (int64_t b = 0; b < blocks_; ++b) {
      const int64_t x = b * kLanes<float>;
      s.in = in - f.pad_h * s.in_row + x - f.pad_w;
      s.single = output(p, rows_.single) + 2 * x, s.both = output(p, rows_.both) + 2 * x;
      s.lanes = std::min<int64_t>(2 * kLanes<float>, out_width_ - 2 * x);
      for (int v = 0; v < 2; ++v)
        s.masks[v] = bits_inside(x - f.pad_w + v, 1, f.width, kLanes<float> / (pairs_ ? 2 : 1));
      (second ? pair_kernel_ : kernel_)(s);
      s.ahead_in.skip(steps()), s.ahead_out.skip(steps());
    }
  }
  // Steps of a sweep: the row phase that may have one row more.
  int64_t steps() const { return p_.phase(0, 0).out_height; }

  const PlanarProblem& p_;
  const PhaseAxis rows_, columns_;
  const int64_t width_, blocks_;
  const bool pairs_;
  Kernel *const kernel_, *const pair_kernel_;
  int64_t out_width_;
  SweepAhead<T> ahead_;
};

#endif

}  // namespace lkconv::cpu::LKCONV_ISA
