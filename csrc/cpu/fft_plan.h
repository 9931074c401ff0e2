// One-dimensional FFT plans (radices, twiddles, order of the result) and the geometry of FFT tiles.
#pragma once

#include <cstdint>
#include <vector>

#include "problem.h"

namespace lkconv::cpu {

constexpr int64_t kMaxFftLength = 256;

struct FftPlan {
  int64_t length = 0;
  double cost = 0;  // estimated cycles for one complex transform of vectors
  std::vector<int> radix;
  std::vector<std::vector<float>> twiddle;  // per pass: for j < m: (cos, sin) of 2 pi j q / (R m), q = 1..R-1
  std::vector<int32_t> position;            // where frequency f stands in the digit-reversed result
};

// The plan for a length with prime factors 2, 3, 5, 7 up to kMaxFftLength (thread-safe, made once), or null.
const FftPlan* fft_plan(int64_t length);

// One axis of a tiled FFT convolution. Taps that never meet the image are cropped; a tile's window begins at
// input index (first output - pad + first_tap * dil) and the result for its first output lands at index 0.
struct FftAxis {
  int64_t first_tap, last_tap;  // [first, last)
  int64_t extent;               // (last - first - 1) * dil + 1
  int64_t tile;                 // outputs per tile
  int64_t length;               // smallest circular length that keeps a tile's outputs free of wrap-around
};
FftAxis fft_axis(int64_t in, int64_t out, int64_t kernel, int64_t pad, int64_t dil, int64_t tile);

}  // namespace lkconv::cpu
