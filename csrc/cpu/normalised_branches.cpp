#include "normalised_branches.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "kernels.h"

namespace lkconv::cpu {
namespace {

constexpr int64_t kTileBytes = 1 << 20;  // of a backward task's scratch: a second-level cache
constexpr int64_t kLeastTileRows = 4;
constexpr int64_t kGradientTasks = 64;  // enough for any number of cores to share evenly
constexpr int64_t kPixelsPerThread = 1 << 12;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

std::unique_ptr<void, Free> allocate(int64_t bytes) {
  void* p = std::aligned_alloc(64, size_t(round_up(std::max<int64_t>(bytes, 1), 64)));
  if (!p) throw std::bad_alloc();
  return std::unique_ptr<void, Free>(p);
}

bool wide(const NormalisedBranchesProblem& p) { return p.dtype == DType::f64; }
int64_t element(const NormalisedBranchesProblem& p) { return wide(p) ? 8 : 4; }
bool empty(const NormalisedBranchesProblem& p) {
  return p.batch * p.channels * p.out_height * p.out_width * p.height * p.width == 0;
}

// Tasks of a pass over all images, of `pixels` vectors each.
int64_t grain(int64_t pixels) {
  return std::max<int64_t>(1, kPixelsPerThread / std::max<int64_t>(1, pixels));
}

// Rows of tile `tile` on the branches' side.
int64_t tile_rows(const NormalisedBranchesProblem& p, const NormalisedBranchesPlan& plan, int64_t tile) {
  return std::clamp<int64_t>(p.out_height - tile * plan.tile_h, 0, plan.tile_h);
}

// Mean and variance of each channel of a group out of the moments of its tiles, in order, in double.
template <class T>
void combine_moments(const NormalisedBranchesProblem& p, const NormalisedBranchesPlan& plan, int64_t g,
                     T* means, T* variances) {
  const T* partial = static_cast<const T*>(p.partial);
  const int64_t tiles = plan.tiles(p), branches = p.branches(), lanes = plan.lanes;
  for (int64_t b = 0; b < branches; ++b)
    for (int64_t c = g * lanes; c < std::min(p.channels, (g + 1) * lanes); ++c) {
      double count = 0, mean = 0, squares = 0;
      for (int64_t part = 0; part < p.batch * tiles; ++part) {
        const double more = double(tile_rows(p, plan, part % tiles) * p.out_width);
        if (more == 0) continue;
        const T* at = partial + ((g * p.batch * tiles + part) * branches + b) * kMoments * lanes + c % lanes;
        const double rest = double(at[lanes]) / more, delta = double(at[0]) + rest - mean;
        const double total = count + more;
        squares += double(at[2 * lanes]) - rest * rest * more + delta * delta * count * more / total;
        mean += delta * more / total;
        count = total;
      }
      means[b * p.channels + c] = T(mean);
      variances[b * p.channels + c] = T(std::max(0.0, squares) / count);
    }
}

template <class T>
void combine_dots(const NormalisedBranchesProblem& p, const NormalisedBranchesPlan& plan, int64_t g, T* total,
                  T* dots) {
  const T* partial = static_cast<const T*>(p.partial);
  const int64_t parts = p.batch * plan.tiles(p), sums = 1 + p.branches(), lanes = plan.lanes;
  for (int64_t b = 0; b < sums; ++b)
    for (int64_t c = g * lanes; c < std::min(p.channels, (g + 1) * lanes); ++c) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part)
        sum += double(partial[((g * parts + part) * sums + b) * lanes + c % lanes]);
      (b == 0 ? total[c] : dots[(b - 1) * p.channels + c]) = T(sum);
    }
}

// Runs `kernel` over (group, image, tile).
template <class Kernel>
void run_tiles(const NormalisedBranchesProblem& p, const NormalisedBranchesPlan& plan, Kernel kernel,
               const ParallelFor& parallel) {
  const int64_t tasks = plan.groups(p) * p.batch * plan.tiles(p);
  parallel(tasks, grain(plan.tile_h * p.out_width * p.branches()),
           [&](int64_t a, int64_t b) { kernel(p, plan, a, b); });
}

// What a backward task works on, of which its thread's cache should hold most.
int64_t backward_bytes(const NormalisedBranchesProblem& p, const NormalisedBranchesPlan& plan) {
  const WindowSize input = plan.input_window(p), gradient = plan.gradient_window(p);
  const int64_t vectors = input.rows * input.columns + gradient.rows * gradient.columns +
                          gradient.rows * p.out_width * (1 + p.given_count) + plan.tile_h * p.width +
                          2 * p.taps() + p.width + p.out_width;
  return vectors * plan.lanes * element(p);
}

}  // namespace

NormalisedBranchesPlan plan_normalised_branches(const NormalisedBranchesProblem& p, const Machine& m) {
  NormalisedBranchesPlan plan;
  plan.lanes = wide(p) ? m.lanes_f64 : m.lanes_f32;
  for (int64_t b = 0; p.kernels && b < p.kernel_count; ++b) {
    plan.input.include(p.kernels[b].forward);
    plan.gradient.include(p.kernels[b].backward);
  }
  const int64_t rows = std::max<int64_t>(1, std::max(p.height, p.out_height));
  plan.tile_h = rows;
  for (int64_t parts = 2; plan.tile_h > kLeastTileRows && backward_bytes(p, plan) > kTileBytes; ++parts)
    plan.tile_h = ceil_div(rows, parts);
  plan.images = std::max<int64_t>(1, p.batch * plan.groups(p) / kGradientTasks);
  return plan;
}

bool cheaper_in_place(const ConvParams& p, DType dtype, bool channels_last, const Machine& m) {
  Geometry forward = forward_problem(p);
  Geometry backward = backward_input_phases(p, {}, {}, {}).at(0);
  Switches switches = switches_from_environment();
  switches.aten = false;
  double here = 0, apart = 0;
  for (Pass pass : {Pass::forward, Pass::backward_input, Pass::backward_weight}) {
    Geometry& g = pass == Pass::backward_input ? backward : forward;
    g.adjacent = channels_last, g.rows = !channels_last;
    here += cycles_of_sums(pass, g, dtype, m);
    apart += choose_depthwise_conv2d(pass, g, 1, dtype, m, switches).cycles + cycles_of_moving(g, m);
  }
  return here <= apart;
}

void normalised_branches_outputs(NormalisedBranchesProblem p, const Machine& m, void* means, void* variances,
                                 const ParallelFor& parallel) {
  if (empty(p)) return;
  const NormalisedBranchesPlan plan = plan_normalised_branches(p, m);
  const int64_t groups = plan.groups(p);
  const auto partial =
      allocate(groups * p.batch * plan.tiles(p) * p.branches() * kMoments * plan.lanes * element(p));
  p.partial = partial.get();
  const Kernels& k = *kernels_for(m.isa);
  run_tiles(p, plan, wide(p) ? k.branches_outputs_f64 : k.branches_outputs_f32, parallel);
  parallel(groups, 4, [&](int64_t a, int64_t b) {
    for (int64_t g = a; g < b; ++g)
      wide(p) ? combine_moments(p, plan, g, static_cast<double*>(means), static_cast<double*>(variances))
              : combine_moments(p, plan, g, static_cast<float*>(means), static_cast<float*>(variances));
  });
}

void normalised_branches_sum(const NormalisedBranchesProblem& p, const Machine& m,
                             const ParallelFor& parallel) {
  if (empty(p)) return;
  const Kernels& k = *kernels_for(m.isa);
  run_tiles(p, plan_normalised_branches(p, m), wide(p) ? k.branches_sum_f64 : k.branches_sum_f32, parallel);
}

void normalised_branches_dots(NormalisedBranchesProblem p, const Machine& m, void* total, void* dots,
                              const ParallelFor& parallel) {
  if (empty(p)) return;
  const NormalisedBranchesPlan plan = plan_normalised_branches(p, m);
  const int64_t groups = plan.groups(p);
  const auto partial =
      allocate(groups * p.batch * plan.tiles(p) * (1 + p.branches()) * plan.lanes * element(p));
  p.partial = partial.get();
  const Kernels& k = *kernels_for(m.isa);
  run_tiles(p, plan, wide(p) ? k.branches_dots_f64 : k.branches_dots_f32, parallel);
  for (int64_t g = 0; g < groups; ++g)
    wide(p) ? combine_dots(p, plan, g, static_cast<double*>(total), static_cast<double*>(dots))
            : combine_dots(p, plan, g, static_cast<float*>(total), static_cast<float*>(dots));
}

void normalised_branches_backward(NormalisedBranchesProblem p, const Machine& m,
                                  const ParallelFor& parallel) {
  if (empty(p)) return;
  const NormalisedBranchesPlan plan = plan_normalised_branches(p, m);
  const int64_t groups = plan.groups(p), splits = plan.splits(p);
  const auto partial = allocate(groups * splits * p.taps() * plan.lanes * element(p));
  p.partial = partial.get();
  const Kernels& k = *kernels_for(m.isa);
  const auto kernel = wide(p) ? k.branches_gradients_f64 : k.branches_gradients_f32;
  const auto reduce = wide(p) ? k.branches_reduce_f64 : k.branches_reduce_f32;
  parallel(groups * splits, grain(plan.images * p.height * p.width * p.branches()),
           [&](int64_t a, int64_t b) { kernel(p, plan, a, b); });
  if (p.kernel_count) parallel(groups, 1, [&](int64_t a, int64_t b) { reduce(p, plan, a, b); });
}

}  // namespace lkconv::cpu
