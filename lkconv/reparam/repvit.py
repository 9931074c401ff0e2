"""RepViT (https://arxiv.org/abs/2307.09283): depthwise k x k + 1x1 + identity, then one batch norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lkconv.reparam.algebra import (
    Branch,
    fold_batch_norm,
    fold_dtype,
    identity_geometry,
    identity_kernel,
    merge_kernels,
)
from lkconv.reparam.block import ReparamBlock, batch_norm, config_of, conv_bn, require
from lkconv.reparam.convolution import make_layer
from lkconv.reparam.geometry import Geometry


class RepVGGDW(ReparamBlock):
    """``bn(bn(conv k x k) + conv 1x1 + x)``, depthwise, merged into one convolution ``reparam_conv``.

    Training form: ``conv.{c,bn}``, ``conv1`` (with bias) and ``bn``; with ``legacy`` ``conv1.{c,bn}`` and no
    batch norm after the sum.

    Args:
        ed: channels. kernel_size: odd. legacy: the first published form. deploy: build the merged form.

    Shapes: (N, ed, H, W) to the same.

    Raises:
        ValueError: for an even kernel.
    """

    merged_name = "reparam_conv"

    def __init__(self, ed: int, kernel_size: int = 3, legacy: bool = False, deploy: bool = False) -> None:
        require(kernel_size % 2 == 1, f"kernel_size must be odd, got {kernel_size}")
        target = Geometry.make(kernel_size, 1, kernel_size // 2, 1, ed)
        super().__init__(ed, ed, target)
        self._config = config_of(locals(), "ed", "kernel_size", "legacy")
        self.dim, self.legacy, self.deploy = ed, legacy, deploy
        if deploy:
            self.reparam_conv = self._new_merged_layer()
            return
        self.conv = conv_bn(ed, ed, target, ("c", "bn"))
        point = Geometry((1, 1), groups=ed)
        if legacy:
            self.conv1: Any = conv_bn(ed, ed, point, ("c", "bn"))
            self.bn: Any = nn.Identity()
        else:
            self.conv1 = make_layer(ed, ed, point, bias=True)
            self.bn = batch_norm(ed)

    def _training_children(self) -> list[str]:
        return ["conv", "conv1", "bn"]

    def _fold(self) -> tuple[Tensor, Tensor]:
        weight, bias = fold_batch_norm(self.conv.c.weight, self.conv.c.bias, self.conv.bn)
        if self.legacy:
            point, point_bias = fold_batch_norm(self.conv1.c.weight, self.conv1.c.bias, self.conv1.bn)
        else:
            point, point_bias = self.conv1.weight, self.conv1.bias
        pixel = identity_geometry(self._target)
        identity = identity_kernel(self.dim, self.dim, 1, weight.device, weight.dtype)
        branches = [
            Branch(weight, self._target, None, bias, "conv"),
            Branch(point, pixel, None, point_bias, "conv1"),
            Branch(identity, pixel, None, None, "identity"),
        ]
        weight, bias = merge_kernels(branches, self._target, fold_dtype(weight, point))
        return (weight, bias) if self.legacy else fold_batch_norm(weight, bias, self.bn)

    def _forward_training(self, input: Tensor) -> Tensor:
        if self._runs_folded():
            return self._convolve_folded(input)
        return self.bn(self.conv(input) + self.conv1(input) + input)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The merged layer itself, for code that replaces the block by it (the name in RepViT)."""
        self.reparameterize()
        return self.reparam_conv
