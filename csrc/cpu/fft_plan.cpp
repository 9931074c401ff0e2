#include "fft_plan.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>

namespace lkconv::cpu {
namespace {

struct RadixCost {
  int radix;
  double cycles;  // per butterfly, twiddles included
};
// Counted from the butterflies (adds + multiplies over two pipes, plus two stores per element), then checked
// against timings of whole transforms; only the ratios matter.
constexpr RadixCost kRadices[] = {{2, 9},  {3, 16}, {4, 20},  {5, 32},  {6, 35},  {7, 54},
                                  {8, 50}, {9, 64}, {10, 76}, {12, 92}, {16, 150}};

// Cheapest factorisation of every length, by dynamic programming over the last radix.
struct Table {
  std::array<double, kMaxFftLength + 1> cost;
  std::array<int, kMaxFftLength + 1> radix{};
  Table() {
    cost.fill(std::numeric_limits<double>::infinity());
    cost[1] = 0;
    for (int64_t n = 2; n <= kMaxFftLength; ++n)
      for (const RadixCost& r : kRadices) {
        if (n % r.radix) continue;
        const double c = cost[n / r.radix] * r.radix + r.cycles * double(n / r.radix);
        if (c < cost[n]) cost[n] = c, radix[n] = r.radix;
      }
  }
};
const Table& table() {
  static const Table t;
  return t;
}

std::unique_ptr<FftPlan> make_plan(int64_t length) {
  auto f = std::make_unique<FftPlan>();
  f->length = length;
  f->cost = table().cost[length];
  for (int64_t n = length; n > 1; n /= f->radix.back()) f->radix.push_back(table().radix[n]);
  // Large radices first: the first pass has the longest stride and gains most from touching data once.
  std::sort(f->radix.rbegin(), f->radix.rend());
  int64_t size = length;
  for (int r : f->radix) {
    const int64_t m = size / r;
    std::vector<float>& w = f->twiddle.emplace_back();
    for (int64_t j = 0; j < m; ++j)
      for (int q = 1; q < r; ++q) {
        const double angle = 2 * M_PI * double(j * q) / double(size);
        w.push_back(float(std::cos(angle)));
        w.push_back(float(std::sin(angle)));
      }
    size = m;
  }
  for (int64_t frequency = 0; frequency < length; ++frequency) {
    int64_t at = 0, rest = frequency, block = length;
    for (int r : f->radix) {
      block /= r;
      at += rest % r * block;
      rest /= r;
    }
    f->position.push_back(int32_t(at));
  }
  return f;
}

}  // namespace

const FftPlan* fft_plan(int64_t length) {
  static std::array<std::unique_ptr<FftPlan>, kMaxFftLength + 1> plans;  // bounded: one per length
  static std::array<std::once_flag, kMaxFftLength + 1> made;
  if (length < 1 || length > kMaxFftLength || !std::isfinite(table().cost[length])) return nullptr;
  std::call_once(made[length], [&] { plans[length] = make_plan(length); });
  return plans[length].get();
}

FftAxis fft_axis(int64_t in, int64_t out, int64_t kernel, int64_t pad, int64_t dil, int64_t tile) {
  FftAxis a;
  a.first_tap = std::clamp<int64_t>(ceil_div(std::max<int64_t>(0, pad - (out - 1)), dil), 0, kernel);
  a.last_tap = std::clamp<int64_t>(pad + in <= 0 ? 0 : (pad + in - 1) / dil + 1, a.first_tap, kernel);
  a.extent = std::max<int64_t>(0, (a.last_tap - a.first_tap - 1) * dil + 1);
  a.tile = std::min(tile, out);
  const int64_t window = a.tile + std::max<int64_t>(a.extent, 1) - 1;
  a.length = window;
  if (a.tile == out) {  // one tile: only what the image can reach must be kept apart
    const int64_t origin = a.first_tap * dil - pad;
    const int64_t begin = std::clamp<int64_t>(-origin, 0, window),
                  end = std::clamp<int64_t>(in - origin, 0, window);
    a.length = std::max({end, window - begin, a.tile, a.extent, int64_t(1)});
  }
  return a;
}

}  // namespace lkconv::cpu
