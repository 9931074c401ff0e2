// Instantiates the Group-Mix aggregation's kernels.
#include "group_mix_backward.cuh"
#include "group_mix_dispatch.h"
#include "group_mix_pack.cuh"

namespace lkconv::cuda {

Kernel<AggregateParams> aggregate_kernel(DType dtype, int window) {
  return by_dtype(dtype, [&](auto t) {
    return by_window(window, [](auto k) -> Kernel<AggregateParams> { return aggregate<decltype(t), k()>; });
  });
}
Kernel<DepthwiseBackwardParams> depthwise_backward_kernel(DType dtype, int window) {
  return by_dtype(dtype, [&](auto t) {
    return by_window(window, [](auto k) -> Kernel<DepthwiseBackwardParams> {
      return depthwise_backward<decltype(t), k()>;
    });
  });
}

#define LK_TENSOR_KERNEL(name, params)                                                  \
  Kernel<params> name##_kernel(DType dtype) {                                           \
    return by_dtype(dtype, [](auto t) -> Kernel<params> { return name<decltype(t)>; }); \
  }
LK_TENSOR_KERNEL(segment_moments, SegmentMomentsParams)
LK_TENSOR_KERNEL(normalize, NormalizeParams)
LK_TENSOR_KERNEL(backward_reduce, BackwardReduceParams)
LK_TENSOR_KERNEL(segment_backward, SegmentBackwardParams)
LK_TENSOR_KERNEL(mix_backward, MixBackwardParams)
#undef LK_TENSOR_KERNEL

#define LK_WIDE_KERNEL(name, params)                                                  \
  Kernel<params> name##_kernel(DType wide) {                                          \
    return by_wide(wide, [](auto a) -> Kernel<params> { return name<decltype(a)>; }); \
  }
LK_WIDE_KERNEL(pack_parameters, PackParametersParams)
LK_WIDE_KERNEL(fold_norms, FoldNormsParams)
LK_WIDE_KERNEL(reduce_sums, ReduceSumsParams)
LK_WIDE_KERNEL(reduce_moments, ReduceMomentsParams)
#undef LK_WIDE_KERNEL

void append_group_mix_kernels(std::vector<KernelName>& names) {
  for (const DType t : kTensorTypes) {
    for (const int k : kWindows) {
      append_kernel(names, "group_mix_aggregate", t, aggregate_kernel(t, k), k);
      append_kernel(names, "group_mix_depthwise_backward", t, depthwise_backward_kernel(t, k), k);
    }
    append_kernel(names, "group_mix_segment_moments", t, segment_moments_kernel(t));
    append_kernel(names, "group_mix_normalize", t, normalize_kernel(t));
    append_kernel(names, "group_mix_backward_reduce", t, backward_reduce_kernel(t));
    append_kernel(names, "group_mix_segment_backward", t, segment_backward_kernel(t));
    append_kernel(names, "group_mix_mix_backward", t, mix_backward_kernel(t));
  }
  for (const DType t : kWideTypes) {
    append_kernel(names, "group_mix_pack_parameters", t, pack_parameters_kernel(t));
    append_kernel(names, "group_mix_fold_norms", t, fold_norms_kernel(t));
    append_kernel(names, "group_mix_reduce_sums", t, reduce_sums_kernel(t));
    append_kernel(names, "group_mix_reduce_moments", t, reduce_moments_kernel(t));
  }
}

}  // namespace lkconv::cuda
