// What the passes over a sum of normalised branches share: tiles of one group of channels of one image, rows
// of its branches, windows of its images. Lanes are channels, as in direct.h, whose rows of outputs these
// build on. See normalised_branches_problem.h.
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

// Rows [first, end) of a window as direct_row reads them, for `width` outputs a row.
LKCONV_INLINE DirectTile window_tile(const Reach& reach, const WindowSize& size, int64_t width, int64_t first,
                                     int64_t end) {
  DirectTile t{};
  t.x1 = width;
  t.iy0 = first, t.iy1 = end;
  t.ix0 = -reach.before_w, t.ix1 = size.columns - reach.before_w;
  return t;
}

// The input's rows that a tile's rows of the branches read.
LKCONV_INLINE DirectTile input_tile(const NormalisedBranchesProblem& p, const NormalisedBranchesPlan& plan,
                                    const BranchTile& tile) {
  const Reach& reach = plan.input;
  const int64_t first = std::clamp<int64_t>(tile.y0 - reach.before_h, 0, p.height),
                end = std::clamp<int64_t>(tile.y1 + reach.after_h, first, p.height);
  return window_tile(reach, plan.input_window(p), p.out_width, first, tile.y0 < tile.y1 ? end : first);
}

template <class T>
void load_input(const NormalisedBranchesProblem& p, const BranchTile& tile, const Window<T>& window,
                const DirectTile& t) {
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

// The taps of every kernel for one channel group, one kernel after the other.
template <class T>
void load_kernels(const NormalisedBranchesProblem& p, TensorView BranchKernel::* weight, int64_t c0, T* dst) {
  for (int64_t b = 0; b < p.kernel_count; ++b) {
    const BranchKernel& k = p.kernels[b];
    load_kernel(dst, make_lanes<T>(k.*weight, 0, c0, p.channels, [](int64_t c) { return c; }),
                k.forward.kernel_h, k.forward.kernel_w);
    dst += k.taps() * kLanes<T>;
  }
}

}  // namespace lkconv::cpu::LKCONV_ISA
