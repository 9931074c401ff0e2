// Copies of a channel group's pixels next to each other, [pixel][kElements channels], for kernels that read
// pixels in place: of channels_last tensors whose pixels fall in few sets of a cache, and of contiguous
// planes, which are transposed without being converted.
#pragma once

#include "element_vectors.h"

namespace lkconv::cpu::LKCONV_ISA {

// Rows [y0, y1) of a channels_last tensor of which `from` is a group's first pixel.
template <class T>
void gather_pixels(T* to, const T* from, const TensorView& in, int64_t width, int64_t y0, int64_t y1) {
  for (int64_t y = y0; y < y1; ++y) {
    const T* row = from + y * in.stride_h;
    for (int64_t x = 0; x < width; ++x, row += in.stride_w, to += kElements<T>)
      store_whole(to, load_whole(row));
  }
}

#if LKCONV_AVX512

// kElements pixels of as many planes to those pixels of as many channels, and back.
LKCONV_INLINE void transpose_planes(float* to, const float* const* planes, int64_t offset, ElementMask mask,
                                    int64_t pixels) {
  constexpr int L = kElements<float>;
  Vec<float> r[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) r[i] = (Vec<float>)load_bits(planes[i] + offset, mask);
  transpose<float>(r);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i)
    if (i < pixels) store(to + i * L, r[i]);
}
LKCONV_INLINE void transpose_pixels(float* const* planes, int64_t offset, const float* from,
                                    ElementMask mask) {
  constexpr int L = kElements<float>;
  Vec<float> r[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) r[i] = load(from + i * L);
  transpose<float>(r);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) store_bits(planes[i] + offset, (VU32)r[i], mask);
}

// Of bfloat16 a lane holds two channels in between. Pixel 4 i + j is lane 4 (i / 2) + j of the vectors with i
// even, or of those with i odd: interleaving works within 128 bits.
constexpr int pixel_of_lane(int lane, bool odd) { return lane / 4 * 8 + odd * 4 + lane % 4; }

LKCONV_INLINE void transpose_planes(bf16* to, const bf16* const* planes, int64_t offset, ElementMask mask,
                                    int64_t pixels) {
  constexpr int L = kLanes<float>;
  Vec<float> part[2][L];
  for (int i = 0; i < L; ++i) {
    const Vec<u16> a = (Vec<u16>)load_bits(planes[2 * i] + offset, mask),
                   b = (Vec<u16>)load_bits(planes[2 * i + 1] + offset, mask);
    for (int odd = 0; odd < 2; ++odd) part[odd][i] = (Vec<float>)interleave<u16>(a, b, 1, odd);
  }
  for (int odd = 0; odd < 2; ++odd) {
    transpose<float>(part[odd]);
#pragma GCC unroll 16
    for (int lane = 0; lane < L; ++lane)
      if (const int64_t pixel = pixel_of_lane(lane, odd); pixel < pixels)
        store_whole(to + pixel * kElements<bf16>, (VU32)part[odd][lane]);
  }
}
LKCONV_INLINE void transpose_pixels(bf16* const* planes, int64_t offset, const bf16* from, ElementMask mask) {
  constexpr int L = kLanes<float>;
  Vec<float> part[2][L];
  for (int odd = 0; odd < 2; ++odd) {
#pragma GCC unroll 16
    for (int lane = 0; lane < L; ++lane)
      part[odd][lane] = (Vec<float>)load_whole(from + pixel_of_lane(lane, odd) * kElements<bf16>);
    transpose<float>(part[odd]);
  }
  const auto pack = [](VU32 even, VU32 odd) {
    return (VU32)_mm512_packus_epi32((__m512i)even, (__m512i)odd);
  };
  for (int i = 0; i < L; ++i) {
    const VU32 even = (VU32)part[0][i], odd = (VU32)part[1][i];
    store_bits(planes[2 * i] + offset, pack(even & 0xffffu, odd & 0xffffu), mask);
    store_bits(planes[2 * i + 1] + offset, pack(even >> 16, odd >> 16), mask);
  }
}

// body(offset into a plane, index of the first pixel, pixels) for rows [y0, y1), up to `most` pixels at a
// time.
template <class Body>
LKCONV_INLINE void for_runs_of_pixels(const TensorView& t, int64_t width, int64_t y0, int64_t y1,
                                      int64_t most, Body&& body) {
  const bool joined = t.stride_h == width;
  const int64_t runs = joined ? 1 : y1 - y0, length = joined ? (y1 - y0) * width : width;
  for (int64_t r = 0; r < runs; ++r)
    for (int64_t x = 0; x < length; x += most)
      body((y0 + r) * t.stride_h + x, r * width + x, std::min(most, length - x));
}

// Rows [y0, y1) of the planes of channel(0), channel(1), ..., and back; a copy has room for kSlackPixels
// more.
template <class T, class Channel>
void gather_planes(T* copy, const TensorView& in, int64_t n, Channel channel, int64_t width, int64_t y0,
                   int64_t y1) {
  constexpr int64_t L = kElements<T>;
  const T* planes[L];
  for (int i = 0; i < L; ++i) planes[i] = element<const T>(in, n, channel(i), 0);
  for_runs_of_pixels(in, width, y0, y1, L, [&](int64_t offset, int64_t first, int64_t pixels) {
    transpose_planes(copy + first * L, planes, offset, first_elements(pixels), pixels);
  });
}
template <class T>
void scatter_planes(const T* copy, const TensorView& out, int64_t n, int64_t c, int64_t width, int64_t y0,
                    int64_t y1) {
  constexpr int64_t L = kElements<T>;
  T* planes[L];
  for (int i = 0; i < L; ++i) planes[i] = element<T>(out, n, c + i, 0);
  for_runs_of_pixels(out, width, y0, y1, L, [&](int64_t offset, int64_t first, int64_t pixels) {
    transpose_pixels(planes, offset, copy + first * L, first_elements(pixels));
  });
}

#endif

}  // namespace lkconv::cpu::LKCONV_ISA
