// The kernels for baseline: see kernels_all.h.
// Standard headers come before the target region, so that no instruction of it leaks into shared inlines.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "half.h"
#include "kernels.h"
#include "normalised_branches_problem.h"
#include "planar_plan.h"

#define LKCONV_ISA baseline
#define LKCONV_VECTOR_BYTES 16
#if defined(__aarch64__)
#define LKCONV_VECTOR_REGISTERS 32
#else
#define LKCONV_VECTOR_REGISTERS 16
#endif
#include "kernels_all.h"

namespace lkconv::cpu {
const Kernels* kernels_baseline() { return &baseline::kKernels; }
}  // namespace lkconv::cpu
