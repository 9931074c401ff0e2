"""ACNet (https://arxiv.org/abs/1908.03930): a square kernel with a vertical and a horizontal strip."""

from __future__ import annotations

from torch import nn

from lkconv.reparam.block import BranchSumBlock, batch_norm, config_of, require
from lkconv.reparam.branches import ConvBN
from lkconv.reparam.convolution import make_layer
from lkconv.reparam.geometry import Geometry


class ACBlock(BranchSumBlock):
    """``bn(conv K x K) + bn(conv K x 1) + bn(conv 1 x K)``, merged into one K x K convolution ``fused_conv``.

    Training form: ``square_``, ``ver_`` and ``hor_`` with ``conv`` and ``bn``. A strip is padded by p along
    itself and by p - dilation (K // 2) across; where that is negative (padding below half the kernel) its
    input is cropped instead.

    Args:
        As ``nn.Conv2d``; kernel_size is odd. deploy: build the merged form. use_affine: of the batch norms.
        reduce_gamma: start all three gammas at 1/3. gamma_init: start them at this value.

    Raises:
        ValueError: for an even kernel, a padding mode other than zeros, groups that do not divide the
            channels, or both reduce_gamma and gamma_init.
    """

    merged_name = "fused_conv"

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
        use_affine: bool = True,
        reduce_gamma: bool = False,
        gamma_init: float | None = None,
    ) -> None:
        require(kernel_size % 2 == 1, f"kernel_size must be odd, got {kernel_size}")
        require(padding_mode == "zeros", f"padding_mode must be 'zeros' to merge, got {padding_mode!r}")
        require(
            not (reduce_gamma and gamma_init is not None), "reduce_gamma and gamma_init exclude each other"
        )
        target = Geometry.make(kernel_size, stride, padding, dilation, groups)
        super().__init__(in_channels, out_channels, target)
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        self._config = config_of(locals(), *names, "use_affine")
        self.deploy = deploy
        across = padding - dilation * (kernel_size // 2)
        self.crop = max(-across, 0)
        if deploy:
            self.fused_conv = self._new_merged_layer()
            return
        across = max(across, 0)
        shapes = {
            "square": target,
            "ver": Geometry.make((kernel_size, 1), stride, (padding, across), dilation, groups),
            "hor": Geometry.make((1, kernel_size), stride, (across, padding), dilation, groups),
        }
        for name, geometry in shapes.items():
            self.add_module(f"{name}_conv", make_layer(in_channels, out_channels, geometry, bias=False))
            self.add_module(f"{name}_bn", batch_norm(out_channels, use_affine))
        if reduce_gamma or gamma_init is not None:
            self.init_gamma(1.0 / 3 if gamma_init is None else gamma_init)

    def init_gamma(self, gamma_value: float) -> None:
        """Set the gamma of all three batch norms."""
        for name in ("square_bn", "ver_bn", "hor_bn"):
            nn.init.constant_(getattr(self, name).weight, gamma_value)

    def single_init(self) -> None:
        """Start as the square branch alone: its gamma 1, the strips' 0."""
        self.init_gamma(0.0)
        nn.init.constant_(self.square_bn.weight, 1.0)

    def _training_children(self) -> list[str]:
        return [f"{name}_{what}" for name in ("square", "ver", "hor") for what in ("conv", "bn")]

    def _parts(self) -> list[ConvBN]:
        crops = {"square": (0, 0), "ver": (0, self.crop), "hor": (self.crop, 0)}
        return [
            ConvBN(name, getattr(self, f"{name}_conv"), getattr(self, f"{name}_bn"), crop)
            for name, crop in crops.items()
        ]
