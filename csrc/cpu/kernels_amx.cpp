// The kernels for amx: those of avx512, and products on matrix units for bfloat16.
// Standard headers come before the target region, so that no instruction of it leaks into shared inlines.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "half.h"
#include "kernels.h"
#include "toeplitz_plan.h"

namespace lkconv::cpu {
const Kernels* kernels_avx512();
}

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2")
#define LKCONV_ISA amx
#define LKCONV_VECTOR_BYTES 64
#include "simd.h"
#include "amx_tiles.h"
#include "toeplitz_pack.h"
#include "toeplitz.h"
#include "toeplitz_weight.h"
#pragma GCC pop_options

namespace lkconv::cpu {
const Kernels* kernels_amx() {
  static const Kernels kernels = [] {
    Kernels k = *kernels_avx512();
    k.forward_toeplitz = amx::forward_toeplitz;
    k.weight_toeplitz = amx::weight_toeplitz;
    return k;
  }();
  return &kernels;
}
}  // namespace lkconv::cpu
#else
namespace lkconv::cpu {
const Kernels* kernels_amx() { return nullptr; }
}  // namespace lkconv::cpu
#endif
