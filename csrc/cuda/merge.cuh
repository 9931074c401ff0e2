// The fold of branch kernels into one dense kernel, and its adjoint (csrc/merge_problem.h). Both move as many
// elements as the kernels have taps, a few MB at most, so they are bound by the launch: one launch for all
// branches is the point. Element types differ from operand to operand and are looked up at run time, the same
// for a whole warp.
#pragma once

#include "device.cuh"
#include "params.h"

namespace lkconv::cuda {

template <class A>
LK_DEVICE A load_element(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f16:
      return A(to_float(static_cast<const Half*>(p)[i]));
    case DType::bf16:
      return A(to_float(static_cast<const BFloat*>(p)[i]));
    case DType::f64:
      return A(static_cast<const double*>(p)[i]);
    default:
      return A(static_cast<const float*>(p)[i]);
  }
}

template <class A>
LK_DEVICE void store_element(void* p, DType dtype, int64_t i, A value) {
  switch (dtype) {
    case DType::f16:
      return from_float(float(value), static_cast<Half*>(p)[i]);
    case DType::bf16:
      return from_float(float(value), static_cast<BFloat*>(p)[i]);
    case DType::f64:
      static_cast<double*>(p)[i] = double(value);
      return;
    default:
      static_cast<float*>(p)[i] = float(value);
  }
}

// s_b[c] W_b[c, u, v] of the tap that lies at (y, x) is added to `sum`, if the branch has one there.
template <class A>
LK_DEVICE A add_branch_tap(const MergeBranchParams& b, int64_t c, int y, int x, A sum) {
  const int down = y - b.offset_h, right = x - b.offset_w;
  if (down < 0 || right < 0 || down % b.step_h || right % b.step_w) return sum;
  const int u = down / b.step_h, v = right / b.step_w;
  if (u >= b.kernel_h || v >= b.kernel_w) return sum;
  const int64_t at = c * b.stride_c + u * b.stride_h + v * b.stride_w;
  const A scale = b.scale ? load_element<A>(b.scale, b.scale_dtype, c * b.scale_stride) : A(1);
  return fused_multiply_add(scale, load_element<A>(b.weight, b.weight_dtype, at), sum);
}

// One thread per tap of the dense kernel; the thread of a channel's first tap sums the biases as well. Where
// the branches do not fit one launch, sums pass through `partial`: taps first, then biases.
template <class A>
__global__ void __launch_bounds__(kMergeThreads)
    merge_depthwise_kernels(const __grid_constant__ MergeParams p) {
  const int64_t taps = int64_t(p.kernel_h) * p.kernel_w, count = p.channels * taps;
  const int64_t i = int64_t(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t c = i / taps;
  const int tap = int(i - c * taps), y = tap / p.kernel_w, x = tap - y * p.kernel_w;
  A* partial = static_cast<A*>(p.partial);
  A sum = p.first ? A(0) : partial[i];
  for (int b = 0; b < p.branch_count; ++b) sum = add_branch_tap(p.branches[b], c, y, x, sum);
  if (p.last)
    store_element(p.kernel, p.kernel_dtype, i, sum);
  else
    partial[i] = sum;
  if (tap) return;
  A bias = p.first ? A(0) : partial[count + c];
  for (int j = 0; j < p.bias_count; ++j)
    bias += load_element<A>(p.biases[j].data, p.biases[j].dtype, c * p.biases[j].stride);
  if (p.last)
    store_element(p.bias.data, p.bias.dtype, c * p.bias.stride, bias);
  else
    partial[count + c] = bias;
}

// A warp gathers the gradient of one branch in one channel; its lanes' shares of <gather(G), W> are added in
// the order of the lanes. The first branch's warps also hand the bias gradient on.
template <class A>
__global__ void __launch_bounds__(kMergeThreads)
    merge_depthwise_kernels_backward(const __grid_constant__ MergeParams p) {
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t pair = (int64_t(blockIdx.x) * kMergeThreads + threadIdx.x) / kWarp;
  const int64_t index = pair / p.channels, c = pair - index * p.channels;
  if (index == 0)
    for (int j = lane; j < p.bias_count; j += kWarp)
      store_element(p.biases[j].data, p.biases[j].dtype, c * p.biases[j].stride,
                    load_element<A>(p.bias.data, p.bias.dtype, c * p.bias.stride));
  if (index >= p.branch_count) return;
  const MergeBranchParams& b = p.branches[index];
  const A scale = b.scale ? load_element<A>(b.scale, b.scale_dtype, c * b.scale_stride) : A(1);
  const int count = b.kernel_h * b.kernel_w;
  A dot = A(0);
  for (int t = lane; t < count; t += kWarp) {
    const int u = t / b.kernel_w, v = t - u * b.kernel_w;
    const int64_t y = b.offset_h + int64_t(u) * b.step_h, x = b.offset_w + int64_t(v) * b.step_w;
    const A grad = load_element<A>(p.kernel, p.kernel_dtype, (c * p.kernel_h + y) * p.kernel_w + x);
    store_element(b.grad_weight, b.weight_dtype, c * count + t, scale * grad);
    const int64_t at = c * b.stride_c + u * b.stride_h + v * b.stride_w;
    if (b.grad_scale) dot = fused_multiply_add(grad, load_element<A>(b.weight, b.weight_dtype, at), dot);
  }
  if (!b.grad_scale) return;
  A* dots = reinterpret_cast<A*>(dynamic_shared()) + threadIdx.x - lane;
  dots[lane] = dot;
  sync_warp();
  if (lane) return;
  A sum = A(0);
  for (int l = 0; l < kWarp; ++l) sum += dots[l];
  store_element(b.grad_scale, b.scale_dtype, c, sum);
}

}  // namespace lkconv::cuda
