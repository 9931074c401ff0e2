// One SIMD vocabulary for every instruction set: GCC/Clang vector extensions of the width
// LKCONV_VECTOR_BYTES. Included only by a kernels_<isa>.cpp, inside that file's target region and namespace.
#pragma once

// What a target region may use follows from its vector width: g++ 12 leaves __AVX512F__ and its kin undefined
// inside one, so that code behind them would silently never be compiled. The emulation of AMX has no target
// region: there the compiler's flags decide.
#if defined(__x86_64__) && LKCONV_VECTOR_BYTES == 64 && \
    (!defined(LKCONV_AMX_EMULATION) || defined(__AVX512F__))
#define LKCONV_AVX512 1
#elif defined(__x86_64__) && LKCONV_VECTOR_BYTES == 32
#define LKCONV_F16C 1
#endif

namespace lkconv::cpu::LKCONV_ISA {

#define LKCONV_INLINE inline __attribute__((always_inline))

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(LKCONV_VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(LKCONV_VECTOR_BYTES), aligned(alignof(T)), may_alias));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int kLanes = LKCONV_VECTOR_BYTES / sizeof(T);
typedef Vec<float> VF;
constexpr int kLanesF = kLanes<float>;

template <class T>
LKCONV_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(p);
}
template <class T>
LKCONV_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(p) = v;
}

// Adds U rows of V vectors to those at `to`, whose rows are `row` elements apart.
template <class T, int U, int V>
LKCONV_INLINE void add_sums(T* to, int64_t row, const Vec<T> (&sums)[U][V]) {
#pragma GCC unroll 16
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      T* at = to + u * row + v * kLanes<T>;
      store(at, load(at) + sums[u][v]);
    }
}

// Keeps a loaded value in its register: compilers otherwise fold the load into every use and load it again.
template <class V>
LKCONV_INLINE void keep(V& v) {
#if LKCONV_AVX512
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

// max(v, least) and min(v, most); a NaN in v stays one.
template <class T>
LKCONV_INLINE Vec<T> at_least(Vec<T> v, Vec<T> least) {
#if LKCONV_AVX512  // which compilers compare and blend for
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_max_ps((__m512)least, (__m512)v);
  else
    return (Vec<T>)_mm512_max_pd((__m512d)least, (__m512d)v);
#else
  return v < least ? least : v;
#endif
}
template <class T>
LKCONV_INLINE Vec<T> at_most(Vec<T> v, Vec<T> most) {
#if LKCONV_AVX512
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_min_ps((__m512)most, (__m512)v);
  else
    return (Vec<T>)_mm512_min_pd((__m512d)most, (__m512d)v);
#else
  return v > most ? most : v;
#endif
}

// ---- half types -------------------------------------------------------------------------------------------
typedef uint16_t u16;
typedef u16 VU16 __attribute__((vector_size(LKCONV_VECTOR_BYTES / 2)));
typedef u16 VU16u __attribute__((vector_size(LKCONV_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t VU32 __attribute__((vector_size(LKCONV_VECTOR_BYTES)));

struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};

// GCC splits these conversions of whole vectors into halves unless told the instruction.
LKCONV_INLINE VU32 widen(VU16 v) {
#if LKCONV_AVX512
  return (VU32)_mm512_cvtepu16_epi32((__m256i)v);
#else
  return __builtin_convertvector(v, VU32);
#endif
}
LKCONV_INLINE VU16 narrow(VU32 v) {
#if LKCONV_AVX512
  return (VU16)_mm512_cvtepi32_epi16((__m512i)v);
#else
  return __builtin_convertvector(v, VU16);
#endif
}

LKCONV_INLINE VF load_as_float(const float* p) { return load(p); }
LKCONV_INLINE VF load_as_float(const bf16* p) {
  return (VF)(widen(*reinterpret_cast<const VU16u*>(p)) << 16);
}
LKCONV_INLINE VF load_as_float(const f16* p) {
#if LKCONV_AVX512
  return (VF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif LKCONV_F16C
  return (VF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  VF v;
  for (int i = 0; i < kLanesF; ++i) v[i] = half_to_float(p[i].bits);
  return v;
#endif
}

LKCONV_INLINE void store_from_float(float* p, VF v) { store(p, v); }
// Round to nearest even; a NaN keeps its sign and becomes quiet instead of rounding to infinity.
LKCONV_INLINE VU16 round_to_bf16(VF v) {
#if LKCONV_BF16_PRODUCTS
  // The processor's own rounding, but for subnormal numbers, which it takes for zeros.
  if (__builtin_expect(!_mm512_fpclass_ps_mask((__m512)v, 0x20), 1))
    return (VU16)(__m256i)_mm512_cvtneps_pbh((__m512)v);
#endif
  VU32 b = (VU32)v;
  VU32 rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  VU32 nan = (b >> 16) | 0x40u;
#if LKCONV_AVX512
  const __mmask16 unordered = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  return narrow((VU32)_mm512_mask_mov_epi32((__m512i)rounded, unordered, (__m512i)nan));
#else
  return narrow((VU32)((v != v) ? nan : rounded));
#endif
}
LKCONV_INLINE void store_from_float(bf16* p, VF v) { *reinterpret_cast<VU16u*>(p) = round_to_bf16(v); }
LKCONV_INLINE void store_from_float(f16* p, VF v) {
#if LKCONV_AVX512
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, 0));
#elif LKCONV_F16C
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, 0));
#else
  for (int i = 0; i < kLanesF; ++i) p[i].bits = float_to_half(v[i]);
#endif
}
LKCONV_INLINE Vec<double> load_as(const double* p, double) { return load(p); }
template <class S>
LKCONV_INLINE VF load_as(const S* p, float) {
  return load_as_float(p);
}
LKCONV_INLINE void store_from(double* p, Vec<double> v) { store(p, v); }
template <class S>
LKCONV_INLINE void store_from(S* p, VF v) {
  store_from_float(p, v);
}

// ---- scalars and parts of vectors -------------------------------------------------------------------------
template <class S>
LKCONV_INLINE double scalar_load(const S* p) {
  if constexpr (std::is_same_v<S, bf16>)
    return bfloat_to_float(p->bits);
  else if constexpr (std::is_same_v<S, f16>)
    return half_to_float(p->bits);
  else
    return *p;
}
template <class S, class T>
LKCONV_INLINE void scalar_store(S* p, T v) {
  if constexpr (std::is_same_v<S, bf16>)
    p->bits = float_to_bfloat(v);
  else if constexpr (std::is_same_v<S, f16>)
    p->bits = float_to_half(v);
  else
    *p = v;
}

// The first n < lanes elements at p, zero beyond; nothing past them is touched.
template <class S, class T>
LKCONV_INLINE Vec<T> load_part(const S* p, int64_t n, T) {
#if LKCONV_AVX512
  if constexpr (std::is_same_v<S, double>)
    return (Vec<T>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
  else if constexpr (std::is_same_v<S, float>)
    return (Vec<T>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
  else {
    const __m256i h = _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
    if constexpr (std::is_same_v<S, f16>)
      return (Vec<T>)_mm512_cvtph_ps(h);
    else
      return (Vec<T>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
  }
#else
  S part[kLanes<T>] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return load_as(part, T());
#endif
}
template <class S, class T>
LKCONV_INLINE void store_part(S* p, T v, int64_t n) {
#if LKCONV_AVX512
  if constexpr (std::is_same_v<S, double>)
    return _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
  else if constexpr (std::is_same_v<S, float>)
    return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
  else if constexpr (std::is_same_v<S, f16>)
    _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), _mm512_cvtps_ph((__m512)v, 0));
  else
    _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), (__m256i)round_to_bf16(v));
#else
  S part[sizeof(v) / sizeof(v[0])];
  store_from(part, v);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
#endif
}

// ---- transposition
// ------------------------------------------------------------------------------------------ Index vector of
// a two-register shuffle: element j of the result is element pick(j) of [a b].
template <class T, class Pick>
LKCONV_INLINE auto shuffle_index(Pick pick) {
  using I = std::conditional_t<sizeof(T) == 8, int64_t, std::conditional_t<sizeof(T) == 4, int32_t, int16_t>>;
  typedef I VI __attribute__((vector_size(LKCONV_VECTOR_BYTES)));
  VI index{};
#pragma GCC unroll 32
  for (int j = 0; j < kLanes<T>; ++j) index[j] = pick(j);
  return index;
}

// Interleaves units of `s` elements of a and b within every 128 bits: the low halves, or the high halves.
template <class T>
LKCONV_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, int s, bool high) {
  constexpr int E = 16 / sizeof(T);
  return __builtin_shuffle(a, b, shuffle_index<T>([=](int j) {
                             const int lane = j / E * E, within = j % E, unit = within / s;
                             return lane + (high ? E / 2 : 0) + unit / 2 * s + within % s +
                                    (unit % 2 ? kLanes<T> : 0);
                           }));
}

// The even or odd 128-bit lanes of a, then those of b.
template <class T>
LKCONV_INLINE Vec<T> pick_lanes(Vec<T> a, Vec<T> b, bool odd) {
  constexpr int E = 16 / sizeof(T), half = kLanes<T> / 2;
  return __builtin_shuffle(a, b, shuffle_index<T>([=](int j) {
                             const int i = j % half;
                             return (2 * (i / E) + odd) * E + i % E + (j >= half ? kLanes<T> : 0);
                           }));
}

// Transposes a square of kLanes x kLanes: first inside 128-bit lanes, then whole lanes; these are the
// shuffles that every instruction set has as single instructions without index registers.
template <class T>
LKCONV_INLINE void transpose(Vec<T>* r) {
  constexpr int L = kLanes<T>, E = 16 / sizeof(T), B = L / E;
#pragma GCC unroll 2
  for (int s = 1; s < E; s *= 2)
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i & s) continue;
      const Vec<T> a = r[i], b = r[i + s];
      r[i] = interleave<T>(a, b, s, false);
      r[i + s] = interleave<T>(a, b, s, true);
    }
  // Register q * E + j now holds, in its 128-bit lane b, column b * E + j (bit-reversed j) of rows q*E ..
  // q*E+E-1.
  if constexpr (E == 4) {
#pragma GCC unroll 4
    for (int q = 0; q < L; q += 4) std::swap(r[q + 1], r[q + 2]);
  }
  if constexpr (B == 2) {
#pragma GCC unroll 4
    for (int j = 0; j < E; ++j) {
      const Vec<T> a = r[j], b = r[E + j];
      r[j] = pick_lanes<T>(a, b, false);
      r[E + j] = pick_lanes<T>(a, b, true);
    }
  } else if constexpr (B == 4) {
#pragma GCC unroll 4
    for (int j = 0; j < E; ++j) {
      const Vec<T> a = pick_lanes<T>(r[j], r[E + j], false), b = pick_lanes<T>(r[j], r[E + j], true);
      const Vec<T> c = pick_lanes<T>(r[2 * E + j], r[3 * E + j], false);
      const Vec<T> d = pick_lanes<T>(r[2 * E + j], r[3 * E + j], true);
      r[j] = pick_lanes<T>(a, c, false);
      r[2 * E + j] = pick_lanes<T>(a, c, true);
      r[E + j] = pick_lanes<T>(b, d, false);
      r[3 * E + j] = pick_lanes<T>(b, d, true);
    }
  }
}

}  // namespace lkconv::cpu::LKCONV_ISA
