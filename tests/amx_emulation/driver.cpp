// Runs the matrix-unit kernels on emulated AMX tiles over random cases and compares them with float64.
// Usage: driver SEED CASES. Prints one line per failure and a summary; exits 1 if anything failed.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/depthwise_conv2d.h"
#include "cpu/half.h"
#include "cpu/kernels.h"
#include "cpu/toeplitz_plan.h"
#include "reference.h"

#define LKCONV_ISA emulated_amx
#define LKCONV_VECTOR_BYTES 64
#define LKCONV_VECTOR_REGISTERS 32
#define LKCONV_AMX_EMULATION "emulated_tiles.h"
#include "cpu/simd.h"
#include "cpu/lanes_io.h"
#include "cpu/direct.h"
#include "cpu/direct_weight.h"
#include "cpu/amx_tiles.h"
#include "cpu/toeplitz_pack.h"
#include "cpu/toeplitz.h"
#include "cpu/toeplitz_weight.h"

namespace lkconv::cpu {

namespace kernels = emulated_amx;

thread_local size_t largest_scratch = 0;

// Exactly the bytes asked for, so that the address sanitizer sees the first one beyond; filled with NaN.
void* thread_scratch_bytes(size_t bytes) {
  thread_local std::unique_ptr<void, void (*)(void*)> buffer(nullptr, std::free);
  buffer.reset(std::aligned_alloc(64, bytes));
  std::memset(buffer.get(), 0xff, bytes);
  largest_scratch = std::max(largest_scratch, bytes);
  return buffer.get();
}

const Kernels* kernels_for(Isa) {
  static const Kernels table = [] {
    Kernels k{};
    k.weight_reduce_f32 = kernels::weight_reduce<float>;
    k.forward_toeplitz = kernels::forward_toeplitz;
    k.weight_toeplitz = kernels::weight_toeplitz;
    return k;
  }();
  return &table;
}

}  // namespace lkconv::cpu

namespace emulation {
namespace {

using namespace lkconv;
using namespace lkconv::cpu;

struct Case {
  ConvParams p;
  Layout input, weight, output;
  bool bias, float_output, vary_plan;
  std::string describe(const char* pass) const {
    char text[400];
    std::snprintf(
        text, sizeof text,
        "%s (%ld,%ld,%ld,%ld) x%ld kernel %ldx%ld stride %ld,%ld pad %ld,%ld layouts %d %d %d bias %d f32 %d "
        "vary %d",
        pass, p.batch, p.channels, p.height, p.width, p.multiplier, p.kernel_h, p.kernel_w, p.stride_h,
        p.stride_w, p.pad_h, p.pad_w, int(input), int(weight), int(output), bias, float_output, vary_plan);
    return text;
  }
};

class Suite {
 public:
  explicit Suite(uint64_t seed) : rng_(seed) {}

  int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng_); }
  bool chance(int percent) { return draw(1, 100) <= percent; }

  // A random case small enough for the float64 loop.
  Case random_case(bool strided) {
    Case c{};
    ConvParams& p = c.p;
    do {
      p.batch = chance(50) ? 1 : draw(2, 5);
      p.channels = chance(40) ? draw(1, 4) : draw(5, 40);
      p.multiplier = chance(75) ? 1 : draw(2, 3);
      p.height = chance(30) ? draw(1, 8) : draw(1, 70);
      p.width = chance(30) ? draw(1, 8) : draw(1, 70);
      p.kernel_h = chance(40) ? draw(1, 7) : draw(1, 51);
      p.kernel_w = chance(40) ? draw(3, 7) : draw(3, 51);
      p.stride_h = strided ? draw(1, 2) : 1, p.stride_w = strided ? draw(1, 2) : 1;
      p.dil_h = p.dil_w = 1;
      p.pad_h = chance(60) ? p.kernel_h / 2 : draw(0, p.kernel_h + 2);
      p.pad_w = chance(60) ? p.kernel_w / 2 : draw(0, p.kernel_w + 2);
      p.out_height = (p.height + 2 * p.pad_h - p.kernel_h) / p.stride_h + 1;
      p.out_width = (p.width + 2 * p.pad_w - p.kernel_w) / p.stride_w + 1;
    } while (p.height + 2 * p.pad_h < p.kernel_h || p.width + 2 * p.pad_w < p.kernel_w || work(p) > 4e6);
    c.input = Layout(draw(0, kLayouts));
    c.weight = Layout(draw(0, kLayouts - 1));
    c.output = Layout(draw(0, kLayouts - 1));
    c.bias = chance(50), c.float_output = chance(60), c.vary_plan = chance(60);
    return c;
  }

  void forward(const Case& c) {
    const ConvParams& p = c.p;
    Tensor input(p.batch, p.channels, p.height, p.width, c.input), weight = tensor_like_weight(c);
    Tensor bias(1, p.out_channels(), 1, 1, Layout::contiguous);
    Tensor output(p.batch, p.out_channels(), p.out_height, p.out_width, c.output, output_dtype(c));
    input.fill(rng_), weight.fill(rng_), bias.fill(rng_);
    ForwardProblem f = forward_problem(p);
    f.input = input.view, f.weight = by_channel(weight.view), f.output = output.view;
    if (c.bias) f.bias = bias.view;
    if (!run(f, c)) return;
    compare(c, "forward", exact_forward(p, input, weight, c.bias ? &bias : nullptr), output);
  }

  void backward_input(const Case& c) {
    const ConvParams& p = c.p;
    Tensor grad(p.batch, p.out_channels(), p.out_height, p.out_width, c.input),
        weight = tensor_like_weight(c);
    Tensor output(p.batch, p.channels, p.height, p.width, c.output, output_dtype(c));
    grad.fill(rng_), weight.fill(rng_);
    for (const ForwardProblem& f : backward_input_phases(p, grad.view, by_channel(weight.view), output.view))
      if (!run(f, c)) return;
    compare(c, "backward_input", exact_backward_input(p, grad, weight), output);
  }

  void backward_weight(const Case& c) {
    const ConvParams& p = c.p;
    Tensor grad(p.batch, p.out_channels(), p.out_height, p.out_width, c.output);
    Tensor input(p.batch, p.channels, p.height, p.width, c.input);
    Tensor output(p.out_channels(), 1, p.kernel_h, p.kernel_w, c.weight, output_dtype(c));
    grad.fill(rng_), input.fill(rng_);
    WeightProblem w = weight_problem(p);
    w.input = input.view, w.grad_output = grad.view, w.grad_weight = by_channel(output.view);
    Plan plan;
    if (toeplitz_plan(Pass::backward_weight, w, 1, DType::bf16, machine(2), plan)) return;
    vary(plan, w, c, false);
    plan.splits = draw(1, std::min<int64_t>(3, p.batch));
    const int64_t groups = channel_groups(w.channels, plan);
    std::vector<float> partial(size_t(plan.splits * groups * p.kernel_h * p.kernel_w * plan.lanes), NAN);
    largest_scratch = 0;
    split_tasks(groups * plan.splits,
                [&](int64_t a, int64_t b) { kernels::weight_toeplitz(w, plan, partial.data(), a, b); });
    check_scratch(c, "backward_weight", plan);
    kernels::weight_reduce<float>(w, plan, partial.data(), 0, groups);
    compare(c, "backward_weight", exact_backward_weight(p, grad, input), output);
  }

  // Through the launcher with several threads, wherever the matrix units can take the case: bit-identical
  // whatever the thread count for outputs, and right.
  void launched(const Case& c) {
    const ConvParams& p = c.p;
    Tensor input(p.batch, p.channels, p.height, p.width, c.input), weight = tensor_like_weight(c);
    input.fill(rng_), weight.fill(rng_);
    ForwardProblem f = forward_problem(p);
    f.input = input.view;
    const auto chosen = [&](Pass pass, int64_t threads) {
      return choose_depthwise_conv2d(pass, f, 1, DType::bf16, machine(threads), switches_from_environment())
                 .algorithm == Algorithm::toeplitz;
    };
    if (!chosen(Pass::forward, 1) || !chosen(Pass::forward, 8) || !chosen(Pass::backward_weight, 8)) return;
    const auto parallel = [](int64_t tasks, int64_t, const std::function<void(int64_t, int64_t)>& body) {
      const int64_t n = std::min<int64_t>(3, tasks);
      std::vector<std::thread> threads;
      for (int64_t i = 0; i < n; ++i)
        threads.emplace_back([&, i] { body(tasks * i / n, tasks * (i + 1) / n); });
      for (std::thread& t : threads) t.join();
    };
    Tensor one(p.batch, p.out_channels(), p.out_height, p.out_width, c.output);
    Tensor many(p.batch, p.out_channels(), p.out_height, p.out_width, c.output);
    const TensorView no_bias{nullptr, DType::bf16, 0, 0, 0, 0};
    depthwise_conv2d(p, input.view, by_channel(weight.view), no_bias, one.view, machine(1), parallel);
    depthwise_conv2d(p, input.view, by_channel(weight.view), no_bias, many.view, machine(8), parallel);
    for_each_output(many, [&](int64_t n, int64_t ch, int64_t y, int64_t x) {
      if (one.at(n, ch, y, x) != many.at(n, ch, y, x))
        fail(c, "launched", "threads change the result", n, ch, y, x);
    });
    compare(c, "launched forward", exact_forward(p, input, weight, nullptr), many);
    Tensor grad_weight(p.out_channels(), 1, p.kernel_h, p.kernel_w, Layout::contiguous);
    depthwise_conv2d_backward_weight(p, one.view, input.view, by_channel(grad_weight.view), machine(8),
                                     parallel);
    compare(c, "launched backward_weight", exact_backward_weight(p, one, input), grad_weight);
    ++launched_;
  }

  // One infinity in the input: never lost, never in another image or channel.
  void non_finite(const Case& c) {
    const ConvParams& p = c.p;
    if (c.input == Layout::expanded) return;
    Tensor input(p.batch, p.channels, p.height, p.width, c.input), weight = tensor_like_weight(c);
    Tensor output(p.batch, p.out_channels(), p.out_height, p.out_width, c.output);
    input.fill(rng_), weight.fill(rng_);
    const int64_t in = draw(0, p.batch - 1), ic = draw(0, p.channels - 1);
    const int64_t iy = draw(0, p.height - 1), ix = draw(0, p.width - 1);
    input.set(in, ic, iy, ix, chance(50) ? INFINITY : NAN);
    ForwardProblem f = forward_problem(p);
    f.input = input.view, f.weight = by_channel(weight.view), f.output = output.view;
    if (!run(f, c)) return;
    for_each_output(output, [&](int64_t n, int64_t ch, int64_t y, int64_t x) {
      const bool finite = std::isfinite(output.at(n, ch, y, x));
      const bool same_plane = n == in && ch / p.multiplier == ic;
      const int64_t u = iy + p.pad_h - y, v = ix + p.pad_w - x;
      const bool in_window = same_plane && u >= 0 && u < p.kernel_h && v >= 0 && v < p.kernel_w;
      if (in_window && finite) fail(c, "non-finite", "lost", n, ch, y, x);
      if (!same_plane && !finite) fail(c, "non-finite", "spread to another plane", n, ch, y, x);
    });
    ++compared_;
  }

  int report() const {
    std::printf("compared %ld launched %ld products %ld worst %.3f of the bound, failures %ld\n",
                long(compared_), long(launched_), long(kernels::emulated.products), worst_, long(failures_));
    return failures_ || !compared_ ? 1 : 0;
  }

 private:
  static double work(const ConvParams& p) {
    return double(p.batch * p.out_channels() * p.kernel_h * p.kernel_w) * double(p.out_height * p.out_width);
  }
  static Machine machine(int64_t threads) { return {Isa::amx, threads, 16, 8}; }
  static DType output_dtype(const Case& c) { return c.float_output ? DType::f32 : DType::bf16; }
  static Tensor tensor_like_weight(const Case& c) {
    return Tensor(c.p.out_channels(), 1, c.p.kernel_h, c.p.kernel_w, c.weight);
  }

  // Kernels reach the planes of a weight (C, 1, kh, kw) by its channel stride.
  static TensorView by_channel(TensorView weight) {
    weight.stride_c = weight.stride_n;
    return weight;
  }

  template <class Body>
  static void for_each_output(const Tensor& t, Body body) {
    for (int64_t n = 0; n < t.size[0]; ++n)
      for (int64_t c = 0; c < t.size[1]; ++c)
        for (int64_t y = 0; y < t.size[2]; ++y)
          for (int64_t x = 0; x < t.size[3]; ++x) body(n, c, y, x);
  }

  // Cuts tasks otherwise than the planner would, so that small cases have edges inside the image.
  void vary(Plan& plan, const Geometry& g, const Case& c, bool forward) {
    if (!c.vary_plan) return;
    plan.tile_w = std::min(g.out_width, 16 * draw(1, 3));
    plan.tile_h = draw(1, g.out_height);
    plan.images = draw(1, g.batch);
    if (forward) plan.lanes = draw(1, 16);
    plan.scratch_bytes = std::numeric_limits<int64_t>::max();
  }

  template <class Body>
  void split_tasks(int64_t tasks, Body body) {
    const int64_t cut = draw(0, tasks);
    if (cut) body(0, cut);
    if (cut < tasks) body(cut, tasks);
    if (kernels::emulated.configured) std::printf("tiles are still configured\n"), ++failures_;
  }

  bool run(const ForwardProblem& f, const Case& c) {
    if (f.out_height == 0 || f.out_width == 0) return true;  // a stride phase without outputs
    Plan plan;
    if (toeplitz_plan(Pass::forward, f, f.reduce, DType::bf16, machine(2), plan)) return false;
    vary(plan, f, c, true);
    const int64_t tasks = channel_groups(f.channels, plan) * ceil_div(f.batch, plan.images) *
                          ceil_div(f.out_height, plan.tile_h) * ceil_div(f.out_width, plan.tile_w);
    largest_scratch = 0;
    split_tasks(tasks, [&](int64_t a, int64_t b) { kernels::forward_toeplitz(f, plan, a, b); });
    check_scratch(c, "forward", plan);
    return true;
  }

  void check_scratch(const Case& c, const char* pass, const Plan& plan) {
    if (int64_t(largest_scratch) > plan.scratch_bytes) {
      std::printf("%s: scratch %ld above the plan's %ld\n", c.describe(pass).c_str(), long(largest_scratch),
                  long(plan.scratch_bytes));
      ++failures_;
    }
  }

  // Every partial sum rounds once: at most one rounding per product in a tile's chain of 16, per tile, and a
  // few to join the parts. That bounds float32 results; bfloat16 ones round once more.
  void compare(const Case& c, const char* pass, const Results& exact, const Tensor& got) {
    const ConvParams& p = c.p;
    const double tiles = std::string(pass).find("weight") == std::string::npos
                             ? double(p.kernel_h * ceil_div(p.kernel_w + 15, 32) * p.multiplier)
                             : double(p.batch * ceil_div(p.out_height, 1) * ceil_div(p.out_width, 16));
    const double unit = std::ldexp(1.0, -24),
                 half_unit = got.view.dtype == DType::bf16 ? std::ldexp(1.0, -8) : 0;
    size_t i = 0;
    for_each_output(got, [&](int64_t n, int64_t ch, int64_t y, int64_t x) {
      const Exact& e = exact[i++];
      const double bound =
          (tiles + 24) * unit * e.magnitude * (1 + half_unit) + half_unit * std::fabs(e.value) + 1e-37;
      const double error = std::fabs(got.at(n, ch, y, x) - e.value) / bound;
      worst_ = std::max(worst_, error);
      if (!(error <= 1)) fail(c, pass, "wrong", n, ch, y, x);
    });
    ++compared_;
  }

  void fail(const Case& c, const char* pass, const char* what, int64_t n, int64_t ch, int64_t y, int64_t x) {
    if (++failures_ <= 20)
      std::printf("%s: %s at (%ld,%ld,%ld,%ld)\n", c.describe(pass).c_str(), what, long(n), long(ch), long(y),
                  long(x));
  }

  std::mt19937_64 rng_;
  int64_t compared_ = 0, launched_ = 0, failures_ = 0;
  double worst_ = 0;
};

}  // namespace
}  // namespace emulation

int main(int argc, char** argv) {
  if (argc != 3) return std::fprintf(stderr, "usage: driver SEED CASES\n"), 2;
  setenv("LKCONV_ALGORITHM", "toeplitz", 1);  // the table of kernels above has nothing else
  emulation::Suite suite(std::strtoull(argv[1], nullptr, 10));
  for (long i = 0; i < std::atol(argv[2]); ++i) {
    suite.forward(suite.random_case(false));
    suite.backward_input(suite.random_case(true));
    suite.backward_weight(suite.random_case(false));
    suite.non_finite(suite.random_case(false));
    suite.launched(suite.random_case(false));
  }
  return suite.report();
}
