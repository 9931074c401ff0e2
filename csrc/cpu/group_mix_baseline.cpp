// The Group-Mix kernels for baseline: see group_mix_all.h.
// Standard headers come before the target region, so that no instruction of it leaks into shared inlines.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "group_mix.h"
#include "half.h"
#include "kernels.h"

#define LKCONV_ISA baseline
#define LKCONV_VECTOR_BYTES 16
#if defined(__aarch64__)
#define LKCONV_VECTOR_REGISTERS 32
#else
#define LKCONV_VECTOR_REGISTERS 16
#endif
#include "group_mix_all.h"

namespace lkconv::cpu {
const GroupMixTable* group_mix_baseline() { return &baseline::group_mix::kGroupMixTable; }
}  // namespace lkconv::cpu
