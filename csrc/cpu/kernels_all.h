// Every kernel, for the instruction set whose target region includes this file.
#pragma once

#include "simd.h"
#include "element_vectors.h"
#include "lanes_io.h"
#include "direct.h"
#include "direct_weight.h"
#include "planar.h"
#include "planar_in_place_task.h"
#include "planar_flat.h"
#include "planar_weight.h"
#include "planar_weight_flat.h"
#include "fft.h"
#include "fft_conv.h"
#include "merge.h"
#include "scaled_sum.h"
#include "branch_tiles.h"
#include "branch_outputs.h"
#include "branch_gradients.h"

namespace lkconv::cpu::LKCONV_ISA {

inline constexpr Kernels kKernels = {
    kLanes<float>,
    kLanes<double>,
    LKCONV_VECTOR_REGISTERS,
    forward_direct<float>,
    forward_direct<double>,
    forward_planar,
#if LKCONV_AVX512
    forward_pixels,
    forward_flat<float>,
    forward_flat<bf16>,
#else
    nullptr,
    nullptr,
    nullptr,
#endif
    forward_fft,
    weight_direct<float>,
    weight_direct<double>,
#if LKCONV_AVX512
    weight_planar,
    weight_flat<float>,
#else
    nullptr,
    nullptr,
#endif
    nullptr,
    weight_fft,
    weight_reduce<float>,
    weight_reduce<double>,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    merge_kernels<float>,
    merge_kernels<double>,
    merge_kernels_backward<float>,
    merge_kernels_backward<double>,
    scaled_sum<float>,
    scaled_sum<double>,
    normalised_branches_outputs<float>,
    normalised_branches_outputs<double>,
    normalised_branches_sum<float>,
    normalised_branches_sum<double>,
    normalised_branches_dots<float>,
    normalised_branches_dots<double>,
    normalised_branches_gradients<float>,
    normalised_branches_gradients<double>,
    normalised_branches_reduce<float>,
    normalised_branches_reduce<double>,
};

}  // namespace lkconv::cpu::LKCONV_ISA
