// Random sums of normalised branches and their gradients, compared with naive loops in double: see fuzz.cpp.
#include <cmath>
#include <cstdio>
#include <memory>

#include "cpu/kernels.h"
#include "cpu/normalised_branches.h"
#include "fuzz.h"

namespace fuzz {
namespace {

using Numbers = std::vector<double>;

struct Kernel {
  ConvParams c{};
  std::unique_ptr<Buffer> weight, grad_weight;
};

// What one seed stands for, with its tensors.
struct Case {
  NormalisedBranchesProblem p{};
  std::vector<Kernel> kernels;
  std::vector<BranchKernel> branch_kernels;
  std::unique_ptr<Buffer> input, output, grad_output, grad_input;
  std::vector<std::unique_ptr<Buffer>> given, grad_given;
  std::vector<TensorView> given_views, grad_given_views;
  std::vector<char> saved, scale, slope, constant;
};

DType wide(const Case& s) { return s.p.dtype == DType::f64 ? DType::f64 : DType::f32; }

// One axis of a kernel whose output is `extra` larger than its input; false if there is none.
bool random_axis(Random& random, int64_t size, int64_t extra, int64_t& taps, int64_t& pad, int64_t& dil) {
  taps = random(1, random.chance(0.2) ? 9 : 4), dil = random(1, 3);
  const int64_t twice = extra + dil * (taps - 1);
  pad = twice / 2;
  return twice >= 0 && twice % 2 == 0 && size + extra >= 1;
}

bool add_kernel(Random& random, Case& s, int64_t extra_h, int64_t extra_w) {
  NormalisedBranchesProblem& p = s.p;
  ConvParams c{};
  c.batch = p.batch, c.channels = p.channels, c.multiplier = 1, c.height = p.height, c.width = p.width;
  c.stride_h = c.stride_w = 1, c.out_height = p.out_height, c.out_width = p.out_width;
  if (!random_axis(random, p.height, extra_h, c.kernel_h, c.pad_h, c.dil_h) ||
      !random_axis(random, p.width, extra_w, c.kernel_w, c.pad_w, c.dil_w))
    return false;
  Kernel& k = s.kernels.emplace_back();
  k.c = c;
  const Size size{p.channels, 1, c.kernel_h, c.kernel_w};
  k.weight = std::make_unique<Buffer>(random, size, p.dtype, true);
  k.grad_weight = std::make_unique<Buffer>(random, size, p.dtype, false);
  return true;
}

TensorView kernel_view(const Buffer& b) {
  TensorView v = b.view;
  v.stride_c = v.stride_n;
  return v;
}

std::vector<char> factors(Random& random, int64_t count, DType dtype) {
  std::vector<char> bytes(size_t(count * dtype_size(dtype)));
  bytes.shrink_to_fit();
  for (int64_t i = 0; i < count; ++i) write(bytes.data() + i * dtype_size(dtype), dtype, random.normal());
  return bytes;
}

Case random_case(Random& random, const Machine& m) {
  Case s;
  NormalisedBranchesProblem& p = s.p;
  p.dtype = DType(random(0, 3));
  p.batch = random(1, 3), p.channels = random(1, 40), p.height = random(1, 14), p.width = random(1, 18);
  if (random.chance(0.05))
    p.batch = 1, p.channels = 2, p.height = random(60, 110), p.width = random(120, 160);
  const int64_t extra_h = random.chance(0.6) ? 0 : random(-2, 4),
                extra_w = random.chance(0.6) ? 0 : random(-2, 4);
  p.out_height = std::max<int64_t>(1, p.height + extra_h),
  p.out_width = std::max<int64_t>(1, p.width + extra_w);
  const int64_t count = random(1, 4);
  while (int64_t(s.kernels.size()) < count)
    add_kernel(random, s, p.out_height - p.height, p.out_width - p.width);
  p.kernel_count = count;
  const Size in{p.batch, p.channels, p.height, p.width}, out{p.batch, p.channels, p.out_height, p.out_width};
  s.input = std::make_unique<Buffer>(random, in, p.dtype, true);
  s.grad_output = std::make_unique<Buffer>(random, out, p.dtype, true);
  s.output = std::make_unique<Buffer>(random, out, p.dtype, false);
  s.grad_input = std::make_unique<Buffer>(random, in, p.dtype, false);
  p.identity = in == out && random.chance(0.5);
  if (p.identity) s.given_views.push_back(s.input->view);
  for (int64_t i = random(0, 2); i > 0; --i) {
    s.given.push_back(std::make_unique<Buffer>(random, out, p.dtype, true));
    s.given_views.push_back(s.given.back()->view);
    s.grad_given.push_back(std::make_unique<Buffer>(random, out, p.dtype, false));
    s.grad_given_views.push_back(s.grad_given.back()->view);
  }
  for (const Kernel& k : s.kernels) {
    BranchKernel b{};
    b.forward = forward_problem(k.c);
    b.weight = kernel_view(*k.weight), b.grad_weight = kernel_view(*k.grad_weight);
    const ForwardProblem backward = backward_input_phases(k.c, {}, b.weight, {}).at(0);
    b.backward = backward, b.flipped = backward.weight;
    s.branch_kernels.push_back(b);
  }
  const int64_t lanes = p.dtype == DType::f64 ? m.lanes_f64 : m.lanes_f32;
  s.saved.assign(size_t(count * p.batch * ceil_div(p.channels, lanes) * lanes * p.out_height * p.out_width *
                        dtype_size(p.dtype)),
                 char(0xff));
  s.saved.shrink_to_fit();
  const int64_t branches = count + int64_t(s.given_views.size());
  s.scale = factors(random, branches * p.channels, wide(s));
  s.slope = factors(random, branches * p.channels, wide(s));
  s.constant = factors(random, branches * p.channels, wide(s));
  return s;
}

double element(const std::vector<char>& values, int64_t i, DType dtype) {
  return read(values.data() + i * dtype_size(dtype), dtype);
}

// All (tap, pixel) pairs of kernel k for one output: body(u, v, y, x) inside the image.
template <class Body>
void each_tap(const ConvParams& c, int64_t oy, int64_t ox, Body body) {
  for (int64_t u = 0; u < c.kernel_h; ++u)
    for (int64_t v = 0; v < c.kernel_w; ++v) {
      const int64_t y = oy - c.pad_h + u * c.dil_h, x = ox - c.pad_w + v * c.dil_w;
      if (y >= 0 && y < c.height && x >= 0 && x < c.width) body(u, v, y, x);
    }
}

// The value of branch b as the kernels see it: what they kept of a convolution.
double branch_value(const Case& s, int64_t b, const Size& i, const Machine& m) {
  const NormalisedBranchesProblem& p = s.p;
  if (b >= p.kernel_count) {
    const TensorView& t = s.given_views[size_t(b - p.kernel_count)];
    return read(static_cast<char*>(t.data) +
                    (i[0] * t.stride_n + i[1] * t.stride_c + i[2] * t.stride_h + i[3] * t.stride_w) *
                        dtype_size(t.dtype),
                t.dtype);
  }
  const int64_t lanes = p.dtype == DType::f64 ? m.lanes_f64 : m.lanes_f32,
                groups = ceil_div(p.channels, lanes);
  const int64_t plane = (b * p.batch + i[0]) * groups + i[1] / lanes;
  return element(s.saved, ((plane * p.out_height + i[2]) * p.out_width + i[3]) * lanes + i[1] % lanes,
                 p.dtype);
}

struct Tolerance {
  DType dtype;
  bool operator()(double got, double value, double magnitude, double terms) const {
    if (dtype == DType::f16 && std::fabs(value) > 6e4) return std::fabs(got) > 5e4;  // may be infinite
    const double storing = dtype == DType::bf16  ? 1.0 / 256
                           : dtype == DType::f16 ? 1.0 / 1024
                           : dtype == DType::f32 ? 1e-6
                                                 : 1e-14;
    const double sums = dtype == DType::f64 ? 1e-14 : 1e-6;
    return std::fabs(got - value) <= storing * std::fabs(value) + sums * std::sqrt(terms + 16) * magnitude +
                                         (dtype == DType::f16 ? 1e-6 : 0);
  }
};

// Outputs and moments of every branch.
const char* check_outputs(Case& s, const Machine& m, const ParallelFor& threads) {
  NormalisedBranchesProblem& p = s.p;
  const int64_t branches = p.branches();
  const DType t = wide(s);
  const Tolerance close{p.dtype}, close_sum{t};
  std::vector<char> means(size_t(branches * p.channels * dtype_size(t))), variances(means.size());
  normalised_branches_outputs(p, m, means.data(), variances.data(), threads);
  const double count = double(p.batch * p.out_height * p.out_width);
  for (int64_t b = 0; b < branches; ++b)
    for (int64_t c = 0; c < p.channels; ++c) {
      double sum = 0, squares = 0;
      bool ok = true;
      s.grad_output->each([&](const Size& i) {
        if (i[1] != c) return;
        const double got = branch_value(s, b, i, m);
        sum += got, squares += got * got;
        if (b >= p.kernel_count) return;
        double value = 0, magnitude = 0;
        Kernel& k = s.kernels[size_t(b)];
        each_tap(k.c, i[2], i[3], [&](int64_t u, int64_t v, int64_t y, int64_t x) {
          const double term = k.weight->get({c, 0, u, v}) * s.input->get({i[0], c, y, x});
          value += term, magnitude += std::fabs(term);
        });
        ok = ok && close(got, value, magnitude, 1);
      });
      if (!ok) return "outputs";
      const double mean = sum / count, variance = squares / count - mean * mean;
      if (!close_sum(element(means, b * p.channels + c, t), mean, std::sqrt(squares / count), count))
        return "means";
      if (!close_sum(element(variances, b * p.channels + c, t), variance, squares / count, count))
        return "variances";
    }
  return nullptr;
}

const char* check_sum_and_dots(Case& s, const Machine& m, const ParallelFor& threads) {
  NormalisedBranchesProblem p = s.p;
  p.kernels = nullptr;  // their outputs alone matter
  const int64_t branches = p.branches();
  const DType t = wide(s);
  const Tolerance close{p.dtype}, close_sum{t};
  normalised_branches_sum(p, m, threads);
  std::vector<char> total(size_t(p.channels * dtype_size(t))), dots(total.size() * size_t(branches));
  normalised_branches_dots(p, m, total.data(), dots.data(), threads);
  Numbers totals(size_t(p.channels)), found(size_t(p.channels * branches)), sizes(found.size());
  bool ok = true;
  s.output->each([&](const Size& i) {
    double value = element(s.constant, i[1], t), magnitude = std::fabs(value);
    const double dy = s.grad_output->get(i);
    totals[size_t(i[1])] += dy;
    for (int64_t b = 0; b < branches; ++b) {
      const int64_t at = b * p.channels + i[1];
      const double y = branch_value(s, b, i, m), term = element(s.scale, at, t) * y;
      value += term, magnitude += std::fabs(term);
      found[size_t(at)] += dy * (y - element(s.constant, at, t));
      sizes[size_t(at)] += std::fabs(dy) * (std::fabs(y) + std::fabs(element(s.constant, at, t)));
    }
    ok = ok && close(s.output->get(i), value, magnitude, double(branches));
  });
  if (!ok) return "sum";
  if (!s.output->gaps_untouched()) return "sum's gaps";
  for (int64_t c = 0; c < p.channels; ++c) {
    if (!close_sum(element(total, c, t), totals[size_t(c)], 4 * double(p.batch * p.out_height * p.out_width),
                   1))
      return "total";
    for (int64_t at = c; at < branches * p.channels; at += p.channels)
      if (!close_sum(element(dots, at, t), found[size_t(at)], sizes[size_t(at)], 1)) return "dots";
  }
  return nullptr;
}

const char* check_backward(Case& s, const Machine& m, const ParallelFor& threads) {
  NormalisedBranchesProblem& p = s.p;
  const DType t = wide(s);
  const Tolerance close{p.dtype};
  normalised_branches_backward(p, m, threads);
  const auto dz = [&](int64_t b, const Size& i) {
    const int64_t at = b * p.channels + i[1];
    return element(s.scale, at, t) * s.grad_output->get(i) +
           element(s.slope, at, t) * branch_value(s, b, i, m) + element(s.constant, at, t);
  };
  std::vector<Numbers> sums(size_t(p.kernel_count)), sizes(size_t(p.kernel_count));
  const int64_t pixels = p.height * p.width;
  Numbers input(size_t(p.batch * p.channels * pixels)), input_size(input.size());
  const auto at = [&](const Size& i) {
    return size_t((i[0] * p.channels + i[1]) * pixels + i[2] * p.width + i[3]);
  };
  bool ok = true;
  for (int64_t b = 0; b < p.branches(); ++b) {
    const int64_t taps =
        b < p.kernel_count ? s.kernels[size_t(b)].c.kernel_h * s.kernels[size_t(b)].c.kernel_w : 0;
    if (taps)
      sums[size_t(b)].resize(size_t(p.channels * taps)), sizes[size_t(b)].resize(size_t(p.channels * taps));
    s.grad_output->each([&](const Size& i) {
      const double g = dz(b, i);
      if (b >= p.kernel_count) {
        const int64_t other = b - p.kernel_count - p.identity;
        if (other < 0)
          input[at(i)] += g, input_size[at(i)] += std::fabs(g) + 4;
        else
          ok = ok && close(s.grad_given[size_t(other)]->get(i), g, std::fabs(g) + 4, 4);
        return;
      }
      Kernel& k = s.kernels[size_t(b)];
      each_tap(k.c, i[2], i[3], [&](int64_t u, int64_t v, int64_t y, int64_t x) {
        const Size pixel{i[0], i[1], y, x};
        const size_t tap = size_t(i[1] * taps + u * k.c.kernel_w + v);
        const double w = k.weight->get({i[1], 0, u, v}), value = s.input->get(pixel);
        sums[size_t(b)][tap] += g * value, sizes[size_t(b)][tap] += (std::fabs(g) + 4) * std::fabs(value);
        input[at(pixel)] += g * w, input_size[at(pixel)] += (std::fabs(g) + 4) * std::fabs(w);
      });
    });
  }
  if (!ok) return "gradients of tensors";
  s.grad_input->each([&](const Size& i) {
    ok = ok && close(s.grad_input->get(i), input[at(i)], input_size[at(i)], double(p.branches()));
  });
  if (!ok) return "grad_input";
  if (!s.grad_input->gaps_untouched()) return "grad_input's gaps";
  for (auto& tensor : s.grad_given)
    if (!tensor->gaps_untouched()) return "gaps of tensors' gradients";
  for (size_t b = 0; b < s.kernels.size(); ++b) {
    Kernel& k = s.kernels[b];
    const int64_t taps = k.c.kernel_h * k.c.kernel_w;
    k.grad_weight->each([&](const Size& i) {
      const size_t tap = size_t(i[0] * taps + i[2] * k.c.kernel_w + i[3]);
      ok = ok && close(k.grad_weight->get(i), sums[b][tap], sizes[b][tap], 1);
    });
    if (!ok) return "grad_weight";
    if (!k.grad_weight->gaps_untouched()) return "grad_weight's gaps";
  }
  return nullptr;
}

const char* run(uint64_t seed) {
  Random random{std::mt19937_64(seed)};
  const Machine m = machine_for(Isa(random(0, int(detected_isa()))), random(1, 3));
  const ParallelFor threads = threads_of(m.threads);
  Case s = random_case(random, m);
  NormalisedBranchesProblem& p = s.p;
  p.kernels = s.branch_kernels.data();
  p.given = s.given_views.data(), p.given_count = int64_t(s.given_views.size());
  p.grad_given = s.grad_given_views.data();
  p.input = s.input->view, p.output = s.output->view;
  p.grad_output = s.grad_output->view, p.grad_input = s.grad_input->view;
  p.saved = s.saved.data();
  p.scale = s.scale.data(), p.slope = s.slope.data(), p.constant = s.constant.data();
  if (const char* what = check_outputs(s, m, threads)) return what;
  if (const char* what = check_sum_and_dots(s, m, threads)) return what;
  return check_backward(s, m, threads);
}

}  // namespace

int run_branches(uint64_t first, uint64_t count) {
  int failures = 0;
  for (uint64_t seed = first; seed < first + count; ++seed)
    if (const char* what = run(seed))
      std::printf("FAIL seed %llu: %s\n", static_cast<unsigned long long>(seed), what), ++failures;
  std::printf("%llu sums of branches, %d failures\n", static_cast<unsigned long long>(count), failures);
  return failures != 0;
}

}  // namespace fuzz
