#include "planner.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "costs.h"
#include "direct_plan.h"
#include "fft_plan.h"
#include "planar_plan.h"
#include "toeplitz_plan.h"

namespace lkconv::cpu {
namespace {

constexpr int64_t kMaxAtenTaps = 25;
constexpr int64_t kMaxAtenPhaseTaps = 36;  // taps of the first phase times phases: at most 5x5 at stride 2
constexpr double kAtenMargin = 1.1;
constexpr int64_t kAtenFarBytes = 6 << 20;
constexpr double kLeastFftProducts = 16;  // a transform's rounding errors exceed those of so short a sum

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
  return planar_plan(pass, g, reduce, dtype, m, p);
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
  scratch.adjacent = false;
  const Plan p = direct_plan_with_windows(pass, scratch, 1, dtype, m);
  const double pixels = double(g.height * g.width + g.out_height * g.out_width);
  return p.cycles - costs_on(m).move[1] * pixels * double(channel_groups(g.channels, p) * g.batch);
}

}  // namespace lkconv::cpu
