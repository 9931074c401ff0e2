"""Fake kernels: sizes, dtypes and strides of the ops' outputs, with symbolic sizes, without data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def fake_kernels() -> tuple[Callable, Callable, Callable]:
    """Fake kernels of forward, backward_input and backward_weight, in this order."""
    return _forward, _backward_input, _backward_weight


def output_size(size: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> tuple[Any, Any]:
    """Height and width of the output of a convolution over ``size``, the input's (height, width)."""
    height, width = (
        (size[i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    return height, width


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The memory format that torch suggests for a 4-D tensor: channels_last only where strides say so.

    The rule of ``c10::TensorImpl`` and of the compiled kernels, so that fake and real strides agree
    where sizes of 1 make the strides ambiguous. A comparison that symbolic sizes leave open counts as
    not taken.
    """
    true = (
        _symbolic_true
        if any(isinstance(v, torch.SymInt) for v in (*tensor.shape, *tensor.stride()))
        else bool
    )
    size, stride = tensor.shape, tensor.stride()
    least: Any = 0
    if true(stride[1] == 0):
        return torch.contiguous_format
    for dim in (1, 3, 2, 0):
        if true(size[dim] == 0) or true(stride[dim] < least) or (dim == 0 and true(stride[1] == least)):
            return torch.contiguous_format
        least = stride[dim] * size[dim] if true(size[dim] > 1) else stride[dim]
    return torch.channels_last


def stacked(input: Tensor, count: int, height: Any, width: Any) -> Tensor:
    """Uninitialised (count, N, C, height, width), each of the count in the memory format of ``input``."""
    n, c = input.shape[:2]
    if memory_format(input) == torch.channels_last:
        return input.new_empty((count, n, height, width, c)).permute(0, 1, 4, 2, 3)
    return input.new_empty((count, n, c, height, width))


def _symbolic_true(condition: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def _empty(size: Sequence[Any], like: Tensor, format: torch.memory_format) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=format)


def _forward(input, weight, bias, stride, padding, dilation):
    size = output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    return _empty((input.shape[0], weight.shape[0], *size), input, memory_format(input))


def _backward_input(grad_output, weight, input_size, stride, padding, dilation):
    return _empty(input_size, grad_output, memory_format(grad_output))


def _backward_weight(grad_output, input, kernel_size, stride, padding, dilation):
    return _empty((grad_output.shape[1], 1, *kernel_size), grad_output, torch.contiguous_format)
