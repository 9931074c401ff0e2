// Walks the planes of one convolution whose pixels are read in place: blocks of rows and columns, pairs of
// narrow planes, and what is asked for ahead.
#pragma once

#include "planar_in_place.h"
#include "planar_strip.h"
#include "planar_sweep_phases.h"

namespace lkconv::cpu::LKCONV_ISA {

#if LKCONV_AVX512

template <class T>
class PixelTask {
 public:
  PixelTask(const ForwardProblem& f, const Plan& plan)
      : f_(f),
        kernels_(pixel_kernels<T>(plan.block)),
        block_(kPlanarBlocks[plan.block]),
        width_(block_.vectors * kElements<T>),
        lanes_(std::min<int64_t>(kElements<T>, f.out_width - width_ + kElements<T>)),
        step_(planar_row_step(f)),
        pairs_(planar_pairs(f, f.reduce, plan)),
        // A short row's last vector may run over into the next row, if that is written after it.
        row_lanes_(step_ == 1 && f.output.stride_h == f.out_width && 2 * f.out_width >= width_ ? kElements<T>
                                                                                               : lanes_) {
    const PixelSizes s = pixel_sizes(f, plan);
    char* at = static_cast<char*>(thread_scratch_bytes(size_t(s.bytes)));
    columns_ = reinterpret_cast<int64_t*>(at);
    ranges_ = reinterpret_cast<Range*>(at += s.columns);
    rows_ = reinterpret_cast<Rows*>(at += s.ranges);
    masks_ = reinterpret_cast<ElementMask*>(at + s.rows);
    place_rows();
    place_columns();
    column_blocks_ = ceil_div(f.out_width, width_);
    ahead_ = {f.input,
              f.height * f.width,
              f.output,
              f.out_height * f.out_width,
              f.batch * f.channels,
              row_blocks_ * (pairs_ ? 1 : column_blocks_)};
  }

  // Planes [first, last), counted over (image, channel).
  void run(int64_t first, int64_t last) const {
    for_planes(f_, first, last, pairs_, [this](Plane p, const Plane* second) {
      if (second)
        sum_pair(p, *second);
      else
        sum_plane(p.n, p.c);
    });
  }

 private:
  void sum_plane(int64_t n, int64_t c) const {
    const Addresses at = addresses({n, c});
    for (int64_t i = 0; i < row_blocks_; ++i)
      for (int64_t b = 0; b < column_blocks_; ++b) {
        ahead_.request(at.in, at.out, i * column_blocks_ + b);
        sum_block(n, c, rows_[i], b, at.bias);
      }
  }

  // `count` output rows from y on, and the kernel rows that meet the image there.
  struct Rows {
    int64_t y, count, u0, u1;
  };
  // The columns of taps that meet the image in one block of columns.
  struct Range {
    int64_t first, count;
  };

  // The first column of a block; the last one moves left to stay whole.
  int64_t column_of(int64_t b) const {
    return std::max<int64_t>(0, std::min(b * width_, f_.out_width - width_));
  }

  // Blocks of rows: those of the first row modulo step_, then those of the next.
  void place_rows() {
    row_blocks_ = 0;
    for (int64_t first = 0; first < std::min(step_, f_.out_height); ++first) {
      const int64_t count = ceil_div(f_.out_height - first, step_);
      for (int64_t i = 0; i < count; i += block_.rows) {
        // The last block moves up to stay whole; what it computes twice comes out the same.
        const int64_t k = std::max<int64_t>(0, std::min(i, count - block_.rows));
        Rows& r = rows_[row_blocks_++];
        r.y = first + k * step_, r.count = std::min(block_.rows, count - k);
        const int64_t top = r.y - f_.pad_h;
        clip_taps(top, top + (r.count - 1) * step_, f_.height, f_.kernel_h, f_.dil_h, r.u0, r.u1);
      }
    }
  }

  // Where each column of taps reads, and for each block of columns which lanes lie in the image.
  void place_columns() {
    for (int64_t v = 0; v < f_.kernel_w; ++v) columns_[v] = v * f_.dil_w - f_.pad_w;
    ElementMask* mask = masks_;
    const int64_t lanes = pairs_ ? kHalf<T> : kElements<T>;  // those of one plane
    for (int64_t b = 0; b * width_ < f_.out_width; ++b) {
      const int64_t x0 = column_of(b), last = std::min(f_.out_width, x0 + width_) - 1;
      int64_t v0, v1;
      clip_taps(x0 - f_.pad_w, last - f_.pad_w, f_.width, f_.kernel_w, f_.dil_w, v0, v1);
      ranges_[b] = {v0, v1 - v0};
      for (int64_t v = 0; v < f_.kernel_w; ++v)
        for (int64_t x = 0; x < width_; x += kElements<T>)
          *mask++ = bits_inside(x0 + x + columns_[v], 1, f_.width, lanes);
    }
  }

  void sum_block(int64_t n, int64_t c, const Rows& rows, int64_t b, float bias) const {
    const Range range = ranges_[b];
    PixelBlock<T> r{};
    r.out = element<T>(f_.output, n, c, rows.y) + column_of(b);
    r.out_row = step_ * f_.output.stride_h, r.rows = rows.count;
    r.row_lanes = row_lanes_, r.last_lanes = lanes_;
    r.in_row = step_ * f_.input.stride_h, r.height = f_.height;
    r.columns = columns_ + range.first, r.count = rows.u1 > rows.u0 ? range.count : 0;
    r.masks = masks_ + (b * f_.kernel_w + range.first) * block_.vectors;
    r.tap_row = f_.weight.stride_h, r.tap_column = f_.weight.stride_w;
    bool more = false;
    for (int64_t j = 0; j < f_.reduce; ++j) {
      const T* plane = element<T>(f_.input, n, f_.input_channel(c, j), 0) + column_of(b);
      const T* taps = element<T>(f_.weight, 0, f_.weight_channel(c, j), 0) + range.first * r.tap_column;
      int64_t u = rows.u0;
      do {
        const bool unit = f_.dil_h == step_ && rows.u1 > rows.u0;
        const int64_t part = unit ? taps_together(rows.u1 - u) : rows.u1 - rows.u0;
        r.first = rows.y - f_.pad_h + u * f_.dil_h;
        r.in = plane + r.first * f_.input.stride_h;
        r.inside = bits_inside(r.first, step_, f_.height, block_.rows + part - 1);
        r.taps = taps + u * r.tap_row;
        if (unit)
          (more ? kernels_.unit_more : kernels_.unit)[part - 1](r, bias);
        else
          (more ? kernels_.dilated_more : kernels_.dilated)(r, bias, part, f_.dil_h);
        more = true;
        u += part;
      } while (u < rows.u1);
    }
  }

  float initial(int64_t c) const { return f_.bias.data ? as_float(*element<T>(f_.bias, 0, c, 0)) : 0.0f; }

  struct Addresses {
    const T *in, *taps;
    T* out;
    float bias;
  };
  Addresses addresses(Plane p) const {
    return {element<T>(f_.input, p.n, f_.input_channel(p.c, 0), 0),
            element<T>(f_.weight, 0, f_.weight_channel(p.c, 0), 0), element<T>(f_.output, p.n, p.c, 0),
            initial(p.c)};
  }

  // Two planes next to each other, whole rows at a time: see PixelPair.
  void sum_pair(Plane a, Plane b) const {
    const Addresses x = addresses(a), y = addresses(b);
    PixelPair<T> pair;
    pair.in = y.in - x.in - kHalf<T>, pair.out = y.out - x.out - kHalf<T>, pair.taps = y.taps - x.taps;
    pair.initial[0] = x.bias, pair.initial[1] = y.bias;
    const Range range = ranges_[0];
    PixelBlock<T>& r = pair.first;
    r = {};
    r.out_row = f_.output.stride_h, r.in_row = f_.input.stride_h, r.last_lanes = f_.out_width;
    r.columns = columns_ + range.first, r.masks = masks_ + range.first;
    r.tap_row = f_.weight.stride_h, r.tap_column = f_.weight.stride_w;
    for (int64_t i = 0; i < row_blocks_; ++i) {
      const Rows& rows = rows_[i];
      ahead_.request(x.in, x.out, i);
      ahead_.request(y.in, y.out, i);
      r.out = x.out + rows.y * r.out_row, r.rows = rows.count;
      r.count = rows.u1 > rows.u0 ? range.count : 0;
      bool more = false;
      int64_t u = rows.u0;
      do {
        const int64_t part = r.count ? taps_together(rows.u1 - u) : 1, top = rows.y - f_.pad_h + u;
        r.in = x.in + top * r.in_row;
        r.inside = bits_inside(top, 1, f_.height, block_.rows + part - 1);
        r.taps = x.taps + range.first * r.tap_column + u * r.tap_row;
        pair_kernel_of<T>(block_.rows, part, more)(pair);
        more = true;
        u += part;
      } while (u < rows.u1);
    }
  }
  const ForwardProblem& f_;
  const PixelKernels<T>& kernels_;
  const PlanarBlock block_;
  const int64_t width_;      // columns of a block
  const int64_t lanes_;      // see PixelBlock
  const int64_t step_;       // from one of its rows to the next
  const bool pairs_;         // of planes in one vector
  const int64_t row_lanes_;  // see PixelBlock
  int64_t* columns_;
  Rows* rows_;
  int64_t row_blocks_, column_blocks_;
  PlanesAhead<T> ahead_;
  Range* ranges_;
  ElementMask* masks_;
};

template <class Task>
void run_planes(const Task& task, const ForwardProblem& f, int64_t first, int64_t last) {
  int64_t n = first / f.channels, c = first % f.channels;
  for (int64_t plane = first; plane < last; ++plane) {
    task.run(n, c);
    if (++c == f.channels) c = 0, ++n;
  }
}

template <class T>
void forward_pixels_of(const PlanarProblem& p, const Plan& plan, int64_t task0, int64_t task1) {
  const ForwardProblem& f = p.phases[0];
  if (plan.strip)
    run_planes(StripTask<T>(f, plan), f, task0, task1);
  else if (phases_are_swept(p))
    PhaseSweepTask<T>(p).run(task0, task1);
  else if (p.phases_w == 2)
    run_planes(PhaseTask<T>(p, plan), f, task0, task1);
  else if (f.stride_w == 2 && f.stride_h == 2 && f.kernel_h == 3 && f.kernel_w == 3)
    StridedSweepTask<T>(f, plan).run(task0, task1);
  else if (f.stride_w == 2)
    run_planes(StridedTask<T>(f, plan), f, task0, task1);
  else if (plan.swept)
    SweepTask<T>(f, plan).run(task0, task1);
  else
    PixelTask<T>(f, plan).run(task0, task1);
}

// All planar sums in place; task = (image, channel).
inline void forward_pixels(const PlanarProblem& p, const Plan& plan, int64_t task0, int64_t task1) {
  const bool floats = p.phases[0].input.dtype == DType::f32;
  (floats ? forward_pixels_of<float> : forward_pixels_of<bf16>)(p, plan, task0, task1);
}

#endif

}  // namespace lkconv::cpu::LKCONV_ISA
