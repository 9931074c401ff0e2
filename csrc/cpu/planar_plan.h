// Direct summation along the rows of a plane, whose lanes are neighbouring outputs of one channel: what
// planner, launcher and kernels must agree on. Nothing is transposed; the price is lanes past narrow rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "planner.h"

namespace lkconv::cpu {

// Outputs in registers at a time: rows x vectors. With 16 registers, 7 sums, 7 taps and a pixel fill them.
struct PlanarBlock {
  int64_t rows, vectors;
};
constexpr PlanarBlock kPlanarBlocks[] = {{7, 1}, {8, 1}, {14, 1}, {7, 2}, {8, 2}, {7, 3}, {12, 1}, {10, 2}};
constexpr int64_t kPlanarBlockCount = sizeof(kPlanarBlocks) / sizeof(kPlanarBlocks[0]);
// Blocks that an instruction set with so few registers can hold: a prefix of the list.
constexpr int64_t planar_blocks(bool many_registers) { return many_registers ? kPlanarBlockCount : 1; }

// ... and those that hold sums in two parts (element_vectors.h): another prefix.
constexpr int64_t kPlanarBlocksOfParts = 2;
constexpr int64_t kMaxRowsAtOnce = 8;  // kernel rows that one call sums, where there are 32 registers

// The problems that share one read of the input: the forward pass alone, or every stride phase of
// backward_input, row phases outermost.
struct PlanarProblem {
  const ForwardProblem* phases;
  int64_t phases_h, phases_w;

  const ForwardProblem& phase(int64_t y, int64_t x) const { return phases[y * phases_w + x]; }
};

// One thread's scratch: a window of input rows with its zero halo, whose columns are dealt to stride_w
// segments so that the columns one tap reads are neighbours; and finished rows that cannot go straight to the
// output.
struct PlanarSizes {
  int64_t top, left;            // halo before the first output's pixel, in input rows and columns
  int64_t rows, columns;        // of the window
  int64_t segment, row;         // elements per segment and per row
  int64_t out_rows, out_pitch;  // finished rows of one phase
  int64_t taps, elements;       // kernel elements of all phases; elements of the scratch in all
};
PlanarSizes planar_sizes(const PlanarProblem& p, const Plan& plan);

// Rows of a block of pixels read in place lie as far apart as the kernel's, which then share their loads; but
// not where that leaves few rows to share them, or few kernel rows.
inline int64_t planar_row_step(const Geometry& g) {
  return g.kernel_h >= 5 && g.out_height >= 4 * g.dil_h ? g.dil_h : 1;
}

// Whether two planes share vectors that a row of one would leave half empty.
inline bool planar_pairs(const Geometry& g, int64_t reduce, const Plan& plan) {
  const PlanarBlock& block = kPlanarBlocks[plan.block];
  const bool possible = plan.swept || (g.dil_h == 1 && block.vectors == 1 && block.rows <= 8);
  return plan.in_place && reduce == 1 && possible && 2 * g.out_width <= plan.lanes;
}

// Whether planar_strided.h reads pixels in place: two columns from one output to the next, or two column
// phases.
constexpr int64_t kMaxStridedTaps = 7, kMaxPhaseTaps = 8;  // kernel rows of the forward pass, and of a phase
inline bool planar_strided(const Geometry& g, int64_t reduce) {
  if (reduce != 1 || g.dil_h != 1) return false;
  if (g.phases > 1) return g.phases_w == 2 && g.kernel_h + 1 <= kMaxPhaseTaps;
  return g.stride_w == 2 && g.stride_h <= 2 && g.dil_w == 1 && g.kernel_h <= kMaxStridedTaps;
}

// The column phase's problem that has taps, if any row phase has.
inline const ForwardProblem& widest_phase(const PlanarProblem& p, int64_t x) {
  const ForwardProblem* best = &p.phase(0, x);
  for (int64_t y = 1; y < p.phases_h; ++y)
    if (p.phase(y, x).kernel_w > best->kernel_w) best = &p.phase(y, x);
  return *best;
}

// The same where pixels are read in place (planar_in_place.h), in bytes of each part.
struct PixelSizes {
  int64_t columns, ranges, rows, masks;
  int64_t bytes;  // in all
};
PixelSizes pixel_sizes(const Geometry& g, const Plan& plan);

// planar_sweep.h: kernel rows, and vectors of columns whose sums registers hold for so many of them, where
// an element vector holds `parts` vectors of floats.
constexpr int64_t kMaxSweptRows = 7;
constexpr int64_t most_swept(int64_t kernel_h, int64_t parts) {
  return std::min<int64_t>(4, 24 / kernel_h) / parts;
}
// Vectors of columns that sweeps take at a time; 0 if blocks of rows do without them, or must.
int64_t swept_vectors(const Geometry& g, int64_t reduce, DType dtype, const Machine& m);

// The same for sweeps.
struct SweepSizes {
  int64_t columns, blocks, masks;
  int64_t bytes;  // in all
};
SweepSizes sweep_sizes(const Geometry& g, const Plan& plan);
constexpr int64_t kSweepBlockBytes = 4 * int64_t(sizeof(int64_t));

// Floats of a vector, and bytes, where there are masked loads.
constexpr int64_t kMaskedLanes = 16, kMaskedBytes = 64;

// planar_flat.h: whether a plane's outputs can be counted through, and its scratch, in bytes of each part but
// for the image.
constexpr int64_t kMostFlatTaps = 7;  // of a row and of a column
// Whether registers hold so many products' taps beside the columns' sums of two vectors.
constexpr bool flat_taps_are_held(int64_t products, int64_t columns) { return products + 3 * columns <= 30; }
using FlatMask = uint16_t;
bool is_flat(const Geometry& g, int64_t reduce, DType dtype, const Machine& m);
struct FlatSizes {
  int64_t rows;   // of the image that are read
  int64_t image;  // elements before the first of them in a window
  int64_t window, products, finished;
  int64_t bytes;  // in all, with masks
};
FlatSizes flat_sizes(const Geometry& g, int64_t element);

// planar_strip.h: whether a kernel is a row or a column that it sums, its blocks of outputs, and floats of
// each part of its scratch.
bool is_strip(const Geometry& g, int64_t reduce, DType dtype, const Machine& m);
constexpr PlanarBlock kStripBlocks[] = {{14, 1}, {7, 1}, {3, 1}, {1, 1}, {14, 2}, {7, 2}, {3, 2},
                                        {1, 2},  {8, 3}, {4, 3}, {1, 3}, {6, 4},  {3, 4}, {1, 4}};
constexpr int64_t kStripBlockCount = sizeof(kStripBlocks) / sizeof(kStripBlocks[0]);
constexpr int64_t kStripSlack = 64;  // zeros on both sides of the taps, for as many outputs as a block has
struct StripSizes {
  int64_t taps, plane;
};
StripSizes strip_sizes(const Geometry& g, int64_t element);
// Along the kernel's axis, the pixels that `outputs` outputs from `output` on read, [first, last), and of
// those the ones that all of them read, [inner, outer).
struct StripRange {
  int64_t first, inner, outer, last;
};
inline StripRange strip_range(int64_t output, int64_t outputs, int64_t pad, int64_t taps, int64_t pixels) {
  StripRange r;
  r.first = std::clamp<int64_t>(output - pad, 0, pixels);
  r.last = std::clamp<int64_t>(output + outputs - 1 - pad + taps, r.first, pixels);
  r.inner = std::clamp<int64_t>(output + outputs - 1 - pad, r.first, r.last);
  r.outer = std::clamp<int64_t>(output - pad + taps, r.inner, r.last);
  return r;
}

// planar_weight_sweep.h: kernel rows of one call, and columns of taps beside so many: sums, and a row of
// outputs for each kernel row, are in registers.
constexpr int64_t kMaxWeightSweepRows = 7;
constexpr int64_t swept_weight_columns(int64_t rows) { return std::min<int64_t>(8, 30 / rows - 1); }

constexpr int64_t kLongestWeightSum = 256;  // products of a lane
// Rows of both tensors that a sweep goes down, vector after vector of columns; and of tensors beyond the
// caches, where products take less time than memory.
constexpr int64_t kWeightTileBytes = 256 << 10, kFarWeightTileBytes = 24 << 10;

// planar_weight_strided.h: rows of outputs in registers, kernel rows of one call, and columns of taps beside
// so many.
constexpr int64_t kWeightBlockRows = 7;
constexpr int64_t kMaxWeightRows = 3;
constexpr int64_t weight_columns(int64_t rows) { return rows == 1 ? 8 : 4; }

// One thread's scratch: floats of one channel's sums, and bytes in all.
struct PlanarWeightSizes {
  int64_t sums, bytes;
};
PlanarWeightSizes planar_weight_sizes(const Geometry& g, int64_t lanes);
constexpr int64_t kTapColumnBytes =
    5 * int64_t(sizeof(uint32_t));  // of a TapColumn of planar_weight_strided.h

// planar_weight_flat.h: kernel rows whose sums registers hold, and its scratch: floats of one channel's sums,
// bytes of the rest.
constexpr int64_t flat_weight_rows(int64_t columns) { return std::min<int64_t>(kMostFlatTaps, 25 / columns); }
inline int64_t flat_weight_masks(const Geometry& g) {  // of a vector of pixels
  return g.kernel_w + g.kernel_h + g.kernel_h * g.kernel_w;
}
struct FlatWeightSizes {
  int64_t sums, masks, grad;
  int64_t bytes;  // in all, with a plane of the input
};
FlatWeightSizes flat_weight_sizes(const Geometry& g, int64_t element);

const char* planar_plan(Pass pass, const Geometry& g, int64_t reduce, DType dtype, const Machine& m,
                        Plan& plan);
const char* planar_weight_plan(const Geometry& g, DType dtype, const Machine& m, Plan& plan);

}  // namespace lkconv::cpu
