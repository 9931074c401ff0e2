// Every Group-Mix kernel, for the instruction set whose target region includes this file.
#pragma once

// Whether this target's products are of pairs of bfloat16; its kernels then take tensors of bfloat16 alone.
#ifndef LKCONV_BF16_PRODUCTS
#define LKCONV_BF16_PRODUCTS 0
#endif

#include "simd.h"
#include "lanes_io.h"
#include "direct.h"
#include "direct_weight.h"
#include "group_mix_gemm.h"
#include "group_mix_tokens.h"
#include "group_mix_aggregate.h"
#include "group_mix_aggregate_backward.h"
#include "group_mix_attention.h"
#include "group_mix_attention_backward.h"

namespace lkconv::cpu::LKCONV_ISA::group_mix {

template <class T>
constexpr GroupMixKernels<T> kGroupMix = {
    kLanes<T>,
    kPackPairs<T>,
    transpose_weight<T>,
    aggregate<T>,
    mix<T>,
    normalize<T>,
    backward_reduce<T>,
    aggregate_backward<T>,
    attention_context<T>,
    attention<T>,
    attention_grad_context<T>,
    attention_backward<T>,
};

#if !LKCONV_BF16_PRODUCTS
inline constexpr GroupMixTable kGroupMixTable = {kGroupMix<float>, kGroupMix<double>};
#endif

}  // namespace lkconv::cpu::LKCONV_ISA::group_mix
