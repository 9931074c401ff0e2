// Random convolutions of slices of the channels, block by block, compared with naive loops in double: see
// fuzz.cpp.
#include <cmath>
#include <cstdio>

#include "cpu/segmented_depthwise_conv2d.h"
#include "fuzz.h"

namespace fuzz {
namespace {

TensorView slice_of(Buffer& b, int64_t first) {
  TensorView v = b.view;
  v.data = static_cast<char*>(v.data) + first * v.stride_c * dtype_size(v.dtype);
  return v;
}

// What a segment of `channels` from `first` on should be; `weight` and `bias` may be null.
bool right(Buffer& input, Buffer* weight, Buffer* bias, Buffer& output, int64_t first, int64_t channels) {
  const DType dtype = input.view.dtype;
  const double storing = dtype == DType::bf16 ? 1.0 / 256 : dtype == DType::f16 ? 1.0 / 2048 : 0;
  bool good = true;
  output.each([&](const Size& i) {
    const int64_t c = i[1] - first;
    if (c < 0 || c >= channels) return;
    if (!weight) {
      good = good && output.get(i) == input.get(i);
      return;
    }
    double value = bias ? bias->get({0, c, 0, 0}) : 0, magnitude = std::fabs(value);
    const int64_t kh = weight->size[2], kw = weight->size[3];
    for (int64_t u = 0; u < kh; ++u)
      for (int64_t v = 0; v < kw; ++v) {
        const int64_t y = i[2] + u - kh / 2, x = i[3] + v - kw / 2;
        if (y < 0 || y >= input.size[2] || x < 0 || x >= input.size[3]) continue;
        const double term = weight->get({0, c, u, v}) * input.get({i[0], i[1], y, x});
        value += term, magnitude += std::fabs(term);
      }
    const double rounding = (dtype == DType::f64 ? 1e-14 : 2e-6) * magnitude;
    good = good && std::fabs(output.get(i) - value) <=
                       storing * std::fabs(value) + rounding + (dtype == DType::f16 ? 1e-7 : 0);
  });
  return good;
}

// Channels innermost, with a gap after each pixel, row and image now and then.
Buffer channels_last(Random& random, const Size& size, DType dtype, bool input) {
  for (;;) {
    Buffer b(random, size, dtype, input);
    if (b.view.stride_c == 1) return b;
  }
}

bool run(uint64_t seed) {
  Random random{std::mt19937_64(seed)};
  const DType dtype = DType(random(0, 3));
  const bool large = random.chance(0.1);  // several blocks
  const Size image{random(0, 4), 0, random(1, large ? 60 : 12), random(1, large ? 60 : 12)};
  std::vector<int64_t> splits;
  Size size = image;
  for (int64_t s = random(1, 5); s > 0; --s)
    splits.push_back(random(1, large ? 40 : 20)), size[1] += splits.back();
  Buffer input = channels_last(random, size, dtype, true), output = channels_last(random, size, dtype, false);
  std::vector<std::vector<Buffer>> own(splits.size());  // weight and bias of those that have one
  std::vector<ChannelSlice> slices;
  int64_t first = 0;
  bool tall = false;  // whose rows and columns are exchanged: left to convolutions of their own
  for (size_t s = 0; s < splits.size(); ++s) {
    ConvParams p{};
    p.batch = size[0], p.channels = splits[s], p.multiplier = 1;
    p.height = p.out_height = size[2], p.width = p.out_width = size[3];
    p.stride_h = p.stride_w = p.dil_h = p.dil_w = 1;
    ChannelSlice slice{p, slice_of(input, first), {}, {}, slice_of(output, first)};
    if (random.chance(0.7)) {
      p.kernel_h = 2 * random(0, 6) + 1, p.kernel_w = 2 * random(0, 6) + 1;
      p.pad_h = p.kernel_h / 2, p.pad_w = p.kernel_w / 2;
      own[s].emplace_back(random, Size{1, splits[s], p.kernel_h, p.kernel_w}, dtype, true);
      own[s].emplace_back(random, Size{1, splits[s], 1, 1}, dtype, true);
      slice.p = p, slice.weight = own[s][0].view;
      tall = tall || (p.kernel_w == 1 && p.kernel_h > kShortStrip);
      if (random.chance(0.5))
        slice.bias = own[s][1].view;
      else
        own[s].pop_back();
    }
    slices.push_back(slice);
    first += splits[s];
  }
  const int64_t threads = random(1, 3);
  const Machine m = machine_for(Isa(random(0, int(detected_isa()))), threads);
  if (!convolve_slices(slices, m, threads_of(threads)))
    return (threads > 1 || tall) && output.gaps_untouched();
  first = 0;
  for (size_t s = 0; s < splits.size(); first += splits[s++])
    if (!right(input, own[s].empty() ? nullptr : &own[s][0], own[s].size() < 2 ? nullptr : &own[s][1], output,
               first, splits[s]))
      return false;
  return output.gaps_untouched();
}

}  // namespace

int run_segments(uint64_t first, uint64_t count) {
  int failures = 0;
  for (uint64_t seed = first; seed < first + count; ++seed)
    if (!run(seed)) std::printf("FAIL seed %llu\n", static_cast<unsigned long long>(seed)), ++failures;
  std::printf("%llu outputs of segments, %d failures\n", static_cast<unsigned long long>(count), failures);
  return failures != 0;
}

}  // namespace fuzz
