// Every kernel of the CUDA module, by what it is for. Tables are null where no kernel exists.
#pragma once

#include <string>
#include <vector>

#include "../conv_params.h"
#include "params.h"

namespace lkconv::cuda {

template <class Params>
using Kernel = void (*)(Params);

// `width_class`: kThreeStride2, kStrided, kAnyWidth or the kernel's width (3, 5, 7).
Kernel<DirectForwardParams> direct_forward_kernel(DType dtype, int width_class);
Kernel<DirectWeightParams> direct_weight_kernel(DType dtype, bool unit);
Kernel<ReduceSplitsParams> reduce_splits_kernel(DType dtype);
Kernel<PackParams> pack_kernel(DType dtype);
// M tiles per warp (1 or 4), N tiles (2 or 4). DType::f32 means tf32.
Kernel<ToeplitzForwardParams> toeplitz_forward_kernel(DType dtype, int m_tiles, int n_tiles);
// Block diagonals per warp: 4 (with 4 kernel rows) or 7 (with 2).
Kernel<ToeplitzWeightParams> toeplitz_weight_kernel(DType dtype, int diagonals);

// Accumulates in float64 if `wide`.
Kernel<MergeParams> merge_kernel(bool wide, bool backward);

constexpr int toeplitz_weight_rows(int diagonals) { return diagonals == 4 ? 4 : 2; }

struct KernelName {
  std::string name;
  const void* address;
};
void append_direct_kernels(std::vector<KernelName>& names);
void append_toeplitz_kernels(std::vector<KernelName>& names);
void append_merge_kernels(std::vector<KernelName>& names);

}  // namespace lkconv::cuda
