"""RepVGG (https://arxiv.org/abs/2101.03697): 3x3, 1x1 and identity branches, each with batch norm.

Two classes: the original names, and those of the PyTorch Image Models library.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lkconv.reparam.block import BranchSumBlock, batch_norm, config_of, conv_bn, require
from lkconv.reparam.branches import ConvBN
from lkconv.reparam.geometry import Geometry
from lkconv.reparam.squeeze_excite import SqueezeExcite


class RepVGGBlock(BranchSumBlock):
    """``relu(se(bn(conv 3x3) + bn(conv 1x1) + bn(x)))``, merged into one 3x3 convolution with bias.

    Training form: ``rbr_dense.{conv,bn}``, ``rbr_1x1.{conv,bn}`` and ``rbr_identity`` (None unless
    in_channels equals out_channels and the stride is 1); merged form: ``rbr_reparam``.

    Args:
        As ``nn.Conv2d``; kernel_size is 3 and padding equals dilation. deploy: build the merged form.
        use_se: a squeeze-and-excitation gate before the activation.

    Raises:
        ValueError: for another kernel size or padding, a padding mode other than zeros, or groups that do not
            divide the channels.
    """

    merged_name = "rbr_reparam"

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
        deploy: bool = False,
        use_se: bool = False,
    ) -> None:
        require(kernel_size == 3, f"kernel_size must be 3, got {kernel_size}")
        require(padding == dilation, f"padding must equal dilation {dilation}, got {padding}")
        require(padding_mode == "zeros", f"padding_mode must be 'zeros' to merge, got {padding_mode!r}")
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
        self.deploy, self.groups = deploy, groups
        self.nonlinearity = nn.ReLU()
        self.se = SqueezeExcite(out_channels, out_channels // 16) if use_se else nn.Identity()
        if deploy:
            self.rbr_reparam = self._new_merged_layer()
            return
        has_identity = in_channels == out_channels and stride == 1
        self.rbr_identity = batch_norm(in_channels) if has_identity else None
        self.rbr_dense = conv_bn(in_channels, out_channels, target)
        self.rbr_1x1 = conv_bn(in_channels, out_channels, Geometry.make(1, stride, groups=groups))

    def _training_children(self) -> list[str]:
        return ["rbr_dense", "rbr_1x1", "rbr_identity"]

    def _parts(self) -> list[ConvBN]:
        parts = [ConvBN.of(name, getattr(self, name)) for name in ("rbr_dense", "rbr_1x1")]
        if self.rbr_identity is not None:
            parts.append(ConvBN("rbr_identity", None, self.rbr_identity))
        return parts

    def forward(self, input: Tensor) -> Tensor:
        return self.nonlinearity(self.se(self.linear_forward(input)))


class TimmRepVGGBlock(BranchSumBlock):
    """``act(attn(bn(conv k x k) + bn(conv 1x1) + bn(x)))`` under the names of timm's ``RepVggBlock``.

    Training form: ``conv_kxk.{conv,bn}``, ``conv_1x1.{conv,bn}`` and ``identity`` (None unless in_chs equals
    out_chs, the stride is 1 and both dilations agree); merged form: ``reparam_conv``.

    Args:
        in_chs, out_chs, kernel_size, stride: as ``nn.Conv2d``; kernel_size is odd, padding half the dilated
            kernel. dilation: of the k x k branch is the first of the pair.
        group_size: input channels per group; 0 or None for a dense convolution, 1 for a depthwise one.
        bottle_ratio, downsample: accepted for timm's signature, unused as there.
        layers: timm's ``LayerFn``; its ``act`` and ``attn`` are used. None: ReLU.
        drop_block, drop_path_rate: must be None and 0. inference_mode: build the merged form.

    Raises:
        ValueError: for an even kernel, a drop layer, or groups that do not divide the channels.
    """

    merged_name = "reparam_conv"
    deploy_flag = "inference_mode"

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: tuple[int, int] = (1, 1),
        bottle_ratio: float = 1.0,
        group_size: int | None = None,
        downsample: str = "",
        layers: Any = None,
        drop_block: Any = None,
        drop_path_rate: float = 0.0,
        inference_mode: bool = False,
    ) -> None:
        require(kernel_size % 2 == 1, f"kernel_size must be odd, got {kernel_size}")
        require(drop_block is None, f"drop_block must be None to merge, got {drop_block!r}")
        require(drop_path_rate == 0, f"drop_path_rate must be 0 to merge, got {drop_path_rate}")
        groups = in_chs // group_size if group_size else 1
        padding = dilation[0] * (kernel_size - 1) // 2
        super().__init__(in_chs, out_chs, Geometry.make(kernel_size, stride, padding, dilation[0], groups))
        names = ("in_chs", "out_chs", "kernel_size", "stride", "dilation", "group_size", "layers")
        self._config = config_of(locals(), *names)
        self.groups, self.inference_mode = groups, inference_mode
        if inference_mode:
            self.reparam_conv = self._new_merged_layer()
        else:
            has_identity = in_chs == out_chs and stride == 1 and dilation[0] == dilation[1]
            self.identity = batch_norm(out_chs) if has_identity else None
            self.conv_kxk = conv_bn(in_chs, out_chs, self._target)
            self.conv_1x1 = conv_bn(in_chs, out_chs, Geometry.make(1, stride, groups=groups))
        attention = getattr(layers, "attn", None)
        self.attn = nn.Identity() if attention is None else attention(out_chs)
        self.act = nn.ReLU() if layers is None else layers.act(inplace=True)

    def _training_children(self) -> list[str]:
        return ["conv_kxk", "conv_1x1", "identity"]

    def _parts(self) -> list[ConvBN]:
        parts = [ConvBN.of(name, getattr(self, name)) for name in ("conv_kxk", "conv_1x1")]
        if self.identity is not None:
            parts.append(ConvBN("identity", None, self.identity))
        return parts

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.attn(self.linear_forward(input)))
