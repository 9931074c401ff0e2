// The CPU implementation of the lkconv::normalised_branches ops, on addresses: no torch here.
// normalised_branches_ops.cpp binds it to tensors.
#pragma once

#include "depthwise_conv2d.h"
#include "normalised_branches_problem.h"

namespace lkconv::cpu {

// Tiles and tasks: a pure function of sizes and instruction set, so that results depend on no thread count.
NormalisedBranchesPlan plan_normalised_branches(const NormalisedBranchesProblem& p, const Machine& m);

// Whether a convolution costs less as a sum over an input that is in scratch already than by the best
// algorithm of its own, in all three passes; `g` is its forward problem.
bool cheaper_in_place(const ConvParams& p, DType dtype, bool channels_last, const Machine& m);

// Outputs of the kernels' branches to p.saved; mean and biased variance of every branch, (branches, channels)
// of the accumulation type.
void normalised_branches_outputs(NormalisedBranchesProblem p, const Machine& m, void* means, void* variances,
                                 const ParallelFor& parallel);
void normalised_branches_sum(const NormalisedBranchesProblem& p, const Machine& m,
                             const ParallelFor& parallel);
// total[c] = sum grad_output, dots[b, c] = sum grad_output (y_b - p.constant_b).
void normalised_branches_dots(NormalisedBranchesProblem p, const Machine& m, void* total, void* dots,
                              const ParallelFor& parallel);
// All gradients, where the one at branch b's output is scale_b grad_output + slope_b y_b + constant_b.
void normalised_branches_backward(NormalisedBranchesProblem p, const Machine& m, const ParallelFor& parallel);

}  // namespace lkconv::cpu
