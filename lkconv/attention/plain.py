"""Which convolutions the fused ops may stand for: what a user put in their place must run as it is.

This runs in every call. Submodules and parameters are read from their dictionaries: as attributes, each costs
half a microsecond.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .._hooks import is_plain
from ..modules import DepthwiseConv2d


def _geometry(conv: nn.Module) -> tuple:
    # From its dictionary, where Dynamo reads them too; it does not know operator.itemgetter.
    s = conv.__dict__
    return (
        s["in_channels"], s["out_channels"], s["groups"],
        s["kernel_size"], s["stride"], s["padding"], s["dilation"], s["padding_mode"],
    )  # fmt: skip


def _same_padding(kernel_size: int) -> tuple:
    return (kernel_size,) * 2, (1, 1), (kernel_size // 2,) * 2, (1, 1), "zeros"


_SAME_PADDING = {k: _same_padding(k) for k in (1, 3, 5, 7)}


def is_plain_depthwise(conv: Any, channels: int, kernel_size: int, bias: bool) -> bool:
    """Whether calling ``conv`` is a depthwise k x k convolution with "same" padding and nothing else."""
    return (
        is_plain(conv, nn.Conv2d, DepthwiseConv2d)
        and _geometry(conv) == (channels, channels, channels, *_SAME_PADDING[kernel_size])
        and (conv._parameters.get("bias") is not None) == bias
    )


def is_plain_pointwise(conv: Any, in_channels: int, out_channels: int) -> bool:
    """Whether calling ``conv`` is a 1 x 1 convolution without bias and nothing else."""
    return (
        is_plain(conv, nn.Conv2d)
        and _geometry(conv) == (in_channels, out_channels, 1, *_SAME_PADDING[1])
        and conv._parameters.get("bias") is None
    )
