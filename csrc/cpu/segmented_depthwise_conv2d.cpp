#include "segmented_depthwise_conv2d.h"

#include <algorithm>
#include <cstring>

namespace lkconv::cpu {
namespace {

constexpr int64_t kBlockBytes = 768 << 10;  // of input and output: inside a second-level cache
constexpr int64_t kBlocksPerThread = 2;

// Output rows [y0, y1) of images [n0, n1).
struct Block {
  int64_t n0, n1, y0, y1;
};

// How an output is cut into blocks, image by image where one does not fill a block.
struct Blocks {
  int64_t batch, height, images, rows;

  int64_t bands() const { return ceil_div(height, rows); }
  int64_t count() const { return ceil_div(batch, images) * bands(); }
  Block at(int64_t i) const {
    const int64_t n0 = i / bands() * images, y0 = i % bands() * rows;
    return {n0, std::min(batch, n0 + images), y0, std::min(height, y0 + rows)};
  }
};

struct PlannedSlice {
  ForwardProblem f;
  Plan plan;
};

char* address(const TensorView& v, int64_t n, int64_t y) {
  return static_cast<char*>(v.data) + (n * v.stride_n + y * v.stride_h) * dtype_size(v.dtype);
}

// All channels of a block, those of convolutions too: read and written in one sweep, its cache lines are at
// hand when every slice touches a part of each.
void copy_block(const TensorView& from, const TensorView& to, int64_t channels, int64_t width,
                const Block& b) {
  const int64_t size = dtype_size(from.dtype), pixel = channels * size;
  const bool whole_rows = from.stride_w == channels && to.stride_w == channels;
  for (int64_t n = b.n0; n < b.n1; ++n)
    for (int64_t y = b.y0; y < b.y1; ++y) {
      const char* source = address(from, n, y);
      char* target = address(to, n, y);
      if (whole_rows) {
        std::memcpy(target, source, size_t(width * pixel));
        continue;
      }
      for (int64_t x = 0; x < width; ++x)
        std::memcpy(target + x * to.stride_w * size, source + x * from.stride_w * size, size_t(pixel));
    }
}

// The block as a problem of its own: its first output row is y0, where the input begins y0 rows further up.
void convolve_block(const PlannedSlice& s, const Block& b) {
  ForwardProblem f = s.f;
  f.batch = b.n1 - b.n0, f.out_height = b.y1 - b.y0, f.pad_h -= b.y0;
  f.input.data = address(f.input, b.n0, 0), f.output.data = address(f.output, b.n0, b.y0);
  run_forward_tasks(f, s.plan, 0, forward_tasks(f, s.plan));
}

Blocks blocks_of(const ConvParams& p, int64_t row_bytes, const std::vector<PlannedSlice>& convolutions) {
  int64_t least_rows = 1;
  for (const PlannedSlice& s : convolutions) {
    // Direct sums read a halo of rows once more in each band; the other algorithms would repeat products.
    const bool bands = s.plan.algorithm == Algorithm::direct;
    least_rows = std::max(least_rows, bands ? 2 * s.f.kernel_h : p.height);
  }
  const int64_t rows = std::min(p.height, std::max(least_rows, kBlockBytes / row_bytes));
  const int64_t images = rows < p.height ? 1 : std::max<int64_t>(1, kBlockBytes / (row_bytes * p.height));
  return {p.batch, p.height, std::min(images, p.batch), ceil_div(p.height, ceil_div(p.height, rows))};
}

}  // namespace

bool convolve_slices(const std::vector<ChannelSlice>& slices, const Machine& m, const ParallelFor& parallel) {
  if (slices.empty() || slices[0].p.batch == 0) return true;
  std::vector<PlannedSlice> convolutions;
  int64_t channels = 0;
  double cycles = 0;
  for (const ChannelSlice& s : slices) {
    if (s.input.stride_c != 1 || s.output.stride_c != 1) return false;
    channels += s.p.channels;
    if (!s.weight.data) continue;
    const ForwardProblem f = forward_between(s.p, s.input, s.weight, s.bias, s.output);
    if (is_tall_strip(f)) return false;  // whose rows are columns of the blocks
    convolutions.push_back({f, plan_forward(f, m)});
    cycles += convolutions.back().plan.cycles;
  }
  const ChannelSlice& first = slices[0];
  const int64_t row_bytes = 2 * channels * first.p.width * dtype_size(first.input.dtype);
  const Blocks blocks = blocks_of(first.p, row_bytes, convolutions);
  if (m.threads > 1 && blocks.count() < kBlocksPerThread * m.threads) return false;
  parallel(blocks.count(), grain_for(blocks.count(), cycles), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      copy_block(first.input, first.output, channels, first.p.width, blocks.at(i));
      for (const PlannedSlice& s : convolutions) convolve_block(s, blocks.at(i));
    }
  });
  return true;
}

}  // namespace lkconv::cpu
