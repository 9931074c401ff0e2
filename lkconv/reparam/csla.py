"""RepOptimizers' linear block (https://arxiv.org/abs/2205.15242): scaled branches, one norm after."""

from __future__ import annotations

from typing import NamedTuple

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
from lkconv.reparam.block import ReparamBlock, batch_norm, config_of, require
from lkconv.reparam.branches import run_merged
from lkconv.reparam.convolution import make_layer
from lkconv.reparam.geometry import Geometry
from lkconv.reparam.squeeze_excite import SqueezeExcite


class ScaleLayer(nn.Module):
    """A factor per channel, ``weight`` (O,)."""

    def __init__(self, num_features: int, scale_init: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((num_features,), float(scale_init)))

    def forward(self, input: Tensor) -> Tensor:
        return input * self.weight.reshape(1, -1, 1, 1)


class ScaledKernels(NamedTuple):
    """What RepOptimizer needs: per branch its scale (O,), its geometry, whether it is an identity."""

    scales: list[Tensor]
    geometries: list[Geometry]
    identities: list[bool]


class LinearAddBlock(ReparamBlock):
    """``relu(se(bn(a3 conv 3x3 + a1 conv 1x1 + a0 x)))``, merged into one convolution ``reparam_conv``.

    Training form: ``conv``, ``scale_conv``, ``conv_1x1``, ``scale_1x1``, ``scale_identity`` (if in_channels
    equals out_channels and the stride is 1), ``bn``. No branch is normalised, so it runs merged while
    training too.

    Args:
        As ``nn.Conv2d``; kernel_size is odd, padding half the dilated kernel.
        use_se: a squeeze-and-excitation gate before the activation.
        is_csla: constant scales (no gradient). conv_scale_init: initial a3 and a1.
        deploy: build the merged form.

    Raises:
        ValueError: for another kernel size or padding, a padding mode other than zeros, or groups that do not
            divide the channels.
    """

    merged_name = "reparam_conv"
    plain_types = (ScaleLayer,)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        use_se: bool = False,
        is_csla: bool = False,
        conv_scale_init: float = 1.0,
        deploy: bool = False,
    ) -> None:
        require(padding_mode == "zeros", f"padding_mode must be 'zeros' to merge, got {padding_mode!r}")
        require(
            kernel_size % 2 == 1 and 2 * padding == dilation * (kernel_size - 1),
            f"padding must be half the dilated odd kernel, got kernel_size {kernel_size}, padding {padding}",
        )
        target = Geometry.make(kernel_size, stride, padding, dilation, groups)
        super().__init__(in_channels, out_channels, target)
        names = (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "use_se",
        )
        self._config = config_of(locals(), *names)
        self.deploy, self.is_csla = deploy, is_csla
        self.relu = nn.ReLU()
        self.se = SqueezeExcite(out_channels, out_channels // 16) if use_se else nn.Identity()
        if deploy:
            self.reparam_conv = self._new_merged_layer()
            return
        point = Geometry((1, 1), target.stride, groups=groups)
        self.conv = make_layer(in_channels, out_channels, target, bias=False)
        self.scale_conv = ScaleLayer(out_channels, conv_scale_init)
        self.conv_1x1 = make_layer(in_channels, out_channels, point, bias=False)
        self.scale_1x1 = ScaleLayer(out_channels, conv_scale_init)
        if in_channels == out_channels and stride == 1:
            self.scale_identity = ScaleLayer(out_channels)
        self.bn = batch_norm(out_channels)
        if is_csla:
            self.scale_conv.requires_grad_(False)
            self.scale_1x1.requires_grad_(False)

    def _training_children(self) -> list[str]:
        return ["conv", "scale_conv", "conv_1x1", "scale_1x1", "scale_identity", "bn"]

    def _branches(self) -> list[Branch]:
        point = identity_geometry(self._target)
        found = [
            Branch(self.conv.weight, self._target, self.scale_conv.weight, None, "conv"),
            Branch(self.conv_1x1.weight, point, self.scale_1x1.weight, None, "conv_1x1"),
        ]
        if hasattr(self, "scale_identity"):
            like = self.conv.weight
            weight = identity_kernel(self.in_channels, self._target.groups, 1, like.device, like.dtype)
            found.append(Branch(weight, point, self.scale_identity.weight, None, "identity"))
        return found

    def scaled_kernels(self) -> ScaledKernels:
        """Scales and placements for :func:`lkconv.reparam.gradient_multipliers`, without gradient."""
        branches = self._branches()
        return ScaledKernels(
            [b.scale.detach() for b in branches if b.scale is not None],
            [b.geometry for b in branches],
            [b.name == "identity" for b in branches],
        )

    def _fold(self) -> tuple[Tensor, Tensor]:
        branches = self._branches()
        weight, _ = merge_kernels(branches, self._target, fold_dtype(branches[0].weight))
        return fold_batch_norm(weight, None, self.bn)

    def _forward_training(self, input: Tensor) -> Tensor:
        if self._runs_folded():
            return self._convolve_folded(input)
        if self._are_plain([name for name in self._training_children() if name != "bn"]):
            return self.bn(run_merged(input, self._branches(), self._target, self.out_channels))
        out = self.scale_conv(self.conv(input)) + self.scale_1x1(self.conv_1x1(input))
        return self.bn(out + self.scale_identity(input) if hasattr(self, "scale_identity") else out)

    def forward(self, input: Tensor) -> Tensor:
        return self.relu(self.se(self.linear_forward(input)))
