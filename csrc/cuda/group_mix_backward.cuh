// The aggregation, backward, and the depthwise part of the position encoding's. Kernels in the order they
// run: sums for BatchNorm; dU and dT = P^T dU by tokens; dZ, the weights of D and once more T = D(z) by tiles
// of pixels. The pointwise weights' gradient is a token_product of dU and T (group_mix_attention.cuh).
#pragma once

#include "group_mix_aggregate.cuh"

namespace lkconv::cuda {

// Sums of dA and dA U^ over a share of the tokens, for 32 of the 4d channels.
template <class T>
__global__ void __launch_bounds__(kTokenThreads)
    backward_reduce(const __grid_constant__ BackwardReduceParams p) {
  using A = accumulator_t<T>;
  A* shared = reinterpret_cast<A*>(dynamic_shared());  // (2, 256)
  const int lane = int(threadIdx.x) % kLanes, row = int(threadIdx.x) / kLanes, d = p.segment;
  const int chunk = int(blockIdx.x) % p.chunks, split = int(blockIdx.x) / p.chunks;
  const int c = chunk * kLanes + lane;
  const int64_t first = split * p.tokens_per_split, end = min_long(p.tokens, first + p.tokens_per_split);
  A sum = A(0), product = A(0);
  if (c < 4 * d) {
    const A* norms = static_cast<const A*>(p.norms) + c;
    const A scale = norms[kScale * 4 * d], shift = norms[kShift * 4 * d], mean = norms[kMean * 4 * d],
            inverse = norms[kInverse * 4 * d];
#pragma unroll 4
    for (int64_t t = first + row; t < end; t += kLaneRows) {
      const A u = c < d ? read<T>(p.qkv, qkv_offset(t, p.part_tokens, d) + c)
                        : read<T>(p.premix, t * (3 * d) + c - d);
      const A grad =
          read<T>(p.grad_mixed, t * (4 * d) + c) * hardswish_slope(fused_multiply_add(scale, u, shift));
      sum += grad, product = fused_multiply_add(grad, (u - mean) * inverse, product);
    }
  }
  shared[threadIdx.x] = sum, shared[kTokenThreads + threadIdx.x] = product;
  sync_block();
  if (row != 0 || c >= 4 * d) return;
  for (int r = 1; r < kLaneRows; ++r)
    sum += shared[r * kLanes + lane], product += shared[kTokenThreads + r * kLanes + lane];
  A* out = static_cast<A*>(p.partial) + int64_t(split) * 8 * d + c;
  out[0] = sum, out[4 * d] = product;
}

// dU of one number.
template <class A>
LK_DEVICE A grad_before_norm(const A* norms, int channels, int c, A u, A grad) {
  const A scale = norms[kScale * channels + c];
  const A grad_a = grad * hardswish_slope(fused_multiply_add(scale, u, norms[kShift * channels + c]));
  return fused_multiply_add(
      scale, grad_a, fused_multiply_add(norms[kSlope * channels + c], u, norms[kOffset * channels + c]));
}

// Segment 0, which is not convolved: dU is dZ.
template <class T>
__global__ void __launch_bounds__(kTokenThreads)
    segment_backward(const __grid_constant__ SegmentBackwardParams p) {
  using A = accumulator_t<T>;
  const int d = p.segment;
  const int64_t first = int64_t(blockIdx.x) * p.tokens_per_block;
  const int count = int(min_long(p.tokens_per_block, p.tokens - first)) * d;
  const Divisor by_channels = make_divisor(d);
  for (int i = int(threadIdx.x); i < count; i += kTokenThreads) {
    const int token = quotient(i, by_channels), c = i - token * d;
    const int64_t t = first + token, at = qkv_offset(t, p.part_tokens, d) + c;
    write<T>(p.grad_qkv, at,
             grad_before_norm(static_cast<const A*>(p.norms), 4 * d, c, A(read<T>(p.qkv, at)),
                              A(read<T>(p.grad_mixed, t * (4 * d) + c))));
  }
}

// Shared memory [token][channel] <- dU behind LayerNorm, a warp per token:
// dU = (dA w - mean(dA w) - U^ mean(dA w U^)) / sigma. Adds dA U^ and dA to the warp's sums (2, d).
template <class T, class A>
LK_DEVICE void layer_norm_backward(A* shared, A* sums, const MixBackwardParams& p, int64_t first, int count) {
  const int d = p.segment, lane = int(threadIdx.x) % kWarp;
  const A *weight = static_cast<const A*>(p.layer_norm[0]), *bias = static_cast<const A*>(p.layer_norm[1]);
  for (int i = int(threadIdx.x) / kWarp; i < count; i += kTokenThreads / kWarp) {
    const int64_t t = first + i;
    A sum = A(0), squares = A(0), grad_sum = A(0), product = A(0);
    for (int c = lane; c < d; c += kWarp) sum += read<T>(p.prelocal, t * d + c);
    const A mean = sum_warp(sum) / A(d);
    for (int c = lane; c < d; c += kWarp) {
      const A apart = read<T>(p.prelocal, t * d + c) - mean;
      squares += apart * apart;
    }
    const A inverse = A(1) / square_root(sum_warp(squares) / A(d) + A(p.norm_eps));
    for (int c = lane; c < d; c += kWarp) {
      const A normed = (read<T>(p.prelocal, t * d + c) - mean) * inverse;
      const A grad_a =
          read<T>(p.grad_local, t * p.local_stride + c) * hardswish_slope(normed * weight[c] + bias[c]);
      sums[c] += grad_a * normed, sums[d + c] += grad_a;
      const A grad = grad_a * weight[c];
      grad_sum += grad, product += grad * normed;
      shared[i * p.pitch + c] = grad;
    }
    grad_sum = sum_warp(grad_sum) / A(d), product = sum_warp(product) / A(d);
    for (int c = lane; c < d; c += kWarp) {
      const A normed = (read<T>(p.prelocal, t * d + c) - mean) * inverse;
      A& grad = shared[i * p.pitch + c];
      grad = (grad - grad_sum - normed * product) * inverse;
      write<T>(p.grad_u, t * d + c, grad);
    }
  }
}

// dU of a block of tokens -> shared memory and grad_u.
template <class T, class A>
LK_DEVICE void stage_grad_u(A* shared, A* sums, const MixBackwardParams& p, int64_t first, int count) {
  const int d = p.segment;
  if (p.kind == kLocalKind) return layer_norm_backward<T>(shared, sums, p, first, count);
  for (int i = int(threadIdx.x); i < count * d; i += kTokenThreads) {
    const int row = i / d, c = i - row * d;
    const int64_t t = first + row;
    const A grad = grad_before_norm(static_cast<const A*>(p.norms), 4 * d, p.kind * d + c,
                                    A(read<T>(p.premix, t * (3 * d) + (p.kind - 1) * d + c)),
                                    A(read<T>(p.grad_mixed, t * (4 * d) + p.kind * d + c)));
    shared[row * p.pitch + c] = grad;
    write<T>(p.grad_u, t * d + c, grad);
  }
}

template <class T>
__global__ void __launch_bounds__(kTokenThreads, sizeof(accumulator_t<T>) == 8 ? 1 : 2)
    mix_backward(const __grid_constant__ MixBackwardParams p) {
  using A = accumulator_t<T>;
  A* shared = reinterpret_cast<A*>(dynamic_shared());
  const int d = p.segment, tid = int(threadIdx.x);
  const ProductThread thread = product_thread(p.columns);
  for (int i = tid; i < p.pixels * p.pitch; i += kTokenThreads) shared[i] = A(0);
  const bool local = p.kind == kLocalKind;
  A* sums = shared + p.sums_offset;  // (8, 2, d): of each warp
  if (local)
    for (int i = tid; i < kTokenThreads / kWarp * 2 * d; i += kTokenThreads) sums[i] = A(0);
  const A* weight = static_cast<const A*>(p.pointwise);
  const int64_t end = min_long(p.blocks_of_tokens, (blockIdx.x + int64_t(1)) * p.per_split);
  for (int64_t block = blockIdx.x * p.per_split; block < end; ++block) {
    const int64_t first = block * p.pixels;
    const int count = int(min_long(p.pixels, p.tokens - first));
    sync_block();
    stage_grad_u<T>(shared, sums + tid / kWarp * 2 * d, p, first, count);
    for (int o0 = 0; o0 < p.inner; o0 += p.columns * 4) {
      A acc[4][4] = {};
      multiply<false>(acc, shared, p.pitch, p.pixels, d, min_int(p.columns * 4, p.inner - o0),
                      shared + p.stage_offset, thread,
                      [&](int k, int o) { return weight[int64_t(k) * p.inner + o0 + o]; });
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        const int row = thread.row + a * thread.rows;
        const int c = o0 + thread.column * 4;
        if (row < count && c < p.inner)
          write4<T>(p.grad_t, (first + row) * p.inner + c, acc[a], p.inner - c, p.quads);
      }
    }
  }
  if (!local) return;
  sync_block();
  for (int i = tid; i < 2 * d; i += kTokenThreads) {
    A sum = A(0);
    for (int w = 0; w < kTokenThreads / kWarp; ++w) sum += sums[w * 2 * d + i];
    static_cast<A*>(p.partial)[int64_t(blockIdx.x) * 2 * d + i] = sum;
  }
}

// The chunk of channels a block of depthwise_backward owns.
struct ChannelChunk {
  int group, first, valid;
};

// dZ and D(z) (times the factor's source, or with a bias) of a staged tile.
template <class T, int K, class A>
LK_DEVICE void depthwise_outputs(const DepthwiseBackwardParams& p, const PixelTile& tile,
                                 const ChannelChunk& ch, const A* grad, const A* input, const A* taps,
                                 int64_t dense, int64_t strided) {
  const TilePlan& t = p.tiles;
  const int lane = int(threadIdx.x) & (t.chunk - 1), strips_x = t.tile_w / kPixels;
  const int row_pitch = (t.tile_w + K - 1) << t.chunk_shift;
  const int channel = ch.group * p.channels_per_group + ch.first + lane;
  for (int s = int(threadIdx.x) >> t.chunk_shift; s < t.tile_h * strips_x;
       s += kTokenThreads >> t.chunk_shift) {
    const int y = s / strips_x, x = (s - y * strips_x) * kPixels;
    const int at = y * row_pitch + (x << t.chunk_shift) + lane;
    A down[kPixels] = {}, up[kPixels] = {};
    depthwise_strip<K, true>(down, grad + at, row_pitch, t.chunk, taps + lane);
    depthwise_strip<K, false>(up, input + at, row_pitch, t.chunk, taps + lane);
    if (lane >= ch.valid || tile.y0 + y >= t.height) continue;
    const A bias = p.bias ? static_cast<const A*>(p.bias)[channel] : A(0);
    const int64_t token0 = int64_t(tile.y0 + y) * t.width + tile.x0 + x;
#pragma unroll
    for (int r = 0; r < kPixels; ++r) {
      if (tile.x0 + x + r >= t.width) break;
      const int64_t token = token0 + r;
      write<T>(p.grad_input, strided + token * p.grad_input_stride + ch.first + lane, down[r]);
      A value = up[r] + bias;
      if (p.factor) value *= read<T>(p.grad, dense * p.grad_stride + token * p.grad_stride + channel);
      write<T>(p.product, (dense + token) * p.product_stride + channel, value);
    }
  }
}

// acc[v] += sum over the tile of grad[y, x] input[y + u - K/2, x + v - K/2]: a thread owns one channel and
// one row of taps, and takes every workers-th strip.
template <int K, class A>
LK_DEVICE void correlate_tile(A (&acc)[K], A& total, const TilePlan& t, const A* grad, const A* input,
                              int lane, int u, int worker, int workers) {
  const int strips_x = t.tile_w / kPixels, row_pitch = (t.tile_w + K - 1) << t.chunk_shift;
  for (int s = worker; s < t.tile_h * strips_x; s += workers) {
    const int y = s / strips_x, x = (s - y * strips_x) * kPixels;
    const A* g = grad + (y + K / 2) * row_pitch + ((x + K / 2) << t.chunk_shift) + lane;
    const A* z = input + (y + u) * row_pitch + (x << t.chunk_shift) + lane;
    A in[kPixels + K - 1];
#pragma unroll
    for (int i = 0; i < kPixels + K - 1; ++i) in[i] = z[i << t.chunk_shift];
#pragma unroll
    for (int r = 0; r < kPixels; ++r) {
      const A value = g[r << t.chunk_shift];
      total += value;
#pragma unroll
      for (int v = 0; v < K; ++v) acc[v] = fused_multiply_add(value, in[r + v], acc[v]);
    }
  }
}

// Workers of a row of taps, in order -> the block's partial gradients.
template <int K, class A>
LK_DEVICE void write_taps(A* shared, const DepthwiseBackwardParams& p, const ChannelChunk& ch, int split,
                          const A (&acc)[K], A total, int lane, int u, int worker, int workers) {
  constexpr int kSlots = K * K + 1;
  const int chunk = p.tiles.chunk;
  sync_block();
  if (worker < workers) {
    A* mine = shared + (worker * kSlots + u * K) * chunk + lane;
#pragma unroll
    for (int v = 0; v < K; ++v) mine[v * chunk] = acc[v];
    if (u == 0) mine[K * K * chunk] = total;
  }
  sync_block();
  const int channels = p.groups * p.channels_per_group;
  const int64_t first = int64_t(split) * channels + ch.group * p.channels_per_group + ch.first;
  for (int i = int(threadIdx.x); i < kSlots * ch.valid; i += kTokenThreads) {
    const int c = i / kSlots, slot = i - c * kSlots;
    A sum = A(0);
    for (int w = 0; w < workers; ++w) sum += shared[(w * kSlots + slot) * chunk + c];
    if (slot < K * K)
      static_cast<A*>(p.partial_weight)[(first + c) * (K * K) + slot] = sum;
    else if (p.partial_bias)
      static_cast<A*>(p.partial_bias)[first + c] = sum;
  }
}

template <class T, int K>
__global__ void __launch_bounds__(kTokenThreads, sizeof(accumulator_t<T>) == 8 ? 1 : 2)
    depthwise_backward(const __grid_constant__ DepthwiseBackwardParams p) {
  using A = accumulator_t<T>;
  A* grad = reinterpret_cast<A*>(dynamic_shared());
  A *input = grad + p.window_offset, *taps = grad + p.taps_offset;
  const TilePlan& t = p.tiles;
  const int chunks = p.groups * p.chunks_per_group;
  const int which = int(blockIdx.x % chunks), split = int(blockIdx.x / chunks);
  ChannelChunk ch;
  ch.group = which / p.chunks_per_group, ch.first = which % p.chunks_per_group * t.chunk;
  ch.valid = min_int(t.chunk, p.channels_per_group - ch.first);
  const int channel = ch.group * p.channels_per_group + ch.first;
  const int lane = int(threadIdx.x) & (t.chunk - 1), row = int(threadIdx.x) >> t.chunk_shift;
  const int workers = (kTokenThreads >> t.chunk_shift) / K, u = row % K, worker = row / K;
  const int64_t pixels = int64_t(t.height) * t.width;
  stage_taps(taps, static_cast<const A*>(p.weight) + channel * (K * K), K * K, t.chunk, t.chunk_shift,
             ch.valid);
  A acc[K] = {}, total = A(0);
  const int64_t end = min_long(t.units, (split + int64_t(1)) * t.units_per_split);
  for (int64_t unit = split * t.units_per_split; unit < end; ++unit) {
    const PixelTile tile = pixel_tile(t, unit);
    const int64_t dense = tile.image * pixels;
    const int64_t shift = tile.image / p.batch * p.part_stride + ch.group * p.group_stride;
    const int64_t image = tile.image % p.batch * pixels;
    const int64_t input_first = image * p.input_stride + shift + ch.first;
    sync_block();
    stage_window<T>(grad, t, tile, K / 2, ch.valid, p.pairs,
                    {p.grad, dense * p.grad_stride + channel, p.grad_stride},
                    {p.factor, dense * p.factor_stride + channel, p.factor_stride});
    stage_window<T>(input, t, tile, K / 2, ch.valid, p.pairs, {p.input, input_first, p.input_stride});
    sync_block();
    depthwise_outputs<T, K>(p, tile, ch, grad, input, taps, dense, image * p.grad_input_stride + shift);
    if (worker < workers) correlate_tile<K>(acc, total, t, grad, input, lane, u, worker, workers);
  }
  write_taps<K>(grad, p, ch, split, acc, total, lane, u, worker, workers);
}

}  // namespace lkconv::cuda
