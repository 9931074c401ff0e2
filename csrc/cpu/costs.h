// What the planner's counts are weighed by.
#pragma once

#include "machine.h"

namespace lkconv::cpu {

// Cycles, fitted to timings of the layers of real models. Pairs are channels_last, contiguous.
struct Costs {
  double tap, strided_tap;  // one vector multiply-add of a direct tile; strided ones load a pixel for each
  double wide_tap;          // the same of rows in place that are wider than registers
  double move[2];           // one vector of pixels between a tensor and scratch
  double in_place_move;     // a channels_last pixel that is read where it is
  double phase_move[2];     // a phase of backward_input writes every stride-th pixel
  double kernel_tap;        // one vector of taps to scratch
  double planar, planar_move, pixel_move;  // pixel: of planar sums that read in place
  double planar_halves[2];                 // bfloat16 in place beside float32; at a stride of 2
  double fft, fft_move[2];                 // whole transforms over the sum of their butterflies
  double toeplitz, toeplitz_move[2];
  double aten_tap, aten_move, aten_far_move;  // of oneDNN; far: both tensors together leave the caches
  double aten_call;                           // what one of its calls costs beyond ours
};
inline constexpr Costs kOneMultiplier{1.12,   1.5,  1.7, {9, 18},    2,     {22, 60}, 20,
                                      1.0,    3,    2.5, {0.8, 0.6}, 1.55,  {9, 22},  1,
                                      {0, 0}, 1.25, 5,   16,         160000};
// Processors with AMX start two multiply-adds of 64 bytes per cycle; a core's share of memory is no faster.
inline constexpr Costs kTwoMultipliers{0.6,  0.87,     1.2, {16, 17}, 6,   {85, 140}, 45, 0.55,  6, 4, {1, 1},
                                       1.02, {20, 12}, 0.6, {17, 3},  1.0, 10,        10, 310000};
inline const Costs& costs_on(const Machine& m) {
  return m.isa == Isa::amx ? kTwoMultipliers : kOneMultiplier;
}

}  // namespace lkconv::cpu
