// Arithmetic shared by the planners of the two passes.
#pragma once

#include <algorithm>

#include "planner.h"

namespace lkconv::cuda {

// Measured on no machine yet: these follow from the instruction tables and from published micro-benchmarks,
// and are good enough to order algorithms whose costs differ several times. See docs/cuda-notes.md.
constexpr double kBytesPerCycle = 18;         // device memory per SM: 4.3 TB/s over 132 SMs at 1.75 GHz
constexpr double kMultiplyAddsPerCycle = 75;  // of 128, what a register-tiled direct kernel reaches
constexpr double kStridedPerCycle = 20;       // one shared load per multiply-add
constexpr double kMmaCycles = 1.6 / 0.65;  // per m16n8k16 (tf32: m16n8k8) and SM, at 65% of the mma.sync rate
constexpr double kSharedCycles = 1.0 / 0.8;  // per 128 bytes from shared memory
// Counted from machine code (docs/performance.md), in instructions of a thread; an SM issues 128 of them a
// cycle.
constexpr double kIssuedPerCycle = 128;
constexpr double kCopyInstructions = 11;  // a copy to shared memory, conversion of up to 4 elements included
constexpr double kConvertInstructions = 2.8;   // an element of wider ones
constexpr double kByChannelInstructions = 52;  // an element that is staged by channels
constexpr double kTileInstructions = 600;  // of every thread, to find and to end a tile of the direct kernels
constexpr double kStripInstructions = 100;  // beside the products of a strip of several rows

// Cycles of staging one element by copies of `bytes`.
inline double stage_cycles(int bytes, bool by_channels, DType dtype) {
  if (by_channels) return kByChannelInstructions / kIssuedPerCycle;
  return std::max(kConvertInstructions, kCopyInstructions * double(dtype_size(dtype)) / bytes) /
         kIssuedPerCycle;
}

inline int64_t round_up(int64_t a, int64_t to) { return ceil_div(a, to) * to; }
// Even parts no larger than `limit`.
inline int64_t even_part(int64_t size, int64_t limit) {
  return ceil_div(size, ceil_div(std::max<int64_t>(size, 1), std::max<int64_t>(1, limit)));
}
// Of a window of `cols` columns and up to `rows` rows an image.
inline WindowWalk window_walk(int64_t cols, int64_t rows, int64_t threads, int vector_bytes, DType dtype) {
  const int64_t vectors = ceil_div(cols * dtype_size(dtype), vector_bytes);
  const int64_t lanes = std::clamp<int64_t>(vectors, 1, threads), step = threads / lanes;
  rows = std::max<int64_t>(1, rows);
  return {divisor_of(lanes), divisor_of(rows), int(step), int(step / rows), vector_bytes};
}

inline int power_of_two_at_least(int64_t n, int limit) {
  int p = 1;
  while (p < n && p < limit) p *= 2;
  return p;
}

// Kernel rows that reach the image from output rows [y0, y1), as a range's length.
inline int64_t reaching_rows(const Geometry& g, int64_t y0, int64_t y1) {
  const int64_t top = (y1 - 1) * g.stride_h - g.pad_h, bottom = y0 * g.stride_h - g.pad_h;
  const int64_t u0 = top >= 0 ? 0 : ceil_div(-top, g.dil_h);
  const int64_t u1 =
      g.height - 1 - bottom < 0 ? 0 : std::min(g.kernel_h, (g.height - 1 - bottom) / g.dil_h + 1);
  return std::max<int64_t>(0, u1 - u0);
}

// An odd number of 16-byte units: eight rows that far apart meet eight different groups of banks.
inline int64_t conflict_free_bytes(int64_t bytes) {
  const int64_t units = ceil_div(bytes, 16);
  return (units + (units % 2 == 0)) * 16;
}

template <class Params>
void fill_geometry(Params& p, const Geometry& g) {
  p.batch = int(g.batch), p.channels = int(g.channels), p.height = int(g.height), p.width = int(g.width);
  p.out_height = int(g.out_height), p.out_width = int(g.out_width);
  p.kernel_h = int(g.kernel_h), p.kernel_w = int(g.kernel_w);
  p.stride_h = int(g.stride_h), p.pad_h = int(g.pad_h), p.pad_w = int(g.pad_w);
  p.dil_h = int(g.dil_h), p.dil_w = int(g.dil_w);
}

Candidate<ForwardPlan> plan_direct_forward(const ForwardProblem& f, DType dtype, const Layout& input,
                                           const Layout& output, const Machine& m);
Candidate<ForwardPlan> plan_toeplitz_forward(const ForwardProblem& f, DType dtype, const Layout& input,
                                             const Layout& output, const Switches& s, const Machine& m);
Candidate<WeightPlan> plan_direct_weight(const WeightProblem& w, DType dtype, const Layout& input,
                                         const Layout& grad_output, const Machine& m);
Candidate<WeightPlan> plan_toeplitz_weight(const WeightProblem& w, DType dtype, const Layout& input,
                                           const Layout& grad_output, const Switches& s, const Machine& m);

// Why no Toeplitz kernel takes the problem, or "".
std::string toeplitz_declines(const Geometry& g, DType dtype, const Switches& s);

}  // namespace lkconv::cuda
