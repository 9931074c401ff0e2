// The CPU implementations of the lkconv::merge_depthwise_kernels ops, on views: no torch here.
// merge_depthwise_kernels_ops.cpp binds them to tensors.
#pragma once

#include "../merge_problem.h"
#include "depthwise_conv2d.h"

namespace lkconv::cpu {

void merge_depthwise_kernels(const MergeProblem& p, Isa isa, const ParallelFor& parallel);
void merge_depthwise_kernels_backward(const MergeProblem& p, Isa isa, const ParallelFor& parallel);

}  // namespace lkconv::cpu
