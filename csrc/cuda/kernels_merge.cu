// Instantiates the kernels that fold branch kernels.
#include "kernels.h"
#include "merge.cuh"

namespace lkconv::cuda {

Kernel<MergeParams> merge_kernel(bool wide, bool backward) {
  if (backward)
    return wide ? merge_depthwise_kernels_backward<double> : merge_depthwise_kernels_backward<float>;
  return wide ? merge_depthwise_kernels<double> : merge_depthwise_kernels<float>;
}

void append_merge_kernels(std::vector<KernelName>& names) {
  for (const bool backward : {false, true})
    for (const bool wide : {true, false})
      names.push_back({std::string("merge_depthwise_kernels") + (backward ? "_backward" : "") +
                           (wide ? "<float64>" : "<float32>"),
                       reinterpret_cast<const void*>(merge_kernel(wide, backward))});
}

}  // namespace lkconv::cuda
