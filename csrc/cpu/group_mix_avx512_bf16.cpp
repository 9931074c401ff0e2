// The Group-Mix kernels for bfloat16 on avx512 with AVX512-BF16: see group_mix_all.h.
// Standard headers come before the target region, so that no instruction of it leaks into shared inlines.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "group_mix.h"
#include "half.h"
#include "kernels.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c,bmi2")
#define LKCONV_ISA avx512_bf16
#define LKCONV_BF16_PRODUCTS 1
#define LKCONV_VECTOR_BYTES 64
#define LKCONV_VECTOR_REGISTERS 32
#include "group_mix_all.h"
#pragma GCC pop_options

namespace lkconv::cpu {
const GroupMixKernels<float>* group_mix_avx512_bf16() { return &avx512_bf16::group_mix::kGroupMix<float>; }
}  // namespace lkconv::cpu
#else
namespace lkconv::cpu {
const GroupMixKernels<float>* group_mix_avx512_bf16() { return nullptr; }
}  // namespace lkconv::cpu
#endif
