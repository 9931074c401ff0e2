// Binds the lkconv::normalised_branches ops to torch tensors through the stable ABI. Their caller checks
// arguments in Python; the checks here guard memory safety alone.
#include <tuple>

#include "normalised_branches.h"
#include "op_support.h"

namespace lkconv::cpu {
namespace {

void check_sizes(const Tensor& t, std::initializer_list<int64_t> sizes, const char* what) {
  bool same = t.is_cpu() && t.dim() == int64_t(sizes.size());
  int64_t d = 0;
  for (int64_t size : sizes) same = same && t.size(d) == size, ++d;
  STD_TORCH_CHECK(same, "lkconv: ", what, " has the wrong sizes");
}

// The arguments of one call; problem() points into it.
class Call {
 public:
  Call(const Tensor& input, const Tensors& given, bool identity) : input_(input) {
    STD_TORCH_CHECK(input.is_cpu() && input.dim() == 4, "lkconv: input must be a 4-D tensor on the CPU");
    p_.dtype = dtype_of(input);
    p_.batch = input.size(0), p_.channels = input.size(1), p_.height = input.size(2),
    p_.width = input.size(3);
    p_.out_height = p_.height, p_.out_width = p_.width;
    p_.input = view_of(input, false);
    if (identity) given_.push_back(p_.input);
    for (const Tensor& t : given) {
      check_same_place(t, input, false);
      given_.push_back(view_of(t, false));
      STD_TORCH_CHECK(given_.back().dtype == p_.dtype, "lkconv: all branches must have input's dtype");
    }
    p_.identity = identity;
    given_tensors_ = &given;
  }

  // Branches that are kernels, by their weights.
  void add_kernels(const Tensors& weights, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation) {
    STD_TORCH_CHECK(padding.size() == 2 * weights.size() && dilation.size() == 2 * weights.size(),
                    "lkconv: padding and dilation must have two elements per weight");
    for (size_t b = 0; b < weights.size(); ++b) {
      const Tensor& w = weights[b];
      check_same_place(w, input_, false);
      STD_TORCH_CHECK(w.dim() == 4 && w.size(0) == p_.channels && w.size(1) == 1 && dtype_of(w) == p_.dtype,
                      "lkconv: weight must be (C, 1, kh, kw) of input's dtype");
      const ConvParams c =
          params_of(p_.batch, p_.channels, p_.height, p_.width, p_.channels, w.size(2), w.size(3), {1, 1},
                    {padding[2 * b], padding[2 * b + 1]}, {dilation[2 * b], dilation[2 * b + 1]});
      BranchKernel k{};
      k.weight = weight_view_of(w, false);
      k.forward = forward_problem(c);
      if (p_.height > 0 && p_.width > 0) {
        const ForwardProblem backward = backward_input_phases(c, p_.input, k.weight, p_.input).at(0);
        k.backward = backward, k.flipped = backward.weight;
      }
      kernels_.push_back(k);
      p_.out_height = c.out_height, p_.out_width = c.out_width;
    }
    for (const BranchKernel& k : kernels_)
      STD_TORCH_CHECK(k.forward.out_height == p_.out_height && k.forward.out_width == p_.out_width,
                      "lkconv: all branches must have outputs of one size");
    p_.kernel_count = int64_t(kernels_.size());
  }

  // The saved outputs, (kernels, N, groups, H', W', lanes), which also say how many kernels there are.
  void set_saved(const Tensor& saved, bool writable) {
    STD_TORCH_CHECK(saved.dim() == 6 && dtype_of(saved) == p_.dtype,
                    "lkconv: saved outputs have the wrong form");
    if (kernels_.empty()) {
      p_.kernel_count = saved.size(0);
      if (p_.kernel_count) p_.out_height = saved.size(3), p_.out_width = saved.size(4);
    }
    const int64_t lanes = lanes_of(machine());
    check_sizes(saved,
                {p_.kernel_count, p_.batch, ceil_div(p_.channels, lanes), p_.out_height, p_.out_width, lanes},
                "the tensor of saved outputs");
    STD_TORCH_CHECK(saved.is_contiguous(), "lkconv: saved outputs must be contiguous");
    p_.saved = writable ? saved.mutable_data_ptr() : const_cast<void*>(saved.const_data_ptr());
  }

  // To be called once the size of the output is known.
  void check_given() const {
    STD_TORCH_CHECK(!p_.identity || (p_.out_height == p_.height && p_.out_width == p_.width),
                    "lkconv: the identity needs an output of input's size");
    for (const Tensor& t : *given_tensors_) check_output_like(t, "a branch");
    STD_TORCH_CHECK(p_.kernel_count > 0, "lkconv: expected at least one branch with a kernel");
  }
  void check_output_like(const Tensor& t, const char* what) const {
    check_sizes(t, {p_.batch, p_.channels, p_.out_height, p_.out_width}, what);
    STD_TORCH_CHECK(dtype_of(t) == p_.dtype, "lkconv: ", what, " must have input's dtype");
  }

  // Per-channel numbers of the accumulation type, one row per branch.
  const void* factors(const Tensor& t, int64_t rows) {
    STD_TORCH_CHECK(t.is_cpu() && t.numel() == rows * p_.channels && t.scalar_type() == wide(),
                    "lkconv: factors must have one element per branch and channel in the accumulation type");
    kept_.push_back(contiguous_tensor(t));
    return kept_.back().const_data_ptr();
  }

  int64_t lanes_of(const Machine& m) const { return p_.dtype == DType::f64 ? m.lanes_f64 : m.lanes_f32; }
  ScalarType wide() const { return accumulation_type(input_); }
  int64_t branches() const { return p_.kernel_count + int64_t(given_.size()); }
  std::vector<BranchKernel>& kernels() { return kernels_; }

  NormalisedBranchesProblem& problem() {
    p_.kernels = kernels_.data();
    p_.given = given_.data(), p_.given_count = int64_t(given_.size());
    return p_;
  }

 private:
  Tensor input_;
  const Tensors* given_tensors_;
  NormalisedBranchesProblem p_{};
  std::vector<BranchKernel> kernels_;
  std::vector<TensorView> given_;
  Tensors kept_;
};

std::tuple<Tensor, Tensor, Tensor> op_outputs(const Tensor& input, const Tensors& weights,
                                              const Tensors& given, const std::vector<int64_t>& padding,
                                              const std::vector<int64_t>& dilation, bool identity) {
  Call call(input, given, identity);
  call.add_kernels(weights, padding, dilation);
  const NormalisedBranchesProblem& sizes = call.problem();
  const Machine m = machine();
  const int64_t lanes = call.lanes_of(m);
  const Tensor saved = empty_contiguous({sizes.kernel_count, sizes.batch, ceil_div(sizes.channels, lanes),
                                         sizes.out_height, sizes.out_width, lanes},
                                        input.scalar_type(), input);
  call.set_saved(saved, true);
  call.check_given();
  const Tensor means = empty_contiguous({call.branches(), sizes.channels}, call.wide(), input),
               variances = empty_contiguous({call.branches(), sizes.channels}, call.wide(), input);
  normalised_branches_outputs(call.problem(), m, means.mutable_data_ptr(), variances.mutable_data_ptr(),
                              parallel);
  return {saved, means, variances};
}

Tensor op_sum(const Tensor& input, const Tensor& saved, const Tensors& given, bool identity,
              const Tensor& scales, const Tensor& shift) {
  Call call(input, given, identity);
  call.set_saved(saved, false);
  call.check_given();
  NormalisedBranchesProblem& p = call.problem();
  p.scale = call.factors(scales, call.branches()), p.constant = call.factors(shift, 1);
  Tensor output =
      empty_like_format({p.batch, p.channels, p.out_height, p.out_width}, input, suggested_format(input));
  p.output = view_of(output, true);
  normalised_branches_sum(p, machine(), parallel);
  return output;
}

std::tuple<Tensor, Tensor> op_dots(const Tensor& grad_output, const Tensor& input, const Tensor& saved,
                                   const Tensors& given, bool identity, const Tensor& means) {
  Call call(input, given, identity);
  call.set_saved(saved, false);
  call.check_given();
  call.check_output_like(grad_output, "grad_output");
  NormalisedBranchesProblem& p = call.problem();
  p.grad_output = view_of(grad_output, false);
  p.constant = call.factors(means, call.branches());
  const Tensor total = empty_contiguous({p.channels}, call.wide(), input),
               dots = empty_contiguous({call.branches(), p.channels}, call.wide(), input);
  normalised_branches_dots(p, machine(), total.mutable_data_ptr(), dots.mutable_data_ptr(), parallel);
  return {total, dots};
}

std::tuple<Tensor, Tensors, Tensors> op_backward(const Tensor& grad_output, const Tensor& input,
                                                 const Tensor& saved, const Tensors& weights,
                                                 const Tensors& given, const std::vector<int64_t>& padding,
                                                 const std::vector<int64_t>& dilation, bool identity,
                                                 const Tensor& scales, const Tensor& slopes,
                                                 const Tensor& constants) {
  Call call(input, given, identity);
  call.add_kernels(weights, padding, dilation);
  call.set_saved(saved, false);
  call.check_given();
  call.check_output_like(grad_output, "grad_output");
  Tensors grad_weights, grad_given;
  std::vector<TensorView> grad_views;
  for (size_t b = 0; b < weights.size(); ++b) {
    const Tensor& w = weights[b];
    grad_weights.push_back(empty_contiguous({w.size(0), 1, w.size(2), w.size(3)}, w.scalar_type(), w));
    call.kernels()[b].grad_weight = weight_view_of(grad_weights.back(), true);
  }
  NormalisedBranchesProblem& p = call.problem();
  for (const Tensor& t : given) {
    grad_given.push_back(
        empty_like_format({p.batch, p.channels, p.out_height, p.out_width}, t, suggested_format(t)));
    grad_views.push_back(view_of(grad_given.back(), true));
  }
  Tensor grad_input =
      empty_like_format({p.batch, p.channels, p.height, p.width}, input, suggested_format(input));
  p.grad_given = grad_views.data();
  p.grad_output = view_of(grad_output, false), p.grad_input = view_of(grad_input, true);
  p.scale = call.factors(scales, call.branches()), p.slope = call.factors(slopes, call.branches());
  p.constant = call.factors(constants, call.branches());
  normalised_branches_backward(p, machine(), parallel);
  return {grad_input, grad_weights, grad_given};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lkconv, CPU, m) {
  m.impl("normalised_branches", TORCH_BOX(&op_outputs));
  m.impl("normalised_branches_sum", TORCH_BOX(&op_sum));
  m.impl("normalised_branches_dots", TORCH_BOX(&op_dots));
  m.impl("normalised_branches_backward", TORCH_BOX(&op_backward));
}

}  // namespace lkconv::cpu
