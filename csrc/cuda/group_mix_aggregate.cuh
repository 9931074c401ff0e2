// The aggregation, forward. A block takes tiles of pixels of one kind: a window of the tile is staged in
// chunks of channels, convolved depthwise into a pixels-by-channels matrix in shared memory, and multiplied
// by the pointwise weights in registers. With fixed statistics BatchNorm and hardswish follow at once;
// otherwise U is written with the moments of its channels, and `normalize` does the rest. The non-attention
// branch adds the products of its three parts in shared memory, where LayerNorm finds whole tokens.
#pragma once

#include "group_mix_common.cuh"

namespace lkconv::cuda {

// Shared memory [pixel][channel] <- depthwise convolution of all d channels of one part of a tile.
template <class T, int K, class A>
LK_DEVICE void depthwise_tile(A* shared, const AggregateParams& p, const PixelTile& tile, int64_t first,
                              int part) {
  const TilePlan& t = p.tiles;
  A *window = shared + p.window_offset, *taps = shared + p.taps_offset;
  const int lane = int(threadIdx.x) & (t.chunk - 1), strips_x = t.tile_w / kPixels;
  const int row_pitch = (t.tile_w + K - 1) << t.chunk_shift;
  for (int c0 = 0; c0 < p.segment; c0 += t.chunk) {
    const int valid = min_int(t.chunk, p.segment - c0);
    sync_block();  // the previous window is read no more, nor is the matrix
    stage_window<T>(window, t, tile, K / 2, valid, p.pairs, {p.qkv, first + c0, 15 * p.segment});
    stage_taps(taps, static_cast<const A*>(p.depthwise) + int64_t(part * p.segment + c0) * (K * K), K * K,
               t.chunk, t.chunk_shift, valid);
    sync_block();
    for (int s = int(threadIdx.x) >> t.chunk_shift; s < t.tile_h * strips_x;
         s += kTokenThreads >> t.chunk_shift) {
      const int y = s / strips_x, x = (s - y * strips_x) * kPixels;
      A acc[kPixels] = {};
      depthwise_strip<K, false>(acc, window + y * row_pitch + (x << t.chunk_shift) + lane, row_pitch, t.chunk,
                                taps + lane);
      if (lane >= valid) continue;
      A* out = shared + (y * t.tile_w + x) * p.pitch + c0 + lane;
#pragma unroll
      for (int r = 0; r < kPixels; ++r) out[r * p.pitch] = acc[r];
    }
  }
}

// Which of a thread's four pixels lie in the image, and their tokens.
struct PixelRows {
  int token[4];  // of the image; -1: outside
};
LK_DEVICE PixelRows pixel_rows(const TilePlan& t, const PixelTile& tile, const ProductThread& thread) {
  PixelRows rows;
#pragma unroll
  for (int a = 0; a < 4; ++a) {
    const int pixel = thread.row + a * thread.rows, y = pixel / t.tile_w;
    const int iy = tile.y0 + y, ix = tile.x0 + pixel - y * t.tile_w;
    rows.token[a] = y < t.tile_h && iy < t.height && ix < t.width ? iy * t.width + ix : -1;
  }
  return rows;
}

// Adds the tile's U, four pixels by four channels of this thread, to its running moments.
template <class A>
LK_DEVICE void add_moments(A* moments, const A (&acc)[4][4], const PixelRows& rows, A before) {
  A n = A(0);
#pragma unroll
  for (int a = 0; a < 4; ++a) n += rows.token[a] >= 0 ? A(1) : A(0);
  if (n == A(0)) return;
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    A sum = A(0), squares = A(0);
#pragma unroll
    for (int a = 0; a < 4; ++a) sum += rows.token[a] >= 0 ? acc[a][b] : A(0);
    const A mean = sum / n;
#pragma unroll
    for (int a = 0; a < 4; ++a)
      squares += rows.token[a] >= 0 ? (acc[a][b] - mean) * (acc[a][b] - mean) : A(0);
    merge_moments(before, moments[2 * b * kTokenThreads], moments[(2 * b + 1) * kTokenThreads], n, mean,
                  squares);
  }
}

// U of one part of a tile -> mixed, or premix and moments, or the local branch's sums in shared memory.
template <class T, class A>
LK_DEVICE void pointwise_tile(A* shared, const AggregateParams& p, const PixelTile& tile,
                              const ProductThread& thread, int part, A count) {
  const int d = p.segment, step = p.columns * 4, inner = p.kind == kLocalKind ? 3 * d : d;
  const int pixels = p.tiles.tile_h * p.tiles.tile_w;
  const int64_t tokens = int64_t(p.tiles.height) * p.tiles.width;
  const A* weight = static_cast<const A*>(p.pointwise) + part * d;
  A *mixed = shared + p.mixed_offset, *moments = shared + p.moment_offset + threadIdx.x;
  for (int o0 = 0; o0 < d; o0 += step, moments += 8 * kTokenThreads) {
    A acc[4][4] = {};
    multiply<true>(acc, shared, p.pitch, pixels, d, min_int(step, d - o0), shared + p.stage_offset, thread,
                   [&](int k, int o) { return weight[int64_t(o0 + o) * inner + k]; });
    const PixelRows rows = pixel_rows(p.tiles, tile, thread);  // again: registers are scarce in the product
    if (p.kind != kLocalKind && p.moments) add_moments(moments, acc, rows, count);
    const int c0 = o0 + thread.column * 4, valid = d - c0;
    if (valid <= 0) continue;
    if (p.kind != kLocalKind && !p.write_u)
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const int c = min_int(c0 + b, d - 1);
        const A scale = static_cast<const A*>(p.scale)[c], shift = static_cast<const A*>(p.shift)[c];
#pragma unroll
        for (int a = 0; a < 4; ++a) acc[a][b] = hardswish(fused_multiply_add(scale, acc[a][b], shift));
      }
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      if (rows.token[a] < 0) continue;
      const int64_t token = tile.image * tokens + rows.token[a];
      if (p.kind == kLocalKind) {
        A* sum = mixed + (thread.row + a * thread.rows) * p.pitch + c0;
#pragma unroll
        for (int b = 0; b < 4; ++b)
          if (b < valid) sum[b] = part == 0 ? acc[a][b] : sum[b] + acc[a][b];
      } else if (p.write_u) {
        write4<T>(p.premix, token * (3 * d) + (p.kind - 1) * d + c0, acc[a], valid, p.quads);
      } else {
        write4<T>(p.mixed, token * (4 * d) + p.kind * d + c0, acc[a], valid, p.quads);
      }
    }
  }
}

// A warp per pixel: LayerNorm over its channels, hardswish.
template <class T, class A>
LK_DEVICE void layer_norm_tile(const A* mixed, const AggregateParams& p, const PixelTile& tile) {
  const TilePlan& t = p.tiles;
  const int d = p.segment, lane = int(threadIdx.x) % kWarp;
  for (int i = int(threadIdx.x) / kWarp; i < t.tile_h * t.tile_w; i += kTokenThreads / kWarp) {
    const int y = tile.y0 + i / t.tile_w, x = tile.x0 + i % t.tile_w;
    if (y >= t.height || x >= t.width) continue;
    const int64_t token = (tile.image * t.height + y) * t.width + x;
    const A* u = mixed + i * p.pitch;
    A sum = A(0), squares = A(0);
    for (int c = lane; c < d; c += kWarp) sum += u[c];
    const A mean = sum_warp(sum) / A(d);
    for (int c = lane; c < d; c += kWarp) squares += (u[c] - mean) * (u[c] - mean);
    const A inverse = A(1) / square_root(sum_warp(squares) / A(d) + A(p.norm_eps));
    for (int c = lane; c < d; c += kWarp) {
      const A weight = static_cast<const A*>(p.norm_weight)[c], bias = static_cast<const A*>(p.norm_bias)[c];
      if (p.prelocal) write<T>(p.prelocal, token * d + c, u[c]);
      write<T>(p.local, token * d + c, hardswish((u[c] - mean) * inverse * weight + bias));
    }
  }
}

// Moments of the threads that share channels, merged in a tree over pixel rows, -> the block's partial
// result.
template <class A>
LK_DEVICE void write_moments(A* shared, const AggregateParams& p, const ProductThread& thread, A count) {
  const int d = p.segment, step = p.columns * 4, slots = 8 * ceil_div_int(d, step);
  A *moments = shared + p.moment_offset + threadIdx.x, *counts = moments + slots * kTokenThreads;
  *counts = count;
  for (int apart = thread.rows / 2; apart > 0; apart /= 2) {
    sync_block();
    if (thread.row >= apart) continue;
    const int other = apart * p.columns;
    for (int s = 0; s < slots; s += 2) {
      A* mine = moments + s * kTokenThreads;
      merge_moments(*counts, mine[0], mine[kTokenThreads], counts[other], mine[other],
                    mine[other + kTokenThreads]);
    }
    *counts += counts[other];
  }
  if (thread.row != 0) return;
  A* out = static_cast<A*>(p.moments) + int64_t(blockIdx.x) * 3 * d;
  for (int o0 = 0; o0 < d; o0 += step, moments += 8 * kTokenThreads)
    for (int b = 0; b < 4; ++b) {
      const int c = o0 + thread.column * 4 + b;
      if (c >= d) continue;
      out[c] = *counts;
      out[d + c] = moments[2 * b * kTokenThreads];
      out[2 * d + c] = moments[(2 * b + 1) * kTokenThreads];
    }
}

template <class T, int K>
__global__ void __launch_bounds__(kTokenThreads, sizeof(accumulator_t<T>) == 8 ? 1 : 2)
    aggregate(const __grid_constant__ AggregateParams p) {
  using A = accumulator_t<T>;
  A* shared = reinterpret_cast<A*>(dynamic_shared());
  const TilePlan& t = p.tiles;
  const int d = p.segment, tid = int(threadIdx.x);
  const ProductThread thread = product_thread(p.columns);
  // The product reads channels four at a time: the ones past d are zero, and nothing writes them again.
  for (int i = tid; i < t.tile_h * t.tile_w; i += kTokenThreads)
    for (int c = d; c < (d + 3) / 4 * 4; ++c) shared[i * p.pitch + c] = A(0);
  const bool local = p.kind == kLocalKind;
  if (p.moments && !local)
    for (int s = 0; s < 8 * ceil_div_int(d, p.columns * 4); ++s)
      shared[p.moment_offset + s * kTokenThreads + tid] = A(0);
  A count = A(0);
  const int64_t end = min_long(t.units, (blockIdx.x + int64_t(1)) * t.units_per_split);
  for (int64_t unit = blockIdx.x * t.units_per_split; unit < end; ++unit) {
    const PixelTile tile = pixel_tile(t, unit);
    const int64_t b = tile.image % p.batch, kind_part = tile.image / p.batch;
    const int64_t image = b * t.height * t.width * (15 * d);
    for (int part = 0; part < (local ? 3 : 1); ++part) {
      depthwise_tile<T, K>(shared, p, tile, image + ((local ? part : kind_part) * 5 + p.kind) * d, part);
      pointwise_tile<T>(shared, p, tile, thread, part, count);
    }
    const PixelRows rows = pixel_rows(t, tile, thread);
    for (int a = 0; a < 4; ++a) count += rows.token[a] >= 0 ? A(1) : A(0);
    if (!local) continue;
    sync_block();
    layer_norm_tile<T>(shared + p.mixed_offset, p, tile);
  }
  if (p.moments && !local) write_moments(shared, p, thread, count);
}

// Tokens of (3, B, N) in qkv: part t / (B N), token t % (B N).
LK_DEVICE int64_t qkv_offset(int64_t t, int64_t part_tokens, int segment) {
  const int64_t part = t / part_tokens;
  return (t - part * part_tokens) * (15 * segment) + part * (5 * segment);
}

// Moments of segment 0, or of a segment whose channels are too many for `aggregate` to keep them: 32 channels
// a block, a share of the tokens; sixteen tokens at a time in registers.
template <class T>
__global__ void __launch_bounds__(kTokenThreads)
    segment_moments(const __grid_constant__ SegmentMomentsParams p) {
  using A = accumulator_t<T>;
  constexpr int kBatch = 16;
  A* shared = reinterpret_cast<A*>(dynamic_shared());  // (8, 2, 32)
  const int lane = int(threadIdx.x) % kLanes, row = int(threadIdx.x) / kLanes;
  const int chunk = int(blockIdx.x) % p.chunks, split = int(blockIdx.x) / p.chunks;
  const int c = chunk * kLanes + lane;
  const int64_t first = split * p.tokens_per_split, end = min_long(p.tokens, first + p.tokens_per_split);
  A n = A(0), mean = A(0), squares = A(0);
  for (int64_t t0 = first + row; c < p.segment && t0 < end; t0 += kBatch * kLaneRows) {
    A values[kBatch], more = A(0), sum = A(0), apart = A(0);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t t = t0 + i * kLaneRows;
      values[i] = t >= end      ? A(0)
                  : p.kind == 0 ? read<T>(p.qkv, qkv_offset(t, p.part_tokens, p.segment) + c)
                                : read<T>(p.premix, (t * 3 + p.kind - 1) * p.segment + c);
      more += t < end ? A(1) : A(0), sum += values[i];
    }
    const A center = sum / more;
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (t0 + i * kLaneRows < end) apart += (values[i] - center) * (values[i] - center);
    merge_moments(n, mean, squares, more, center, apart);
    n += more;
  }
  A* mine = shared + threadIdx.x;
  mine[0] = n, mine[kTokenThreads] = mean, mine[2 * kTokenThreads] = squares;
  sync_block();
  if (row != 0 || c >= p.segment) return;
  for (int r = 1; r < kLaneRows; ++r) {
    const A* other = mine + r * kLanes;
    merge_moments(n, mean, squares, other[0], other[kTokenThreads], other[2 * kTokenThreads]);
    n += other[0];
  }
  A* out = static_cast<A*>(p.moments) + int64_t(split) * 3 * p.segment + c;
  out[0] = n, out[p.segment] = mean, out[2 * p.segment] = squares;
}

// Mean and biased variance of 32 channels of one segment, from all splits, in double.
template <class A>
__global__ void __launch_bounds__(kTokenThreads)
    reduce_moments(const __grid_constant__ ReduceMomentsParams p) {
  double* shared = reinterpret_cast<double*>(dynamic_shared());  // (2, 256)
  const int lane = int(threadIdx.x) % kLanes, row = int(threadIdx.x) / kLanes, d = p.segment;
  const int segment = int(blockIdx.x) / p.chunks, c = int(blockIdx.x) % p.chunks * kLanes + lane;
  const A* from = static_cast<const A*>(p.moments[segment]) + c;
  const int splits = c < d ? p.splits[segment] : 0;
  const auto total = [&](int which) {
    double sum = 0;
    for (int r = 0; r < kLaneRows; ++r) sum += shared[which * kTokenThreads + r * kLanes + lane];
    return sum;
  };
  double n = 0, sum = 0, squares = 0;
  for (int s = row; s < splits; s += kLaneRows) {
    const A* at = from + int64_t(s) * 3 * d;
    n += double(at[0]), sum += double(at[0]) * double(at[d]);
  }
  shared[threadIdx.x] = n, shared[kTokenThreads + threadIdx.x] = sum;
  sync_block();
  const double count = total(0), mean = total(1) / count;
  sync_block();
  for (int s = row; s < splits; s += kLaneRows) {
    const A* at = from + int64_t(s) * 3 * d;
    const double apart = double(at[d]) - mean;
    squares += double(at[2 * d]) + double(at[0]) * apart * apart;
  }
  shared[threadIdx.x] = squares;
  sync_block();
  if (row != 0 || c >= d) return;
  static_cast<A*>(p.mean)[segment * d + c] = A(mean);
  static_cast<A*>(p.var)[segment * d + c] = A(total(0) / count);
}

// mixed = hs(scale U + shift) for all segments, or for segment 0 alone; U of segment 0 is qkv itself.
template <class T>
__global__ void __launch_bounds__(kTokenThreads) normalize(const __grid_constant__ NormalizeParams p) {
  using A = accumulator_t<T>;
  const int d = p.segment;
  const int64_t first = int64_t(blockIdx.x) * p.tokens_per_block;
  const int count = int(min_long(p.tokens_per_block, p.tokens - first)) * p.channels;
  const A* norms = static_cast<const A*>(p.norms);
  const Divisor by_channels = make_divisor(p.channels);
  for (int i = int(threadIdx.x); i < count; i += kTokenThreads) {
    const int token = quotient(i, by_channels), c = i - token * p.channels;
    const int64_t t = first + token;
    const A u =
        c < d ? read<T>(p.qkv, qkv_offset(t, p.part_tokens, d) + c) : read<T>(p.premix, t * (3 * d) + c - d);
    write<T>(p.mixed, t * (4 * d) + c,
             hardswish(fused_multiply_add(norms[kScale * 4 * d + c], u, norms[kShift * 4 * d + c])));
  }
}

}  // namespace lkconv::cuda
