#include <algorithm>
#include <array>
#include <limits>

#include "group_mix_plan.h"

namespace lkconv::cuda {
namespace {

constexpr int kTokenStage = 4096;  // numbers of X and Y that token_product stages at a time
constexpr int kBlocksPerSm = 8;    // blocks that share out work whose partial results are added afterwards

int64_t wide_size(DType dtype) { return dtype == DType::f64 ? 8 : 4; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

int power_of_two_from(int64_t n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

// Channels staged at a time: as few idle lanes as possible, and 8 only where there are no more (16-byte runs
// of a 2-byte type use half of a memory sector).
int best_chunk(int64_t channels) {
  if (channels <= 8) return 8;
  return round_up(channels, 16) < round_up(channels, 32) ? 16 : 32;
}

int shift_of(int chunk) { return chunk == 32 ? 5 : chunk == 16 ? 4 : 3; }

// Threads along the output channels of a product.
int product_columns(int64_t outs) {
  return power_of_two_from(ceil_div(std::min<int64_t>(outs, kOutStep), 4));
}

// Two blocks of a kernel should fit an SM; below 64 pixels the halo costs more than the second block gives.
bool too_much(int64_t bytes, int64_t pixels, const Machine& m) {
  const int64_t half = m.shared_per_sm / 2 - 1024;
  return bytes > m.shared_per_block || (pixels > 64 && bytes > half);
}

// The rectangle of `pixels` (a power of two from 8 on) that needs fewest tiles, then the smallest window.
void shape_tiles(TilePlan& t, const TokenSizes& s, int pixels, int halo) {
  t.height = int(s.height), t.width = int(s.width);
  auto best = std::array<int64_t, 2>{std::numeric_limits<int64_t>::max(), 0};
  for (int width = 8; width <= pixels; width *= 2) {
    const int height = pixels / width;
    const std::array<int64_t, 2> cost = {ceil_div(s.height, height) * ceil_div(s.width, width),
                                         int64_t(height + halo) * (width + halo)};
    if (cost >= best) continue;
    best = cost;
    t.tile_h = height, t.tile_w = width;
  }
  t.tiles_y = int(ceil_div(s.height, t.tile_h)), t.tiles_x = int(ceil_div(s.width, t.tile_w));
}

// No larger than the image needs, and small enough that `blocks` blocks a tile fill the machine.
int fewer_pixels(int pixels, const TokenSizes& s, int64_t blocks, const Machine& m) {
  while (pixels > 64 &&
         (pixels / 2 >= s.height * round_up(s.width, 8) || blocks * ceil_div(s.tokens(), pixels) < 2 * m.sms))
    pixels /= 2;
  return pixels;
}

void share_units(TilePlan& t, int64_t images, int64_t most_splits) {
  t.units = images * t.tiles_y * t.tiles_x;
  t.units_per_split = std::max<int64_t>(1, ceil_div(t.units, std::max<int64_t>(1, most_splits)));
  t.splits = int(ceil_div(t.units, t.units_per_split));
}

int64_t window_elements(const TilePlan& t, int halo) {
  return int64_t(t.tile_h + halo) * (t.tile_w + halo) * t.chunk;
}

}  // namespace

std::string group_mix_limits(const TokenSizes& s) {
  const int64_t most = std::numeric_limits<int>::max() / 2;
  if (s.height > most || s.width > most || s.tokens() > most) return "an image has more than 2^30 tokens";
  return "";
}

Shares share_tokens(int64_t tokens, int64_t blocks_per_split, const Machine& m) {
  const int64_t most = std::max<int64_t>(1, kBlocksPerSm * m.sms / std::max<int64_t>(1, blocks_per_split));
  // Fewer than 256 tokens a block would leave its threads less work than the sums that follow.
  const int64_t splits = std::clamp<int64_t>(tokens / 256, 1, most);
  const int64_t each = std::max<int64_t>(1, ceil_div(tokens, splits));
  return {int(ceil_div(tokens, each)), each};
}

LaunchShape plan_aggregate(AggregateParams& p, const TokenSizes& s, int kind, bool moments, DType dtype,
                           const Machine& m) {
  const int window = kind == kLocalKind ? 3 : 2 * kind + 1;
  const bool local = kind == kLocalKind;
  const int64_t d = s.segment, size = wide_size(dtype);
  p.segment = int(d), p.kind = kind, p.batch = s.batch;
  p.columns = product_columns(d);
  p.pitch = int(round_up(d, 4) + 4);
  p.tiles.chunk = best_chunk(d), p.tiles.chunk_shift = shift_of(p.tiles.chunk);
  // Running moments of every thread's channels, if they leave room for the rest.
  p.keep_moments = moments && !local &&
                   (8 * ceil_div(d, p.columns * 4) + 1) * kTokenThreads * size <= m.shared_per_block / 2;
  const int64_t slots = p.keep_moments ? 8 * ceil_div(d, p.columns * 4) + 1 : 0;
  int64_t elements = 0;
  for (int pixels =
           fewer_pixels(std::min(512, kTokenThreads / p.columns * 4), s, (local ? 1 : 3) * s.batch, m);
       ; pixels /= 2) {
    shape_tiles(p.tiles, s, pixels, window - 1);
    p.mixed_offset = pixels * p.pitch;
    p.stage_offset = p.mixed_offset * (local ? 2 : 1);
    p.window_offset = p.stage_offset + kDepthStep * kOutStep;
    p.taps_offset = p.window_offset + int(window_elements(p.tiles, window - 1));
    p.moment_offset = p.taps_offset + window * window * p.tiles.chunk;
    elements = p.moment_offset + slots * kTokenThreads;
    if (!too_much(elements * size, pixels, m)) break;
    if (pixels > 8) continue;
    if (p.tiles.chunk == 8) break;
    // Even the smallest tile is too large: fewer channels at a time.
    p.tiles.chunk /= 2, p.tiles.chunk_shift -= 1, pixels *= 2;
  }
  const int64_t most = p.keep_moments ? kBlocksPerSm * m.sms : int64_t(1) << 30;
  share_units(p.tiles, local ? s.batch : 3 * s.batch, most);
  return {p.tiles.splits, kTokenThreads, elements * size};
}

LaunchShape plan_mix_backward(MixBackwardParams& p, const TokenSizes& s, int kind, DType dtype,
                              const Machine& m) {
  const int64_t d = s.segment, size = wide_size(dtype);
  const bool local = kind == kLocalKind;
  p.segment = int(d), p.kind = kind, p.inner = int(local ? 3 * d : d);
  p.columns = product_columns(p.inner);
  p.pitch = int(round_up(d, 4) + 4);
  p.tokens = (local ? 1 : 3) * s.batch * s.tokens();
  int64_t elements = 0;
  for (p.pixels = std::min(512, kTokenThreads / p.columns * 4);; p.pixels /= 2) {
    p.stage_offset = p.pixels * p.pitch;
    p.sums_offset = p.stage_offset + kDepthStep * kOutStep;
    elements = p.sums_offset + (local ? kTokenThreads / 32 * 2 * d : 0);
    if (p.pixels == 8 || !too_much(elements * size, p.pixels, m)) break;
  }
  p.blocks_of_tokens = ceil_div(p.tokens, p.pixels);
  p.per_split =
      std::max<int64_t>(1, ceil_div(p.blocks_of_tokens, local ? kBlocksPerSm * m.sms : int64_t(1) << 30));
  return {ceil_div(p.blocks_of_tokens, p.per_split), kTokenThreads, elements * size};
}

LaunchShape plan_depthwise_backward(DepthwiseBackwardParams& p, const TokenSizes& s, int64_t images,
                                    int channels, int groups, int window, DType dtype, const Machine& m) {
  const int64_t size = wide_size(dtype);
  p.batch = s.batch, p.groups = groups, p.channels_per_group = channels / groups;
  p.tiles.chunk = best_chunk(p.channels_per_group), p.tiles.chunk_shift = shift_of(p.tiles.chunk);
  p.chunks_per_group = int(ceil_div(p.channels_per_group, p.tiles.chunk));
  int64_t elements = 0;
  for (int pixels =
           fewer_pixels(kTokenThreads * 8 / p.tiles.chunk, s, images * groups * p.chunks_per_group, m);
       ; pixels /= 2) {
    shape_tiles(p.tiles, s, pixels, window - 1);
    p.window_offset = int(window_elements(p.tiles, window - 1));
    p.taps_offset = 2 * p.window_offset;
    elements = p.taps_offset + window * window * p.tiles.chunk;
    if (pixels == 8 || !too_much(elements * size, pixels, m)) break;
  }
  // The sums over workers take the windows' place.
  const int workers = kTokenThreads / p.tiles.chunk / window;
  elements = std::max<int64_t>(elements, workers * (window * window + 1) * p.tiles.chunk);
  const int64_t chunks = groups * p.chunks_per_group;
  share_units(p.tiles, images, kBlocksPerSm * m.sms / chunks);
  return {p.tiles.splits * chunks, kTokenThreads, elements * size};
}

LaunchShape plan_token_product(TokenProductParams& p, int64_t problems, DType dtype, const Machine& m) {
  const int rows = int(round_up(std::min(p.rows, kOutStep), 4)),
            columns = int(round_up(std::min(p.columns, kOutStep), 4));
  p.row_tiles = int(ceil_div(p.rows, kOutStep)), p.column_tiles = int(ceil_div(p.columns, kOutStep));
  p.tokens_staged = std::clamp(kTokenStage / (rows + columns), 32, 256);
  p.y_offset = p.tokens_staged * rows;
  // Half of the token groups hand 20 numbers a thread to the other half.
  p.max_offset = std::max(p.y_offset + p.tokens_staged * columns, 20 * kTokenThreads);
  const int64_t blocks = problems * p.row_tiles * p.column_tiles;
  const int64_t most = std::max<int64_t>(1, ceil_div(4 * m.sms, std::max<int64_t>(1, blocks)));
  const int64_t splits = std::clamp<int64_t>(ceil_div(p.tokens, 2 * p.tokens_staged), 1, most);
  p.tokens_per_split = std::max<int64_t>(1, ceil_div(p.tokens, splits));
  p.splits = int(ceil_div(p.tokens, p.tokens_per_split));
  return {blocks * p.splits, kTokenThreads, (p.max_offset + kOutStep) * wide_size(dtype)};
}

LaunchShape plan_attention(AttentionParams& p, const TokenSizes& s, int window, DType dtype,
                           const Machine& m) {
  const int64_t size = wide_size(dtype);
  const int head = int(s.segment / 2), heads = window == 3 ? 2 : 3;
  p.batch = s.batch, p.segment = int(s.segment), p.head = head;
  p.first_channel = head * (window == 3 ? 0 : window == 5 ? 2 : 5), p.channels = heads * head;
  p.chunk_heads = std::clamp(32 / head, 1, heads);
  p.tiles.chunk = best_chunk(p.chunk_heads > 1 ? p.chunk_heads * head : head);
  p.tiles.chunk_shift = shift_of(p.tiles.chunk);
  p.chunk_channels = p.chunk_heads > 1 ? p.chunk_heads * head : std::min(head, p.tiles.chunk);
  const int pieces = p.chunk_heads > 1 ? 1 : int(ceil_div(head, p.chunk_channels));
  p.chunks = int(ceil_div(heads, p.chunk_heads)) * pieces;
  p.copies = window == 3 ? int(ceil_div(s.segment, p.tiles.chunk)) : 0;
  p.depth = int(std::min<int64_t>(round_up(head, 4), kDepthStep));
  p.pitch = p.chunk_heads * p.depth + 4;
  int64_t elements = 0;
  for (int pixels = fewer_pixels(kTokenThreads * 8 / p.tiles.chunk, s, s.batch * p.chunks, m);; pixels /= 2) {
    shape_tiles(p.tiles, s, pixels, window - 1);
    p.query_offset = int(window_elements(p.tiles, window - 1));
    p.context_offset = p.query_offset + pixels * p.pitch;
    p.taps_offset = p.context_offset + p.depth * p.tiles.chunk;
    elements = p.taps_offset + window * window * p.tiles.chunk;
    if (pixels == 8 || !too_much(elements * size, pixels, m)) break;
  }
  share_units(p.tiles, s.batch, int64_t(1) << 30);
  return {p.tiles.units * (p.chunks + p.copies), kTokenThreads, elements * size};
}

LaunchShape plan_attention_backward(AttentionBackwardParams& p, const TokenSizes& s, DType dtype,
                                    const Machine& m) {
  const int64_t size = wide_size(dtype), head = s.segment / 2;
  p.batch = s.batch, p.tokens = s.tokens(), p.segment = int(s.segment), p.head = int(head);
  p.columns = product_columns(head);
  p.pitch = int(round_up(head, 4) + 4);
  int64_t elements = 0;
  for (p.pixels = std::min(512, kTokenThreads / p.columns * 4);; p.pixels /= 2) {
    p.stage_offset = p.pixels * p.pitch;
    elements = p.stage_offset + kDepthStep * kOutStep;
    if (p.pixels == 8 || !too_much(elements * size, p.pixels, m)) break;
  }
  while (p.pixels > 64 &&
         (p.pixels / 2 >= p.tokens || 8 * s.batch * ceil_div(p.tokens, p.pixels) < 2 * m.sms))
    p.pixels /= 2;
  p.stage_offset = p.pixels * p.pitch;
  p.blocks_per_image = ceil_div(p.tokens, p.pixels);
  return {s.batch * p.blocks_per_image * 8, kTokenThreads, (p.stage_offset + kDepthStep * kOutStep) * size};
}

}  // namespace lkconv::cuda
