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

// Pitch of the window's rows: whole vectors, an odd number of them, and slack for the vector loads of the
// last strip, which reach past the taps they use.
int64_t window_pitch(int64_t strips, int64_t kernel_w, int64_t stride_w, int64_t dil_w, bool unit) {
  int64_t pitch = unit ? (strips - 1) * kStrip + kernel_w / 4 * 4 + kStrip + 4
                       : (strips * kStrip - 1) * stride_w + (kernel_w - 1) * dil_w + 1;
  pitch = round_up(std::max<int64_t>(pitch, 4), 4);
  return pitch % 8 == 4 ? pitch : pitch + 4;
}

int row_lanes(int64_t cols) { return power_of_two_at_least(cols, 32); }

struct ForwardTile {
  int64_t channels, h, w, chunk_h, chunk_w;
};

// Shared memory of a tile; fills the parameters that follow from it.
int64_t lay_out(DirectForwardParams& p, const ForwardTile& t, const ForwardProblem& f, DType dtype, bool unit,
                bool channels_fast) {
  p.tile_channels = int(t.channels), p.tile_h = int(t.h), p.tile_w = int(t.w);
  p.chunk_h = int(t.chunk_h), p.chunk_w = int(t.chunk_w);
  p.strips = int(ceil_div(t.w, kStrip));
  p.row_pitch = int(window_pitch(p.strips, t.chunk_w, f.stride_w, f.dil_w, unit));
  const int64_t rows = std::min(f.height, (t.h - 1) * f.stride_h + (t.chunk_h - 1) * f.dil_h + 1);
  int64_t plane = rows * p.row_pitch;
  if (channels_fast)
    plane = round_up(plane, 32) + 4;  // neighbouring channels are stored by neighbouring threads
  p.plane_pitch = int(plane);
  p.window_offset = int(t.channels * t.chunk_h * round_up(t.chunk_w, 4));
  const int64_t outputs = t.channels * t.h * p.strips * kStrip;
  return (p.window_offset + std::max(t.channels * plane, outputs)) * accumulator_size(dtype);
}

ForwardTile first_tile(const ForwardProblem& f, bool channels_fast) {
  ForwardTile t;
  t.channels = channels_fast ? power_of_two_at_least(f.channels, 16) : 1;
  t.w = even_part(f.out_width, channels_fast ? 16 : 32);
  const int64_t strips = ceil_div(t.w, kStrip);
  t.h = even_part(f.out_height, std::max<int64_t>(1, kDirectThreads / (strips * t.channels)));
  if (!channels_fast)
    t.channels = std::clamp<int64_t>(kDirectThreads / (strips * t.h), 1, std::min<int64_t>(f.channels, 32));
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
  if (halve(t.channels, hard ? 1 : 2)) return true;
  if (halve(t.h, 8)) return true;
  if (!hard) return false;
  return halve(t.chunk_h, 8) || halve(t.h, 1) || halve(t.w, kStrip) || halve(t.chunk_w, 8) ||
         halve(t.chunk_h, 1);
}

struct WeightTileChoice {
  int64_t channels, images, h, w, chunk_rows, chunk_groups;
};

int64_t lay_out(DirectWeightParams& p, const WeightTileChoice& t, const WeightProblem& w, DType dtype,
                bool unit, bool channels_fast) {
  p.tile_channels = int(t.channels), p.tile_images = int(t.images), p.tile_h = int(t.h), p.tile_w = int(t.w);
  p.chunk_rows = int(t.chunk_rows), p.chunk_groups = int(t.chunk_groups);
  const int64_t taps = t.chunk_groups * kStrip;
  int64_t pitch = unit ? (t.chunk_groups - 1) * kStrip + t.w / 4 * 4 + kStrip + 4
                       : (t.w - 1) * w.stride_w + (taps - 1) * w.dil_w + 1;
  pitch = round_up(pitch, 4);
  p.row_pitch = int(pitch % 8 == 4 ? pitch : pitch + 4);
  const int64_t rows = std::min(w.height, (t.h - 1) * w.stride_h + (t.chunk_rows - 1) * w.dil_h + 1);
  p.grad_pitch = int(round_up(t.w, 4));
  int64_t plane = rows * p.row_pitch, grad_plane = t.h * p.grad_pitch;
  if (channels_fast) plane = round_up(plane, 32) + 4, grad_plane = round_up(grad_plane, 32) + 4;
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
  t.w = even_part(w.out_width, channels_fast ? 32 : 64);
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
int64_t fit(Params& p, Tile& t, const Problem& problem, DType dtype, bool unit, bool channels_fast,
            const Machine& m) {
  int64_t bytes = lay_out(p, t, problem, dtype, unit, channels_fast);
  for (const bool hard : {false, true}) {
    const int64_t budget = hard ? m.shared_per_block : std::min(kSoftSharedBytes, m.shared_per_block);
    while (bytes > budget && shrink(t, hard)) bytes = lay_out(p, t, problem, dtype, unit, channels_fast);
  }
  return bytes;
}

}  // namespace

Candidate<ForwardPlan> plan_direct_forward(const ForwardProblem& f, DType dtype, const Layout& input,
                                           const Machine& m) {
  Candidate<ForwardPlan> c;
  DirectForwardParams& p = c.plan.direct;
  fill_geometry(p, f);
  p.stride_w = int(f.stride_w);
  p.channel_div = int(f.channel_div), p.channel_mul = int(f.channel_mul), p.reduce = int(f.reduce);
  const bool unit = f.stride_w == 1 && f.dil_w == 1;
  ForwardTile t = first_tile(f, input.channels_fast);
  LaunchShape& launch = c.plan.launch;
  launch.shared_bytes = fit(p, t, f, dtype, unit, input.channels_fast, m);
  if (launch.shared_bytes > m.shared_per_block) {
    c.reason =
        "one row of its window needs " + std::to_string(launch.shared_bytes) + " bytes of shared memory";
    return c;
  }
  const bool fixed = unit && t.chunk_w == f.kernel_w && dtype != DType::f64 &&
                     (f.kernel_w == 3 || f.kernel_w == 5 || f.kernel_w == 7);
  c.plan.width_class = !unit ? kStrided : fixed ? int(f.kernel_w) : kAnyWidth;
  p.tiles_y = int(ceil_div(f.out_height, t.h)), p.tiles_x = int(ceil_div(f.out_width, t.w));
  p.channel_groups = int(ceil_div(f.channels, t.channels));
  p.by_channels = input.channels_fast;
  p.input_lanes =
      p.by_channels ? p.tile_channels : row_lanes((t.w - 1) * f.stride_w + (t.chunk_w - 1) * f.dil_w + 1);
  p.output_lanes = p.by_channels ? p.tile_channels : row_lanes(t.w);
  launch.threads = int(round_up(t.channels * t.h * p.strips, 32));
  launch.blocks = f.batch * p.channel_groups * p.tiles_y * p.tiles_x;
  double pairs = 0;
  for (int64_t y = 0; y < f.out_height; y += t.h)
    pairs += double(reaching_rows(f, y, std::min(f.out_height, y + t.h))) * double(t.h);
  const double planes = double(f.batch) * double(f.channels) * double(f.reduce);
  const double macs = planes * pairs * double(p.tiles_x * p.strips * kStrip) * double(f.kernel_w);
  const double staged = double(launch.blocks) * double(f.reduce) * double(t.channels) * double(p.plane_pitch);
  const double bytes =
      planes * double(f.height * f.width + f.out_height * f.out_width) * double(dtype_size(dtype));
  c.plan.issued_flops = 2 * macs;
  c.plan.cycles = std::max(macs / direct_rate(dtype, unit) + staged * kStageCycles, bytes / kBytesPerCycle) /
                  double(m.sms);
  c.possible = true;
  return c;
}

Candidate<WeightPlan> plan_direct_weight(const WeightProblem& w, DType dtype, const Layout& input,
                                         const Machine& m) {
  Candidate<WeightPlan> c;
  DirectWeightParams& p = c.plan.direct;
  fill_geometry(p, w);
  p.stride_w = int(w.stride_w), p.channel_div = int(w.channel_div);
  const bool unit = c.plan.unit = w.stride_w == 1 && w.dil_w == 1;
  WeightTileChoice t = first_tile(w, input.channels_fast);
  LaunchShape& launch = c.plan.launch;
  launch.shared_bytes = fit(p, t, w, dtype, unit, input.channels_fast, m);
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
  p.input_lanes = p.by_channels ? p.tile_channels : 32;
  p.output_lanes = p.by_channels ? p.tile_channels : row_lanes(t.w);
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
  const double planes = double(w.batch) * double(w.channels);
  const double macs =
      planes * double(w.out_height * w.out_width) * double(w.kernel_h) * double(round_up(w.kernel_w, kStrip));
  const double staged =
      double(owners * tiles) * double(t.channels * t.images) * double(p.plane_pitch + p.grad_plane);
  const double bytes =
      planes * double(w.height * w.width + w.out_height * w.out_width) * double(dtype_size(dtype));
  c.plan.issued_flops = 2 * macs;
  c.plan.cycles = std::max(macs / direct_rate(dtype, unit) + staged * kStageCycles, bytes / kBytesPerCycle) /
                  double(m.sms);
  c.possible = true;
  return c;
}

}  // namespace lkconv::cuda
