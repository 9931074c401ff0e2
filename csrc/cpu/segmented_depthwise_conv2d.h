// lkconv::segmented_depthwise_conv2d on channels_last tensors: all slices of a pixel share its cache lines.
// No torch here; segmented_depthwise_conv2d_ops.cpp binds it to tensors.
#pragma once

#include <vector>

#include "depthwise_conv2d.h"

namespace lkconv::cpu {

// One slice of the channels, from a view of the input to a view of the output: a convolution, or a copy where
// the weight has no data.
struct ChannelSlice {
  ConvParams p;
  TensorView input, weight, bias, output;
};

// Fills every slice of a channels_last output, slices that lie side by side in order, all slices of a block
// of rows or images before the next block. False, and nothing done, for other layouts, for tall strips, whose
// rows are columns of the blocks, and where there are too few blocks for every thread.
bool convolve_slices(const std::vector<ChannelSlice>& slices, const Machine& m, const ParallelFor& parallel);

}  // namespace lkconv::cpu
