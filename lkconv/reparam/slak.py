"""SLaK (https://arxiv.org/abs/2207.03620): two strips and a square kernel, merged into two strips."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lkconv.reparam.algebra import Branch, fold_dtype, merge_kernels
from lkconv.reparam.block import ReparamBlock, config_of, conv_bn, require
from lkconv.reparam.branches import ConvBN, run_branches, run_fused
from lkconv.reparam.convolution import make_layer
from lkconv.reparam.geometry import Geometry
from lkconv.reparam.planner import preferred_path


def _geometry(height: int, width: int, stride: Any, groups: int) -> Geometry:
    return Geometry.make((height, width), stride, (height // 2, width // 2), 1, groups)


_OFFICIAL_ALIASES = {"Decom1.": "LoRA1.", "Decom2.": "LoRA2."}


class SLaKReparamLargeKernelConv(ReparamBlock):
    """``bn(conv K x k) + bn(conv k x K) + bn(conv k x k)``, depthwise, merged into the two strips.

    The square kernel fits into the K x k strip, so the merged form has 2 K k taps (51 and 5: 510), where one
    dense kernel would have K K (2601). Training form: ``LoRA1``, ``LoRA2``, ``small_conv`` with ``{conv,bn}``
    (checkpoints that say ``Decom1``, ``Decom2`` load as well); merged form: ``strip_vertical``,
    ``strip_horizontal``. Without ``Decom`` it is RepLKNet's block: ``lkb_origin`` and ``small_conv``, merged
    into ``lkb_reparam``.

    Args:
        in_channels, out_channels, groups: all equal. kernel_size: K, odd. stride: of all.
        small_kernel: k, odd; at k = K there is no square branch. None only without Decom: no small branch.
        small_kernel_merged: build the merged form. Decom: two strips instead of a K x K kernel.
        bn: whether every branch has a batch norm.

    Raises:
        ValueError: for an even kernel, a small one that exceeds the large one, strips without a small kernel,
            or groups that do not divide the channels.
    """

    merged_name = "strip_vertical"
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
        Decom: bool | None = False,
        bn: bool = True,
    ) -> None:
        require(
            kernel_size % 2 == 1
            and (small_kernel is None or (small_kernel % 2 == 1 and small_kernel <= kernel_size)),
            f"kernels must be odd and small_kernel at most kernel_size, got {kernel_size} and {small_kernel}",
        )
        require(
            not Decom or small_kernel is not None,
            "small_kernel must be the strips' width with Decom, got None",
        )
        width: Any = small_kernel if Decom else kernel_size
        super().__init__(in_channels, out_channels, _geometry(kernel_size, width, stride, groups))
        names = ("in_channels", "out_channels", "kernel_size", "stride", "groups", "small_kernel", "Decom")
        self._config = config_of(locals(), *names, "bn")
        self.kernel_size, self.small_kernel, self.Decom = kernel_size, small_kernel, bool(Decom)
        self.small_kernel_merged = small_kernel_merged
        if Decom:
            self._horizontal = _geometry(width, kernel_size, stride, groups)
        else:
            self.merged_name = "lkb_reparam"
        if small_kernel_merged:
            self._build_merged()
        else:
            self._build(stride, bn)

    def _build_merged(self) -> None:
        setattr(self, self.merged_name, self._new_merged_layer())
        if self.Decom:
            self.strip_horizontal = self._new_horizontal_layer()

    def _build(self, stride: int, bn: bool) -> None:
        channels, groups = (self.in_channels, self.out_channels), self._target.groups
        if self.Decom:
            self.LoRA1 = conv_bn(*channels, self._target, norm=bn)
            self.LoRA2 = conv_bn(*channels, self._horizontal, norm=bn)
        else:
            self.lkb_origin = conv_bn(*channels, self._target, norm=bn)
        small = self.small_kernel
        if small is not None and small < self.kernel_size:
            self.small_conv = conv_bn(*channels, _geometry(small, small, stride, groups), norm=bn)

    def _new_horizontal_layer(self, **kwargs: Any) -> nn.Conv2d:
        return make_layer(self.in_channels, self.out_channels, self._horizontal, bias=True, **kwargs)

    def _training_children(self) -> list[str]:
        return ["LoRA1", "LoRA2", "small_conv"] if self.Decom else ["lkb_origin", "small_conv"]

    def _parts(self) -> dict[str, ConvBN]:
        names = [name for name in self._training_children() if name in self._modules]
        return {name: ConvBN.of(name, getattr(self, name)) for name in names}

    def _dense(self) -> Geometry:
        return _geometry(self.kernel_size, self.kernel_size, self._target.stride, self._target.groups)

    def _strips(self) -> tuple[list[ConvBN], list[ConvBN]]:
        """Branches of the vertical strip (with the square kernel) and of the horizontal one."""
        parts = self._parts()
        return [parts[n] for n in ("LoRA1", "small_conv") if n in parts], [parts["LoRA2"]]

    def _linear(self, parts: list[ConvBN], target: Geometry) -> list[Branch]:
        like = next(self.parameters())
        return [part.linear(target, self.in_channels, like) for part in parts]

    def get_equivalent_strips(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """((weight, bias) of the K x k strip, (weight, bias) of the k x K strip); differentiable.

        Raises:
            ValueError: without Decom, where there are no strips.
        """
        require(self.Decom, "without Decom there are no strips")
        if self.is_merged:
            strips = (self.strip_vertical, self.strip_horizontal)
            return tuple((strip.weight, strip.bias) for strip in strips)  # type: ignore[return-value]
        vertical, horizontal = self._strips()
        return (
            merge_kernels(self._linear(vertical, self._target), self._target),
            merge_kernels(self._linear(horizontal, self._horizontal), self._horizontal),
        )

    def _fold(self) -> tuple[Tensor, Tensor]:
        """The dense K x K kernel and bias: the merged form itself without Decom, a view of it with strips."""
        dense = self._dense()
        if self.is_merged:
            names = (self.merged_name, "strip_horizontal") if self.Decom else (self.merged_name,)
            layers = [getattr(self, name) for name in names]
            branches = [Branch(layer.weight, Geometry.of(layer), None, layer.bias) for layer in layers]
        else:
            branches = self._linear(list(self._parts().values()), dense)
        return merge_kernels(branches, dense, fold_dtype(branches[0].weight, branches[0].scale))

    def get_equivalent_kernel_bias(self) -> tuple[Tensor, Tensor]:
        """The dense K x K kernel and bias; with Decom to look at, for the merged form keeps two strips."""
        weight, bias = self._fold()
        return weight.to(self._parameter_dtype()), bias.to(self._parameter_dtype())

    @torch.no_grad()
    def _merge(self) -> None:
        if not self.Decom:
            super()._merge()
            return
        trainable = any(p.requires_grad for p in self.parameters())
        folded = self.get_equivalent_strips()
        makers = (self._new_merged_layer, self._new_horizontal_layer)
        layers = []
        for (weight, bias), make in zip(folded, makers, strict=True):
            layer = make(device="meta", dtype=weight.dtype)
            layer.weight = nn.Parameter(weight.contiguous().clone(), requires_grad=trainable)
            layer.bias = nn.Parameter(bias.clone(), requires_grad=trainable)
            layers.append(layer.train(self.training))
        for name in self._training_children():
            if hasattr(self, name):
                delattr(self, name)
        self.strip_vertical, self.strip_horizontal = layers
        self.small_kernel_merged = True

    def linear_forward(self, input: Tensor) -> Tensor:
        if self.is_merged and self.Decom:
            return self.strip_vertical(input) + self.strip_horizontal(input)
        return super().linear_forward(input)

    def _forward_training(self, input: Tensor) -> Tensor:
        if not self.Decom:
            return run_branches(input, list(self._parts().values()), self._target, self.out_channels)
        # Statistics of a batch are taken of every branch by itself: then all of them can be one sum. Where
        # branches are merged, each strip has those that fit into it.
        vertical, horizontal = self._strips()
        if preferred_path() != "fused-recompute":
            out = run_fused(input, list(self._parts().values()), self._dense(), self.out_channels)
            if out is not None:
                return out
        return run_branches(input, vertical, self._target, self.out_channels) + run_branches(
            input, horizontal, self._horizontal, self.out_channels
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for official, ours in _OFFICIAL_ALIASES.items():
            for key in [k for k in state_dict if k.startswith(prefix + official)]:
                state_dict[prefix + ours + key[len(prefix + official) :]] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)
