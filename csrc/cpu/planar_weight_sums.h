// What the sums of backward_weight along the rows of a plane share: lanes that leave products out, and the
// way from a vector of sums for each tap to the gradient's layout.
#pragma once

#include "planar_strided.h"

namespace lkconv::cpu::LKCONV_ISA {

#if LKCONV_AVX512

LKCONV_INLINE Vec<float> add_product(Vec<float> sum, Vec<float> a, Vec<float> b, ElementMask pairs) {
  return (Vec<float>)_mm512_mask3_fmadd_ps((__m512)a, (__m512)b, (__m512)sum, __mmask16(pairs));
}

// The sums' lanes added up: one channel's lane of every tap.
inline void add_lanes(float* to, const float* sums, int64_t taps) {
  constexpr int L = kLanes<float>;
  for (int64_t tap = 0; tap < taps; tap += L) {
    Vec<float> r[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) r[i] = load(sums + (tap + i) * L);
    transpose<float>(r);
#pragma GCC unroll 4
    for (int half = L / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i) r[i] += r[i + half];
    float total[L];
    store(total, r[0]);
    for (int64_t i = 0; i < std::min<int64_t>(L, taps - tap); ++i) to[(tap + i) * L] = total[i];
  }
}

// Writes partial[split][group][tap][lane], lanes being channels as in weight_direct. `add_planes(n, images,
// c, sums)` adds the products of so many images' planes to a vector of sums for each tap of a channel.
template <class AddPlanes>
LKCONV_INLINE void sum_planes(const WeightProblem& p, const Plan& plan, float* sums, int64_t sums_of_channel,
                              float* partial, int64_t task, AddPlanes add_planes) {
  constexpr int64_t L = kLanes<float>;
  const int64_t taps = p.kernel_h * p.kernel_w, group = task / plan.splits, split = task % plan.splits;
  const int64_t c0 = group * L, count = std::min(L, p.channels - c0);
  zero(sums, count * sums_of_channel / L);
  const int64_t n0 = p.batch * split / plan.splits, n1 = p.batch * (split + 1) / plan.splits;
  for (int64_t n = n0; n < n1; n += plan.images)
    for (int64_t c = 0; c < count; ++c)
      add_planes(n, std::min(plan.images, n1 - n), c0 + c, sums + c * sums_of_channel);
  float* to = partial + (split * channel_groups(p.channels, plan) + group) * taps * L;
  zero(to, taps);
  for (int64_t c = 0; c < count; ++c) add_lanes(to + c, sums + c * sums_of_channel, taps);
}

#endif

}  // namespace lkconv::cpu::LKCONV_ISA
