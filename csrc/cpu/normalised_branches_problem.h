// A sum of batch-normalised branches, sum_b s_b y_b + shift with y_b = x * W_b (or x, or a tensor given), and
// its gradient: what the planner and the kernels of normalised_branches share. Stride 1, one kernel per
// channel.
//
// Everything runs per image and group of channels, a tile of rows at a time, while the input, grad_output and
// one branch stay in a core's own cache. Branch outputs are kept in blocks of channels, (branch, image,
// group, y, x, lane), so that neither they nor their statistics need a layout of the outside world.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace lkconv::cpu {

constexpr int64_t kMoments = 3;  // numbers that describe one channel of a tile: a mean, and how far it is off

// One convolution. `backward` is the forward problem, over the flipped kernel, that backward_input is.
struct BranchKernel {
  Geometry forward, backward;
  TensorView weight, flipped, grad_weight;

  int64_t taps() const { return forward.kernel_h * forward.kernel_w; }
};

struct NormalisedBranchesProblem {
  int64_t batch, channels, height, width, out_height, out_width;
  DType dtype;
  const BranchKernel* kernels;  // null where only their outputs matter
  int64_t kernel_count;
  // Branches that are tensors already, (batch, channels, out_height, out_width); with `identity` the first of
  // them is the input, and its gradient is part of grad_input.
  const TensorView* given;
  int64_t given_count;
  bool identity;
  const TensorView* grad_given;  // one per tensor given, without the identity's
  TensorView input, output;      // output: of the sum
  TensorView grad_output, grad_input;
  void* saved;                           // outputs of the kernels' branches
  const void *scale, *slope, *constant;  // (branches, channels) of the accumulation type, as each task says
  void* partial;                         // sums that tasks leave for the launcher

  int64_t branches() const { return kernel_count + given_count; }
  int64_t taps() const {
    int64_t sum = 0;
    for (int64_t b = 0; kernels && b < kernel_count; ++b) sum += kernels[b].taps();
    return sum;
  }
};

// Rows and columns that a window of an image holds beyond a tile's own, for every kernel to find its pixels:
// `before` the first output's index and `after` the last one's.
struct Reach {
  int64_t before_h = 0, before_w = 0, after_h = 0, after_w = 0;

  void include(const Geometry& g) {
    before_h = std::max(before_h, g.pad_h), before_w = std::max(before_w, g.pad_w);
    after_h = std::max(after_h, (g.kernel_h - 1) * g.dil_h - g.pad_h);
    after_w = std::max(after_w, (g.kernel_w - 1) * g.dil_w - g.pad_w);
  }
};

struct WindowSize {
  int64_t rows, columns;
};

struct NormalisedBranchesPlan {
  int64_t lanes = 1;
  int64_t tile_h = 1;     // rows at a time
  int64_t images = 1;     // images whose kernel gradients are added up by one task
  Reach input, gradient;  // of windows of the input and of a branch's gradient

  int64_t groups(const NormalisedBranchesProblem& p) const { return ceil_div(p.channels, lanes); }
  // Rows are counted over both images, of which one may be higher than the other.
  int64_t tiles(const NormalisedBranchesProblem& p) const {
    return ceil_div(std::max(p.height, p.out_height), tile_h);
  }
  int64_t splits(const NormalisedBranchesProblem& p) const { return ceil_div(p.batch, images); }

  // What a tile needs of the input, for its rows of the branches.
  WindowSize input_window(const NormalisedBranchesProblem& p) const {
    return {std::min(p.height, tile_h + input.before_h + input.after_h),
            input.before_w + p.out_width + input.after_w};
  }
  // What it needs of a branch's gradient, for its rows of grad_input and as rows of the branch.
  WindowSize gradient_window(const NormalisedBranchesProblem& p) const {
    return {std::min(p.out_height, tile_h + gradient.before_h + gradient.after_h),
            gradient.before_w + std::max(p.width + gradient.after_w, p.out_width)};
  }
};

}  // namespace lkconv::cpu
