#include "planner.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "fft_plan.h"
#include "planar_plan.h"
#include "toeplitz_plan.h"

namespace lkconv::cpu {
namespace {

constexpr int64_t kWindowBytes =
    384 << 10;  // of a direct tile's input window: well inside a second-level cache
constexpr int64_t kMaxTileWidth = 128;
constexpr int64_t kMaxWeightSpan = 4;
constexpr int64_t kKernelBytes = 256 << 10;     // of the groups that a task reads in place together
constexpr int64_t kWideKernelBytes = 24 << 10;  // where a block of outputs takes too long to wait for memory
constexpr int64_t kNearRowsBytes = 32 << 10;    // of rows read in place again and again
constexpr int64_t kNearBytes = 12 << 20;        // of tensors whose rows are kept there
constexpr int64_t kNearSpan = 2;
constexpr int64_t kMaxAtenTaps = 25;
constexpr int64_t kMaxAtenPhaseTaps = 36;  // taps of the first phase times phases: at most 5x5 at stride 2
constexpr double kAtenMargin = 1.1;
constexpr int64_t kAtenFarBytes = 6 << 20;
constexpr double kLeastFftProducts = 16;  // a transform's rounding errors exceed those of so short a sum
constexpr int64_t kBatchPixels = 224;     // outputs computed between loading and storing
// Operations on a vector of bfloat16 read in place; columns of taps split each pixel once.
constexpr double kPlanesPixel[2] = {14, 6};  // a pixel of a transposed group of floats, and of bfloat16 ...
constexpr double kPlanesWeightPixel = 22;    // ... and for backward_weight
constexpr double kPairedWideTap = 0.8;
constexpr double kPairPixel = 4;  // one vector of pixels to one of pairs with the row below
constexpr double kSplitPixel = 2.5, kSplitColumn = 1, kRoundSums = 14;
// Pixels this far apart share one set of a first-level cache, which holds fewer than a block of outputs
// reads: each tap costs so many times as much, in the passes that write a tensor and in backward_weight.
constexpr int64_t kLineBytes = 64, kNearSets = 64, kNearWays = 8, kFewTaps = 16, kManyTaps = 49;
constexpr int64_t kGatheredBytes = 64 << 10;  // of a group's pixels that are copied
// Of the input's and the output's planes of a group; in backward_weight.
constexpr int64_t kPlanesBytes[2] = {64 << 10, 128 << 10};
constexpr int64_t kAliasedBytes = 4096;
constexpr double kAliasedTap[2] = {1.5, 4.5};

// Cycles, fitted to timings of the layers of real models. Pairs are channels_last, contiguous.
struct Costs {
  double tap, strided_tap;  // one vector multiply-add of a direct tile; strided ones load a pixel for each
  double wide_tap;          // the same of rows in place that are wider than registers
  double move[2];           // one vector of pixels between a tensor and scratch
  double in_place_move;     // a channels_last pixel that is read where it is
  double phase_move[2];     // a phase of backward_input writes every stride-th pixel
  double kernel_tap;        // one vector of taps to scratch
  double planar, planar_move, pixel_move;  // pixel: of planar sums that read in place
  double planar_halves[2];                 // bfloat16 in place beside float32; at a stride of 2
  double fft, fft_move[2];                 // whole transforms over the sum of their butterflies
  double toeplitz, toeplitz_move[2];
  double aten_tap, aten_move, aten_far_move;  // of oneDNN; far: both tensors together leave the caches
  double aten_call;                           // what one of its calls costs beyond ours
};
constexpr Costs kOneMultiplier{1.12,       1.5,  1.7,     {9, 18}, 2,      {22, 60}, 20, 1.0, 3,     2.5,
                               {0.8, 0.6}, 1.55, {9, 22}, 1,       {0, 0}, 1.25,     5,  16,  160000};
// Processors with AMX start two multiply-adds of 64 bytes per cycle; a core's share of memory is no faster.
constexpr Costs kTwoMultipliers{0.6,    0.87, 1.2,      {16, 17}, 6,       {85, 140}, 45, 0.55, 6,     4,
                                {1, 1}, 1.02, {20, 12}, 0.6,      {17, 3}, 1.0,       10, 10,   310000};
const Costs& costs_on(const Machine& m) { return m.isa == Isa::amx ? kTwoMultipliers : kOneMultiplier; }

// Number of (output, tap) pairs on one axis whose input lies inside the image.
int64_t in_bounds_pairs(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dil) {
  int64_t pairs = 0;
  for (int64_t u = 0; u < kernel; ++u) {
    const int64_t shift = u * dil - pad;  // input index = y * stride + shift
    const int64_t first = shift >= 0 ? 0 : ceil_div(-shift, stride);
    const int64_t last = in - 1 - shift < 0 ? -1 : std::min(out - 1, (in - 1 - shift) / stride);
    pairs += std::max<int64_t>(0, last - first + 1);
  }
  return pairs;
}

// The mean number of products that one output, or one tap of a weight gradient, sums.
double products_per_result(Pass pass, const Geometry& g) {
  const double pairs =
      double(in_bounds_pairs(g.height, g.out_height, g.kernel_h, g.stride_h, g.pad_h, g.dil_h)) *
      double(in_bounds_pairs(g.width, g.out_width, g.kernel_w, g.stride_w, g.pad_w, g.dil_w));
  const double results = pass == Pass::backward_weight
                             ? double(g.kernel_h * g.kernel_w) / double(std::max<int64_t>(1, g.batch))
                             : double(g.out_height * g.out_width);
  return pairs / std::max(1.0, results);
}

// Rows of at least `least` outputs, then spans, are cut until every one of the threads has work.
void share_among_threads(const Geometry& g, const Machine& m, int64_t tasks, int64_t least, Plan& p) {
  const int64_t groups = channel_groups(g.channels, p), wanted = m.threads > 1 ? 4 * m.threads : 1;
  if (tasks >= wanted || tasks == 0) return;
  const int64_t parts =
      std::clamp<int64_t>(ceil_div(wanted, tasks), 1, std::max<int64_t>(1, g.out_height / least));
  p.tile_h = ceil_div(g.out_height, parts);
  if (tasks * parts < wanted)
    p.span = even_part(groups, std::max<int64_t>(1, p.span * tasks * parts / wanted));
}

// How many channel groups a direct task takes, and how many rows, so that channels_last memory is streamed
// and every thread still has work.
void choose_span(const Geometry& g, const Machine& m, int64_t bytes_per_group, Plan& p) {
  const int64_t groups = channel_groups(g.channels, p);
  if (g.adjacent)
    p.span = std::clamp<int64_t>(kWindowBytes / std::max<int64_t>(1, bytes_per_group), 1,
                                 std::min(groups, kMaxSpan));
  p.span = even_part(groups, p.span);
  const int64_t halo = std::max<int64_t>(g.kernel_h - 1, 0) * g.dil_h / g.stride_h;
  share_among_threads(g, m, ceil_div(groups, p.span) * g.batch * ceil_div(g.out_width, p.tile_w),
                      4 * halo + 4, p);
}

// Bytes of the rows that a kernel reads, and of the one it writes, for one group of channels: those that are
// read again for the next row of outputs, unless they are dilated or strided.
int64_t bytes_of_rows(const Geometry& g, int64_t bytes_of_pixel) {
  return (g.kernel_h + 1) * std::max(g.width, g.out_width) * bytes_of_pixel;
}

// Whether a task should take few groups, so that these rows stay in a first-level cache. Tensors beyond the
// core's own caches are read faster in longer runs of memory.
bool keeps_rows_near(const Geometry& g, int64_t bytes_of_pixel) {
  const int64_t pixels = g.height * g.width + g.out_height * g.out_width;
  return g.kernel_h > 1 && g.stride_h == 1 && g.dil_h == 1 &&
         g.batch * g.channels * pixels * int64_t(sizeof(float)) <= kNearBytes &&
         kNearSpan * bytes_of_rows(g, bytes_of_pixel) <= kNearRowsBytes;
}

// The same where tensors are read in place: whole pixels, as far as their kernels stay in a cache of the
// core, so that memory is read and written in the order of addresses, or fewer groups whose rows stay near.
// Rows that tasks share are not copied twice.
void choose_span_in_place(const Geometry& g, const Machine& m, int64_t vector, int64_t parts, Plan& p) {
  const int64_t groups = channel_groups(g.channels, p), bytes_of_kernel = g.kernel_h * g.kernel_w * vector;
  const bool once = narrow_rows(g) || g.kernel_h == 1;  // a strip reads each pixel for one row of outputs
  const int64_t bytes = once ? kKernelBytes : kWideKernelBytes;
  int64_t span = std::clamp<int64_t>(bytes / bytes_of_kernel, 1, kMaxSpanInPlace);
  if (once && keeps_rows_near(g, vector / parts)) span = std::min(span, kNearSpan);
  p.span = even_part(groups, span);
  share_among_threads(g, m, ceil_div(groups, p.span) * g.batch, 4, p);
}

// Channel groups whose channels_last memory a task of backward_weight streams together; enough tasks remain
// for every thread.
void choose_weight_span(const Geometry& g, const Machine& m, Plan& p) {
  if (!g.adjacent) return;
  const int64_t groups = channel_groups(g.channels, p);
  const int64_t most = m.threads > 1 ? groups * g.batch / (2 * m.threads) : groups;
  p.span = even_part(groups, std::clamp<int64_t>(most, 1, std::min(groups, kMaxWeightSpan)));
}

// Whether a group's pixels, `bytes` each, are copied next to each other before they are read in place: where
// a kernel's rows are more lines than the sets hold that they fall in, or where many taps read pixels that
// lie across two lines; but not images that leave a first-level cache anyway.
bool gathers_pixels(const Geometry& g, int64_t bytes, int64_t element) {
  if (g.height * g.width * bytes > kGatheredBytes) return false;
  const int64_t apart = g.channels * element, taps = g.kernel_h * g.kernel_w;
  if (taps < kFewTaps) return false;
  if (apart % kLineBytes) return taps >= kManyTaps;
  const int64_t sets = kNearSets / std::gcd(apart / kLineBytes, kNearSets);
  return std::min(g.kernel_h, g.height) * g.width > sets * kNearWays;
}

// Vectors of floats in one of a tensor's elements, where they are read in place. Sums of both parts of a
// vector of bfloat16 need the registers.
int64_t parts_in_place(DType dtype, const Machine& m) {
  if (dtype == DType::f32) return 1;
  return dtype == DType::bf16 && m.many_registers ? 2 : 0;
}

// What a plan in place copies first, for groups of pixels of `bytes` each: contiguous planes as long as they
// stay near, pixels where products are of two rows at once. (Rows of floats gained nothing by a copy,
// nor did weight gradients.)
std::optional<Gather> gather_for(Pass pass, const Geometry& g, const Machine& m, int64_t bytes,
                                 int64_t element) {
  if (g.adjacent) {
    const bool gathers = pass != Pass::backward_weight && element == 2 && m.bf16_pairs;
    return gathers && gathers_pixels(g, bytes, element) ? Gather::pixels : Gather::none;
  }
  const int64_t pixels = g.height * g.width + g.out_height * g.out_width;
  const bool planes = g.rows && m.isa >= Isa::avx512 && g.stride_h == 1 && g.stride_w == 1;
  if (planes && pixels * bytes <= kPlanesBytes[pass == Pass::backward_weight]) return Gather::planes;
  return std::nullopt;
}

// A last group that is not full computes outputs of the one before it again: they must share a task.
int64_t span_without_lone_group(int64_t groups, int64_t span) {
  int64_t s = span;
  while (s < kMaxSpanInPlace && (groups - 1) % s == 0) ++s;
  while (s > 1 && (groups - 1) % s == 0) --s;
  return s;
}

// Whether a direct plan reads its tensors where they are: in vectors of their own type. float64 is left out
// for the size of the code.
void choose_in_place(Pass pass, const Geometry& g, int64_t reduce, const Machine& m, int64_t parts, Plan& p) {
  const int64_t vector = p.lanes * int64_t(sizeof(float)), taps = g.kernel_h * g.kernel_w;
  const int64_t bytes = vector / parts, element = int64_t(sizeof(float)) / parts;
  const std::optional<Gather> gather = gather_for(pass, g, m, bytes, element);
  if (!gather || reduce != 1 || g.phases != 1 || g.channels < p.lanes) return;
  if (!(pass == Pass::backward_weight ? odd_rows(g) : rows_in_place(g))) return;
  p.gather = *gather;
  const int64_t in = g.height * g.width + kSlackPixels, out = g.out_height * g.out_width + kSlackPixels;
  if (pass == Pass::backward_weight) {
    p.in_place = true;
    p.tile_h = g.out_height;
    if (g.stride_h == 1 && p.span * bytes_of_rows(g, bytes) > kNearRowsBytes)
      p.span = even_part(channel_groups(g.channels, p), std::min(p.span, kNearSpan));
    p.scratch_bytes = p.span * taps * vector + (p.gather == Gather::none ? 0 : (in + out) * bytes);
  } else {
    p.tile_h = g.out_height;
    choose_span_in_place(g, m, vector, parts, p);
    if (*gather == Gather::planes) p.span = 1;
    if (g.channels % p.lanes) p.span = span_without_lone_group(channel_groups(g.channels, p), p.span);
    p.block = in_place_block(g, m.many_registers, parts);
    p.in_place = p.block > 0;
    if (!p.in_place) return;
    p.batch_rows = 1;
    const int64_t copies = p.gather == Gather::none ? 0 : in + (p.gather == Gather::planes ? out : 0) + 2;
    p.scratch_bytes = p.span * (taps * vector + copies * bytes);
  }
  p.tile_w = g.out_width;
}

// Tiles whose input is copied to windows in scratch.
void choose_windows(Pass pass, const Geometry& g, int64_t reduce, int64_t vector, const Machine& m, Plan& p) {
  p.tile_w = even_part(g.out_width, kMaxTileWidth);
  const int64_t row =
      ((p.tile_w - 1) * g.stride_w + std::max<int64_t>(g.kernel_w - 1, 0) * g.dil_w + 1) * vector;
  const int64_t halo = std::max<int64_t>(g.kernel_h - 1, 0) * g.dil_h + 1, taps = g.kernel_h * g.kernel_w;
  if (pass == Pass::backward_weight) {
    choose_weight_span(g, m, p);
    const int64_t budget = kWindowBytes / (p.span > 1 ? 2 * p.span : 1);
    int64_t rows = std::max<int64_t>(1, (budget / row - halo) / g.stride_h + 1);
    rows = std::max(rows, std::min(g.out_height, halo / g.stride_h + 1));  // re-read at most half of the rows
    p.tile_h = even_part(g.out_height, rows);
    p.scratch_bytes = p.span * (row * std::min(g.height, (p.tile_h - 1) * g.stride_h + halo) +
                                p.tile_h * p.tile_w * vector + taps * vector);
  } else {
    p.tile_h = g.out_height;
    p.batch_rows = even_part(g.out_height, std::max<int64_t>(4, ceil_div(kBatchPixels, p.tile_w)));
    const int64_t per_group = row * direct_ring_rows(g, p) +
                              p.batch_rows * p.tile_w * vector * (1 + (reduce > 1)) + taps * vector * reduce;
    choose_span(g, m, per_group, p);
    p.scratch_bytes = per_group * p.span + halo * int64_t(sizeof(void*) + 8);
  }
}

// Pairs of an output and a tap along a row that a tile multiplies.
double column_pairs(Pass pass, const Geometry& g, bool in_place) {
  if (in_place)
    return double(in_bounds_pairs(g.width, g.out_width, g.kernel_w, g.stride_w, g.pad_w, g.dil_w));
  // Columns of the zero halo cost as much as the image's, but where the band matrix is full.
  const bool dense = pass != Pass::backward_weight && g.stride_w == 1 && g.dil_w == 1 &&
                     g.pad_w >= g.out_width - 1 && g.width - 1 + g.pad_w < g.kernel_w;
  if (dense) return double(g.width * g.out_width);
  const double edges = known_halo(g) ? double(g.pad_w * (g.pad_w + 1)) : 0;
  // Those that no output of a block meets are left out.
  const int64_t met =
      pass == Pass::backward_weight ? g.kernel_w : std::min(g.kernel_w, (g.width + 13) / g.dil_w + 1);
  return double(g.out_width * met) - edges;
}

bool aliased(const Geometry& g, DType dtype) { return g.channels * dtype_size(dtype) % kAliasedBytes == 0; }

// Steps over kernel rows that the rows of outputs take, two rows at a time where there are two.
double row_steps(const Geometry& g, bool paired) {
  const double pairs =
      double(in_bounds_pairs(g.height, g.out_height, g.kernel_h, g.stride_h, g.pad_h, g.dil_h));
  if (!paired) return pairs;
  double steps = 0;
  for (int64_t y = 0; y < g.out_height; ++y) {
    int64_t u0, u1;
    clip_taps(y - g.pad_h, y - g.pad_h, g.height, g.kernel_h, 1, u0, u1);
    steps += double(ceil_div(u1 - u0, 2));
  }
  return steps;
}

double cycles_of_tap(Pass pass, const Geometry& g, bool in_place, bool paired, const Costs& c) {
  if (in_place && !narrow_rows(g)) return c.wide_tap * (paired ? kPairedWideTap : 1);
  // Whether a loaded pixel serves several outputs.
  const bool shared = in_place ? pass != Pass::backward_weight || g.stride_w == 1
                               : g.stride_w == 1 && g.dil_w == 1 && g.kernel_w > 1;
  return shared ? c.tap : c.strided_tap;
}

void estimate_direct(Pass pass, const Geometry& g, int64_t reduce, DType dtype, int64_t parts,
                     const Machine& m, Plan& p) {
  const double rows =
      double(in_bounds_pairs(g.height, g.out_height, g.kernel_h, g.stride_h, g.pad_h, g.dil_h));
  const double columns =
      double(in_bounds_pairs(g.width, g.out_width, g.kernel_w, g.stride_w, g.pad_w, g.dil_w));
  const int64_t groups = channel_groups(g.channels, p);
  const double images = double(groups * g.batch), outputs = double(g.out_height * g.out_width) * images;
  const double vectors = row_steps(g, p.paired) * column_pairs(pass, g, p.in_place) * double(reduce) * images;
  const double pixels = double(g.height * g.width * reduce) * images + outputs;
  p.flops = 2 * rows * columns * double(reduce) * double(g.batch * g.channels);
  const Costs& c = costs_on(m);
  const double planes = pass == Pass::backward_weight ? kPlanesWeightPixel : kPlanesPixel[parts == 2];
  const double move = p.gather == Gather::planes ? planes
                      : p.in_place               ? c.in_place_move
                                                 : (g.phases > 1 ? c.phase_move : c.move)[!g.adjacent];
  const double conflicts = p.in_place && p.gather == Gather::none && aliased(g, dtype)
                               ? kAliasedTap[pass == Pass::backward_weight]
                               : 1;
  p.cycles = vectors * conflicts * cycles_of_tap(pass, g, p.in_place, p.paired, c) + move * pixels +
             double(groups * g.kernel_h * g.kernel_w) * c.kernel_tap;
  if (pass == Pass::backward_weight) p.cycles += 0.1 * vectors;
  if (p.paired && !p.in_place) p.cycles += kPairPixel * pixels;
  if (!p.in_place || parts < 2) return;
  // Both parts' products; taking pixels apart for each kernel row, and putting sums together.
  const double round = pass == Pass::backward_weight ? 0 : kRoundSums;
  const double split = g.kernel_w == 1 ? kSplitColumn : kSplitPixel;
  p.cycles += c.tap * (vectors + outputs * (split * double(g.kernel_h) + round));
}

// Whether backward_weight may multiply two rows at once of what it copies to windows. (The other passes
// gained nothing there.)
bool pairs_in_windows(const Geometry& g, DType dtype, const Machine& m) {
  return m.bf16_pairs && dtype == DType::bf16 && g.kernel_h > 1 && g.stride_h == 1 && g.stride_w == 1 &&
         g.dil_h == 1 && g.dil_w == 1;
}

// How a direct plan reads its tensors.
enum class Reading { windows, paired_windows, in_place };

// The plan that reads so, or, where tensors cannot be read in place, the one with windows.
Plan direct_plan(Pass pass, const Geometry& g, int64_t reduce, DType dtype, const Machine& m,
                 Reading reading) {
  const int64_t parts = reading == Reading::in_place ? parts_in_place(dtype, m) : 0;
  Plan p;
  p.paired = reading == Reading::paired_windows;
  p.algorithm = Algorithm::direct;
  p.isa = m.isa;
  const bool wide = dtype == DType::f64;
  p.lanes = wide ? m.lanes_f64 : m.lanes_f32 * std::max<int64_t>(1, parts);
  choose_windows(pass, g, reduce, p.lanes * (wide ? 8 : 4), m, p);
  if (parts) choose_in_place(pass, g, reduce, m, parts, p);
  if (p.in_place && parts == 2) p.paired = m.bf16_pairs && g.kernel_h > 1;
  estimate_direct(pass, g, reduce, dtype, parts, m, p);
  return p;
}

Plan direct_plan(Pass pass, const Geometry& g, int64_t reduce, DType dtype, const Machine& m) {
  const auto plan = [&](Reading reading) { return direct_plan(pass, g, reduce, dtype, m, reading); };
  Plan best = plan(Reading::in_place);
  if (!best.in_place) best = plan(Reading::windows);
  const auto consider = [&](Reading reading) {
    const Plan p = plan(reading);
    if (p.cycles < best.cycles) best = p;
  };
  if (best.in_place && best.gather == Gather::none && aliased(g, dtype)) consider(Reading::windows);
  if (pass == Pass::backward_weight && pairs_in_windows(g, dtype, m)) consider(Reading::paired_windows);
  return best;
}

struct AxisChoice {
  int64_t tile = 0, length = 0;
};

// Transform length and outputs per tile of one axis: least cost per output. Lengths are limited so that a
// tile's spectrum stays within a core's own cache.
AxisChoice choose_axis(int64_t in, int64_t out, int64_t kernel, int64_t pad, int64_t dil, int64_t limit) {
  AxisChoice best;
  double best_cost = std::numeric_limits<double>::infinity();
  for (int64_t n = 1; n <= limit; ++n) {
    const FftPlan* f = fft_plan(n);
    if (!f) continue;
    int64_t tile = out;
    if (fft_axis(in, out, kernel, pad, dil, tile).length > n) {
      tile = n - std::max<int64_t>(1, fft_axis(in, out, kernel, pad, dil, 1).extent) + 1;
      if (tile < 1) continue;
      tile = even_part(out, tile);
    }
    const double cost = (f->cost + 8.0 * double(n)) * double(ceil_div(out, tile));
    if (cost < best_cost) best = {tile, n}, best_cost = cost;
  }
  return best;
}

// Each of the following fills in a plan and returns null, or returns why its algorithm cannot take the
// problem.
const char* fft_plan_for(Pass pass, const Geometry& g, int64_t reduce, DType dtype, const Machine& m,
                         const Switches& switches, Plan& p) {
  p.algorithm = Algorithm::fft;
  if (dtype == DType::f64) return "float64 is summed directly: the FFT kernels are float32";
  if (!switches.fft) return "LKCONV_FFT=0";
  if (g.stride_h != 1 || g.stride_w != 1) return "stride is not 1";
  if (products_per_result(pass, g) < kLeastFftProducts)
    return "its results sum too few products: direct summation is more accurate";
  p.isa = m.isa;
  p.lanes = m.lanes_f32;
  const AxisChoice h = choose_axis(g.height, g.out_height, g.kernel_h, g.pad_h, g.dil_h, 128);
  const AxisChoice w = choose_axis(g.width, g.out_width, g.kernel_w, g.pad_w, g.dil_w, 128);
  if (!h.length || !w.length) return "the kernel is longer than the longest transform";
  p.tile_h = h.tile, p.tile_w = w.tile, p.fft_h = h.length, p.fft_w = w.length;
  const double fh = fft_plan(p.fft_h)->cost, fw = fft_plan(p.fft_w)->cost;
  const int64_t columns = p.fft_w / 2 + 1;
  const FftAxis ah = fft_axis(g.height, g.out_height, g.kernel_h, g.pad_h, g.dil_h, p.tile_h);
  const double tiles = double(ceil_div(g.out_height, p.tile_h) * ceil_div(g.out_width, p.tile_w));
  const int64_t groups = channel_groups(g.channels, p);
  const double in_rows = double(std::min(p.fft_h, std::min(g.height, p.tile_h + ah.extent - 1))) / 2;
  const double kernel_rows = double(ah.extent) / 2, out_rows = double(p.tile_h) / 2;
  const double row = fw + 10.0 * double(p.fft_w), column = fh + 3.0 * double(p.fft_h);
  const double images = double(g.batch) * tiles;
  double cycles;
  if (pass == Pass::backward_weight)
    cycles = images * ((in_rows + out_rows) * row + 2 * double(columns) * column) + kernel_rows * row;
  else
    cycles =
        double(reduce) *
            (kernel_rows * row + double(columns) * column + 40.0 * double(g.kernel_h * g.kernel_w) / 16) +
        images *
            ((double(reduce) * in_rows + out_rows) * row + double(columns) * column * double(1 + reduce));
  const double pixels = double(g.height * g.width * reduce + g.out_height * g.out_width) * double(g.batch);
  const Costs& c = costs_on(m);
  p.cycles = (c.fft * cycles + c.fft_move[!g.adjacent] * pixels) * double(groups);
  p.flops = cycles * double(groups) * 1.3 * double(p.lanes);
  const int64_t spectrum = columns * (p.fft_h + 1) * 2 * p.lanes * 4;
  const int64_t spectra = pass == Pass::backward_weight ? 3 : reduce + 1 + (reduce > 1);
  p.scratch_bytes = spectrum * spectra + p.fft_w * 2 * p.lanes * 4 + g.kernel_h * g.kernel_w * p.lanes * 4;
  return p.scratch_bytes > kMaxScratchBytes ? "its scratch memory would exceed the limit" : nullptr;
}

const char* toeplitz_plan_for(Pass pass, const Geometry& g, int64_t reduce, DType dtype, const Machine& m,
                              const Switches&, Plan& p) {
  if (const char* declined = toeplitz_plan(pass, g, reduce, dtype, m, p)) return declined;
  const Costs& c = costs_on(m);
  const double pixels = double(g.height * g.width * reduce + g.out_height * g.out_width) *
                        double(g.batch * ceil_div(g.channels, m.lanes_f32));
  p.cycles = c.toeplitz * p.cycles + c.toeplitz_move[!g.adjacent] * pixels;
  return nullptr;
}

const char* planar_plan_for(Pass pass, const Geometry& g, int64_t reduce, DType dtype, const Machine& m,
                            const Switches&, Plan& p) {
  if (const char* declined = planar_plan(pass, g, reduce, dtype, m, p)) return declined;
  const Costs& c = costs_on(m);
  if (pass == Pass::backward_weight) {
    p.cycles *= c.planar;
    return nullptr;
  }
  const double vectors = double(reduce * g.height * ceil_div(g.width, m.lanes_f32)) / double(g.phases) +
                         double(g.out_height * ceil_div(g.out_width, m.lanes_f32));
  const double move = planar_pairs(g, reduce, p) ? c.pixel_move / 2
                      : p.in_place               ? c.pixel_move
                                                 : c.planar_move;
  p.cycles = c.planar * p.cycles + move * vectors * double(g.batch * g.channels);
  if (p.in_place && dtype == DType::bf16 && g.phases == 1) p.cycles *= c.planar_halves[g.stride_w > 1];
  return nullptr;
}

const char* direct_plan_for(Pass pass, const Geometry& g, int64_t reduce, DType dtype, const Machine& m,
                            const Switches&, Plan& p) {
  p = direct_plan(pass, g, reduce, dtype, m);
  return nullptr;
}

// PyTorch's own convolution (oneDNN), where it is really faster: small kernels at memory speed,
// channels_last. It must be estimated well ahead to be taken. Its calls' cost is no function of the thread
// count, which must change no result.
const char* aten_plan_for(Pass pass, const Geometry& g, int64_t, DType dtype, const Machine& m,
                          const Switches& switches, Plan& p) {
  p.algorithm = Algorithm::aten;
  p.isa = m.isa;
  p.lanes = m.lanes_f32;
  p.tile_h = g.out_height, p.tile_w = g.out_width;
  const bool forward = pass == Pass::forward;
  const int64_t taps = g.kernel_h * g.kernel_w * g.phases;  // a phase holds its share of the taps
  if (!switches.aten) return "LKCONV_ATEN=0";
  if (pass == Pass::backward_weight || (!forward && g.phases == 1))
    return "it is faster only for the forward pass and the strided backward_input of small kernels";
  if (m.isa == Isa::baseline) return "not measured on this instruction set";
  if (dtype == DType::f64 || dtype == DType::f16) return "it has no fast kernel for this dtype";
  if (dtype == DType::bf16 && (m.isa == Isa::avx2 || !forward))
    return "it has no fast bfloat16 kernel for this pass or instruction set";
  if (!g.adjacent) return "it is fast for channels_last tensors without a channel multiplier only";
  if (!g.dense) return "it would copy the slice";
  if (taps > (forward ? kMaxAtenTaps : kMaxAtenPhaseTaps)) return "it is fast for small kernels only";
  const double phases = double(g.phases), pixels = double(g.out_height * g.out_width);
  const double vectors = double(channel_groups(g.channels, p) * g.batch) * pixels;
  const Costs& c = costs_on(m);
  p.flops = 2 * double(taps * g.batch * g.channels) * pixels;
  const bool far = (g.stride_h == 1 || dtype == DType::bf16) && g.phases == 1 &&
                   vectors * double(p.lanes * dtype_size(dtype)) > double(kAtenFarBytes);
  const double move = far ? c.aten_far_move : c.aten_move * (forward ? 1 : 4);
  p.cycles = kAtenMargin * (vectors * (c.aten_tap * double(taps) / phases + move) + c.aten_call / phases);
  return nullptr;
}

struct Entry {
  Algorithm algorithm;
  const char* (*plan)(Pass, const Geometry&, int64_t, DType, const Machine&, const Switches&, Plan&);
};
constexpr Entry kEntries[] = {{Algorithm::direct, direct_plan_for},
                              {Algorithm::planar, planar_plan_for},
                              {Algorithm::fft, fft_plan_for},
                              {Algorithm::toeplitz, toeplitz_plan_for},
                              {Algorithm::aten, aten_plan_for}};

void choose_splits(Pass pass, const Geometry& g, const Machine& m, Plan& p) {
  if (pass != Pass::backward_weight) return;
  const int64_t spans = ceil_div(channel_groups(g.channels, p), p.span);
  if (spans % m.threads == 0 || spans >= 8 * m.threads) return;
  p.splits = std::clamp<int64_t>(ceil_div(4 * m.threads, spans), 1, std::max<int64_t>(1, g.batch));
}

std::optional<Algorithm> algorithm_from_environment() {
  const char* name = std::getenv("LKCONV_ALGORITHM");
  if (!name || !*name) return std::nullopt;
  for (const Entry& entry : kEntries)
    if (!std::strcmp(name, algorithm_name(entry.algorithm))) return entry.algorithm;
  throw std::invalid_argument(
      std::string("LKCONV_ALGORITHM must be direct, planar, fft, toeplitz or aten; got '") + name + "'");
}

}  // namespace

const char* algorithm_name(Algorithm a) {
  constexpr const char* names[] = {"direct", "planar", "fft", "toeplitz", "aten"};
  return names[int(a)];
}

const Switches& switches_from_environment() {
  static const Switches s = [] {
    const auto off = [](const char* name) {
      const char* value = std::getenv(name);
      return value && !std::strcmp(value, "0");
    };
    Switches w;
    w.fft = !off("LKCONV_FFT");
    w.aten = !off("LKCONV_ATEN");
    w.only = algorithm_from_environment();
    return w;
  }();
  return s;
}

std::vector<Candidate> plan_depthwise_conv2d(Pass pass, const Geometry& g, int64_t reduce, DType dtype,
                                             const Machine& m, const Switches& switches) {
  std::vector<Candidate> all;
  for (const Entry& entry : kEntries) {
    Candidate& c = all.emplace_back();
    const char* declined = entry.plan(pass, g, reduce, dtype, m, switches, c.plan);
    c.plan.algorithm = entry.algorithm;
    c.possible = !declined;
    if (declined)
      c.reason = declined;
    else
      choose_splits(pass, g, m, c.plan);
  }
  const auto asked = [&](const Candidate& c) { return c.plan.algorithm == switches.only; };
  std::stable_sort(all.begin(), all.end(), [&](const Candidate& a, const Candidate& b) {
    if (a.possible != b.possible) return a.possible;
    if (a.possible && asked(a) != asked(b)) return asked(a);
    return a.possible && a.plan.cycles < b.plan.cycles;
  });
  for (size_t i = 1; i < all.size(); ++i) {
    if (!all[i].possible) continue;
    char text[80];
    std::snprintf(text, sizeof text, "estimated %.1f times the cycles of %s",
                  all[i].plan.cycles / std::max(1.0, all[0].plan.cycles),
                  algorithm_name(all[0].plan.algorithm));
    all[i].reason = asked(all[0]) ? std::string("LKCONV_ALGORITHM=") + algorithm_name(all[0].plan.algorithm)
                                  : std::string(text);
  }
  return all;
}

Plan choose_depthwise_conv2d(Pass pass, const Geometry& g, int64_t reduce, DType dtype, const Machine& m,
                             const Switches& switches) {
  Plan best;
  best.cycles = std::numeric_limits<double>::infinity();
  bool asked = false;
  for (const Entry& entry : kEntries) {
    Plan p;
    if (entry.plan(pass, g, reduce, dtype, m, switches, p)) continue;
    const bool wanted = entry.algorithm == switches.only;
    if (wanted > asked || (wanted == asked && p.cycles < best.cycles)) best = p, asked = wanted;
  }
  choose_splits(pass, g, m, best);
  return best;
}

double cycles_of_moving(const Geometry& g, const Machine& m) {
  const double vectors = double(g.batch * ceil_div(g.channels, m.lanes_f32) * g.out_height * g.out_width);
  return costs_on(m).move[!g.adjacent] * vectors;
}

double cycles_of_sums(Pass pass, const Geometry& g, DType dtype, const Machine& m) {
  Geometry scratch = g;
  scratch.adjacent = false;  // a plan with windows
  const Plan p = direct_plan(pass, scratch, 1, dtype, m, Reading::windows);
  const double pixels = double(g.height * g.width + g.out_height * g.out_width);
  return p.cycles - costs_on(m).move[1] * pixels * double(channel_groups(g.channels, p) * g.batch);
}

}  // namespace lkconv::cpu
