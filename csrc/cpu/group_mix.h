// Group-Mix attention on the CPU (GroupMixFormer, arXiv 2311.15157): the problems its kernels solve and the
// table each instruction set provides. Knows nothing of torch.
//
// Everything is token-major: one token is a run of channels, so a segment of a token is one contiguous piece
// and images need no transposition. `segment` is d = C / 5; a head has d / 2 channels.
#pragma once

#include <functional>
#include <vector>

#include "../conv_params.h"
#include "problem.h"

namespace lkconv::cpu {

constexpr int64_t kHeads = 8;
constexpr int64_t kParts = 3;      // q, k, v
constexpr int64_t kMixed = 4;      // segments that pass through a BatchNorm: 0 is not convolved, 1 to 3 are
constexpr int64_t kLocalKind = 4;  // the non-attention branch
constexpr int64_t kKinds = 5;      // kind of work = segment of qkv

// Window size of the depthwise convolution of each kind; kind 0 has none.
constexpr int64_t kKindKernel[kKinds] = {0, 3, 5, 7, 3};

struct TokenShape {
  int64_t batch, height, width, segment;
  int64_t tokens() const { return height * width; }
  int64_t head() const { return segment / 2; }
};

// One piece of work of a kind: rows [y0, y1) of part `part` of image `image`.
struct Strip {
  int64_t image, part, y0, y1;
};

// How a kind's images are cut into strips; strips are numbered image, part, strip.
struct StripPlan {
  int64_t images, parts, strips, rows;
  int64_t count() const { return images * parts * strips; }
  Strip at(int64_t i, int64_t height) const {
    const int64_t s = i % strips, p = i / strips % parts;
    return {i / strips / parts, p, s * rows, std::min(height, (s + 1) * rows)};
  }
};

// Two neighbouring values as bfloat16, the first in the lower half.
struct Bf16Pair {
  uint32_t bits;
};

// Weights in the kernels' own order, padded with zeros to whole vectors of `lanes` channels:
// depthwise [group][tap][lane], pointwise [in][out] and [out][in], both of padded width.
template <class T>
struct MixWeights {
  const T *depthwise, *flipped;  // null for kind 0
  const T* in_out;               // forward
  const Bf16Pair* in_out_pairs;  // forward where kernels multiply pairs, [in / 2][out]
  const T* out_in;               // backward
};

// The aggregation, forward. `qkv` is (B, N, 3, 5, d), `mixed` (3, B, N, 4d), `premix` (3, B, N, 3d),
// `prelocal` and `local` (B, N, d). In the fused evaluation pass `premix` and `prelocal` are null and
// scale/shift are folded into in_out (not into pairs) and shift; in the mixing pass `mixed` is null.
template <class T>
struct AggregateProblem : TokenShape {
  DType dtype;
  const void* qkv;
  void *mixed, *premix, *prelocal, *local;
  MixWeights<T> weights[kKinds];
  const T* scale;  // (4, padded segment): of the BatchNorms
  const T* shift;
  const T* layer_norm;  // (2, padded segment): weight, bias
  T layer_norm_eps;
  StripPlan plan[kKinds];
};

// The aggregation, backward: dU = scale * dA + slope * U + offset holds for both modes (slope and offset are
// 0 for fixed statistics). `local_stride` is the distance of tokens in grad_local.
template <class T>
struct AggregateBackwardProblem : TokenShape {
  DType dtype;
  const void *qkv, *premix, *prelocal, *grad_local;
  const void* grad_mixed[kParts];  // of q, k and v, each (B, N, 4d)
  int64_t local_stride;
  void* grad_qkv;
  MixWeights<T> weights[kKinds];
  const T *scale, *shift, *slope, *offset, *mean;  // (4, padded segment)
  const T* layer_norm;
  T layer_norm_eps;
  StripPlan plan[kKinds];
};

// The attention core. `mixed` is (3, B, N, 4d); `out` (B, N, 5d). Depthwise weights are [group][49][lane]
// with smaller windows laid out as their own k * k taps, `kernel[group]` being k.
template <class T>
struct AttentionProblem : TokenShape {
  DType dtype;
  const void *mixed, *local;
  void* out;
  T scale;
  const T *depthwise, *flipped, *bias;
  const int64_t* kernel;
  const T* context;  // (B, 8, head, head)
  StripPlan plan;
  // backward only
  const void* grad_out;
  void* grad_mixed;
  const T *log_sum, *grad_context;  // (B, 4d) and as context
  const T* row_sum;                 // (B, 4d): sum over columns of grad_context * context
};

// Sizes that depend on a kernel's vector width.
struct GroupMixSizes {
  int64_t lanes;
  int64_t padded(int64_t channels) const {
    return ceil_div(channels, std::max<int64_t>(lanes, 8)) * std::max<int64_t>(lanes, 8);
  }
};

// Entry points of one instruction set for accumulation type T. `begin` and `end` count strips of `kind`, or
// tokens. Statistics and gradients are added to the buffers handed in, which start at zero.
template <class T>
struct GroupMixKernels {
  int64_t lanes;
  // dst[r / 2][column] = rows r and r + 1 of src; null unless the forward passes multiply pairs
  void (*pack_pairs)(Bf16Pair* dst, const T* src, int64_t rows, int64_t columns);
  void (*transpose_weight)(T* dst, int64_t dst_row, const T* src, int64_t rows, int64_t columns);
  void (*aggregate)(const AggregateProblem<T>&, int64_t kind, int64_t begin, int64_t end);
  // statistics: [0] count, then mean and sum of squared differences, each of padded segment
  void (*mix)(const AggregateProblem<T>&, int64_t kind, int64_t begin, int64_t end, T* statistics);
  void (*normalize)(const AggregateProblem<T>&, int64_t begin, int64_t end);
  // sums: (2, 4, padded segment): of dA, and of dA * (U - mean)
  void (*backward_reduce)(const AggregateBackwardProblem<T>&, int64_t begin, int64_t end, double* sums);
  void (*backward)(const AggregateBackwardProblem<T>&, int64_t kind, int64_t begin, int64_t end, T* grads);
  void (*context)(const AttentionProblem<T>&, int64_t image, int64_t begin, int64_t end, T* state);
  void (*attention)(const AttentionProblem<T>&, int64_t begin, int64_t end);
  void (*grad_context)(const AttentionProblem<T>&, int64_t image, int64_t begin, int64_t end, T* state);
  void (*attention_backward)(const AttentionProblem<T>&, int64_t begin, int64_t end, T* grads);
};

// What one instruction set provides; null when this build has no code for it.
struct GroupMixTable {
  GroupMixKernels<float> f32;
  GroupMixKernels<double> f64;
};
const GroupMixTable* group_mix_baseline();
const GroupMixTable* group_mix_avx2();
const GroupMixTable* group_mix_avx512();
// For tensors of bfloat16 on processors that multiply pairs of them (AVX512-BF16).
const GroupMixKernels<float>* group_mix_avx512_bf16();

}  // namespace lkconv::cpu
