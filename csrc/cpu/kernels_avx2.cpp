// The kernels for avx2: see kernels_all.h.
// Standard headers come before the target region, so that no instruction of it leaks into shared inlines.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "half.h"
#include "kernels.h"
#include "normalised_branches_problem.h"
#include "planar_plan.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#define LKCONV_ISA avx2
#define LKCONV_VECTOR_BYTES 32
#define LKCONV_VECTOR_REGISTERS 16
#include "kernels_all.h"
#pragma GCC pop_options

namespace lkconv::cpu {
const Kernels* kernels_avx2() { return &avx2::kKernels; }
}  // namespace lkconv::cpu
#else
namespace lkconv::cpu {
const Kernels* kernels_avx2() { return nullptr; }
}  // namespace lkconv::cpu
#endif
