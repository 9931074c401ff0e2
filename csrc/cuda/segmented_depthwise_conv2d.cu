// lkconv::segmented_depthwise_conv2d on CUDA devices: the launches of lkconv::depthwise_conv2d, one for each
// slice of the channels, into slices of one output.
#include "../aten_convolution.h"
#include "../segmented_arguments.h"
#include "depthwise_conv2d.h"
#include "run.h"
#include "stream_executor.h"

namespace lkconv::cuda {
namespace {

Tensor op_segmented(const Tensor& input, const OptionalTensors& weights, const OptionalTensors& biases,
                    const std::vector<int64_t>& splits) {
  SegmentedCall call = segmented_call(input, weights, biases, splits, true);
  const Switches switches = switches_for(dtype_of(input));
  run_segments(call, [&switches](Segment& s) {
    OpCall& c = *s.convolution;
    StreamExecutor e(c.output);  // of its own: the next segment may have its workspace
    ForwardProblem f = forward_problem(c.p);
    f.input = c.first, f.weight = c.second, f.bias = c.bias, f.output = c.out;
    try {
      run_forward(e, f, switches);
    } catch (const NoKernel&) {
      const Tensor result =
          aten_forward(c, s.input, *s.weight, s.bias, kOnes, same_padding(*s.weight), kOnes);
      torch::stable::copy_(s.output, result);
    }
  });
  return call.output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lkconv, CUDA, m) { m.impl("segmented_depthwise_conv2d", TORCH_BOX(&op_segmented)); }

}  // namespace lkconv::cuda
