// Vectors of a tensor's own elements that are summed without a copy in scratch. A vector of bfloat16 holds
// two vectors of floats, its even and its odd elements, which a shift and a mask take apart: cheaper than
// widening neighbouring elements, and sums are put together again the same way.
#pragma once

#include "row_products.h"

namespace lkconv::cpu::LKCONV_ISA {

template <class S>
LKCONV_INLINE S* element(const TensorView& t, int64_t n, int64_t c, int64_t y) {
  return static_cast<S*>(t.data) + n * t.stride_n + c * t.stride_c + y * t.stride_h;
}

template <class T>
constexpr int kFloatParts = int(sizeof(float) / sizeof(T));  // vectors of floats in one of elements
template <class T>
constexpr int kElements = kFloatParts<T> * kLanes<float>;

constexpr uint32_t kUpperHalf = 0xffff0000u;

LKCONV_INLINE void take_apart(Vec<float> (&part)[1], VU32 bits) { part[0] = (Vec<float>)bits; }
LKCONV_INLINE void take_apart(Vec<float> (&part)[2], VU32 bits) {
  part[0] = (Vec<float>)(bits << 16);
  part[1] = (Vec<float>)(bits & kUpperHalf);
}

// The bfloat16 nearest to v, ties to even, in the upper half of each element, whose lower half is of no
// meaning. A NaN keeps its sign and becomes quiet instead of rounding to infinity.
LKCONV_INLINE VU32 round_upper_half(Vec<float> v) {
  const VU32 b = (VU32)v, rounded = b + 0x7fffu + ((b >> 16) & 1u), quiet = b | 0x400000u;
#if LKCONV_AVX512
  const __mmask16 unordered = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  return (VU32)_mm512_mask_mov_epi32((__m512i)rounded, unordered, (__m512i)quiet);
#else
  return (v != v) ? quiet : rounded;
#endif
}
LKCONV_INLINE VU32 put_together(const Vec<float>* part, float) { return (VU32)part[0]; }
#if !LKCONV_ROW_PAIRS
LKCONV_INLINE VU32 put_together(const Vec<float>* part, bf16) {
  return (round_upper_half(part[0]) >> 16) | (round_upper_half(part[1]) & kUpperHalf);
}
#else
// The parts of interleave_rows. The processor's own rounding takes subnormal numbers for zeros.
LKCONV_INLINE VU32 put_together_normal(const Vec<float>* part) {
  const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
  return (VU32)_mm512_permutexvar_epi64(order,
                                        (__m512i)_mm512_cvtne2ps_pbh((__m512)part[1], (__m512)part[0]));
}
LKCONV_INLINE __mmask16 subnormal(Vec<float> v) { return _mm512_fpclass_ps_mask((__m512)v, 0x20); }
LKCONV_INLINE VU32 put_together(const Vec<float>* part, bf16) {
  if (__builtin_expect(!(subnormal(part[0]) | subnormal(part[1])), 1)) return put_together_normal(part);
  return (VU32)_mm512_packus_epi32((__m512i)(round_upper_half(part[0]) >> 16),
                                   (__m512i)(round_upper_half(part[1]) >> 16));
}
#endif

LKCONV_INLINE VU32 load_whole(const float* from) { return (VU32)load(from); }
LKCONV_INLINE VU32 load_whole(const bf16* from) {
  typedef uint32_t Bits __attribute__((vector_size(LKCONV_VECTOR_BYTES), aligned(2), may_alias));
  return *reinterpret_cast<const Bits*>(from);
}
LKCONV_INLINE void store_whole(float* to, VU32 bits) { store(to, (Vec<float>)bits); }
LKCONV_INLINE void store_whole(bf16* to, VU32 bits) {
  typedef uint32_t Bits __attribute__((vector_size(LKCONV_VECTOR_BYTES), aligned(2), may_alias));
  *reinterpret_cast<Bits*>(to) = bits;
}

#if LKCONV_ROW_PAIRS
// Two rows of pixels as pairs, or one as floats (its upper halves): a part has every other four elements.
LKCONV_INLINE Vec<u16> load_row(const bf16* from) { return load(&from->bits); }
template <class Product>
LKCONV_INLINE Vec<u16> first_row(const bf16* at) {
  return Product::kRows == 2 ? load_row(at) : Vec<u16>{};
}
template <class Product>
LKCONV_INLINE Vec<u16> second_row(const bf16* at, const bf16* below) {
  return load_row(Product::kRows == 2 ? below : at);
}
#endif
// Which element lane `lane` of a part is, where pixels are pairs of rows and where they are not.
constexpr int64_t element_of_part(bool paired, int64_t part, int64_t lane, int64_t parts) {
  return paired ? lane / 4 * 8 + part * 4 + lane % 4 : lane * parts + part;
}

// Pixels of a step over rows, from the row at `at` and, if two are multiplied at once, the one at `below`.
template <class Product, int P, class T>
LKCONV_INLINE void take_pixels(Vec<float> (&part)[P], const T* at, [[maybe_unused]] const T* below) {
#if LKCONV_ROW_PAIRS
  const Vec<u16> first = first_row<Product>(at);
  Vec<u16> second = second_row<Product>(at, below);
  keep(second);
  for (int q = 0; q < P; ++q) part[q] = (Vec<float>)interleave<u16>(first, second, 1, q);
#else
  take_apart(part, load_whole(at));
#endif
}

// One part of them.
template <class Product, int kPart>
LKCONV_INLINE Vec<float> take_part(const float* at, const float*) {
  return load(at);
}
template <class Product, int kPart>
LKCONV_INLINE Vec<float> take_part(const bf16* at, [[maybe_unused]] const bf16* below) {
#if LKCONV_ROW_PAIRS
  return (Vec<float>)interleave<u16>(first_row<Product>(at), second_row<Product>(at, below), 1, kPart);
#else
  const VU32 bits = load_whole(at);
  return (Vec<float>)(kPart ? bits & kUpperHalf : bits << 16);
#endif
}

LKCONV_INLINE float as_float(float value) { return value; }
LKCONV_INLINE float as_float(bf16 value) { return bfloat_to_float(value.bits); }

#if LKCONV_AVX512

// A bit for each element of a vector. What is masked is not touched.
using ElementMask = uint32_t;
LKCONV_INLINE ElementMask first_elements(int64_t n) { return ElementMask((uint64_t(1) << n) - 1); }

LKCONV_INLINE VU32 load_bits(const float* from, ElementMask mask) {
  return (VU32)_mm512_maskz_loadu_ps(__mmask16(mask), from);
}
LKCONV_INLINE VU32 load_bits(const bf16* from, ElementMask mask) {
  return (VU32)_mm512_maskz_loadu_epi16(__mmask32(mask), from);
}
LKCONV_INLINE VU32 load_bits(VU32 others, const float* from, ElementMask mask) {
  return (VU32)_mm512_mask_loadu_ps((__m512)others, __mmask16(mask), from);
}
LKCONV_INLINE VU32 load_bits(VU32 others, const bf16* from, ElementMask mask) {
  return (VU32)_mm512_mask_loadu_epi16((__m512i)others, __mmask32(mask), from);
}
LKCONV_INLINE void store_bits(float* to, VU32 bits, ElementMask mask) {
  _mm512_mask_storeu_ps(to, __mmask16(mask), (__m512)bits);
}
LKCONV_INLINE void store_bits(bf16* to, VU32 bits, ElementMask mask) {
  _mm512_mask_storeu_epi16(to, __mmask32(mask), (__m512i)bits);
}

#endif

}  // namespace lkconv::cpu::LKCONV_ISA
