// The table of entry points that each instruction set provides, and what the kernels need from outside.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../merge_problem.h"
#include "fft_plan.h"
#include "problem.h"

namespace lkconv::cpu {

// output = shift[c] + sum_b scales[b, c] inputs[b], every tensor dense in one layout; scales and shift in the
// accumulation type.
struct ScaledSumProblem {
  const void* const* inputs;
  int64_t count;
  void* output;
  DType dtype;
  const void *scales, *shift;  // (count, channels), (channels,)
  int64_t batch, channels, pixels;
  bool channels_last;
};

struct PlanarProblem;
struct NormalisedBranchesProblem;
struct NormalisedBranchesPlan;

struct Kernels {
  int lanes_f32, lanes_f64, vector_registers;
  void (*forward_direct_f32)(const ForwardProblem&, const Plan&, int64_t task0, int64_t task1);
  void (*forward_direct_f64)(const ForwardProblem&, const Plan&, int64_t task0, int64_t task1);
  // Every stride phase of a plane at once.
  void (*forward_planar)(const PlanarProblem&, const Plan&, int64_t task0, int64_t task1);
  // Its sums with the pixels read in place; null where there are no masked loads.
  void (*forward_pixels)(const PlanarProblem&, const Plan&, int64_t task0, int64_t task1);
  // Its sums of planes whose outputs are counted through; null there as well.
  void (*forward_flat_f32)(const ForwardProblem&, const Plan&, int64_t task0, int64_t task1);
  void (*forward_flat_bf16)(const ForwardProblem&, const Plan&, int64_t task0, int64_t task1);
  void (*forward_fft)(const ForwardProblem&, const Plan&, int64_t task0, int64_t task1);
  void (*weight_direct_f32)(const WeightProblem&, const Plan&, float* partial, int64_t task0, int64_t task1);
  void (*weight_direct_f64)(const WeightProblem&, const Plan&, double* partial, int64_t task0, int64_t task1);
  // Null where there are no masked loads.
  void (*weight_planar)(const WeightProblem&, const Plan&, float* partial, int64_t task0, int64_t task1);
  // Its sums of planes whose outputs are counted through; null there as well, and for bfloat16 without pairs.
  void (*weight_flat_f32)(const WeightProblem&, const Plan&, float* partial, int64_t task0, int64_t task1);
  void (*weight_flat_bf16)(const WeightProblem&, const Plan&, float* partial, int64_t task0, int64_t task1);
  void (*weight_fft)(const WeightProblem&, const Plan&, float* partial, int64_t task0, int64_t task1);
  void (*weight_reduce_f32)(const WeightProblem&, const Plan&, float* partial, int64_t group0,
                            int64_t group1);
  void (*weight_reduce_f64)(const WeightProblem&, const Plan&, double* partial, int64_t group0,
                            int64_t group1);
  // bfloat16 on matrix units; null where there are none.
  void (*forward_toeplitz)(const ForwardProblem&, const Plan&, int64_t task0, int64_t task1);
  void (*weight_toeplitz)(const WeightProblem&, const Plan&, float* partial, int64_t task0, int64_t task1);
  // bfloat16 whose products are of two rows at once (row_products.h); null where there are no such products.
  void (*forward_direct_pairs)(const ForwardProblem&, const Plan&, int64_t task0, int64_t task1);
  void (*weight_direct_pairs)(const WeightProblem&, const Plan&, float* partial, int64_t task0,
                              int64_t task1);
  // The fold of branch kernels and its adjoint, over a range of channels.
  void (*merge_f32)(const MergeProblem&, int64_t channel0, int64_t channel1);
  void (*merge_f64)(const MergeProblem&, int64_t channel0, int64_t channel1);
  void (*merge_backward_f32)(const MergeProblem&, int64_t channel0, int64_t channel1);
  void (*merge_backward_f64)(const MergeProblem&, int64_t channel0, int64_t channel1);
  // Over a range of planes, or of pixels where the layout is channels_last.
  void (*scaled_sum_f32)(const ScaledSumProblem&, int64_t first, int64_t last);
  void (*scaled_sum_f64)(const ScaledSumProblem&, int64_t first, int64_t last);
  // A sum of normalised branches and its gradients: see branch_outputs.h and branch_gradients.h for tasks.
  void (*branches_outputs_f32)(const NormalisedBranchesProblem&, const NormalisedBranchesPlan&, int64_t task0,
                               int64_t task1);
  void (*branches_outputs_f64)(const NormalisedBranchesProblem&, const NormalisedBranchesPlan&, int64_t task0,
                               int64_t task1);
  void (*branches_sum_f32)(const NormalisedBranchesProblem&, const NormalisedBranchesPlan&, int64_t task0,
                           int64_t task1);
  void (*branches_sum_f64)(const NormalisedBranchesProblem&, const NormalisedBranchesPlan&, int64_t task0,
                           int64_t task1);
  void (*branches_dots_f32)(const NormalisedBranchesProblem&, const NormalisedBranchesPlan&, int64_t task0,
                            int64_t task1);
  void (*branches_dots_f64)(const NormalisedBranchesProblem&, const NormalisedBranchesPlan&, int64_t task0,
                            int64_t task1);
  void (*branches_gradients_f32)(const NormalisedBranchesProblem&, const NormalisedBranchesPlan&,
                                 int64_t task0, int64_t task1);
  void (*branches_gradients_f64)(const NormalisedBranchesProblem&, const NormalisedBranchesPlan&,
                                 int64_t task0, int64_t task1);
  void (*branches_reduce_f32)(const NormalisedBranchesProblem&, const NormalisedBranchesPlan&, int64_t group0,
                              int64_t group1);
  void (*branches_reduce_f64)(const NormalisedBranchesProblem&, const NormalisedBranchesPlan&, int64_t group0,
                              int64_t group1);
};

// Null when this build has no code for the instruction set.
const Kernels* kernels_for(Isa isa);

// A 64-byte aligned buffer owned by the calling thread and reused between calls; contents are undefined. FFT
// and Toeplitz plans stay below kMaxScratchBytes; a direct plan holds one window of (halo + a few) rows by
// (halo + tile) columns, which only an extreme dilation makes large.
void* thread_scratch_bytes(size_t bytes);
template <class T>
T* thread_scratch(int64_t count) {
  return static_cast<T*>(thread_scratch_bytes(size_t(count) * sizeof(T)));
}

}  // namespace lkconv::cpu
