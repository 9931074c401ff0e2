#include "direct_plan.h"

#include <algorithm>
#include <numeric>
#include <optional>

#include "costs.h"

namespace lkconv::cpu {
namespace {

constexpr int64_t kWindowBytes =
    384 << 10;  // of a direct tile's input window: well inside a second-level cache
constexpr int64_t kMaxTileWidth = 128;
constexpr int64_t kMaxWeightSpan = 4;
constexpr int64_t kBatchPixels = 224;           // outputs computed between loading and storing
constexpr int64_t kKernelBytes = 256 << 10;     // of the groups that a task reads in place together
constexpr int64_t kWideKernelBytes = 24 << 10;  // where a block of outputs takes too long to wait for memory
constexpr int64_t kNearRowsBytes = 32 << 10;    // of rows read in place again and again
constexpr int64_t kNearBytes = 12 << 20;        // of tensors whose rows are kept there
constexpr int64_t kNearSpan = 2, kNearShortSpan = 8;  // groups of them; of rows of at most 3 taps
constexpr int64_t kFarSpan = 8, kMaxSharedWidth = 5;
// A first-level cache; and how many taps make a copy of the pixels worth its cost, if they conflict there or
// lie across two lines.
constexpr int64_t kLineBytes = 64, kNearSets = 64, kNearWays = 8;
constexpr int64_t kConflictingTaps = 16, kSplitTaps = 49;
constexpr int64_t kGatheredBytes = 64 << 10;  // of a group's pixels that are copied
// Of the input's and the output's planes of a group that are transposed; in backward_weight.
constexpr int64_t kPlanesBytes[2] = {64 << 10, 128 << 10};

// Counts that are scaled to cycles, or cycles.
constexpr double kPlanesPixel[2] = {14, 6};  // a pixel of a transposed group of floats, and of bfloat16 ...
constexpr double kPlanesWeightPixel = 22;    // ... and for backward_weight
constexpr double kPairedWideTap = 0.8;       // of a wide tap
constexpr double kPairPixel = 4;             // a vector of a window to one of pairs with the row below
// Operations on a vector of bfloat16 read in place; columns of taps split each pixel once.
constexpr double kSplitPixel[2] = {1.5, 2.5}, kSplitColumn = 1, kRoundSums[2] = {4, 14};  // narrow, wide rows
// Pixels this far apart share one set of a first-level cache, which holds fewer than a block of outputs
// reads: each tap costs so many times as much, in the passes that write a tensor and in backward_weight.
constexpr int64_t kAliasedBytes = 4096;
constexpr double kAliasedTap[2] = {1.5, 4.5};

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
  return g.kernel_h > 1 && g.stride_h == 1 && g.dil_h == 1 &&
         bytes_of_tensors(g, sizeof(float)) <= kNearBytes &&
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
  if (once && keeps_rows_near(g, vector / parts))
    span = std::min(span, g.kernel_w > 3 ? kNearSpan : kNearShortSpan);
  p.span = even_part(groups, span);
  share_among_threads(g, m, ceil_div(groups, p.span) * g.batch, 4, p);
}

// Channel groups, at most `limit`, whose channels_last memory a task of backward_weight streams together;
// enough tasks remain for every thread.
void choose_weight_span(const Geometry& g, const Machine& m, int64_t limit, Plan& p) {
  if (!g.adjacent) return;
  const int64_t groups = channel_groups(g.channels, p);
  const int64_t most = m.threads > 1 ? groups * g.batch / (2 * m.threads) : groups;
  p.span = even_part(groups, std::clamp<int64_t>(most, 1, std::min(groups, limit)));
}

// Whether a group's pixels, `bytes` each, are copied next to each other before they are read in place: where
// a kernel's rows are more lines than the sets hold that they fall in, or where many taps read pixels that
// lie across two lines; but not images that are too large for a copy to stay near.
bool gathers_pixels(const Geometry& g, int64_t bytes, int64_t element) {
  if (g.height * g.width * bytes > kGatheredBytes) return false;
  const int64_t apart = g.channels * element, taps = g.kernel_h * g.kernel_w;
  if (taps < kConflictingTaps) return false;
  if (apart % kLineBytes) return taps >= kSplitTaps;
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
  // Costs of matrix units were not fitted beside such copies.
  const bool measured = m.isa == Isa::avx512 || (m.isa == Isa::amx && element == 4);
  const bool planes = measured && g.rows && g.stride_h == 1 && g.stride_w == 1;
  if (planes && pixels * bytes <= kPlanesBytes[pass == Pass::backward_weight]) return Gather::planes;
  return std::nullopt;
}

// Whether blocks of outputs are of two channel groups: where pixels fall in few sets of a cache, so that the
// neighbours of a line, which processors load along with it, are gone before their group's turn; and at a
// stride, whose blocks read more lines, unless memory is slower than all of that.
bool shares_blocks(const Geometry& g, const Plan& p) {
  constexpr int64_t kSize = sizeof(float);
  if (!g.adjacent || p.gather != Gather::none || !narrow_rows(g) || g.kernel_w > kMaxSharedWidth)
    return false;
  if (g.channels % (2 * p.lanes) || p.span % 2) return false;
  return g.stride_w > 1 ? bytes_of_tensors(g, kSize) <= kCachedBytes
                        : g.channels * kSize % kFewSetsBytes == 0;
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
    // Pixels on pages of their own are read faster in longer runs; of floats, wider kernels are better off
    // with rows that stay near.
    const bool far = g.channels * element >= kFarPixelBytes && g.kernel_w <= kMaxSharedWidth;
    choose_weight_span(g, m, far || parts > 1 ? kFarSpan : kNearSpan, p);
    if (parts == 1 && m.many_registers && g.stride_w > 1 && shares_blocks(g, p)) p.together = 2;
    p.scratch_bytes = p.span * taps * vector + (p.gather == Gather::none ? 0 : (in + out) * bytes);
  } else {
    p.tile_h = g.out_height;
    choose_span_in_place(g, m, vector, parts, p);
    if (*gather == Gather::planes) p.span = 1;
    if (g.channels % p.lanes) p.span = span_without_lone_group(channel_groups(g.channels, p), p.span);
    if (parts == 1 && m.many_registers && shares_blocks(g, p)) p.together = 2;
    const auto block = [&](int64_t width) {
      return in_place_block(g, width, m.many_registers, parts * p.together);
    };
    p.block = block(ceil_div(g.out_width, g.dil_w));
    p.short_block = block(std::max<int64_t>(1, g.out_width / g.dil_w));
    p.in_place = p.block > 0 && p.short_block > 0;
    if (!p.in_place) return;
    p.batch_rows = 1;
    const int64_t copies = p.gather == Gather::none ? 0 : in + (p.gather == Gather::planes ? out : 0);
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
    choose_weight_span(g, m, kMaxWeightSpan, p);
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
    const int64_t top = y * g.stride_h - g.pad_h;
    clip_taps(top, top, g.height, g.kernel_h, g.dil_h, u0, u1);
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
  const bool wide = !narrow_rows(g);
  const double round = pass == Pass::backward_weight ? 0 : kRoundSums[wide];
  const double split = g.kernel_w == 1 ? kSplitColumn : kSplitPixel[wide || pass == Pass::backward_weight];
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

}  // namespace

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

Plan direct_plan_with_windows(Pass pass, const Geometry& g, int64_t reduce, DType dtype, const Machine& m) {
  return direct_plan(pass, g, reduce, dtype, m, Reading::windows);
}

}  // namespace lkconv::cpu
