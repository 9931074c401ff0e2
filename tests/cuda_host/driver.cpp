// Runs cases of depthwise convolution through the CUDA kernels on the CPU and compares them with a plain loop
// in float64. Each line of standard input is one case of key=value words; each answer is one line of JSON.
//   pass=forward|backward_input|backward_weight dtype=f64|f32|tf32|f16|bf16 algorithm=auto|direct|toeplitz
//   size=N,C,H,W multiplier=m kernel=kh,kw stride=sh,sw padding=ph,pw dilation=dh,dw
//   layout=nchw|nhwc|slice|nhwc_slice|expand|far_images|far_planes|far_rows|far_pixels
//   order=forward|reverse|random bias=0|1 sms=... shared=... seed=...
//   nonfinite=0|1: a NaN in the pass's first tensor of pixels, an infinity in its last
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <iostream>
#include <memory>
#include <new>
#include <random>

#include "cuda/device.cuh"
#include "cuda/run.h"
#include "executor.h"

namespace lkconv::cuda {
namespace {

double load(const unsigned char* p, DType dtype) {
  if (dtype == DType::f64) return *reinterpret_cast<const double*>(p);
  if (dtype == DType::f32) return *reinterpret_cast<const float*>(p);
  uint16_t h;
  std::memcpy(&h, p, 2);
  return dtype == DType::f16 ? cpu::half_to_float(h) : cpu::bfloat_to_float(h);
}

void store(unsigned char* p, DType dtype, double value) {
  if (dtype == DType::f64) *reinterpret_cast<double*>(p) = value;
  if (dtype == DType::f32) *reinterpret_cast<float*>(p) = float(value);
  const uint16_t h =
      dtype == DType::f16 ? cpu::float_to_half(float(value)) : cpu::float_to_bfloat(float(value));
  if (dtype_size(dtype) == 2) std::memcpy(p, &h, 2);
}

using Memory = std::unique_ptr<unsigned char[], std::function<void(unsigned char*)>>;

// Exactly as many bytes as asked for, so that AddressSanitizer sees every overrun, full of NaN.
Memory dense_memory(size_t bytes) {
  Memory memory(new unsigned char[bytes], [](unsigned char* p) { delete[] p; });
  std::memset(memory.get(), 0xff, bytes);
  return memory;
}

// Address space full of zeros, of which only the pages that are touched take memory.
Memory sparse_memory(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return Memory(static_cast<unsigned char*>(p), [bytes](unsigned char* q) { munmap(q, bytes); });
}

// A stride by which the second half of `count` steps reaches elements beyond 2^31; a multiple of 64.
int64_t far_stride(int64_t count) {
  return (int64_t(1) << 31) / std::max<int64_t>(count / 2, 1) / 64 * 64 + 64;
}

// A 4-D tensor in a layout, full of NaN.
struct Tensor {
  int64_t n, c, h, w;
  TensorView view{};
  size_t bytes = 0;  // of dense memory
  Memory memory;

  Tensor(int64_t n_, int64_t c_, int64_t h_, int64_t w_, DType dtype, const std::string& layout)
      : n(n_), c(c_), h(h_), w(w_) {
    view.dtype = dtype;
    if (layout.rfind("far_", 0) == 0) {
      place_far(layout);
      return;
    }
    int64_t elements = n * c * h * w, offset = 0;
    if (layout == "nhwc") {
      view.stride_n = c * h * w, view.stride_c = 1, view.stride_h = w * c, view.stride_w = c;
    } else if (layout == "slice") {  // part of a wider tensor: odd offset, odd row pitch
      const int64_t row = w + 3, plane = (h + 1) * row, image = (c + 2) * plane;
      view.stride_n = image, view.stride_c = plane, view.stride_h = row, view.stride_w = 1;
      offset = 1, elements = n ? (n - 1) * image + (c - 1) * plane + (h - 1) * row + w + offset : 0;
    } else if (layout == "nhwc_slice") {  // some channels of a wider channels_last tensor, at an odd offset
      const int64_t pixel = c + 4;
      view.stride_n = h * w * pixel, view.stride_c = 1, view.stride_h = w * pixel, view.stride_w = pixel;
      offset = 3, elements = n * h * w * pixel;
    } else if (layout == "expand") {  // one plane for all images and channels
      view.stride_n = view.stride_c = 0, view.stride_h = w, view.stride_w = 1;
      elements = h * w;
    } else {
      view.stride_n = c * h * w, view.stride_c = h * w, view.stride_h = w, view.stride_w = 1;
    }
    bytes = size_t(elements * dtype_size(dtype));
    memory = dense_memory(bytes);
    view.data = memory.get() + offset * dtype_size(dtype);
  }

  // Few elements whose offsets do not fit 32 bits: an offset cut short meets a zero, or no memory at all.
  void place_far(const std::string& layout) {
    view.stride_w = 1, view.stride_h = w;
    if (layout == "far_pixels") {  // channels_last
      view.stride_c = 1, view.stride_w = far_stride(w), view.stride_h = w * view.stride_w;
      view.stride_n = h * view.stride_h;
    } else {
      if (layout == "far_rows") view.stride_h = far_stride(h);
      view.stride_c = layout == "far_planes" ? far_stride(c) : h * view.stride_h;
      view.stride_n = layout == "far_images" ? far_stride(n) : c * view.stride_c;
    }
    memory = sparse_memory(size_t(n * view.stride_n * dtype_size(view.dtype)));
    view.data = memory.get();
    each([&](int64_t i, int64_t j, int64_t y, int64_t x) {
      std::memset(at(i, j, y, x), 0xff, size_t(dtype_size(view.dtype)));
    });
  }

  unsigned char* at(int64_t i, int64_t j, int64_t y, int64_t x) const {
    return static_cast<unsigned char*>(view.data) +
           (i * view.stride_n + j * view.stride_c + y * view.stride_h + x * view.stride_w) *
               dtype_size(view.dtype);
  }
  double get(int64_t i, int64_t j, int64_t y, int64_t x) const { return load(at(i, j, y, x), view.dtype); }

  template <class Visit>
  void each(Visit visit) const {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < c; ++j)
        for (int64_t y = 0; y < h; ++y)
          for (int64_t x = 0; x < w; ++x) visit(i, j, y, x);
  }
  bool empty() const { return n * c * h * w == 0; }
  // Whether what lies between the elements is as it was made.
  bool gaps_untouched() const {
    if (bytes == 0) return true;
    std::vector<bool> own(bytes);
    each([&](int64_t i, int64_t j, int64_t y, int64_t x) {
      const ptrdiff_t first = at(i, j, y, x) - memory.get();
      std::fill_n(own.begin() + first, dtype_size(view.dtype), true);
    });
    for (size_t i = 0; i < bytes; ++i)
      if (!own[i] && memory.get()[i] != 0xff) return false;
    return true;
  }
  void fill(std::mt19937_64& random) {
    std::normal_distribution<double> normal;
    each([&](int64_t i, int64_t j, int64_t y, int64_t x) {
      store(at(i, j, y, x), view.dtype, normal(random));
    });
  }
};

ConvParams parse_params(Words& w) {
  const auto size = numbers(w["size"]), k = numbers(w["kernel"]), s = numbers(w["stride"]);
  const auto pad = numbers(w["padding"]), d = numbers(w["dilation"]);
  ConvParams p{};
  p.batch = size[0], p.channels = size[1], p.height = size[2], p.width = size[3];
  p.multiplier = std::stoll(w["multiplier"]);
  p.kernel_h = k[0], p.kernel_w = k[1], p.stride_h = s[0], p.stride_w = s[1];
  p.pad_h = pad[0], p.pad_w = pad[1], p.dil_h = d[0], p.dil_w = d[1];
  p.out_height = (p.height + 2 * p.pad_h - p.dil_h * (p.kernel_h - 1) - 1) / p.stride_h + 1;
  p.out_width = (p.width + 2 * p.pad_w - p.dil_w * (p.kernel_w - 1) - 1) / p.stride_w + 1;
  return p;
}

// visit(n, input channel, output channel, y, x, u, v, input y, input x) for every product of the convolution.
template <class Visit>
void each_product(const ConvParams& p, Visit visit) {
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t c = 0; c < p.out_channels(); ++c)
      for (int64_t y = 0; y < p.out_height; ++y)
        for (int64_t u = 0; u < p.kernel_h; ++u) {
          const int64_t iy = y * p.stride_h - p.pad_h + u * p.dil_h;
          if (iy < 0 || iy >= p.height) continue;
          for (int64_t x = 0; x < p.out_width; ++x)
            for (int64_t v = 0; v < p.kernel_w; ++v) {
              const int64_t ix = x * p.stride_w - p.pad_w + v * p.dil_w;
              if (ix >= 0 && ix < p.width) visit(n, c / p.multiplier, c, y, x, u, v, iy, ix);
            }
        }
}

// What every output element should be.
struct Reference {
  std::vector<double> value, rounded, magnitude;  // rounded: of operands rounded to tf32, where they are
  std::vector<char> poisoned;                     // a non-finite element is among its products
  std::vector<char> plane_poisoned;               // is in the planes that this plane is made of
  bool tf32;

  Reference(size_t count, bool tf32_)
      : value(count), rounded(count), magnitude(count), poisoned(count), tf32(tf32_) {}
  void add(size_t k, double a, double b) {
    const double product = a * b;
    if (!std::isfinite(product)) {
      poisoned[k] = 1;
      return;
    }
    value[k] += product, magnitude[k] += std::abs(product);
    if (tf32) rounded[k] += double(round_to_tf32(float(a))) * double(round_to_tf32(float(b)));
  }
  // Added as it is, by kernels that round as by those that do not.
  void add_exactly(size_t k, double term) {
    value[k] += term, rounded[k] += term, magnitude[k] += std::abs(term);
  }
};

struct Difference {
  double relative = 0;  // norm of the error over norm of the reference
  double rounding = 0;  // the same of the exact result, rounded to the output's type or from tf32 operands
  double worst = 0;     // largest error beyond that rounding, over the sum of absolute products there
  // Elements that hide a non-finite product; that are not finite without one, in the image and channel
  // (weights: the channel) of a non-finite element, and elsewhere.
  int64_t lost = 0, spread = 0, escaped = 0;
};

// A non-finite element where the reference has none is an error, unless its plane is poisoned: then it counts
// as spread.
Difference compare(const Tensor& out, const Reference& reference) {
  double error2 = 0, norm2 = 0, rounding2 = 0;
  alignas(8) unsigned char rounded[8];
  const size_t plane = size_t(out.h * out.w);
  Difference d;
  size_t k = size_t(-1);
  out.each([&](int64_t i, int64_t j, int64_t y, int64_t x) {
    ++k;
    const double found = out.get(i, j, y, x), exact = reference.value[k];
    if (reference.poisoned[k]) {
      d.lost += std::isfinite(found);
      return;
    }
    const bool near = !reference.plane_poisoned.empty() && reference.plane_poisoned[k / plane];
    if (!std::isfinite(found)) ++(near ? d.spread : d.escaped);
    if (!std::isfinite(found) && near) return;
    double error = std::abs(found - exact);
    if (!(error <= 1e300)) error = 1e300;
    store(rounded, out.view.dtype, exact);
    const double best = reference.tf32 ? reference.rounded[k] : load(rounded, out.view.dtype);
    const double rounding = std::abs(best - exact);
    error2 += error * error, norm2 += exact * exact, rounding2 += rounding * rounding;
    const double beyond = std::max(0.0, error - rounding) / std::max(reference.magnitude[k], 1e-30);
    d.worst = std::min(1e300, std::max(d.worst, beyond));
  });
  d.relative = std::min(1e300, std::sqrt(error2 / std::max(norm2, 1e-300)));
  d.rounding = std::sqrt(rounding2 / std::max(norm2, 1e-300));
  return d;
}

// A NaN in the middle of the first plane of `first`, an infinity in the last element of `last`.
void poison(const Tensor& first, const Tensor& last) {
  store(first.at(0, 0, first.h / 2, first.w / 2), first.view.dtype, std::nan(""));
  store(last.at(last.n - 1, last.c - 1, last.h - 1, last.w - 1), last.view.dtype, INFINITY);
}

bool plane_is_finite(const Tensor& t, int64_t n, int64_t c) {
  for (int64_t y = 0; y < t.h; ++y)
    for (int64_t x = 0; x < t.w; ++x)
      if (!std::isfinite(t.get(n, c, y, x))) return false;
  return true;
}

// For every plane of the output, whether a plane of `x` or `g` that it is made of holds a non-finite element.
std::vector<char> poisoned_planes(const ConvParams& p, const std::string& pass, const Tensor& x,
                                  const Tensor& g) {
  const int64_t m = p.multiplier, planes = pass == "backward_input" ? p.channels : p.out_channels();
  std::vector<char> by_image(size_t(p.batch * planes)), by_channel(size_t(planes), 0);
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t co = 0; co < p.out_channels(); ++co) {
      const int64_t c = pass == "backward_input" ? co / m : co;
      const bool bad = (pass != "backward_input" && !plane_is_finite(x, n, co / m)) ||
                       (pass != "forward" && !plane_is_finite(g, n, co));
      by_image[size_t(n * planes + c)] |= bad, by_channel[size_t(c)] |= bad;
    }
  return pass == "backward_weight" ? by_channel : by_image;
}

std::string run_case(Words& words) {
  const ConvParams p = parse_params(words);
  const std::string pass = words["pass"], dtype_name = words["dtype"], layout = words["layout"];
  const DType dtype = dtype_named(dtype_name);
  std::mt19937_64 random(std::stoull(words["seed"]));
  const bool forward = pass == "forward", to_input = pass == "backward_input";
  const std::string out_layout = layout == "expand" ? "nchw" : layout;  // what is written is never expanded
  Tensor x(p.batch, p.channels, p.height, p.width, dtype, to_input ? out_layout : layout);
  Tensor w(p.out_channels(), 1, p.kernel_h, p.kernel_w, dtype, "nchw");
  Tensor g(p.batch, p.out_channels(), p.out_height, p.out_width, dtype, forward ? out_layout : layout);
  Tensor bias(1, p.out_channels(), 1, 1, dtype, "nchw");
  if (!to_input) x.fill(random);
  if (forward || to_input) w.fill(random);
  if (!forward) g.fill(random);
  bias.fill(random);
  const Tensor &first_pixels = to_input ? g : x, &last_pixels = forward ? x : g;
  if (words["nonfinite"] == "1" && !first_pixels.empty() && !last_pixels.empty())
    poison(first_pixels, last_pixels);
  const bool with_bias = words["bias"] == "1" && forward;
  const Tensor& out = forward ? g : to_input ? x : w;
  Reference reference(size_t(out.n * out.c * out.h * out.w), dtype_name == "tf32");
  if (words["nonfinite"] == "1") reference.plane_poisoned = poisoned_planes(p, pass, x, g);
  each_product(p, [&](int64_t n, int64_t ci, int64_t co, int64_t y, int64_t xx, int64_t u, int64_t v,
                      int64_t iy, int64_t ix) {
    if (forward)
      reference.add(size_t(((n * g.c + co) * g.h + y) * g.w + xx), x.get(n, ci, iy, ix), w.get(co, 0, u, v));
    else if (to_input)
      reference.add(size_t(((n * x.c + ci) * x.h + iy) * x.w + ix), g.get(n, co, y, xx), w.get(co, 0, u, v));
    else
      reference.add(size_t((co * w.h + u) * w.w + v), g.get(n, co, y, xx), x.get(n, ci, iy, ix));
  });
  if (with_bias)
    for (size_t k = 0; k < reference.value.size(); ++k)
      reference.add_exactly(k, bias.get(0, int64_t(k) / (g.h * g.w) % g.c, 0, 0));

  Executor e(words);
  const std::string algorithm = words["algorithm"];
  Switches s;
  s.tf32 = dtype_name == "tf32", s.direct = algorithm != "toeplitz", s.toeplitz = algorithm != "direct";
  shim::counts() = {};
  if (forward) {
    ForwardProblem f = forward_problem(p);
    f.input = x.view, f.weight = w.view, f.output = g.view;
    if (with_bias) f.bias = bias.view;
    run_forward(e, f, s);
  } else if (to_input) {
    for (const ForwardProblem& f : backward_input_phases(p, g.view, w.view, x.view)) run_forward(e, f, s);
  } else {
    WeightProblem problem = weight_problem(p);
    problem.input = x.view, problem.grad_output = g.view, problem.grad_weight = w.view;
    run_weight(e, problem, s);
  }
  if (!out.gaps_untouched()) throw std::runtime_error("a kernel wrote between the elements of its output");
  const Difference d = compare(out, reference);
  const shim::Counts& c = shim::counts();
  uint64_t hash = 1469598103934665603ull;
  out.each([&](int64_t i, int64_t j, int64_t y, int64_t xx) {
    for (int64_t b = 0; b < dtype_size(dtype); ++b) hash = (hash ^ out.at(i, j, y, xx)[b]) * 1099511628211ull;
  });
  char text[512];
  std::snprintf(text, sizeof text,
                "{\"ok\": true, \"relative\": %.3e, \"rounding\": %.3e, \"worst\": %.3e, \"launched\": "
                "\"%s\", \"mma\": %llu, \"lost\": %lld, \"spread\": %lld, \"escaped\": %lld, "
                "\"copies\": %llu, \"blocks\": %llu, \"hash\": \"%016llx\"}",
                d.relative, d.rounding, d.worst, e.launched.c_str(), (unsigned long long)c.mma,
                (long long)d.lost, (long long)d.spread, (long long)d.escaped,
                (unsigned long long)c.async_copies, (unsigned long long)c.blocks, (unsigned long long)hash);
  return text;
}

}  // namespace
}  // namespace lkconv::cuda

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    lkconv::cuda::Words words = lkconv::cuda::words_of(line, {{"multiplier", "1"},
                                                              {"stride", "1,1"},
                                                              {"padding", "0,0"},
                                                              {"dilation", "1,1"},
                                                              {"layout", "nchw"},
                                                              {"order", "forward"},
                                                              {"algorithm", "auto"},
                                                              {"bias", "0"},
                                                              {"nonfinite", "0"},
                                                              {"sms", "4"},
                                                              {"shared", "232448"},
                                                              {"seed", "1"}});
    try {
      std::cout << lkconv::cuda::run_case(words) << std::endl;
    } catch (const std::exception& error) {
      std::cout << "{\"ok\": false, \"error\": \"" << error.what() << "\"}" << std::endl;
      return 1;  // fibers of the failed launch still hold their stacks: do not go on
    }
  }
}
