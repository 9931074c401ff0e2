"""Squeeze-and-Excitation (https://arxiv.org/abs/1709.01507), the gate some official blocks may carry."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """``x * sigmoid(up(relu(down(mean(x)))))`` with 1x1 convolutions under the names a family gives them.

    Args:
        channels: C of the (N, C, H, W) input. hidden: channels in between.
        names: attribute names of the two convolutions.
    """

    def __init__(self, channels: int, hidden: int, names: tuple[str, str] = ("down", "up")) -> None:
        super().__init__()
        self.names = names
        self.add_module(names[0], nn.Conv2d(channels, hidden, 1))
        self.add_module(names[1], nn.Conv2d(hidden, channels, 1))

    def forward(self, input: Tensor) -> Tensor:
        gate = input.mean((2, 3), keepdim=True)
        gate = torch.relu(getattr(self, self.names[0])(gate))
        return input * torch.sigmoid(getattr(self, self.names[1])(gate))


def rounded_channels(channels: float, divisor: int) -> int:
    """``channels`` rounded to a multiple of ``divisor``, at least one."""
    return max(divisor, int(channels + divisor / 2) // divisor * divisor)
