// Tiles and shares of the Group-Mix kernels: pure functions of sizes, dtype and machine.
#pragma once

#include "../problem.h"
#include "group_mix_params.h"
#include "planner.h"

namespace lkconv::cuda {

// Sizes of one call: `segment` is d = C / 5; a head has d / 2 channels.
struct TokenSizes {
  int64_t batch, height, width, segment;
  int64_t tokens() const { return height * width; }
};

// Each fills in the fields of `p` that depend on the plan and returns the launch.
LaunchShape plan_aggregate(AggregateParams& p, const TokenSizes& s, int kind, bool moments, DType dtype,
                           const Machine& m);
LaunchShape plan_mix_backward(MixBackwardParams& p, const TokenSizes& s, int kind, DType dtype,
                              const Machine& m);
// `images` of `channels` in `groups`.
LaunchShape plan_depthwise_backward(DepthwiseBackwardParams& p, const TokenSizes& s, int64_t images,
                                    int channels, int groups, int window, DType dtype, const Machine& m);
// rows and columns of the product are set before.
LaunchShape plan_token_product(TokenProductParams& p, int64_t problems, DType dtype, const Machine& m);
LaunchShape plan_attention(AttentionParams& p, const TokenSizes& s, int window, DType dtype,
                           const Machine& m);
LaunchShape plan_attention_backward(AttentionBackwardParams& p, const TokenSizes& s, DType dtype,
                                    const Machine& m);

// Equal shares of `tokens` for kernels whose blocks take 32 channels: (splits, tokens a split).
struct Shares {
  int splits;
  int64_t tokens;
};
Shares share_tokens(int64_t tokens, int64_t blocks_per_split, const Machine& m);

// Why the kernels cannot index these sizes, or "".
std::string group_mix_limits(const TokenSizes& s);

}  // namespace lkconv::cuda
