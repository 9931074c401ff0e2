// backward_weight along the rows of a plane: how planar_weight.h and planar_weight_flat.h sum it.
#include "costs.h"
#include "planar_plan.h"

namespace lkconv::cpu {
namespace {

// backward_weight, in the planner's terms for direct sums: their moves take half the cycles that kernels for
// the other passes need for them, which is what all its algorithms are weighed by.
constexpr double kWeightScale = 2.0, kStridedWeightScale = 1.9;
constexpr double kWeightLatency = 4;  // products that must be under way
constexpr double kStridedPixels = 0.9, kWeightBlock = 10, kWeightCall = 45, kWeightVector = 3;
// A product, a row of pixels and a load of a sweep, where loads are more than products; a vector of columns,
// one of pixels or outputs, and 16 taps of a channel.
constexpr double kSweptProduct = 0.44, kSweptRow = 0.56, kSweptLoad = 1.35, kSweptColumn = 48,
                 kSweptVector = 2.3, kSweptTaps = 170;
constexpr double kFlatWeightProduct = 0.5, kFlatWeightLoad = 0.2, kFlatWeightVector = 3.8,
                 kFlatWeightEdge = 0.9, kFlatWeightPlane = 24, kFlatWeightCall = 3, kFlatWeightPixel = 0.0012;
// By measurement, where blocks of rows and vectors of pixels take as long.
constexpr double kFlatWeightFloats = 1.35;

// Rows of outputs that meet row j of the kernel.
int64_t rows_that_meet(const Geometry& g, int64_t j) {
  const int64_t shift = j * g.dil_h - g.pad_h;  // input row = y * stride + shift
  const int64_t first = shift >= 0 ? 0 : ceil_div(-shift, g.stride_h);
  const int64_t last = shift >= g.height ? -1 : (g.height - 1 - shift) / g.stride_h;
  return std::max<int64_t>(0, std::min(last, g.out_height - 1) - first + 1);
}

double vectors_of_both(const Geometry& g, const Plan& p) {
  return double(g.height * g.width + g.out_height * g.out_width) / double(p.lanes);
}

// Cycles for one plane: a call of planar_weight_strided.h for each part of the kernel.
double cycles_of_blocks(const Geometry& g, const Plan& p) {
  const double across = double(ceil_div(g.out_width, p.lanes));
  const double blocks = across * double(ceil_div(g.out_height, kWeightBlockRows));
  const double tiles = double(ceil_div(g.out_height, p.tile_h)) / double(p.images);
  double cycles = 0;
  for (int64_t u = 0, k; u < g.kernel_h; u += k) {
    k = std::min(kMaxWeightRows, g.kernel_h - u);
    int64_t pairs = 0;  // of rows of pixels and of outputs
    for (int64_t j = u; j < u + k; ++j) pairs += rows_that_meet(g, j);
    const int64_t width = even_part(g.kernel_w, weight_columns(k));
    const double calls = double(ceil_div(g.kernel_w, width));
    cycles += across * double(pairs * g.kernel_w) * std::max(1.0, kWeightLatency / double(k * width)) +
              calls * (blocks * kWeightBlock + tiles * kWeightCall) +
              calls * across * kStridedPixels * double(2 * (2 * g.out_height + k) + g.out_height);
  }
  return kStridedWeightScale * (cycles + kWeightVector * vectors_of_both(g, p));
}

// The same by planar_weight_sweep.h.
double cycles_of_sweeps(const Geometry& g, const Plan& p) {
  const double across = double(ceil_div(g.out_width, p.lanes));
  const double sweeps = double(ceil_div(g.out_height, p.tile_h) * std::min(g.dil_h, p.tile_h));
  const int64_t part = even_part(g.kernel_h, kMaxWeightSweepRows);
  double cycles = 0;
  for (int64_t u = 0, k; u < g.kernel_h; u += k) {
    k = std::min(part, g.kernel_h - u);
    int64_t pairs = 0, rows = 0;
    for (int64_t j = u; j < u + k; ++j) {
      const int64_t met = rows_that_meet(g, j);
      pairs += met, rows = std::max(rows, met);
    }
    const double steps = double(rows) + sweeps * double(k - 1) / 2;
    const double calls = double(ceil_div(g.kernel_w, even_part(g.kernel_w, swept_weight_columns(k))));
    const double products = double(pairs * g.kernel_w), loads = steps * (double(g.kernel_w) + calls);
    cycles += across * (kSweptProduct * products + calls * (kSweptRow * steps + kSweptColumn * sweeps) +
                        kSweptLoad * std::max(0.0, loads - 0.5 * products));
  }
  const double taps =
      double(ceil_div(g.kernel_h * g.kernel_w, p.lanes)) / double(std::max<int64_t>(1, g.batch));
  return kWeightScale * (cycles + kSweptTaps * taps + kSweptVector * vectors_of_both(g, p));
}

// Sums of taps whose outputs are counted through, of as many images as a lane can add up.
bool flat_weight_plan(const Geometry& g, DType dtype, const Machine& m, Plan& plan) {
  if (dtype == DType::bf16 && !m.bf16_pairs) return false;
  if (!is_flat(g, 1, dtype, m) || flat_weight_sizes(g, dtype_size(dtype)).bytes > kMaxScratchBytes)
    return false;
  const int64_t parts = int64_t(sizeof(float)) / dtype_size(dtype);
  const int64_t vectors = std::max<int64_t>(1, ceil_div(g.out_height * g.width, parts * plan.lanes));
  if (vectors > kLongestWeightSum) return false;
  plan.flat = plan.in_place = true;
  plan.tile_h = g.out_height, plan.tile_w = g.out_width;
  plan.images = kLongestWeightSum / vectors;
  plan.scratch_bytes = flat_weight_sizes(g, dtype_size(dtype)).bytes;
  const double calls = double(ceil_div(g.kernel_h, flat_weight_rows(g.kernel_w)));
  const double taps = double(g.kernel_h * g.kernel_w);
  // Vectors at the edges, some of whose pixels do not exist.
  const double edges = double(1 + 2 * ceil_div(g.pad_h * g.width, parts * plan.lanes));
  const double vector = kFlatWeightProduct * taps + kFlatWeightVector * calls +
                        kFlatWeightCall * (calls - 1) +
                        kFlatWeightLoad * (double(g.kernel_h) + calls * double(g.kernel_w)) +
                        kFlatWeightPixel * double(g.out_height * g.width);
  const double planes = double(g.batch * g.channels);
  plan.flops = 2 * planes * double(vectors * parts * plan.lanes) * taps;
  plan.cycles = kWeightScale * (parts == 1 ? kFlatWeightFloats : 1) * planes *
                (double(vectors) * vector + std::min(double(vectors), edges) * kFlatWeightEdge * taps +
                 kFlatWeightPlane * calls);
  return true;
}

// Sums of rows: by sweeps, or at a stride by blocks of rows.
const char* row_weight_plan(const Geometry& g, DType dtype, Plan& plan) {
  const bool unit = g.stride_h == 1 && g.stride_w == 1, two = g.stride_h == 2 && g.stride_w == 2;
  if (!unit && !(two && g.dil_h == 1 && g.dil_w == 1))
    return "its backward_weight takes a stride of 1, and of 2 without dilation";
  plan.in_place = true;
  const int64_t across = std::max<int64_t>(1, ceil_div(g.out_width, plan.lanes));
  plan.tile_w = g.out_width, plan.images = 1;
  if (unit) {
    const int64_t row = (g.width + g.out_width) * dtype_size(dtype);
    const bool far = g.kernel_h <= 3 && bytes_of_tensors(g, dtype_size(dtype)) > kCachedBytes;
    const int64_t most =
        std::clamp<int64_t>((far ? kFarWeightTileBytes : kWeightTileBytes) / std::max<int64_t>(1, row),
                            g.dil_h, std::max(g.dil_h, kLongestWeightSum));
    plan.tile_h = even_part(std::max<int64_t>(1, g.out_height), most);
  } else {
    const int64_t blocks = std::max<int64_t>(1, kLongestWeightSum / (kWeightBlockRows * across));
    plan.tile_h = std::max<int64_t>(1, std::min(g.out_height, blocks * kWeightBlockRows));
  }
  if (plan.tile_h >= g.out_height)
    plan.images = std::max<int64_t>(1, kLongestWeightSum / (plan.tile_h * across));
  plan.scratch_bytes = planar_weight_sizes(g, plan.lanes).bytes;
  if (plan.scratch_bytes > kMaxScratchBytes) return "its scratch memory would exceed the limit";
  const double planes = double(g.batch * g.channels);
  plan.flops = 2 * double(plan.lanes) * planes * double(ceil_div(g.out_width, plan.lanes) * g.out_height) *
               double(g.kernel_h * g.kernel_w);
  plan.cycles = planes * (unit ? cycles_of_sweeps(g, plan) : cycles_of_blocks(g, plan));
  return nullptr;
}

}  // namespace

PlanarWeightSizes planar_weight_sizes(const Geometry& g, int64_t lanes) {
  const int64_t sums = round_up(g.kernel_h * g.kernel_w, lanes) * lanes;
  const int64_t columns = ceil_div(g.out_width, lanes) * g.kernel_w;
  return {sums, lanes * sums * int64_t(sizeof(float)) + columns * kTapColumnBytes};
}

FlatWeightSizes flat_weight_sizes(const Geometry& g, int64_t element) {
  const int64_t vectors = ceil_div(g.out_height * g.width * element, kMaskedBytes);
  FlatWeightSizes s{};
  s.sums = round_up(g.kernel_h * g.kernel_w, kMaskedLanes) * kMaskedLanes;
  s.masks = round_up(vectors * flat_weight_masks(g) * int64_t(sizeof(uint32_t)), kMaskedBytes);
  s.grad = round_up(g.out_height * g.width * element, kMaskedBytes);
  s.bytes = kMaskedLanes * s.sums * int64_t(sizeof(float)) + s.masks + s.grad + g.height * g.width * element;
  return s;
}

const char* planar_weight_plan(const Geometry& g, DType dtype, const Machine& m, Plan& plan) {
  if (m.isa < Isa::avx512) return "its backward_weight needs masked loads: AVX-512";
  if (dtype != DType::f32 && dtype != DType::bf16) return "its backward_weight reads float32 and bfloat16";
  Plan flat = plan;
  const bool counted = flat_weight_plan(g, dtype, m, flat);
  const char* declined = row_weight_plan(g, dtype, plan);
  if (counted && (declined || flat.cycles < plan.cycles)) plan = flat, declined = nullptr;
  plan.cycles *= costs_on(m).planar;
  return declined;
}

}  // namespace lkconv::cpu
