// Depthwise convolution on matrix units. For one channel and one kernel row u,
//   Y[r, x] += sum_s X[row(r) + u, s] T_u[s, x],   T_u[s, x] = w[u, s - x + pad],
// is a product of the input rows (M = images x output rows) with a banded Toeplitz matrix. Neither is ever
// built: A fragments come from the staged window by ldmatrix, each lane pointing at the row its output row
// needs (so stride and dilation along the height cost nothing; the window has rows of zeros where that is
// outside the image), and since a B fragment holds pairs of neighbouring taps, it is one 4-byte load from the
// zero-padded kernel row, kept twice - the second copy shifted by one element - so that every pair is
// aligned. Tiles off the band are skipped.
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
      const int q = c - kBandLead + copy, v = divided_by(max_int(0, q), p.by_dil_w);
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

// Where a block's tiles lie along the rows: the same for all of them. `corner`: tap at window column 0,
// output column 0.
struct ToeplitzColumns {
  int x0, col0, k_tiles, corner;
};

template <int NT, int Depth>
LK_DEVICE ToeplitzColumns toeplitz_columns(const ToeplitzForwardParams& p, int tile_x) {
  ToeplitzColumns c;
  c.x0 = tile_x * NT * kTileCols;
  const int cols = min_int(NT * kTileCols, p.out_width - c.x0);
  c.col0 = max_int(0, c.x0 - p.pad_w) / kColumnsAligned * kColumnsAligned;
  const int right = min_int(p.width - 1, c.x0 - p.pad_w + cols - 1 + (p.kernel_w - 1) * p.dil_w);
  c.k_tiles = max_int(0, ceil_div_int(right - c.col0 + 1, Depth));
  c.corner = c.col0 - c.x0 + p.pad_w;
  return c;
}

// One tile of a block: outputs, and the rows of the image that they need.
struct ToeplitzTile {
  int64_t n0;
  int images, y0, rows, row0, input_rows;
};

LK_DEVICE ToeplitzTile toeplitz_tile(const ToeplitzForwardParams& p, int index) {
  ToeplitzTile t;
  const int tile_n = divided_by(index, p.by_tiles_y);
  t.y0 = (index - tile_n * p.tiles_y) * p.tile_h;
  t.n0 = int64_t(tile_n) * p.tile_images;
  t.images = min_int(p.tile_images, int(p.batch - t.n0));
  t.rows = min_int(p.tile_h, p.out_height - t.y0);
  const int first = t.y0 * p.stride_h - p.pad_h;
  const int last = first + (t.rows - 1) * p.stride_h + (p.kernel_h - 1) * p.dil_h;
  t.row0 = max_int(0, first);
  t.input_rows = max_int(0, min_int(p.height - 1, last) - t.row0 + 1);
  return t;
}

// The rows of the image that a tile's window holds, in one plane.
template <class T>
LK_DEVICE WindowSource window_of(const ToeplitzForwardParams& p, const ToeplitzTile& t,
                                 const ToeplitzColumns& c, int plane) {
  return {static_cast<const T*>(p.input.data) + t.n0 * p.input.stride_n + int64_t(plane) * p.input.stride_c,
          p.input.stride_n,
          p.input.stride_h,
          1,
          t.row0,
          c.col0,
          p.width};
}

// Zeroes the rows above and below the image that some warp multiplies because another row of its outputs
// needs those kernel rows. A thread takes whole rows.
template <class T>
LK_DEVICE void zero_outside(T* stage, const ToeplitzForwardParams& p, const WindowShape& s) {
  constexpr int kVector = 16 / int(sizeof(T));
  const int outside = p.rows_above + p.rows_below;
  for (int i = int(threadIdx.x); i < p.tile_images * outside; i += int(blockDim.x)) {
    const int image = divided_by(i, p.by_outside), n = i - image * outside;
    T* row = stage + image * p.image_pitch + (n < p.rows_above ? n : n + s.rows) * p.row_pitch;
#pragma unroll 1
    for (int c = 0; c < s.cols; c += kVector) *reinterpret_cast<Elements<T, kVector>*>(row + c) = {};
  }
}

// Output rows of a tile, `apart` rows on each time, by image first or by y first: `fast` is that index. Where
// a row lies - in the window, among the outputs - follows by additions.
template <class Offset>
struct RowWalk {
  int left;  // rows of the tile from this one on
  int fast, limit, step;
  Offset at, advance, wrap;  // at: of the first row

  LK_DEVICE RowWalk(const ToeplitzForwardParams& p, const ToeplitzTile& t, int first, int apart,
                    Offset image_stride, Offset y_stride) {
    const LaunchDivisor& by = t.rows == p.tile_h ? p.by_fast : p.by_last_fast;
    const Offset by_fast = p.image_major ? image_stride : y_stride;
    const Offset by_slow = p.image_major ? y_stride : image_stride;
    const int slow = divided_by(first, by), step_slow = divided_by(apart, by);
    limit = by.divisor;
    left = limit * (p.image_major ? t.rows : t.images) - first;
    fast = first - slow * limit, step = apart - step_slow * limit;
    at = fast * by_fast + slow * by_slow;
    advance = step * by_fast + step_slow * by_slow, wrap = by_slow - limit * by_fast;
  }
  // How far the next row lies from this one.
  LK_DEVICE Offset next() {
    fast += step;
    const bool over = fast >= limit;
    fast -= over ? limit : 0;
    return over ? advance + wrap : advance;
  }
};

// The warp's share: M tiles [first, first + count) of the tile, whose output rows begin at `y_low`, and the
// kernel rows that reach the image from them.
struct WarpShare {
  int first, count, y_low, u0, u1;
};

LK_DEVICE WarpShare warp_share(const ToeplitzForwardParams& p, const ToeplitzTile& t) {
  const int warp = int(shuffle(threadIdx.x / kWarp, 0));
  const int rows = p.image_major ? p.tile_images * t.rows : t.images * t.rows;
  const int tiles = ceil_div_int(rows, kTileRows), each = ceil_divided_by(tiles, p.by_warps);
  WarpShare s;
  s.first = warp * each;
  s.count = max_int(0, min_int(each, tiles - s.first));
  int y_high = t.rows - 1;
  s.y_low = 0;
  // By images first, an M tile is 16 images of one output row.
  if (p.image_major)
    s.y_low = s.first, y_high = min_int(y_high, s.first + max_int(1, s.count) - 1);
  else if (t.images == 1)
    s.y_low = s.first * kTileRows, y_high = min_int(y_high, (s.first + s.count) * kTileRows - 1);
  const int top = (t.y0 + y_high) * p.stride_h - p.pad_h;  // input row of tap 0 under the lowest output row
  const int below = p.height - 1 - ((t.y0 + s.y_low) * p.stride_h - p.pad_h);
  s.u0 = ceil_divided_by(max_int(0, -top), p.by_dil_h);
  s.u1 = below < 0 ? 0 : min_int(p.kernel_h, divided_by(below, p.by_dil_h) + 1);
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

// An address `bytes` further on. In bytes, because shared memory is addressed by a register of the lane and
// one of the warp together: what lanes have in common takes no instruction of theirs.
template <class T>
LK_DEVICE const T* bytes_on(const T* from, int bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const unsigned char*>(from) + bytes);
}

// acc += the warp's rows times T_u, for all kernel rows u. The k tiles run outermost: which n tiles are on
// the band depends on them alone, and stays in predicates while u runs. Rows of A are offsets from the
// window, which advances with u, and meet zeros outside the image. Rows beyond the tile repeat another one's
// window: their sums are not stored.
template <class T, int MT, int NT>
LK_DEVICE void multiply_window(float (&acc)[MT][NT][4], const ToeplitzForwardParams& p, const ToeplitzTile& t,
                               const ToeplitzColumns& c, const WarpShare& share, const T* window,
                               const T* band) {
  constexpr int kDepth = MatrixUnit<T>::depth, kSize = int(sizeof(T));
  const int lane = int(threadIdx.x) % kWarp, extent = (p.kernel_w - 1) * p.dil_w;
  const int row_bytes = p.row_pitch * kSize, y_bytes = p.stride_h * row_bytes;
  const int step_bytes = p.dil_h * row_bytes, taps_bytes = p.band_pitch * kSize;
  const int rows_run = max_int(0, share.u1 - share.u0);
  // Input row of output row 0 and kernel row u0, in the window.
  const int row = t.y0 * p.stride_h - p.pad_h + share.u0 * p.dil_h - t.row0 + p.rows_above;
  window = bytes_on(window, row * row_bytes), band = bytes_on(band, share.u0 * taps_bytes);
  int offset[MT];
  RowWalk<int> walk(p, t, share.first * kTileRows + lane % kTileRows, kTileRows, p.image_pitch * kSize,
                    y_bytes);
  int at = walk.at;
#pragma unroll
  for (int m = 0; m < MT; ++m, at += walk.next())
    offset[m] = (m < share.count && walk.left > m * kTileRows ? at : share.y_low * y_bytes) +
                lane / kTileRows * (kDepth / 2 * kSize);
  for (int i = 0; i < c.k_tiles; ++i) {
    // Of n tile 0; n tile j spans taps q - 8 j - 7 .. q - 8 j + depth - 1.
    const int q = c.corner + i * kDepth;
    const int j_low = max_int(0, (q - extent) >> 3), j_high = min_int(NT - 1, (q + kDepth - 1) >> 3);
    if (j_low > j_high) continue;
    const T *taps = band + i * kDepth, *columns = window + i * kDepth;
    for (int n = 0; n < rows_run; ++n) {
      const T* rows[MT];
#pragma unroll
      for (int m = 0; m < MT; ++m) rows[m] = bytes_on(bytes_on(columns, n * step_bytes), offset[m]);
      multiply_k_tile<T, MT, NT>(acc, rows, bytes_on(taps, n * taps_bytes), j_low, j_high);
    }
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
                             const ToeplitzTile& t, const ToeplitzColumns& c, const WarpShare& share,
                             int channel) {
  const int lane = int(threadIdx.x) % kWarp, x = c.x0 + lane % 4 * 2;
  float bias = 0;
  if (p.bias.data) bias = to_float(static_cast<const T*>(p.bias.data)[int64_t(channel) * p.bias.stride_c]);
  const GlobalView& to = p.output;
  T* plane = static_cast<T*>(to.data) + t.n0 * to.stride_n + int64_t(channel) * to.stride_c +
             t.y0 * to.stride_h + x * to.stride_w;
  // In bytes: an addition to a pointer is one, with no shift.
  RowWalk<int64_t> walk(p, t, share.first * kTileRows + lane / 4, 8, to.stride_n * int64_t(sizeof(T)),
                        to.stride_h * int64_t(sizeof(T)));
  const int left = min_int(walk.left, share.count * kTileRows),
            images = p.image_major ? t.images : walk.limit;
  unsigned char* out = reinterpret_cast<unsigned char*>(plane) + walk.at;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (left > m * kTileRows + 8 * h && walk.fast < images)
        store_row<T, Pairs, NT>(reinterpret_cast<T*>(out), to.stride_w, acc[m], h, bias, p.out_width - x);
      out += walk.next();
    }
}

// A block: one channel, one column of tiles, `tiles_per_block` of them, two stages deep. A step is the window
// of one of a tile's `reduce` input channels.
template <class T, int MT, int NT>
__global__ void __launch_bounds__(kToeplitzThreads, 2)
    toeplitz_forward(const __grid_constant__ ToeplitzForwardParams p) {
  constexpr int kDepth = MatrixUnit<T>::depth;
  unsigned char* shared = dynamic_shared();
  T* band = reinterpret_cast<T*>(shared) + kBandGuard;
  const int block = int(blockIdx.x), column = divided_by(block, p.by_tiles_x);
  const int channel = divided_by(column, p.by_blocks_per_channel);
  const ToeplitzColumns columns = toeplitz_columns<NT, kDepth>(p, block - column * p.tiles_x);
  const int first = (column - channel * p.blocks_per_channel) * p.tiles_per_block;
  const int end = min_int(first + p.tiles_per_block, p.tiles_n * p.tiles_y);
  const int plane = divided_by(channel, p.by_channel_div) * p.channel_mul;
  const auto stage_of = [&](int step) {
    return reinterpret_cast<T*>(shared + p.stage_offset + step % 2 * p.stage_bytes);
  };
  const auto window = [&](const ToeplitzTile& t, int j, WindowShape& shape, WindowSource& source) {
    shape = {t.images, t.input_rows, columns.k_tiles * kDepth, p.image_pitch, p.row_pitch};
    source = window_of<T>(p, t, columns, plane + j);
  };
  WindowShape shape;
  WindowSource source;
  const int image_offset = p.rows_above * p.row_pitch;
  // Rows outside the image lie in the same places of every tile that is as high as the image.
  const auto issue = [&](int step, int tile, int j) {
    window(toeplitz_tile(p, tile), j, shape, source);
    T* stage = stage_of(step);
    if (step < 2 || p.tiles_y > 1) zero_outside(stage, p, shape);
    issue_window(stage + image_offset, shape, source, p.walk);
  };
  issue(0, first, 0);
  commit_copies();
  build_band(band, p, channel);
  const T* taps = band + Band<T>::lane_offset(columns.corner, p.reduce * p.kernel_h * p.band_pitch);
  for (int tile = first, step = 0; tile < end; ++tile) {
    const ToeplitzTile t = toeplitz_tile(p, tile);
    const WarpShare share = warp_share(p, t);
    float acc[MT][NT][4] = {};
    for (int j = 0; j < p.reduce; ++j, ++step) {
      const int next = j + 1 < p.reduce ? tile : tile + 1;
      if (next < end) issue(step + 1, next, next == tile ? j + 1 : 0);
      commit_copies();
      T* stage = stage_of(step);
      wait_copies<1>();
      window(t, j, shape, source);
      round_window(stage + image_offset, shape, source, p.walk);
      sync_block();
      if (share.count > 0)
        multiply_window<T, MT, NT>(acc, p, t, columns, share, stage, taps + j * p.kernel_h * p.band_pitch);
      sync_block();  // the next step overwrites this stage
    }
    if (p.store_pairs)
      store_outputs<T, true>(acc, p, t, columns, share, channel);
    else
      store_outputs<T, false>(acc, p, t, columns, share, channel);
  }
  wait_copies<0>();
}

}  // namespace lkconv::cuda
