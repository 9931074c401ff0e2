"""The ops of this package in PyTorch's own convolution, for calls that Triton cannot compile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lkconv import reference, reference_group_mix, reference_merge
from lkconv._fake import memory_format


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    output = reference.depthwise_conv2d(input, weight, bias, stride, padding, dilation)
    return output.contiguous(memory_format=memory_format(input))


def depthwise_conv2d_backward_input(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    shape_alone = grad_output.new_empty(1).expand(input_size)
    grads = _backward(grad_output, shape_alone, weight, stride, padding, dilation, 0)
    return grads[0].contiguous(memory_format=memory_format(grad_output))


def depthwise_conv2d_backward_weight(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    shape_alone = input.new_empty(1).expand(grad_output.size(1), 1, *kernel_size)
    grads = _backward(grad_output, input, shape_alone, stride, padding, dilation, 1)
    return grads[1].contiguous()


def _backward(grad_output, input, weight, stride, padding, dilation, which):
    """ATen's gradients (input, weight, bias); ``which`` of them to compute."""
    wanted = [i == which for i in range(3)]
    groups = input.size(1)
    geometry = (list(stride), list(padding), list(dilation), False, [0, 0], groups)
    return torch.ops.aten.convolution_backward(grad_output, input, weight, None, *geometry, wanted)


def segmented_depthwise_conv2d(
    input: Tensor, weights: Sequence[Tensor | None], biases: Sequence[Tensor | None], splits: Sequence[int]
) -> Tensor:
    output = reference_group_mix.segmented_depthwise_conv2d(input, weights, biases, splits)
    return output.contiguous(memory_format=memory_format(input))


def merge_depthwise_kernels(*args):
    # An op's outputs must not share memory with its inputs or with each other, as here single biases do.
    return tuple(t.clone() for t in reference_merge.merge_depthwise_kernels(*args))


def merge_depthwise_kernels_backward(*args):
    gradients = reference_merge.merge_depthwise_kernels_backward(*args)
    return tuple([t.clone() for t in group] for group in gradients)
