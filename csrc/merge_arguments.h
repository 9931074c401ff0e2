// What the lkconv::merge_depthwise_kernels ops do with their arguments on every device: the problem that the
// kernels solve, and new outputs. Arguments were validated in Python; the checks here guard memory safety
// alone.
#pragma once

#include <tuple>

#include "merge_problem.h"
#include "op_arguments.h"

namespace lkconv {

inline ChannelVector channel_vector(const Tensor& t, int64_t channels, bool writable) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == channels,
                  "lkconv: scales and biases must have one element per output channel");
  return {writable ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr()), dtype_of(t), t.stride(0)};
}

// The arguments of one call. A problem() points into it.
class MergeCall {
 public:
  MergeCall(const Tensors& weights, const Tensors& scales, const Tensors& biases, int64_t kernel_h,
            int64_t kernel_w, const std::vector<int64_t>& offset, const std::vector<int64_t>& step, bool cuda)
      : kernel_h_(kernel_h), kernel_w_(kernel_w) {
    STD_TORCH_CHECK(!weights.empty() && (scales.empty() || scales.size() == weights.size()),
                    "lkconv: expected at least one weight, and no scale or one for each");
    STD_TORCH_CHECK(offset.size() == 2 * weights.size() && step.size() == 2 * weights.size(),
                    "lkconv: offset and step must have two elements per weight");
    STD_TORCH_CHECK(weights[0].dim() == 4, "lkconv: a weight must be (C*m, 1, kh, kw)");
    channels_ = weights[0].size(0);
    for (size_t b = 0; b < weights.size(); ++b) {
      add_branch(weights[b], {offset[2 * b], offset[2 * b + 1], step[2 * b], step[2 * b + 1]});
      check_same_place(weights[b], weights[0], cuda);
      if (scales.empty()) continue;
      check_same_place(scales[b], weights[0], cuda);
      branches_[b].scale = channel_vector(scales[b], channels_, false);
      wide_ |= branches_[b].scale.dtype == DType::f64;
    }
    for (const Tensor& bias : biases) {
      check_same_place(bias, weights[0], cuda);
      biases_.push_back(channel_vector(bias, channels_, false));
      wide_ |= biases_.back().dtype == DType::f64;
    }
  }

  // With the dense kernel and bias: results of the fold, gradients of the adjoint.
  MergeProblem problem(const Tensor& kernel, const Tensor& bias, bool writable) const {
    STD_TORCH_CHECK(kernel.size(0) == channels_ && kernel.size(1) == 1 && kernel.size(2) == kernel_h_ &&
                        kernel.size(3) == kernel_w_,
                    "lkconv: the merged kernel has the wrong shape");
    const TensorView dense = weight_view_of(kernel, writable);
    const ChannelVector sum = channel_vector(bias, channels_, writable);
    const bool wide = wide_ || dense.dtype == DType::f64 || sum.dtype == DType::f64;
    return {channels_,
            kernel_h_,
            kernel_w_,
            dense,
            sum,
            branches_.data(),
            int64_t(branches_.size()),
            biases_.data(),
            int64_t(biases_.size()),
            wide};
  }

  // The adjoint's outputs: a gradient for every weight, scale and bias.
  std::tuple<Tensors, Tensors, Tensors> gradients(const Tensors& weights, const Tensors& scales,
                                                  const Tensors& biases) {
    std::tuple<Tensors, Tensors, Tensors> out;
    auto& [grad_weights, grad_scales, grad_biases] = out;
    for (size_t b = 0; b < weights.size(); ++b) {
      const MergeBranch& branch = branches_[b];
      grad_weights.push_back(empty_contiguous({channels_, 1, branch.kernel_h, branch.kernel_w},
                                              weights[b].scalar_type(), weights[b]));
      branches_[b].grad_weight = grad_weights[b].mutable_data_ptr();
      if (scales.empty()) continue;
      grad_scales.push_back(empty_contiguous({channels_}, scales[b].scalar_type(), scales[b]));
      branches_[b].grad_scale = channel_vector(grad_scales[b], channels_, true);
    }
    for (size_t j = 0; j < biases.size(); ++j) {
      grad_biases.push_back(empty_contiguous({channels_}, biases[j].scalar_type(), biases[j]));
      biases_[j] = channel_vector(grad_biases[j], channels_, true);
    }
    return out;
  }

 private:
  void add_branch(const Tensor& weight, const std::array<int64_t, 4>& place) {
    MergeBranch b{};
    b.weight = weight_view_of(weight, false);
    b.kernel_h = weight.size(2), b.kernel_w = weight.size(3);
    b.offset_h = place[0], b.offset_w = place[1], b.step_h = place[2], b.step_w = place[3];
    STD_TORCH_CHECK(weight.size(0) == channels_ && weight.size(1) == 1 && b.kernel_h > 0 && b.kernel_w > 0 &&
                        b.offset_h >= 0 && b.offset_w >= 0 && b.step_h > 0 && b.step_w > 0 &&
                        b.offset_h + b.step_h * (b.kernel_h - 1) < kernel_h_ &&
                        b.offset_w + b.step_w * (b.kernel_w - 1) < kernel_w_,
                    "lkconv: a weight must be (C*m, 1, kh, kw), and its taps must lie in the merged kernel");
    wide_ |= b.weight.dtype == DType::f64;
    branches_.push_back(b);
  }

  int64_t channels_, kernel_h_, kernel_w_;
  std::vector<MergeBranch> branches_;
  std::vector<ChannelVector> biases_;
  bool wide_ = false;
};

// The fold: run(problem) fills new tensors.
template <class Run>
std::tuple<Tensor, Tensor> merge_call(const Tensors& weights, const Tensors& scales, const Tensors& biases,
                                      const std::vector<int64_t>& kernel_size,
                                      const std::vector<int64_t>& offset, const std::vector<int64_t>& step,
                                      ScalarType dtype, bool cuda, Run run) {
  STD_TORCH_CHECK(kernel_size.size() == 2, "lkconv: kernel_size must have two elements");
  const MergeCall call(weights, scales, biases, kernel_size[0], kernel_size[1], offset, step, cuda);
  const Tensor& like = weights[0];
  Tensor kernel = empty_contiguous({like.size(0), 1, kernel_size[0], kernel_size[1]}, dtype, like);
  Tensor bias = empty_contiguous({like.size(0)}, dtype, like);
  run(call.problem(kernel, bias, true));
  return {kernel, bias};
}

template <class Run>
std::tuple<Tensors, Tensors, Tensors> merge_backward_call(const Tensor& grad_weight, const Tensor& grad_bias,
                                                          const Tensors& weights, const Tensors& scales,
                                                          const Tensors& biases,
                                                          const std::vector<int64_t>& offset,
                                                          const std::vector<int64_t>& step, bool cuda,
                                                          Run run) {
  STD_TORCH_CHECK(grad_weight.dim() == 4, "lkconv: the merged kernel's gradient must be a 4-D tensor");
  check_same_place(grad_weight, grad_bias, cuda);
  const Tensor dense = contiguous_tensor(grad_weight);
  MergeCall call(weights, scales, biases, dense.size(2), dense.size(3), offset, step, cuda);
  check_same_place(weights[0], grad_weight, cuda);
  auto gradients = call.gradients(weights, scales, biases);
  run(call.problem(dense, grad_bias, false));
  return gradients;
}

}  // namespace lkconv
