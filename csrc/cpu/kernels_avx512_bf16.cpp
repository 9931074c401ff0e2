// The kernels for avx512 with AVX512-BF16: those of avx512, and sums of bfloat16 whose products are of two
// rows at once (row_products.h). Standard headers come before the target region, so that no instruction of it
// leaks into shared inlines.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "half.h"
#include "kernels.h"

namespace lkconv::cpu {
const Kernels* kernels_avx512();
}

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c,bmi2")
#define LKCONV_ISA avx512_row_pairs
#define LKCONV_ROW_PAIRS 1
#define LKCONV_BF16_PRODUCTS 1
#define LKCONV_VECTOR_BYTES 64
#define LKCONV_VECTOR_REGISTERS 32
#include "simd.h"
#include "element_vectors.h"
#include "lanes_io.h"
#include "direct.h"
#include "direct_weight.h"
#include "planar.h"
#include "planar_flat.h"
#include "planar_weight_flat.h"
#pragma GCC pop_options

namespace lkconv::cpu {
const Kernels* kernels_avx512_bf16() {
  static const Kernels kernels = [] {
    Kernels k = *kernels_avx512();
    k.forward_direct_pairs = avx512_row_pairs::forward_in_place<avx512_row_pairs::bf16>;
    k.forward_flat_bf16 = avx512_row_pairs::forward_flat<avx512_row_pairs::bf16>;
    k.weight_flat_bf16 = avx512_row_pairs::weight_flat<avx512_row_pairs::bf16>;
    k.weight_direct_pairs = avx512_row_pairs::weight_direct<float>;
    return k;
  }();
  return &kernels;
}
}  // namespace lkconv::cpu
#else
namespace lkconv::cpu {
const Kernels* kernels_avx512_bf16() { return nullptr; }
}  // namespace lkconv::cpu
#endif
