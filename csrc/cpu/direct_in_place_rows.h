// What direct kernels share that read channels_last tensors where they are: how a row of outputs is cut into
// blocks, and which pixels, taps and outputs a block has.
#pragma once

#include "element_vectors.h"
#include "pixels_ahead.h"

namespace lkconv::cpu::LKCONV_ISA {

// Rows of a tensor, `row_step` elements apart, of pixels `step` apart.
template <class T>
struct TensorRows {
  const T* base;
  int64_t row_step, step;

  LKCONV_INLINE const T* row(int64_t u) const { return base + u * row_step; }
  LKCONV_INLINE int64_t pixel() const { return step; }
};

// The channel groups a task handles together, kElements channels each. The last one of a tensor moves left to
// be whole: what it computes twice comes out the same, and from the same task. Kernels and biases are floats,
// in the parts of element_vectors.h: [part][tap][lane].
template <class T>
struct InPlaceSpan {
  int64_t count;
  Ahead ahead;
  const T* input[kMaxSpanInPlace];
  T* output[kMaxSpanInPlace];
  const float* kernel[kMaxSpanInPlace];
  Vec<float> bias[kMaxSpanInPlace * kFloatParts<T>];
};

// Where a block of X outputs goes, and what its sums begin with.
template <class T>
struct InPlaceOutputs {
  T* at;
  int64_t step;
  const Vec<float>* initial;
};
// Kernel rows, `row` floats apart, of which each part has its own.
struct InPlaceTaps {
  const float* base;
  int64_t row, part;
};

// One row of outputs of a channel group, X at a time: columns that the dilation keeps apart follow each
// other.
struct InPlaceColumns {
  int64_t first, count, step;  // outputs of one remainder modulo the dilation
  int64_t blocks, right;       // pixels of halo that the last block reaches

  InPlaceColumns(const ForwardProblem& p, int64_t remainder, int64_t block)
      : first(remainder),
        count(ceil_div(p.out_width - remainder, p.dil_w)),
        step(p.dil_w),
        blocks(ceil_div(count, block)) {
    const int64_t last = (count - 1) * p.stride_w + p.kernel_w - 1 - p.pad_w / p.dil_w;
    right = std::max<int64_t>(0, last - (ceil_div(p.width - remainder, p.dil_w) - 1));
  }
  // Blocks are evenly apart, so that none but the first and the last reaches the halo.
  int64_t output(int64_t i, int64_t block) const {
    return blocks > 1 ? i * (count - block) / (blocks - 1) : 0;
  }
};

// Asks for what group g of the block of X outputs after this one writes.
template <class T>
LKCONV_INLINE void request_outputs(const InPlaceOutputs<T>& to, int64_t g, int64_t X) {
  for (int64_t i = X; i < 2 * X; ++i) __builtin_prefetch(to.at + i * to.step + g * kElements<T>, 1, 2);
}

// Asks, where group g of a block of X outputs is summed, for pixels that the next row of outputs reads and
// this one does not.
template <class T>
LKCONV_INLINE void request_next_row(const ForwardProblem& p, const InPlaceSpan<T>& s, int64_t g, int64_t y,
                                    int64_t pixel, int64_t X) {
  const int64_t last = (y + 1) * p.stride_h - p.pad_h + (p.kernel_h - 1) * p.dil_h;
  for (int64_t row = last + 1 - p.stride_h; row <= last; ++row)
    if (row >= 0 && row < p.height)
      PixelsAhead(s.input[0] + row * p.input.stride_h + pixel * p.input.stride_w, p.input.stride_w * p.dil_w,
                  s.count, g * X * p.stride_w)
          .request(X * p.stride_w);
}

// One row of outputs; all groups of a block, whose pixels are neighbours in memory, follow each other.
template <class T, class Row>
void in_place_row(const ForwardProblem& p, const InPlaceSpan<T>& s, int64_t y, const InPlaceColumns& c) {
  constexpr int L = kLanes<float>, X = Row::kBlock;
  const TensorView &in = p.input, &out = p.output;
  const int64_t top = y * p.stride_h - p.pad_h, row = p.kernel_w * L;
  int64_t u0, u1;
  clip_taps(top, top, p.height, p.kernel_h, p.dil_h, u0, u1);
  const int64_t first_row = (top + u0 * p.dil_h) * in.stride_h;
  const bool outputs = s.ahead != Ahead::nothing, inputs = s.ahead == Ahead::all && y + 1 < p.out_height;
  for (int64_t i = 0; i < c.blocks; ++i) {
    const int64_t x = c.output(i, X), column = c.first + x * c.step;
    const int64_t tap = c.first + (x * p.stride_w - p.pad_w / p.dil_w) * c.step;  // the pixel of the first
    for (int64_t g = 0; g < s.count; g += Row::kGroups) {
      const InPlaceOutputs<T> to{s.output[g] + y * out.stride_h + column * out.stride_w,
                                 out.stride_w * c.step, s.bias + g * kFloatParts<T>};
      if (u1 <= u0) {
        for (int j = 0; j < X; ++j) store_whole(to.at + j * to.step, put_together(to.initial, T()));
        continue;
      }
      const TensorRows<T> pixels{s.input[g] + first_row + tap * in.stride_w, in.stride_h * p.dil_h,
                                 in.stride_w * c.step};
      for (int64_t q = 0; outputs && q < Row::kGroups; ++q) {
        request_outputs(to, q, X);
        if (inputs) request_next_row(p, s, g + q, y, c.first + x * p.stride_w * c.step, X);
      }
      Row::block(p, c, i, to, pixels, {s.kernel[g] + u0 * row, row, p.kernel_h * row}, u1 - u0);
    }
  }
}

}  // namespace lkconv::cpu::LKCONV_ISA
