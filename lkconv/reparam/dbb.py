"""Diverse Branch Block (https://arxiv.org/abs/2103.13425): k x k, 1x1, 1x1 then k x k, 1x1 then average."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkconv.reparam.algebra import (
    Branch,
    batch_norm_affine,
    compose_1x1,
    fold_batch_norm,
    fold_dtype,
    identity_kernel,
    merge_kernels,
)
from lkconv.reparam.block import ReparamBlock, batch_norm, config_of, conv_bn, require
from lkconv.reparam.convolution import make_layer
from lkconv.reparam.geometry import Geometry


class IdentityBasedConv1x1(nn.Conv2d):
    """A 1x1 convolution that stores its deviation from the identity: zeros at the start."""

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__(channels, channels, 1, groups=groups, bias=False)
        nn.init.zeros_(self.weight)

    def get_actual_kernel(self) -> Tensor:
        """(channels, channels / groups, 1, 1), the stored weight plus the identity."""
        identity = identity_kernel(self.in_channels, self.groups, 1, self.weight.device, self.weight.dtype)
        return self.weight + identity

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.get_actual_kernel(), None, groups=self.groups)


class BNAndPadLayer(nn.Module):
    """Batch norm, then a border of what it maps zero to, by running statistics and without gradient.

    A k x k convolution after it then sees everywhere what a 1x1 convolution and batch norm make of zero
    padding, which is what lets both merge into one zero-padded convolution.
    """

    def __init__(self, pad_pixels: int, num_features: int, affine: bool = True) -> None:
        super().__init__()
        self.bn: Any = batch_norm(num_features, affine)
        self.pad_pixels = pad_pixels

    def forward(self, input: Tensor) -> Tensor:
        output = self.bn(input)
        if self.pad_pixels == 0:
            return output
        bn = self.bn
        with torch.no_grad():
            _, value = batch_norm_affine(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
            inside = F.pad(output.new_ones(1, 1, *output.shape[2:]), [self.pad_pixels] * 4)
            border = (1 - inside) * value.to(output.dtype).reshape(1, -1, 1, 1)
        return F.pad(output, [self.pad_pixels] * 4) + border


class DiverseBranchBlock(ReparamBlock):
    """Four parallel branches, each ending in batch norm, merged into one k x k convolution ``dbb_reparam``.

    Training form: ``dbb_origin.{conv,bn}``; ``dbb_1x1.{conv,bn}`` (unless depthwise);
    ``dbb_1x1_kxk.{idconv1 or conv1,bn1,conv2,bn2}``; ``dbb_avg.{conv,bn,avg,avgbn}`` (depthwise: avg and
    avgbn).

    Args:
        As ``nn.Conv2d``; padding is kernel_size // 2 of an odd kernel and dilation is 1.
        internal_channels_1x1_3x3: channels inside the 1x1 - k x k branch; by default in_channels, twice that
            for a depthwise block.
        deploy: build the merged form. nonlinear: module applied to the sum. single_init: start as dbb_origin
            alone.

    Raises:
        ValueError: for another dilation, kernel size or padding, groups that do not divide the channels, or a
            depthwise block (groups >= out_channels) with in_channels other than out_channels.
    """

    merged_name = "dbb_reparam"
    plain_types = (IdentityBasedConv1x1, BNAndPadLayer)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        internal_channels_1x1_3x3: int | None = None,
        deploy: bool = False,
        nonlinear: nn.Module | None = None,
        single_init: bool = False,
    ) -> None:
        require(dilation == 1, f"dilation must be 1, got {dilation}")
        require(
            kernel_size % 2 == 1 and padding == kernel_size // 2,
            f"padding must be half an odd kernel, got kernel_size {kernel_size}, padding {padding}",
        )
        depthwise = groups >= out_channels
        require(
            not depthwise or in_channels == out_channels,
            f"a depthwise block needs in_channels == out_channels, got {in_channels} and {out_channels}",
        )
        target = Geometry.make(kernel_size, stride, padding, 1, groups)
        super().__init__(in_channels, out_channels, target)
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups")
        self._config = config_of(locals(), *names, "internal_channels_1x1_3x3")
        self.deploy, self.kernel_size, self.groups = deploy, kernel_size, groups
        self.nonlinear = nn.Identity() if nonlinear is None else nonlinear
        if deploy:
            self.dbb_reparam = self._new_merged_layer()
            return
        middle = internal_channels_1x1_3x3 or (2 * in_channels if depthwise else in_channels)
        self.dbb_origin = conv_bn(in_channels, out_channels, target)
        self._build_average(depthwise)
        if not depthwise:
            self.dbb_1x1 = conv_bn(in_channels, out_channels, Geometry.make(1, stride, groups=groups))
        self._build_1x1_kxk(middle)
        if single_init:
            self.single_init()

    def _build_average(self, depthwise: bool) -> None:
        target, out = self._target, self.out_channels
        k, padding = target.kernel_size[0], target.padding[0]
        self.dbb_avg: Any = nn.Sequential()
        if not depthwise:
            point = Geometry((1, 1), groups=target.groups)
            self.dbb_avg.add_module("conv", make_layer(self.in_channels, out, point, bias=False))
            self.dbb_avg.add_module("bn", BNAndPadLayer(padding, out))
        self.dbb_avg.add_module("avg", nn.AvgPool2d(k, target.stride, padding if depthwise else 0))
        self.dbb_avg.add_module("avgbn", batch_norm(out))

    def _build_1x1_kxk(self, middle: int) -> None:
        target = self._target
        self.dbb_1x1_kxk: Any = nn.Sequential()
        if middle == self.in_channels:
            self.dbb_1x1_kxk.add_module("idconv1", IdentityBasedConv1x1(middle, target.groups))
        else:
            point = Geometry((1, 1), groups=target.groups)
            self.dbb_1x1_kxk.add_module("conv1", make_layer(self.in_channels, middle, point, bias=False))
        self.dbb_1x1_kxk.add_module("bn1", BNAndPadLayer(target.padding[0], middle))
        unpadded = Geometry(target.kernel_size, target.stride, groups=target.groups)
        self.dbb_1x1_kxk.add_module("conv2", make_layer(middle, self.out_channels, unpadded, bias=False))
        self.dbb_1x1_kxk.add_module("bn2", batch_norm(self.out_channels))

    def _training_children(self) -> list[str]:
        return ["dbb_origin", "dbb_avg", "dbb_1x1", "dbb_1x1_kxk"]

    def _fold_1x1_kxk(self) -> tuple[Tensor, Tensor]:
        chain = self.dbb_1x1_kxk
        first = chain.idconv1.get_actual_kernel() if hasattr(chain, "idconv1") else chain.conv1.weight
        first, first_bias = fold_batch_norm(first, None, chain.bn1.bn)
        second, second_bias = fold_batch_norm(chain.conv2.weight, None, chain.bn2)
        return compose_1x1(first, first_bias, second, second_bias, self.groups)

    def _fold_average(self) -> tuple[Tensor, Tensor]:
        k, dtype = self.kernel_size, fold_dtype(self.dbb_avg.avgbn.running_var)
        device = self.dbb_avg.avgbn.running_var.device
        average = (
            identity_kernel(self.out_channels, self.groups, 1, device, dtype).expand(-1, -1, k, k) / k**2
        )
        second, second_bias = fold_batch_norm(average, None, self.dbb_avg.avgbn)
        if not hasattr(self.dbb_avg, "conv"):
            return second, second_bias
        first, first_bias = fold_batch_norm(self.dbb_avg.conv.weight, None, self.dbb_avg.bn.bn)
        return compose_1x1(first, first_bias, second, second_bias, self.groups)

    def _fold(self) -> tuple[Tensor, Tensor]:
        target = self._target
        folded = [
            ("dbb_origin", target, fold_batch_norm(self.dbb_origin.conv.weight, None, self.dbb_origin.bn)),
            ("dbb_1x1_kxk", target, self._fold_1x1_kxk()),
            ("dbb_avg", target, self._fold_average()),
        ]
        if hasattr(self, "dbb_1x1"):
            point = Geometry((1, 1), target.stride, groups=target.groups)
            folded.append(
                ("dbb_1x1", point, fold_batch_norm(self.dbb_1x1.conv.weight, None, self.dbb_1x1.bn))
            )
        branches = [Branch(weight, geometry, None, bias, name) for name, geometry, (weight, bias) in folded]
        return merge_kernels(branches, target)

    def _forward_training(self, input: Tensor) -> Tensor:
        # The border has no gradient by definition, but would have one when folded: fold without gradients.
        if not torch.is_grad_enabled() and self._runs_folded():
            return self._convolve_folded(input)
        out = self.dbb_origin(input) + self.dbb_avg(input) + self.dbb_1x1_kxk(input)
        return out + self.dbb_1x1(input) if hasattr(self, "dbb_1x1") else out

    def forward(self, input: Tensor) -> Tensor:
        return self.nonlinear(self.linear_forward(input))

    def init_gamma(self, gamma_value: float) -> None:
        """Set the gamma of every branch's last batch norm."""
        last = [self.dbb_origin.bn, self.dbb_avg.avgbn, self.dbb_1x1_kxk.bn2]
        if hasattr(self, "dbb_1x1"):
            last.append(self.dbb_1x1.bn)
        for bn in last:
            nn.init.constant_(bn.weight, gamma_value)

    def single_init(self) -> None:
        """Start as dbb_origin alone: its gamma 1, all others 0."""
        self.init_gamma(0.0)
        nn.init.constant_(self.dbb_origin.bn.weight, 1.0)
