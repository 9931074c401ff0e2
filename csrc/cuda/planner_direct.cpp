// Tiles of the direct kernels.
#include "planner_common.h"

namespace lkconv::cuda {
namespace {

constexpr int64_t kSoftSharedBytes = 56
                                     << 10;  // four blocks of this fit an SM of 227 KB, three one of 163 KB

int64_t accumulator_size(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

double direct_rate(DType dtype, bool unit) {
  const double rate = unit ? kMultiplyAddsPerCycle : kStridedPerCycle;
  return dtype == DType::f64 ? rate / 2 : rate;
}

// Where a window lies in shared memory, so that copies as wide as `vector` elements meet it aligned: its
// columns from `lead` on are needed. See direct.cuh.
struct WindowColumns {
  int64_t align, lead;  // lead: of all tiles, or the largest
};

WindowColumns window_columns(int64_t vector, int64_t pad_w, bool same_lead) {
  const int64_t align = std::max<int64_t>(4, vector);
  return {align, same_lead ? (-pad_w) & (align - 1) : align - 1};
}

// Pitch of the window's rows: whole vectors, an odd number of them, and slack for the vector loads of the
// last strip, which reach past the elements they use. `taps` slide over `cols` outputs, or the reverse.
int64_t window_pitch(const WindowColumns& c, int64_t strips, int64_t taps, int64_t strided_cols, bool unit) {
  int64_t pitch = c.lead + strided_cols;
  if (unit) pitch = c.lead / 4 * 4 + (strips - 1) * kStrip + (taps - 1) / 4 * 4 + 16;
  pitch = round_up(std::max(pitch, round_up(c.lead + strided_cols, c.align)), 4);
  return pitch % 8 == 4 ? pitch : pitch + 4;
}

int row_lanes(int64_t cols) { return power_of_two_at_least(cols, 32); }

// Bytes of a copy, of rows of `cols` columns that are cut at multiples of `apart`: a copy lies inside a row
// or outside.
int copy_bytes(const Layout& l, int64_t cols, int64_t apart, DType dtype) {
  if (!l.rows_contiguous) return int(dtype_size(dtype));
  const int64_t bits = l.vector_bytes | (cols | apart) * dtype_size(dtype);
  return int(bits & -bits);
}

struct ForwardTile {
  int64_t channels, h, w, chunk_h, chunk_w;
  int64_t rows_each;         // of a thread
  int64_t channel_multiple;  // channels of an input channel, which stay together
};

// One lead for all tiles and chunks of taps.
bool same_lead(const ForwardTile& t, const ForwardProblem& f) {
  return t.chunk_w >= f.kernel_w && (t.w >= f.out_width || t.w * f.stride_w % 8 == 0);
}

// Shared memory of a tile; fills the parameters that follow from it.
// Bytes of a store from registers, or 0: narrower ones would fill too little of a sector of 32 bytes.
int store_bytes(const ForwardTile& t, const ForwardProblem& f, DType dtype, bool unit, const Layout& output) {
  const bool neighbours = unit || t.rows_each > 1;  // a strip's outputs
  const int bytes = copy_bytes(output, f.out_width, t.w < f.out_width ? t.w : kStrip, dtype);
  return neighbours && output.rows_contiguous && bytes >= 8 ? bytes : 0;
}

struct Layouts {
  const Layout &input, &output;
};

int64_t lay_out(DirectForwardParams& p, const ForwardTile& t, const ForwardProblem& f, DType dtype, bool unit,
                const Layouts& layouts) {
  const Layout& input = layouts.input;
  p.tile_channels = int(t.channels), p.tile_h = int(t.h), p.tile_w = int(t.w);
  p.chunk_h = int(t.chunk_h), p.chunk_w = int(t.chunk_w);
  p.strips = int(ceil_div(t.w, kStrip)), p.row_groups = int(ceil_div(t.h, t.rows_each));
  const int64_t vector = copy_bytes(input, f.width, 8, dtype) / dtype_size(dtype);
  const WindowColumns columns = window_columns(vector, f.pad_w, same_lead(t, f));
  const int64_t cols = (p.strips * kStrip - 1) * f.stride_w + (t.chunk_w - 1) * f.dil_w + 1;
  p.align = int(columns.align);
  p.row_pitch = int(window_pitch(columns, p.strips, t.chunk_w, cols, unit));
  const int64_t rows = std::min(f.height, (t.h - 1) * f.stride_h + (t.chunk_h - 1) * f.dil_h + 1);
  int64_t plane = rows * p.row_pitch;
  if (input.channels_fast)
    plane = round_up(plane, 32) + 4;  // neighbouring channels are stored by neighbouring threads
  p.plane_pitch = int(plane);
  p.planes = int(input.channels_fast ? t.channels : ceil_div(t.channels, f.channel_div));
  p.weight_pitch = int(round_up(t.chunk_w, 4));
  p.window_offset = int(t.channels * t.chunk_h * p.weight_pitch);
  p.store_bytes = store_bytes(t, f, dtype, unit, layouts.output);
  const int64_t outputs = p.store_bytes ? 0 : t.channels * t.h * p.strips * kStrip, staged = p.planes * plane;
  p.output_offset = int(p.window_offset + staged);
  if (t.rows_each > 1) return (p.output_offset + outputs) * accumulator_size(dtype);
  return (p.window_offset + std::max(staged, outputs)) * accumulator_size(dtype);  // one after the other
}

// Outputs of one input channel stay together, or each has a block of its own: then planes are shared evenly.
int64_t whole_inputs(int64_t channels, int64_t multiple) {
  return channels < multiple ? 1 : channels / multiple * multiple;
}

ForwardTile first_tile(const ForwardProblem& f, bool channels_fast, int64_t rows_each) {
  ForwardTile t;
  t.rows_each = rows_each;
  t.channels = channels_fast ? power_of_two_at_least(f.channels, 16) : 1;
  const int64_t widest = channels_fast ? 16 : 32;
  t.w = f.out_width <= widest ? f.out_width : round_up(even_part(f.out_width, widest), kStrip);
  const int64_t strips = ceil_div(t.w, kStrip);
  const int64_t groups = std::max<int64_t>(1, kDirectThreads / (strips * t.channels));
  t.h = std::min(f.out_height, round_up(even_part(f.out_height, groups * rows_each), rows_each));
  t.channel_multiple = channels_fast ? 1 : f.channel_div;
  if (!channels_fast)
    t.channels = whole_inputs(std::clamp<int64_t>(kDirectThreads / (strips * ceil_div(t.h, rows_each)), 1,
                                                  std::min<int64_t>(f.channels, 32)),
                              t.channel_multiple);
  t.chunk_h = std::max<int64_t>(1, f.kernel_h), t.chunk_w = std::max<int64_t>(1, f.kernel_w);
  return t;
}

// The next smaller tile, or false.
bool shrink(ForwardTile& t, bool hard) {
  const auto halve = [](int64_t& n, int64_t least) {
    if (n <= least) return false;
    n = std::max(least, ceil_div(n, 2));
    return true;
  };
  if (halve(t.channels, hard ? 1 : 2)) return t.channels = whole_inputs(t.channels, t.channel_multiple), true;
  if (halve(t.h, 8)) return true;
  if (!hard) return false;
  return halve(t.chunk_h, 8) || halve(t.h, 1) || halve(t.w, kStrip) || halve(t.chunk_w, 8) ||
         halve(t.chunk_h, 1);
}

struct WeightTileChoice {
  int64_t channels, images, h, w, chunk_rows, chunk_groups;
};

int64_t lay_out(DirectWeightParams& p, const WeightTileChoice& t, const WeightProblem& w, DType dtype,
                bool unit, const Layouts& layouts) {
  const Layout& input = layouts.input;
  p.tile_channels = int(t.channels), p.tile_images = int(t.images), p.tile_h = int(t.h), p.tile_w = int(t.w);
  p.chunk_rows = int(t.chunk_rows), p.chunk_groups = int(t.chunk_groups);
  const int64_t taps = t.chunk_groups * kStrip,
                vector = copy_bytes(input, w.width, 8, dtype) / dtype_size(dtype);
  const WindowColumns columns =
      window_columns(vector, w.pad_w, t.w >= w.out_width || t.w * w.stride_w % 8 == 0);
  p.align = int(columns.align);
  p.row_pitch = int(
      window_pitch(columns, t.chunk_groups, t.w, (t.w - 1) * w.stride_w + (taps - 1) * w.dil_w + 1, unit));
  const int64_t rows = std::min(w.height, (t.h - 1) * w.stride_h + (t.chunk_rows - 1) * w.dil_h + 1);
  p.grad_pitch = int(round_up(t.w, 8));
  int64_t plane = rows * p.row_pitch, grad_plane = t.h * p.grad_pitch;
  if (input.channels_fast) plane = round_up(plane, 32) + 4, grad_plane = round_up(grad_plane, 32) + 4;
  p.plane_pitch = int(plane), p.grad_plane = int(grad_plane);
  p.grad_offset = int(t.channels * t.images * plane);
  const int64_t owned = t.channels * t.chunk_rows * t.chunk_groups;
  p.row_workers = int(std::clamp<int64_t>(kDirectThreads / owned, 1, t.images * t.h));
  const int64_t sums = round_up(owned * p.row_workers, 32) * (kStrip + 1);
  return std::max(p.grad_offset + t.channels * t.images * grad_plane, sums) * accumulator_size(dtype);
}

WeightTileChoice first_tile(const WeightProblem& w, bool channels_fast) {
  WeightTileChoice t;
  t.chunk_groups = even_part(ceil_div(w.kernel_w, kStrip), 32);
  t.chunk_rows = even_part(w.kernel_h, kDirectThreads / t.chunk_groups);
  const int64_t spare = kDirectThreads / (t.chunk_groups * t.chunk_rows);
  t.channels = channels_fast ? power_of_two_at_least(std::min(w.channels, spare), 16) : 1;
  while (t.channels > spare) t.channels /= 2;
  const int64_t widest = channels_fast ? 32 : 64;
  t.w = w.out_width <= widest ? w.out_width : round_up(even_part(w.out_width, widest), kStrip);
  t.h = even_part(w.out_height, 64);
  t.images = std::clamp<int64_t>(64 / t.h, 1, w.batch);
  return t;
}

bool shrink(WeightTileChoice& t, bool hard) {
  const auto halve = [](int64_t& n, int64_t least) {
    if (n <= least) return false;
    n = std::max(least, ceil_div(n, 2));
    return true;
  };
  if (halve(t.images, 1) || halve(t.h, 16)) return true;
  if (t.channels > (hard ? 1 : 8)) return t.channels /= 2, true;
  if (!hard) return halve(t.h, 8);
  return halve(t.h, 4) || halve(t.chunk_rows, 8) || halve(t.w, 16) || halve(t.h, 1) ||
         halve(t.chunk_groups, 4) || halve(t.chunk_rows, 1) || halve(t.w, 1) || halve(t.chunk_groups, 1);
}

// Makes the tile fit: first an occupancy that hides latency, if that costs little, then at any price.
template <class Params, class Tile, class Problem>
int64_t fit(Params& p, Tile& t, const Problem& problem, DType dtype, bool unit, const Layouts& layouts,
            const Machine& m) {
  int64_t bytes = lay_out(p, t, problem, dtype, unit, layouts);
  for (const bool hard : {false, true}) {
    const int64_t budget = hard ? m.shared_per_block : std::min(kSoftSharedBytes, m.shared_per_block);
    while (bytes > budget && shrink(t, hard)) bytes = lay_out(p, t, problem, dtype, unit, layouts);
  }
  return bytes;
}

// The kernel of fixed width that takes the problem: see sum_fixed and sum_stride2 in direct.cuh. Else those
// of any width.
int width_class(const ForwardProblem& f, DType dtype) {
  const bool unit = f.stride_w == 1 && f.dil_w == 1;
  const int any = unit ? int(kAnyWidth) : int(kStrided);
  if (dtype == DType::f64 || f.dil_h != 1 || f.dil_w != 1 || f.reduce != 1) return any;
  if ((f.pad_w - f.kernel_w / 2) % 4 != 0) return any;
  if (f.stride_h == 2 && f.stride_w == 2)
    return f.kernel_h == 3 && f.kernel_w == 3 ? int(kThreeStride2) : any;
  if (f.stride_h != 1 || f.stride_w != 1) return any;
  return f.kernel_w == 3 || f.kernel_w == 5 || f.kernel_w == 7 ? int(f.kernel_w) : any;
}

void fill_divisors(DirectForwardParams& p) {
  p.by_strips = divisor_of(p.strips), p.by_row_groups = divisor_of(p.row_groups);
  p.by_tiles_x = divisor_of(p.tiles_x), p.by_tiles_y = divisor_of(p.tiles_y);
  p.by_channel_groups = divisor_of(p.channel_groups), p.by_image_groups = divisor_of(p.image_groups);
  p.by_channel_div = divisor_of(p.channel_div), p.by_weight_pitch = divisor_of(p.weight_pitch);
  p.by_chunk_h = divisor_of(p.chunk_h), p.by_dil_h = divisor_of(p.dil_h);
}

// How the block's threads bring the window in, and outputs back.
void plan_moves(DirectForwardParams& p, const ForwardProblem& f, const Layout& input, DType dtype,
                int threads) {
  p.by_channels = input.channels_fast;
  p.input_lanes = p.tile_channels;
  p.output_lanes = p.by_channels ? p.tile_channels : row_lanes(p.tile_w);
  const int bytes = copy_bytes(input, f.width, 8, dtype);
  const int64_t cols = (p.strips * kStrip - 1) * f.stride_w + (p.chunk_w - 1) * f.dil_w + p.align;
  p.walk = window_walk(std::min(f.width, cols), p.plane_pitch / p.row_pitch, threads, bytes, dtype);
}

}  // namespace

Candidate<ForwardPlan> plan_direct_forward(const ForwardProblem& f, DType dtype, const Layout& input,
                                           const Layout& output, const Machine& m) {
  Candidate<ForwardPlan> c;
  DirectForwardParams& p = c.plan.direct;
  fill_geometry(p, f);
  p.stride_w = int(f.stride_w);
  p.channel_div = int(f.channel_div), p.channel_mul = int(f.channel_mul), p.reduce = int(f.reduce);
  const bool unit = f.stride_w == 1 && f.dil_w == 1;
  int& kernel = c.plan.width_class = width_class(f, dtype);
  ForwardTile t = first_tile(f, input.channels_fast, is_fixed(kernel) ? kFixedRows : 1);
  LaunchShape& launch = c.plan.launch;
  launch.shared_bytes = fit(p, t, f, dtype, unit, {input, output}, m);
  // Little shared memory makes tiles that need more than the kernels of fixed width offer.
  if (is_fixed(kernel) && (t.chunk_h < f.kernel_h || !same_lead(t, f))) {
    kernel = unit ? kAnyWidth : kStrided, t = first_tile(f, input.channels_fast, 1);
    launch.shared_bytes = fit(p, t, f, dtype, unit, {input, output}, m);
  }
  if (launch.shared_bytes > m.shared_per_block) {
    c.reason =
        "one row of its window needs " + std::to_string(launch.shared_bytes) + " bytes of shared memory";
    return c;
  }
  const bool fixed = is_fixed(kernel);
  p.tiles_y = int(ceil_div(f.out_height, t.h)), p.tiles_x = int(ceil_div(f.out_width, t.w));
  p.channel_groups = int(ceil_div(f.channels, t.channels));
  // Several images share a block's prologue and weights, as long as every SM still has many blocks.
  const int64_t tiles = int64_t(p.channel_groups) * p.tiles_y * p.tiles_x;
  p.images_per_block =
      int(std::clamp<int64_t>(f.batch * tiles / (16 * m.sms), 1, std::min<int64_t>(f.batch, 4)));
  p.image_groups = int(ceil_div(f.batch, p.images_per_block));
  // Two strips a thread, where sums do not live from one chunk of taps to the next.
  launch.threads = int(round_up(ceil_div(t.channels * p.row_groups * p.strips, fixed ? 2 : 1), 32));
  launch.blocks = tiles * p.image_groups;
  p.one_chunk = f.reduce == 1 && t.chunk_h >= f.kernel_h && t.chunk_w >= f.kernel_w;
  fill_divisors(p);
  plan_moves(p, f, input, dtype, launch.threads);
  double pairs = 0;
  for (int64_t y = 0; y < f.out_height; y += t.h)
    pairs += double(reaching_rows(f, y, std::min(f.out_height, y + t.h))) * double(t.h);
  const double planes = double(f.batch) * double(f.channels) * double(f.reduce);
  const double macs = planes * pairs * double(p.tiles_x * p.strips * kStrip) * double(f.kernel_w);
  const double staged = double(f.batch * tiles) * double(f.reduce) * double(p.planes) * double(p.plane_pitch);
  const double bytes =
      planes * double(f.height * f.width + f.out_height * f.out_width) * double(dtype_size(dtype));
  c.plan.issued_flops = 2 * macs;
  const double strips = fixed ? double(t.channels * p.row_groups * p.strips) : 0;
  const double found = double(f.batch * tiles) *
                       (launch.threads * kTileInstructions + strips * kStripInstructions) / kIssuedPerCycle;
  const double staging = staged * stage_cycles(p.walk.vector_bytes, p.by_channels, dtype);
  c.plan.cycles =
      std::max(macs / direct_rate(dtype, unit || fixed) + staging + found, bytes / kBytesPerCycle) /
      double(m.sms);
  c.possible = true;
  return c;
}

namespace {

void fill_divisors(DirectWeightParams& p) {
  p.by_splits = divisor_of(p.splits), p.by_chunks = divisor_of(int64_t(p.chunks_h) * p.chunks_w);
  p.by_chunks_w = divisor_of(p.chunks_w), p.by_tiles_x = divisor_of(p.tiles_x);
  p.by_tiles_y = divisor_of(p.tiles_y), p.by_channel_div = divisor_of(p.channel_div);
  p.by_chunk_groups = divisor_of(p.chunk_groups), p.by_chunk_rows = divisor_of(p.chunk_rows);
  p.by_row_workers = divisor_of(p.row_workers), p.by_rows = divisor_of(p.tile_h);
  p.by_last_rows = divisor_of(p.out_height - (p.tiles_y - 1) * p.tile_h);
}

void plan_moves(DirectWeightParams& p, const WeightProblem& w, const Layout& input, const Layout& grad_output,
                DType dtype, int threads) {
  const int64_t cols = (p.tile_w - 1) * w.stride_w + (p.chunk_groups * kStrip - 1) * w.dil_w + p.align;
  p.walk = window_walk(std::min(w.width, cols), p.plane_pitch / p.row_pitch, threads,
                       copy_bytes(input, w.width, 8, dtype), dtype);
  p.grad_walk = window_walk(p.tile_w, p.tile_h, threads,
                            copy_bytes(grad_output, w.out_width, p.tiles_x > 1 ? p.tile_w : 8, dtype), dtype);
}

}  // namespace

Candidate<WeightPlan> plan_direct_weight(const WeightProblem& w, DType dtype, const Layout& input,
                                         const Layout& grad_output, const Machine& m) {
  Candidate<WeightPlan> c;
  DirectWeightParams& p = c.plan.direct;
  fill_geometry(p, w);
  p.stride_w = int(w.stride_w), p.channel_div = int(w.channel_div);
  const bool unit = c.plan.unit = w.stride_w == 1 && w.dil_w == 1;
  WeightTileChoice t = first_tile(w, input.channels_fast);
  LaunchShape& launch = c.plan.launch;
  launch.shared_bytes = fit(p, t, w, dtype, unit, {input, grad_output}, m);
  if (launch.shared_bytes > m.shared_per_block) {
    c.reason =
        "one row of its window needs " + std::to_string(launch.shared_bytes) + " bytes of shared memory";
    return c;
  }
  p.tiles_n = int(ceil_div(w.batch, t.images)), p.tiles_y = int(ceil_div(w.out_height, t.h));
  p.tiles_x = int(ceil_div(w.out_width, t.w)), p.channel_groups = int(ceil_div(w.channels, t.channels));
  p.chunks_h = int(ceil_div(w.kernel_h, t.chunk_rows));
  p.chunks_w = int(ceil_div(ceil_div(w.kernel_w, kStrip), t.chunk_groups));
  p.by_channels = input.channels_fast;
  p.input_lanes = p.output_lanes = p.tile_channels;
  launch.threads = int(round_up(t.channels * t.chunk_rows * t.chunk_groups * p.row_workers, 32));
  const int64_t owners = int64_t(p.channel_groups) * p.chunks_h * p.chunks_w;
  const int64_t tiles = int64_t(p.tiles_n) * p.tiles_y * p.tiles_x;
  // Enough blocks for a few waves of four per SM; each further split costs a pass over the partial sums.
  p.splits = int(std::clamp<int64_t>(ceil_div(12 * m.sms, owners), 1,
                                     std::max<int64_t>(1, std::min<int64_t>(tiles, 256))));
  p.tiles_per_split = int(ceil_div(tiles, p.splits));
  p.splits = int(std::max<int64_t>(1, ceil_div(tiles, std::max<int64_t>(1, p.tiles_per_split))));
  launch.blocks = owners * p.splits;
  c.plan.slots = p.splits;
  fill_divisors(p);
  plan_moves(p, w, input, grad_output, dtype, launch.threads);
  const double planes = double(w.batch) * double(w.channels);
  const double macs =
      planes * double(w.out_height * w.out_width) * double(w.kernel_h) * double(round_up(w.kernel_w, kStrip));
  const double staged =
      double(owners * tiles) * double(t.channels * t.images) * double(p.plane_pitch + p.grad_plane);
  const double bytes =
      planes * double(w.height * w.width + w.out_height * w.out_width) * double(dtype_size(dtype));
  c.plan.issued_flops = 2 * macs;
  const double found = double(owners * tiles * launch.threads) * kTileInstructions / kIssuedPerCycle;
  const double staging = staged * stage_cycles(p.walk.vector_bytes, p.by_channels, dtype);
  c.plan.cycles =
      std::max(macs / direct_rate(dtype, unit) + staging + found, bytes / kBytesPerCycle) / double(m.sms);
  c.possible = true;
  return c;
}

}  // namespace lkconv::cuda
