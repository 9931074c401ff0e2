"""The module that owns the parameters of the aggregation, under their published names (arXiv 2311.15157)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from .._hooks import is_plain
from . import aggregate as fused
from .checks import KERNELS, check_dim, check_tokens
from .parameters import AggregateParameters
from .plain import is_plain_depthwise, is_plain_pointwise


def parameters_of(modules: Iterable[nn.Module], name: str) -> list[Any]:
    """The parameter of that name of each module. The table of a module is looked at first: as an attribute a
    parameter is slow to look up, and a parametrised one is only that."""
    return [m._parameters[name] if name in m._parameters else getattr(m, name) for m in modules]


def buffers_of(modules: Iterable[nn.Module], name: str) -> list[Any]:
    """The buffer of that name of each module."""
    return [m._buffers[name] if name in m._buffers else getattr(m, name) for m in modules]


def _children(module: nn.Module) -> dict[str, Any]:
    """The submodules by name: as attributes they are slow to look up, and a call asks for many."""
    return module._modules


class SeparableConv2d(nn.Module):
    """Depthwise then pointwise convolution without biases; nothing between them."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(
            in_channels, in_channels, kernel_size, stride, kernel_size // 2, groups=in_channels, bias=False
        )
        self.pointwise_conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise_conv(self.conv1(x))


def _is_plain_separable(module: Any, in_channels: int, out_channels: int, kernel_size: int) -> bool:
    """Whether calling the module is these two convolutions and nothing else."""
    if not is_plain(module, SeparableConv2d):
        return False
    children = _children(module)
    return is_plain_depthwise(children["conv1"], in_channels, kernel_size, False) and is_plain_pointwise(
        children["pointwise_conv"], in_channels, out_channels
    )


class LocalBranch(nn.Module):
    """The non-attention branch: q, k and v of the last segment to d channels, LayerNorm, hardswish."""

    def __init__(self, segment: int) -> None:
        super().__init__()
        self.conv = SeparableConv2d(3 * segment, segment, 3)
        self.norm = nn.LayerNorm(segment)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3 * d, H, W) -> (B, N, d)."""
        return F.hardswish(self.norm(self.conv(x).flatten(2).transpose(1, 2)))


def _is_plain_local(module: Any, d: int) -> bool:
    """Whether calling the module is the formula of :class:`LocalBranch` and nothing else."""
    if not is_plain(module, LocalBranch):
        return False
    children = _children(module)
    conv, norm = children["conv"], children["norm"]
    return (
        _is_plain_separable(conv, 3 * d, d, KERNELS[3])
        and is_plain(norm, nn.LayerNorm)
        and norm.normalized_shape == (d,)
        and norm.weight is not None
        and norm.bias is not None
    )


def _settings(norm: Any) -> tuple:
    """What a BatchNorm does besides its parameters."""
    group = norm.process_group if isinstance(norm, nn.SyncBatchNorm) else None
    return norm.training, norm.eps, norm.momentum, norm.track_running_stats, group


def _missing(norm: Any) -> list[bool]:
    """Whether running_mean, running_var and num_batches_tracked are None."""
    return [t is None for t in norm._buffers.values()]


class GroupMixAggregator(nn.Module):
    """:func:`lkconv.group_mix_aggregate` with the published parameters.

    Args:
        dim: C, a multiple of 5 with 4 C / 5 divisible by 8.
        num_heads: 8.

    The BatchNorms may be ``nn.SyncBatchNorm`` (``nn.SyncBatchNorm.convert_sync_batchnorm``): their statistics
    are then exchanged with one collective for all four. With other modules in the place of these, hooks on
    any of them (pruning, the older weight and spectral norms), or BatchNorms of which some are frozen, the
    submodules are called one after another. Parametrised weights are read as they are.

    Shapes: qkv (B, N, 3 * C) and size (H, W) with H * W = N -> q, k, v (B, 8, N, d / 2) and local (B, N, d),
    d = C / 5; float64, float32, float16 or bfloat16.

    Raises:
        ValueError: dim or num_heads is another, or on a call a shape does not fit.
        TypeError: on a call, qkv is not a floating-point tensor.
    """

    def __init__(self, dim: int, num_heads: int = 8) -> None:
        super().__init__()
        check_dim(dim, num_heads)
        self.dim, self.num_heads = dim, num_heads
        d = dim // 5
        self.norm0 = nn.BatchNorm2d(d)
        self.agg1, self.norm1 = SeparableConv2d(d, d, 3), nn.BatchNorm2d(d)
        self.agg2, self.norm2 = SeparableConv2d(d, d, 5), nn.BatchNorm2d(d)
        self.agg3, self.norm3 = SeparableConv2d(d, d, 7), nn.BatchNorm2d(d)
        self.agg0 = LocalBranch(d)

    def norms(self) -> list[Any]:
        children = _children(self)
        return [children["norm0"], children["norm1"], children["norm2"], children["norm3"]]

    def _fusible(self) -> bool:
        """Whether calling the submodules is the formula of the fused op and nothing else."""
        d, children = self.dim // 5, _children(self)
        return (
            self._norms_agree()
            and _is_plain_separable(children["agg1"], d, d, KERNELS[0])
            and _is_plain_separable(children["agg2"], d, d, KERNELS[1])
            and _is_plain_separable(children["agg3"], d, d, KERNELS[2])
            and _is_plain_local(children["agg0"], d)
        )

    def _norms_agree(self) -> bool:
        """Whether the four norms are BatchNorms that differ in nothing but their parameters."""
        first, *others = self.norms()
        if not (is_plain(first, nn.BatchNorm2d, nn.SyncBatchNorm) and first.affine):
            return False
        settings, missing = _settings(first), _missing(first)
        return missing[0] == missing[1] and all(
            is_plain(n, type(first)) and n.affine and _settings(n) == settings and _missing(n) == missing
            for n in others
        )

    def _group(self) -> fused.Group | None:
        """The processes that share the statistics of this batch, if any."""
        norm = _children(self)["norm0"]
        if not (isinstance(norm, nn.SyncBatchNorm) and norm.training and dist.is_available()):
            return None
        return fused.shared_group(norm.process_group or dist.group.WORLD)

    def tokens(
        self, namespace: str, qkv: Tensor, size: tuple[int, int], run: Callable = fused.aggregate_tokens
    ) -> tuple[Any, Tensor, fused.BatchStatistics | None]:
        """qkv (B, N, 3 * C) -> mixed (3, B, N, 4 * d), local (B, N, d), through a namespace's fused op; with
        ``run`` :func:`aggregate_heads`, (q, k, v) instead of mixed.

        The third result is for :meth:`track`, once nothing in the call can fail any more.
        """
        norms, children = self.norms(), _children(self)
        local = _children(children["agg0"])
        first, layer_norm = norms[0], local["norm"]
        by_batch = first.training or first._buffers["running_mean"] is None
        convs = [_children(c) for c in (children["agg1"], children["agg2"], children["agg3"], local["conv"])]
        parameters = AggregateParameters(
            parameters_of([c["conv1"] for c in convs], "weight"),
            parameters_of([c["pointwise_conv"] for c in convs], "weight"),
            parameters_of(norms, "weight"),
            parameters_of(norms, "bias"),
            *parameters_of((layer_norm,), "weight"),
            *parameters_of((layer_norm,), "bias"),
        )
        return run(
            namespace,
            fused.autocast(qkv),
            size,
            parameters,
            None if by_batch else (buffers_of(norms, "running_mean"), buffers_of(norms, "running_var")),
            (first.eps, layer_norm.eps),
            self._group(),
        )

    def track(self, statistics: fused.BatchStatistics | None) -> None:
        """Notes a batch in the running statistics, as the BatchNorms themselves do."""
        norms, first = self.norms(), self.norm0
        if statistics is None or not (first.training and first.track_running_stats):
            return
        momentum = first.momentum
        if first.num_batches_tracked is not None:
            torch._foreach_add_(buffers_of(norms, "num_batches_tracked"), 1)
            if momentum is None:  # the average over all batches
                momentum = 1.0 / float(first.num_batches_tracked)
        if first.running_mean is not None:
            means, variances = buffers_of(norms, "running_mean"), buffers_of(norms, "running_var")
            statistics.update(means, variances, momentum or 0.0)

    def composed(self, qkv: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same from this module's own submodules, one after another."""
        batch, tokens, channels = qkv.shape
        d, (height, width) = channels // 15, size
        x = qkv.reshape(batch, height, width, 3, 5, d).permute(4, 3, 0, 5, 1, 2)
        convs: Sequence[Callable[[Tensor], Tensor]] = (nn.Identity(), self.agg1, self.agg2, self.agg3)
        mixed = [
            F.hardswish(norm(conv(x[s].reshape(3 * batch, d, height, width))))
            for s, (conv, norm) in enumerate(zip(convs, self.norms(), strict=True))
        ]
        heads = (
            torch.cat(mixed, 1)
            .reshape(3, batch, self.num_heads, 4 * d // self.num_heads, tokens)
            .transpose(-1, -2)
        )
        local = self.agg0(x[4].transpose(0, 1).reshape(batch, 3 * d, height, width))
        q, k, v = heads.unbind()
        return q, k, v, local

    def namespace(self, qkv: Tensor) -> str | None:
        """Whose fused kernels this call takes; None where it runs as plain PyTorch."""
        return fused.namespace(qkv, self._group() is not None) if self._fusible() else None

    @backends.retried
    def forward(self, qkv: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """qkv (B, N, 3 * C) of an H x W grid -> q, k, v (B, 8, N, d / 2) and local (B, N, d)."""
        check_tokens(qkv, size, "qkv")
        if qkv.shape[2] != 3 * self.dim:
            raise ValueError(f"qkv must have 3 * dim = {3 * self.dim} channels, got {qkv.shape[2]}")
        namespace = self.namespace(qkv)
        if namespace is None:
            return self.composed(qkv, size)
        heads, local, statistics = self.tokens(namespace, qkv, size, fused.aggregate_heads)
        self.track(statistics)
        return *heads, local
