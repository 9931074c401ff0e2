#include "scaled_channel_sum.h"

#include <algorithm>

#include "kernels.h"

namespace lkconv::cpu {
namespace {

constexpr int64_t kElementsPerThread = 1 << 15;  // fewer than this are not worth waking a thread for

}  // namespace

void scaled_channel_sum(const ScaledSumProblem& p, Isa isa, const ParallelFor& parallel) {
  if (p.batch * p.channels * p.pixels == 0) return;
  const Kernels& k = *kernels_for(isa);
  const auto kernel = p.dtype == DType::f64 ? k.scaled_sum_f64 : k.scaled_sum_f32;
  const int64_t run = p.channels_last ? p.channels : p.pixels;
  const int64_t tasks = p.batch * p.channels * p.pixels / run;
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / (run * (p.count + 1)));
  parallel(tasks, grain, [&](int64_t a, int64_t b) { kernel(p, a, b); });
}

}  // namespace lkconv::cpu
