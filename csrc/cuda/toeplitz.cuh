// Depthwise convolution on matrix units. For one channel and one kernel row u,
//   Y[r, x] += sum_s X[row(r) + u, s] T_u[s, x],   T_u[s, x] = w[u, s - x + pad],
// is a product of the input rows (M = images x output rows) with a banded Toeplitz matrix. Neither is ever
// built: A fragments come from the staged window by ldmatrix, each lane pointing at the row its output row
// needs (so stride and dilation along the height cost nothing, and rows outside the image point at a row of
// zeros), and since a B fragment holds pairs of neighbouring taps, it is one 4-byte load from the zero-padded
// kernel row, kept twice - the second copy shifted by one element - so that every pair is aligned. Tiles off
// the band are skipped.
#pragma once

#include "toeplitz_window.cuh"

namespace lkconv::cuda {

// T_u by kernel rows: zero-padded, dilated, and for 16-bit types twice (see above).
template <class T>
struct Band {
  static constexpr int copies = sizeof(T) == 2 ? 2 : 1;

  // Element offset of this lane's first pair (16-bit) or element (tf32) for a tile whose corner is tap `q`.
  LK_DEVICE static int lane_offset(int q, int band_elements) {
    const int lane = int(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
    if constexpr (sizeof(T) == 2) {
      const int e = q + kBandLead + 2 * t - g, odd = e & 1;
      return odd * band_elements + e - odd;
    } else {
      return q + kBandLead + t - g;
    }
  }

  LK_DEVICE static uint32_t load(const T* at) { return *reinterpret_cast<const uint32_t*>(at); }
};

template <class T>
LK_DEVICE T band_value(T value) {
  return value;
}
template <>
LK_DEVICE float band_value<float>(float value) {
  return round_to_tf32(value);
}

// A thread keeps its column of the padded rows, and with it its tap, and walks down the kernel's rows.
template <class T>
LK_DEVICE void build_band(T* shared, const ToeplitzForwardParams& p, int channel) {
  const int tid = int(threadIdx.x), lanes = min_int(p.band_pitch, int(blockDim.x));
  const int step = int(blockDim.x) / lanes, first = tid / lanes;
  if (first >= step) return;
  const int64_t down = step * p.weight.stride_h;
  for (int copy = 0; copy < Band<T>::copies; ++copy)
    for (int c = tid - first * lanes; c < p.band_pitch; c += lanes) {
      const int q = c - kBandLead + copy, v = q / p.dil_w;
      const bool tap = q >= 0 && v < p.kernel_w && v * p.dil_w == q;
      const T* kernel = static_cast<const T*>(p.weight.data) +
                        int64_t(channel) * p.channel_mul * p.weight.stride_c + v * p.weight.stride_w;
      T* to = shared + copy * p.reduce * p.kernel_h * p.band_pitch + c;
      for (int j = 0; j < p.reduce; ++j) {
        const T* from = kernel + j * p.weight.stride_c + first * p.weight.stride_h;
        for (int u = first; u < p.kernel_h; u += step, from += down)
          to[(j * p.kernel_h + u) * p.band_pitch] = tap ? band_value(*from) : T{};
      }
    }
}

// One tile of a block: outputs and the window they need.
struct ToeplitzTile {
  int64_t n0;
  int images, y0, rows, x0;
  int row0, input_rows, col0, k_tiles, corner;  // corner: tap at window column 0, output column 0
};

template <int NT, int Depth>
LK_DEVICE ToeplitzTile toeplitz_tile(const ToeplitzForwardParams& p, int index, int tile_x) {
  ToeplitzTile t;
  const int tile_n = divided_by(index, p.by_tiles_y);
  t.y0 = (index - tile_n * p.tiles_y) * p.tile_h;
  t.n0 = int64_t(tile_n) * p.tile_images;
  t.images = min_int(p.tile_images, int(p.batch - t.n0));
  t.rows = min_int(p.tile_h, p.out_height - t.y0);
  t.x0 = tile_x * NT * kTileCols;
  const int first = t.y0 * p.stride_h - p.pad_h;
  const int last = first + (t.rows - 1) * p.stride_h + (p.kernel_h - 1) * p.dil_h;
  t.row0 = max_int(0, first);
  t.input_rows = max_int(0, min_int(p.height - 1, last) - t.row0 + 1);
  const int cols = min_int(NT * kTileCols, p.out_width - t.x0);
  const int left = max_int(0, t.x0 - p.pad_w) / kTileRows * kTileRows;
  const int right = min_int(p.width - 1, t.x0 - p.pad_w + cols - 1 + (p.kernel_w - 1) * p.dil_w);
  t.col0 = left;
  t.k_tiles = max_int(0, ceil_div_int(right - left + 1, Depth));
  t.corner = left - t.x0 + p.pad_w;
  return t;
}

template <class T>
LK_DEVICE void window_of(const ToeplitzForwardParams& p, const ToeplitzTile& t, int channel, int j, int depth,
                         WindowShape& shape, WindowSource& source) {
  shape = {t.images, t.input_rows, t.k_tiles * depth, p.image_pitch, p.row_pitch};
  const int64_t plane = int64_t(divided_by(channel, p.by_channel_div)) * p.channel_mul + j;
  source = {static_cast<const T*>(p.input.data) + t.n0 * p.input.stride_n + plane * p.input.stride_c,
            p.input.stride_n,
            p.input.stride_h,
            1,
            t.row0,
            t.col0,
            p.width};
}

// Output row `r` of the tile: its image and y; false beyond the tile.
LK_DEVICE bool tile_row(const ToeplitzForwardParams& p, const ToeplitzTile& t, int r, int& image, int& y) {
  if (p.image_major)
    y = divided_by(r, p.by_images), image = r - y * p.tile_images;
  else
    image = divided_by(r, t.rows == p.tile_h ? p.by_rows : p.by_last_rows), y = r - image * t.rows;
  return image < t.images && y < t.rows;
}

// The warp's share: M tiles [first, first + count) of the tile, and the kernel rows that reach the image from
// them.
struct WarpShare {
  int first, count, u0, u1;
};

LK_DEVICE WarpShare warp_share(const ToeplitzForwardParams& p, const ToeplitzTile& t) {
  const int warp = int(threadIdx.x) / kWarp;
  const int rows = p.image_major ? p.tile_images * t.rows : t.images * t.rows;
  const int tiles = ceil_div_int(rows, kTileRows), each = ceil_divided_by(tiles, p.by_warps);
  WarpShare s;
  s.first = warp * each;
  s.count = max_int(0, min_int(each, tiles - s.first));
  int y_low = 0, y_high = t.rows - 1;
  if (p.image_major) {
    y_low = divided_by(s.first * kTileRows, p.by_images);
    y_high = min_int(y_high, divided_by((s.first + max_int(1, s.count)) * kTileRows - 1, p.by_images));
  } else if (t.images == 1) {
    y_low = s.first * kTileRows;
    y_high = min_int(y_high, (s.first + s.count) * kTileRows - 1);
  }
  const int top = (t.y0 + y_high) * p.stride_h - p.pad_h;  // input row of tap 0 under the lowest output row
  const int bottom = (t.y0 + y_low) * p.stride_h - p.pad_h;
  s.u0 = ceil_divided_by(max_int(0, -top), p.by_dil_h);
  s.u1 = p.height - 1 - bottom < 0
             ? 0
             : min_int(p.kernel_h, divided_by(max_int(0, p.height - 1 - bottom), p.by_dil_h) + 1);
  return s;
}

// One k tile of one kernel row: loads the A fragments at `rows` and the B fragments at `taps`, and multiplies
// the n tiles that lie on the band. B fragments off the band are loaded too, from a neighbouring kernel row
// or a guard, and not used: cheaper than asking.
template <class T, int MT, int NT>
LK_DEVICE void multiply_k_tile(float (&acc)[MT][NT][4], const T* const (&rows)[MT], const T* taps, int j_low,
                               int j_high) {
  uint32_t a[MT][4];
#pragma unroll
  for (int m = 0; m < MT; ++m) ldmatrix_x4(a[m], rows[m]);
  uint32_t b[NT][2];
  if constexpr (sizeof(T) == 2) {
    // The upper half of tile j is the lower half of tile j - 1.
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      b[j][0] = Band<T>::load(taps - j * kTileCols);
      b[j][1] = j == 0 ? Band<T>::load(taps + kTileCols) : b[j - 1][0];
    }
  } else {
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      b[j][0] = Band<T>::load(taps - j * kTileCols);
      b[j][1] = Band<T>::load(taps - j * kTileCols + 4);
    }
  }
#pragma unroll
  for (int j = 0; j < NT; ++j)
    if (j >= j_low && j <= j_high)
#pragma unroll
      for (int m = 0; m < MT; ++m) mma(T{}, acc[m][j], a[m], b[j][0], b[j][1]);
}

// acc += the warp's rows times T_u, for all kernel rows u. The k tiles run outermost: which n tiles are on
// the band depends on them alone, and stays in predicates while u runs. Rows of A are kept as offsets from
// the window, which advance with u; those outside the image give way to the zeros, which lie at offset
// `zeros`.
template <class T, int MT, int NT>
LK_DEVICE void multiply_window(float (&acc)[MT][NT][4], const ToeplitzForwardParams& p, const ToeplitzTile& t,
                               const WarpShare& share, const T* window, const T* band, int zeros) {
  constexpr int kDepth = MatrixUnit<T>::depth;
  const int lane = int(threadIdx.x) % kWarp;
  const int half = lane / kTileRows * (kDepth / 2);
  const int extent = (p.kernel_w - 1) * p.dil_w, height = p.height;
  const int step_row = p.dil_h, step_offset = p.dil_h * p.row_pitch, band_pitch = p.band_pitch;
  const int rows_run = max_int(0, share.u1 - share.u0);
  int row[MT], offset[MT];
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    int image, y;
    const bool valid =
        m < share.count && tile_row(p, t, (share.first + m) * kTileRows + lane % kTileRows, image, y);
    // Rows beyond the tile start far enough below the image to stay there.
    row[m] = valid ? (t.y0 + y) * p.stride_h - p.pad_h + share.u0 * p.dil_h : height;
    offset[m] = valid ? image * p.image_pitch + (row[m] - t.row0) * p.row_pitch + half : 0;
  }
  for (int i = 0; i < t.k_tiles; ++i) {
    const int q =
        t.corner + i * kDepth;  // of n tile 0; n tile j spans taps q - 8 j - 7 .. q - 8 j + depth - 1
    const int j_low = max_int(0, ceil_div_signed(q - 7 - extent, kTileCols));
    const int j_high = min_int(NT - 1, floor_div_int(q + kDepth - 1, kTileCols));
    if (j_low > j_high) continue;
    const T* taps = band + share.u0 * band_pitch + i * kDepth;
    const T* columns = window + i * kDepth;
    for (int u = share.u0; u < share.u1; ++u) {
      const T* rows[MT];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        rows[m] = columns + (unsigned(row[m]) < unsigned(height) ? offset[m] : zeros + half);
        row[m] += step_row, offset[m] += step_offset;
      }
      multiply_k_tile<T, MT, NT>(acc, rows, taps, j_low, j_high);
      taps += band_pitch;
    }
#pragma unroll
    for (int m = 0; m < MT; ++m) row[m] -= rows_run * step_row, offset[m] -= rows_run * step_offset;
  }
}

// The outputs of one row, `left` columns of it from this lane's first one on. `Pairs`: two as one.
template <class T, bool Pairs, int NT>
LK_DEVICE void store_row(T* out, int64_t stride_w, const float (&acc)[NT][4], int h, float bias, int left) {
  struct alignas(2 * sizeof(T)) Pair {
    T v[2];
  };
  const int64_t apart = kTileCols * stride_w;
#pragma unroll
  for (int j = 0; j < NT; ++j, out += Pairs ? kTileCols : apart, left -= kTileCols) {
    Pair pair;
    from_float(acc[j][2 * h] + bias, pair.v[0]);
    from_float(acc[j][2 * h + 1] + bias, pair.v[1]);
    if constexpr (Pairs) {
      if (left > 0) *reinterpret_cast<Pair*>(out) = pair;
    } else {
      if (left > 0) out[0] = pair.v[0];
      if (left > 1) out[stride_w] = pair.v[1];
    }
  }
}

template <class T, bool Pairs, int MT, int NT>
LK_DEVICE void store_outputs(const float (&acc)[MT][NT][4], const ToeplitzForwardParams& p,
                             const ToeplitzTile& t, const WarpShare& share, int channel) {
  const int lane = int(threadIdx.x) % kWarp, x = t.x0 + lane % 4 * 2;
  float bias = 0;
  if (p.bias.data) bias = to_float(static_cast<const T*>(p.bias.data)[int64_t(channel) * p.bias.stride_c]);
  T* plane = static_cast<T*>(p.output.data) + t.n0 * p.output.stride_n +
             int64_t(channel) * p.output.stride_c + t.y0 * p.output.stride_h + x * p.output.stride_w;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int image, y;
      if (m >= share.count || !tile_row(p, t, (share.first + m) * kTileRows + lane / 4 + 8 * h, image, y))
        continue;
      store_row<T, Pairs, NT>(plane + image * p.output.stride_n + y * p.output.stride_h, p.output.stride_w,
                              acc[m], h, bias, p.out_width - x);
    }
}

// A block: one channel, one column of tiles, `tiles_per_block` of them, two stages deep.
template <class T, int MT, int NT>
__global__ void __launch_bounds__(kToeplitzThreads, 2)
    toeplitz_forward(const __grid_constant__ ToeplitzForwardParams p) {
  constexpr int kDepth = MatrixUnit<T>::depth;
  unsigned char* shared = dynamic_shared();
  T* band = reinterpret_cast<T*>(shared) + kBandGuard;
  T* zeros = reinterpret_cast<T*>(shared + p.zero_offset);
  const int block = int(blockIdx.x), column = divided_by(block, p.by_tiles_x);
  const int tile_x = block - column * p.tiles_x, channel = divided_by(column, p.by_blocks_per_channel);
  const int first = (column - channel * p.blocks_per_channel) * p.tiles_per_block;
  const int tiles = min_int(p.tiles_per_block, p.tiles_n * p.tiles_y - first), steps = tiles * p.reduce;
  const auto stage = [&](int step) {
    return reinterpret_cast<T*>(shared + p.stage_offset + step % 2 * p.stage_bytes);
  };
  const auto prepare = [&](int step, WindowShape& shape, WindowSource& source) {
    const int tile = divided_by(step, p.by_reduce);
    const ToeplitzTile t = toeplitz_tile<NT, kDepth>(p, first + tile, tile_x);
    window_of<T>(p, t, channel, step - tile * p.reduce, kDepth, shape, source);
    return t;
  };
  WindowShape shape;
  WindowSource source;
  prepare(0, shape, source);
  issue_window(stage(0), shape, source, p.walk);
  commit_copies();
  build_band(band, p, channel);
  zero_words(zeros, p.stage_offset - p.zero_offset);
  const int band_elements = p.reduce * p.kernel_h * p.band_pitch;
  float acc[MT][NT][4] = {};
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      prepare(step + 1, shape, source);
      issue_window(stage(step + 1), shape, source, p.walk);
    }
    commit_copies();
    const ToeplitzTile t = prepare(step, shape, source);
    wait_copies<1>();
    round_window(stage(step), shape, source, p.walk);
    sync_block();
    const WarpShare share = warp_share(p, t);
    if (share.count > 0) {
      const int j = step - divided_by(step, p.by_reduce) * p.reduce;
      const T* taps = band + Band<T>::lane_offset(t.corner, band_elements) + j * p.kernel_h * p.band_pitch;
      multiply_window<T, MT, NT>(acc, p, t, share, stage(step), taps, int(zeros - stage(step)));
      if (j == p.reduce - 1) {
        if (p.store_pairs)
          store_outputs<T, true>(acc, p, t, share, channel);
        else
          store_outputs<T, false>(acc, p, t, share, channel);
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
          for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int k = 0; k < 4; ++k) acc[m][j][k] = 0;
      }
    }
    sync_block();  // the next step overwrites this stage
  }
  wait_copies<0>();
}

}  // namespace lkconv::cuda
