// The CPU implementations of the lkconv::depthwise_conv2d ops, on views: no torch here.
// depthwise_conv2d_ops.cpp binds them to tensors.
#pragma once

#include <functional>

#include "planner.h"

namespace lkconv::cpu {

// Runs body(begin, end) over [0, tasks) in parallel, `grain` tasks at least per thread.
using ParallelFor =
    std::function<void(int64_t tasks, int64_t grain, const std::function<void(int64_t, int64_t)>&)>;

void depthwise_conv2d(const ConvParams& p, const TensorView& input, const TensorView& weight,
                      const TensorView& bias, const TensorView& output, const Machine& m,
                      const ParallelFor& parallel);
void depthwise_conv2d_backward_input(const ConvParams& p, const TensorView& grad_output,
                                     const TensorView& weight, const TensorView& grad_input, const Machine& m,
                                     const ParallelFor& parallel);
void depthwise_conv2d_backward_weight(const ConvParams& p, const TensorView& grad_output,
                                      const TensorView& input, const TensorView& grad_weight,
                                      const Machine& m, const ParallelFor& parallel);

// The forward pass in parts, for callers that share threads among several of them: the problem on views, its
// plan, and the tasks of that plan, to be run in any order.
ForwardProblem forward_between(const ConvParams& p, const TensorView& input, const TensorView& weight,
                               const TensorView& bias, const TensorView& output);
Plan plan_forward(const ForwardProblem& p, const Machine& m);
int64_t forward_tasks(const ForwardProblem& p, const Plan& plan);
void run_forward_tasks(const ForwardProblem& p, const Plan& plan, int64_t task0, int64_t task1);
// How many of `tasks`, which take so many cycles together, are worth waking a thread for.
int64_t grain_for(int64_t tasks, double cycles);

// Whether neighbouring pixels of a row are neighbours in memory in both tensors (contiguous).
bool contiguous_rows(const TensorView& a, const TensorView& b);
// Whether neighbouring channels are neighbours in memory in both tensors (channels_last).
bool adjacent_channels(const ConvParams& p, const TensorView& a, const TensorView& b);
// Whether the planner expects PyTorch's own convolution to be faster than every kernel here,
// for the forward pass (from input to output) or backward_input (from grad_output to grad_input).
bool prefers_aten(const ConvParams& p, Pass pass, const TensorView& from, const TensorView& to,
                  const Machine& m);

using lkconv::backward_input_phases;
using lkconv::forward_problem;
using lkconv::weight_problem;

}  // namespace lkconv::cpu
