// Instantiates the Group-Mix attention core's kernels.
#include "group_mix_attention.cuh"
#include "group_mix_dispatch.h"

namespace lkconv::cuda {

Kernel<AttentionParams> attention_forward_kernel(DType dtype, int window) {
  return by_dtype(dtype, [&](auto t) {
    return by_window(window,
                     [](auto k) -> Kernel<AttentionParams> { return attention_forward<decltype(t), k()>; });
  });
}
Kernel<ColumnMaxParams> column_max_kernel(DType dtype) {
  return by_dtype(dtype, [](auto t) -> Kernel<ColumnMaxParams> { return column_max<decltype(t)>; });
}
Kernel<TokenProductParams> token_product_kernel(DType dtype) {
  return by_dtype(dtype, [](auto t) -> Kernel<TokenProductParams> { return token_product<decltype(t)>; });
}
Kernel<AttentionBackwardParams> attention_backward_kernel(DType dtype) {
  return by_dtype(dtype,
                  [](auto t) -> Kernel<AttentionBackwardParams> { return attention_backward<decltype(t)>; });
}
Kernel<ContextParams> combine_context_kernel(DType wide) {
  return by_wide(wide, [](auto a) -> Kernel<ContextParams> { return combine_context<decltype(a)>; });
}
Kernel<GradContextParams> combine_grad_context_kernel(DType wide) {
  return by_wide(wide, [](auto a) -> Kernel<GradContextParams> { return combine_grad_context<decltype(a)>; });
}

void append_group_mix_attention_kernels(std::vector<KernelName>& names) {
  for (const DType t : kTensorTypes) {
    for (const int k : kWindows)
      append_kernel(names, "group_mix_attention_forward", t, attention_forward_kernel(t, k), k);
    append_kernel(names, "group_mix_column_max", t, column_max_kernel(t));
    append_kernel(names, "group_mix_token_product", t, token_product_kernel(t));
    append_kernel(names, "group_mix_attention_backward", t, attention_backward_kernel(t));
  }
  for (const DType t : kWideTypes) {
    append_kernel(names, "group_mix_combine_context", t, combine_context_kernel(t));
    append_kernel(names, "group_mix_combine_grad_context", t, combine_grad_context_kernel(t));
  }
}

}  // namespace lkconv::cuda
