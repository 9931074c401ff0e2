// Random per-channel combinations of tensors, compared with naive loops in double: see fuzz.cpp.
#include <cmath>
#include <cstdio>

#include "cpu/kernels.h"
#include "cpu/scaled_channel_sum.h"
#include "fuzz.h"

namespace fuzz {
namespace {

std::vector<char> numbers(Random& random, int64_t count, DType dtype) {
  std::vector<char> bytes(size_t(count * dtype_size(dtype)));
  bytes.shrink_to_fit();
  for (int64_t i = 0; i < count; ++i) write(bytes.data() + i * dtype_size(dtype), dtype, random.normal());
  return bytes;
}

bool run(uint64_t seed) {
  Random random{std::mt19937_64(seed)};
  ScaledSumProblem p{};
  p.dtype = DType(random(0, 3)), p.count = random(1, 5), p.channels_last = random.chance(0.5);
  p.batch = random(0, 3), p.channels = random(1, 90), p.pixels = random(1, 90);
  const DType wide = p.dtype == DType::f64 ? DType::f64 : DType::f32;
  const int64_t size = p.batch * p.channels * p.pixels, width = dtype_size(p.dtype);
  const std::vector<char> scales = numbers(random, p.count * p.channels, wide);
  const std::vector<char> shift = numbers(random, p.channels, wide);
  std::vector<std::vector<char>> inputs;
  std::vector<const void*> data;
  for (int64_t b = 0; b < p.count; ++b) inputs.push_back(numbers(random, size, p.dtype));
  for (const auto& input : inputs) data.push_back(input.data());
  std::vector<char> output(size_t(size * width), char(0xff));
  output.shrink_to_fit();
  p.inputs = data.data(), p.output = output.data(), p.scales = scales.data(), p.shift = shift.data();
  scaled_channel_sum(p, Isa(random(0, int(detected_isa()))), threads_of(random(1, 3)));
  const double storing = p.dtype == DType::bf16 ? 1.0 / 256 : p.dtype == DType::f16 ? 1.0 / 2048 : 0;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t c = p.channels_last ? i % p.channels : i / p.pixels % p.channels;
    double value = read(shift.data() + c * dtype_size(wide), wide), magnitude = std::fabs(value);
    for (int64_t b = 0; b < p.count; ++b) {
      const double scale = read(scales.data() + (b * p.channels + c) * dtype_size(wide), wide);
      const double term = scale * read(inputs[size_t(b)].data() + i * width, p.dtype);
      value += term, magnitude += std::fabs(term);
    }
    const double rounding =
        (wide == DType::f64 ? 1e-14 : 1e-6) * magnitude + (p.dtype == DType::f16 ? 1e-7 : 0);
    if (!(std::fabs(read(output.data() + i * width, p.dtype) - value) <=
          storing * std::fabs(value) + rounding))
      return false;
  }
  return true;
}

}  // namespace

int run_sums(uint64_t first, uint64_t count) {
  int failures = 0;
  for (uint64_t seed = first; seed < first + count; ++seed)
    if (!run(seed)) std::printf("FAIL seed %llu\n", static_cast<unsigned long long>(seed)), ++failures;
  std::printf("%llu sums, %d failures\n", static_cast<unsigned long long>(count), failures);
  return failures != 0;
}

}  // namespace fuzz
