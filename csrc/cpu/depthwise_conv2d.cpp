#include "depthwise_conv2d.h"

#include <algorithm>
#include <memory>
#include <new>
#include <numeric>

#include "planar_plan.h"

namespace lkconv::cpu {
namespace {

// Forward problems whose caller cannot fall back to PyTorch.
Switches own_kernels_only() {
  Switches s = switches_from_environment();
  s.aten = false;
  return s;
}

void run_planar_tasks(const PlanarProblem& p, const Plan& plan, int64_t task0, int64_t task1) {
  const Kernels& k = *kernels_for(plan.isa);
  if (!plan.flat)
    return (plan.in_place || plan.strip ? k.forward_pixels : k.forward_planar)(p, plan, task0, task1);
  const bool floats = p.phases[0].input.dtype == DType::f32;
  (floats ? k.forward_flat_f32 : k.forward_flat_bf16)(p.phases[0], plan, task0, task1);
}

// The stride phases of a planar backward_input.
void run_phases(const PlanarProblem& p, const Plan& plan, const ParallelFor& parallel) {
  const ForwardProblem& f = p.phases[0];
  if (f.batch == 0 || f.channels == 0) return;
  const int64_t tasks = forward_tasks(f, plan);
  parallel(tasks, grain_for(tasks, plan.cycles * double(p.phases_h * p.phases_w)),
           [&](int64_t a, int64_t b) { run_planar_tasks(p, plan, a, b); });
}

void run_forward(ForwardProblem p, const Machine& m, const ParallelFor& parallel) {
  if (is_tall_strip(p)) exchange_axes(p);
  if (p.batch == 0 || p.channels == 0 || p.out_height == 0 || p.out_width == 0) return;
  const Plan plan = plan_forward(p, m);
  const int64_t tasks = forward_tasks(p, plan);
  parallel(tasks, grain_for(tasks, plan.cycles),
           [&](int64_t a, int64_t b) { run_forward_tasks(p, plan, a, b); });
}

template <class T>
std::unique_ptr<T, void (*)(void*)> allocate(int64_t count) {
  void* p = std::aligned_alloc(64, size_t(ceil_div(count * int64_t(sizeof(T)), 64) * 64));
  if (!p) throw std::bad_alloc();
  return {static_cast<T*>(p), std::free};
}

template <class T, class Kernel, class Reduce>
void run_weight(const WeightProblem& p, const Plan& plan, Kernel kernel, Reduce reduce,
                const ParallelFor& parallel) {
  const int64_t groups = channel_groups(p.channels, plan);
  auto partial = allocate<T>(plan.splits * groups * p.kernel_h * p.kernel_w * plan.lanes);
  const int64_t tasks = ceil_div(groups, plan.span) * plan.splits;
  parallel(tasks, grain_for(tasks, plan.cycles),
           [&](int64_t a, int64_t b) { kernel(p, plan, partial.get(), a, b); });
  const double reduce_cycles = double(groups * plan.splits * p.kernel_h * p.kernel_w) * 4;
  parallel(groups, grain_for(groups, reduce_cycles),
           [&](int64_t a, int64_t b) { reduce(p, plan, partial.get(), a, b); });
}

}  // namespace

constexpr double kCyclesPerThread = 20000;  // less work than this is not worth waking a thread for

int64_t grain_for(int64_t tasks, double cycles) {
  const double threads = std::max(1.0, cycles / kCyclesPerThread);
  return std::max<int64_t>(1, int64_t(double(tasks) / threads));
}

Plan plan_forward(const ForwardProblem& p, const Machine& m) {
  return choose_depthwise_conv2d(Pass::forward, p, p.reduce, p.input.dtype, m, own_kernels_only());
}

int64_t forward_tasks(const ForwardProblem& p, const Plan& plan) {
  if (plan.algorithm == Algorithm::planar) return p.batch * p.channels * ceil_div(p.out_height, plan.tile_h);
  return ceil_div(channel_groups(p.channels, plan), plan.span) * ceil_div(p.batch, plan.images) *
         ceil_div(p.out_height, plan.tile_h) * ceil_div(p.out_width, plan.tile_w);
}

void run_forward_tasks(const ForwardProblem& p, const Plan& plan, int64_t task0, int64_t task1) {
  if (plan.algorithm == Algorithm::planar) return run_planar_tasks({&p, 1, 1}, plan, task0, task1);
  const Kernels& k = *kernels_for(plan.isa);
  const auto kernel = plan.algorithm == Algorithm::toeplitz ? k.forward_toeplitz
                      : plan.algorithm == Algorithm::fft    ? k.forward_fft
                      : p.input.dtype == DType::f64         ? k.forward_direct_f64
                      : plan.paired                         ? k.forward_direct_pairs
                                                            : k.forward_direct_f32;
  kernel(p, plan, task0, task1);
}

bool adjacent_channels(const ConvParams& p, const TensorView& a, const TensorView& b) {
  return a.stride_c == 1 && b.stride_c == 1 && p.multiplier == 1;
}

bool contiguous_rows(const TensorView& a, const TensorView& b) { return a.stride_w == 1 && b.stride_w == 1; }

constexpr int64_t kLongestPlanned = int64_t(1) << 20;

bool prefers_aten(const ConvParams& p, Pass pass, const TensorView& from, const TensorView& to,
                  const Machine& m) {
  if (p.batch * p.out_channels() * p.out_height * p.out_width == 0) return false;
  // Planning walks along the axes of the output, for which there may be no memory.
  if (std::max(p.out_height, p.out_width) > kLongestPlanned) return false;
  ForwardProblem f =
      pass == Pass::forward ? forward_problem(p) : backward_input_phases(p, from, {}, to).at(0);
  f.adjacent = adjacent_channels(p, from, to);
  f.dense = from.stride_w == p.channels;
  f.rows = contiguous_rows(from, to);
  if (is_tall_strip(f)) exchange_axes(f);
  return choose_depthwise_conv2d(pass, f, f.reduce, from.dtype, m, switches_from_environment()).algorithm ==
         Algorithm::aten;
}

ForwardProblem forward_between(const ConvParams& p, const TensorView& input, const TensorView& weight,
                               const TensorView& bias, const TensorView& output) {
  ForwardProblem f = forward_problem(p);
  f.input = input, f.weight = weight, f.bias = bias, f.output = output;
  f.adjacent = adjacent_channels(p, input, output);
  f.rows = contiguous_rows(input, output);
  return f;
}

void depthwise_conv2d(const ConvParams& p, const TensorView& input, const TensorView& weight,
                      const TensorView& bias, const TensorView& output, const Machine& m,
                      const ParallelFor& parallel) {
  run_forward(forward_between(p, input, weight, bias, output), m, parallel);
}

void depthwise_conv2d_backward_input(const ConvParams& p, const TensorView& grad_output,
                                     const TensorView& weight, const TensorView& grad_input, const Machine& m,
                                     const ParallelFor& parallel) {
  std::vector<ForwardProblem> phases = backward_input_phases(p, grad_output, weight, grad_input);
  for (ForwardProblem& f : phases) {
    f.adjacent = adjacent_channels(p, grad_output, grad_input);
    f.rows = contiguous_rows(grad_output, grad_input);
  }
  if (phases.size() > 1 && phases[0].rows) {
    const ForwardProblem& f = phases[0];
    const Plan plan =
        choose_depthwise_conv2d(Pass::backward_input, f, f.reduce, grad_output.dtype, m, own_kernels_only());
    if (plan.algorithm == Algorithm::planar) {
      const int64_t phases_w = std::min(p.stride_w, p.width);
      return run_phases({phases.data(), int64_t(phases.size()) / phases_w, phases_w}, plan, parallel);
    }
    for (ForwardProblem& phase : phases) phase.rows = false;  // each writes every stride-th pixel
  }
  for (const ForwardProblem& f : phases) run_forward(f, m, parallel);
}

void depthwise_conv2d_backward_weight(const ConvParams& p, const TensorView& grad_output,
                                      const TensorView& input, const TensorView& grad_weight,
                                      const Machine& m, const ParallelFor& parallel) {
  if (p.out_channels() == 0) return;
  WeightProblem w = weight_problem(p);
  w.input = input, w.grad_output = grad_output, w.grad_weight = grad_weight;
  w.adjacent = adjacent_channels(p, input, grad_output);
  w.rows = contiguous_rows(input, grad_output);
  const DType dtype = input.dtype;
  const Plan plan = choose_depthwise_conv2d(Pass::backward_weight, w, 1, dtype, m, own_kernels_only());
  const Kernels& k = *kernels_for(plan.isa);
  if (dtype == DType::f64)
    return run_weight<double>(w, plan, k.weight_direct_f64, k.weight_reduce_f64, parallel);
  const auto kernel = plan.algorithm == Algorithm::toeplitz ? k.weight_toeplitz
                      : plan.algorithm == Algorithm::fft    ? k.weight_fft
                      : plan.flat ? (dtype == DType::f32 ? k.weight_flat_f32 : k.weight_flat_bf16)
                      : plan.algorithm == Algorithm::planar ? k.weight_planar
                      : plan.paired                         ? k.weight_direct_pairs
                                                            : k.weight_direct_f32;
  run_weight<float>(w, plan, kernel, k.weight_reduce_f32, parallel);
}

}  // namespace lkconv::cpu
