// planar_sweep.h for 3x3 kernels at a stride of 2 both ways, one vector of outputs at a time: two rows of
// pixels, dealt to even and odd ones as in planar_strided.h, finish one row of outputs.
#pragma once

#include "planar_strided.h"
#include "planar_sweep.h"

namespace lkconv::cpu::LKCONV_ISA {

#if LKCONV_AVX512

// Of two planes whose rows fit half a vector each, the second's pixels `second` elements behind the first's.
LKCONV_INLINE void load_dealt_pair(Vec<float>& even, Vec<float>& odd, const float* from, int64_t second,
                                   ElementMask mask) {
  const Vec<float> p = load_as_floats(from, mask), q = load_as_floats(from + second, mask);
  even = every_other<float>(p, q, 0), odd = every_other<float>(p, q, 1);
}
LKCONV_INLINE void load_dealt_pair(Vec<float>& even, Vec<float>& odd, const bf16* from, int64_t second,
                                   ElementMask mask) {
  Vec<float> part[2];
  take_apart(part, load_halves(from, second - kHalf<bf16>, mask));
  even = part[0], odd = part[1];
}
LKCONV_INLINE void store_lanes(float* to, Vec<float> v, uint32_t lanes) {
  _mm512_mask_storeu_ps(to, __mmask16(lanes), (__m512)v);
}
LKCONV_INLINE void store_lanes(bf16* to, Vec<float> v, uint32_t lanes) {
  _mm256_mask_storeu_epi16(to, __mmask16(lanes), (__m256i)round_to_bf16(v));
}

// The fields of RowSweep mean the same, but: output row y reads rows 2 y to 2 y + 2, its first pixel is where
// `in` points; masks are two for the first two columns of taps and two for the third (see DealtMasks).
template <class T, bool kPair>
void sweep_strided(const RowSweep<T>& sweep) {
  constexpr int64_t kHalfLanes = kLanes<float> / 2;
  RowSweep<T> s = sweep;  // no store can change it
  const Vec<float> initial = broadcast_planes<kPair>(s.initial, &s.second_initial);
  Vec<float> taps[9];
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) taps[t] = broadcast_planes<kPair>(s.taps[t], s.second_taps + t), keep(taps[t]);
  const DealtMasks first{s.masks[0], s.masks[1]}, third{s.masks[2], s.masks[3]};
  const uint32_t lanes = first_elements(s.last_lanes);
  const auto load_row = [&](Vec<float>(&p)[3], const T* in) __attribute__((always_inline)) {
    Vec<float> unused;
    if constexpr (kPair) {
      load_dealt_pair(p[0], p[1], in, s.second_in, first.low);
      load_dealt_pair(p[2], unused, in + 2, s.second_in, third.low);
    } else {
      load_dealt(p[0], p[1], in, first);
      load_dealt(p[2], unused, in + 2, third);
    }
  };
  Vec<float> finished, begun = initial;  // rows of sums
  for (int64_t i = 0; i <= s.rows; ++i, s.in += 2 * s.in_row) {
    finished = begun, begun = initial;
    if (2 * i >= s.begin && 2 * i < s.end) {
      Vec<float> p[3];
      load_row(p, s.in);
#pragma GCC unroll 3
      for (int v = 0; v < 3; ++v) finished += taps[3 * v + 2] * p[v], begun += taps[3 * v] * p[v];
    }
    if (2 * i + 1 >= s.begin && 2 * i + 1 < s.end) {
      Vec<float> p[3];
      load_row(p, s.in + s.in_row);
#pragma GCC unroll 3
      for (int v = 0; v < 3; ++v) begun += taps[3 * v + 1] * p[v];
    }
    if (i == 0) continue;
    s.ahead_in.request();
    s.ahead_out.request();
    store_lanes(s.out, finished, lanes);
    if (kPair) store_lanes(s.out + s.second_out - kHalfLanes, finished, lanes << kHalfLanes);
    s.out += s.out_row;
  }
}

// The planes of a convolution, two at a time where a vector holds the outputs of both.
template <class T>
class StridedSweepTask {
 public:
  StridedSweepTask(const ForwardProblem& f, const Plan& plan)
      : f_(f), pairs_(2 * f.out_width <= kLanes<float>), blocks_(ceil_div(f.out_width, kLanes<float>)) {
    const PixelSizes s = pixel_sizes(f, plan);
    char* at = static_cast<char*>(thread_scratch_bytes(size_t(s.bytes)));
    masks_ = reinterpret_cast<ElementMask*>(at + s.columns);
    taps_ = reinterpret_cast<float*>(at + s.columns + s.masks);
    ElementMask* mask = masks_;
    for (int64_t b = 0; b < blocks_; ++b)
      for (int64_t v = 0; v < 4; v += 2) {
        const int64_t first = 2 * b * kLanes<float> + v - f.pad_w;
        const DealtMasks m = pairs_ ? DealtMasks{bits_inside(first, 1, f.width, kLanes<float>), 0}
                                    : dealt_masks<T>(first, f.width);
        *mask++ = m.low, *mask++ = m.high;
      }
    ahead_ = {f, blocks_, pairs_ ? 2 : 1, f.out_height};
  }

  // Planes [first, last), counted over (image, channel).
  void run(int64_t first, int64_t last) const {
    for_planes(f_, first, last, pairs_, [this](Plane p, const Plane* second) { sweep(p, second); });
  }

 private:
  void sweep(Plane p, const Plane* second) const {
    const SweptPlanes<T> planes(f_, p);
    RowSweep<T> s{};
    s.in_row = f_.input.stride_h, s.out_row = f_.output.stride_h, s.rows = f_.out_height;
    s.begin = f_.pad_h, s.end = f_.height + f_.pad_h;
    load_sweep_taps<T>(f_, p.c, taps_);
    s.taps = taps_, s.initial = planes.initial;
    s.ahead_in = ahead_.in(planes.in), s.ahead_out = ahead_.out(planes.out);
    if (second) {
      const SweptPlanes<T> others(f_, *second);
      s.second_in = others.in - planes.in, s.second_out = others.out - planes.out;
      load_sweep_taps<T>(f_, second->c, taps_ + 9);
      s.second_taps = taps_ + 9, s.second_initial = others.initial;
    }
    for (int64_t b = 0; b < blocks_; ++b) {
      const int64_t x = b * kLanes<float>;
      s.in = planes.in - f_.pad_h * s.in_row + 2 * x - f_.pad_w;
      s.out = planes.out + x;
      s.last_lanes = std::min<int64_t>(kLanes<float>, f_.out_width - x);
      s.masks = masks_ + 4 * b;
      second ? sweep_strided<T, true>(s) : sweep_strided<T, false>(s);
      s.ahead_in.skip(s.rows), s.ahead_out.skip(s.rows);
    }
  }

  const ForwardProblem& f_;
  const bool pairs_;
  const int64_t blocks_;
  ElementMask* masks_;
  float* taps_;
  SweepAhead<T> ahead_;
};

#endif

}  // namespace lkconv::cpu::LKCONV_ISA
