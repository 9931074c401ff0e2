// The Group-Mix kernels by dtype: of the tensors, or of what is accumulated in (f32 or f64).
#pragma once

#include "group_mix_params.h"
#include "kernels.h"

namespace lkconv::cuda {

Kernel<AggregateParams> aggregate_kernel(DType dtype, int window);
Kernel<SegmentMomentsParams> segment_moments_kernel(DType dtype);
Kernel<NormalizeParams> normalize_kernel(DType dtype);
Kernel<BackwardReduceParams> backward_reduce_kernel(DType dtype);
Kernel<SegmentBackwardParams> segment_backward_kernel(DType dtype);
Kernel<MixBackwardParams> mix_backward_kernel(DType dtype);
Kernel<DepthwiseBackwardParams> depthwise_backward_kernel(DType dtype, int window);

Kernel<ColumnMaxParams> column_max_kernel(DType dtype);
Kernel<TokenProductParams> token_product_kernel(DType dtype);
Kernel<AttentionParams> attention_forward_kernel(DType dtype, int window);
Kernel<AttentionBackwardParams> attention_backward_kernel(DType dtype);

Kernel<PackParametersParams> pack_parameters_kernel(DType wide);
Kernel<FoldNormsParams> fold_norms_kernel(DType wide);
Kernel<ReduceSumsParams> reduce_sums_kernel(DType wide);
Kernel<ReduceMomentsParams> reduce_moments_kernel(DType wide);
Kernel<ContextParams> combine_context_kernel(DType wide);
Kernel<GradContextParams> combine_grad_context_kernel(DType wide);

void append_group_mix_kernels(std::vector<KernelName>& names);
void append_group_mix_attention_kernels(std::vector<KernelName>& names);

}  // namespace lkconv::cuda
