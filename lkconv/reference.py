"""Every op in plain PyTorch: the specification, the oracle of the tests and the last fallback.

In float64 on the CPU these are what every backend is measured against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lkconv._validate import pair
from lkconv.reference_group_mix import (  # noqa: F401
    group_mix_aggregate,
    group_mix_attention,
    segmented_depthwise_conv2d,
)
from lkconv.reference_merge import (  # noqa: F401
    merge_depthwise_kernels,
    merge_depthwise_kernels_backward,
    scaled_channel_sum,
)


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
) -> Tensor:
    """``F.conv2d`` with one group per input channel; the signature of :func:`lkconv.depthwise_conv2d`."""
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups=input.shape[-3])


def depthwise_conv2d_backward_input(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
) -> Tensor:
    """Gradient of :func:`depthwise_conv2d` for its input, of size ``input_size`` (N, C, H, W).

    The adjoint of a convolution is the transposed convolution with the same weight. The rows and
    columns that no window reaches, because of the stride, get zero.
    """
    stride, padding, dilation = (
        pair("stride", stride, 1),
        pair("padding", padding, 0),
        pair("dilation", dilation, 1),
    )
    # What the stride left over at the bottom and right: transposing alone would not restore it.
    rest = [
        input_size[2 + i]
        - (
            (grad_output.shape[2 + i] - 1) * stride[i]
            - 2 * padding[i]
            + dilation[i] * (weight.shape[2 + i] - 1)
            + 1
        )
        for i in (0, 1)
    ]
    return F.conv_transpose2d(grad_output, weight, None, stride, padding, rest, input_size[1], dilation)


def depthwise_conv2d_backward_weight(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
) -> Tensor:
    """Gradient of :func:`depthwise_conv2d` for its weight, (C*m, 1, kh, kw).

    Tap (u, v) of output channel c*m + j multiplies one strided view of the padded input's channel c:
    ``dw[c*m+j, u, v] = sum_nhw dy[n, c*m+j, h, w] * x[n, c, h*sh + u*dh - ph, w*sw + v*dw - pw]``.
    """
    stride, padding, dilation = (
        pair("stride", stride, 1),
        pair("padding", padding, 0),
        pair("dilation", dilation, 1),
    )
    channels, (out_h, out_w) = input.shape[1], grad_output.shape[2:]
    padded = F.pad(input, (padding[1], padding[1], padding[0], padding[0]))
    grads = grad_output.unflatten(1, (channels, grad_output.shape[1] // channels))
    rows = []
    for u in range(kernel_size[0]):
        top = u * dilation[0]
        for v in range(kernel_size[1]):
            left = v * dilation[1]
            seen = padded[
                :,
                :,
                top : top + (out_h - 1) * stride[0] + 1 : stride[0],
                left : left + (out_w - 1) * stride[1] + 1 : stride[1],
            ]
            rows.append((grads * seen.unsqueeze(2)).sum((0, 3, 4)).flatten())
    return torch.stack(rows, 1).reshape(grad_output.shape[1], 1, *kernel_size)
