// What the launchers tell the Group-Mix kernels (GroupMixFormer, arXiv 2311.15157): one plain struct per
// kernel. Tensors are token-major: qkv (B, N, 3, 5, d), mixed (3, B, N, 4d), premix (3, B, N, 3d), local and
// prelocal (B, N, d). `T` is the tensors' type, `A` the one accumulated in, in which parameters arrive.
#pragma once

#include <cstdint>

namespace lkconv::cuda {

constexpr int kTokenThreads = 256;  // threads of every Group-Mix block
constexpr int kDepthStep = 32;      // terms of a product that are staged at a time
constexpr int kOutStep = 64;        // most columns of a product that a block forms at a time
constexpr int kLanes = 32, kLaneRows = kTokenThreads / kLanes;
constexpr int kMostJobs = 32, kPackBlocks = 16;
constexpr int kLocalKind = 4;  // the non-attention branch

// How images are cut into tiles of pixels, and tiles shared out: block `split` does units
// [split * units_per_split, ...), unit = image * tiles + tile.
struct TilePlan {
  int height, width;
  int tile_h, tile_w, tiles_y, tiles_x;  // tile_w is a multiple of 8: a thread's strip
  int chunk, chunk_shift;                // channels staged at a time: 8, 16 or 32
  int64_t units, units_per_split;
  int splits;
};

// ---- parameters ----

// Copies parameters of any floating type to one array of A.
struct PackJob {
  const void* from;
  int dtype, count, to;
};
struct PackParametersParams {
  PackJob jobs[kMostJobs];
  int count;
  void* out;
};

// BatchNorm as rows of 4d numbers: scale, shift, slope, offset, mean, 1 / sigma, such that A = scale U +
// shift and dU = scale dA + slope U + offset.
enum : int { kScale, kShift, kSlope, kOffset, kMean, kInverse, kNormRows };
struct FoldNormsParams {
  const void *weight, *bias, *mean, *var;  // (4, d), A
  const double* sums;                      // (2, 4, d), or null: statistics are fixed
  void* out;                               // (kNormRows, 4d), A
  int channels;                            // 4d
  double eps, count;
};

// Sums partial results of splits, in their order.
struct ReduceJob {
  const void* partial;  // (splits, count), A
  void* out;
  int splits, count;
  int wide;  // whether `out` is double, else A
  int first_block;
};
struct ReduceSumsParams {
  ReduceJob jobs[kMostJobs];
  int count;
};

// ---- aggregation ----

struct AggregateParams {
  TilePlan tiles;
  const void* qkv;
  void *mixed, *premix, *prelocal, *local;  // mixed is null in the mixing pass, premix in the fused one
  void* moments;                            // (splits, 3, d), A: count, mean, squares; or null
  const void *depthwise, *pointwise;        // (d or 3d, k * k), (d, d or 3d)
  const void *scale, *shift;                // (d)
  const void *norm_weight, *norm_bias;      // of the LayerNorm
  double norm_eps;
  int64_t batch;
  int segment, kind;
  int columns;  // threads along output channels
  int pitch;    // of a pixel's channels in shared memory
  int keep_moments;
  int pairs, quads;  // whether channels may be read two and written four at a time
  int write_u;       // U to premix, instead of its activation to mixed
  int mixed_offset, stage_offset, window_offset, taps_offset, moment_offset;  // in elements of A
};

struct SegmentMomentsParams {
  const void *qkv, *premix;  // U of segment 0 is qkv itself
  void* moments;             // (splits, 3, d)
  int64_t tokens;            // 3 * B * N, part by part
  int64_t part_tokens, tokens_per_split;
  int segment, kind, chunks, splits;
};

struct ReduceMomentsParams {
  const void* moments[4];  // (splits, 3, d) of each segment
  int splits[4];
  void *mean, *var;  // (4, d)
  int segment, chunks;
};

// Elementwise work on (3, B, N, 4d), or on its first d channels alone.
struct NormalizeParams {
  const void *qkv, *premix;
  void* mixed;
  const void* norms;
  int64_t tokens, part_tokens;
  int segment, channels;  // channels: 4d, or d for segment 0 alone
  int tokens_per_block;
};

struct BackwardReduceParams {
  const void *grad_mixed, *qkv, *premix, *norms;
  void* partial;  // (splits, 2, 4d)
  int64_t tokens, part_tokens, tokens_per_split;
  int segment, chunks, splits;
};

struct SegmentBackwardParams {
  const void *grad_mixed, *qkv, *norms;
  void* grad_qkv;
  int64_t tokens, part_tokens;
  int segment, tokens_per_block;
};

// dU from the activation's gradient, and dT = P^T dU.
struct MixBackwardParams {
  const void *grad_mixed, *premix, *norms;            // kinds 1 to 3
  const void *grad_local, *prelocal, *layer_norm[2];  // kind 4
  double norm_eps;
  int64_t local_stride;
  const void* pointwise;  // (d, inner)
  void *grad_u, *grad_t;  // (tokens, d), (tokens, inner)
  void* partial;          // (splits, 2, d): LayerNorm's weight and bias
  int64_t tokens, blocks_of_tokens, per_split;
  int segment, kind, inner, columns, pixels, pitch, quads;
  int stage_offset, sums_offset;
};

// Depthwise convolution, backward: of the aggregation (the gradient of T is given; T is computed again) or of
// the position encoding (the gradient is dO * Q, and dO * E is added to dQ's).
struct DepthwiseBackwardParams {
  TilePlan tiles;
  const void *grad, *factor, *input;  // factor: Q, or null
  void *grad_input, *product;
  const void *weight, *bias;            // (channels, k * k), (channels); bias: position encoding only
  void *partial_weight, *partial_bias;  // (splits, channels, k * k), (splits, channels)
  int64_t grad_stride, factor_stride, input_stride, grad_input_stride, product_stride;  // of tokens
  // Image m is image m % batch of part m / batch. Channels come in `groups` of `channels_per_group`. In
  // `input` and `grad_input` parts and groups lie part_stride and group_stride apart; elsewhere images follow
  // each other, and so do groups.
  int64_t batch, part_stride, group_stride;
  int channels_per_group, groups, chunks_per_group, pairs;
  int window_offset, taps_offset;
};

// ---- attention ----

struct ColumnMaxParams {
  const void* keys;  // (B, N, 4d)
  void* partial;     // (B, splits, 4d)
  int64_t tokens, tokens_per_split;
  int channels, chunks, splits;
};

// partial[problem, split, i, j] = sum over tokens of X[n, i] Y[n, j], with X or exp(X - max).
struct TokenProductParams {
  const void *x, *y;
  void* partial;
  void* partial_sum;                             // of exp(X - max): (problems, splits, rows), or null
  const void* maxima;                            // (B, max_splits, channels), or null
  int64_t x_stride, y_stride, x_image, y_image;  // of tokens, of images
  int x_head, y_head, heads;                     // distance of heads; problem = image * heads + head
  int64_t tokens, tokens_per_split;
  int rows, columns, splits, row_tiles, column_tiles;
  int tokens_staged, y_offset, max_offset;
  int max_splits, max_channels;
};

struct ContextParams {
  const void *partial, *partial_sum, *maxima;
  void *log_sum, *context;
  int head, splits, max_splits;
};

struct GradContextParams {
  const void *partial, *context;
  void *grad_context, *row_sum;
  double scale;
  int head, splits;
};

struct AttentionParams {
  TilePlan tiles;
  const void *mixed, *local, *context;
  void* out;
  const void *weight, *bias;  // of the window's channels
  double scale;
  int64_t batch;
  int segment, head;
  int first_channel, channels;              // of the window
  int chunk_channels, chunk_heads, chunks;  // whole heads a block, or 1 head cut into pieces
  int copies;                               // blocks per tile that copy `local`
  int pairs;
  int depth, pitch;  // channels of q staged at a time; of a pixel of q
  int query_offset, context_offset, taps_offset;
};

struct AttentionBackwardParams {
  const void *grad_out, *mixed, *context, *grad_context, *row_sum, *log_sum;
  void* grad_mixed;  // holds dO * E as q's gradient and the position encoding's as v's
  double scale;
  int64_t batch, tokens;
  int segment, head, columns, pixels, pitch, stage_offset;
  int64_t blocks_per_image;
};

}  // namespace lkconv::cuda
