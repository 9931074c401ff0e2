// Tiles of the Toeplitz kernels.
#include "planner_common.h"

namespace lkconv::cuda {
namespace {

constexpr int64_t kWarpSize = 32;
constexpr int64_t kMaxForwardWarps = kToeplitzThreads / kWarpSize;
constexpr double kFirstWindow =
    0.2;  // of a tile's time: a block's first window overlaps none of its products
// Smaller tiles have fewer warps, which hide less latency: they must be estimated to be this much faster.
constexpr double kWorthFewerWarps = 0.95;
constexpr int64_t kMaxWeightWarps = kToeplitzWeightThreads / kWarpSize;

int64_t depth_of(DType dtype) { return dtype == DType::f32 ? 8 : 16; }

// Bytes per pixel moved by packing a tensor and reading the copy.
double pack_cycles(int64_t elements, DType dtype) {
  return 2.0 * double(elements) * double(dtype_size(dtype)) / kBytesPerCycle;
}

// Copies move whole vectors; a window row holds whole k tiles, so a vector never straddles its end.
int vector_bytes(const Layout& l, bool packed) { return packed ? 16 : l.vector_bytes; }

struct ColumnWork {
  int64_t k_tiles, band_tiles;  // k tiles staged, and (k tile, n tile) pairs on the band
};

// The same arithmetic as the kernel: see toeplitz_tile and multiply_window in toeplitz.cuh.
ColumnWork column_work(const Geometry& g, int64_t x0, int64_t n_tiles, int64_t depth) {
  const int64_t extent = (g.kernel_w - 1) * g.dil_w, cols = std::min(n_tiles * kTileCols, g.out_width - x0);
  const int64_t left = std::max<int64_t>(0, x0 - g.pad_w) / kColumnsAligned * kColumnsAligned;
  const int64_t right = std::min(g.width - 1, x0 - g.pad_w + cols - 1 + extent);
  ColumnWork w{right < left ? 0 : ceil_div(right - left + 1, depth), 0};
  for (int64_t i = 0; i < w.k_tiles; ++i)
    for (int64_t j = 0; j < n_tiles; ++j) {
      const int64_t q = left - x0 + g.pad_w + i * depth - j * kTileCols;
      w.band_tiles += q + depth - 1 >= 0 && q - (kTileCols - 1) <= extent;
    }
  return w;
}

struct ForwardTile {
  int64_t images, h;
  bool image_major;
};

// Rows of zeros above and below the image: a warp runs the kernel rows that any of its output rows needs.
void lay_out_zeros(ToeplitzForwardParams& p, const ForwardTile& t, const ForwardProblem& f, int64_t m_tiles) {
  const int64_t rows = t.image_major ? m_tiles : t.images == 1 ? std::min(t.h, m_tiles * kTileRows) : t.h;
  const int64_t apart = (rows - 1) * f.stride_h;
  const int64_t beyond =
      (f.out_height - 1) * f.stride_h - f.pad_h + (f.kernel_h - 1) * f.dil_h - (f.height - 1);
  p.rows_above = int(std::clamp<int64_t>(f.pad_h, 0, apart));
  p.rows_below = int(std::clamp<int64_t>(beyond, 0, apart));
}

int64_t lay_out(ToeplitzForwardParams& p, const ForwardTile& t, const ForwardProblem& f, DType dtype,
                int64_t m_tiles) {
  const int64_t size = dtype_size(dtype);
  lay_out_zeros(p, t, f, m_tiles);
  p.tile_images = int(t.images), p.tile_h = int(t.h), p.image_major = t.image_major;
  p.input_rows = int(std::min(f.height, (t.h - 1) * f.stride_h + (f.kernel_h - 1) * f.dil_h + 1));
  p.row_pitch = int(conflict_free_bytes(p.window_cols * size) / size);
  const int64_t rows = int64_t(p.rows_above) + p.input_rows + p.rows_below;
  p.image_pitch = int(conflict_free_bytes(rows * p.row_pitch * size) / size);
  p.band_pitch = int(round_up((f.kernel_w - 1) * f.dil_w + 2 * kBandLead + 2, 8));
  const int64_t copies = dtype == DType::f32 ? 1 : 2;
  const int64_t band = f.reduce * f.kernel_h * p.band_pitch * copies + 2 * kBandGuard;
  p.stage_offset = int(round_up(band * size, 16));
  p.stage_bytes = int(t.images * p.image_pitch * size);
  return p.stage_offset + 2 * int64_t(p.stage_bytes);
}

// Kernel-row steps of all M tiles of one tile of rows [y0, y0 + h), counted as the kernel runs them.
int64_t row_steps(const ForwardProblem& f, const ForwardTile& t, int64_t y0, int64_t m_tiles) {
  const int64_t h = std::min(t.h, f.out_height - y0), tiles = ceil_div(t.images * h, kTileRows);
  const int64_t warps = std::min(kMaxForwardWarps, ceil_div(tiles, m_tiles)), each = ceil_div(tiles, warps);
  int64_t steps = 0;
  for (int64_t first = 0; first < tiles; first += each) {
    const int64_t last = std::min(tiles, first + each);
    int64_t low = 0, high = h;
    if (t.image_major)
      low = first * kTileRows / t.images, high = std::min(h, ceil_div(last * kTileRows, t.images));
    else if (t.images == 1)
      low = first * kTileRows, high = std::min(h, last * kTileRows);
    steps += reaching_rows(f, y0 + low, y0 + high) * m_tiles;
  }
  return steps;
}

struct ForwardCost {
  double cycles, mmas;
};

// Instructions of a thread, counted from machine code (docs/performance.md): once a tile, for each k tile of
// a kernel row, once a block beside its band, and around the copies of an image.
double tile_instructions(int64_t m_tiles, int64_t n_tiles) {
  return m_tiles == 1 ? (n_tiles == 2 ? 480 : 520) : (n_tiles == 2 ? 660 : 810);
}
double step_instructions(int64_t m_tiles, int64_t n_tiles) {
  return m_tiles == 1 ? (n_tiles == 2 ? 13 : 21) : (n_tiles == 2 ? 33 : 48);
}
constexpr double kBlockInstructions = 290, kBandInstructions = 13, kImageInstructions = 28;
constexpr double kRoundInstructions = 16, kRoundImageInstructions = 24;  // tf32: beside each copy

int64_t forward_warps(const ForwardTile& t, int64_t m_tiles) {
  return std::min(kMaxForwardWarps, ceil_div(ceil_div(t.images * t.h, kTileRows), m_tiles));
}

// Of all threads, to bring in `rows` rows of `bytes` bytes of every image: see ColumnWalk.
double window_instructions(const ForwardTile& t, int64_t rows, int64_t most_rows, int64_t bytes,
                           int copy_bytes, int64_t threads, bool rounded) {
  const int64_t lanes = std::clamp<int64_t>(ceil_div(bytes, copy_bytes), 1, threads), step = threads / lanes;
  const bool together = t.images == 1 || step >= most_rows;
  const int64_t copies = t.images == 1       ? ceil_div(rows, step)
                         : step >= most_rows ? ceil_div(t.images, step / most_rows)
                                             : t.images * ceil_div(rows, step);
  const double each = kCopyInstructions + (rounded ? kRoundInstructions : 0);
  const double around = kImageInstructions + (rounded ? kRoundImageInstructions : 0);
  return double(threads) * (double(copies) * each + double(together ? 1 : t.images) * around);
}

// Rows of the image under output rows [y0, y0 + h).
int64_t window_rows(const Geometry& g, int64_t y0, int64_t h) {
  const int64_t first = y0 * g.stride_h - g.pad_h;
  const int64_t last = first + (std::min(h, g.out_height - y0) - 1) * g.stride_h + (g.kernel_h - 1) * g.dil_h;
  return std::max<int64_t>(0, std::min(g.height - 1, last) - std::max<int64_t>(0, first) + 1);
}

ForwardCost forward_cost(const ForwardProblem& f, const ForwardTile& t, DType dtype, int64_t m_tiles,
                         int64_t n_tiles, int copy_bytes) {
  const int64_t threads = forward_warps(t, m_tiles) * kWarpSize;
  const int64_t most_rows = std::min(f.height, (t.h - 1) * f.stride_h + (f.kernel_h - 1) * f.dil_h + 1);
  int64_t steps = 0, tiles = 0, staged = 0;
  for (int64_t y0 = 0; y0 < f.out_height; y0 += t.h, ++tiles)
    steps += row_steps(f, t, y0, m_tiles), staged += window_rows(f, y0, t.h);
  ColumnWork columns{0, 0};
  double copying = 0;
  for (int64_t x0 = 0; x0 < f.out_width; x0 += n_tiles * kTileCols) {
    const ColumnWork w = column_work(f, x0, n_tiles, depth_of(dtype));
    columns.k_tiles += w.k_tiles, columns.band_tiles += w.band_tiles;
    copying += double(tiles) * window_instructions(t, staged / tiles, most_rows,
                                                   w.k_tiles * depth_of(dtype) * dtype_size(dtype),
                                                   copy_bytes, threads, dtype == DType::f32);
  }
  const double repeats = double(ceil_div(f.batch, t.images)) * double(f.channels) * double(f.reduce);
  const double mmas = repeats * double(steps) * double(columns.band_tiles);
  // ldmatrix moves 512 bytes per M tile and k tile, the band 128 bytes per n tile and warp; copies move every
  // byte once, and for tf32 twice more.
  const double fragments =
      double(steps) * double(columns.k_tiles) * (4 + double(n_tiles + 1) / double(m_tiles));
  const double copied =
      double(t.images * staged * columns.k_tiles * depth_of(dtype) * dtype_size(dtype)) / 128;
  const double loads = repeats * (fragments + copied * (dtype == DType::f32 ? 3 : 1));
  const double column_tiles = double(ceil_div(f.out_width, n_tiles * kTileCols));
  const double issued =
      repeats *
      (copying + double(threads) * double(tiles) * column_tiles * tile_instructions(m_tiles, n_tiles) +
       double(kWarpSize * steps) / double(m_tiles) * double(columns.k_tiles) *
           step_instructions(m_tiles, n_tiles));
  return {std::max({mmas * kMmaCycles, loads * kSharedCycles, issued / kIssuedPerCycle}), mmas};
}

ForwardTile fit(ToeplitzForwardParams& p, ForwardTile t, const ForwardProblem& f, DType dtype,
                int64_t m_tiles, int64_t budget) {
  while (lay_out(p, t, f, dtype, m_tiles) > budget) {
    if (t.images > (t.image_major ? kTileRows : 1))
      --t.images;
    else if (t.h > 1)
      t.h = even_part(f.out_height, t.h - 1);
    else
      break;
  }
  return t;
}

// Tiles that a block walks over, so that copies overlap products and the band is built once: as many as keep
// the busiest SM's time least. It holds two blocks at once; one that is left alone is taken to run at three
// quarters of their speed together. `block`: what a block costs beside its tiles, in tiles.
int64_t tiles_per_block(int64_t tiles, int64_t columns, double block, const Machine& m) {
  int64_t best = 1;
  double least = 0;
  for (int64_t parts = 1; parts <= std::min<int64_t>(tiles, 64); ++parts) {
    const int64_t each = ceil_div(tiles, parts), blocks = columns * ceil_div(tiles, each);
    const int64_t busiest = ceil_div(blocks, m.sms);
    const double time = (double(busiest) + double(busiest % 2) / 3) * (double(each) + block);
    if (least == 0 || time < least) best = each, least = time;
  }
  return best;
}

void fill_divisors(ToeplitzForwardParams& p, int threads) {
  p.by_tiles_x = divisor_of(p.tiles_x), p.by_blocks_per_channel = divisor_of(p.blocks_per_channel);
  p.by_tiles_y = divisor_of(p.tiles_y), p.by_reduce = divisor_of(p.reduce);
  p.by_channel_div = divisor_of(p.channel_div);
  p.by_dil_h = divisor_of(p.dil_h), p.by_dil_w = divisor_of(p.dil_w);
  const int last_rows = p.out_height - (p.tiles_y - 1) * p.tile_h;
  p.by_fast = divisor_of(p.image_major ? p.tile_images : p.tile_h);
  p.by_last_fast = divisor_of(p.image_major ? p.tile_images : last_rows);
  p.by_outside = divisor_of(std::max(1, p.rows_above + p.rows_below));
  p.by_warps = divisor_of(threads / kWarpSize);
}

// Whether the kernel may store two columns as one: then no row may end between them.
bool pairs_aligned(const Layout& output, int64_t out_width, DType dtype) {
  return output.rows_contiguous && out_width % 2 == 0 && output.vector_bytes >= 2 * dtype_size(dtype);
}

}  // namespace

Candidate<ForwardPlan> plan_toeplitz_forward(const ForwardProblem& f, DType dtype, const Layout& input,
                                             const Layout& output, const Switches& s, const Machine& m) {
  Candidate<ForwardPlan> c;
  c.reason = toeplitz_declines(f, dtype, s);
  if (!c.reason.empty()) return c;
  ForwardPlan& plan = c.plan;
  ToeplitzForwardParams& p = plan.toeplitz;
  fill_geometry(p, f);
  p.channel_div = int(f.channel_div), p.channel_mul = int(f.channel_mul), p.reduce = int(f.reduce);
  plan.pack_input = !input.rows_contiguous, plan.pack_output = output.channels_fast;
  const int64_t n_tiles = f.out_width <= 16 ? 2 : 4;
  p.tiles_x = int(ceil_div(f.out_width, n_tiles * kTileCols));
  for (int64_t x = 0; x < p.tiles_x; ++x)
    p.window_cols = std::max<int>(
        p.window_cols,
        int(depth_of(dtype) * column_work(f, x * n_tiles * kTileCols, n_tiles, depth_of(dtype)).k_tiles));
  p.window_cols = std::max(p.window_cols, 16);
  // A warp with four M tiles re-uses its band fragments four times, but small problems need the warps more.
  const int64_t m_tiles_total = f.channels * p.tiles_x * ceil_div(f.batch * f.out_height, kTileRows);
  const int64_t m_tiles = m_tiles_total >= 4 * 8 * m.sms ? 4 : 1;
  // M over rows first fills tiles whatever the batch; M over images first wastes no rows above or below the
  // image.
  const int64_t rows = kMaxForwardWarps * m_tiles * kTileRows;
  ForwardTile by_rows{1, even_part(f.out_height, rows), false};
  by_rows.images = std::clamp<int64_t>(rows / by_rows.h, 1, f.batch);
  ForwardTile by_images{kTileRows, even_part(f.out_height, rows / kTileRows), true};
  ForwardTile chosen{};
  ForwardCost cost{};
  const int copied_bytes = vector_bytes(input, plan.pack_input);
  for (const ForwardTile& start : {by_rows, by_images}) {
    if (start.image_major && f.batch < kTileRows * 3 / 4) continue;
    ForwardTile t =
        fit(p, start, f, dtype, m_tiles, std::min(m.shared_per_block, m.shared_per_sm / 2 - 1024));
    if (lay_out(p, t, f, dtype, m_tiles) > m.shared_per_block)
      t = fit(p, start, f, dtype, m_tiles, m.shared_per_block);
    if (lay_out(p, t, f, dtype, m_tiles) > m.shared_per_block) continue;
    // Somewhat fewer images may fill the M tiles of the warps better.
    for (int n = 0; n < (start.image_major ? 1 : 4) && t.images > 0; ++n, --t.images) {
      const ForwardCost now = forward_cost(f, t, dtype, m_tiles, n_tiles, copied_bytes);
      if (chosen.images == 0 || now.cycles < kWorthFewerWarps * cost.cycles) chosen = t, cost = now;
    }
  }
  if (chosen.images == 0) {
    c.reason = "its kernel rows and window need more than " + std::to_string(m.shared_per_block) +
               " bytes of shared memory";
    return c;
  }
  plan.launch.shared_bytes = lay_out(p, chosen, f, dtype, m_tiles);
  plan.m_tiles = int(m_tiles), plan.n_tiles = int(n_tiles);
  p.tiles_n = int(ceil_div(f.batch, chosen.images)), p.tiles_y = int(ceil_div(f.out_height, chosen.h));
  const int64_t columns = f.channels * p.tiles_x, threads = forward_warps(chosen, m_tiles) * kWarpSize;
  const double band = double(f.reduce * f.kernel_h * p.band_pitch * (dtype == DType::f32 ? 1 : 2));
  const double block = kBlockInstructions + band / double(threads) * kBandInstructions;
  const int64_t tiles = int64_t(p.tiles_n) * p.tiles_y;
  const double tile = cost.cycles * kIssuedPerCycle / double(columns * tiles * threads);
  p.tiles_per_block = int(tiles_per_block(tiles, columns, block / tile + kFirstWindow, m));
  p.blocks_per_channel = int(ceil_div(tiles, p.tiles_per_block));
  plan.launch.blocks = columns * p.blocks_per_channel;
  plan.launch.threads = int(threads);
  fill_divisors(p, plan.launch.threads);
  p.walk = window_walk(p.window_cols, p.input_rows, plan.launch.threads, copied_bytes, dtype);
  p.store_pairs = plan.pack_output || pairs_aligned(output, f.out_width, dtype);
  const int64_t in = f.batch * f.channels * f.reduce * f.height * f.width,
                out = f.batch * f.channels * f.out_height * f.out_width;
  double memory = double(in + out) * double(dtype_size(dtype)) / kBytesPerCycle;
  double packing = 0;
  if (plan.pack_input) packing += pack_cycles(in, dtype);
  if (plan.pack_output) packing += pack_cycles(out, dtype);
  plan.issued_flops = cost.mmas * 2 * 16 * 8 * double(depth_of(dtype));
  plan.cycles = (std::max(cost.cycles, memory) + packing) / double(m.sms);
  c.possible = true;
  return c;
}

namespace {

struct WeightTileChoice {
  int64_t images, h, w;
};

int64_t lay_out(ToeplitzWeightParams& p, const WeightTileChoice& t, const WeightProblem& w, DType dtype,
                int64_t rows_owned, int64_t warps, int64_t diagonals) {
  const int64_t size = dtype_size(dtype);
  p.tile_images = int(t.images), p.tile_h = int(t.h), p.tile_w = int(t.w);
  int64_t window_cols = 16;
  for (int64_t x0 = 0; x0 < w.out_width; x0 += t.w) {
    const int64_t cols = std::min(t.w, w.out_width - x0);
    const int64_t left = std::max<int64_t>(0, x0 - w.pad_w) / kTileRows * kTileRows;
    const int64_t right = std::min(w.width - 1, x0 + cols - 1 - w.pad_w + (w.kernel_w - 1) * w.dil_w);
    window_cols = std::max(window_cols, round_up(right - left + 1, kTileRows));
  }
  const int64_t input_rows =
      std::min(w.height, (t.h - 1) * w.stride_h + (std::min(rows_owned, w.kernel_h) - 1) * w.dil_h + 1);
  // tf32 fragments are loaded by elements: rows 8 banks apart keep four rows of eight columns apart.
  const auto pitch = [&](int64_t cols) {
    if (size == 2) return conflict_free_bytes(cols * size) / size;
    return cols + (40 - cols % 32) % 32;  // the next number that is 8 modulo 32
  };
  p.window_cols = int(window_cols);
  p.row_pitch = int(pitch(window_cols)), p.grad_pitch = int(pitch(round_up(t.w, kTileCols)));
  p.image_pitch = int(input_rows * p.row_pitch), p.grad_image_pitch = int(t.h * p.grad_pitch);
  p.table_offset = 0;
  p.zero_offset = int(round_up(t.images * t.h, kTileRows) * 16);
  p.stage_offset = int(p.zero_offset + round_up(std::max(window_cols, t.w) * size, 16));
  p.grad_offset = int(t.images * p.image_pitch * size);
  p.stage_bytes = int(p.grad_offset + t.images * p.grad_image_pitch * size);
  const int64_t sums = warps * diagonals * kTileRows * kTileCols * 4;
  return p.stage_offset + std::max(2 * int64_t(p.stage_bytes), sums);
}

void fill_divisors(ToeplitzWeightParams& p) {
  p.by_splits = divisor_of(p.splits), p.by_diagonal_chunks = divisor_of(p.diagonal_chunks);
  p.by_row_chunks = divisor_of(p.row_chunks), p.by_tiles_x = divisor_of(p.tiles_x);
  p.by_tiles_y = divisor_of(p.tiles_y), p.by_channel_div = divisor_of(p.channel_div);
  p.by_row_groups = divisor_of(p.row_groups), p.by_rows = divisor_of(p.tile_h);
  p.by_last_rows = divisor_of(p.out_height - (p.tiles_y - 1) * p.tile_h);
}

double weight_mmas(const WeightProblem& w, const ToeplitzWeightParams& p, DType dtype, int64_t diagonals) {
  int64_t band = 0;
  for (int64_t x0 = 0; x0 < w.out_width; x0 += p.tile_w) {
    const int64_t cols = std::min<int64_t>(p.tile_w, w.out_width - x0), n_tiles = ceil_div(cols, kTileCols);
    const int64_t left = std::max<int64_t>(0, x0 - w.pad_w) / kTileRows * kTileRows;
    const int64_t right = std::min(w.width - 1, x0 + cols - 1 - w.pad_w + (w.kernel_w - 1) * w.dil_w);
    for (int64_t i = 0; left + i * kTileRows <= right; ++i)
      for (int64_t j = 0; j < n_tiles; ++j) {
        const int64_t d = (left - x0) / kTileCols + 2 * i - j - p.first_diagonal;
        band += d >= 0 && d < diagonals;
      }
  }
  const int64_t steps = ceil_div(int64_t(p.tile_images) * p.tile_h, depth_of(dtype));
  return double(band) * double(steps) * double(p.tiles_n) * double(p.tiles_y) * double(w.channels);
}

}  // namespace

Candidate<WeightPlan> plan_toeplitz_weight(const WeightProblem& w, DType dtype, const Layout& input,
                                           const Layout& grad_output, const Switches& s, const Machine& m) {
  Candidate<WeightPlan> c;
  c.reason = toeplitz_declines(w, dtype, s);
  if (!c.reason.empty()) return c;
  WeightPlan& plan = c.plan;
  ToeplitzWeightParams& p = plan.toeplitz;
  fill_geometry(p, w);
  p.channel_div = int(w.channel_div);
  plan.pack_input = !input.rows_contiguous, plan.pack_grad = !grad_output.rows_contiguous;
  const auto floor_div = [](int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); };
  const int64_t extent = (w.kernel_w - 1) * w.dil_w;
  p.first_diagonal = int(-floor_div(w.pad_w + kTileRows - 1, kTileCols));
  const int64_t count = floor_div(extent - w.pad_w + kTileCols - 1, kTileCols) - p.first_diagonal + 1;
  const int64_t diagonals = plan.diagonals = count <= 4 ? 4 : 7, rows_each = diagonals == 4 ? 4 : 2;
  p.diagonal_chunks = int(ceil_div(count, diagonals));
  // Warps: every kernel row of the channel in one block if that takes no more than 16, the rest share the
  // depth.
  const int64_t groups = ceil_div(w.kernel_h, rows_each);
  p.row_groups = int(even_part(groups, kMaxWeightWarps));
  p.row_chunks = int(ceil_div(groups, p.row_groups));
  p.workers = int(std::max<int64_t>(1, kMaxWeightWarps / 2 / p.row_groups));
  const int64_t warps = int64_t(p.row_groups) * p.workers;
  WeightTileChoice t;
  t.w = std::min(round_up(w.out_width, kTileRows), int64_t(128));
  t.h = std::min(w.out_height, int64_t(128));
  t.images = std::clamp<int64_t>(256 / t.h, 1, w.batch);
  const auto bytes = [&] {
    return lay_out(p, t, w, dtype, int64_t(p.row_groups) * rows_each, warps, diagonals);
  };
  while (bytes() > std::min(m.shared_per_block, m.shared_per_sm / 2 - 1024) && t.images > 1)
    t.images = ceil_div(t.images, 2);
  while (bytes() > m.shared_per_block && (t.h > 8 || t.w > 32)) {
    if (t.h > 8)
      t.h = ceil_div(t.h, 2);
    else
      t.w = round_up(t.w / 2, kTileRows);
  }
  plan.launch.shared_bytes = bytes();
  if (plan.launch.shared_bytes > m.shared_per_block) {
    c.reason = "its windows need " + std::to_string(plan.launch.shared_bytes) + " bytes of shared memory";
    return c;
  }
  p.tiles_n = int(ceil_div(w.batch, t.images)), p.tiles_y = int(ceil_div(w.out_height, t.h));
  p.tiles_x = int(ceil_div(w.out_width, t.w));
  const int64_t owners = w.channels * p.row_chunks * p.diagonal_chunks;
  const int64_t tiles = int64_t(p.tiles_n) * p.tiles_y * p.tiles_x;
  p.splits = int(std::clamp<int64_t>(ceil_div(4 * m.sms, owners), 1,
                                     std::max<int64_t>(1, std::min<int64_t>(tiles, 64))));
  p.tiles_per_split = int(ceil_div(tiles, p.splits));
  p.splits = int(std::max<int64_t>(1, ceil_div(tiles, std::max<int64_t>(1, p.tiles_per_split))));
  plan.slots = int64_t(p.splits) * p.workers * p.diagonal_chunks;
  plan.launch.blocks = owners * p.splits;
  plan.launch.threads = int(warps * kWarpSize);
  fill_divisors(p);
  p.walk = window_walk(p.window_cols, p.image_pitch / p.row_pitch, plan.launch.threads,
                       vector_bytes(input, plan.pack_input), dtype);
  p.grad_walk = window_walk(std::min(t.w, round_up(w.out_width, kTileCols)), t.h, plan.launch.threads,
                            vector_bytes(grad_output, plan.pack_grad), dtype);
  const double mmas = weight_mmas(w, p, dtype, p.diagonal_chunks * diagonals) * double(groups * rows_each);
  const int64_t in = w.batch * w.channels * w.height * w.width,
                out = w.batch * w.channels * w.out_height * w.out_width;
  double memory = double(in + out) * double(dtype_size(dtype)) * double(p.row_chunks * p.diagonal_chunks) /
                  kBytesPerCycle;
  double packing = 0;
  if (plan.pack_input) packing += pack_cycles(in, dtype);
  if (plan.pack_grad) packing += pack_cycles(out, dtype);
  plan.issued_flops = mmas * 2 * 16 * 8 * double(depth_of(dtype));
  plan.cycles = (std::max(mmas * kMmaCycles, memory) + packing) / double(m.sms);
  c.possible = true;
  return c;
}

}  // namespace lkconv::cuda
