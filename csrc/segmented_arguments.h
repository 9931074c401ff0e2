// What lkconv::segmented_depthwise_conv2d does with its arguments on every device: the segments of the
// channels as convolutions from a slice of the input to a slice of the output. Arguments were validated in
// Python; the checks here guard memory safety alone.
#pragma once

#include "op_arguments.h"

namespace lkconv {

using OptionalTensors = std::vector<std::optional<Tensor>>;

inline void check_segments(const Tensor& input, const OptionalTensors& weights, const OptionalTensors& biases,
                           const std::vector<int64_t>& splits, bool cuda) {
  check_same_place(input, input, cuda);
  STD_TORCH_CHECK(input.dim() == 4, "lkconv: input must be a 4-D tensor");
  STD_TORCH_CHECK(biases.size() == weights.size() && splits.size() == weights.size(),
                  "lkconv: expected one bias (or None) and one split for each weight");
  int64_t rest = input.size(1);
  for (size_t s = 0; s < splits.size(); ++s) {
    STD_TORCH_CHECK(splits[s] >= 0 && splits[s] <= rest, "lkconv: splits must sum to the input's channels");
    STD_TORCH_CHECK(weights[s] || !biases[s], "lkconv: a segment without a weight has no bias");
    rest -= splits[s];
  }
  STD_TORCH_CHECK(rest == 0, "lkconv: splits must sum to the input's channels");
}

// One slice of the channels: a convolution where it has a weight, else a copy.
struct Segment {
  Tensor input, output;
  std::optional<Tensor> weight, bias;
  std::optional<OpCall> convolution;
};

// Of the convolutions, whose outputs are as large as their inputs: stride and dilation, and the padding.
inline const std::vector<int64_t> kOnes{1, 1};
inline std::vector<int64_t> same_padding(const Tensor& weight) {
  return {weight.size(2) / 2, weight.size(3) / 2};
}

struct SegmentedCall {
  Tensor output;  // in input's memory format
  std::vector<Segment> segments;
};

// The convolution of one segment, stride 1 and "same" padding, from `input` into `output`, which are slices.
inline OpCall segment_call(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                           const Tensor& output, bool cuda) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == input.size(1) && weight.size(2) % 2 == 1 &&
                      weight.size(3) % 2 == 1,
                  "lkconv: a segment's weight must be (split, 1, kh, kw) with an odd window");
  OpCall c = forward_call(input, weight, bias, kOnes, same_padding(weight), kOnes, cuda);
  c.output = output;
  c.out = view_of(output, true);
  return c;
}

inline SegmentedCall segmented_call(const Tensor& input, const OptionalTensors& weights,
                                    const OptionalTensors& biases, const std::vector<int64_t>& splits,
                                    bool cuda) {
  check_segments(input, weights, biases, splits, cuda);
  Tensor whole = input;  // narrow asks for a tensor that it may change
  SegmentedCall c{empty_like_format({input.size(0), input.size(1), input.size(2), input.size(3)}, input,
                                    suggested_format(input)),
                  {}};
  int64_t first = 0;
  for (size_t s = 0; s < splits.size(); ++s) {
    Segment segment{torch::stable::narrow(whole, 1, first, splits[s]),
                    torch::stable::narrow(c.output, 1, first, splits[s]), weights[s], biases[s],
                    std::nullopt};
    if (weights[s])
      segment.convolution = segment_call(segment.input, *weights[s], biases[s], segment.output, cuda);
    if (segment.output.numel() > 0) c.segments.push_back(segment);
    first += splits[s];
  }
  return c;
}

// One segment after the other, by convolve(segment).
template <class Convolve>
void run_segments(SegmentedCall& c, Convolve convolve) {
  for (Segment& s : c.segments) {
    if (s.convolution)
      convolve(s);
    else
      torch::stable::copy_(s.output, s.input);
  }
}

}  // namespace lkconv
