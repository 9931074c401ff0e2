// The CPU implementation of lkconv::scaled_channel_sum, on addresses: no torch here.
// scaled_channel_sum_ops.cpp binds it to tensors.
#pragma once

#include "depthwise_conv2d.h"

namespace lkconv::cpu {

struct ScaledSumProblem;
void scaled_channel_sum(const ScaledSumProblem& p, Isa isa, const ParallelFor& parallel);

}  // namespace lkconv::cpu
