"""RefConv (https://arxiv.org/abs/2310.10563): a frozen kernel refocused by a learned convolution over it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkconv.reparam.algebra import fold_dtype
from lkconv.reparam.block import ReparamBlock, config_of, require
from lkconv.reparam.geometry import Geometry


class RefConv(ReparamBlock):
    """A convolution with the kernel W0 + map(W0), merged into one with that kernel, ``reparam_conv``.

    W0 is the buffer ``weight`` (load the pretrained kernel into it); the map is a convolution ``convmap``
    over the O I / groups two-dimensional kernels as channels. For a depthwise layer it is dense over
    channels.

    Args:
        As ``nn.Conv2d``; padding None means half the kernel. map_k: kernel size of the map, odd, at most
            kernel_size. deploy: build the merged form. There is no bias.

    Raises:
        ValueError: for another map_k, or groups that do not divide the channels.
    """

    merged_name = "reparam_conv"
    merged_bias = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        map_k: int = 3,
        deploy: bool = False,
    ) -> None:
        require(
            map_k % 2 == 1 and map_k <= kernel_size,
            f"map_k must be odd and at most kernel_size {kernel_size}, got {map_k}",
        )
        padding = kernel_size // 2 if padding is None else padding
        super().__init__(in_channels, out_channels, Geometry.make(kernel_size, stride, padding, 1, groups))
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups", "map_k")
        self._config = config_of(locals(), *names)
        self.deploy = deploy
        if deploy:
            self.reparam_conv = self._new_merged_layer()
            return
        kernels = out_channels * in_channels // groups
        self.register_buffer(
            "weight", torch.zeros(out_channels, in_channels // groups, kernel_size, kernel_size)
        )
        map_groups = in_channels * out_channels // groups**2
        self.convmap = nn.Conv2d(kernels, kernels, map_k, padding=map_k // 2, groups=map_groups, bias=False)

    def _training_children(self) -> list[str]:
        return ["weight", "convmap"]

    def _fold(self) -> tuple[Tensor, Tensor]:
        base, mapping = self.weight, self.convmap
        plain = self._are_plain(["convmap"])
        # A map that is called computes in its own precision.
        dtype = fold_dtype(base, mapping.weight) if plain else base.dtype
        with torch.autocast(base.device.type, enabled=False):
            flat = base.to(dtype).reshape(1, -1, *base.shape[2:])
            if plain:
                delta = F.conv2d(flat, mapping.weight.to(dtype), None, 1, mapping.padding, 1, mapping.groups)
            else:
                delta = mapping(flat)
            weight = base.to(dtype) + delta.reshape(base.shape)
        return weight, weight.new_zeros(weight.shape[0])

    def _forward_training(self, input: Tensor) -> Tensor:
        return self._convolve_folded(input)
