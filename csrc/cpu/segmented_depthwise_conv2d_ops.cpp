// Binds depthwise convolutions of slices of the channels to torch tensors through the stable ABI.
#include "../segmented_arguments.h"
#include "op_support.h"
#include "segmented_depthwise_conv2d.h"

namespace lkconv::cpu {
namespace {

ChannelSlice slice_of(const Segment& s) {
  if (s.convolution) {
    const OpCall& c = *s.convolution;
    return {c.p, c.first, c.second, c.bias, c.out};
  }
  ConvParams p{};
  p.batch = s.input.size(0), p.channels = s.input.size(1), p.height = s.input.size(2),
  p.width = s.input.size(3);
  return {p, view_of(s.input, false), {}, {}, view_of(s.output, true)};
}

// By the kernels here alone: the planner leaves no slice to PyTorch's own convolution, which would copy it.
Tensor op_segmented(const Tensor& input, const OptionalTensors& weights, const OptionalTensors& biases,
                    const std::vector<int64_t>& splits) {
  SegmentedCall call = segmented_call(input, weights, biases, splits, false);
  const Machine m = machine();
  std::vector<ChannelSlice> slices;
  for (const Segment& s : call.segments) slices.push_back(slice_of(s));
  if (!convolve_slices(slices, m, parallel))
    run_segments(call, [&m](const Segment& s) {
      const OpCall& c = *s.convolution;
      depthwise_conv2d(c.p, c.first, c.second, c.bias, c.out, m, parallel);
    });
  return call.output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lkconv, CPU, m) { m.impl("segmented_depthwise_conv2d", TORCH_BOX(&op_segmented)); }

}  // namespace lkconv::cpu
