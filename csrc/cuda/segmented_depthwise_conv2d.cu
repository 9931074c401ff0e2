// lkconv::segmented_depthwise_conv2d on CUDA devices: the launches of lkconv::depthwise_conv2d, one for each
// slice of the channels, into slices of one output.
#include "../segmented_arguments.h"
#include "depthwise_conv2d.h"
#include "run.h"
#include "stream_executor.h"

namespace lkconv::cuda {
namespace {

Tensor op_segmented(const Tensor& input, const OptionalTensors& weights, const OptionalTensors& biases,
                    const std::vector<int64_t>& splits) {
  SegmentedCall call = segmented_call(input, weights, biases, splits, true);
  const Switches s = switches_for(dtype_of(input));
  run_segments(call, [&s](const OpCall& c) {
    StreamExecutor e(c.output);  // of its own: the next segment may have its workspace
    ForwardProblem f = forward_problem(c.p);
    f.input = c.first, f.weight = c.second, f.bias = c.bias, f.output = c.out;
    run_forward(e, f, s);
  });
  return call.output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lkconv, CUDA, m) { m.impl("segmented_depthwise_conv2d", TORCH_BOX(&op_segmented)); }

}  // namespace lkconv::cuda
