// From a problem to kernel launches. `Executor` is what launches: the CUDA runtime (depthwise_conv2d.cu), or
// the host emulator of the tests. It provides
//   Machine machine();
//   void* workspace(int64_t bytes);       // device memory that lives until the launches have run
//   void launch(const char* name, Kernel<P> kernel, const LaunchShape&, const P& params);
#pragma once

#include <stdexcept>
#include <string>

#include "kernels.h"
#include "planner.h"

namespace lkconv::cuda {

inline GlobalView global(const TensorView& v) {
  return {v.data, v.stride_n, v.stride_c, v.stride_h, v.stride_w};
}

// No kernel takes a problem, of which nothing was launched.
struct NoKernel : std::runtime_error {
  explicit NoKernel(const std::string& reason) : std::runtime_error("lkconv: " + reason) {}
};

inline void check_sizes(const Geometry& g) {
  const std::string reason = size_limits(g);
  if (!reason.empty()) throw NoKernel(reason);
}

// A contiguous (n, c, h, w) view of new memory whose rows start at multiples of 16 bytes.
template <class Executor>
TensorView planar_workspace(Executor& e, DType dtype, int64_t n, int64_t c, int64_t h, int64_t w) {
  const int64_t vector = 16 / dtype_size(dtype), row = ceil_div(w, vector) * vector;
  void* data = e.workspace(n * c * h * row * dtype_size(dtype));
  return {data, dtype, c * h * row, h * row, row, 1};
}

template <class Executor>
void copy_view(Executor& e, const TensorView& from, const TensorView& to, int64_t n, int64_t c, int64_t h,
               int64_t w) {
  PackParams p{};
  p.batch = int(n), p.channels = int(c), p.height = int(h), p.width = int(w);
  p.from = global(from), p.to = global(to);
  p.from_channels_fast = from.stride_c == 1, p.to_channels_fast = to.stride_c == 1;
  p.channel_tiles = int(ceil_div(c, kPackTile)), p.pixel_tiles = int(ceil_div(h * w, kPackTile));
  p.few_pixels = h * w + kPackTile < int64_t(1) << 31;
  p.by_channel_tiles = divisor_of(p.channel_tiles), p.by_pixel_tiles = divisor_of(p.pixel_tiles);
  p.by_width = divisor_of(w);
  const LaunchShape shape{n * p.channel_tiles * p.pixel_tiles, kPackThreads,
                          kPackTile * (kPackTile + 1) * dtype_size(from.dtype)};
  e.launch("pack", pack_kernel(from.dtype), shape, p);
}

template <class Executor>
void run_toeplitz_forward(Executor& e, const ForwardProblem& f, ForwardPlan& plan) {
  const DType dtype = f.input.dtype;
  const int64_t planes = f.channels / f.channel_div * f.channel_mul;
  TensorView input = f.input, output = f.output;
  if (plan.pack_input) {
    input = planar_workspace(e, dtype, f.batch, planes, f.height, f.width);
    copy_view(e, f.input, input, f.batch, planes, f.height, f.width);
  }
  if (plan.pack_output) output = planar_workspace(e, dtype, f.batch, f.channels, f.out_height, f.out_width);
  ToeplitzForwardParams& p = plan.toeplitz;
  p.input = global(input), p.weight = global(f.weight), p.output = global(output), p.bias = global(f.bias);
  e.launch("toeplitz_forward", toeplitz_forward_kernel(dtype, plan.m_tiles, plan.n_tiles), plan.launch, p);
  if (plan.pack_output) copy_view(e, output, f.output, f.batch, f.channels, f.out_height, f.out_width);
}

// Forward, or one stride phase of backward_input.
template <class Executor>
void run_forward(Executor& e, ForwardProblem f, const Switches& switches) {
  if (f.batch == 0 || f.channels == 0 || f.out_height <= 0 || f.out_width <= 0) return;
  normalise(f);
  check_sizes(f);
  const int64_t planes = f.channels / f.channel_div * f.channel_mul;
  const Layout in = layout_of(f.input, f.batch, planes, f.height, f.width);
  const Layout out = layout_of(f.output, f.batch, f.channels, f.out_height, f.out_width);
  auto candidate = plan_forward(f, f.input.dtype, in, out, switches, e.machine()).front();
  if (!candidate.possible) throw NoKernel(candidate.reason);
  ForwardPlan& plan = candidate.plan;
  if (plan.algorithm == Algorithm::toeplitz) return run_toeplitz_forward(e, f, plan);
  DirectForwardParams& p = plan.direct;
  p.input = global(f.input), p.weight = global(f.weight), p.output = global(f.output),
  p.bias = global(f.bias);
  e.launch("direct_forward", direct_forward_kernel(f.input.dtype, plan.width_class), plan.launch, p);
}

template <class Executor>
void run_toeplitz_weight(Executor& e, const WeightProblem& w, WeightPlan& plan, void* partial) {
  const DType dtype = w.input.dtype;
  const int64_t planes = w.channels / w.channel_div;
  TensorView input = w.input, grad = w.grad_output;
  if (plan.pack_input) {
    input = planar_workspace(e, dtype, w.batch, planes, w.height, w.width);
    copy_view(e, w.input, input, w.batch, planes, w.height, w.width);
  }
  if (plan.pack_grad) {
    grad = planar_workspace(e, dtype, w.batch, w.channels, w.out_height, w.out_width);
    copy_view(e, w.grad_output, grad, w.batch, w.channels, w.out_height, w.out_width);
  }
  ToeplitzWeightParams& p = plan.toeplitz;
  p.input = global(input), p.grad_output = global(grad), p.partial = static_cast<float*>(partial);
  e.launch("toeplitz_weight", toeplitz_weight_kernel(dtype, plan.diagonals), plan.launch, p);
}

template <class Executor>
void run_weight(Executor& e, WeightProblem w, const Switches& switches) {
  const int64_t count = w.channels * w.kernel_h * w.kernel_w;
  if (count == 0) return;
  const DType dtype = w.input.dtype;
  const int64_t accumulator = dtype == DType::f64 ? 8 : 4;
  ReduceSplitsParams r{};
  r.grad_weight = global(w.grad_weight);
  r.channels = int(w.channels), r.kernel_h = int(w.kernel_h), r.kernel_w = int(w.kernel_w);
  if (w.batch > 0) {
    normalise(w);
    check_sizes(w);
    const Layout in = layout_of(w.input, w.batch, w.channels / w.channel_div, w.height, w.width);
    const Layout out = layout_of(w.grad_output, w.batch, w.channels, w.out_height, w.out_width);
    auto candidate = plan_weight(w, dtype, in, out, switches, e.machine()).front();
    if (!candidate.possible) throw NoKernel(candidate.reason);
    WeightPlan& plan = candidate.plan;
    void* partial = e.workspace(plan.slots * count * accumulator);
    r.partial = partial, r.splits = int(plan.slots);
    if (plan.algorithm == Algorithm::toeplitz) {
      run_toeplitz_weight(e, w, plan, partial);
    } else {
      DirectWeightParams& p = plan.direct;
      p.input = global(w.input), p.grad_output = global(w.grad_output), p.partial = partial;
      e.launch("direct_weight", direct_weight_kernel(dtype, plan.unit), plan.launch, p);
    }
  }
  e.launch("reduce_splits", reduce_splits_kernel(dtype), {ceil_div(count, kDirectThreads), kDirectThreads, 0},
           r);
}

}  // namespace lkconv::cuda
