// Binds lkconv::scaled_channel_sum to torch tensors through the stable ABI.
#include "kernels.h"
#include "scaled_channel_sum.h"
#include "op_support.h"

namespace lkconv::cpu {
namespace {

// The inputs in the output's layout; they are kept alive, and only copied where they are not in it already.
Tensors in_format(const Tensors& inputs, MemoryFormat format) {
  Tensors dense;
  for (const Tensor& t : inputs) {
    check_same_place(t, inputs[0], false);
    bool same = t.dim() == 4 && t.scalar_type() == inputs[0].scalar_type();
    for (int64_t d = 0; same && d < 4; ++d) same = t.size(d) == inputs[0].size(d);
    STD_TORCH_CHECK(same, "lkconv: inputs must be 4-D tensors of one shape and dtype");
    dense.push_back(torch::stable::contiguous(t, format));
  }
  return dense;
}

// `t` (scales or shift) as contiguous numbers of the accumulation type.
Tensor factors(const Tensor& t, int64_t count, const Tensor& like) {
  const bool wide = dtype_of(like) == DType::f64;
  STD_TORCH_CHECK(t.is_cpu() && t.numel() == count && dtype_of(t) == (wide ? DType::f64 : DType::f32),
                  "lkconv: scales and shift must have one element per channel in the accumulation type");
  return torch::stable::contiguous(t);
}

Tensor op_scaled_channel_sum(const Tensors& inputs, const Tensor& scales, const Tensor& shift) {
  STD_TORCH_CHECK(!inputs.empty() && inputs[0].dim() == 4, "lkconv: expected at least one 4-D input");
  const Tensor& like = inputs[0];
  const int64_t count = int64_t(inputs.size()), n = like.size(0), c = like.size(1);
  const MemoryFormat format = suggested_format(like);
  const Tensors dense = in_format(inputs, format);
  const Tensor a = factors(scales, count * c, like), start = factors(shift, c, like);
  Tensor output = empty_like_format({n, c, like.size(2), like.size(3)}, like, format);
  std::vector<const void*> data;
  for (const Tensor& t : dense) data.push_back(t.const_data_ptr());
  ScaledSumProblem p{};
  p.inputs = data.data(), p.count = count, p.output = output.mutable_data_ptr(), p.dtype = dtype_of(like);
  p.scales = a.const_data_ptr(), p.shift = start.const_data_ptr();
  p.batch = n, p.channels = c, p.pixels = like.size(2) * like.size(3);
  p.channels_last = format == MemoryFormat::ChannelsLast;
  scaled_channel_sum(p, active_isa(), parallel);
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lkconv, CPU, m) { m.impl("scaled_channel_sum", TORCH_BOX(&op_scaled_channel_sum)); }

}  // namespace lkconv::cpu
