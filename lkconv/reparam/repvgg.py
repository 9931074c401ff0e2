"""RepVGG (https://arxiv.org/abs/2101.03697): 3x3, 1x1 and identity branches, each with batch norm."""

from __future__ import annotations

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
