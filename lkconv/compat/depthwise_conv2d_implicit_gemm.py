"""The names of the 2022 implicit-GEMM extension, computed by lkconv.

Differences, all towards ``nn.Conv2d``: every dtype, memory format and device that lkconv takes;
autocast decides the layer's dtype; and the layer's ``padding`` is the padding it applies.
"""

from __future__ import annotations

import torch
from torch import Tensor

import lkconv

__all__ = [
    "DepthWiseConv2dImplicitGEMM",
    "_DepthWiseConv2dImplicitGEMMFP16",
    "_DepthWiseConv2dImplicitGEMMFP32",
]


class DepthWiseConv2dImplicitGEMM(lkconv.DepthwiseConv2d):
    """Depthwise convolution of stride 1 whose output has the input's size.

    Args:
        channels: input and output channels.
        kernel: int or pair. An even kernel pads ``kernel // 2`` on the left and one less on the right.
        bias: whether to add a learned bias.
    """

    def __init__(self, channels, kernel, bias=False):
        kernel = (kernel, kernel) if isinstance(kernel, int) else tuple(kernel)
        super().__init__(channels, kernel, padding=tuple(k // 2 for k in kernel), bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        return _crop(super().forward(input), input)


def _crop(output: Tensor, input: Tensor) -> Tensor:
    # Only an even kernel leaves anything to crop: padding k // 2 on both sides makes it one longer.
    return output[..., : input.shape[-2], : input.shape[-1]]


def _apply(input: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    padding = tuple(k // 2 for k in weight.shape[2:])
    with torch.autocast(input.device.type, enabled=False):
        return _crop(lkconv.depthwise_conv2d(input.to(dtype), weight.to(dtype), padding=padding), input)


class _DepthWiseConv2dImplicitGEMMFP32:
    """Differentiable, called as ``.apply(input, weight)``; computes in float32 whatever comes."""

    @staticmethod
    def apply(input: Tensor, weight: Tensor) -> Tensor:
        return _apply(input, weight, torch.float32)


class _DepthWiseConv2dImplicitGEMMFP16:
    """Differentiable, called as ``.apply(input, weight)``; computes in float16 whatever comes."""

    @staticmethod
    def apply(input: Tensor, weight: Tensor) -> Tensor:
        return _apply(input, weight, torch.float16)
