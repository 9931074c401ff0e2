#include "planar_plan.h"

#include <limits>

#include "costs.h"

namespace lkconv::cpu {
namespace {

constexpr int64_t kNearBytes = 16 << 10;  // a window that stays in a first-level cache ...
constexpr int64_t kFarBytes = 256 << 10;  // ... and in a second-level cache, for tall kernels

// Counts that costs.h scales to cycles.
constexpr double kLoad = 0.55;  // a vector of pixels, mostly across two cache lines, beside a multiply-add
constexpr double kStridedLoads = 1.8;  // one for each product, in the same terms
constexpr double kBlock = 25;          // a block's call, its sums in and out
constexpr double kKernelTap = 2;       // one tap to scratch
constexpr double kPlane = 150;
constexpr double kPixelProduct = 1.09;
constexpr double kPixelLoad = 1.9;  // in place most loads cross a cache line, which hide behind products
constexpr double kPixelBlock = 40;
constexpr double kPixelPlane = 30;
constexpr double kSweptProduct = 0.85, kSweptRow = 8;
// A flat vector of outputs: its products, of taps in registers or not, columns to move and the rest of it.
constexpr double kFlatProduct = 0.45, kFlatLoadedTap = 0.8, kFlatBf16Product = 0.7, kFlatColumn = 0.7,
                 kFlatVector = 4.6, kFlatPlane = 20, kFlatTap = 1.5;
constexpr double kFlatPixel = 0.00075;  // of a plane, as it outgrows the nearest cache
// A block of strips: half a cycle for a product or a load, more of pixels that not all its outputs read.
constexpr double kStripProduct = 0.55, kStripEdge = 0.3, kStripBlock = 15, kStripPlane = 40;
// Those are cycles; in the terms above, by measurement at the edge between the two:
constexpr double kFlatFloats = 1.4, kFlatBf16 = 1.1, kTallBf16 = 1.45, kWideBf16 = 1.55;
// ... and beside pairs of bfloat16 summed by channels.
constexpr double kFlatPairs = 0.86;
constexpr int64_t kLeastSweptRows = 3, kMaxSweptFloatRows = 6, kMaxSweptColumns = 16;
constexpr double kSplit = 2;   // taking a vector of bfloat16 apart ...
constexpr double kRound = 14;  // ... and putting one together

// Share of the kernel's rows that blocks of output rows meet inside the image.
double rows_inside(const Geometry& g, int64_t block_rows) {
  double inside = 0;
  for (int64_t y = 0; y < g.out_height; y += block_rows) {
    const int64_t first = std::max<int64_t>(0, std::min(y, g.out_height - block_rows)) * g.stride_h - g.pad_h;
    const int64_t last = first + (block_rows - 1) * g.stride_h;
    int64_t u0, u1;
    clip_taps(first, last, g.height, g.kernel_h, g.dil_h, u0, u1);
    inside += double(u1 - u0);
  }
  return inside / double(std::max<int64_t>(1, g.kernel_h * ceil_div(g.out_height, block_rows)));
}

// Whether pixels can be read in place by blocks of this kind: there are masked loads, and each of a block's
// vectors has outputs. Sums in two parts are never rounded half-way: all of a kernel's rows are summed at
// once.
bool in_place(const Geometry& g, int64_t reduce, int64_t block, DType dtype, const Machine& m) {
  if (m.isa < Isa::avx512 || (dtype != DType::f32 && dtype != DType::bf16)) return false;
  const PlanarBlock& b = kPlanarBlocks[block];
  if (planar_strided(g, reduce)) return b.rows == 7 && b.vectors == 1;
  if (g.phases != 1 || g.stride_h != 1 || g.stride_w != 1) return false;
  if (dtype == DType::bf16 && (reduce != 1 || g.kernel_h > kMaxRowsAtOnce || block >= kPlanarBlocksOfParts))
    return false;
  return g.out_width > (b.vectors - 1) * m.lanes_f32;
}

struct Count {
  double products = 0, loads = 0, blocks = 0;  // vectors, of one plane and phase
};
Count count_plane(const Geometry& g, const PlanarBlock& b, int64_t tile_h, int64_t lanes) {
  const double down =
      double(ceil_div(g.out_height, tile_h) * ceil_div(std::min(tile_h, g.out_height), b.rows));
  const double across = double(ceil_div(g.out_width, b.vectors * lanes));
  const double inside = rows_inside(g, b.rows), taps = double(g.kernel_h * g.kernel_w) * inside;
  const double parts = double(ceil_div(g.kernel_h, 8));
  Count c;
  c.blocks = down * across * std::max(1.0, parts * inside);
  c.products = down * across * double(b.rows * b.vectors) * taps;
  c.loads = g.stride_h == 1 && g.dil_h == 1 ? down * across * double(b.vectors * g.kernel_w) * inside *
                                                  (parts * double(b.rows - 1) + double(g.kernel_h))
                                            : kStridedLoads * c.products;
  return c;
}

// The same for pixels read in place, where rows outside the image take neither loads nor products.
Count count_in_place(const Geometry& g, const PlanarBlock& b, int64_t lanes) {
  // Of `count` rows from `first` on, `step` apart, those in the image.
  const auto inside = [&](int64_t first, int64_t step, int64_t count) {
    const int64_t a = ceil_div(std::max<int64_t>(0, -first), step),
                  e = ceil_div(std::max<int64_t>(0, g.height - first), step);
    return double(std::max<int64_t>(0, std::min(e, count) - std::min(a, count)));
  };
  double columns = 0, pairs = 0, rows = 0, parts = 0;
  const int64_t width = b.vectors * lanes;
  for (int64_t x = 0; x < g.out_width; x += width) {
    const int64_t first = std::max<int64_t>(0, std::min(x, g.out_width - width)) - g.pad_w;
    int64_t v0, v1;
    clip_taps(first, std::min(first + width, g.out_width - g.pad_w) - 1, g.width, g.kernel_w, g.dil_w, v0,
              v1);
    columns += double((v1 - v0) * b.vectors);
  }
  const int64_t step = planar_row_step(g);
  for (int64_t from = 0; from < std::min(step, g.out_height); ++from) {
    const int64_t count = ceil_div(g.out_height - from, step);
    for (int64_t i = 0; i < count; i += b.rows) {
      const int64_t k = std::max<int64_t>(0, std::min(i, count - b.rows)),
                    block = std::min(b.rows, count - k);
      const int64_t first = from + k * step - g.pad_h;
      int64_t u0, u1;
      clip_taps(first, first + (block - 1) * step, g.height, g.kernel_h, g.dil_h, u0, u1);
      for (int64_t u = u0; u < u1; ++u) pairs += inside(first + u * g.dil_h, step, block);
      const double together = g.dil_h == step ? double(ceil_div(u1 - u0, 8)) : 1;
      parts += std::max(1.0, together);
      rows += inside(first + u0 * step, step, u1 - u0 + block - 1) + (together - 1) * double(block - 1);
    }
  }
  Count c;
  c.products = columns * pairs;
  c.loads = g.dil_h == step ? columns * rows : c.products;
  c.blocks = parts * double(ceil_div(g.out_width, width));
  return c;
}

// The same for a stride of 2 along rows: two vectors of pixels for a pair of tap columns.
Count count_strided(const Geometry& g, const PlanarBlock& b, int64_t lanes) {
  Count c = count_plane(g, b, g.out_height, lanes);
  const double down = double(ceil_div(g.out_height, b.rows)), across = double(ceil_div(g.out_width, lanes));
  c.loads = down * across * double(((b.rows - 1) * g.stride_h + g.kernel_h) * round_up(g.kernel_w, 2));
  return c;
}

// Output rows per task: the window stays in the nearest cache unless its halo would be most of it.
int64_t tile_rows(const Geometry& g, const PlanarBlock& b, int64_t row_bytes) {
  const int64_t halo = std::max<int64_t>(0, g.kernel_h - 1) * g.dil_h + 1;
  const auto fits = [&](int64_t bytes) { return (bytes / row_bytes - halo) / g.stride_h + 1; };
  const int64_t limit =
      std::max({b.rows, fits(kNearBytes), std::min(fits(kFarBytes), 4 * halo / g.stride_h)});
  return round_up(ceil_div(g.out_height, ceil_div(g.out_height, limit)), b.rows);
}

// The problem as one phase whose neighbours may reach a little further.
PlanarSizes sizes_of_one(const Geometry& g, int64_t reduce, const Plan& plan) {
  ForwardProblem f{};
  static_cast<Geometry&>(f) = g;
  f.reduce = reduce;
  PlanarSizes s = planar_sizes({&f, 1, 1}, plan);
  if (g.phases == 1) return s;
  const int64_t reach = g.dil_h + g.dil_w + 2;
  s.elements += reduce * (reach * s.row + (s.rows + reach) * round_up(reach, plan.lanes));
  s.elements += g.phases * (s.out_rows * s.out_pitch + reduce * (g.kernel_h + 1) * (g.kernel_w + 1) * 4);
  return s;
}

// Both fill in a plan for its block, with the cost of one plane.
Count cost_of_window(const Geometry& g, int64_t reduce, const Machine& m, Plan& p) {
  const PlanarBlock& block = kPlanarBlocks[p.block];
  p.lanes = m.lanes_f32;
  p.tile_h = 1;
  p.tile_h = tile_rows(g, block, sizes_of_one(g, reduce, p).row * int64_t(sizeof(float)));
  const Count c = count_plane(g, block, p.tile_h, m.lanes_f32);
  const double once =
      c.products + kLoad * c.loads + kBlock * c.blocks + kKernelTap * double(g.kernel_h * g.kernel_w);
  p.cycles = double(reduce) * once + kPlane;
  return c;
}

Count cost_in_place(const Geometry& g, int64_t reduce, DType dtype, const Machine& m, Plan& p) {
  const PlanarBlock& block = kPlanarBlocks[p.block];
  const bool strided = planar_strided(g, reduce), halves = dtype == DType::bf16;
  const double parts = halves && !strided ? 2 : 1;
  p.lanes = int64_t(parts) * m.lanes_f32;
  p.tile_h = g.out_height;
  const Count c = strided ? count_strided(g, block, m.lanes_f32) : count_in_place(g, block, p.lanes);
  const bool pairs = planar_pairs(g, reduce, p);
  const double planes = pairs ? 0.5 : 1;  // vectors of a pair serve two
  double work = std::max(kPixelProduct * parts * c.products * planes, kPixelLoad * c.loads);
  if (halves) work += planes * (kSplit * c.loads + kRound * c.blocks * double(block.rows));
  const double once =
      work + planes * kPixelBlock * c.blocks + (pairs ? 0.7 * double(g.kernel_h * g.kernel_w) : 0);
  p.cycles = double(reduce) * once + kPixelPlane;
  return c;
}

// Whether vectors of a plane's own elements can be masked, and neighbours be read for neighbouring outputs.
bool is_unit_in_place(const Geometry& g, int64_t reduce, DType dtype, const Machine& m) {
  return m.isa >= Isa::avx512 && (dtype == DType::f32 || dtype == DType::bf16) && g.phases == 1 &&
         g.stride_h == 1 && g.stride_w == 1 && reduce == 1;
}

// Costs of matrix units were fitted beside blocks of rows, not beside sweeps or planes counted through.
bool beside_matrix_units(const Geometry& g, DType dtype, const Machine& m) {
  return m.isa == Isa::amx && dtype == DType::bf16 && g.kernel_h > 3;
}

// In the same terms: sweeps wait for nothing but memory, and a row costs little beyond its products.
Count cost_of_sweeps(const Geometry& g, DType dtype, const Machine& m, Plan& p) {
  const double parts = dtype == DType::bf16 ? 2 : 1;
  p.lanes = int64_t(parts) * m.lanes_f32;
  p.tile_h = g.out_height;
  const Count c = count_in_place(g, {g.out_height, p.swept}, p.lanes);
  const double rows = double(ceil_div(g.out_width, p.swept * p.lanes)) *
                      double(g.out_height + (g.kernel_h - 1) * std::min(g.dil_h, g.out_height));
  const double planes = planar_pairs(g, 1, p) ? 0.5 : 1;
  p.cycles = planes * (kSweptProduct * parts * c.products + kSweptRow * rows) + kPixelPlane;
  return c;
}

// One plane's cycles from its counts, with what tensors take that are not copied with the sums.
double weighed(const Geometry& g, int64_t reduce, DType dtype, const Machine& m, const Plan& p) {
  const Costs& c = costs_on(m);
  if (p.flat || p.strip) return c.planar * p.cycles;
  const double vectors = double(reduce * g.height * ceil_div(g.width, m.lanes_f32)) / double(g.phases) +
                         double(g.out_height * ceil_div(g.out_width, m.lanes_f32));
  const double move = planar_pairs(g, reduce, p) ? c.pixel_move / 2
                      : p.in_place               ? c.pixel_move
                                                 : c.planar_move;
  const double cycles = c.planar * p.cycles + move * vectors;
  return p.in_place && dtype == DType::bf16 && g.phases == 1 ? cycles * c.planar_halves[g.stride_w > 1]
                                                             : cycles;
}

// A vector of outputs, whose columns of taps are moved and joined, for each of the plane.
Count cost_of_flat(const Geometry& g, DType dtype, const Machine& m, Plan& p) {
  p.lanes = m.lanes_f32;
  p.tile_h = g.out_height;
  p.paired = dtype == DType::bf16 && m.bf16_pairs && g.kernel_h > 1;
  const int64_t products = (p.paired ? ceil_div(g.kernel_h, 2) : g.kernel_h) * g.kernel_w;
  const double product = dtype == DType::bf16                       ? kFlatBf16Product
                         : flat_taps_are_held(products, g.kernel_w) ? kFlatProduct
                                                                    : kFlatLoadedTap;
  const double once = product * double(products) + kFlatColumn * double(g.kernel_w - 1) + kFlatVector +
                      kFlatPixel * double(g.out_height * g.width);
  const double vectors = double(ceil_div(g.out_height * g.width, p.lanes));
  Count c;
  c.products = vectors * double(g.kernel_h * g.kernel_w);
  p.cycles = (dtype == DType::bf16 ? kFlatBf16 : kFlatFloats) *
             (vectors * once + kFlatPlane + kFlatTap * double(g.kernel_h * g.kernel_w));
  return c;
}

// The same for strips.
Count cost_of_strip(const Geometry& g, DType dtype, const Machine& m, Plan& p) {
  const PlanarBlock& b = kStripBlocks[p.block];
  p.lanes = m.lanes_f32;
  p.tile_h = g.out_height;
  const bool tall = g.kernel_w == 1, halves = dtype == DType::bf16;
  const int64_t block = tall ? b.rows : b.vectors * p.lanes, outputs = tall ? g.out_height : g.out_width;
  const int64_t across = tall ? ceil_div(g.out_width, b.vectors * p.lanes) : ceil_div(g.out_height, b.rows);
  double pixels = 0;  // that the blocks of a line read
  int64_t blocks = 0;
  for (int64_t i = 0; i < outputs; i += block, ++blocks) {
    const int64_t first = std::max<int64_t>(0, std::min(i, outputs - block));
    const StripRange r = strip_range(first, std::min(block, outputs), tall ? g.pad_h : g.pad_w,
                                     g.kernel_h * g.kernel_w, tall ? g.height : g.width);
    pixels += double(r.last - r.first) + kStripEdge * double(r.last - r.outer + r.inner - r.first);
  }
  const double products = double(b.rows * b.vectors), loads = double(b.rows + 2 * b.vectors);
  Count c;
  c.products = double(across) * pixels * products;
  c.blocks = double(across * blocks);
  const double vectors = double(g.height * g.width) / double(p.lanes);
  p.cycles = (!halves ? kFlatFloats
              : tall  ? kTallBf16
                      : kWideBf16) *
             (kStripProduct * double(across) * pixels * std::max(products, loads) +
              c.blocks * (kStripBlock + (halves ? 3 : 1) * products) + (halves ? 3 * vectors : 0) +
              kStripPlane + double(g.kernel_h * g.kernel_w));
  return c;
}

}  // namespace

int64_t swept_vectors(const Geometry& g, int64_t reduce, DType dtype, const Machine& m) {
  if (!is_unit_in_place(g, reduce, dtype, m)) return 0;
  // Low kernels have few sums to add to while one is waited for.
  if (g.kernel_h < kLeastSweptRows || g.kernel_h > kMaxSweptRows || g.kernel_w > kMaxSweptColumns) return 0;
  const int64_t parts = dtype == DType::bf16 ? 2 : 1, lanes = parts * m.lanes_f32;
  if (beside_matrix_units(g, dtype, m)) return 0;
  // For planes that share a vector blocks of rows take no longer, unless the kernel's rows are apart: each of
  // a block's vectors is then loaded for one product. Of float32, and of narrower planes, blocks still won.
  if (2 * g.out_width <= lanes) return parts == 2 && g.dil_h > 1 && 4 * g.out_width > lanes ? 1 : 0;
  const int64_t blocks = ceil_div(g.out_width, most_swept(g.kernel_h, parts) * lanes);
  const int64_t vectors = ceil_div(g.out_width, std::max<int64_t>(1, blocks) * lanes);
  // A single vector of floats leaves most of a row's time to its other instructions, and tall kernels load
  // their taps for few products.
  if (parts == 1 && (g.kernel_h > kMaxSweptFloatRows || vectors < (g.kernel_h > 4 ? 3 : 2))) return 0;
  if (vectors < 3) return vectors;
  const int64_t last = std::max<int64_t>(0, g.out_width - vectors * lanes);
  const bool whole =
      g.pad_w <= lanes && last + (vectors - 1) * lanes + (g.kernel_w - 1) * g.dil_w - g.pad_w <=
                              g.width;  // all vectors but the first and the last
  return whole ? vectors : 0;
}

SweepSizes sweep_sizes(const Geometry& g, const Plan& plan) {
  const int64_t blocks = ceil_div(g.out_width, plan.swept * plan.lanes);
  const auto bytes = [](int64_t count, size_t size) { return round_up(count * int64_t(size), 64); };
  SweepSizes s{};
  s.columns = bytes(g.kernel_w, sizeof(int64_t));
  s.blocks = bytes(blocks, size_t(kSweepBlockBytes));
  s.masks = bytes(blocks * g.kernel_w * plan.swept, sizeof(uint32_t));
  s.bytes = s.columns + s.blocks + s.masks + bytes(2 * g.kernel_h * g.kernel_w, sizeof(float));
  return s;
}

bool is_flat(const Geometry& g, int64_t reduce, DType dtype, const Machine& m) {
  if (!is_unit_in_place(g, reduce, dtype, m)) return false;
  if (g.kernel_h < 1 || g.kernel_h > kMostFlatTaps || g.kernel_w % 2 == 0 || g.kernel_w > kMostFlatTaps)
    return false;
  if (beside_matrix_units(g, dtype, m) || flat_sizes(g, dtype_size(dtype)).bytes > kMaxScratchBytes)
    return false;
  return g.pad_h >= 0 && g.width == g.out_width && g.pad_w == g.dil_w * (g.kernel_w / 2) &&
         2 * g.pad_w < m.lanes_f32;  // columns of taps are moved from a vector to the one before
}

FlatSizes flat_sizes(const Geometry& g, int64_t element) {
  const int64_t line = kMaskedBytes / element, rows = g.out_height + (g.kernel_h - 1) * g.dil_h;
  const int64_t pixels = g.out_height * g.width, vectors = ceil_div(pixels, kMaskedLanes);
  FlatSizes s{};
  s.rows = std::clamp<int64_t>(rows - g.pad_h, 0, g.height);
  s.image = round_up(g.pad_h * g.width + g.pad_w, line);
  // The sums of a vector more than there are, and of two at a time, read on behind the last row.
  s.window = round_up(s.image + (rows - g.pad_h) * g.width + 4 * kMaskedLanes, line) * element;
  s.products = round_up(g.kernel_h * g.kernel_w * int64_t(sizeof(uint32_t)), kMaskedBytes);
  s.finished = (vectors + 1) * kMaskedBytes;
  // Two vectors at a time take the masks of one more than there are.
  s.bytes = 2 * s.window + s.products + s.finished + (vectors + 1) * g.kernel_w * int64_t(sizeof(FlatMask));
  return s;
}

bool is_strip(const Geometry& g, int64_t reduce, DType dtype, const Machine& m) {
  if (!is_unit_in_place(g, reduce, dtype, m)) return false;
  if (g.dil_h != 1 || g.dil_w != 1 || g.pad_h < 0 || g.pad_w < 0) return false;
  if (m.isa == Isa::amx && dtype == DType::bf16) return false;
  const bool tall = g.kernel_w == 1 && g.kernel_h > 1 && g.pad_w == 0 && g.out_width == g.width;
  const bool wide = g.kernel_h == 1 && g.kernel_w > 1 && g.pad_h == 0 && g.out_height == g.height;
  const StripSizes s = strip_sizes(g, dtype_size(dtype));
  return (tall || wide) && (s.taps + s.plane) * int64_t(sizeof(float)) <= kMaxScratchBytes;
}

StripSizes strip_sizes(const Geometry& g, int64_t element) {
  const bool copied = element < int64_t(sizeof(float));
  return {round_up(g.kernel_h * g.kernel_w + 2 * kStripSlack, kMaskedLanes),
          copied ? round_up(g.height * g.width, kMaskedLanes) + kMaskedLanes : 0};
}

PlanarSizes planar_sizes(const PlanarProblem& p, const Plan& plan) {
  const PlanarBlock& block = kPlanarBlocks[plan.block];
  const int64_t lanes = plan.lanes, count = p.phases_h * p.phases_w;
  const Geometry& g = p.phases[0];
  PlanarSizes s{};
  s.top = g.pad_h, s.left = g.pad_w;
  int64_t columns = 0;
  for (int64_t i = 0; i < count; ++i) {
    s.top = std::max(s.top, p.phases[i].pad_h);
    s.left = std::max(s.left, p.phases[i].pad_w);
    s.taps += p.phases[i].kernel_h * p.phases[i].kernel_w;
  }
  // How far the last tap lies from where the window begins.
  int64_t down = 0, across = 0, widest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Geometry& f = p.phases[i];
    down = std::max(down, s.top - f.pad_h + std::max<int64_t>(0, f.kernel_h - 1) * f.dil_h);
    across = std::max(across, s.left - f.pad_w + std::max<int64_t>(0, f.kernel_w - 1) * f.dil_w);
    columns += f.kernel_w;
    widest = std::max(widest, f.out_width);
  }
  s.out_rows = std::max(plan.tile_h, block.rows);
  s.out_pitch = round_up(std::max(widest, block.vectors * lanes), lanes) + lanes;
  s.rows = (s.out_rows - 1) * g.stride_h + down + 1;
  s.columns = std::max<int64_t>(0, (widest - 1) * g.stride_w + across + 1);
  const int64_t cover = std::max(widest, block.vectors * lanes);
  s.segment = round_up(cover + across / g.stride_w + 1 + lanes, lanes);
  s.row = s.segment * g.stride_w;
  if (s.row / lanes % 2 == 0) s.row += lanes;  // rows begin in different cache sets
  s.taps = round_up(s.taps, lanes);
  s.elements = p.phases[0].reduce * (s.rows * s.row + s.taps) + count * s.out_rows * s.out_pitch +
               columns * int64_t(sizeof(int64_t) / sizeof(float));
  return s;
}

PixelSizes pixel_sizes(const Geometry& g, const Plan& plan) {
  const PlanarBlock& block = kPlanarBlocks[plan.block];
  const int64_t blocks = ceil_div(g.out_width, block.vectors * plan.lanes);
  const auto bytes = [](int64_t count, size_t size) { return round_up(count * int64_t(size), 64); };
  PixelSizes s{};
  if (planar_strided(g, 1)) {
    const int64_t columns = g.kernel_w + 1;  // a pair, or the phase of more taps
    s.columns = g.phases_w * bytes(columns, sizeof(int64_t));
    s.masks = g.phases_w * bytes(blocks * columns, sizeof(uint32_t));
    s.bytes = s.columns + s.masks + bytes(2 * g.kernel_h * g.kernel_w, sizeof(float));
    return s;
  }
  s.columns = bytes(g.kernel_w, sizeof(int64_t));
  s.ranges = bytes(blocks, 2 * sizeof(int64_t));
  s.rows = bytes(ceil_div(g.out_height, block.rows) + planar_row_step(g), 4 * sizeof(int64_t));
  s.masks = bytes(blocks * g.kernel_w * block.vectors, sizeof(uint32_t));
  s.bytes = s.columns + s.ranges + s.rows + s.masks;
  return s;
}

const char* planar_plan(Pass pass, const Geometry& g, int64_t reduce, DType dtype, const Machine& m,
                        Plan& plan) {
  plan.algorithm = Algorithm::planar;
  plan.isa = m.isa;
  plan.lanes = m.lanes_f32;
  if (dtype == DType::f64) return "float64 is summed by channels";
  if (!g.rows) return "the pixels of a row are not neighbours in memory";
  if (pass == Pass::backward_weight) return planar_weight_plan(g, dtype, m, plan);
  plan.tile_w = g.out_width;
  double best = std::numeric_limits<double>::infinity();
  const auto consider = [&](Plan& p, const Count& c) {
    p.cycles = weighed(g, reduce, dtype, m, p);
    if (p.cycles >= best) return;
    best = p.cycles, plan = p;
    plan.flops = 2 * double(p.lanes * g.batch * g.channels * reduce) * c.products;
  };
  const Plan empty = plan;
  for (int64_t i = 0; i < planar_blocks(m.many_registers); ++i) {
    Plan p = empty;
    p.block = i;
    p.in_place = in_place(g, reduce, i, dtype, m);
    if (!p.in_place && plan.in_place) continue;
    consider(p, p.in_place ? cost_in_place(g, reduce, dtype, m, p) : cost_of_window(g, reduce, m, p));
  }
  Plan sweep = empty;
  sweep.in_place = true;
  sweep.swept = swept_vectors(g, reduce, dtype, m);
  if (sweep.swept) {  // by measurement: the counts for blocks and for sweeps are not fitted to each other
    best = std::numeric_limits<double>::infinity();
    consider(sweep, cost_of_sweeps(g, dtype, m, sweep));
  }
  if (is_flat(g, reduce, dtype, m)) {
    Plan flat = empty;
    flat.flat = true;
    consider(flat, cost_of_flat(g, dtype, m, flat));
  }
  for (int64_t i = 0; i < kStripBlockCount && is_strip(g, reduce, dtype, m); ++i) {
    const PlanarBlock& block = kStripBlocks[i];
    if (block.rows > g.out_height || block.vectors > ceil_div(g.out_width, m.lanes_f32)) continue;
    Plan strip = empty;
    strip.strip = true, strip.block = i, strip.in_place = dtype == DType::f32;
    consider(strip, cost_of_strip(g, dtype, m, strip));
  }
  plan.cycles *= double(g.batch * g.channels) * (plan.flat && plan.paired ? kFlatPairs : 1);
  const StripSizes strip = strip_sizes(g, dtype_size(dtype));
  plan.scratch_bytes = plan.flat       ? flat_sizes(g, dtype_size(dtype)).bytes
                       : plan.strip    ? (strip.taps + strip.plane) * int64_t(sizeof(float))
                       : plan.swept    ? sweep_sizes(g, plan).bytes
                       : plan.in_place ? pixel_sizes(g, plan).bytes
                                       : sizes_of_one(g, reduce, plan).elements * int64_t(sizeof(float));
  return plan.scratch_bytes > kMaxScratchBytes ? "its scratch memory would exceed the limit" : nullptr;
}

}  // namespace lkconv::cpu
