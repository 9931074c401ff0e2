// backward_weight on matrix units: for each kernel row u and block of 16 output columns,
//   D_u[m, x] = sum over rows r of X[r + u, m] dY[r, x],  and  grad_weight[u, v] = sum over x of D_u[x + v,
//   x].
// A tile of X holds 16 input columns (transposed: rows lie along K), one of dY pairs of rows of 16 columns in
// reverse order. The diagonals of all blocks coincide, so all blocks add to the same `bands` tiles per kernel
// row.
#pragma once

namespace lkconv::cpu::LKCONV_ISA {

struct WeightChunk {
  int64_t c0, channels;   // output channels
  int64_t in_c0, planes;  // input channels they read
  int64_t n0, images, y0, out_y, x0, width;
  int64_t in_y0, in_y, left;  // left: input column of row 0 of the first input block
  int64_t blocks;             // of 16 output columns
  int64_t first, in_rows;     // packed input row that meets packed output row 0 for u = 0; packed input rows
};

inline WeightChunk weight_chunk(const WeightProblem& p, const Plan& plan, int64_t group, int64_t n0,
                                int64_t n1, int64_t y0, int64_t x0) {
  WeightChunk t;
  t.c0 = group * plan.lanes;
  t.channels = std::min(plan.lanes, p.channels - t.c0);
  t.in_c0 = t.c0 / p.channel_div;
  t.planes = (t.c0 + t.channels - 1) / p.channel_div + 1 - t.in_c0;
  t.n0 = n0, t.y0 = y0, t.x0 = x0;
  t.images = n1 - n0;
  t.out_y = std::min(plan.tile_h, p.out_height - y0);
  t.width = std::min(plan.tile_w, p.out_width - x0);
  t.in_y0 = std::clamp<int64_t>(y0 - p.pad_h, 0, p.height);
  t.in_y = std::clamp<int64_t>(y0 + t.out_y - p.pad_h + p.kernel_h - 1, t.in_y0, p.height) - t.in_y0;
  t.left = x0 - p.pad_w;
  t.blocks = ceil_div(t.width, kTileRows);
  t.first = (y0 - p.pad_h - t.in_y0) * t.images;
  t.in_rows = t.in_y * t.images;
  return t;
}

// The packed operands of one chunk; each channel has a plane in both.
struct WeightPack {
  const WeightProblem& p;
  const WeightChunk& t;
  const ToeplitzWeight& sizes;
  u16 *input, *grad;
  const int64_t *in_offsets, *grad_offsets;

  u16* column(int64_t plane, int64_t i) const { return input + plane * sizes.input_plane + i * sizes.pitch; }
  bool meets_image(int64_t block) const {
    const int64_t x = t.left + block * kTileRows;
    return x + kTileRows > 0 && x < p.width;
  }
  int64_t out_rows() const { return t.out_y * t.images; }

  // Zeros before and after the rows of one input column (rows themselves are written in whole lines).
  void clear_margins(u16* column) const {
    store_line(column, VLine{});
    store_line(column + kTileDepth + ceil_div(t.in_rows, kTileDepth) * kTileDepth, VLine{});
  }

  // Input block by block of 16 columns, 32 rows at a time; columns are `step` apart.
  void input_rows(int64_t plane, const u16* in, int64_t step) const {
    for (int64_t block = 0; block < t.blocks + sizes.bands - 1; ++block) {
      if (!meets_image(block)) continue;
      const int64_t x = t.left + block * kTileRows;
      const int64_t a = std::clamp<int64_t>(-x, 0, 16), b = std::clamp<int64_t>(p.width - x, a, 16);
      u16* to = column(plane, block * kTileRows);
      for (int64_t i = 0; i < 16; ++i) clear_margins(to + i * sizes.pitch);
      const u16* from = in + x * step;
      const int64_t pitch = sizes.pitch, rows = t.in_rows;
      for (int64_t r = 0; r < rows; r += 32) {
        const int64_t *offset = in_offsets + r, left = rows - r;
        transpose_to_lines(to + kTileDepth + r, pitch, 16, [=](int i) __attribute__((always_inline)) {
          return i < left ? load_half(from + offset[i], step, a, b) : VU16{};
        });
      }
    }
  }
  // The same for up to 16 neighbouring channels, one column at a time.
  void input_channels(int64_t count, const u16* in, int64_t step) const {
    for (int64_t i = 0; i < (t.blocks + sizes.bands - 1) * kTileRows; ++i) {
      if (!meets_image(i / kTileRows)) continue;
      const int64_t x = t.left + i;
      const bool inside = x >= 0 && x < p.width;
      for (int64_t l = 0; l < count; ++l) clear_margins(column(l, i));
      u16* to = column(0, i) + kTileDepth;
      const u16* from = in + x * step;
      const int64_t plane = sizes.input_plane, rows = t.in_rows;
      for (int64_t r = 0; r < rows; r += 32) {
        const int64_t *offset = in_offsets + r, left = inside ? rows - r : 0;
        transpose_to_lines(to + r, plane, count, [=](int j) __attribute__((always_inline)) {
          return j < left ? load_half(from + offset[j], 1, 0, count) : VU16{};
        });
      }
    }
  }

  u16* grad_pairs(int64_t plane, int64_t block, int64_t row) const {
    return grad + plane * sizes.grad_plane + (block * sizes.grad_rows + row) * kTileRows;
  }
  void grad_rows(int64_t plane, const u16* in, int64_t step) const {
    for (int64_t block = 0; block < t.blocks; ++block) {
      const int64_t x = t.x0 + block * kTileRows, count = std::min(kTileRows, t.x0 + t.width - x);
      const u16* from = in + x * step;
      u16* to = grad_pairs(plane, block, 0);
      const int64_t *offset = grad_offsets, rows = out_rows(),
                    padded = ceil_div(rows, kTileDepth) * kTileDepth;
      const auto row = [=](int64_t r) __attribute__((always_inline)) {
        return r < rows ? load_half(from + offset[r], step, 0, count) : VU16{};
      };
      for (int64_t r = 0; r < padded; r += 2)
        store_line(to + r * kTileRows, (VLine)reverse(pair(row(r), row(r + 1))));
    }
  }
  void grad_channels(int64_t count, const u16* in, int64_t step) const {
    const int64_t plane = sizes.grad_plane, rows = out_rows(),
                  padded = ceil_div(rows, kTileDepth) * kTileDepth;
    for (int64_t block = 0; block < t.blocks; ++block) {
      const u16* from = in + (t.x0 + block * kTileRows) * step;
      const int64_t width = t.width - block * kTileRows;
      for (int64_t r = 0; r < padded; r += 2) {
        const u16* row[2] = {r < rows ? from + grad_offsets[r] : nullptr,
                             r + 1 < rows ? from + grad_offsets[r + 1] : nullptr};
        transpose_to_lines(grad_pairs(0, block, r), plane, count, [=](int i) __attribute__((always_inline)) {
          const int64_t x = 15 - i / 2;
          return x < width && row[i % 2] ? load_half(row[i % 2] + x * step, 1, 0, count) : VU16{};
        });
      }
    }
  }
};

// Products of U kernel rows u, u + 1, ... with the I bands i0, i0 + 1, ..., all of whose sums stay in
// registers.
template <int U, int I>
LKCONV_INLINE void correlate_tiles(const WeightPack& w, int64_t in_plane, int64_t grad_plane, int64_t u,
                                   int64_t i0) {
  static_assert(U * I <= 4 && (U <= 2 || I == 1));
  each<U * I>([](auto i) __attribute__((always_inline)) { tile_zero<i>(); });
  const int64_t pitch = w.sizes.pitch * 2;
  for (int64_t r = 0; r < w.out_rows(); r += kTileDepth) {
    int64_t row[U];
    bool met[U], any = false;
    for (int j = 0; j < U; ++j) {
      row[j] = r + w.t.first + (u + j) * w.t.images;
      any |= met[j] = row[j] > -kTileDepth && row[j] < w.t.in_rows;
    }
    if (!any) continue;
    for (int64_t block = i0; block < i0 + I - 1 + w.t.blocks; ++block) {
      if (!w.meets_image(block)) continue;
      const u16* columns = w.column(in_plane, block * kTileRows) + kTileDepth;
      if constexpr (U <= 2)
        each<U>([&](auto j) __attribute__((always_inline)) {
          if (met[j]) tile_load<4 + j>(columns + row[j], pitch);
        });
      each<I>([&](auto i) __attribute__((always_inline)) {
        const int64_t out = block - i0 - i;
        if (out < 0 || out >= w.t.blocks) return;
        tile_load<6 + i % 2>(w.grad_pairs(grad_plane, out, r), 64);
        each<U>([&](auto j) __attribute__((always_inline)) {
          if (!met[j]) return;
          if constexpr (U > 2) tile_load<4 + j % 2>(columns + row[j], pitch);
          tile_dot<j * I + i, 4 + j % 2, 6 + i % 2>();
        });
      });
    }
  }
}

// total[16 i0 + 15 + v] += the sums along the diagonals m - x = v of I tiles below each other, where column n
// of a tile stands for x = 15 - n. Storing each row one element further right turns diagonals into columns;
// the cells that no tile covers hold zeros, always the same ones.
template <int I, int First>
LKCONV_INLINE void add_diagonals(float* skewed, float* total) {
  constexpr int64_t width = 16 * I + 16;
  each<I>([&](auto i)
              __attribute__((always_inline)) { tile_store<First + i>(skewed + 16 * i, (width + 1) * 4); });
  for (int64_t v = 0; v < width; v += 16) {
    VF sum = load(total + v);
    for (int64_t r = 0; r < 16; ++r) sum += load(skewed + r * width + v);
    store(total + v, sum);
  }
}

constexpr int64_t kSkewed = 16 * 80;  // floats: the widest case, I = 4

template <int U, int I>
int64_t correlate_rows_of_tiles(const WeightPack& w, int64_t in_plane, int64_t grad_plane, int64_t u,
                                int64_t i0, float* skewed, float* total, int64_t total_row) {
  for (; u + U <= w.p.kernel_h; u += U) {
    correlate_tiles<U, I>(w, in_plane, grad_plane, u, i0);
    each<U>([&](auto j) __attribute__((always_inline)) {
      add_diagonals<I, j * I>(skewed, total + (u + j) * total_row + i0 * kTileRows);
    });
  }
  return u;
}

// All kernel rows of one channel against one chunk: total[u][15 + v] += grad_weight[u, v].
inline void correlate_channel(const WeightPack& w, int64_t in_plane, int64_t grad_plane, float* skewed,
                              float* total, int64_t total_row) {
  const int64_t bands = w.sizes.bands, parts = ceil_div(bands, 4);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t i0 = bands * part / parts, count = bands * (part + 1) / parts - i0;
    for (int64_t i = 0; i < kSkewed; i += 16) store(skewed + i, VF{});
    int64_t u = 0;
    switch (count) {
      case 1:
        u = correlate_rows_of_tiles<4, 1>(w, in_plane, grad_plane, u, i0, skewed, total, total_row);
        correlate_rows_of_tiles<1, 1>(w, in_plane, grad_plane, u, i0, skewed, total, total_row);
        break;
      case 2:
        u = correlate_rows_of_tiles<2, 2>(w, in_plane, grad_plane, u, i0, skewed, total, total_row);
        correlate_rows_of_tiles<1, 2>(w, in_plane, grad_plane, u, i0, skewed, total, total_row);
        break;
      case 3:
        correlate_rows_of_tiles<1, 3>(w, in_plane, grad_plane, u, i0, skewed, total, total_row);
        break;
      default:
        correlate_rows_of_tiles<1, 4>(w, in_plane, grad_plane, u, i0, skewed, total, total_row);
        break;
    }
  }
}

struct WeightScratch {
  float *skewed, *total;
  u16 *input, *grad;
  int64_t *in_offsets, *grad_offsets;
  int64_t bytes;

  WeightScratch(void* base, const WeightProblem& p, const Plan& plan, const ToeplitzWeight& s) {
    Carve carve(base);
    skewed = carve.take<float>(kSkewed);
    total = carve.take<float>(plan.lanes * s.total);
    input = carve.take<u16>((channels_innermost(p.input) ? plan.lanes : 1) * s.input_plane);
    grad = carve.take<u16>((channels_innermost(p.grad_output) ? plan.lanes : 1) * s.grad_plane);
    in_offsets = carve.take<int64_t>(s.rows);
    grad_offsets = carve.take<int64_t>(plan.tile_h * plan.images);
    bytes = carve.used();
  }
};

inline void weight_toeplitz_chunk(const WeightProblem& p, const ToeplitzWeight& s, const WeightChunk& t,
                                  const WeightScratch& w, int64_t total_row) {
  row_offsets(w.in_offsets, p.input, t.n0, t.images, t.in_y0, t.in_y);
  row_offsets(w.grad_offsets, p.grad_output, t.n0, t.images, t.y0, t.out_y);
  const WeightPack pack{p, t, s, w.input, w.grad, w.in_offsets, w.grad_offsets};
  const bool in_transposed = channels_innermost(p.input), grad_transposed = channels_innermost(p.grad_output);
  if (in_transposed) pack.input_channels(t.planes, bf16_data(p.input) + t.in_c0, p.input.stride_w);
  if (grad_transposed)
    pack.grad_channels(t.channels, bf16_data(p.grad_output) + t.c0, p.grad_output.stride_w);
  int64_t packed = -1;  // input channel in the plane
  for (int64_t l = 0; l < t.channels; ++l) {
    const int64_t c = t.c0 + l, ic = c / p.channel_div;
    if (!in_transposed && ic != packed)
      pack.input_rows(0, bf16_data(p.input) + ic * p.input.stride_c, p.input.stride_w);
    packed = ic;
    if (!grad_transposed)
      pack.grad_rows(0, bf16_data(p.grad_output) + c * p.grad_output.stride_c, p.grad_output.stride_w);
    correlate_channel(pack, in_transposed ? ic - t.in_c0 : 0, grad_transposed ? l : 0, w.skewed,
                      w.total + l * s.total, total_row);
  }
}

// partial[tap][lane] from total[lane][u][15 + v].
inline void store_totals(const WeightProblem& p, const ToeplitzWeight& s, const float* total,
                         float* partial) {
  const int64_t row = s.total / p.kernel_h;
  for (int64_t u = 0; u < p.kernel_h; ++u)
    for (int64_t v = 0; v < p.kernel_w; v += 16) {
      VF r[16];
#pragma GCC unroll 16
      for (int l = 0; l < 16; ++l) r[l] = load(total + l * s.total + u * row + 15 + v);
      transpose<float>(r);
      for (int64_t i = 0; i < std::min<int64_t>(16, p.kernel_w - v); ++i)
        store(partial + (u * p.kernel_w + v + i) * 16, r[i]);
    }
}

// Task = (channel group, split of the batch); writes partial[split][group][tap][lane], as in direct_weight.h.
inline void weight_toeplitz(const WeightProblem& p, const Plan& plan, float* partial, int64_t task0,
                            int64_t task1) {
  const ToeplitzWeight sizes = toeplitz_weight_sizes(p, plan);
  const int64_t bytes = WeightScratch(nullptr, p, plan, sizes).bytes;
  const WeightScratch scratch(thread_scratch<char>(bytes), p, plan, sizes);
  const int64_t groups = channel_groups(p.channels, plan), total_row = sizes.total / p.kernel_h;
  const TileSession session;
  for (int64_t task = task0; task < task1; ++task) {
    const int64_t group = task / plan.splits, split = task % plan.splits;
    const int64_t n1 = p.batch * (split + 1) / plan.splits;
    for (int64_t i = 0; i < plan.lanes * sizes.total; i += 16) store(scratch.total + i, VF{});
    for (int64_t n = p.batch * split / plan.splits; n < n1; n += plan.images)
      for (int64_t y = 0; y < p.out_height; y += plan.tile_h)
        for (int64_t x = 0; x < p.out_width; x += plan.tile_w)
          weight_toeplitz_chunk(p, sizes,
                                weight_chunk(p, plan, group, n, std::min(n1, n + plan.images), y, x), scratch,
                                total_row);
    store_totals(p, sizes, scratch.total,
                 partial + (split * groups + group) * p.kernel_h * p.kernel_w * plan.lanes);
  }
}

}  // namespace lkconv::cpu::LKCONV_ISA
