#include "merge_depthwise_kernels.h"

#include <algorithm>

#include "kernels.h"

namespace lkconv::cpu {
namespace {

constexpr int64_t kTapsPerThread = 1 << 15;  // fewer taps than this are not worth waking a thread for

using Kernel = void (*)(const MergeProblem&, int64_t, int64_t);

void run(const MergeProblem& p, Kernel kernel, const ParallelFor& parallel) {
  if (p.channels == 0) return;
  int64_t taps = p.taps();
  for (int64_t b = 0; b < p.branch_count; ++b) taps += p.branches[b].kernel_h * p.branches[b].kernel_w;
  const int64_t grain = std::max<int64_t>(1, kTapsPerThread / taps);
  parallel(p.channels, grain, [&](int64_t a, int64_t b) { kernel(p, a, b); });
}

}  // namespace

void merge_depthwise_kernels(const MergeProblem& p, Isa isa, const ParallelFor& parallel) {
  const Kernels& k = *kernels_for(isa);
  run(p, p.wide ? k.merge_f64 : k.merge_f32, parallel);
}

void merge_depthwise_kernels_backward(const MergeProblem& p, Isa isa, const ParallelFor& parallel) {
  const Kernels& k = *kernels_for(isa);
  run(p, p.wide ? k.merge_backward_f64 : k.merge_backward_f32, parallel);
}

}  // namespace lkconv::cpu
