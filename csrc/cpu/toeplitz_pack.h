// Moving bfloat16 between tensors of any strides and the layouts that matrix units read: partial vectors, the
// transposition of channels or columns into rows, and the band of a kernel row.
#pragma once

namespace lkconv::cpu::LKCONV_ISA {

static_assert(kLanesF == 16, "tiles are 16 float32 wide");
typedef u16 VLine __attribute__((vector_size(64)));  // 32 values: one row of a tile
typedef u16 VLineU __attribute__((vector_size(64), aligned(2), may_alias));

LKCONV_INLINE VLine load_line(const u16* p) { return *reinterpret_cast<const VLineU*>(p); }
LKCONV_INLINE void store_line(u16* p, VLine v) { *reinterpret_cast<VLineU*>(p) = v; }
LKCONV_INLINE VU16 load_half(const u16* p) { return *reinterpret_cast<const VU16u*>(p); }
LKCONV_INLINE void store_half(u16* p, VU16 v) { *reinterpret_cast<VU16u*>(p) = v; }

// Out of line, so that the common case stays small where it is unrolled.
template <class V>
__attribute__((noinline)) V gather(const u16* p, int64_t step, int64_t a, int64_t b) {
  u16 lanes[sizeof(V) / 2] = {};
  for (int64_t i = a; i < b; ++i) lanes[i] = p[i * step];
  V v;
  std::memcpy(&v, lanes, sizeof v);
  return v;
}

// p[step * i] in lanes i of [a, b), zero in the others, whose addresses are not touched.
LKCONV_INLINE VLine load_line(const u16* p, int64_t step, int64_t a, int64_t b) {
#if LKCONV_AVX512
  if (step == 1)
    return (VLine)_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << b) - (uint64_t(1) << a)), p);
#else
  if (step == 1 && a == 0 && b == 32) return load_line(p);
#endif
  return gather<VLine>(p, step, a, b);
}
LKCONV_INLINE VU16 load_half(const u16* p, int64_t step, int64_t a, int64_t b) {
#if LKCONV_AVX512
  if (step == 1) return (VU16)_mm256_maskz_loadu_epi16(__mmask16((1u << b) - (1u << a)), p);
#else
  if (step == 1 && a == 0 && b == 16) return load_half(p);
#endif
  return gather<VU16>(p, step, a, b);
}
// p[step * i] = v[i] for i < count.
LKCONV_INLINE void store_half(u16* p, int64_t step, int64_t count, VU16 v) {
#if LKCONV_AVX512
  if (step == 1) return _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1), (__m256i)v);
#else
  if (step == 1 && count == 16) return store_half(p, v);
#endif
  for (int64_t i = 0; i < count; ++i) p[i * step] = v[i];
}

LKCONV_INLINE VU32 pair(VU16 low, VU16 high) { return widen(low) | widen(high) << 16; }
LKCONV_INLINE VU32 reverse(VU32 v) {
  return __builtin_shuffle(v, VU32{15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0});
}
LKCONV_INLINE VU16 reverse(VU16 v) {
  return __builtin_shuffle(v, VU16{15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0});
}
// The second half of `low` followed by the first half of `high`.
LKCONV_INLINE VLine middle(VLine low, VLine high) {
  typedef uint64_t V64 __attribute__((vector_size(64)));
  return (VLine)__builtin_shuffle((V64)low, (V64)high, V64{4, 5, 6, 7, 8, 9, 10, 11});
}

// Line l of `count` (at lines + l * step) = element l of the 32 vectors row(0), ..., row(31).
template <class Row>
LKCONV_INLINE void transpose_to_lines(u16* lines, int64_t step, int64_t count, Row row) {
  VF r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = (VF)pair(row(2 * i), row(2 * i + 1));
  transpose<float>(r);
  if (count == 16) {
#pragma GCC unroll 16
    for (int l = 0; l < 16; ++l) store_line(lines + l * step, (VLine)r[l]);
    return;
  }
  for (int64_t l = 0; l < count; ++l) store_line(lines + l * step, (VLine)r[l]);
}
// The inverse: put(i, v) takes for each of 32 positions the vector of the lines' values there.
template <class Put>
LKCONV_INLINE void transpose_from_lines(const u16* lines, int64_t step, int64_t count, Put put) {
  VF r[16];
#pragma GCC unroll 16
  for (int l = 0; l < 16; ++l) r[l] = l < count ? (VF)load_line(lines + l * step) : VF{};
  transpose<float>(r);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    put(2 * i, narrow((VU32)r[i]));
    put(2 * i + 1, narrow((VU32)r[i] >> 16));
  }
}

LKCONV_INLINE const u16* bf16_data(const TensorView& t) { return static_cast<const u16*>(t.data); }

// Channels lie next to each other and columns do not: 16 channels are moved at a time, transposed.
LKCONV_INLINE bool channels_innermost(const TensorView& t) { return t.stride_c == 1 && t.stride_w != 1; }

// offsets[(y - y0) * images + n] = where row y of image n0 + n begins, for `rows` rows.
inline void row_offsets(int64_t* offsets, const TensorView& t, int64_t n0, int64_t images, int64_t y0,
                        int64_t rows) {
  for (int64_t y = y0; y < y0 + rows; ++y)
    for (int64_t n = n0; n < n0 + images; ++n) *offsets++ = n * t.stride_n + y * t.stride_h;
}

// reversed[i] = weight[32 depth - 1 - i], zero beyond the taps; 32 depth + 32 values are written.
inline void reverse_taps(u16* reversed, const u16* weight, int64_t step, int64_t taps, int64_t depth) {
  for (int64_t i = 0; i <= depth; ++i) store_line(reversed + 32 * i, VLine{});
  for (int64_t v = 0; v < taps; v += 16) {
    const int64_t n = std::min<int64_t>(16, taps - v);
    // Lane l holds tap v + 15 - l; a kernel flipped by a negative step already lies in that order.
    const VU16 part = step == -1 ? load_half(weight - (v + 15), 1, 16 - n, 16)
                                 : reverse(load_half(weight + v * step, step, 0, n));
    store_half(reversed + 32 * depth - 16 - v, part);
  }
}

// band[m] = (w[32 depth - 2 - m], w[32 depth - 1 - m]). T_u's tile k has in row i, column x the taps
// (w[32 k + 2 i - x], w[32 k + 2 i + 1 - x]), so its rows are runs of the band that begin 2 pairs earlier
// with every row: a tile load with a negative stride. Neither T_u nor its tiles are ever stored.
inline void make_band(uint32_t* band, const u16* reversed, int64_t depth) {
  for (int64_t m = 0; m < 32 * depth + 16; m += 16)
    store_line(reinterpret_cast<u16*>(band + m),
               (VLine)pair(load_half(reversed + m + 1), load_half(reversed + m)));
}
LKCONV_INLINE const uint32_t* band_tile(const uint32_t* band, int64_t depth, int64_t k) {
  return band + 32 * (depth - k) - 2;
}
constexpr int64_t kBandStride = -8;  // bytes

// Hands out parts of one block of scratch memory, each on its own cache lines. From address 0 it only counts.
class Carve {
 public:
  explicit Carve(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(base_ + used_);
    used_ += uintptr_t(ceil_div(count * int64_t(sizeof(T)), 64) * 64);
    return part;
  }
  int64_t used() const { return int64_t(used_); }

 private:
  uintptr_t base_, used_ = 0;
};

}  // namespace lkconv::cpu::LKCONV_ISA
