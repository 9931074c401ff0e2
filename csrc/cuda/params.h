// What the planner tells the kernels: one plain struct per kernel, filled once on the host.
#pragma once

#include <cstdint>

#include "../conv_params.h"

namespace lkconv::cuda {

// A tensor as kernels see it: address and element strides.
struct GlobalView {
  void* data;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

// A divisor known before the launch. A division by it is a multiplication and a shift, where one by any other
// number is some 25 instructions: see divided_by in tile_io.cuh.
struct LaunchDivisor {
  uint32_t multiplier;
  int divisor, shift;
};

// For d from 1 to 2^30.
inline LaunchDivisor divisor_of(int64_t d) {
  int shift = 0;
  while ((int64_t(1) << shift) < d) ++shift;
  const uint64_t multiplier = (uint64_t((int64_t(1) << shift) - d) << 32) / uint64_t(d) + 1;
  return {uint32_t(multiplier), int(d), shift};
}

// How the threads of a block share out the vectors of a window's rows: `lanes` threads take a row, and each
// keeps its column.
struct WindowWalk {
  LaunchDivisor by_lanes, by_rows;  // threads of a row; most rows of an image
  int step, step_images;            // rows that all threads take together, and whole images of rows
  int vector_bytes;                 // of one copy: 16, 8, 4, or 2 for plain loads
};

// ---- direct ----

constexpr int kStrip = 8;            // outputs of one row per thread
constexpr int kDirectThreads = 256;  // most threads of a block

struct DirectForwardParams {
  int batch, channels, height, width, out_height, out_width;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  int channel_div, channel_mul, reduce;
  GlobalView input, weight, output, bias;  // weight: (channel, u, v); bias: by stride_c, or null
  // the tile; a block walks over several images of it
  int tile_channels, tile_h, tile_w, tiles_y, tiles_x, channel_groups, images_per_block, image_groups;
  int chunk_h, chunk_w, weight_pitch;  // taps staged at a time: all of them but for enormous kernels
  int strips, row_groups;              // threads per row: ceil(tile_w / kStrip); and per column
  int planes;                          // of the window: neighbouring outputs may share an input channel
  int align, row_pitch,
      plane_pitch;  // of the window in shared memory; its first column is a multiple of align
  int window_offset, output_offset;            // in elements: the window follows the weights, and outputs it
  int one_chunk;                               // holds all taps of all products: the weights stay
  int by_channels, input_lanes, output_lanes;  // how to stage: see tile_io.cuh
  int store_bytes;  // of one store from registers: 16, 8, or 0: through shared memory
  WindowWalk walk;
  LaunchDivisor by_strips, by_row_groups, by_tiles_x, by_tiles_y, by_channel_groups, by_image_groups,
      by_channel_div;
  LaunchDivisor by_weight_pitch, by_chunk_h, by_dil_h;
};

// Output rows of one thread in the kernels of a fixed width: their windows overlap, so that 5 rows of inputs
// serve 3 rows of a 3x3 kernel. Odd, so that neighbouring threads' rows meet different banks.
constexpr int kFixedRows = 3;
constexpr int kFixedThreads = kDirectThreads / 2;  // each computes two strips, one after the other

// Kernel widths that have their own instantiation, and 3x3 at a stride of 2; others take kAnyWidth, or
// kStrided when a stride or dilation along the row is not 1.
enum : int { kThreeStride2 = -2, kStrided = -1, kAnyWidth = 0 };
constexpr bool is_fixed(int width_class) { return width_class > 0 || width_class == kThreeStride2; }

struct DirectWeightParams {
  int batch, channels, height, width, out_height, out_width;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  int channel_div;
  GlobalView input, grad_output;
  void* partial;  // accumulators: (splits, channels, kernel_h, kernel_w)
  // the tile: images x rows x columns of grad_output, for some channels and tap groups
  int tile_channels, tile_images, tile_h, tile_w, tiles_n, tiles_y, tiles_x, channel_groups;
  int chunk_rows, chunk_groups;  // tap groups (kStrip taps of a row) of a block: rows x groups of a row
  int chunks_h, chunks_w;
  int row_workers;  // threads per tap group
  int splits, tiles_per_split;
  int align, row_pitch, plane_pitch;  // of the input window
  int grad_pitch, grad_plane;         // of grad_output's tile
  int grad_offset;                    // in elements: grad_output follows the window
  int by_channels, input_lanes, output_lanes;
  WindowWalk walk, grad_walk;
  LaunchDivisor by_splits, by_chunks, by_chunks_w, by_tiles_x, by_tiles_y, by_channel_div;
  LaunchDivisor by_chunk_groups, by_chunk_rows, by_row_workers, by_rows, by_last_rows;
};

struct ReduceSplitsParams {
  const void* partial;  // accumulators: (splits, channels, kernel_h, kernel_w)
  GlobalView grad_weight;
  int channels, kernel_h, kernel_w, splits;
};

// ---- toeplitz ----

constexpr int kTileRows = 16;       // M of one mma
constexpr int kTileCols = 8;        // N of one mma
constexpr int kBandGuard = 32;      // elements around all kernel rows, where unused fragments are loaded from
constexpr int kBandLead = 24;       // zeros before a kernel row: a band tile reaches at most 22 taps outside
constexpr int kColumnsAligned = 8;  // where a window may begin: copies and ldmatrix take 16 bytes at a time
constexpr int kToeplitzThreads = 256;

struct ToeplitzForwardParams {
  int batch, channels, height, width, out_height, out_width;
  int kernel_h, kernel_w, stride_h, pad_h, pad_w, dil_h, dil_w;  // stride_w is 1
  int channel_div, channel_mul, reduce;
  GlobalView input, weight, output, bias;
  // the tile: images x rows of output, all of `NT` * 8 columns; a block walks over tiles of one channel
  int tile_images, tile_h, tiles_n, tiles_y, tiles_x;
  int tiles_per_block, blocks_per_channel;
  int image_major;  // M runs over images first (rows of one M tile share y), else over y first
  int store_pairs;  // neighbouring columns of the output may be stored as one: rows are even and aligned
  int input_rows;   // most rows of a window that lie in the image
  int rows_above, rows_below;  // rows of zeros beside them
  int window_cols;             // most columns of a window
  int row_pitch, image_pitch;
  WindowWalk walk;
  int band_pitch;                 // elements of one padded kernel row
  int stage_offset, stage_bytes;  // shared memory, in bytes
  LaunchDivisor by_tiles_x, by_blocks_per_channel, by_tiles_y, by_reduce, by_channel_div, by_dil_h, by_dil_w;
  LaunchDivisor by_fast,
      by_last_fast;  // what M runs over first: images, or rows of a tile and of the last one
  LaunchDivisor by_outside, by_warps;  // rows of zeros of an image; warps of a block
};

constexpr int kToeplitzWeightThreads = 512;

struct ToeplitzWeightParams {
  int batch, channels, height, width, out_height, out_width;
  int kernel_h, kernel_w, stride_h, pad_h, pad_w, dil_h, dil_w;  // stride_w is 1
  int channel_div;
  GlobalView input, grad_output;
  float* partial;  // (splits * workers * diagonal_chunks, channels, kernel_h, kernel_w)
  int tile_images, tile_h, tile_w, tiles_n, tiles_y, tiles_x;  // of grad_output; tile_w is a multiple of 16
  int splits, tiles_per_split;
  int row_groups, row_chunks;  // warps per block that own different kernel rows; chunks of kernel rows
  int workers;                 // warps that own the same rows and share the depth
  int first_diagonal, diagonal_chunks;      // block diagonal d holds s - x in [8 d - 7, 8 d + 15]
  int window_cols, row_pitch, image_pitch;  // of the input window
  int grad_pitch, grad_image_pitch;
  WindowWalk walk, grad_walk;
  int table_offset, zero_offset, stage_offset, grad_offset, stage_bytes;  // shared memory, in bytes
  LaunchDivisor by_splits, by_diagonal_chunks, by_row_chunks, by_tiles_x, by_tiles_y, by_channel_div;
  LaunchDivisor by_row_groups, by_rows, by_last_rows;  // rows of a tile, and of the last one of an image
};

// ---- pack ----

constexpr int kPackTile = 32, kPackThreads = 256;

struct PackParams {
  int batch, channels, height, width;
  GlobalView from, to;
  int from_channels_fast, to_channels_fast;  // which index consecutive threads should take
  int channel_tiles, pixel_tiles;
  int few_pixels;  // an image's pixels can be counted in 31 bits
  LaunchDivisor by_channel_tiles, by_pixel_tiles, by_width;
};

// ---- merge ----

constexpr int kMergeThreads = 128;
constexpr int kMergeBranches = 24;  // of one launch: with as many biases they fill 3 of the 4 KB of arguments

struct MergeBranchParams {
  const void* weight;  // (channel, u, v)
  int64_t stride_c, stride_h, stride_w;
  const void* scale;  // or null
  int64_t scale_stride;
  void *grad_weight, *grad_scale;  // contiguous; grad_scale or null
  int kernel_h, kernel_w, offset_h, offset_w, step_h, step_w;
  DType weight_dtype, scale_dtype;
};

struct MergeVectorParams {
  void* data;
  int64_t stride;
  DType dtype;
};

struct MergeParams {
  int64_t channels;
  int kernel_h, kernel_w;
  void* kernel;   // (channels, kernel_h, kernel_w) without gaps: the fold's result, or its gradient
  void* partial;  // accumulators, where the branches take several launches
  MergeVectorParams bias;
  DType kernel_dtype;
  bool first, last;  // of the launches that sum up one kernel
  int branch_count, bias_count;
  MergeBranchParams branches[kMergeBranches];
  MergeVectorParams biases[kMergeBranches];
};
static_assert(sizeof(MergeParams) <= 4096, "more than a kernel's arguments may take");

}  // namespace lkconv::cuda
