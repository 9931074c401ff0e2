#include "toeplitz_plan.h"

#include <limits>

namespace lkconv::cpu {
namespace {

constexpr int64_t kPlaneBytes =
    64 << 10;  // forward: packed input of one channel; 16 of them fit a 2 MiB cache
constexpr int64_t kChunkBytes =
    40 << 10;  // weight: both operands of one channel, read once per kernel row from L1
constexpr int64_t kMaxForwardWidth = 256, kMaxWeightWidth = 64;
constexpr int64_t kMaxImages = 64;
constexpr int64_t kSmallBuffers = 8 << 10;  // tiles of sums and what alignment takes
constexpr int64_t kLanes = 16;              // channels moved by one transposition

// Counts that the planner scales to cycles. Products were fitted to timings of whole layers: one issues every
// 16 cycles, and loads of tiles whose rows cross cache lines take longer than that. The rest was measured
// with the products left out.
constexpr double kProduct = 34, kLoneProduct = 44;  // alone, a product waits for its own two tile loads
constexpr double kPackLine = 9;     // 64 bytes of one channel, the mean of copying and transposing
constexpr double kStoreTile = 160;  // 16 x 16 sums: to memory, rounded, and to their rows
constexpr double kTransposed = 14;  // weight: one 64-byte line of a transposed operand
constexpr double kProductFlops = 2.0 * kTileRows * kTileRows * kTileDepth;

// Columns per task in whole blocks, so that blocks lie at the same columns however a row is cut.
int64_t part_width(int64_t out_width, int64_t limit) {
  return std::min(out_width, even_part(ceil_div(out_width, kTileRows), limit / kTileRows) * kTileRows);
}

// Input rows per image that output rows [y0, y0 + rows) reach, and the packed row that meets the first for u
// = 0.
struct RowWindow {
  int64_t count, first;
};
RowWindow row_window(const Geometry& g, int64_t y0, int64_t rows) {
  const int64_t top = std::clamp<int64_t>(y0 - g.pad_h, 0, g.height);
  const int64_t end = std::clamp<int64_t>(y0 + rows - g.pad_h + g.kernel_h - 1, top, g.height);
  return {end - top, y0 - g.pad_h - top};
}

struct Count {
  double products = 0, cycles = 0;  // of one channel
};

// One output channel of one task: `images` images, output rows from y0.
Count forward_task_cost(const Geometry& g, const Plan& p, int64_t reduce, int64_t images, int64_t y0) {
  const ToeplitzForward s = toeplitz_forward_sizes(g, p);
  const int64_t rows = std::min(p.tile_h, g.out_height - y0), blocks = ceil_div(p.tile_w, kTileRows);
  const RowWindow w = row_window(g, y0, rows);
  double steps = 0, depths = 0;
  const int64_t row_blocks = ceil_div(rows * images, kTileRows);
  for (int64_t r = 0; r < row_blocks; ++r)
    steps += double(steps_inside(r * kTileRows + w.first * images, images, g.kernel_h, 1 - kTileRows,
                                 w.count * images - 1)
                        .count());
  for (int64_t b = 0; b < blocks; ++b)
    depths += double(
        steps_inside(b * kTileRows - g.pad_w, kTileDepth, s.depth, 1 - kTileDepth, g.width - 1).count());
  Count c;
  c.products = steps * depths * double(reduce);
  const double tiles = double(row_blocks * blocks);
  c.cycles = c.products * (tiles == 1 ? kLoneProduct : kProduct) + tiles * kStoreTile +
             double(reduce * g.kernel_h) * double(20 + 16 * s.depth) +
             double(reduce * s.columns) * double(w.count * images + 2 * kToeplitzMargin) * kPackLine;
  return c;
}

Count forward_cost(const Geometry& g, const Plan& p, int64_t reduce) {
  Count sum;
  const double across = double(ceil_div(g.out_width, p.tile_w)) * double(g.channels);
  const int64_t whole = g.batch / p.images, rest = g.batch % p.images;
  const auto add = [&](int64_t images, double times, int64_t y0) {
    const Count c = forward_task_cost(g, p, reduce, images, y0);
    sum.products += c.products * times * across, sum.cycles += c.cycles * times * across;
  };
  for (int64_t y0 = 0; y0 < g.out_height; y0 += p.tile_h) {
    if (whole) add(p.images, double(whole), y0);
    if (rest) add(rest, 1, y0);
  }
  return sum;
}

// Images that share tiles: up to `limit`, spread evenly over the batch, cheapest by `cost`.
template <class Cost>
void choose_images(const Geometry& g, int64_t limit, Plan& p, Cost cost) {
  double best = std::numeric_limits<double>::infinity();
  int64_t images = 1, last = 0;
  for (int64_t i = 1; i <= std::min({limit, g.batch, kMaxImages}); ++i) {
    p.images = even_part(g.batch, i);
    if (p.images == last) continue;
    last = p.images;
    const double cycles = cost();
    if (cycles < best) best = cycles, images = p.images;
  }
  p.images = images;
}

void plan_forward(const Geometry& g, int64_t reduce, const Machine& m, Plan& p) {
  p.tile_w = part_width(g.out_width, kMaxForwardWidth);
  const ToeplitzForward s = toeplitz_forward_sizes(g, p);
  const int64_t rows = kPlaneBytes / (kTileDepth * 2 * s.columns * reduce) - 2 * kToeplitzMargin;
  const int64_t halo = g.kernel_h - 1, all = std::min(g.height, g.out_height + halo);
  p.tile_h = g.out_height;
  p.images = 1;
  if (all > rows)  // re-read at most half of the rows
    p.tile_h = std::min(
        g.out_height, round_up(even_part(g.out_height, std::max({rows - halo, halo, kTileRows})), kTileRows));
  else
    choose_images(g, rows / std::max<int64_t>(1, all), p, [&] { return forward_cost(g, p, reduce).cycles; });
  const Count c = forward_cost(g, p, reduce);
  p.flops = c.products * kProductFlops;
  p.cycles = c.cycles;
  // Fewer channels per task where there are too few tasks: it changes who computes an output, not how.
  const int64_t parts =
      ceil_div(g.batch, p.images) * ceil_div(g.out_height, p.tile_h) * ceil_div(g.out_width, p.tile_w);
  while (p.lanes > 4 && m.threads > 1 && channel_groups(g.channels, p) * parts < 2 * m.threads) p.lanes /= 2;
  const ToeplitzForward f = toeplitz_forward_sizes(g, p);
  const int64_t stage = p.lanes * p.tile_h * p.images * round_up(p.tile_w, kTileDepth) * 2;
  const int64_t rows_out = p.tile_h * p.images;
  const int64_t tiles = ceil_div(rows_out, kTileRows) * ceil_div(p.tile_w, kTileRows);
  p.scratch_bytes = p.lanes * reduce * f.plane_lines * 64 + stage +
                    g.kernel_h * (reduce * f.band * 4 + (f.depth + 1) * 64) + (f.rows + rows_out) * 8 +
                    tiles * 64 + kSmallBuffers;
}

// One channel of one chunk with `images` images and output rows from y0.
Count weight_chunk_cost(const Geometry& g, const Plan& p, int64_t images, int64_t y0) {
  const ToeplitzWeight s = toeplitz_weight_sizes(g, p);
  const int64_t rows = std::min(p.tile_h, g.out_height - y0) * images;
  const RowWindow w = row_window(g, y0, std::min(p.tile_h, g.out_height - y0));
  double steps = 0, pairs = 0;
  for (int64_t r = 0; r < rows; r += kTileDepth)
    steps += double(
        steps_inside(r + w.first * images, images, g.kernel_h, 1 - kTileDepth, w.count * images - 1).count());
  for (int64_t b = 0; b < s.blocks; ++b)
    pairs +=
        double(steps_inside(b * kTileRows - g.pad_w, kTileRows, s.bands, 1 - kTileRows, g.width - 1).count());
  Count c;
  c.products = steps * pairs;
  const double lines =
      double(s.input_blocks * kTileRows) * double(ceil_div(w.count * images, kTileDepth) + 1) +
      double(s.blocks) * double(round_up(rows, kTileDepth)) / 2;
  c.cycles = c.products * kProduct + lines * kTransposed + double(g.kernel_h * s.bands) * 40;
  return c;
}

Count weight_cost(const Geometry& g, const Plan& p) {
  Count sum;
  const double across =
      double(ceil_div(g.out_width, p.tile_w)) * double(g.channels * ceil_div(g.batch, p.images));
  for (int64_t y0 = 0; y0 < g.out_height; y0 += p.tile_h) {
    const Count c = weight_chunk_cost(g, p, p.images, y0);
    sum.products += c.products * across, sum.cycles += c.cycles * across;
  }
  return sum;
}

int64_t weight_chunk_bytes(const Geometry& g, const Plan& p) {
  const ToeplitzWeight s = toeplitz_weight_sizes(g, p);
  return (s.input_plane + s.grad_plane) * 2;
}

void plan_weight(const Geometry& g, Plan& p) {
  p.tile_w = part_width(g.out_width, kMaxWeightWidth);
  p.tile_h = g.out_height;
  p.images = 1;
  const int64_t least = round_up(std::max(kTileDepth, g.kernel_h - 1), kTileDepth);
  for (int64_t parts = 2; p.tile_h > least && weight_chunk_bytes(g, p) > kChunkBytes; ++parts)
    p.tile_h = std::min(g.out_height, std::max(least, round_up(ceil_div(g.out_height, parts), kTileDepth)));
  int64_t limit = 1;
  for (; limit < kMaxImages; ++limit) {
    p.images = limit + 1;
    if (weight_chunk_bytes(g, p) > kChunkBytes) break;
  }
  p.images = 1;
  if (p.tile_h == g.out_height) choose_images(g, limit, p, [&] { return weight_cost(g, p).cycles; });
  const Count c = weight_cost(g, p);
  p.flops = c.products * kProductFlops;
  p.cycles = c.cycles + double(g.channels * g.kernel_h * g.kernel_w) * 2;
  const ToeplitzWeight s = toeplitz_weight_sizes(g, p);
  p.scratch_bytes =
      p.lanes * (weight_chunk_bytes(g, p) + s.total * 4) + (s.rows + s.grad_rows) * 8 + kSmallBuffers;
}

}  // namespace

ToeplitzForward toeplitz_forward_sizes(const Geometry& g, const Plan& plan) {
  ToeplitzForward s;
  s.depth = ceil_div(g.kernel_w + kTileRows - 1, kTileDepth);
  s.columns = (ceil_div(plan.tile_w, kTileRows) + 2 * (s.depth - 1)) | 1;  // pack_channels writes whole pairs
  s.rows = std::min(g.height, plan.tile_h + g.kernel_h - 1) * plan.images;
  s.tile_lines = s.rows + 2 * kToeplitzMargin;
  s.plane_lines = (s.columns * s.tile_lines) | 1;
  s.band = kTileDepth * s.depth + kTileRows;
  return s;
}

ToeplitzWeight toeplitz_weight_sizes(const Geometry& g, const Plan& plan) {
  ToeplitzWeight s;
  s.bands = ceil_div(g.kernel_w + kTileRows - 1, kTileRows);
  s.blocks = ceil_div(plan.tile_w, kTileRows);
  s.input_blocks = s.blocks + s.bands - 1;
  s.rows = std::min(g.height, plan.tile_h + g.kernel_h - 1) * plan.images;
  s.pitch = ((ceil_div(s.rows, kTileDepth) + 2) | 1) * kTileDepth;
  s.grad_rows = round_up(plan.tile_h * plan.images, kTileDepth);
  s.input_plane = s.input_blocks * kTileRows * s.pitch + kTileDepth;
  s.grad_plane = s.blocks * s.grad_rows * kTileRows + kTileDepth;
  s.total = g.kernel_h * kTileRows * (s.bands + 1);
  return s;
}

const char* toeplitz_plan(Pass pass, const Geometry& g, int64_t reduce, DType dtype, const Machine& m,
                          Plan& p) {
  p.algorithm = Algorithm::toeplitz;
  p.isa = m.isa;
  p.lanes = kLanes;
  if (dtype != DType::bf16) return "dtype is not bfloat16";
  if (m.isa != Isa::amx) return "this processor has no AMX";
  if (g.stride_h != 1 || g.stride_w != 1) return "stride is not 1";
  if (g.dil_h != 1 || g.dil_w != 1) return "dilation is not 1";
  if (g.kernel_h < 1 || g.kernel_w < 3) return "fewer than three taps per kernel row leave the band empty";
  if (g.batch < 1 || g.channels < 1 || g.out_height < 1 || g.out_width < 1) return "the output is empty";
  if (pass == Pass::backward_weight)
    plan_weight(g, p);
  else
    plan_forward(g, reduce, m, p);
  if (p.scratch_bytes > kMaxScratchBytes) return "its scratch memory would exceed the limit";
  return nullptr;
}

}  // namespace lkconv::cpu
