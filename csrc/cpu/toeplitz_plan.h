// Convolution as a row-wise banded Toeplitz product on 16 x 32 by 32 x 16 matrix units: what planner, kernels
// and tests must agree on. For each channel and kernel row u
//   Y[(y, n), x] += X[(y + u, n), x + i] T_u[i, x],  T_u[i, x] = weight[u, i - x],
// where rows are height x batch with the images innermost, so that a step of u is a constant number of rows,
// one image fills a tile by its height alone, and a tile never needs rows that are not neighbours in scratch
// memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "planner.h"

namespace lkconv::cpu {

constexpr int64_t kTileRows = 16;   // outputs per tile, down and across
constexpr int64_t kTileDepth = 32;  // bfloat16 values summed by one product

// The steps i in [first, last) of 0..count for which low <= start + i * step <= high.
struct Steps {
  int64_t first = 0, last = 0;
  bool has(int64_t i) const { return uint64_t(i - first) < uint64_t(last - first); }
  int64_t count() const { return last - first; }
};
inline Steps steps_inside(int64_t start, int64_t step, int64_t count, int64_t low, int64_t high) {
  Steps s;
  s.first = start >= low ? 0 : std::min(count, ceil_div(low - start, step));
  s.last = std::max(s.first, start > high ? 0 : std::min(count, (high - start) / step + 1));
  return s;
}

// Scratch of the forward kernel. A packed plane holds, for every 16th column, a run of `tile_lines` lines of
// 32 bfloat16 values: line kToeplitzMargin + r is input row r from that column on. Neighbouring runs overlap
// by half, which keeps every tile load aligned; margins of zeros stand for the rows above and below the
// image.
constexpr int64_t kToeplitzMargin = 16;
struct ToeplitzForward {
  int64_t depth;        // products per kernel row and output block: ceil((15 + kernel_w) / 32)
  int64_t columns;      // runs per plane
  int64_t rows;         // input rows of the largest task
  int64_t tile_lines;   // rows and margins
  int64_t plane_lines;  // odd, so that planes do not start in the same cache set
  int64_t band;         // pairs of taps per kernel row
};
ToeplitzForward toeplitz_forward_sizes(const Geometry& g, const Plan& plan);

// Scratch of the weight kernel, per channel. Input columns become rows of `pitch` values (margin, image rows,
// margin); grad_output becomes pairs of rows for each block of 16 columns.
struct ToeplitzWeight {
  int64_t bands;                           // tiles down one block's window: ceil((15 + kernel_w) / 16)
  int64_t blocks;                          // 16-column blocks of the largest chunk
  int64_t input_blocks;                    // blocks + bands - 1
  int64_t rows, pitch;                     // input rows of the largest chunk; an odd number of 64-byte lines
  int64_t grad_rows;                       // padded to whole tiles
  int64_t input_plane, grad_plane, total;  // elements: bfloat16, bfloat16, float32
};
ToeplitzWeight toeplitz_weight_sizes(const Geometry& g, const Plan& plan);

// Fills the plan and returns null, or returns why the matrix units cannot serve the problem.
const char* toeplitz_plan(Pass pass, const Geometry& g, int64_t reduce, DType dtype, const Machine& m,
                          Plan& plan);

}  // namespace lkconv::cpu
