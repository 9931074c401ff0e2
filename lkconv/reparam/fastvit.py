"""FastViT (https://arxiv.org/abs/2303.14189): RepMixer, large-kernel embedding, positional encoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lkconv.reparam.algebra import identity_kernel
from lkconv.reparam.block import BranchSumBlock, ReparamBlock, config_of, conv_bn, require
from lkconv.reparam.branches import ConvBN, run_fused
from lkconv.reparam.geometry import Geometry
from lkconv.reparam.mobileone import FastViTMobileOneBlock
from lkconv.reparam.squeeze_excite import SqueezeExcite, rounded_channels


class FastViTReparamLargeKernelConv(BranchSumBlock):
    """``act(se(bn(conv K x K) + bn(conv k x k)))``: ``large_conv``, ``small_conv``; merged ``reparam_conv``.

    The patch embedding is this block with stride 2, K = 7, k = 3 and out_chs a multiple of in_chs.

    Args:
        in_chs, out_chs, kernel_size, stride: as ``nn.Conv2d``; padding is half the kernel.
        group_size: input channels per group; 0 for dense, 1 for depthwise.
        small_kernel: k or None. use_se, act_layer: what follows. inference_mode: build the merged form.

    Raises:
        ValueError: if the small kernel exceeds the large one or differs in parity, or the groups do not
            divide the channels.
    """

    merged_name = "reparam_conv"
    deploy_flag = "inference_mode"

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int,
        stride: int,
        group_size: int,
        small_kernel: int | None = None,
        use_se: bool = False,
        act_layer: type[nn.Module] | None = None,
        inference_mode: bool = False,
    ) -> None:
        groups = in_chs // group_size if group_size else 1
        target = Geometry.make(kernel_size, stride, (kernel_size - 1) // 2, 1, groups)
        super().__init__(in_chs, out_chs, target)
        names = (
            "in_chs",
            "out_chs",
            "kernel_size",
            "stride",
            "group_size",
            "small_kernel",
            "use_se",
            "act_layer",
        )
        self._config = config_of(locals(), *names)
        self.kernel_size, self.small_kernel = kernel_size, small_kernel
        self.inference_mode = inference_mode
        if inference_mode:
            self.reparam_conv = self._new_merged_layer()
        else:
            self.large_conv = conv_bn(in_chs, out_chs, target)
            if small_kernel is not None:
                require(
                    small_kernel <= kernel_size and (kernel_size - small_kernel) % 2 == 0,
                    f"small_kernel must be at most {kernel_size} and of its parity, got {small_kernel}",
                )
                small = Geometry.make(small_kernel, stride, (small_kernel - 1) // 2, 1, groups)
                self.small_conv = conv_bn(in_chs, out_chs, small)
        hidden = rounded_channels(out_chs * 0.25, 8)
        self.se = SqueezeExcite(out_chs, hidden, ("fc1", "fc2")) if use_se else nn.Identity()
        self.act = act_layer() if act_layer is not None else nn.Identity()

    def _training_children(self) -> list[str]:
        return ["large_conv", "small_conv"]

    def _parts(self) -> list[ConvBN]:
        names = [name for name in self._training_children() if name in self._modules]
        return [ConvBN.of(name, getattr(self, name)) for name in names]

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.se(self.linear_forward(input)))


class LayerScale2d(nn.Module):
    """A learned factor per channel: ``gamma`` (C, 1, 1)."""

    def __init__(self, dim: int, init_values: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(init_values * torch.ones(dim, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        return input * self.gamma


class RepMixer(ReparamBlock):
    """``x + layer_scale(mixer(x) - norm(x))``, depthwise, merged into one convolution ``reparam_conv``.

    K = identity + ls (K_mixer - K_norm), b = ls (b_mixer - b_norm).

    Args:
        dim: channels. kernel_size: of the mixer, odd.
        layer_scale_init_value: initial factor, None for none. inference_mode: build the merged form.

    Shapes: (N, dim, H, W) to the same.

    Raises:
        ValueError: for an even kernel.
    """

    merged_name = "reparam_conv"
    deploy_flag = "inference_mode"
    plain_types = (FastViTMobileOneBlock, LayerScale2d)

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        layer_scale_init_value: float | None = 1e-5,
        inference_mode: bool = False,
    ) -> None:
        require(kernel_size % 2 == 1, f"kernel_size must be odd, got {kernel_size}")
        super().__init__(dim, dim, Geometry.make(kernel_size, 1, kernel_size // 2, 1, dim))
        self._config = config_of(locals(), "dim", "kernel_size", "layer_scale_init_value")
        self.dim, self.kernel_size, self.inference_mode = dim, kernel_size, inference_mode
        if inference_mode:
            self.reparam_conv = self._new_merged_layer()
            return
        common: dict[str, Any] = {"group_size": 1, "use_act": False}
        self.norm = FastViTMobileOneBlock(
            dim, dim, kernel_size, use_scale_branch=False, num_conv_branches=0, **common
        )
        self.mixer = FastViTMobileOneBlock(dim, dim, kernel_size, **common)
        self.layer_scale: nn.Module = nn.Identity()
        if layer_scale_init_value is not None:
            self.layer_scale = LayerScale2d(dim, layer_scale_init_value)

    def _training_children(self) -> list[str]:
        return ["norm", "mixer", "layer_scale"]

    def _fold(self) -> tuple[Tensor, Tensor]:
        (mix, mix_bias), (norm, norm_bias) = self.mixer._fold(), self.norm._fold()
        weight, bias = mix - norm, mix_bias - norm_bias
        if isinstance(self.layer_scale, LayerScale2d):
            gamma = self.layer_scale.gamma.to(weight.dtype)
            weight, bias = weight * gamma.unsqueeze(-1), bias * gamma.flatten()
        elif not isinstance(self.layer_scale, nn.Identity):
            raise ValueError(f"layer_scale: a {type(self.layer_scale).__name__} cannot be merged")
        identity = identity_kernel(self.dim, self.dim, self.kernel_size, weight.device, weight.dtype)
        return identity + weight, bias

    def _forward_training(self, input: Tensor) -> Tensor:
        if self._runs_folded():
            return self._convolve_folded(input)
        out = self._fused(input) if self._are_plain(self._training_children()) else None
        return input + self.layer_scale(self.mixer(input) - self.norm(input)) if out is None else out

    def _fused(self, input: Tensor) -> Tensor | None:
        """The branches of both blocks and the input as one sum, or None where they do not run as one."""
        norm, mixer = self.norm._parts(), self.mixer._parts()
        factor = self.layer_scale.gamma.flatten() if isinstance(self.layer_scale, LayerScale2d) else None
        one = next(self.parameters()).new_ones(self.dim) if factor is None else factor
        gains = [one] * len(mixer) + [-one] * len(norm)
        return run_fused(input, [*mixer, *norm], self._target, self.dim, gains, skip=True)


class RepConditionalPosEnc(BranchSumBlock):
    """``x + conv(x)``, a depthwise positional encoding, merged into one convolution: K + identity.

    No batch norm is involved, so the training form runs merged as well.

    Args:
        dim: channels. dim_out: must equal dim (the identity needs it); None means dim.
        spatial_shape: kernel size, odd. inference_mode: build the merged form.

    Shapes: (N, dim, H, W) to the same.

    Raises:
        TypeError: if spatial_shape is neither an int nor a pair.
        ValueError: for an even kernel or another dim_out.
    """

    merged_name = "reparam_conv"
    deploy_flag = "inference_mode"

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        spatial_shape: int | tuple[int, int] = (7, 7),
        inference_mode: bool = False,
    ) -> None:
        require(
            dim_out in (None, dim), f"dim_out must equal dim {dim} for the skip connection, got {dim_out}"
        )
        geometry = Geometry.make(spatial_shape, groups=dim)
        kernel = geometry.kernel_size
        require(kernel[0] % 2 == 1 and kernel[1] % 2 == 1, f"spatial_shape must be odd, got {spatial_shape}")
        target = Geometry(kernel, padding=(kernel[0] // 2, kernel[1] // 2), groups=dim)
        super().__init__(dim, dim, target)
        self._config = config_of(locals(), "dim", "dim_out", "spatial_shape")
        self.inference_mode = inference_mode
        if inference_mode:
            self.reparam_conv = self._new_merged_layer()
        else:
            self.pos_enc = self._new_merged_layer()

    def _training_children(self) -> list[str]:
        return ["pos_enc"]

    def _parts(self) -> list[ConvBN]:
        return [ConvBN("pos_enc", self.pos_enc), ConvBN("identity", None)]
