// Outputs of normalised branches, their statistics and their sum, a tile at a time.
#pragma once

namespace lkconv::cpu::LKCONV_ISA {

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

// Scratch of the tasks that compute branches.
template <class T>
struct BranchOutputs {
  const T** table;
  T* kernels;  // taps of one channel group
  Window<T> input;
  T *blocks, *buffer;
  int64_t block;

  BranchOutputs(const NormalisedBranchesProblem& p, const NormalisedBranchesPlan& plan) {
    constexpr int L = kLanes<T>;
    const WindowSize window = plan.input_window(p);
    const int64_t row = window.columns * L, tables = table_elements<T>(p), taps = p.taps() * L;
    block = plan.tile_h * p.out_width * L;
    BranchScratch<T> s{
        thread_scratch<T>(tables + taps + row * window.rows + block * p.given_count + p.out_width * L)};
    table = reinterpret_cast<const T**>(s.take(tables));
    kernels = s.take(taps);
    input = {s.take(row * window.rows), row, window.rows};
    blocks = s.take(block * p.given_count), buffer = s.take(p.out_width * L);
  }
};

// Rows of the output of branch b, which is a kernel.
template <class T>
void branch_output(const NormalisedBranchesProblem& p, const NormalisedBranchesPlan& plan,
                   const BranchOutputs<T>& s, const BranchTile& tile, const DirectTile& in, int64_t b,
                   const T* kernel) {
  const Geometry& g = p.kernels[b].forward;
  const Lanes<T> out = saved_lanes<T>(p, plan, b, tile);
  const int64_t outputs_at_once = direct_block(p.out_width);
  for (int64_t y = tile.y0; y < tile.y1; ++y) {
    fill_table(s.table, g, s.input, in, y);
    direct_row(g, in, outputs_at_once, y, s.table, kernel, RowSink<T>{nullptr, &out, y, Vec<T>{}, {}});
  }
}

// Outputs of all branches that are kernels, and the moments of every branch; task = (group, image, tile).
// partial[task][branch][kMoments][lane].
template <class T>
void normalised_branches_outputs(const NormalisedBranchesProblem& p, const NormalisedBranchesPlan& plan,
                                 int64_t task0, int64_t task1) {
  constexpr int L = kLanes<T>;
  const int64_t tiles = plan.tiles(p);
  const BranchOutputs<T> s(p, plan);
  int64_t loaded = -1;
  for (int64_t task = task0; task < task1; ++task) {
    const BranchTile tile =
        branch_tile(p, plan, task / tiles % p.batch, task / tiles / p.batch, task % tiles);
    if (tile.g != loaded) load_kernels(p, &BranchKernel::weight, tile.c0, s.kernels);
    loaded = tile.g;
    const DirectTile in = input_tile(p, plan, tile);
    load_input(p, tile, s.input, in);
    load_given(p, tile, tile.y0, tile.y1, s.blocks, s.block);
    const T* kernel = s.kernels;
    T* moments = static_cast<T*>(p.partial) + task * p.branches() * kMoments * L;
    for (int64_t b = 0; b < p.branches(); ++b, moments += kMoments * L) {
      if (b < p.kernel_count) {
        branch_output(p, plan, s, tile, in, b, kernel);
        kernel += p.kernels[b].taps() * L;
      }
      moments_of(branch_rows(p, plan, b, tile, s.blocks, s.block, s.buffer), tile.y0, tile.y1, moments);
    }
  }
}

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

}  // namespace lkconv::cpu::LKCONV_ISA
