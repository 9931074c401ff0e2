// The eight tile registers of Intel AMX: 16 rows of 64 bytes each, and the product of two of them. Tile
// numbers are template arguments, because the instructions hold them as constants. LKCONV_AMX_EMULATION names
// a header that defines the same functions in plain C++, so that the kernels run, checked, on processors
// without AMX.
#pragma once

namespace lkconv::cpu::LKCONV_ISA {

// The 64 bytes that LDTILECFG reads.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

#ifdef LKCONV_AMX_EMULATION
#include LKCONV_AMX_EMULATION
#else

// Inline assembly and not <amxtileintrin.h>, whose macros want literal tile numbers. Volatile statements keep
// their order; the memory clobbers order them with the packing code's loads and stores.
LKCONV_INLINE void tile_configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
LKCONV_INLINE void tile_release() { asm volatile("tilerelease"); }

template <int D>
LKCONV_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(D));
}

// Row r of the tile is the 64 bytes at base + r * stride; the stride may be negative.
template <int D>
LKCONV_INLINE void tile_load(const void* base, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(base), "r"(stride), "i"(D) : "memory");
}
template <int S>
LKCONV_INLINE void tile_store(void* base, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(base), "r"(stride), "i"(S) : "memory");
}

// D[m][n] += sum over k < 16, e < 2 of A[m][2k + e] * B[k][2n + e]: A and B bfloat16, D float32.
template <int D, int A, int B>
LKCONV_INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(D), "i"(A), "i"(B));
}

#endif

// Owns the calling thread's tile state: eight full tiles from construction to destruction.
class TileSession {
 public:
  TileSession() {
    TileConfig config;
    for (int t = 0; t < 8; ++t) config.rows[t] = 16, config.row_bytes[t] = 64;
    tile_configure(config);
  }
  ~TileSession() { tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

// f(std::integral_constant<int, i>) for i = 0..N-1, unrolled, so that i can number a tile.
template <int N, class F>
LKCONV_INLINE void each(F f) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

}  // namespace lkconv::cpu::LKCONV_ISA
