// The attention core. Softmax runs over tokens, so one head is: the maximum of each column of K; G = A^T V
// with A = exp(K - max) / sum, as sums over a share of the tokens a block, added in a fixed order; then scale
// * Q G + Q * E by tiles of pixels, E being the depthwise convolution of V. token_product also serves the
// gradients of G and of the aggregation's pointwise weights.
#pragma once

#include "group_mix_common.cuh"

namespace lkconv::cuda {

// Largest key of 32 channels over a share of the tokens. fmax drops NaN; exp(K - max) brings it back.
template <class T>
__global__ void __launch_bounds__(kTokenThreads) column_max(const __grid_constant__ ColumnMaxParams p) {
  using A = accumulator_t<T>;
  A* shared = reinterpret_cast<A*>(dynamic_shared());
  const int lane = int(threadIdx.x) % kLanes, row = int(threadIdx.x) / kLanes;
  const int chunk = int(blockIdx.x % p.chunks), c = chunk * kLanes + lane;
  const int64_t rest = blockIdx.x / p.chunks, image = rest / p.splits;
  const int split = int(rest - image * p.splits);
  const int64_t first = split * p.tokens_per_split, end = min_long(p.tokens, first + p.tokens_per_split);
  A top = -INFINITY;
  if (c < p.channels)
#pragma unroll 4
    for (int64_t t = first + row; t < end; t += kLaneRows) {
      const A key = read<T>(p.keys, (image * p.tokens + t) * p.channels + c);
      top = key > top ? key : top;
    }
  shared[threadIdx.x] = top;
  sync_block();
  if (row != 0 || c >= p.channels) return;
  for (int r = 1; r < kLaneRows; ++r) {
    const A other = shared[r * kLanes + lane];
    top = other > top ? other : top;
  }
  static_cast<A*>(p.partial)[rest * p.channels + c] = top;
}

template <class A>
LK_DEVICE A maximum_of_splits(const void* maxima, int64_t image, int splits, int channels, int c) {
  A top = -INFINITY;
  for (int s = 0; s < splits; ++s) {
    const A other = static_cast<const A*>(maxima)[(image * splits + s) * channels + c];
    top = other > top ? other : top;
  }
  return top;
}

// What a block of token_product owns: up to 64 x 64 sums of one problem, over one share of the tokens.
struct ProductBlock {
  int64_t problem, x_first, y_first;  // elements of token 0
  int split, row0, rows, column0, columns;
  int64_t begin, end;
  int image_head;
};

LK_DEVICE ProductBlock product_block(const TokenProductParams& p) {
  ProductBlock b;
  int64_t i = blockIdx.x;
  b.column0 = int(i % p.column_tiles) * kOutStep, i /= p.column_tiles;
  b.row0 = int(i % p.row_tiles) * kOutStep, i /= p.row_tiles;
  b.split = int(i % p.splits), b.problem = i / p.splits;
  const int64_t image = b.problem / p.heads;
  b.image_head = int(b.problem - image * p.heads);
  b.x_first = image * p.x_image + int64_t(b.image_head) * p.x_head + b.row0;
  b.y_first = image * p.y_image + int64_t(b.image_head) * p.y_head + b.column0;
  b.rows = min_int(kOutStep, p.rows - b.row0), b.columns = min_int(kOutStep, p.columns - b.column0);
  b.begin = b.split * p.tokens_per_split, b.end = min_long(p.tokens, b.begin + p.tokens_per_split);
  return b;
}

// Shared memory [token][width] <- `channels` channels of `count` tokens, zeros up to `width`.
template <class T, class A, class Change>
LK_DEVICE void stage_tokens(A* shared, const void* data, int64_t first, int64_t stride, int count,
                            int channels, int width, Change change) {
  const Divisor by_width = make_divisor(width);
#pragma unroll 4
  for (int i = int(threadIdx.x); i < count * width; i += kTokenThreads) {
    const int t = quotient(i, by_width), c = i - t * width;
    shared[i] = c < channels ? change(A(read<T>(data, first + t * stride + c)), c) : A(0);
  }
}

// acc[a][b] += sum over every groups-th staged token, and sum[a] likewise of X alone.
template <class A>
LK_DEVICE void add_tokens(A (&acc)[4][4], A (&sum)[4], const A* x, const A* y, int x_width, int y_width,
                          int count, int group, int groups, bool sums) {
  for (int t = group; t < count; t += groups) {
    const Vec4<A> u = load_vec4(x + t * x_width), v = load_vec4(y + t * y_width);
#pragma unroll
    for (int a = 0; a < 4; ++a)
#pragma unroll
      for (int b = 0; b < 4; ++b) acc[a][b] = fused_multiply_add(u.v[a], v.v[b], acc[a][b]);
    if (!sums) continue;
#pragma unroll
    for (int a = 0; a < 4; ++a) sum[a] += u.v[a];
  }
}

// Adds the threads' sums of all token groups, halving their number each time: a fixed order.
template <class A>
LK_DEVICE void reduce_groups(A* shared, A (&acc)[4][4], A (&sum)[4], int group, int groups, int owner,
                             int owners) {
  constexpr int kValues = 20;
  for (int left = groups; left > 1;) {
    const int half = (left + 1) / 2;
    A* mine = shared + owner;
    sync_block();
    if (group >= half && group < left) {
      mine += (group - half) * kValues * owners;
#pragma unroll
      for (int i = 0; i < 16; ++i) mine[i * owners] = acc[i / 4][i % 4];
#pragma unroll
      for (int i = 0; i < 4; ++i) mine[(16 + i) * owners] = sum[i];
    }
    sync_block();
    if (group < left - half) {
      mine += group * kValues * owners;
#pragma unroll
      for (int i = 0; i < 16; ++i) acc[i / 4][i % 4] += mine[i * owners];
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += mine[(16 + i) * owners];
    }
    left = half;
  }
}

template <class T>
__global__ void __launch_bounds__(kTokenThreads, sizeof(accumulator_t<T>) == 8 ? 1 : 2)
    token_product(const __grid_constant__ TokenProductParams p) {
  using A = accumulator_t<T>;
  A* shared = reinterpret_cast<A*>(dynamic_shared());
  const ProductBlock b = product_block(p);
  const int row_threads = ceil_div_int(b.rows, 4), column_threads = ceil_div_int(b.columns, 4);
  const int owners = row_threads * column_threads, groups = kTokenThreads / owners;
  const int owner = int(threadIdx.x) % owners, group = int(threadIdx.x) / owners;
  const int i0 = owner / column_threads * 4, j0 = owner % column_threads * 4;
  A *y = shared + p.y_offset, *top = shared + p.max_offset;
  for (int i = int(threadIdx.x); p.maxima && i < b.rows; i += kTokenThreads)
    top[i] = maximum_of_splits<A>(p.maxima, b.problem / p.heads, p.max_splits, p.max_channels,
                                  b.image_head * p.x_head + b.row0 + i);
  A acc[4][4] = {}, sum[4] = {};
  for (int64_t t = b.begin; t < b.end; t += p.tokens_staged) {
    const int count = int(min_long(p.tokens_staged, b.end - t));
    sync_block();
    stage_tokens<T>(shared, p.x, b.x_first + t * p.x_stride, p.x_stride, count, b.rows, row_threads * 4,
                    [&](A value, int c) { return p.maxima ? exponential(value - top[c]) : value; });
    stage_tokens<T>(y, p.y, b.y_first + t * p.y_stride, p.y_stride, count, b.columns, column_threads * 4,
                    [](A value, int) { return value; });
    sync_block();
    if (group < groups)
      add_tokens(acc, sum, shared + i0, y + j0, row_threads * 4, column_threads * 4, count, group, groups,
                 p.partial_sum != nullptr);
  }
  reduce_groups(shared, acc, sum, group, groups, owner, owners);
  if (group != 0) return;
  const int64_t slot = b.problem * p.splits + b.split;
#pragma unroll
  for (int a = 0; a < 4; ++a) {
    const int i = b.row0 + i0 + a;
    if (i0 + a >= b.rows) break;
    A* out = static_cast<A*>(p.partial) + (slot * p.rows + i) * p.columns + b.column0 + j0;
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (j0 + c < b.columns) out[c] = acc[a][c];
    if (p.partial_sum && b.column0 + j0 == 0) static_cast<A*>(p.partial_sum)[slot * p.rows + i] = sum[a];
  }
}

// A block per image and head: log(sum exp K) and G.
template <class A>
__global__ void __launch_bounds__(kTokenThreads) combine_context(const __grid_constant__ ContextParams p) {
  const int n = p.head;
  const int64_t problem = blockIdx.x, image = problem / 8;
  const A *partial = static_cast<const A*>(p.partial) + problem * p.splits * n * n,
          *sums = static_cast<const A*>(p.partial_sum) + problem * p.splits * n;
  for (int i = int(threadIdx.x); i < n * n; i += kTokenThreads) {
    const int row = i / n;
    A value = A(0), sum = A(0);
    for (int s = 0; s < p.splits; ++s) value += partial[s * n * n + i], sum += sums[s * n + row];
    static_cast<A*>(p.context)[problem * n * n + i] = value / sum;
    if (i % n) continue;
    const A top =
        maximum_of_splits<A>(p.maxima, image, p.max_splits, 8 * n, int(problem - image * 8) * n + row);
    static_cast<A*>(p.log_sum)[problem * n + row] = top + natural_log(sum);
  }
}

// A warp per row of dG = scale * Q^T dO, and its product with the same row of G.
template <class A>
__global__ void __launch_bounds__(kTokenThreads)
    combine_grad_context(const __grid_constant__ GradContextParams p) {
  const int n = p.head, lane = int(threadIdx.x) % kWarp;
  const int64_t problem = blockIdx.x;
  const A* partial = static_cast<const A*>(p.partial) + problem * p.splits * n * n;
  for (int row = int(threadIdx.x) / kWarp; row < n; row += kTokenThreads / kWarp) {
    A total = A(0);
    for (int j = lane; j < n; j += kWarp) {
      A value = A(0);
      for (int s = 0; s < p.splits; ++s) value += partial[(s * n + row) * n + j];
      value *= A(p.scale);
      static_cast<A*>(p.grad_context)[(problem * n + row) * n + j] = value;
      total = fused_multiply_add(value, static_cast<const A*>(p.context)[(problem * n + row) * n + j], total);
    }
    total = sum_warp(total);
    if (lane == 0) static_cast<A*>(p.row_sum)[problem * n + row] = total;
  }
}

// ---- forward ----

// Copies up to `chunk` channels of `local` beside the attention's output.
template <class T>
LK_DEVICE void copy_local(const AttentionParams& p, const PixelTile& tile, int c0) {
  const TilePlan& t = p.tiles;
  const int lane = int(threadIdx.x) & (t.chunk - 1), d = p.segment;
  for (int i = int(threadIdx.x) >> t.chunk_shift; i < t.tile_h * t.tile_w;
       i += kTokenThreads >> t.chunk_shift) {
    const int y = tile.y0 + i / t.tile_w, x = tile.x0 + i % t.tile_w;
    if (y >= t.height || x >= t.width || c0 + lane >= d) continue;
    const int64_t token = (tile.image * t.height + y) * t.width + x;
    static_cast<T*>(p.out)[token * (5 * d) + 4 * d + c0 + lane] =
        static_cast<const T*>(p.local)[token * d + c0 + lane];
  }
}

// Channels of one block: whole heads, or a piece of one.
struct HeadChunk {
  int first, valid;  // of the 4d channels
  int head, heads;
};

// Q and G of `depth` channels of each head from i0 on: Q as [pixel][head][depth], G as [i][channel of the
// chunk].
template <class T, class A>
LK_DEVICE void stage_heads(A* query, A* context, const AttentionParams& p, const PixelTile& tile,
                           const HeadChunk& h, int i0) {
  const TilePlan& t = p.tiles;
  const int n = p.head, width = h.heads * p.depth;
  const Divisor by_width = make_divisor(width), by_depth = make_divisor(p.depth),
                by_row = make_divisor(t.tile_w);
  for (int i = int(threadIdx.x); i < t.tile_h * t.tile_w * width; i += kTokenThreads) {
    const int pixel = quotient(i, by_width), k = i - pixel * width, head = quotient(k, by_depth);
    const int c = i0 + k - head * p.depth, row = quotient(pixel, by_row);
    const int y = tile.y0 + row, x = tile.x0 + pixel - row * t.tile_w;
    const int64_t token = (tile.image * t.height + y) * t.width + x;
    query[pixel * p.pitch + k] = y < t.height && x < t.width && c < n
                                     ? read<T>(p.mixed, token * (4 * p.segment) + (h.head + head) * n + c)
                                     : A(0);
  }
  for (int i = int(threadIdx.x); i < p.depth * t.chunk; i += kTokenThreads) {
    const int k = i >> t.chunk_shift, lane = i & (t.chunk - 1), c = h.first + lane;
    context[i] = lane < h.valid && i0 + k < n
                     ? static_cast<const A*>(p.context)[(tile.image * 8 * n + c / n * n + i0 + k) * n + c % n]
                     : A(0);
  }
}

// A block: one tile, one chunk of heads; a thread: 8 pixels of one channel.
template <class T, int K>
__global__ void __launch_bounds__(kTokenThreads, sizeof(accumulator_t<T>) == 8 ? 1 : 2)
    attention_forward(const __grid_constant__ AttentionParams p) {
  using A = accumulator_t<T>;
  A* window = reinterpret_cast<A*>(dynamic_shared());
  A *query = window + p.query_offset, *context = window + p.context_offset, *taps = window + p.taps_offset;
  const TilePlan& t = p.tiles;
  const int d = p.segment, blocks = p.chunks + p.copies, which = int(blockIdx.x % blocks);
  const PixelTile tile = pixel_tile(t, blockIdx.x / blocks);
  if (which >= p.chunks) return copy_local<T>(p, tile, (which - p.chunks) * t.chunk);
  HeadChunk h;
  const int pieces = p.chunk_heads > 1 ? 1 : ceil_div_int(p.head, p.chunk_channels);
  const int head_in_window = which / pieces * p.chunk_heads, offset = which % pieces * p.chunk_channels;
  h.head = p.first_channel / p.head + head_in_window;
  h.heads = min_int(p.chunk_heads, p.channels / p.head - head_in_window);
  h.first = h.head * p.head + offset;
  h.valid = min_int(p.chunk_channels, h.heads * p.head - offset);
  const int64_t first = ((2 * p.batch + tile.image) * t.height * t.width) * (4 * d) + h.first;
  stage_window<T>(window, t, tile, K / 2, h.valid, p.pairs, {p.mixed, first, 4 * d});
  const int in_window = h.first - p.first_channel;
  stage_taps(taps, static_cast<const A*>(p.weight) + in_window * (K * K), K * K, t.chunk, t.chunk_shift,
             h.valid);
  const int lane = int(threadIdx.x) & (t.chunk - 1), strips_x = t.tile_w / kPixels;
  const int own = int(threadIdx.x) >> t.chunk_shift;
  const bool active = own < t.tile_h * strips_x;  // the others read where nothing is out of bounds
  const int strip = active ? own : 0, y = strip / strips_x, x = (strip - y * strips_x) * kPixels;
  const int head = lane < h.valid && h.heads > 1 ? lane / p.head : 0;
  A attended[kPixels] = {}, encoded[kPixels] = {};
  for (int i0 = 0; i0 < p.head; i0 += p.depth) {
    sync_block();
    stage_heads<T>(query, context, p, tile, h, i0);
    sync_block();
    const A* q = query + (y * t.tile_w + x) * p.pitch + head * p.depth;
    for (int i = 0; i < p.depth; i += 4) {
      A g[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) g[j] = context[((i + j) << t.chunk_shift) + lane];
#pragma unroll
      for (int r = 0; r < kPixels; ++r) {
        const Vec4<A> four = load_vec4(q + r * p.pitch + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) attended[r] = fused_multiply_add(four.v[j], g[j], attended[r]);
      }
    }
  }
  const int row_pitch = (t.tile_w + K - 1) << t.chunk_shift;
  depthwise_strip<K, false>(encoded, window + y * row_pitch + (x << t.chunk_shift) + lane, row_pitch, t.chunk,
                            taps + lane);
  if (!active || lane >= h.valid || tile.y0 + y >= t.height) return;
  const A bias = static_cast<const A*>(p.bias)[in_window + lane];
#pragma unroll
  for (int r = 0; r < kPixels; ++r) {
    if (tile.x0 + x + r >= t.width) break;
    const int64_t token = (tile.image * t.height + tile.y0 + y) * t.width + tile.x0 + x + r;
    const A q = read<T>(p.mixed, token * (4 * d) + h.first + lane);
    write<T>(p.out, token * (5 * d) + h.first + lane,
             fused_multiply_add(A(p.scale), attended[r], q * (encoded[r] + bias)));
  }
}

// ---- backward ----

// What a block of attention_backward works on: `count` tokens of one head.
struct HeadTokens {
  int64_t first;  // token of (B, N)
  int64_t problem;
  int head, count;
};

// Shared memory [token][channel] <- value(token, channel).
template <class A, class Value>
LK_DEVICE void stage_head(A* shared, int pitch, int channels, int count, Value value) {
  sync_block();
  for (int i = int(threadIdx.x); i < count * channels; i += kTokenThreads) {
    const int row = i / channels, c = i - row * channels;
    shared[row * pitch + c] = value(row, c);
  }
}

// visit(token, channel, sum) for each number of the product of the staged tokens by weight (k, o).
template <bool DepthFast, class A, class Weight, class Visit>
LK_DEVICE void head_product(A* shared, const AttentionBackwardParams& p, const HeadTokens& h, Weight weight,
                            Visit visit) {
  const ProductThread thread = product_thread(p.columns);
  for (int o0 = 0; o0 < p.head; o0 += p.columns * 4) {
    A acc[4][4] = {};
    multiply<DepthFast>(acc, shared, p.pitch, p.pixels, p.head, min_int(p.columns * 4, p.head - o0),
                        shared + p.stage_offset, thread, [&](int k, int o) { return weight(k, o0 + o); });
#pragma unroll
    for (int a = 0; a < 4; ++a)
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const int row = thread.row + a * thread.rows, c = o0 + thread.column * 4 + b;
        if (row < h.count && c < p.head) visit(row, c, acc[a][b]);
      }
  }
}

// dQ += scale dO G^T; dV += A dG; dK = A * (V dG^T - row sum of dG G).
template <class T>
__global__ void __launch_bounds__(kTokenThreads, sizeof(accumulator_t<T>) == 8 ? 1 : 2)
    attention_backward(const __grid_constant__ AttentionBackwardParams p) {
  using A = accumulator_t<T>;
  A* shared = reinterpret_cast<A*>(dynamic_shared());
  const int d = p.segment, n = p.head;
  HeadTokens h;
  h.head = int(blockIdx.x % 8);
  const int64_t rest = blockIdx.x / 8, image = rest / p.blocks_per_image;
  const int64_t start = (rest - image * p.blocks_per_image) * p.pixels;
  h.first = image * p.tokens + start, h.problem = image * 8 + h.head;
  h.count = int(min_long(p.pixels, p.tokens - start));
  const A *context = static_cast<const A*>(p.context) + h.problem * n * n,
          *grad_context = static_cast<const A*>(p.grad_context) + h.problem * n * n,
          *log_sum = static_cast<const A*>(p.log_sum) + h.problem * n,
          *row_sum = static_cast<const A*>(p.row_sum) + h.problem * n;
  // The product reads channels four at a time and all rows.
  for (int i = int(threadIdx.x); i < p.pixels * p.pitch; i += kTokenThreads) shared[i] = A(0);
  const int64_t all = p.batch * p.tokens;
  const auto at = [&](int part, int row, int c) {
    return (part * all + h.first + row) * (4 * d) + h.head * n + c;
  };
  const auto softmax = [&](int row, int c) {
    return exponential(read<T>(p.mixed, at(1, row, c)) - log_sum[c]);
  };

  stage_head(shared, p.pitch, n, h.count, [&](int row, int c) {
    return A(read<T>(p.grad_out, (h.first + row) * (5 * d) + h.head * n + c));
  });
  head_product<true>(
      shared, p, h, [&](int k, int o) { return context[o * n + k]; },
      [&](int row, int c, A sum) {
        const A before = read<T>(p.grad_mixed, at(0, row, c));
        write<T>(p.grad_mixed, at(0, row, c), fused_multiply_add(A(p.scale), sum, before));
      });
  stage_head(shared, p.pitch, n, h.count, softmax);
  head_product<false>(
      shared, p, h, [&](int k, int o) { return grad_context[k * n + o]; },
      [&](int row, int c, A sum) {
        const A before = read<T>(p.grad_mixed, at(2, row, c));
        write<T>(p.grad_mixed, at(2, row, c), sum + before);
      });
  stage_head(shared, p.pitch, n, h.count, [&](int row, int c) { return A(read<T>(p.mixed, at(2, row, c))); });
  head_product<true>(
      shared, p, h, [&](int k, int o) { return grad_context[o * n + k]; },
      [&](int row, int c, A sum) {
        write<T>(p.grad_mixed, at(1, row, c), softmax(row, c) * (sum - row_sum[c]));
      });
}

}  // namespace lkconv::cuda
