// Random folds of branch kernels and their adjoints, compared with naive loops in double: see fuzz.cpp.
#include <cmath>
#include <cstdio>
#include <memory>

#include "cpu/merge_depthwise_kernels.h"
#include "fuzz.h"

namespace fuzz {
namespace {

struct Branch {
  MergeBranch b{};
  std::unique_ptr<Buffer> weight, scale;
  std::vector<char> grad_weight, grad_scale;
};

DType random_dtype(Random& random, bool mixed, DType all) { return mixed ? DType(random(0, 3)) : all; }

std::vector<char> exactly(int64_t count, DType dtype) {
  std::vector<char> bytes(size_t(count * dtype_size(dtype)), char(kPattern));
  bytes.shrink_to_fit();
  return bytes;
}

ChannelVector vector_of(Buffer& b) { return {b.view.data, b.view.dtype, b.view.stride_c}; }

Branch random_branch(Random& random, const MergeProblem& p, DType dtype, bool scaled) {
  Branch branch;
  MergeBranch& b = branch.b;
  const auto place = [&](int64_t size, int64_t& kernel, int64_t& offset, int64_t& step) {
    kernel = random.chance(0.3) ? size : random(1, size);
    step = kernel > 1 ? random(1, (size - 1) / (kernel - 1)) : random(1, 3);
    offset = random(0, size - 1 - step * (kernel - 1));
  };
  place(p.kernel_h, b.kernel_h, b.offset_h, b.step_h);
  place(p.kernel_w, b.kernel_w, b.offset_w, b.step_w);
  branch.weight = std::make_unique<Buffer>(random, Size{p.channels, 1, b.kernel_h, b.kernel_w}, dtype, true);
  b.weight = branch.weight->view;
  b.weight.stride_c = b.weight.stride_n;
  branch.grad_weight = exactly(p.channels * b.kernel_h * b.kernel_w, dtype);
  b.grad_weight = branch.grad_weight.data();
  if (!scaled) return branch;
  branch.scale = std::make_unique<Buffer>(random, Size{1, p.channels, 1, 1}, dtype, true);
  b.scale = vector_of(*branch.scale);
  branch.grad_scale = exactly(p.channels, dtype);
  b.grad_scale = {branch.grad_scale.data(), dtype, 1};
  return branch;
}

// |got - value| within what rounding of `terms` products and of the result allows.
bool close(double got, double value, double magnitude, DType dtype, bool wide, int64_t terms) {
  const double storing = dtype == DType::bf16  ? 1.0 / 256
                         : dtype == DType::f16 ? 1.0 / 2048
                         : dtype == DType::f32 ? 1e-7
                                               : 1e-15;
  return std::fabs(got - value) <= storing * std::fabs(value) +
                                       (wide ? 1e-14 : 1e-6) * double(terms) * magnitude +
                                       (dtype == DType::f16 ? 1e-7 : 0);
}

// visit(branch, c, u, v, y, x) for every tap.
template <class Visit>
void each_tap(const MergeProblem& p, Visit visit) {
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const MergeBranch& b = p.branches[i];
    for (int64_t c = 0; c < p.channels; ++c)
      for (int64_t u = 0; u < b.kernel_h; ++u)
        for (int64_t v = 0; v < b.kernel_w; ++v)
          visit(i, c, u, v, b.offset_h + u * b.step_h, b.offset_w + v * b.step_w);
  }
}

double scale_of(Branch& b, int64_t c) { return b.scale ? b.scale->get({0, c, 0, 0}) : 1.0; }

const char* check_fold(const MergeProblem& p, std::vector<Branch>& branches, std::vector<Buffer>& biases) {
  std::vector<double> value(size_t(p.channels * p.taps())), magnitude(value.size());
  each_tap(p, [&](int64_t i, int64_t c, int64_t u, int64_t v, int64_t y, int64_t x) {
    const double term = scale_of(branches[i], c) * branches[i].weight->get({c, 0, u, v});
    const size_t at = size_t(c * p.taps() + y * p.kernel_w + x);
    value[at] += term, magnitude[at] += std::fabs(term);
  });
  const int64_t terms = p.branch_count + 1;
  for (size_t i = 0; i < value.size(); ++i) {
    const char* at = static_cast<const char*>(p.kernel.data) + int64_t(i) * dtype_size(p.kernel.dtype);
    if (!close(read(at, p.kernel.dtype), value[i], magnitude[i], p.kernel.dtype, p.wide, terms))
      return "wrong kernel";
  }
  for (int64_t c = 0; c < p.channels; ++c) {
    double sum = 0, size = 0;
    for (Buffer& bias : biases) sum += bias.get({0, c, 0, 0}), size += std::fabs(bias.get({0, c, 0, 0}));
    const char* at = static_cast<const char*>(p.bias.data) + c * p.bias.stride * dtype_size(p.bias.dtype);
    if (!close(read(at, p.bias.dtype), sum, size, p.bias.dtype, p.wide, p.bias_count + 1))
      return "wrong bias";
  }
  return nullptr;
}

const char* check_adjoint(const MergeProblem& p, std::vector<Branch>& branches) {
  const auto grad = [&](int64_t c, int64_t y, int64_t x) {
    const int64_t at = c * p.taps() + y * p.kernel_w + x;
    return read(static_cast<const char*>(p.kernel.data) + at * dtype_size(p.kernel.dtype), p.kernel.dtype);
  };
  std::vector<double> dots(size_t(p.branch_count * p.channels)), magnitude(dots.size());
  const char* wrong = nullptr;
  each_tap(p, [&](int64_t i, int64_t c, int64_t u, int64_t v, int64_t y, int64_t x) {
    const MergeBranch& b = p.branches[i];
    const double g = grad(c, y, x), expected = scale_of(branches[i], c) * g;
    const int64_t at = (c * b.kernel_h + u) * b.kernel_w + v;
    const char* got = static_cast<const char*>(b.grad_weight) + at * dtype_size(b.weight.dtype);
    if (!close(read(got, b.weight.dtype), expected, std::fabs(expected), b.weight.dtype, p.wide, 1))
      wrong = "wrong weight gradient";
    const double term = g * branches[i].weight->get({c, 0, u, v});
    dots[size_t(i * p.channels + c)] += term, magnitude[size_t(i * p.channels + c)] += std::fabs(term);
  });
  for (int64_t i = 0; i < p.branch_count; ++i)
    for (int64_t c = 0; c < p.channels && branches[i].scale; ++c) {
      const MergeBranch& b = p.branches[i];
      const char* got = static_cast<const char*>(b.grad_scale.data) + c * dtype_size(b.scale.dtype);
      const size_t at = size_t(i * p.channels + c);
      if (!close(read(got, b.scale.dtype), dots[at], magnitude[at], b.scale.dtype, p.wide, p.taps()))
        wrong = "wrong scale gradient";
    }
  return wrong;
}

const char* run(uint64_t seed) {
  Random random{std::mt19937_64(seed)};
  MergeProblem p{};
  p.channels = random(0, 20), p.kernel_h = random(1, 35), p.kernel_w = random(1, 35);
  const bool mixed = random.chance(0.3), scaled = random.chance(0.7), backward = random.chance(0.5);
  const DType all = DType(random(0, 3)), result = random_dtype(random, mixed, all);
  std::vector<Branch> branches;
  std::vector<MergeBranch> views;
  std::vector<Buffer> biases;
  std::vector<ChannelVector> vectors;
  for (int64_t i = random(1, 4); i > 0; --i)
    branches.push_back(random_branch(random, p, random_dtype(random, mixed, all), scaled));
  for (int64_t i = random(0, 3); i > 0; --i)
    biases.emplace_back(random, Size{1, p.channels, 1, 1}, random_dtype(random, mixed, all), !backward);
  p.wide = result == DType::f64;
  for (Branch& b : branches) views.push_back(b.b), p.wide |= b.b.weight.dtype == DType::f64;
  for (Buffer& b : biases) vectors.push_back(vector_of(b)), p.wide |= b.view.dtype == DType::f64;
  std::vector<char> kernel = exactly(p.channels * p.taps(), result);
  Buffer bias(random, Size{1, p.channels, 1, 1}, result, backward);
  for (int64_t i = 0; backward && i < p.channels * p.taps(); ++i)
    write(kernel.data() + i * dtype_size(result), result, random.normal());
  p.kernel = {kernel.data(), result, 0, p.taps(), p.kernel_w, 1};
  p.bias = vector_of(bias);
  p.branches = views.data(), p.branch_count = int64_t(views.size());
  p.biases = vectors.data(), p.bias_count = int64_t(vectors.size());
  const Isa isa = Isa(random(0, int(detected_isa())));
  if (!backward) {
    merge_depthwise_kernels(p, isa, threads_of(random(1, 3)));
    return bias.gaps_untouched() ? check_fold(p, branches, biases) : "wrote outside the bias";
  }
  merge_depthwise_kernels_backward(p, isa, threads_of(random(1, 3)));
  for (Buffer& b : biases) {
    if (!b.gaps_untouched()) return "wrote outside a bias gradient";
    for (int64_t c = 0; c < p.channels; ++c) {
      const double g = bias.get({0, c, 0, 0});
      if (!close(b.get({0, c, 0, 0}), g, std::fabs(g), b.view.dtype, p.wide, 1)) return "wrong bias gradient";
    }
  }
  return check_adjoint(p, branches);
}

}  // namespace

int run_merges(uint64_t first, uint64_t count) {
  int failures = 0;
  for (uint64_t seed = first; seed < first + count; ++seed)
    if (const char* what = run(seed))
      std::printf("FAIL seed %llu: %s\n", static_cast<unsigned long long>(seed), what), ++failures;
  std::printf("%llu merges, %d failures\n", static_cast<unsigned long long>(count), failures);
  return failures != 0;
}

}  // namespace fuzz
