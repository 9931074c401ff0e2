// The CPU planner's vocabulary over the problems of ../problem.h.
#pragma once

#include "../problem.h"

namespace lkconv::cpu {

using lkconv::ceil_div;
using lkconv::ForwardProblem;
using lkconv::Geometry;
using lkconv::WeightProblem;

enum class Algorithm : int8_t { direct, planar, fft, toeplitz, aten };
enum class Isa : int8_t { baseline, avx2, avx512, amx };

// Which tensors direct kernels copy before they read pixels in place: a group's channels_last pixels, next to
// each other; or contiguous planes, transposed to such pixels, of the input and the output.
enum class Gather : int8_t { none, pixels, planes };
constexpr int64_t kSlackPixels = 32;  // behind such a copy

// What the planner decides and the kernels follow.
struct Plan {
  Algorithm algorithm = Algorithm::direct;
  Isa isa = Isa::baseline;
  int64_t lanes = 1;               // channels per group
  int64_t tile_h = 0, tile_w = 0;  // outputs per tile
  int64_t batch_rows = 1;          // direct: output rows computed between loading and storing
  int64_t span = 1;                // direct: channel groups handled together
  int64_t block = 0;               // planar: which of kPlanarBlocks; direct: outputs per block, if in place
  int64_t short_block = 0;         // direct in place: of columns that the dilation leaves one output fewer
  int64_t together = 1;            // direct in place: channel groups whose sums registers hold together
  bool in_place = false;           // direct, planar: tensors are read where they are
  Gather gather = Gather::none;    // direct in place: what is copied first
  bool paired = false;             // direct, flat: products are of two rows of bfloat16 (row_products.h)
  int64_t swept = 0;               // planar in place: vectors of columns summed row after row, 0: in blocks
  bool flat = false;               // planar: outputs are counted through row after row (planar_flat.h)
  bool strip = false;              // planar: a row or column of taps as a band (planar_strip.h)
  int64_t images = 1;  // summed together: toeplitz: in a task (forward) or chunk; planar: in backward_weight
  int64_t fft_h = 0, fft_w = 0;  // fft: transform lengths
  int64_t splits = 1;            // backward_weight: parts of the batch summed separately, then in order
  int64_t scratch_bytes = 0;     // per thread
  double flops = 0;              // floating-point operations the algorithm runs
  double cycles = 0;             // the planner's estimate on one core
};

constexpr int64_t kMaxSpan = 8;
constexpr int64_t kMaxSpanInPlace = 64;  // of direct tasks whose tensors are read in place

inline int64_t round_up(int64_t size, int64_t unit) { return ceil_div(size, unit) * unit; }
// Even parts no larger than `limit`.
inline int64_t even_part(int64_t size, int64_t limit) {
  return ceil_div(size, ceil_div(size, std::max<int64_t>(1, limit)));
}

// First and last kernel row (or column) whose input index lies inside [0, size) for an output between those
// whose first taps are at `first` and at `last`.
inline void clip_taps(int64_t first, int64_t last, int64_t size, int64_t taps, int64_t dil, int64_t& u0,
                      int64_t& u1) {
  const auto steps = [dil](int64_t distance) { return dil == 1 ? distance : ceil_div(distance, dil); };
  u0 = last >= 0 ? 0 : std::min(taps, steps(-last));
  u1 = first >= size ? u0 : std::max(u0, std::min(taps, steps(size - first)));
}

// Number of (output, tap) pairs on one axis whose input lies inside the image.
inline int64_t in_bounds_pairs(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad,
                               int64_t dil) {
  int64_t pairs = 0;
  for (int64_t u = 0; u < kernel; ++u) {
    const int64_t shift = u * dil - pad;  // input index = y * stride + shift
    const int64_t first = shift >= 0 ? 0 : ceil_div(-shift, stride);
    const int64_t last = in - 1 - shift < 0 ? -1 : std::min(out - 1, (in - 1 - shift) / stride);
    pairs += std::max<int64_t>(0, last - first + 1);
  }
  return pairs;
}

// Counts shared by planner, launcher and kernels.
inline int64_t channel_groups(int64_t channels, const Plan& plan) { return ceil_div(channels, plan.lanes); }
// Input rows that a batch of output rows of a direct tile reads.
inline int64_t direct_ring_rows(const Geometry& g, const Plan& plan) {
  const int64_t halo = (g.kernel_h > 0 ? g.kernel_h - 1 : 0) * g.dil_h + 1;
  const int64_t rows = (plan.batch_rows - 1) * g.stride_h + halo;
  return rows < g.height ? rows : g.height > 0 ? g.height : 1;
}

// Whether padding keeps the width of the image and one register tile takes all taps of a row: then the blocks
// at the edges know which of their pixels are halo.
inline bool known_halo(const Geometry& p) {
  return p.stride_w == 1 && p.dil_w == 1 && p.width == p.out_width && 2 * p.pad_w + 1 == p.kernel_w &&
         (p.kernel_w == 3 || p.kernel_w == 5 || p.kernel_w == 7);
}

// Whether the taps of a kernel row are held in registers while a row is read in place: an odd number, which
// padding centres, so that every block knows which of its pixels are halo.
inline bool narrow_rows(const Geometry& p) {
  return p.kernel_w <= 7 && p.kernel_w % 2 == 1 && p.pad_w == p.dil_w * (p.kernel_w / 2) &&
         ((p.stride_w == 1 && p.width == p.out_width) || (p.stride_w == 2 && p.dil_w == 1 && p.kernel_w > 1));
}
// Whether rows of the forward pass can be read in place, as far as their geometry goes.
inline bool rows_in_place(const Geometry& p) {
  return p.kernel_h > 0 && p.height > 0 && p.width > 0 &&
         (narrow_rows(p) || (p.kernel_w > 7 && p.stride_w == 1 && p.dil_w == 1));
}
// The same for backward_weight.
inline bool odd_rows(const Geometry& p) {
  return p.kernel_h > 0 && p.height > 0 && p.width > 0 && p.dil_w == 1 && narrow_rows(p);
}

// Pixels this far apart lie on a few pages of memory each; multiples of this far, in few sets of a cache.
constexpr int64_t kFarPixelBytes = 1024, kFewSetsBytes = 2048;
// Input and output together, of elements of so many bytes; beyond the limit they come from memory.
constexpr int64_t kCachedBytes = 24 << 20;
inline int64_t bytes_of_tensors(const Geometry& p, int64_t element) {
  return p.batch * p.channels * (p.height * p.width + p.out_height * p.out_width) * element;
}

// Whether rows and columns had better be exchanged: a tall strip of a kernel over channels_last pixels, which
// then is a row of taps that registers hold. Shorter ones gain little (bfloat16 nothing), and as they are
// they can be segments of one pass over the channels (segmented_depthwise_conv2d.h), with the same result.
constexpr int64_t kShortStrip = 11;
inline bool is_tall_strip(const Geometry& p) {
  return p.adjacent && !p.rows && p.kernel_w == 1 && p.kernel_h > kShortStrip && p.stride_h == 1 &&
         p.dil_h == 1 && p.phases == 1;
}

constexpr int64_t kMaxStridedBlock = 8;
constexpr int64_t kLeastWideBlock = 3;  // of 5 and 7 taps in a row

// Whether a block of x outputs is compiled, whose sums are `vectors` of floats each, in place.
inline bool is_block(const Geometry& p, int64_t x, int64_t vectors) {
  if (!narrow_rows(p)) return (x >= 7 || x == 4) && x <= p.kernel_w + 1;
  if (vectors > 1) return x <= (p.kernel_w > 5 ? 7 : 8);  // taps of all vectors are in registers too
  return x <= 8 || x == 14;
}

// Outputs per register block for `width` of a row's outputs, which the dilation keeps apart from the others,
// where tensors are read in place. Blocks are evenly apart, and only the first and the last may touch the
// halo; 0: no block size is possible.
inline int64_t in_place_block(const Geometry& p, int64_t width, bool many_registers, int64_t vectors) {
  const bool narrow = narrow_rows(p);
  const int64_t most = p.stride_w == 2 ? kMaxStridedBlock : many_registers ? 14 : narrow ? 8 : 10;
  const int64_t least = !narrow ? 4 : p.kernel_w > 3 && p.stride_w == 1 ? kLeastWideBlock : 2;
  const auto inner_blocks_miss_the_halo = [&](int64_t x) {
    const int64_t blocks = ceil_div(width, x);
    return blocks == 1 || !narrow || (width - x) / (blocks - 1) * p.stride_w >= p.kernel_w / 2;
  };
  int64_t best = 0, best_cost = 0;
  for (int64_t x : {14, 12, 10, 8, 7, 6, 5, 4, 3, 2}) {
    if (x > most || x < least || x > width) continue;
    if (!is_block(p, x, vectors) || !inner_blocks_miss_the_halo(x)) continue;
    const int64_t cost = ceil_div(width, x) * (x + 2);
    if (!best || cost < best_cost) best = x, best_cost = cost;
  }
  return best;
}

}  // namespace lkconv::cpu
