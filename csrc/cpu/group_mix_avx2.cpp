// The Group-Mix kernels for avx2: see group_mix_all.h.
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
#pragma GCC target("avx2,fma,f16c,bmi2")
#define LKCONV_ISA avx2
#define LKCONV_VECTOR_BYTES 32
#define LKCONV_VECTOR_REGISTERS 16
#include "group_mix_all.h"
#pragma GCC pop_options

namespace lkconv::cpu {
const GroupMixTable* group_mix_avx2() { return &avx2::group_mix::kGroupMixTable; }
}  // namespace lkconv::cpu
#else
namespace lkconv::cpu {
const GroupMixTable* group_mix_avx2() { return nullptr; }
}  // namespace lkconv::cpu
#endif
