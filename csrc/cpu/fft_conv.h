// Convolution by fused, tiled, real two-dimensional FFT. Rows are transformed two at a time as one complex
// row, columns f = 0..width/2 of the half spectrum are transformed, multiplied and transformed back while one
// column sits in the first-level cache. Derivation: docs/how-it-works.md.
#pragma once

namespace lkconv::cpu::LKCONV_ISA {

constexpr int64_t kElement = 2 * kLanesF;  // floats per complex vector

// A half spectrum: columns f, each a contiguous run of rows plus one of padding, which breaks power-of-two
// strides and takes the empty second row of an odd pair.
struct Spectrum {
  const FftPlan *h, *w;
  int64_t columns, column_stride;

  explicit Spectrum(const Plan& plan)
      : h(fft_plan(plan.fft_h)),
        w(fft_plan(plan.fft_w)),
        columns(plan.fft_w / 2 + 1),
        column_stride((plan.fft_h + 1) * kElement) {}
  int64_t floats() const { return columns * column_stride; }
  int64_t row_floats() const { return w->length * kElement; }
};

// Transforms rows [r0, r1) whose samples lie in columns [c0, c1) into the spectrum (twice the true value).
// load(row, destination) writes one row's samples with step kElement, or returns false for a row of zeros.
template <class LoadRow>
LKCONV_INLINE void rows_forward(const Spectrum& s, float* spectrum, float* z, int64_t r0, int64_t r1,
                                int64_t c0, int64_t c1, LoadRow load_sample_row) {
  const int64_t width = s.w->length;
  const int32_t* position = s.w->position.data();
  for (int64_t r = r0; r < r1; r += 2) {
    zero(z, c0 * 2);
    zero(z + c1 * kElement, (width - c1) * 2);
    if (!load_sample_row(r, z + c0 * kElement)) zero(z + c0 * kElement, c1 - c0, kElement);
    if (r + 1 >= r1 || !load_sample_row(r + 1, z + c0 * kElement + kLanesF))
      zero(z + c0 * kElement + kLanesF, c1 - c0, kElement);
    fft_forward(*s.w, z);
    float* out = spectrum + r * kElement;
    for (int64_t f = 0; f < s.columns; ++f, out += s.column_stride) {
      const float* a = z + position[f] * kElement;
      const float* b = z + position[f ? width - f : 0] * kElement;
      VF ar = load(a), ai = load(a + kLanesF), br = load(b), bi = load(b + kLanesF);
      store(out, ar + br);
      store(out + kLanesF, ai - bi);
      store(out + kElement, ai + bi);
      store(out + kElement + kLanesF, br - ar);
    }
  }
}

// Transforms one column whose rows [r0, r1) hold data.
LKCONV_INLINE void column_forward(const Spectrum& s, float* column, int64_t r0, int64_t r1) {
  zero(column, r0 * 2);
  if (r1 < s.h->length) zero(column + r1 * kElement, (s.h->length - r1) * 2);
  fft_forward(*s.h, column);
}

// Inverse-transforms rows [0, rows); put(row, source) takes each result with step kElement.
template <class PutRow>
LKCONV_INLINE void rows_inverse(const Spectrum& s, const float* spectrum, float* z, int64_t rows,
                                PutRow put) {
  const int64_t width = s.w->length;
  const int32_t* position = s.w->position.data();
  for (int64_t r = 0; r < rows; r += 2) {
    const float* in = spectrum + r * kElement;
    for (int64_t f = 0; f < s.columns; ++f, in += s.column_stride) {
      VF ar = load(in), ai = load(in + kLanesF), br{}, bi{};
      if (r + 1 < rows) br = load(in + kElement), bi = load(in + kElement + kLanesF);
      float* a = z + position[f] * kElement;
      store(a, ar - bi);
      store(a + kLanesF, ai + br);
      if (f == 0 || 2 * f == width) continue;
      float* b = z + position[width - f] * kElement;
      store(b, ar + bi);
      store(b + kLanesF, br - ai);
    }
    fft_inverse(*s.w, z);
    put(r, z);
    if (r + 1 < rows) put(r + 1, z + kLanesF);
  }
}

// a = a * conj(b), or sum += a * conj(b), over one column.
LKCONV_INLINE void multiply_conjugate(float* a, const float* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i, a += kElement, b += kElement) {
    VF ar = load(a), ai = load(a + kLanesF), br = load(b), bi = load(b + kLanesF);
    store(a, ar * br + ai * bi);
    store(a + kLanesF, ai * br - ar * bi);
  }
}
LKCONV_INLINE void add_product_conjugate(float* sum, const float* a, const float* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i, a += kElement, b += kElement, sum += kElement) {
    VF ar = load(a), ai = load(a + kLanesF), br = load(b), bi = load(b + kLanesF);
    store(sum, load(sum) + ar * br + ai * bi);
    store(sum + kLanesF, load(sum + kLanesF) + ai * br - ar * bi);
  }
}

struct FftTile {
  int64_t y0, y1, x0, x1;  // outputs
  int64_t oy, ox;          // input index at window position 0
  int64_t r0, r1, c0, c1;  // window rows and columns that hold input
};

struct FftGeometry {
  FftAxis h, w;
  int64_t tiles_y, tiles_x;
  FftGeometry(const Geometry& p, const Plan& plan)
      : h(fft_axis(p.height, p.out_height, p.kernel_h, p.pad_h, p.dil_h, plan.tile_h)),
        w(fft_axis(p.width, p.out_width, p.kernel_w, p.pad_w, p.dil_w, plan.tile_w)),
        tiles_y(ceil_div(p.out_height, plan.tile_h)),
        tiles_x(ceil_div(p.out_width, plan.tile_w)) {}

  FftTile tile(const Geometry& p, int64_t index) const {
    FftTile t;
    t.y0 = index / tiles_x * h.tile;
    t.x0 = index % tiles_x * w.tile;
    t.y1 = std::min(t.y0 + h.tile, p.out_height);
    t.x1 = std::min(t.x0 + w.tile, p.out_width);
    t.oy = t.y0 - p.pad_h + h.first_tap * p.dil_h;
    t.ox = t.x0 - p.pad_w + w.first_tap * p.dil_w;
    const int64_t rows = t.y1 - t.y0 + h.extent - 1, cols = t.x1 - t.x0 + w.extent - 1;
    t.r0 = std::clamp<int64_t>(-t.oy, 0, rows);
    t.r1 = std::clamp<int64_t>(p.height - t.oy, t.r0, rows);
    t.c0 = std::clamp<int64_t>(-t.ox, 0, cols);
    t.c1 = std::clamp<int64_t>(p.width - t.ox, t.c0, cols);
    return t;
  }
};

LKCONV_INLINE void load_tile(const Spectrum& s, float* spectrum, float* z, const Lanes<float>& in,
                             const FftTile& t) {
  rows_forward(s, spectrum, z, t.r0, t.r1, t.c0, t.c1, [&](int64_t r, float* dst) {
    load_rows(dst, 0, kElement, in, t.oy + r, t.oy + r + 1, t.ox + t.c0, t.ox + t.c1);
    return true;
  });
}

// Spectrum of the cropped, dilated, scaled kernel of the lanes' channels. `taps` holds it as plain vectors.
LKCONV_INLINE void kernel_spectrum(const Spectrum& s, float* spectrum, float* z, float* taps,
                                   const Geometry& p, const FftGeometry& g, const Lanes<float>& weight,
                                   float scale) {
  load_kernel(taps, weight, p.kernel_h, p.kernel_w);
  rows_forward(s, spectrum, z, 0, g.h.extent, 0, g.w.extent, [&](int64_t r, float* dst) {
    if (r % p.dil_h) return false;
    const float* row = taps + ((g.h.first_tap + r / p.dil_h) * p.kernel_w + g.w.first_tap) * kLanesF;
    if (p.dil_w > 1) zero(dst, g.w.extent, kElement);
    for (int64_t v = 0; v < g.w.last_tap - g.w.first_tap; ++v)
      store(dst + v * p.dil_w * kElement, load(row + v * kLanesF) * scale);
    return true;
  });
  for (int64_t f = 0; f < s.columns; ++f) column_forward(s, spectrum + f * s.column_stride, 0, g.h.extent);
}

inline void forward_fft(const ForwardProblem& p, const Plan& plan, int64_t task0, int64_t task1) {
  const Spectrum s(plan);
  const FftGeometry g(p, plan);
  const int64_t tiles = g.tiles_y * g.tiles_x, size = s.floats(), taps = p.kernel_h * p.kernel_w * kLanesF;
  float* x = thread_scratch<float>(size * (p.reduce + 1 + (p.reduce > 1)) + s.row_floats() + taps);
  float* kernels = x + size;
  float* sum = p.reduce > 1 ? kernels + size * p.reduce : x;
  float* z = kernels + size * (p.reduce + (p.reduce > 1));
  const float scale = float(0.25 / double(plan.fft_h * plan.fft_w));
  const bool large = requests_rows(p, p.input.dtype);
  int64_t loaded_group = -1;
  for (int64_t task = task0; task < task1; ++task) {
    const int64_t group = task / (p.batch * tiles), n = task / tiles % p.batch, c0 = group * kLanesF;
    if (group != loaded_group) {
      for (int64_t j = 0; j < p.reduce; ++j)
        kernel_spectrum(
            s, kernels + j * size, z, z + s.row_floats(), p, g,
            make_lanes<float>(p.weight, 0, c0, p.channels, [&](int64_t c) { return p.weight_channel(c, j); }),
            scale);
      loaded_group = group;
    }
    const FftTile t = g.tile(p, task % tiles);
    if (p.reduce > 1) zero(sum, size / kLanesF);
    for (int64_t j = 0; j < p.reduce; ++j) {
      Lanes<float> from =
          make_lanes<float>(p.input, n, c0, p.channels, [&](int64_t c) { return p.input_channel(c, j); });
      ask_ahead(from, p.input, large);
      load_tile(s, x, z, from, t);
      for (int64_t f = 0; f < s.columns; ++f) {
        float* column = x + f * s.column_stride;
        const float* kernel = kernels + j * size + f * s.column_stride;
        column_forward(s, column, t.r0, t.r1);
        if (p.reduce > 1)
          add_product_conjugate(sum + f * s.column_stride, column, kernel, s.h->length);
        else
          multiply_conjugate(column, kernel, s.h->length);
        if (j + 1 == p.reduce) fft_inverse(*s.h, sum + f * s.column_stride);
      }
    }
    Lanes<float> to = make_lanes<float>(p.output, n, c0, p.channels, [](int64_t c) { return c; });
    ask_ahead(to, p.output, large);
    const VF bias = load_bias<float>(p.bias, c0, p.channels);
    rows_inverse(s, sum, z, t.y1 - t.y0, [&](int64_t r, const float* src) {
      store_rows(src, 0, kElement, bias, to, t.y0 + r, t.y0 + r + 1, t.x0, t.x1);
    });
  }
}

// Task = (channel group, split of the batch), as in direct_weight.h; the batch is summed in the spectrum.
inline void weight_fft(const WeightProblem& p, const Plan& plan, float* partial, int64_t task0,
                       int64_t task1) {
  const Spectrum s(plan);
  const FftGeometry g(p, plan);
  const int64_t tiles = g.tiles_y * g.tiles_x, size = s.floats(), taps = p.kernel_h * p.kernel_w;
  float* x = thread_scratch<float>(size * 3 + s.row_floats());
  float *d = x + size, *sum = d + size, *z = sum + size;
  const float scale = float(0.25 / double(plan.fft_h * plan.fft_w));
  const bool large = requests_rows(p, p.input.dtype);
  const int64_t groups = channel_groups(p.channels, plan);
  for (int64_t task = task0; task < task1; ++task) {
    const int64_t group = task / plan.splits, split = task % plan.splits, c0 = group * kLanesF;
    zero(sum, size / kLanesF);
    for (int64_t n = p.batch * split / plan.splits; n < p.batch * (split + 1) / plan.splits; ++n) {
      Lanes<float> in =
          make_lanes<float>(p.input, n, c0, p.channels, [&](int64_t c) { return c / p.channel_div; });
      Lanes<float> grad = make_lanes<float>(p.grad_output, n, c0, p.channels, [](int64_t c) { return c; });
      ask_ahead(in, p.input, large);
      ask_ahead(grad, p.grad_output, large);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const FftTile t = g.tile(p, tile);
        load_tile(s, x, z, in, t);
        const int64_t rows = t.y1 - t.y0;
        rows_forward(s, d, z, 0, rows, 0, t.x1 - t.x0, [&](int64_t r, float* dst) {
          load_rows(dst, 0, kElement, grad, t.y0 + r, t.y0 + r + 1, t.x0, t.x1);
          return true;
        });
        for (int64_t f = 0; f < s.columns; ++f) {
          const int64_t at = f * s.column_stride;
          column_forward(s, x + at, t.r0, t.r1);
          column_forward(s, d + at, 0, rows);
          add_product_conjugate(sum + at, x + at, d + at, s.h->length);
        }
      }
    }
    for (int64_t f = 0; f < s.columns; ++f) fft_inverse(*s.h, sum + f * s.column_stride);
    float* out = partial + (split * groups + group) * taps * kLanesF;
    zero(out, taps);
    rows_inverse(s, sum, z, g.h.extent, [&](int64_t r, const float* src) {
      if (r % p.dil_h) return;
      float* row = out + ((g.h.first_tap + r / p.dil_h) * p.kernel_w + g.w.first_tap) * kLanesF;
      for (int64_t v = 0; v < g.w.last_tap - g.w.first_tap; ++v)
        store(row + v * kLanesF, load(src + v * p.dil_w * kElement) * scale);
    });
  }
}

}  // namespace lkconv::cpu::LKCONV_ISA
