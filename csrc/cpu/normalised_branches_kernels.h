// A sum of normalised branches and its gradient, one group of channels of one image at a time: see
// normalised_branches_problem.h. Lanes are channels, as in direct.h, whose rows of outputs this builds on.
#pragma once

namespace lkconv::cpu::LKCONV_ISA {

// The part of one channel group in one image that a task works on at a time.
struct BranchTile {
  int64_t n, g, c0;
  int64_t y0, y1;  // rows of the branches
  int64_t r0, r1;  // rows of grad_input
};

LKCONV_INLINE BranchTile branch_tile(const NormalisedBranchesProblem& p, const NormalisedBranchesPlan& plan,
                                     int64_t n, int64_t g, int64_t tile) {
  const int64_t first = tile * plan.tile_h, end = first + plan.tile_h;
  return {n,
          g,
          g * plan.lanes,
          std::min(first, p.out_height),
          std::min(end, p.out_height),
          std::min(first, p.height),
          std::min(end, p.height)};
}

template <class T>
LKCONV_INLINE Lanes<T> tensor_lanes(const NormalisedBranchesProblem& p, const TensorView& t,
                                    const BranchTile& tile) {
  return make_lanes<T>(t, tile.n, tile.c0, p.channels, [](int64_t c) { return c; });
}

// The output of branch b as it is kept: whole vectors, unused lanes zero.
template <class T>
LKCONV_INLINE Lanes<T> saved_lanes(const NormalisedBranchesProblem& p, const NormalisedBranchesPlan& plan,
                                   int64_t b, const BranchTile& tile) {
  constexpr int L = kLanes<T>;
  const int64_t plane = ((b * p.batch + tile.n) * plan.groups(p) + tile.g) * p.out_height * p.out_width * L;
  Lanes<T> lanes{};
  lanes.base[0] = static_cast<char*>(p.saved) + plane * dtype_size(p.dtype);
  lanes.count = L;
  lanes.neighbours = true;
  lanes.dtype = p.dtype;
  lanes.stride_y = p.out_width * L;
  lanes.stride_x = L;
  return lanes;
}

// Rows of one branch as vectors of the accumulation type: where they are, or converted into `buffer`.
template <class T>
struct BranchRows {
  const T* base;  // row y at base + (y - first) * step; null: converted
  int64_t first, step, width;
  Lanes<T> lanes;
  T* buffer;

  LKCONV_INLINE const T* row(int64_t y) const {
    if (base) return base + (y - first) * step;
    load_rows(buffer, width * kLanes<T>, kLanes<T>, lanes, y, y + 1, 0, width);
    return buffer;
  }
};

// Branch b of a tile; a tensor given was copied to `block` (one per tensor).
template <class T>
LKCONV_INLINE BranchRows<T> branch_rows(const NormalisedBranchesProblem& p,
                                        const NormalisedBranchesPlan& plan, int64_t b, const BranchTile& tile,
                                        const T* blocks, int64_t block, T* buffer) {
  constexpr int L = kLanes<T>;
  BranchRows<T> rows{nullptr, tile.y0, p.out_width * L, p.out_width, {}, buffer};
  if (b >= p.kernel_count) {
    rows.base = blocks + (b - p.kernel_count) * block;
    return rows;
  }
  rows.lanes = saved_lanes<T>(p, plan, b, tile);
  if (dtype_size(p.dtype) == sizeof(T))
    rows.base = reinterpret_cast<const T*>(rows.lanes.base[0]) + tile.y0 * rows.step;
  return rows;
}

template <class T>
void load_given(const NormalisedBranchesProblem& p, const BranchTile& tile, int64_t y0, int64_t y1, T* blocks,
                int64_t block) {
  constexpr int L = kLanes<T>;
  for (int64_t i = 0; i < p.given_count; ++i)
    load_rows(blocks + i * block, p.out_width * L, L, tensor_lanes<T>(p, p.given[i], tile), y0, y1, 0,
              p.out_width);
}

// Per-channel factors of branch b; unused lanes are zero.
template <class T>
LKCONV_INLINE Vec<T> factor(const NormalisedBranchesProblem& p, const void* factors, int64_t b, int64_t c0) {
  const T* at = static_cast<const T*>(factors) + b * p.channels + c0;
  const int64_t rest = p.channels - c0;
  return rest >= kLanes<T> ? load(at) : load_part(at, rest, T());
}

// Sum over x of f(x), by four sums in flight.
template <class T, class F>
LKCONV_INLINE Vec<T> row_sum(int64_t width, F f) {
  Vec<T> sums[4] = {};
  int64_t x = 0;
  for (; x + 4 <= width; x += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[i] += f(x + i);
  for (; x < width; ++x) sums[0] += f(x);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// ---- windows ----------------------------------------------------------------------------------------------

// The columns of a window as direct_row reads them, over `width` outputs.
LKCONV_INLINE DirectTile window_tile(const Reach& reach, int64_t width, int64_t first_row, int64_t last_row) {
  DirectTile t{};
  t.x1 = width;
  t.iy0 = first_row, t.iy1 = last_row;
  t.ix0 = -reach.before_w, t.ix1 = width + reach.after_w;
  return t;
}

// A window as wide as its image needs, too, where that is wider than what kernels reach.
LKCONV_INLINE DirectTile window_tile(const Reach& reach, int64_t width, int64_t image, int64_t first_row,
                                     int64_t last_row) {
  DirectTile t = window_tile(reach, width, first_row, last_row);
  t.ix1 = std::max(t.ix1, image);
  return t;
}

template <class T>
void load_input(const NormalisedBranchesProblem& p, const BranchTile& tile, const Window<T>& window,
                const DirectTile& t) {
  if (p.kernel_count == 0) return;
  const Lanes<T> input = tensor_lanes<T>(p, p.input, tile);
  load_window(&window, &input, 1, t, t.iy0, t.iy1, p.width);
}

// Pointers to the window's rows that row y of a convolution reads, from its kernel row u0 on.
template <class T>
LKCONV_INLINE void fill_table(const T** table, const Geometry& g, const Window<T>& window,
                              const DirectTile& t, int64_t y) {
  const int64_t top = y - g.pad_h;
  int64_t u0, u1;
  clip_taps(top, top, g.height, g.kernel_h, g.dil_h, u0, u1);
  if (u1 <= u0) return;
  const T* at = window.base + (top + u0 * g.dil_h - t.iy0) * window.row;
  for (int64_t i = 0; i <= (u1 - u0 - 1) * g.dil_h; ++i, at += window.row) table[i] = at;
}

// Scratch of all tasks of a thread: carved from one buffer.
template <class T>
struct BranchScratch {
  T* at;
  T* take(int64_t count) {
    T* p = at;
    at += round_up(count, kLanes<T>);
    return p;
  }
};

// Rows of `table` pointers for the kernel that reaches furthest, in elements of T.
template <class T>
int64_t table_elements(const NormalisedBranchesProblem& p) {
  int64_t rows = 1;
  for (int64_t b = 0; b < p.kernel_count; ++b)
    rows = std::max(rows, (p.kernels[b].forward.kernel_h - 1) * p.kernels[b].forward.dil_h + 1);
  return round_up(rows * int64_t(sizeof(void*)) / int64_t(sizeof(T)) + 1, kLanes<T>);
}

// The taps of every kernel for one channel group, one kernel after the other; flipped for backward_input.
template <class T>
void load_kernels(const NormalisedBranchesProblem& p, int64_t c0, bool flipped, T* dst) {
  constexpr int L = kLanes<T>;
  for (int64_t b = 0; b < p.kernel_count; ++b) {
    const Geometry& g = p.kernels[b].forward;
    TensorView w = p.kernels[b].weight;
    if (flipped) {
      w.data = static_cast<char*>(w.data) +
               ((g.kernel_h - 1) * w.stride_h + (g.kernel_w - 1) * w.stride_w) * dtype_size(w.dtype);
      w.stride_h = -w.stride_h, w.stride_w = -w.stride_w;
    }
    load_kernel(dst, make_lanes<T>(w, 0, c0, p.channels, [](int64_t c) { return c; }), g.kernel_h,
                g.kernel_w);
    dst += g.kernel_h * g.kernel_w * L;
  }
}

// ---- branch outputs and their statistics ------------------------------------------------------------------

// Of a tile's pixels, per lane: a mean as far as its type holds it, the sum of the deviations from it, and
// that of their squares.
template <class T>
void moments_of(const BranchRows<T>& rows, int64_t y0, int64_t y1, T* dst) {
  constexpr int L = kLanes<T>;
  Vec<T> sum{}, rest{}, squares{};
  for (int64_t y = y0; y < y1; ++y) {
    const T* row = rows.row(y);
    sum += row_sum<T>(rows.width, [&](int64_t x) { return load(row + x * L); });
  }
  const Vec<T> mean = sum / (Vec<T>{} + T(std::max<int64_t>(1, (y1 - y0) * rows.width)));
  for (int64_t y = y0; y < y1; ++y) {
    const T* row = rows.row(y);
    Vec<T> row_rest{};
    squares += row_sum<T>(rows.width, [&](int64_t x) {
      const Vec<T> d = load(row + x * L) - mean;
      row_rest += d;
      return d * d;
    });
    rest += row_rest;
  }
  store(dst, mean);
  store(dst + L, rest);
  store(dst + 2 * L, squares);
}

// Outputs of all branches that are kernels, and the moments of every branch; task = (group, image, tile).
// partial[task][branch][kMoments][lane].
template <class T>
void normalised_branches_outputs(const NormalisedBranchesProblem& p, const NormalisedBranchesPlan& plan,
                                 int64_t task0, int64_t task1) {
  constexpr int L = kLanes<T>;
  const int64_t tiles = plan.tiles(p), block = plan.tile_h * p.out_width * L;
  const DirectTile whole = window_tile(plan.input, p.out_width, 0, 0);
  const int64_t row = (whole.ix1 - whole.ix0) * L;
  const int64_t window_rows = std::min(p.height, plan.tile_h + plan.input.before_h + plan.input.after_h);
  const int64_t tables = table_elements<T>(p), taps = p.taps() * L;
  BranchScratch<T> s{
      thread_scratch<T>(tables + taps + row * window_rows + block * p.given_count + p.out_width * L)};
  const T** table = reinterpret_cast<const T**>(s.take(tables));
  T* kernels = s.take(taps);
  const Window<T> window{s.take(row * window_rows), row, window_rows};
  T *blocks = s.take(block * p.given_count), *buffer = s.take(p.out_width * L);
  const int64_t outputs_at_once = direct_block(p.out_width);
  int64_t loaded = -1;
  for (int64_t task = task0; task < task1; ++task) {
    const BranchTile tile =
        branch_tile(p, plan, task / tiles % p.batch, task / tiles / p.batch, task % tiles);
    if (tile.g != loaded) load_kernels(p, tile.c0, false, kernels);
    loaded = tile.g;
    const DirectTile t =
        window_tile(plan.input, p.out_width, std::clamp<int64_t>(tile.y0 - plan.input.before_h, 0, p.height),
                    tile.y0 < tile.y1 ? std::clamp<int64_t>(tile.y1 + plan.input.after_h, 0, p.height) : 0);
    load_input(p, tile, window, t);
    load_given(p, tile, tile.y0, tile.y1, blocks, block);
    const T* kernel = kernels;
    T* moments = static_cast<T*>(p.partial) + task * p.branches() * kMoments * L;
    for (int64_t b = 0; b < p.branches(); ++b, moments += kMoments * L) {
      if (b < p.kernel_count) {
        const Geometry& g = p.kernels[b].forward;
        const Lanes<T> out = saved_lanes<T>(p, plan, b, tile);
        for (int64_t y = tile.y0; y < tile.y1; ++y) {
          fill_table(table, g, window, t, y);
          direct_row(g, t, outputs_at_once, y, table, kernel, RowSink<T>{nullptr, &out, y, Vec<T>{}, {}});
        }
        kernel += g.kernel_h * g.kernel_w * L;
      }
      moments_of(branch_rows(p, plan, b, tile, blocks, block, buffer), tile.y0, tile.y1, moments);
    }
  }
}

// ---- the normalised sum -----------------------------------------------------------------------------------

// output = sum_b scale_b y_b + constant; task = (group, image, tile). `slope` is not read, and of `constant`
// the first row alone.
template <class T>
void normalised_branches_sum(const NormalisedBranchesProblem& p, const NormalisedBranchesPlan& plan,
                             int64_t task0, int64_t task1) {
  constexpr int L = kLanes<T>;
  const int64_t tiles = plan.tiles(p), block = plan.tile_h * p.out_width * L, branches = p.branches();
  const int64_t pointers = round_up(branches * int64_t(sizeof(void*)) / int64_t(sizeof(T)) + 1, L);
  BranchScratch<T> s{
      thread_scratch<T>(pointers + branches * L * (1 + p.out_width) + block * (1 + p.given_count))};
  const T** rows = reinterpret_cast<const T**>(s.take(pointers));
  T *scales = s.take(branches * L), *buffers = s.take(branches * L * p.out_width);
  T *sums = s.take(block), *blocks = s.take(block * p.given_count);
  for (int64_t task = task0; task < task1; ++task) {
    const BranchTile tile =
        branch_tile(p, plan, task / tiles % p.batch, task / tiles / p.batch, task % tiles);
    load_given(p, tile, tile.y0, tile.y1, blocks, block);
    for (int64_t b = 0; b < branches; ++b) store(scales + b * L, factor<T>(p, p.scale, b, tile.c0));
    const Vec<T> shift = factor<T>(p, p.constant, 0, tile.c0);
    T* to = sums;
    for (int64_t y = tile.y0; y < tile.y1; ++y) {
      for (int64_t b = 0; b < branches; ++b)
        rows[b] = branch_rows(p, plan, b, tile, blocks, block, buffers + b * p.out_width * L).row(y);
      for (int64_t x = 0; x < p.out_width * L; x += L, to += L) {
        Vec<T> sum = shift;
        for (int64_t b = 0; b < branches; ++b) sum += load(scales + b * L) * load(rows[b] + x);
        store(to, sum);
      }
    }
    store_rows(sums, p.out_width * L, L, Vec<T>{}, tensor_lanes<T>(p, p.output, tile), tile.y0, tile.y1, 0,
               p.out_width);
  }
}

// ---- gradients --------------------------------------------------------------------------------------------

// Sums over a tile of grad_output, and of grad_output (y_b - constant_b) for every branch; task = (group,
// image, tile). partial[task][1 + branch][lane].
template <class T>
void normalised_branches_dots(const NormalisedBranchesProblem& p, const NormalisedBranchesPlan& plan,
                              int64_t task0, int64_t task1) {
  constexpr int L = kLanes<T>;
  const int64_t tiles = plan.tiles(p), block = plan.tile_h * p.out_width * L;
  BranchScratch<T> s{thread_scratch<T>(block * (1 + p.given_count) + p.out_width * L)};
  T *grad = s.take(block), *blocks = s.take(block * p.given_count), *buffer = s.take(p.out_width * L);
  for (int64_t task = task0; task < task1; ++task) {
    const BranchTile tile =
        branch_tile(p, plan, task / tiles % p.batch, task / tiles / p.batch, task % tiles);
    load_rows(grad, p.out_width * L, L, tensor_lanes<T>(p, p.grad_output, tile), tile.y0, tile.y1, 0,
              p.out_width);
    load_given(p, tile, tile.y0, tile.y1, blocks, block);
    T* to = static_cast<T*>(p.partial) + task * (1 + p.branches()) * L;
    store(to, row_sum<T>((tile.y1 - tile.y0) * p.out_width, [&](int64_t x) { return load(grad + x * L); }));
    for (int64_t b = 0; b < p.branches(); ++b) {
      const Vec<T> mean = factor<T>(p, p.constant, b, tile.c0);
      const BranchRows<T> rows = branch_rows(p, plan, b, tile, blocks, block, buffer);
      Vec<T> dot{};
      for (int64_t y = tile.y0; y < tile.y1; ++y) {
        const T *row = rows.row(y), *dy = grad + (y - tile.y0) * p.out_width * L;
        dot +=
            row_sum<T>(p.out_width, [&](int64_t x) { return load(dy + x * L) * (load(row + x * L) - mean); });
      }
      store(to + (1 + b) * L, dot);
    }
  }
}

// Scratch of a backward task.
template <class T>
struct BranchGradients {
  const T** table;
  T *kernels, *sums;          // taps of one channel group, flipped, and their gradients in one tile
  Window<T> input, gradient;  // of the input and of one branch's gradient
  DirectTile input_columns, gradient_columns;
  T *grad, *blocks, *result, *row, *buffer;
  int64_t block;

  BranchGradients(const NormalisedBranchesProblem& p, const NormalisedBranchesPlan& plan) {
    constexpr int L = kLanes<T>;
    const Reach &x = plan.input, &z = plan.gradient;
    input_columns = window_tile(x, p.out_width, 0, 0);
    gradient_columns = window_tile(z, p.width, p.out_width, 0, 0);
    const int64_t input_row = (input_columns.ix1 - input_columns.ix0) * L;
    const int64_t gradient_row = (gradient_columns.ix1 - gradient_columns.ix0) * L;
    const int64_t input_rows = std::min(p.height, plan.tile_h + x.before_h + x.after_h);
    const int64_t gradient_rows = std::min(p.out_height, plan.tile_h + z.before_h + z.after_h);
    const int64_t tables = table_elements<T>(p), taps = p.taps() * L;
    block = gradient_rows * p.out_width * L;
    const int64_t results = plan.tile_h * p.width * L;
    BranchScratch<T> s{thread_scratch<T>(tables + 2 * taps + input_row * input_rows +
                                         gradient_row * gradient_rows + block * (1 + p.given_count) +
                                         results + (p.width + p.out_width) * L)};
    table = reinterpret_cast<const T**>(s.take(tables));
    kernels = s.take(taps), sums = s.take(taps);
    input = {s.take(input_row * input_rows), input_row, input_rows};
    gradient = {s.take(gradient_row * gradient_rows), gradient_row, gradient_rows};
    grad = s.take(block), blocks = s.take(block * p.given_count);
    result = s.take(results), row = s.take(p.width * L), buffer = s.take(p.out_width * L);
    for (int64_t y = 0; y < gradient_rows; ++y) {  // columns of the halo, which nothing writes again
      zero(gradient.base + y * gradient_row, -gradient_columns.ix0);
      zero(gradient.base + y * gradient_row + (p.out_width - gradient_columns.ix0) * L,
           gradient_columns.ix1 - p.out_width);
    }
  }
};

// The gradient at branch b's output, scale dy + slope y + constant, into rows [z0, z1) of its window.
template <class T>
void branch_gradient(const NormalisedBranchesProblem& p, const NormalisedBranchesPlan& plan,
                     const BranchGradients<T>& s, const BranchTile& tile, int64_t b, int64_t z0, int64_t z1) {
  constexpr int L = kLanes<T>;
  const Vec<T> scale = factor<T>(p, p.scale, b, tile.c0), slope = factor<T>(p, p.slope, b, tile.c0),
               constant = factor<T>(p, p.constant, b, tile.c0);
  BranchTile rows_of = tile;
  rows_of.y0 = z0, rows_of.y1 = z1;
  const BranchRows<T> rows = branch_rows(p, plan, b, rows_of, s.blocks, s.block, s.buffer);
  for (int64_t y = z0; y < z1; ++y) {
    const T *branch = rows.row(y), *dy = s.grad + (y - z0) * p.out_width * L;
    T* to = s.gradient.base + (y - z0) * s.gradient.row - s.gradient_columns.ix0 * L;
    for (int64_t x = 0; x < p.out_width * L; x += L)
      store(to + x, scale * load(dy + x) + slope * load(branch + x) + constant);
  }
}

// Adds the tile's part of a kernel's gradient to `sums`.
template <class T>
void branch_kernel_gradient(const NormalisedBranchesProblem& p, const BranchGradients<T>& s,
                            const Geometry& g, const BranchTile& tile, int64_t z0, const DirectTile& in,
                            T* sums) {
  constexpr int L = kLanes<T>;
  const RowMatch match{p.out_width, 1, g.dil_w, known_halo(g)};
  for (int64_t y = tile.y0; y < tile.y1; ++y) {
    const int64_t top = y - g.pad_h;
    int64_t u0, u1;
    clip_taps(top, top, g.height, g.kernel_h, g.dil_h, u0, u1);
    if (u1 <= u0) continue;
    const T* dz = s.gradient.base + (y - z0) * s.gradient.row - s.gradient_columns.ix0 * L;
    const T* x = s.input.base + (top + u0 * g.dil_h - in.iy0) * s.input.row + (-g.pad_w - in.ix0) * L;
    correlate(sums + u0 * g.kernel_w * L, g.kernel_w * L, dz, x, s.input.row * g.dil_h, u1 - u0, g.kernel_w,
              match);
  }
}

// Adds a branch's part of grad_input's rows [r0, r1) to the result, or begins it.
template <class T>
void branch_input_gradient(const NormalisedBranchesProblem& p, const BranchGradients<T>& s, const Geometry& g,
                           const T* kernel, const BranchTile& tile, const DirectTile& in, bool first) {
  constexpr int L = kLanes<T>;
  const int64_t outputs_at_once = direct_block(p.width);
  for (int64_t y = tile.r0; y < tile.r1; ++y) {
    T* result = s.result + (y - tile.r0) * p.width * L;
    fill_table(s.table, g, s.gradient, in, y);
    direct_row(g, in, outputs_at_once, y, s.table, kernel,
               RowSink<T>{first ? result : s.row, nullptr, y, Vec<T>{}, {}});
    if (first) continue;
    for (int64_t x = 0; x < p.width * L; x += L) store(result + x, load(result + x) + load(s.row + x));
  }
}

// Passes on the gradient of a branch that is a tensor: to grad_input for the identity, else to its own.
template <class T>
void given_gradient(const NormalisedBranchesProblem& p, const BranchGradients<T>& s, int64_t i,
                    const BranchTile& tile, int64_t z0, bool first) {
  constexpr int L = kLanes<T>;
  const T* dz = s.gradient.base + (tile.y0 - z0) * s.gradient.row - s.gradient_columns.ix0 * L;
  if (i > 0 || !p.identity) {
    const Lanes<T> to = tensor_lanes<T>(p, p.grad_given[i - p.identity], tile);
    store_rows(dz, s.gradient.row, L, Vec<T>{}, to, tile.y0, tile.y1, 0, p.out_width);
    return;
  }
  T* result = s.result;
  for (int64_t y = tile.r0; y < tile.r1; ++y, dz += s.gradient.row)
    for (int64_t x = 0; x < p.width * L; x += L, result += L)
      store(result, first ? load(dz + x) : load(result) + load(dz + x));
}

template <class T>
void branch_gradients_of_tile(const NormalisedBranchesProblem& p, const NormalisedBranchesPlan& plan,
                              const BranchGradients<T>& s, const BranchTile& tile) {
  constexpr int L = kLanes<T>;
  const Reach &x = plan.input, &z = plan.gradient;
  // Rows of dz: those of the tile itself, and those that its rows of grad_input read.
  int64_t z0 = tile.y0, z1 = tile.y1;
  if (tile.r0 < tile.r1) {
    const int64_t from = std::clamp<int64_t>(tile.r0 - z.before_h, 0, p.out_height),
                  to = std::clamp<int64_t>(tile.r1 + z.after_h, from, p.out_height);
    z0 = tile.y0 < tile.y1 ? std::min(from, z0) : from;
    z1 = tile.y0 < tile.y1 ? std::max(to, z1) : to;
  }
  DirectTile in = s.input_columns, dz = s.gradient_columns;
  in.iy0 = std::clamp<int64_t>(tile.y0 - x.before_h, 0, p.height);
  in.iy1 = tile.y0 < tile.y1 ? std::clamp<int64_t>(tile.y1 + x.after_h, in.iy0, p.height) : in.iy0;
  dz.iy0 = z0, dz.iy1 = z1, dz.x1 = p.width;
  load_input(p, tile, s.input, in);
  load_rows(s.grad, p.out_width * L, L, tensor_lanes<T>(p, p.grad_output, tile), z0, z1, 0, p.out_width);
  load_given(p, tile, z0, z1, s.blocks, s.block);
  const T* kernel = s.kernels;
  T* sums = s.sums;
  bool first = true;
  for (int64_t b = 0; b < p.branches(); ++b) {
    branch_gradient(p, plan, s, tile, b, z0, z1);
    if (b >= p.kernel_count) {
      const bool identity = p.identity && b == p.kernel_count;
      if (identity && !p.grad_input.data) continue;
      given_gradient(p, s, b - p.kernel_count, tile, z0, first);
      first &= !identity;
      continue;
    }
    const BranchKernel& k = p.kernels[b];
    const int64_t taps = k.forward.kernel_h * k.forward.kernel_w * L;
    if (k.grad_weight.data) branch_kernel_gradient(p, s, k.forward, tile, z0, in, sums);
    if (p.grad_input.data) {
      branch_input_gradient(p, s, k.backward, kernel, tile, dz, first);
      first = false;
    }
    kernel += taps, sums += taps;
  }
  if (!first)
    store_rows(s.result, p.width * L, L, Vec<T>{}, tensor_lanes<T>(p, p.grad_input, tile), tile.r0, tile.r1,
               0, p.width);
}

// Gradients of the input, of the kernels and of the tensors given; task = (group, split of the batch).
// partial[split][group][tap][lane] for all taps of all kernels.
template <class T>
void normalised_branches_gradients(const NormalisedBranchesProblem& p, const NormalisedBranchesPlan& plan,
                                   int64_t task0, int64_t task1) {
  constexpr int L = kLanes<T>;
  const BranchGradients<T> s(p, plan);
  const int64_t splits = plan.splits(p), tiles = plan.tiles(p), taps = p.taps(), groups = plan.groups(p);
  for (int64_t task = task0; task < task1; ++task) {
    const int64_t g = task / splits, split = task % splits;
    load_kernels(p, g * L, true, s.kernels);
    T* total = static_cast<T*>(p.partial) + (split * groups + g) * taps * L;
    zero(total, taps);
    for (int64_t n = split * plan.images; n < std::min(p.batch, (split + 1) * plan.images); ++n) {
      zero(s.sums, taps);
      for (int64_t tile = 0; tile < tiles; ++tile)
        branch_gradients_of_tile(p, plan, s, branch_tile(p, plan, n, g, tile));
      for (int64_t i = 0; i < taps * L; i += L) store(total + i, load(total + i) + load(s.sums + i));
    }
  }
}

// Adds the splits in order and writes the kernels' gradients of the groups [g0, g1).
template <class T>
void normalised_branches_reduce(const NormalisedBranchesProblem& p, const NormalisedBranchesPlan& plan,
                                int64_t g0, int64_t g1) {
  constexpr int L = kLanes<T>;
  const int64_t taps = p.taps(), groups = plan.groups(p), splits = plan.splits(p);
  for (int64_t g = g0; g < g1; ++g) {
    T* sum = static_cast<T*>(p.partial) + g * taps * L;
    for (int64_t s = 1; s < splits; ++s) {
      const T* part = sum + s * groups * taps * L;
      for (int64_t i = 0; i < taps * L; i += L) store(sum + i, load(sum + i) + load(part + i));
    }
    for (int64_t b = 0; b < p.kernel_count; ++b) {
      const Geometry& k = p.kernels[b].forward;
      const TensorView& to = p.kernels[b].grad_weight;
      if (to.data)
        store_rows(sum, k.kernel_w * L, L, Vec<T>{},
                   make_lanes<T>(to, 0, g * L, p.channels, [](int64_t c) { return c; }), 0, k.kernel_h, 0,
                   k.kernel_w);
      sum += k.kernel_h * k.kernel_w * L;
    }
  }
}

}  // namespace lkconv::cpu::LKCONV_ISA
