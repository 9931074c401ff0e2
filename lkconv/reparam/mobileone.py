"""MobileOne (https://arxiv.org/abs/2206.04040): several k x k branches, a 1x1 and the identity.

Two classes with one body: the original names, and those of the PyTorch Image Models library.
"""

from __future__ import annotations

from torch import Tensor, nn

from lkconv.reparam.block import BranchSumBlock, batch_norm, config_of, conv_bn, require
from lkconv.reparam.branches import ConvBN
from lkconv.reparam.geometry import Geometry
from lkconv.reparam.squeeze_excite import SqueezeExcite, rounded_channels


class _MobileOneBody(BranchSumBlock):
    """num_conv_branches x bn(conv k x k) + bn(conv 1x1) + bn(x), under the names of a subclass."""

    merged_name = "reparam_conv"
    deploy_flag = "inference_mode"
    kxk_name, scale_name, skip_name = "rbr_conv", "rbr_scale", "rbr_skip"

    def _build(self, num_conv_branches: int, use_scale_branch: bool) -> None:
        target = self._target
        channels = (self.in_channels, self.out_channels)
        has_skip = self.in_channels == self.out_channels and target.stride == (1, 1)
        kxk = [conv_bn(*channels, target) for _ in range(num_conv_branches)]
        scale = None
        if max(target.kernel_size) > 1 and use_scale_branch:
            scale = conv_bn(*channels, Geometry((1, 1), target.stride, groups=target.groups))
        require(bool(kxk) or has_skip or scale is not None, "a block without any branch computes nothing")
        setattr(self, self.skip_name, batch_norm(self.in_channels) if has_skip else None)
        setattr(self, self.kxk_name, nn.ModuleList(kxk) if kxk else None)
        setattr(self, self.scale_name, scale)

    def _training_children(self) -> list[str]:
        return [self.kxk_name, self.scale_name, self.skip_name]

    def _parts(self) -> list[ConvBN]:
        kxk, scale, skip = (getattr(self, name) for name in self._training_children())
        parts = [ConvBN.of(f"{self.kxk_name}.{i}", pair) for i, pair in enumerate(kxk or [])]
        if scale is not None:
            parts.append(ConvBN.of(self.scale_name, scale))
        if skip is not None:
            parts.append(ConvBN(self.skip_name, None, skip))
        return parts


class MobileOneBlock(_MobileOneBody):
    """The original names: ``rbr_conv.{n}``, ``rbr_scale``, ``rbr_skip``; merged ``reparam_conv``.

    Args:
        As ``nn.Conv2d``, padding half the dilated kernel. inference_mode: build the merged form.
        use_se: squeeze-and-excitation before the activation. num_conv_branches: number of k x k branches.

    Raises:
        ValueError: for another padding, groups that do not divide the channels, or a block without any
            branch.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        inference_mode: bool = False,
        use_se: bool = False,
        num_conv_branches: int = 1,
    ) -> None:
        require(
            2 * padding == dilation * (kernel_size - 1),
            f"padding must be half the dilated kernel, {dilation * (kernel_size - 1) / 2}, got {padding}",
        )
        super().__init__(
            in_channels, out_channels, Geometry.make(kernel_size, stride, padding, dilation, groups)
        )
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        self._config = config_of(locals(), *names, "use_se", "num_conv_branches")
        self.inference_mode, self.num_conv_branches = inference_mode, num_conv_branches
        hidden = int(out_channels * 0.0625)
        self.se = SqueezeExcite(out_channels, hidden, ("reduce", "expand")) if use_se else nn.Identity()
        self.activation = nn.ReLU()
        if inference_mode:
            self.reparam_conv = self._new_merged_layer()
        else:
            self._build(num_conv_branches, use_scale_branch=True)

    def forward(self, input: Tensor) -> Tensor:
        return self.activation(self.se(self.linear_forward(input)))


class FastViTMobileOneBlock(_MobileOneBody):
    """The block as FastViT uses it: ``conv_kxk.{n}``, ``conv_scale``, ``identity``; merged ``reparam_conv``.

    Args:
        in_chs, out_chs, kernel_size, stride, dilation: as ``nn.Conv2d``; padding is half the dilated kernel.
        group_size: input channels per group; 0 for a dense convolution, 1 for a depthwise one.
        inference_mode: build the merged form. use_se, use_act, act_layer: what follows the convolution.
        use_scale_branch: the 1x1 branch. num_conv_branches: number of k x k branches, possibly 0.

    Raises:
        ValueError: if the groups do not divide the channels, or for a block without any branch.
    """

    kxk_name, scale_name, skip_name = "conv_kxk", "conv_scale", "identity"

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        group_size: int = 0,
        inference_mode: bool = False,
        use_se: bool = False,
        use_act: bool = True,
        use_scale_branch: bool = True,
        num_conv_branches: int = 1,
        act_layer: type[nn.Module] = nn.GELU,
    ) -> None:
        groups = in_chs // group_size if group_size else 1
        padding = dilation * (kernel_size - 1) // 2
        super().__init__(in_chs, out_chs, Geometry.make(kernel_size, stride, padding, dilation, groups))
        names = ("in_chs", "out_chs", "kernel_size", "stride", "dilation", "group_size", "use_se", "use_act")
        self._config = config_of(locals(), *names, "use_scale_branch", "num_conv_branches", "act_layer")
        self.inference_mode, self.num_conv_branches = inference_mode, num_conv_branches
        hidden = rounded_channels(out_chs / 16, 1)
        self.se = SqueezeExcite(out_chs, hidden, ("fc1", "fc2")) if use_se else nn.Identity()
        if inference_mode:
            self.reparam_conv = self._new_merged_layer()
        else:
            self._build(num_conv_branches, use_scale_branch)
        self.act = act_layer() if use_act else nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.se(self.linear_forward(input)))
