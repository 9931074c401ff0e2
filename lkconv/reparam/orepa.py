"""OREPA (https://arxiv.org/abs/2204.00826): a scale vector per branch, one batch norm after the sum.

Since no branch is normalised by the batch, merging them while training is exact: every step runs one
convolution.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lkconv.reparam.algebra import fold_batch_norm, identity_kernel
from lkconv.reparam.block import ReparamBlock, batch_norm, config_of, require
from lkconv.reparam.convolution import autocast_input, convolve
from lkconv.reparam.geometry import Geometry

# Initial scale per branch: k x k, 1x1 - average, 1x1 - frequency prior, 1x1 - k x k, 1x1, separable.
_INITIAL_SCALES = (0.25, 0.25, 0.0, 0.5, 1.0, 0.5)
_EXPANSION = 8


def frequency_prior(out_channels: int, kernel_size: int) -> Tensor:
    """(O, k, k) cosines: over rows for the first half of the channels, over columns for the second."""
    half = out_channels / 2
    channel = torch.arange(out_channels, dtype=torch.float64)
    position = torch.arange(kernel_size, dtype=torch.float64) + 0.5
    rank = torch.where(channel < half, channel + 1, channel + 1 - half)
    wave = torch.cos(math.pi * rank[:, None] * position / kernel_size)
    first = (channel < half).reshape(-1, 1, 1)
    return torch.where(first, wave[:, :, None], wave[:, None, :]).expand(-1, kernel_size, kernel_size).float()


class OREPA(ReparamBlock):
    """``nonlinear(bn(conv(x, sum_b v_b W_b)))``, merged into one convolution ``orepa_reparam``.

    Parameter names: ``weight_orepa_`` with ``origin``, ``avg_conv``, ``pfir_conv``, ``1x1``,
    ``1x1_kxk_idconv1``, ``1x1_kxk_conv2``, ``gconv_dw`` and ``gconv_pw``; ``vector`` (6, O), ``bn``; buffers
    ``weight_orepa_{avg_avg,prior}`` and ``id_tensor``.

    Args:
        As ``nn.Conv2d``; kernel_size is odd and padding kernel_size // 2, whatever the dilation.
        internal_channels_1x1_3x3: channels inside the 1x1 - k x k branch; by default in_channels, twice that
            for more than four groups.
        deploy: build the merged form. nonlinear: module applied last.
        single_init: start as the k x k branch alone.
        weight_only: no batch norm; a call takes no input and returns the kernel, (O, I / groups, k, k).
        init_hyper_para, init_hyper_gamma: the initial weights are scaled by the first (those of the two-layer
            separable branch each by its root), the initial scales by the root of the second.

    Raises:
        ValueError: for another kernel size or padding, or groups that do not divide the channels.
    """

    merged_name = "orepa_reparam"

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
        weight_only: bool = False,
        init_hyper_para: float = 1.0,
        init_hyper_gamma: float = 1.0,
    ) -> None:
        require(
            kernel_size % 2 == 1 and padding == kernel_size // 2,
            f"padding must be half an odd kernel, got kernel_size {kernel_size}, padding {padding}",
        )
        super().__init__(
            in_channels, out_channels, Geometry.make(kernel_size, stride, padding, dilation, groups)
        )
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        self._config = config_of(locals(), *names, "internal_channels_1x1_3x3", "weight_only")
        self.deploy, self.groups, self.weight_only = deploy, groups, weight_only
        self.nonlinear = nn.Identity() if nonlinear is None else nonlinear
        if deploy:
            self.orepa_reparam = self._new_merged_layer()
            return
        middle = internal_channels_1x1_3x3 or (in_channels if groups <= 4 else 2 * in_channels)
        self._build(kernel_size, middle)
        if not weight_only:
            self.bn = batch_norm(out_channels)
        self._initialise(init_hyper_para, init_hyper_gamma)
        if single_init:
            self.single_init()

    def _build(self, k: int, middle: int) -> None:
        out, per_group = self.out_channels, self.in_channels // self.groups
        shapes = {
            "origin": (out, per_group, k, k),
            "avg_conv": (out, per_group, 1, 1),
            "pfir_conv": (out, per_group, 1, 1),
            "1x1": (out, per_group, 1, 1),
            "1x1_kxk_idconv1": (middle, per_group, 1, 1),
            "1x1_kxk_conv2": (out, middle // self.groups, k, k),
            "gconv_dw": (self.in_channels * _EXPANSION, 1, k, k),
            "gconv_pw": (out, per_group * _EXPANSION, 1, 1),
        }
        for name, shape in shapes.items():
            self.register_parameter(f"weight_orepa_{name}", nn.Parameter(torch.zeros(shape)))
        self.vector = nn.Parameter(torch.zeros(len(_INITIAL_SCALES), out))
        self.register_buffer("weight_orepa_avg_avg", torch.full((k, k), 1.0 / k**2))
        self.register_buffer("weight_orepa_prior", frequency_prior(out, k))
        identity = identity_kernel(self.in_channels, self.groups)
        self.register_buffer("id_tensor", identity.repeat(-(-middle // self.in_channels), 1, 1, 1)[:middle])

    @torch.no_grad()
    def _initialise(self, weight_factor: float, scale_factor: float) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            if name in ("vector", "weight_orepa_1x1_kxk_idconv1"):
                continue
            nn.init.kaiming_uniform_(parameter, a=0.0)
            parameter.mul_(math.sqrt(weight_factor) if "gconv" in name else weight_factor)
        for row, value in zip(self.vector, _INITIAL_SCALES, strict=True):
            row.fill_(value * math.sqrt(scale_factor))

    @torch.no_grad()
    def single_init(self) -> None:
        """Start as the k x k branch alone: its scale 1, all others 0."""
        self.vector.zero_()
        self.vector[0].fill_(1.0)

    def _training_children(self) -> list[str]:
        own = [*self._parameters, *self._buffers]
        return own if self.weight_only else [*own, "bn"]

    def _separable(self) -> Tensor:
        """Depthwise then pointwise as one grouped kernel.

        The pointwise rows are read as (O / groups, groups), the order of the official checkpoints.
        """
        g, per_group = self.groups, self.in_channels // self.groups
        depth, point = self.weight_orepa_gconv_dw, self.weight_orepa_gconv_pw
        depth = depth.reshape(g, per_group, _EXPANSION, *depth.shape[2:])
        point = point.reshape(self.out_channels // g, g, per_group, _EXPANSION)
        full = torch.einsum("githw,ogit->goihw", depth, point)
        return full.reshape(self.out_channels, per_group, *full.shape[3:])

    def _one_then_k(self) -> Tensor:
        first = (self.weight_orepa_1x1_kxk_idconv1 + self.id_tensor).flatten(1)
        second, g = self.weight_orepa_1x1_kxk_conv2, self.groups
        first = first.reshape(g, -1, first.shape[1])
        second = second.reshape(g, -1, *second.shape[1:])
        return torch.einsum("gti,gothw->goihw", first, second).reshape(self.weight_orepa_origin.shape)

    def weight_gen(self) -> Tensor:
        """The kernel of this step, (O, I / groups, k, k): sum_b vector[b] W_b. Differentiable."""
        k = self._target.kernel_size[0]
        with torch.autocast(self.vector.device.type, enabled=False):
            point = nn.functional.pad(self.weight_orepa_1x1, [k // 2] * 4)
            kernels = [
                self.weight_orepa_origin,
                self.weight_orepa_avg_conv * self.weight_orepa_avg_avg,
                self.weight_orepa_pfir_conv * self.weight_orepa_prior.unsqueeze(1),
                self._one_then_k(),
                point,
                self._separable(),
            ]
            scales = self.vector.reshape(*self.vector.shape, 1, 1, 1)
            total = scales[0] * kernels[0]
            for scale, kernel in zip(scales[1:], kernels[1:], strict=True):
                total = total + scale * kernel
        return total

    def _fold(self) -> tuple[Tensor, Tensor]:
        weight = self.weight_gen()
        if self.weight_only:
            return weight, weight.new_zeros(weight.shape[0])
        return fold_batch_norm(weight, None, self.bn)

    def _forward_training(self, input: Tensor) -> Tensor:
        if self._runs_folded():
            return self._convolve_folded(input)
        weight = self.weight_gen()
        input = autocast_input(input)
        return self.bn(convolve(input, weight.to(input.dtype), None, self._target))

    def forward(self, input: Tensor | None = None) -> Tensor:
        if self.weight_only:
            return self.orepa_reparam.weight if self.is_merged else self.weight_gen()
        if input is None:
            raise ValueError("OREPA takes an input unless it was made with weight_only=True")
        return self.nonlinear(self.linear_forward(input))
