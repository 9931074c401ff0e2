"""``DepthwiseConv2d``: an ``nn.Conv2d`` that computes with :func:`lkconv.depthwise_conv2d`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkconv._validate import pair
from lkconv.functional import depthwise_conv2d


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise 2-D convolution layer; an ``nn.Conv2d`` with ``groups == in_channels == channels``.

    Same ``weight`` (C*m, 1, kh, kw), ``bias`` (C*m,), initialisation, attributes and ``state_dict`` as
    the ``nn.Conv2d`` it stands for, so checkpoints and everything that looks for ``nn.Conv2d`` keep
    working.

    Args:
        channels: input channels C.
        kernel_size, stride, dilation: int or pair.
        padding: int, pair, ``"same"`` or ``"valid"``.
        bias: whether to add a learned bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        channel_multiplier: output channels per input channel, m.
        device, dtype: of the parameters.

    Shapes: input (N, C, H, W) or (C, H, W) -> (N, C*m, H', W') or (C*m, H', W').

    Raises:
        TypeError, ValueError: as :func:`lkconv.depthwise_conv2d`, on construction and on call.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        channel_multiplier: int = 1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        channels, multiplier = _count("channels", channels), _count("channel_multiplier", channel_multiplier)
        super().__init__(
            channels,
            channels * multiplier,
            pair("kernel_size", kernel_size, 1),
            pair("stride", stride, 1),
            padding if isinstance(padding, str) else pair("padding", padding, 0),
            pair("dilation", dilation, 1),
            channels,
            bias,
            padding_mode,  # type: ignore[arg-type]  # nn.Conv2d checks it
            device,
            dtype,
        )

    @property
    def channel_multiplier(self) -> int:
        """Output channels per input channel."""
        return self.out_channels // self.in_channels

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode == "zeros":
            return depthwise_conv2d(input, weight, bias, self.stride, self.padding, self.dilation)
        padded = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return depthwise_conv2d(padded, weight, bias, self.stride, 0, self.dilation)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}", f"kernel_size={self.kernel_size}"]
        defaults = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
        parts += [f"{name}={getattr(self, name)}" for name, d in defaults.items() if getattr(self, name) != d]
        if self.bias is None:
            parts.append("bias=False")
        if self.padding_mode != "zeros":
            parts.append(f"padding_mode={self.padding_mode}")
        if self.channel_multiplier != 1:
            parts.append(f"channel_multiplier={self.channel_multiplier}")
        return ", ".join(parts)


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {value!r} ({type(value).__name__})")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")
    return value
