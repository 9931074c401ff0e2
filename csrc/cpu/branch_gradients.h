// Gradients of a sum of normalised branches, a tile at a time.
#pragma once

namespace lkconv::cpu::LKCONV_ISA {

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
  int64_t margin;             // columns of the gradient's window before the image
  T *grad, *blocks, *result, *row, *buffer;
  int64_t block;

  BranchGradients(const NormalisedBranchesProblem& p, const NormalisedBranchesPlan& plan) {
    constexpr int L = kLanes<T>;
    const WindowSize x = plan.input_window(p), z = plan.gradient_window(p);
    const int64_t input_row = x.columns * L, gradient_row = z.columns * L;
    const int64_t tables = table_elements<T>(p), taps = p.taps() * L, results = plan.tile_h * p.width * L;
    block = z.rows * p.out_width * L;
    margin = plan.gradient.before_w;
    BranchScratch<T> s{thread_scratch<T>(tables + 2 * taps + input_row * x.rows + gradient_row * z.rows +
                                         block * (1 + p.given_count) + results +
                                         (p.width + p.out_width) * L)};
    table = reinterpret_cast<const T**>(s.take(tables));
    kernels = s.take(taps), sums = s.take(taps);
    input = {s.take(input_row * x.rows), input_row, x.rows};
    gradient = {s.take(gradient_row * z.rows), gradient_row, z.rows};
    grad = s.take(block), blocks = s.take(block * p.given_count);
    result = s.take(results), row = s.take(p.width * L), buffer = s.take(p.out_width * L);
    for (int64_t y = 0; y < z.rows; ++y) {  // columns of the halo, which nothing writes again
      zero(gradient.base + y * gradient_row, margin);
      zero(gradient_at(y) + p.out_width * L, z.columns - margin - p.out_width);
    }
  }

  // The first pixel of row y of the window of a branch's gradient.
  T* gradient_at(int64_t y) const { return gradient.base + y * gradient.row + margin * kLanes<T>; }
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
    T* to = s.gradient_at(y - z0);
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
    const T* dz = s.gradient_at(y - z0);
    const T* x = s.input.base + (top + u0 * g.dil_h - in.iy0) * s.input.row + (-g.pad_w - in.ix0) * L;
    correlate<OneRow>(sums + u0 * g.kernel_w * L, g.kernel_w * L, dz, x, s.input.row * g.dil_h, u1 - u0,
                      g.kernel_w, match);
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
  const T* dz = s.gradient_at(tile.y0 - z0);
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
  const Reach& z = plan.gradient;
  // Rows of dz: those of the tile itself, and those that its rows of grad_input read.
  int64_t z0 = tile.y0, z1 = tile.y1;
  if (tile.r0 < tile.r1) {
    const int64_t from = std::clamp<int64_t>(tile.r0 - z.before_h, 0, p.out_height),
                  to = std::clamp<int64_t>(tile.r1 + z.after_h, from, p.out_height);
    z0 = tile.y0 < tile.y1 ? std::min(from, z0) : from;
    z1 = tile.y0 < tile.y1 ? std::max(to, z1) : to;
  }
  const DirectTile in = input_tile(p, plan, tile),
                   dz = window_tile(z, plan.gradient_window(p), p.width, z0, z1);
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
    if (k.grad_weight.data) branch_kernel_gradient(p, s, k.forward, tile, z0, in, sums);
    if (p.grad_input.data) {
      branch_input_gradient(p, s, k.backward, kernel, tile, dz, first);
      first = false;
    }
    kernel += k.taps() * L, sums += k.taps() * L;
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
    load_kernels(p, &BranchKernel::flipped, g * L, s.kernels);
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
      sum += p.kernels[b].taps() * L;
    }
  }
}

}  // namespace lkconv::cpu::LKCONV_ISA
