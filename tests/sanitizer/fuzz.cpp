// Random convolutions through the torch-free entry points, compared with naive loops in double, under
// AddressSanitizer and UndefinedBehaviorSanitizer. Usage: fuzz <first seed> <count> | fuzz merge <first seed>
// <count> | fuzz sum <first seed> <count> | fuzz far
//
// Buffers are exactly as large as their views need; gaps between strided elements hold NaN in inputs and a
// pattern in outputs that must survive. The kernels' scratch is replaced (thread_scratch_bytes below) by a
// fresh, exactly sized block of NaN bytes for every call, so overruns and uninitialised reads of scratch show
// too.
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "fuzz.h"

namespace lkconv::cpu {
void* thread_scratch_bytes(size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> block;
  void* fresh = nullptr;
  if (posix_memalign(&fresh, 64, std::max<size_t>(bytes, 1))) throw std::bad_alloc();
  std::memset(fresh, 0xff, bytes);
  block.reset(fresh);
  return fresh;
}
}  // namespace lkconv::cpu

namespace {

using namespace lkconv;
using namespace lkconv::cpu;
using namespace fuzz;

int64_t output_extent(int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dil) {
  const int64_t reach = in + 2 * pad - dil * (kernel - 1) - 1;
  return reach < 0 ? 0 : reach / stride + 1;
}

ConvParams random_params(Random& random) {
  const bool large = random.chance(0.2);
  ConvParams p{};
  do {
    p.batch = random.chance(0.03) ? 0 : random(1, 3);
    const bool groups = random.chance(0.3);  // whole and part groups of channels
    p.channels = large ? random(1, 3) : groups ? random(16, 70) : random(1, 20);
    p.multiplier = random.chance(0.2) ? random(2, 3) : 1;
    p.height = random(1, large ? 48 : 16), p.width = random(1, large ? 48 : 16);
    p.kernel_h = random(1, large ? 33 : 8), p.kernel_w = random(1, large ? 33 : 8);
    const bool strided = random.chance(0.3), dilated = random.chance(0.3);
    p.stride_h = strided ? random(1, 4) : 1, p.stride_w = strided ? random(1, 4) : 1;
    p.dil_h = dilated ? random(1, 7) : 1, p.dil_w = dilated ? random(1, 7) : 1;
    const bool half = random.chance(0.5);
    p.pad_h = half ? p.dil_h * (p.kernel_h - 1) / 2 : random(0, p.kernel_h + 4);
    p.pad_w = half ? p.dil_w * (p.kernel_w - 1) / 2 : random(0, p.kernel_w + 4);
    p.out_height = output_extent(p.height, p.kernel_h, p.stride_h, p.pad_h, p.dil_h);
    p.out_width = output_extent(p.width, p.kernel_w, p.stride_w, p.pad_w, p.dil_w);
  } while (p.out_height == 0 || p.out_width == 0);
  return p;
}

// Calls body(n, c, y, x, u, v, iy, ix) for every product of the convolution; c is the output channel.
template <class Body>
void products(const ConvParams& p, Body body) {
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t c = 0; c < p.out_channels(); ++c)
      for (int64_t y = 0; y < p.out_height; ++y)
        for (int64_t x = 0; x < p.out_width; ++x)
          for (int64_t u = 0; u < p.kernel_h; ++u) {
            const int64_t iy = y * p.stride_h - p.pad_h + u * p.dil_h;
            if (iy < 0 || iy >= p.height) continue;
            for (int64_t v = 0; v < p.kernel_w; ++v) {
              const int64_t ix = x * p.stride_w - p.pad_w + v * p.dil_w;
              if (ix >= 0 && ix < p.width)
                body(Size{n, c, y, x}, Size{c, 0, u, v}, Size{n, c / p.multiplier, iy, ix});
            }
          }
}

// Values and, beside them, the sums of magnitudes: what a summation's rounding error scales with. This
// program is about memory; accuracy itself is measured by the Python tests.
struct Expected {
  Size size;
  std::vector<double> value, magnitude;
  explicit Expected(Size s) : size(s), value(s[0] * s[1] * s[2] * s[3]), magnitude(value.size()) {}
  void add(const Size& i, double v) {
    const int64_t at = ((i[0] * size[1] + i[1]) * size[2] + i[2]) * size[3] + i[3];
    value[at] += v;
    magnitude[at] += std::fabs(v);
  }
};

const char* compare(Expected& expected, Buffer& got, int64_t terms) {
  const DType t = got.view.dtype;
  const double rounding = t == DType::f64 ? 1e-13 : 1e-6 * std::sqrt(double(terms));
  const double storing = t == DType::bf16 ? 1.0 / 256 : t == DType::f16 ? 1.0 / 2048 : 0;
  double error = 0, scale = 0;
  int64_t at = 0;
  // The FFT's error is relative to its plane, so the largest magnitude bounds that of one element.
  const double largest =
      got.size[0] ? *std::max_element(expected.magnitude.begin(), expected.magnitude.end()) : 0;
  got.each([&](const Size& i) {
    const double value = got.get(i), e = value - expected.value[at];
    error += e * e;
    scale += expected.magnitude[at] * expected.magnitude[at];
    if (!(std::fabs(e) <= storing * std::fabs(expected.value[at]) + rounding * largest)) error = INFINITY;
    ++at;
  });
  if (!(std::sqrt(error) <= (rounding + storing) * std::sqrt(scale))) return "wrong values";
  return got.gaps_untouched() ? nullptr : "wrote outside the output";
}

const char* run(uint64_t seed, ConvParams& p, int& pass, DType& dtype) {
  Random random{std::mt19937_64(seed)};
  p = random_params(random);
  dtype = DType(random(0, 3));
  pass = int(random(0, 2));
  const Isa isa = Isa(random(0, int(detected_isa())));
  const int64_t threads = random(1, 3);
  const Machine machine = machine_for(isa, threads);
  Buffer input(random, {p.batch, p.channels, p.height, p.width}, dtype, pass != 1);
  Buffer weight(random, {p.out_channels(), 1, p.kernel_h, p.kernel_w}, dtype, pass != 2);
  Buffer output(random, {p.batch, p.out_channels(), p.out_height, p.out_width}, dtype, pass != 0);
  weight.view.stride_c = weight.view.stride_n;  // the kernels count a weight's channels by stride_c
  Buffer* result = pass == 0 ? &output : pass == 1 ? &input : &weight;
  Expected expected(result->size);
  if (pass == 0) {
    Buffer bias(random, {1, p.out_channels(), 1, 1}, dtype, true);
    TensorView b = bias.view;
    if (random.chance(0.3)) b.data = nullptr;
    depthwise_conv2d(p, input.view, weight.view, b, output.view, machine, threads_of(threads));
    products(p, [&](const Size& o, const Size& w, const Size& i) {
      expected.add(o, weight.get(w) * input.get(i));
    });
    if (b.data) output.each([&](const Size& o) { expected.add(o, bias.get({0, o[1], 0, 0})); });
  } else if (pass == 1) {
    depthwise_conv2d_backward_input(p, output.view, weight.view, input.view, machine, threads_of(threads));
    products(p, [&](const Size& o, const Size& w, const Size& i) {
      expected.add(i, weight.get(w) * output.get(o));
    });
  } else {
    depthwise_conv2d_backward_weight(p, output.view, input.view, weight.view, machine, threads_of(threads));
    products(p, [&](const Size& o, const Size& w, const Size& i) {
      expected.add(w, output.get(o) * input.get(i));
    });
  }
  const int64_t terms =
      pass == 2 ? p.batch * p.out_height * p.out_width : p.kernel_h * p.kernel_w * p.multiplier;
  return compare(expected, *result, std::max<int64_t>(terms, 1));
}

// Images more than 2^31 elements apart: address arithmetic must be 64 bits wide. The pages between are never
// touched.
int run_far() {
  const int64_t gap = (int64_t(1) << 31) + 4099;
  const size_t region = size_t(gap + (1 << 20)) * 4;
  auto reserve = [&] {
    void* p =
        mmap(nullptr, region, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) std::perror("mmap"), std::exit(2);
    return static_cast<float*>(p);
  };
  float *near = reserve(), *far = reserve();
  int failures = 0;
  for (int64_t kernel : {3, 25})
    for (bool last : {false, true}) {
      const int64_t side = 24, channels = 18, plane = side * side;
      ConvParams p{2,      channels, 1, side,       side,       side, side, kernel,
                   kernel, 1,        1, kernel / 2, kernel / 2, 1,    1};
      auto view = [&](float* data, int64_t stride_n) {
        return last ? TensorView{data, DType::f32, stride_n, 1, side * channels, channels}
                    : TensorView{data, DType::f32, stride_n, plane, side, 1};
      };
      const int64_t image = channels * plane;
      std::vector<float> weight(channels * kernel * kernel), dense(2 * image), from_far(weight.size()),
          from_near(weight.size());
      Random random{std::mt19937_64(uint64_t(kernel))};
      for (float& v : weight) v = float(random.normal());
      for (int64_t i = 0; i < 2 * image; ++i)
        near[i] = far[i < image ? i : i - image + gap] = float(random.normal());
      const TensorView w{weight.data(), DType::f32, kernel * kernel, kernel * kernel, kernel, 1};
      const Machine machine = machine_for(detected_isa(), 2);
      float* far_output = far + (1 << 19);
      auto same = [&](const char* what) {
        const bool ok = std::equal(dense.begin(), dense.begin() + image, far_output) &&
                        std::equal(dense.begin() + image, dense.end(), far_output + gap);
        if (!ok) std::printf("FAIL far %s k=%d last=%d\n", what, int(kernel), int(last)), ++failures;
      };
      depthwise_conv2d(p, view(near, image), w, {}, view(dense.data(), image), machine, threads_of(2));
      depthwise_conv2d(p, view(far, gap), w, {}, view(far_output, gap), machine, threads_of(2));
      same("forward");
      depthwise_conv2d_backward_input(p, view(near, image), w, view(dense.data(), image), machine,
                                      threads_of(2));
      depthwise_conv2d_backward_input(p, view(far, gap), w, view(far_output, gap), machine, threads_of(2));
      same("backward_input");
      auto grad = [&](std::vector<float>& g) {
        return TensorView{g.data(), DType::f32, kernel * kernel, kernel * kernel, kernel, 1};
      };
      depthwise_conv2d_backward_weight(p, view(near, image), view(near, image), grad(from_near), machine,
                                       threads_of(2));
      depthwise_conv2d_backward_weight(p, view(far, gap), view(far, gap), grad(from_far), machine,
                                       threads_of(2));
      if (from_near != from_far)
        std::printf("FAIL far backward_weight k=%d last=%d\n", int(kernel), int(last)), ++failures;
    }
  return failures;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && !std::strcmp(argv[1], "far")) return run_far();
  if (argc == 4) {
    const auto is = [&](const char* name) { return !std::strcmp(argv[1], name); };
    const auto mode = is("merge")      ? fuzz::run_merges
                      : is("branches") ? fuzz::run_branches
                      : is("segments") ? fuzz::run_segments
                                       : fuzz::run_sums;
    return mode(std::strtoull(argv[2], nullptr, 10), std::strtoull(argv[3], nullptr, 10));
  }
  if (argc != 3)
    return std::fprintf(stderr,
                        "usage: fuzz [merge | sum | branches | segments] <first seed> <count> | fuzz far\n"),
           2;
  const uint64_t first = std::strtoull(argv[1], nullptr, 10), count = std::strtoull(argv[2], nullptr, 10);
  int failures = 0;
  for (uint64_t seed = first; seed < first + count; ++seed) {
    ConvParams p{};
    int pass = 0;
    DType dtype{};
    if (const char* what = run(seed, p, pass, dtype)) {
      ++failures;
      std::printf("FAIL seed %llu: %s; pass %d dtype %d N%d C%d m%d H%d W%d k%dx%d s%dx%d p%dx%d d%dx%d\n",
                  static_cast<unsigned long long>(seed), what, pass, int(dtype), int(p.batch),
                  int(p.channels), int(p.multiplier), int(p.height), int(p.width), int(p.kernel_h),
                  int(p.kernel_w), int(p.stride_h), int(p.stride_w), int(p.pad_h), int(p.pad_w), int(p.dil_h),
                  int(p.dil_w));
    }
  }
  std::printf("%llu convolutions, %d failures\n", static_cast<unsigned long long>(count), failures);
  return failures != 0;
}
