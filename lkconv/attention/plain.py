"""Which convolutions the fused ops may stand for: what a user put in their place must run as it is."""

from __future__ import annotations

from typing import Any

from torch import nn

from .._hooks import is_plain
from ..modules import DepthwiseConv2d


def _geometry(conv: Any) -> tuple:
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode


def is_plain_depthwise(conv: Any, channels: int, kernel_size: int, bias: bool) -> bool:
    """Whether calling ``conv`` is a depthwise k x k convolution with "same" padding and nothing else."""
    return (
        is_plain(conv, nn.Conv2d, DepthwiseConv2d)
        and conv.in_channels == conv.out_channels == conv.groups == channels
        and _geometry(conv) == ((kernel_size,) * 2, (1, 1), (kernel_size // 2,) * 2, (1, 1), "zeros")
        and (conv.bias is not None) == bias
    )


def is_plain_pointwise(conv: Any, in_channels: int, out_channels: int) -> bool:
    """Whether calling ``conv`` is a 1 x 1 convolution without bias and nothing else."""
    return (
        is_plain(conv, nn.Conv2d)
        and (conv.in_channels, conv.out_channels, conv.groups) == (in_channels, out_channels, 1)
        and _geometry(conv) == ((1, 1), (1, 1), (0, 0), (1, 1), "zeros")
        and conv.bias is None
    )
