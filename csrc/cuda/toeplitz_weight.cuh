// Weight gradient on matrix units. For one channel and one kernel row u,
//   D[s, x] = sum_r X[row(r) + u, s] dY[r, x],   dW[u, v] = sum over s - x + pad = v of D[s, x],
// where r runs over images x output rows: a product whose depth is batch x height. Only tiles on the band are
// multiplied, and all tiles of one block diagonal - those with equal s - x - share an accumulator, so that
// the registers needed depend on the kernel's width alone, not on the image's. A warp owns `UP` kernel rows
// and `ND` block diagonals; both stay in registers while the block walks over its share of the images. At the
// end each warp sums its diagonals and writes partial weights; reduce_splits adds the partials in a fixed
// order.
#pragma once

#include "toeplitz.cuh"

namespace lkconv::cuda {

struct ToeplitzWeightTile {
  int64_t n0;
  int images, y0, rows, x0, n_tiles;
  int row0, input_rows, col0, m_tiles;
};

LK_DEVICE ToeplitzWeightTile toeplitz_weight_tile(const ToeplitzWeightParams& p, int index, int u_first,
                                                  int u_last) {
  ToeplitzWeightTile t;
  const int line = divided_by(index, p.by_tiles_x), tile_n = divided_by(line, p.by_tiles_y);
  t.x0 = (index - line * p.tiles_x) * p.tile_w;
  t.y0 = (line - tile_n * p.tiles_y) * p.tile_h;
  t.n0 = int64_t(tile_n) * p.tile_images;
  t.images = min_int(p.tile_images, int(p.batch - t.n0));
  t.rows = min_int(p.tile_h, p.out_height - t.y0);
  const int cols = min_int(p.tile_w, p.out_width - t.x0);
  t.n_tiles = ceil_div_int(cols, kTileCols);
  const int first = t.y0 * p.stride_h - p.pad_h + u_first * p.dil_h;
  const int last = (t.y0 + t.rows - 1) * p.stride_h - p.pad_h + u_last * p.dil_h;
  t.row0 = max_int(0, first);
  t.input_rows = max_int(0, min_int(p.height - 1, last) - t.row0 + 1);
  const int left = max_int(0, t.x0 - p.pad_w) / kTileRows * kTileRows;
  const int right = min_int(p.width - 1, t.x0 + cols - 1 - p.pad_w + (p.kernel_w - 1) * p.dil_w);
  t.col0 = left;
  t.m_tiles = max_int(0, ceil_div_int(right - left + 1, kTileRows));
  return t;
}

// Where one lane finds its rows of A and B for one step of the depth. 16-bit types name one row each for
// ldmatrix; tf32 lanes load single elements from two rows.
template <class T>
struct DepthRows {
  static constexpr int count = sizeof(T) == 2 ? 1 : 2;
  static constexpr int depth = MatrixUnit<T>::depth;

  // Depth index of this lane's row `i`, for A and for B.
  LK_DEVICE static int a_row(int i) {
    const int lane = int(threadIdx.x) % kWarp;
    if constexpr (sizeof(T) == 2) return lane % 8 + lane / 16 * 8;
    return lane % 4 + 4 * i;
  }
  LK_DEVICE static int b_row(int i) {
    const int lane = int(threadIdx.x) % kWarp;
    if constexpr (sizeof(T) == 2) return lane % 16;
    return lane % 4 + 4 * i;
  }
  LK_DEVICE static int a_col() {
    const int lane = int(threadIdx.x) % kWarp;
    return sizeof(T) == 2 ? lane / 8 % 2 * 8 : lane / 4;
  }
  LK_DEVICE static int b_col() { return sizeof(T) == 2 ? 0 : int(threadIdx.x) % kWarp / 4; }

  LK_DEVICE static void load_a(uint32_t (&a)[4], const T* const (&rows)[count]) {
    if constexpr (sizeof(T) == 2) {
      ldmatrix_x4_trans(a, rows[0]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = float_bits(rows[i / 2][i % 2 * 8]);
    }
  }
  LK_DEVICE static void load_b(uint32_t (&b)[2], const T* const (&rows)[count], int col) {
    if constexpr (sizeof(T) == 2) {
      ldmatrix_x2_trans(b, rows[0] + col);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) b[i] = float_bits(rows[i][col]);
    }
  }
};

// Where one index of the depth - an output row of some image - finds its rows, as element offsets: `grad`
// from grad_output's tile, `window` from the input window for kernel row 0, whose input row is `top`. Beyond
// the tile, `grad` names the zeros and `top` lies below the image.
struct alignas(16) DepthIndex {
  int grad, window, top, unused;
};

LK_DEVICE void build_depth_table(DepthIndex* table, const ToeplitzWeightParams& p,
                                 const ToeplitzWeightTile& t, int count, int zeros) {
  for (int r = int(threadIdx.x); r < count; r += int(blockDim.x)) {
    const int image = divided_by(r, t.rows == p.tile_h ? p.by_rows : p.by_last_rows), y = r - image * t.rows;
    const bool valid = image < t.images;
    const int top = (t.y0 + y) * p.stride_h - p.pad_h;
    table[r] = {valid ? image * p.grad_image_pitch + y * p.grad_pitch : zeros,
                image * p.image_pitch + (top - t.row0) * p.row_pitch, valid ? top : p.height, 0};
  }
}

// The warp's rows and diagonals over one staged tile. The column tiles of A run outermost: which n tiles meet
// them on the warp's diagonals depends on them alone. `zeros` is the offset of the zeros from the window.
template <class T, int ND, int UP>
LK_DEVICE void correlate_window(float (&acc)[UP][ND][4], const ToeplitzWeightParams& p,
                                const ToeplitzWeightTile& t, const DepthIndex* table, const T* window,
                                const T* grad, int zeros, int u0, int diagonal0, int worker) {
  using Rows = DepthRows<T>;
  constexpr int kRows = Rows::count, kDepth = Rows::depth;
  const int steps = ceil_div_int(t.images * t.rows, kDepth), height = p.height, workers = p.workers;
  const int tile_shift = (t.col0 - t.x0) / kTileCols;  // block diagonal of m tile 0, n tile 0
  int down[UP], ahead[UP];                             // kernel row k, in input rows and in elements
#pragma unroll
  for (int k = 0; k < UP; ++k) {
    down[k] = u0 + k < p.kernel_h ? (u0 + k) * p.dil_h : 1 << 30;  // never inside
    ahead[k] = (u0 + k) * p.dil_h * p.row_pitch;
  }
  for (int i = 0; i < t.m_tiles; ++i) {
    const int j0 = tile_shift + 2 * i - diagonal0;  // n tile of diagonal `diagonal0`; the next one has j0 - 1
    const int d_low = max_int(0, j0 - t.n_tiles + 1), d_high = min_int(ND - 1, j0);
    if (d_low > d_high) continue;
    const T* a_col = window + i * kTileRows + Rows::a_col();
    const T* b_col = grad + j0 * kTileCols + Rows::b_col();
    for (int step = worker; step < steps; step += workers) {
      const T *a_rows[UP][kRows], *b_rows[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        b_rows[r] = b_col + table[step * kDepth + Rows::b_row(r)].grad;
        const DepthIndex at = table[step * kDepth + Rows::a_row(r)];
#pragma unroll
        for (int k = 0; k < UP; ++k)
          a_rows[k][r] =
              a_col + (unsigned(at.top + down[k]) < unsigned(height) ? at.window + ahead[k] : zeros);
      }
      uint32_t a[UP][4], b[ND][2] = {};
#pragma unroll
      for (int k = 0; k < UP; ++k) Rows::load_a(a[k], a_rows[k]);
#pragma unroll
      for (int d = 0; d < ND; ++d)
        if (d >= d_low && d <= d_high) Rows::load_b(b[d], b_rows, -d * kTileCols);
#pragma unroll
      for (int d = 0; d < ND; ++d)
        if (d >= d_low && d <= d_high)
#pragma unroll
          for (int k = 0; k < UP; ++k) mma(T{}, acc[k][d], a[k], b[d][0], b[d][1]);
    }
  }
}

// Sums the diagonals of one warp's tiles, spread in shared memory as [ND][16][8], and writes a row of taps.
template <int ND>
LK_DEVICE void write_diagonal_sums(const float* tiles, float* out, const ToeplitzWeightParams& p,
                                   int diagonal0) {
  for (int v = int(threadIdx.x) % kWarp; v < p.kernel_w; v += kWarp) {
    const int shift = v * p.dil_w - p.pad_w;  // s - x
    float sum = 0;
    for (int d = 0; d < ND; ++d)
      for (int n = 0; n < kTileCols; ++n) {
        const int m = shift - (diagonal0 + d) * kTileCols + n;
        if (m >= 0 && m < kTileRows) sum += tiles[(d * kTileRows + m) * kTileCols + n];
      }
    out[v] = sum;
  }
}

template <class T, int ND, int UP>
LK_DEVICE void write_partials(const float (&acc)[UP][ND][4], const ToeplitzWeightParams& p,
                              unsigned char* shared, int channel, int u0, int diagonal0, int slot) {
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  float* tiles = reinterpret_cast<float*>(shared) + warp * ND * kTileRows * kTileCols;
#pragma unroll
  for (int k = 0; k < UP; ++k) {
#pragma unroll
    for (int d = 0; d < ND; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        tiles[(d * kTileRows + lane / 4 + i / 2 * 8) * kTileCols + lane % 4 * 2 + i % 2] = acc[k][d][i];
    sync_warp();
    if (u0 + k < p.kernel_h)
      write_diagonal_sums<ND>(
          tiles, p.partial + ((int64_t(slot) * p.channels + channel) * p.kernel_h + u0 + k) * p.kernel_w, p,
          diagonal0);
    sync_warp();
  }
}

template <class T, int ND, int UP>
__global__ void __launch_bounds__(kToeplitzWeightThreads)
    toeplitz_weight(const __grid_constant__ ToeplitzWeightParams p) {
  unsigned char* shared = dynamic_shared();
  DepthIndex* table = reinterpret_cast<DepthIndex*>(shared + p.table_offset);
  T* zeros = reinterpret_cast<T*>(shared + p.zero_offset);
  const int block = int(blockIdx.x), rest = divided_by(block, p.by_splits);
  const int split = block - rest * p.splits, owner = divided_by(rest, p.by_diagonal_chunks);
  const int chunk = rest - owner * p.diagonal_chunks, channel = divided_by(owner, p.by_row_chunks);
  const int rows_first = (owner - channel * p.row_chunks) * p.row_groups * UP;
  const int rows_last = min_int(rows_first + p.row_groups * UP, p.kernel_h) - 1;
  const int warp = int(threadIdx.x) / kWarp, worker = divided_by(warp, p.by_row_groups);
  const int u0 = rows_first + (warp - worker * p.row_groups) * UP, diagonal0 = p.first_diagonal + chunk * ND;
  const int first = split * p.tiles_per_split;
  const int tiles = max_int(0, min_int(p.tiles_per_split, p.tiles_n * p.tiles_y * p.tiles_x - first));
  const int table_rows = ceil_div_int(p.tile_images * p.tile_h, kTileRows) * kTileRows;
  const auto stage = [&](int i) { return shared + p.stage_offset + i % 2 * p.stage_bytes; };
  WindowShape shape[2];
  WindowSource source[2];
  const auto prepare = [&](int i) {
    const ToeplitzWeightTile t = toeplitz_weight_tile(p, first + i, rows_first, rows_last);
    shape[0] = {t.images, t.input_rows, t.m_tiles * kTileRows, p.image_pitch, p.row_pitch};
    source[0] = {static_cast<const T*>(p.input.data) + t.n0 * p.input.stride_n +
                     int64_t(divided_by(channel, p.by_channel_div)) * p.input.stride_c,
                 p.input.stride_n,
                 p.input.stride_h,
                 1,
                 t.row0,
                 t.col0,
                 p.width};
    shape[1] = {t.images, t.rows, t.n_tiles * kTileCols, p.grad_image_pitch, p.grad_pitch};
    source[1] = {static_cast<const T*>(p.grad_output.data) + t.n0 * p.grad_output.stride_n +
                     int64_t(channel) * p.grad_output.stride_c,
                 p.grad_output.stride_n,
                 p.grad_output.stride_h,
                 1,
                 t.y0,
                 t.x0,
                 min_int(p.out_width, t.x0 + p.tile_w)};
    return t;
  };
  const auto issue = [&](int i) {
    issue_window(reinterpret_cast<T*>(stage(i)), shape[0], source[0], p.walk);
    issue_window(reinterpret_cast<T*>(stage(i) + p.grad_offset), shape[1], source[1], p.grad_walk);
  };
  float acc[UP][ND][4] = {};
  zero_words(zeros, p.stage_offset - p.zero_offset);
  if (tiles > 0) prepare(0), issue(0);
  commit_copies();
  for (int i = 0; i < tiles; ++i) {
    if (i + 1 < tiles) prepare(i + 1), issue(i + 1);
    commit_copies();
    const ToeplitzWeightTile t = prepare(i);
    T* window = reinterpret_cast<T*>(stage(i));
    T* grad = reinterpret_cast<T*>(stage(i) + p.grad_offset);
    build_depth_table(table, p, t, table_rows, int(zeros - grad));
    wait_copies<1>();
    round_window(window, shape[0], source[0], p.walk);
    round_window(grad, shape[1], source[1], p.grad_walk);
    sync_block();
    correlate_window<T, ND, UP>(acc, p, t, table, window, grad, int(zeros - window), u0, diagonal0, worker);
    sync_block();  // the next tile overwrites the table, and this stage after it
  }
  wait_copies<0>();
  const int slot = (split * p.workers + worker) * p.diagonal_chunks + chunk;
  write_partials<T, ND, UP>(acc, p, shared + p.stage_offset, channel, u0, diagonal0, slot);
}

}  // namespace lkconv::cuda
