// The fold of branch kernels into one dense kernel, and its adjoint, as every device's kernels see them.
// Knows nothing of torch.
//
// Tap (u, v) of a branch lies at (offset_h + u step_h, offset_w + v step_w) of the dense kernel K, so with a
// scale s_b per channel (1 without one)
//
//   K[c, y, x] = sum_b s_b[c] W_b[c, u, v] over the taps that lie at (y, x),    bias[c] = sum_j bias_j[c],
//
// and for gradients G of K and g of the bias
//
//   dW_b[c, u, v] = s_b[c] G[c, y, x],    ds_b[c] = sum_uv W_b[c, u, v] G[c, y, x],    dbias_j[c] = g[c].
#pragma once

#include "conv_params.h"

namespace lkconv {

// One value per channel, `stride` elements apart. Without data it is absent.
struct ChannelVector {
  void* data;
  DType dtype;
  int64_t stride;
};

struct MergeBranch {
  TensorView weight;  // planes follow each other by stride_c
  int64_t kernel_h, kernel_w, offset_h, offset_w, step_h, step_w;
  ChannelVector scale;
  // Written by the adjoint: (channels, kernel_h, kernel_w) without gaps in weight's dtype, and scale's
  // gradient.
  void* grad_weight;
  ChannelVector grad_scale;
};

// `kernel` (channels, kernel_h, kernel_w) without gaps and `bias` are the fold's results, and the adjoint's
// gradients. `biases` are summands, and the adjoint's results.
struct MergeProblem {
  int64_t channels, kernel_h, kernel_w;
  TensorView kernel;
  ChannelVector bias;
  const MergeBranch* branches;
  int64_t branch_count;
  const ChannelVector* biases;
  int64_t bias_count;
  bool wide;  // some operand is float64: accumulate in float64, else in float32

  int64_t taps() const { return kernel_h * kernel_w; }
};

}  // namespace lkconv
