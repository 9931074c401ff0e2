"""ResRep (https://arxiv.org/abs/2007.03260): a 1x1 compactor after a convolution, for pruning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lkconv.reparam.algebra import fold_batch_norm, fold_dtype, identity_kernel
from lkconv.reparam.block import ReparamBlock, batch_norm, config_of, require
from lkconv.reparam.convolution import make_layer
from lkconv.reparam.geometry import Geometry


def fold_compactor(weight: Tensor, bias: Tensor | None, compactor: Tensor) -> tuple[Tensor, Tensor]:
    """The convolution that equals a 1x1 convolution Q after a k x k one: K' = Q K, b' = Q b.

    Args:
        weight: (O, I, kh, kw); bias: (O,) or None; compactor: (O', O, 1, 1).

    Returns:
        (O', I, kh, kw) and (O',), in float32 (float64 if any operand is).

    Raises:
        ValueError: if the compactor is not (O', O, 1, 1).
    """
    require(
        tuple(compactor.shape[1:]) == (weight.shape[0], 1, 1),
        f"compactor must be (O', {weight.shape[0]}, 1, 1), got {tuple(compactor.shape)}",
    )
    dtype = fold_dtype(weight, bias, compactor)
    with torch.autocast(weight.device.type, enabled=False):
        q = compactor.flatten(1).to(dtype)
        folded = (q @ weight.to(dtype).flatten(1)).reshape(-1, *weight.shape[1:])
        shift = q.new_zeros(q.shape[0]) if bias is None else q @ bias.to(dtype)
    return folded, shift


class CompactorLayer(nn.Module):
    """A 1x1 convolution ``pwc`` that starts as the identity; ``mask`` marks the rows still alive.

    Args:
        num_features: channels. conv_idx: number of the convolution it follows (bookkeeping of the caller).

    Shapes: (N, num_features, H, W) to the same; ``pwc.weight`` Q (num_features, num_features, 1, 1), ``mask``
    (num_features,).
    """

    def __init__(self, num_features: int, conv_idx: int = 0) -> None:
        super().__init__()
        self.num_features, self.conv_idx = num_features, conv_idx
        self.pwc = nn.Conv2d(num_features, num_features, 1, bias=False)
        self.pwc.weight.data.copy_(identity_kernel(num_features))
        self.register_buffer("mask", torch.ones(num_features))

    def forward(self, input: Tensor) -> Tensor:
        return self.pwc(input)

    @torch.no_grad()
    def get_metric_vector(self) -> Tensor:
        """The norm of each row of Q: (num_features,). Rows near zero can be pruned."""
        return self.pwc.weight.flatten(1).norm(dim=1)


class ResRepBlock(ReparamBlock):
    """``compactor(bn(conv(x)))``, merged into one convolution ``reparam_conv`` without the pruned rows.

    Args:
        As ``nn.Conv2d`` with groups 1: Q mixes all output channels.
        prune_threshold: rows of Q whose norm is at most this are dropped on merging; None keeps all. Dropping
            changes the number of output channels, so the next layer must be pruned by the same rows:
            :meth:`surviving_channels`.
        deploy: build the merged form (with all output channels).

    Raises:
        ValueError: on merging, if the threshold leaves no output channel.
    """

    merged_name = "reparam_conv"
    plain_types = (CompactorLayer,)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        prune_threshold: float | None = None,
        deploy: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, Geometry.make(kernel_size, stride, padding, dilation))
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
        self._config = config_of(locals(), *names)
        self.deploy, self.prune_threshold = deploy, prune_threshold
        if deploy:
            self.reparam_conv = self._new_merged_layer()
            return
        self.conv = make_layer(in_channels, out_channels, self._target, bias=False)
        self.bn = batch_norm(out_channels)
        self.compactor = CompactorLayer(out_channels)

    def _training_children(self) -> list[str]:
        return ["conv", "bn", "compactor"]

    def surviving_channels(self) -> Tensor:
        """Indices of the output channels that merging keeps."""
        norms = self.compactor.get_metric_vector()
        if self.prune_threshold is None:
            return torch.arange(norms.numel(), device=norms.device)
        return torch.nonzero(norms > self.prune_threshold).flatten()

    def _fold(self) -> tuple[Tensor, Tensor]:
        weight, bias = fold_batch_norm(self.conv.weight, None, self.bn)
        return fold_compactor(weight, bias, self.compactor.pwc.weight)

    def _merge(self) -> None:
        keep = self.surviving_channels()
        require(keep.numel() > 0, f"prune_threshold {self.prune_threshold} leaves no output channel")
        super()._merge()
        if keep.numel() < self.out_channels:
            layer: Any = self.reparam_conv
            trainable = layer.weight.requires_grad
            layer.weight = nn.Parameter(layer.weight.detach()[keep].clone(), trainable)
            layer.bias = nn.Parameter(layer.bias.detach()[keep].clone(), trainable)
            layer.out_channels = self.out_channels = int(keep.numel())

    def _forward_training(self, input: Tensor) -> Tensor:
        if self._runs_folded():
            return self._convolve_folded(input)
        return self.compactor(self.bn(self.conv(input)))
