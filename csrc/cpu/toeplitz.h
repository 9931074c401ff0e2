// Forward convolution on matrix units (derivation: toeplitz_plan.h; scratch layout: ToeplitzForward there).
#pragma once

namespace lkconv::cpu::LKCONV_ISA {

struct ForwardTask {
  int64_t c0, channels;         // output channels
  int64_t n0, images;           // images: rows of all of them are interleaved, image innermost
  int64_t y0, out_y, out_rows;  // output rows per image, and in all
  int64_t x0, width;            // output columns
  int64_t in_y0, in_y, in_rows;
  int64_t left;           // input column that packed column 0 stands for
  int64_t in_c0, planes;  // input channels the task reads
};

inline ForwardTask forward_task(const ForwardProblem& p, const Plan& plan, int64_t task) {
  const int64_t tiles_x = ceil_div(p.out_width, plan.tile_w), tiles_y = ceil_div(p.out_height, plan.tile_h);
  const int64_t parts = ceil_div(p.batch, plan.images);
  ForwardTask t;
  t.x0 = task % tiles_x * plan.tile_w;
  t.y0 = task / tiles_x % tiles_y * plan.tile_h;
  t.n0 = task / (tiles_x * tiles_y) % parts * plan.images;
  t.c0 = task / (tiles_x * tiles_y * parts) * plan.lanes;
  t.channels = std::min(plan.lanes, p.channels - t.c0);
  t.images = std::min(plan.images, p.batch - t.n0);
  t.out_y = std::min(plan.tile_h, p.out_height - t.y0);
  t.width = std::min(plan.tile_w, p.out_width - t.x0);
  t.in_y0 = std::clamp<int64_t>(t.y0 - p.pad_h, 0, p.height);
  t.in_y = std::clamp<int64_t>(t.y0 + t.out_y - p.pad_h + p.kernel_h - 1, t.in_y0, p.height) - t.in_y0;
  t.out_rows = t.out_y * t.images;
  t.in_rows = t.in_y * t.images;
  t.left = t.x0 - p.pad_w;
  t.in_c0 = p.input_channel(t.c0, 0);
  t.planes = p.input_channel(t.c0 + t.channels - 1, p.reduce - 1) + 1 - t.in_c0;
  return t;
}

// Lanes [a, b) of packed run `tile` that lie inside the image.
struct Inside {
  int64_t a, b;
  Inside(int64_t left, int64_t tile, int64_t width)
      : a(std::clamp<int64_t>(-(left + tile * kTileRows), 0, kTileDepth)),
        b(std::clamp<int64_t>(width - (left + tile * kTileRows), a, kTileDepth)) {}
  bool any() const { return a < b; }
};

// Where the input of one task goes. Runs outside the image are neither written nor read.
struct PackedInput {
  const ToeplitzForward& sizes;
  const ForwardTask& task;
  int64_t columns, width;  // runs in use; columns of the image
  u16* planes;
  const int64_t* offsets;

  u16* line(int64_t plane, int64_t tile, int64_t row) const {
    return planes +
           (plane * sizes.plane_lines + tile * sizes.tile_lines + kToeplitzMargin + row) * kTileDepth;
  }
  Inside inside(int64_t tile) const { return {task.left, tile, width}; }

  // Vector stores may alias anything: what these loops need is in locals first.
  void clear_margins(int64_t plane) const {
    for (int64_t tile = 0; tile < columns; ++tile) {
      if (!inside(tile).any()) continue;
      u16 *above = line(plane, tile, 1 - kToeplitzMargin), *below = line(plane, tile, task.in_rows);
      for (int64_t r = 0; r < kToeplitzMargin - 1; ++r) {
        store_line(above + r * kTileDepth, VLine{});
        store_line(below + r * kTileDepth, VLine{});
      }
    }
  }

  // One channel whose columns are `step` apart.
  void pack_rows(int64_t plane, const u16* in, int64_t step) const {
    clear_margins(plane);
    for (int64_t tile = 0; tile < columns; ++tile) {
      const Inside i = inside(tile);
      if (!i.any()) continue;
      const u16* from = in + (task.left + tile * kTileRows) * step;
      const int64_t *offset = offsets, rows = task.in_rows;
      u16* to = line(plane, tile, 0);
      for (int64_t r = 0; r < rows; ++r)
        store_line(to + r * kTileDepth, load_line(from + offset[r], step, i.a, i.b));
    }
  }

  // Up to 16 neighbouring channels: every second run is transposed, the runs between are put together from
  // halves.
  void pack_channels(int64_t plane, int64_t count, const u16* in, int64_t step) const {
    for (int64_t l = 0; l < count; ++l) clear_margins(plane + l);
    for (int64_t tile = 0; tile <= columns; tile += 2) {
      const Inside i = inside(tile);
      if (!i.any()) continue;
      const u16* from = in + (task.left + tile * kTileRows) * step;
      const int64_t *offset = offsets, rows = task.in_rows, plane_step = sizes.plane_lines * kTileDepth;
      u16* to = line(plane, tile, 0);
      for (int64_t r = 0; r < rows; ++r) {
        const u16* pixel = from + offset[r];
        transpose_to_lines(to + r * kTileDepth, plane_step, count, [=](int x) __attribute__((always_inline)) {
          return x >= i.a && x < i.b ? load_half(pixel + x * step, 1, 0, count) : VU16{};
        });
      }
    }
    for (int64_t l = 0; l < count; ++l)
      for (int64_t tile = 1; tile < columns; tile += 2) {
        if (!inside(tile).any()) continue;
        const bool low = inside(tile - 1).any(), high = inside(tile + 1).any();
        const int64_t rows = task.in_rows, next = sizes.tile_lines * kTileDepth;
        u16* to = line(plane + l, tile, 0);
        for (int64_t r = 0; r < rows; ++r, to += kTileDepth)
          store_line(to, middle(low ? load_line(to - next) : VLine{}, high ? load_line(to + next) : VLine{}));
      }
  }
};

// A 16 x 16 tile of outputs: rows 16 `row`.. and columns 16 `block`.. of the task, the A tile for u = k = 0
// counted in lines from the first row of a plane, and the kernel rows and depths whose A tile meets the
// image.
struct OutputTile {
  int64_t row, block, at;
  Steps u, k;
};

struct Operands {
  const u16* planes;      // first row of the first plane
  int64_t plane;          // values between the planes of a sum
  const uint32_t* bands;  // [reduce][kernel_h][band]
  int64_t band, depth, kernel_h, reduce;
  int64_t row_step, column_step;  // lines per step of u and of k
};

// sums[s][tile] = the tiles' products, T tiles at a time so that they share each band tile. A product waits
// for the previous one into the same register (52 cycles, issue every 16): fewer than four tiles use S
// registers each.
template <int T, int S>
LKCONV_INLINE void multiply_tiles(const Operands& o, const OutputTile* tile, float* sums) {
  each<T * S>([](auto i) __attribute__((always_inline)) { tile_zero<i>(); });
  Steps u = tile[0].u, k = tile[0].k;
  for (int i = 1; i < T; ++i) {
    u = {std::min(u.first, tile[i].u.first), std::max(u.last, tile[i].u.last)};
    k = {std::min(k.first, tile[i].k.first), std::max(k.last, tile[i].k.last)};
  }
  for (int64_t j = 0; j < o.reduce; ++j)
    for (int64_t u0 = u.first; u0 < u.last; u0 += S)
      each<S>([&](auto s) __attribute__((always_inline)) {
        const int64_t row = u0 + s;
        if (row >= u.last) return;
        const uint32_t* band = o.bands + (j * o.kernel_h + row) * o.band;
        for (int64_t depth = k.first; depth < k.last; ++depth) {
          const u16* plane = o.planes + j * o.plane + (row * o.row_step + depth * o.column_step) * kTileDepth;
          tile_load<4>(band_tile(band, o.depth, depth), kBandStride);
          each<T>([&](auto i) __attribute__((always_inline)) {
            if (!tile[i].u.has(row) || !tile[i].k.has(depth)) return;
            tile_load<5 + i % 3>(plane + tile[i].at * kTileDepth, 64);
            tile_dot<s * T + i, 5 + i % 3, 4>();
          });
        }
      });
  each<T * S>([&](auto i) __attribute__((always_inline)) { tile_store<i>(sums + i * 256, 64); });
}

constexpr int64_t kTilesTogether = 4;

// Returns the number of partial sums of each tile.
inline int multiply_tiles(const Operands& o, const OutputTile* tile, int64_t count, float* sums) {
  switch (count) {
    case 1:
      return multiply_tiles<1, 4>(o, tile, sums), 4;
    case 2:
      return multiply_tiles<2, 2>(o, tile, sums), 2;
    case 3:
      return multiply_tiles<3, 1>(o, tile, sums), 1;
    default:
      return multiply_tiles<4, 1>(o, tile, sums), 1;
  }
}

// Where the outputs of one task go: straight to rows of columns, or, where channels are innermost, to staged
// rows [channel][row][stage_width] that are transposed when all channels are done.
struct OutputRows {
  const TensorView& view;
  const ForwardTask& task;
  const int64_t* offsets;
  u16* stage;  // null: straight
  int64_t stage_width;

  void put(int64_t channel, const OutputTile& tile, const float* sums, int64_t parts, int64_t part_step,
           float bias) const {
    const int64_t rows = std::min(kTileRows, task.out_rows - tile.row * kTileRows);
    const int64_t x = tile.block * kTileRows, count = std::min(kTileRows, task.width - x);
    const int64_t base = (task.c0 + channel) * view.stride_c + (task.x0 + x) * view.stride_w,
                  step = view.stride_w;
    const int64_t* offset = offsets + tile.row * kTileRows;
    const auto sum = [=](int64_t i) __attribute__((always_inline)) {
      VF v = load(sums + i * 16);
      for (int64_t s = 1; s < parts; ++s) v += load(sums + s * part_step + i * 16);
      return v + bias;
    };
    if (stage) {
      const int64_t width = stage_width;
      u16* to = stage + (channel * task.out_rows + tile.row * kTileRows) * width + x;
      for (int64_t i = 0; i < rows; ++i) store_half(to + i * width, round_to_bf16(sum(i)));
    } else if (view.dtype == DType::bf16) {
      u16* to = static_cast<u16*>(view.data) + base;
      for (int64_t i = 0; i < rows; ++i) store_half(to + offset[i], step, count, round_to_bf16(sum(i)));
    } else {
      float* to = static_cast<float*>(view.data) + base;
      for (int64_t i = 0; i < rows; ++i) {
        const VF v = sum(i);
        for (int64_t l = 0; l < count; ++l) to[offset[i] + l * step] = v[l];
      }
    }
  }

  void flush() const {
    const int64_t step = task.out_rows * stage_width;
    const int64_t pixel_step = view.stride_w, channels = task.channels;
    u16* out = static_cast<u16*>(view.data) + task.c0 + task.x0 * pixel_step;
    for (int64_t row = 0; row < task.out_rows; ++row)
      for (int64_t x = 0; x < task.width; x += 32) {
        u16* pixel = out + offsets[row] + x * pixel_step;
        const int64_t pixels = task.width - x;
        transpose_from_lines(stage + row * stage_width + x, step, channels,
                             [=](int i, VU16 v) __attribute__((always_inline)) {
                               if (i < pixels) store_half(pixel + i * pixel_step, 1, channels, v);
                             });
      }
  }
};

// The output tiles of a task, row after row.
inline int64_t list_tiles(OutputTile* tiles, const ForwardProblem& p, const ToeplitzForward& s,
                          const ForwardTask& t) {
  int64_t count = 0;
  for (int64_t row = 0; row < ceil_div(t.out_rows, kTileRows); ++row) {
    const int64_t first = row * kTileRows + (t.y0 - p.pad_h - t.in_y0) * t.images;  // input row for u = 0
    const Steps u = steps_inside(first, t.images, p.kernel_h, 1 - kTileRows, t.in_rows - 1);
    for (int64_t block = 0; block < ceil_div(t.width, kTileRows); ++block)
      tiles[count++] = {
          row, block, first + block * s.tile_lines, u,
          steps_inside(t.left + block * kTileRows, kTileDepth, s.depth, 1 - kTileDepth, p.width - 1)};
  }
  return count;
}

// The bands of every kernel row of one output channel.
inline void make_bands(uint32_t* bands, u16* reversed, const ForwardProblem& p, const ToeplitzForward& s,
                       int64_t c) {
  const int64_t reversed_row = kTileDepth * (s.depth + 1);
  for (int64_t j = 0; j < p.reduce; ++j) {
    const u16* weight = bf16_data(p.weight) + p.weight_channel(c, j) * p.weight.stride_c;
    for (int64_t u = 0; u < p.kernel_h; ++u)
      reverse_taps(reversed + u * reversed_row, weight + u * p.weight.stride_h, p.weight.stride_w, p.kernel_w,
                   s.depth);
    for (int64_t u = 0; u < p.kernel_h; ++u)
      make_band(bands + (j * p.kernel_h + u) * s.band, reversed + u * reversed_row, s.depth);
  }
}

struct ForwardScratch {
  float* sums;
  uint32_t* bands;
  u16 *reversed, *planes, *stage;
  int64_t *in_offsets, *out_offsets;
  OutputTile* tiles;
  int64_t bytes;

  ForwardScratch(void* base, const ForwardProblem& p, const Plan& plan, const ToeplitzForward& s) {
    Carve carve(base);
    const bool staged = channels_innermost(p.output) && p.output.dtype == DType::bf16;
    const int64_t out_rows = plan.tile_h * plan.images,
                  width = ceil_div(plan.tile_w, kTileDepth) * kTileDepth;
    sums = carve.take<float>(kTilesTogether * 256);
    bands = carve.take<uint32_t>(p.reduce * p.kernel_h * s.band);
    reversed = carve.take<u16>(p.kernel_h * kTileDepth * (s.depth + 1));
    planes = carve.take<u16>((channels_innermost(p.input) ? plan.lanes : 1) * p.reduce * s.plane_lines *
                             kTileDepth);
    u16* rows = carve.take<u16>(staged ? plan.lanes * out_rows * width : 0);
    stage = staged ? rows : nullptr;
    in_offsets = carve.take<int64_t>(s.rows);
    out_offsets = carve.take<int64_t>(out_rows);
    tiles = carve.take<OutputTile>(ceil_div(out_rows, kTileRows) * ceil_div(plan.tile_w, kTileRows));
    bytes = carve.used();
  }
};

inline void forward_toeplitz_task(const ForwardProblem& p, const ToeplitzForward& s, const ForwardTask& t,
                                  const ForwardScratch& w) {
  row_offsets(w.in_offsets, p.input, t.n0, t.images, t.in_y0, t.in_y);
  row_offsets(w.out_offsets, p.output, t.n0, t.images, t.y0, t.out_y);
  const int64_t blocks = ceil_div(t.width, kTileRows), count = list_tiles(w.tiles, p, s, t);
  const PackedInput in{s, t, blocks + 2 * (s.depth - 1), p.width, w.planes, w.in_offsets};
  const OutputRows out{p.output, t, w.out_offsets, w.stage, ceil_div(t.width, kTileDepth) * kTileDepth};
  const u16* input = bf16_data(p.input) + t.in_c0 * p.input.stride_c;
  const bool transposed = channels_innermost(p.input);
  if (transposed)
    for (int64_t l = 0; l < t.planes; l += 16)
      in.pack_channels(l, std::min<int64_t>(16, t.planes - l), input + l, p.input.stride_w);
  const int64_t groups = ceil_div(count, kTilesTogether);
  int64_t packed = -1;  // input channel in the planes
  for (int64_t l = 0; l < t.channels; ++l) {
    const int64_t c = t.c0 + l, first = p.input_channel(c, 0);
    make_bands(w.bands, w.reversed, p, s, c);
    if (!transposed && first != packed)
      for (int64_t j = 0; j < p.reduce; ++j)
        in.pack_rows(j, bf16_data(p.input) + (first + j) * p.input.stride_c, p.input.stride_w);
    packed = first;
    const float bias = p.bias.data ? bfloat_to_float(bf16_data(p.bias)[c * p.bias.stride_c]) : 0;
    const Operands operands{in.line(transposed ? first - t.in_c0 : 0, 0, 0),
                            s.plane_lines * kTileDepth,
                            w.bands,
                            s.band,
                            s.depth,
                            p.kernel_h,
                            p.reduce,
                            t.images,
                            2 * s.tile_lines};
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t a = count * g / groups, n = count * (g + 1) / groups - a;
      const int64_t parts = multiply_tiles(operands, w.tiles + a, n, w.sums);
      for (int64_t i = 0; i < n; ++i) out.put(l, w.tiles[a + i], w.sums + i * 256, parts, n * 256, bias);
    }
  }
  if (w.stage) out.flush();
}

// Task = (channel group, images, rows, columns), as the launcher counts them. bfloat16, stride and
// dilation 1.
inline void forward_toeplitz(const ForwardProblem& p, const Plan& plan, int64_t task0, int64_t task1) {
  const ToeplitzForward sizes = toeplitz_forward_sizes(p, plan);
  const int64_t bytes = ForwardScratch(nullptr, p, plan, sizes).bytes;
  const ForwardScratch scratch(thread_scratch<char>(bytes), p, plan, sizes);
  const TileSession session;
  for (int64_t task = task0; task < task1; ++task)
    forward_toeplitz_task(p, sizes, forward_task(p, plan, task), scratch);
}

}  // namespace lkconv::cpu::LKCONV_ISA
