"""``lkconv_triton::segmented_depthwise_conv2d``: slices of the input into slices of one output."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .depthwise_conv2d import empty_output, run_conv
from .problem import forward_problem

ONES = (1, 1)


def segmented_depthwise_conv2d(
    input: Tensor, weights: Sequence[Tensor | None], biases: Sequence[Tensor | None], splits: Sequence[int]
) -> Tensor:
    """Stride 1 and "same" padding on slices of the channels; see ``lkconv.segmented_depthwise_conv2d``."""
    output = empty_output(input.shape, input)
    if output.numel() == 0:
        return output
    slices = zip(input.split(splits, dim=1), weights, biases, output.split(splits, dim=1), strict=True)
    for x, w, b, y in slices:
        if w is None:
            y.copy_(x)
        elif w.numel() > 0:
            padding = (w.size(2) // 2, w.size(3) // 2)
            problem = forward_problem(
                x.shape, x.stride(), w.shape, w.stride(), y.stride(), ONES, padding, ONES
            )
            run_conv(problem, x, w, b if b is None else b.contiguous(), y)
    return output
