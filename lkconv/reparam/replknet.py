"""RepLKNet (https://arxiv.org/abs/2203.06717): a large and a small depthwise kernel, merged into one."""

from __future__ import annotations

from lkconv.reparam.block import BranchSumBlock, config_of, conv_bn, require
from lkconv.reparam.branches import ConvBN
from lkconv.reparam.geometry import Geometry


class ReparamLargeKernelConv(BranchSumBlock):
    """``bn(conv K x K) + bn(conv k x k)``, merged into one K x K convolution with bias.

    Training form: ``lkb_origin.{conv,bn}`` and, unless small_kernel is None, ``small_conv.{conv,bn}``; merged
    form: ``lkb_reparam``. Padding is half the kernel, so a stride-1 block keeps the map's size.

    Args:
        in_channels, out_channels, groups: of both convolutions; depthwise when all three agree.
        kernel_size: K, odd. stride: of both.
        small_kernel: k <= K, odd, or None for the large kernel alone.
        small_kernel_merged: build the merged form.

    Raises:
        ValueError: if the small kernel exceeds the large one or their sizes differ in parity, or the groups
            do not divide the channels.
    """

    merged_name = "lkb_reparam"
    deploy_flag = "small_kernel_merged"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        groups: int,
        small_kernel: int | None,
        small_kernel_merged: bool = False,
    ) -> None:
        target = Geometry.make(kernel_size, stride, kernel_size // 2, 1, groups)
        super().__init__(in_channels, out_channels, target)
        self._config = config_of(
            locals(), "in_channels", "out_channels", "kernel_size", "stride", "groups", "small_kernel"
        )
        self.kernel_size, self.small_kernel = kernel_size, small_kernel
        self.small_kernel_merged = small_kernel_merged
        if small_kernel is not None:
            require(
                small_kernel <= kernel_size and (kernel_size - small_kernel) % 2 == 0,
                f"small_kernel must be at most {kernel_size} and of its parity, got {small_kernel}",
            )
        if small_kernel_merged:
            self.lkb_reparam = self._new_merged_layer()
            return
        self.lkb_origin = conv_bn(in_channels, out_channels, target)
        if small_kernel is not None:
            small = Geometry.make(small_kernel, stride, small_kernel // 2, 1, groups)
            self.small_conv = conv_bn(in_channels, out_channels, small)

    def _training_children(self) -> list[str]:
        return ["lkb_origin", "small_conv"]

    def _parts(self) -> list[ConvBN]:
        names = [name for name in self._training_children() if name in self._modules]
        return [ConvBN.of(name, getattr(self, name)) for name in names]
