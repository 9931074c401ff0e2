// output[n, c, i] = shift[c] + sum_b scales[b, c] inputs_b[n, c, i], all tensors in one dense layout. Each
// element of every input is read once and each of the output written once, whatever the number of inputs.
#pragma once

namespace lkconv::cpu::LKCONV_ISA {

// kVectors vectors (or `rest` elements of one) of all inputs at `at`; scale(b) and `start` are vectors too.
template <class T, class S, int kVectors, class Scale>
LKCONV_INLINE void sum_vectors(const ScaledSumProblem& p, int64_t at, const Vec<T>* start, Scale scale,
                               int64_t rest) {
  constexpr int L = kLanes<T>;
  Vec<T> sums[kVectors];
#pragma GCC unroll 4
  for (int k = 0; k < kVectors; ++k) sums[k] = start[k];
  for (int64_t b = 0; b < p.count; ++b) {
    const S* from = static_cast<const S*>(p.inputs[b]) + at;
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k)
      sums[k] += scale(b, k) * (rest ? load_part(from, rest, T()) : load_as(from + k * L, T()));
  }
  S* to = static_cast<S*>(p.output) + at;
  if (rest) return store_part(to, sums[0], rest);
#pragma GCC unroll 4
  for (int k = 0; k < kVectors; ++k) store_from(to + k * L, sums[k]);
}

// Planes of a contiguous tensor, counted over (n, c): one scale and shift for all of a plane.
template <class T, class S>
void scaled_sum_planes(const ScaledSumProblem& p, int64_t plane0, int64_t plane1) {
  constexpr int L = kLanes<T>;
  const T *scales = static_cast<const T*>(p.scales), *shift = static_cast<const T*>(p.shift);
  for (int64_t plane = plane0; plane < plane1; ++plane) {
    const int64_t c = plane % p.channels, end = (plane + 1) * p.pixels;
    const Vec<T> one = Vec<T>{} + shift[c], start[4] = {one, one, one, one};
    const auto scale = [&](int64_t b, int) { return Vec<T>{} + scales[b * p.channels + c]; };
    int64_t at = plane * p.pixels;
    for (; at + 4 * L <= end; at += 4 * L) sum_vectors<T, S, 4>(p, at, start, scale, 0);
    for (; at + L <= end; at += L) sum_vectors<T, S, 1>(p, at, start, scale, 0);
    if (at < end) sum_vectors<T, S, 1>(p, at, start, scale, end - at);
  }
}

// Pixels of a channels_last tensor, counted over (n, y, x): vectors of channels.
template <class T, class S>
void scaled_sum_pixels(const ScaledSumProblem& p, int64_t pixel0, int64_t pixel1) {
  constexpr int L = kLanes<T>;
  const T *scales = static_cast<const T*>(p.scales), *shift = static_cast<const T*>(p.shift);
  for (int64_t pixel = pixel0; pixel < pixel1; ++pixel) {
    int64_t c = 0;
    const auto scale = [&](int64_t b, int k) { return load(scales + b * p.channels + c + k * L); };
    for (; c + 4 * L <= p.channels; c += 4 * L) {
      const Vec<T> start[4] = {load(shift + c), load(shift + c + L), load(shift + c + 2 * L),
                               load(shift + c + 3 * L)};
      sum_vectors<T, S, 4>(p, pixel * p.channels + c, start, scale, 0);
    }
    for (; c + L <= p.channels; c += L) {
      const Vec<T> start = load(shift + c);
      sum_vectors<T, S, 1>(p, pixel * p.channels + c, &start, scale, 0);
    }
    if (const int64_t rest = p.channels - c) {
      const Vec<T> start = load_part(shift + c, rest, T());
      const auto part = [&](int64_t b, int) { return load_part(scales + b * p.channels + c, rest, T()); };
      sum_vectors<T, S, 1>(p, pixel * p.channels + c, &start, part, rest);
    }
  }
}

// Over planes, or over pixels where the layout is channels_last.
template <class T>
void scaled_sum(const ScaledSumProblem& p, int64_t first, int64_t last) {
  with_element<T>(p.dtype, [&](auto s) {
    using S = decltype(s);
    if constexpr (kVectorised<T, S>)
      p.channels_last ? scaled_sum_pixels<T, S>(p, first, last) : scaled_sum_planes<T, S>(p, first, last);
  });
}

}  // namespace lkconv::cpu::LKCONV_ISA
