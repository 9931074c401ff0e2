// What a step of a sum over kernel rows multiplies: one row of pixels with one of taps or, where the
// processor multiplies pairs of bfloat16, two rows at once. Vectors of floats then carry bits: each lane a
// bfloat16 of one row in its lower half and that of the next row in its upper half, of pixels and taps alike.
// Subnormal numbers count as zeros there.
#pragma once

#ifndef LKCONV_ROW_PAIRS
#define LKCONV_ROW_PAIRS 0
#endif

namespace lkconv::cpu::LKCONV_ISA {

struct OneRow {
  static constexpr int kRows = 1;
  template <class V>
  static LKCONV_INLINE V value(V v) {
    return v;
  }
  template <class V>
  static LKCONV_INLINE void add(V& sum, V a, V b) {
    sum += a * b;
  }
};

#if LKCONV_ROW_PAIRS

struct TwoRows {
  static constexpr int kRows = 2;
  static LKCONV_INLINE VF value(VF v) { return v; }
  static LKCONV_INLINE void add(VF& sum, VF a, VF b) {
    sum = (VF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
  }
};
// A row without a partner: no other row's pixel may reach its sums, not even times zero.
struct FirstRow : OneRow {
  static LKCONV_INLINE VF value(VF v) { return (VF)((VU32)v << 16); }
};

constexpr int kRowsTogether = 2;
using Rows = TwoRows;
using LastRow = FirstRow;

// Sums of X outputs take turns to be added to, one for each chain: a product of pairs takes six cycles, in
// which two a cycle begin.
constexpr int chains(int outputs) { return outputs <= 8 ? 2 : 1; }

// Makes pairs of rows of converted bfloat16, `step` floats apart: each of itself and the row below, the last
// one of itself and zeros.
LKCONV_INLINE void pair_rows(float* row, int64_t step, int64_t rows, int64_t vectors) {
  for (int64_t y = 0; y < rows; ++y, row += step)
    for (int64_t i = 0; i < vectors * kLanesF; i += kLanesF) {
      const VU32 first = (VU32)load(row + i) >> 16;
      store(row + i, (VF)(y + 1 < rows ? first | (VU32)load(row + step + i) : first));
    }
}

#else

constexpr int kRowsTogether = 1;
using Rows = OneRow;
using LastRow = OneRow;
constexpr int chains(int) { return 1; }

#endif

}  // namespace lkconv::cpu::LKCONV_ISA
