// From the fold of branch kernels, or its adjoint, to launches. `Executor` as in run.h. Branches are part of
// the kernels' arguments, so a launch takes kMergeBranches of them; more take several launches.
#pragma once

#include <algorithm>

#include "../merge_problem.h"
#include "run.h"

namespace lkconv::cuda {

inline MergeVectorParams vector_params(const ChannelVector& v) { return {v.data, v.stride, v.dtype}; }

inline MergeBranchParams branch_params(const MergeBranch& b) {
  MergeBranchParams p{};
  p.weight = b.weight.data, p.weight_dtype = b.weight.dtype;
  p.stride_c = b.weight.stride_c, p.stride_h = b.weight.stride_h, p.stride_w = b.weight.stride_w;
  p.scale = b.scale.data, p.scale_dtype = b.scale.dtype, p.scale_stride = b.scale.stride;
  p.grad_weight = b.grad_weight, p.grad_scale = b.grad_scale.data;
  p.kernel_h = int(b.kernel_h), p.kernel_w = int(b.kernel_w);
  p.offset_h = int(b.offset_h), p.offset_w = int(b.offset_w);
  p.step_h = int(b.step_h), p.step_w = int(b.step_w);
  return p;
}

// The part of launch `index` of `launches`.
inline MergeParams merge_params(const MergeProblem& m, int64_t index, int64_t launches) {
  MergeParams p{};
  p.channels = m.channels, p.kernel_h = int(m.kernel_h), p.kernel_w = int(m.kernel_w);
  p.kernel = m.kernel.data, p.kernel_dtype = m.kernel.dtype, p.bias = vector_params(m.bias);
  p.first = index == 0, p.last = index == launches - 1;
  const int64_t from = index * kMergeBranches;
  for (int64_t b = from; b < std::min(m.branch_count, from + kMergeBranches); ++b)
    p.branches[p.branch_count++] = branch_params(m.branches[b]);
  for (int64_t j = from; j < std::min(m.bias_count, from + kMergeBranches); ++j)
    p.biases[p.bias_count++] = vector_params(m.biases[j]);
  return p;
}

inline void check_sizes(const MergeProblem& m) {
  const auto fits = [](int64_t n) { return n <= INT32_MAX; };
  if (!fits(m.taps())) throw std::runtime_error("lkconv: a merged kernel of 2^31 taps or more");
}

template <class Executor>
void run_merge(Executor& e, const MergeProblem& m, bool backward) {
  if (m.channels == 0) return;
  check_sizes(m);
  const int64_t launches = ceil_div(std::max(m.branch_count, m.bias_count), kMergeBranches);
  const int64_t accumulator = m.wide ? 8 : 4, count = m.channels * m.taps();
  void* partial = launches > 1 && !backward ? e.workspace((count + m.channels) * accumulator) : nullptr;
  for (int64_t i = 0; i < launches; ++i) {
    MergeParams p = merge_params(m, i, launches);
    p.partial = partial;
    const int64_t threads = backward ? std::max(1, p.branch_count) * m.channels * 32 : count;
    const LaunchShape shape{ceil_div(threads, kMergeThreads), kMergeThreads,
                            backward ? kMergeThreads * accumulator : 0};
    e.launch(backward ? "merge_depthwise_kernels_backward" : "merge_depthwise_kernels",
             merge_kernel(m.wide, backward), shape, p);
  }
}

}  // namespace lkconv::cuda
