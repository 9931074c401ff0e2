"""Live branches: convolution and batch-norm modules of a block, run merged, fused or one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lkconv import _hooks, backends
from lkconv.modules import DepthwiseConv2d
from lkconv.ops import autocast_dtype, forward_ad_active
from lkconv.reparam import normalised_branches
from lkconv.reparam.algebra import (
    Branch,
    fold_dtype,
    identity_geometry,
    identity_kernel,
    merge_kernels,
    module_affine,
)
from lkconv.reparam.batch_statistics import BatchStatisticsSum, SumSpec
from lkconv.reparam.convolution import autocast_input, convolve, is_depthwise
from lkconv.reparam.functional import merged_depthwise_conv2d
from lkconv.reparam.geometry import Geometry
from lkconv.reparam.planner import Situation, plan, preferred_path


@dataclass
class ConvBN:
    """``bn(conv(x))``, (N, C, H, W) -> (N, O, H', W'). conv None is the identity, bn None leaves the
    convolution as it is.

    name: how error messages call the branch. crop (height, width): pixels cut from each side of the input
    before the convolution. pair: the module that holds both and is called for them, where there is one.
    """

    name: str
    conv: Any
    bn: Any = None
    crop: tuple[int, int] = (0, 0)
    pair: nn.Module | None = None

    @classmethod
    def of(cls, name: str, pair: Any) -> ConvBN:
        """The branch ``pair``, a Sequential of ``conv`` and possibly ``bn``."""
        return cls(name, pair.conv, getattr(pair, "bn", None), pair=pair)

    def __call__(self, input: Tensor) -> Tensor:
        crop_h, crop_w = self.crop
        y = F.pad(input, (-crop_w, -crop_w, -crop_h, -crop_h)) if crop_h or crop_w else input
        if self.pair is not None:
            return self.pair(y)
        if self.conv is not None:
            y = self.conv(y)
        return y if self.bn is None else self.bn(y)

    def geometry(self, target: Geometry) -> Geometry:
        if self.conv is None:
            return identity_geometry(target)
        own = Geometry.of(self.conv)
        padding = (own.padding[0] - self.crop[0], own.padding[1] - self.crop[1])
        return Geometry(own.kernel_size, own.stride, padding, own.dilation, own.groups, own.padding_mode)

    def linear(self, target: Geometry, channels: int, like: Tensor) -> Branch:
        """The branch as weight, scale and bias, with the running statistics of its batch norm.

        An identity's kernel takes device and dtype from ``like``. A ValueError names a branch whose
        convolution is no ``nn.Conv2d``.
        """
        bias = None
        if self.conv is None:
            weight = identity_kernel(channels, target.groups, device=like.device, dtype=like.dtype)
        elif isinstance(self.conv, nn.Conv2d):
            weight, bias = self.conv.weight, self.conv.bias
        else:
            raise ValueError(f"{self.name}: a {type(self.conv).__name__} cannot be merged, only an nn.Conv2d")
        scale = None
        if self.bn is not None:
            scale, bias = module_affine(self.bn, bias)
        return Branch(weight, self.geometry(target), scale, bias, self.name)

    def uses_batch_statistics(self) -> bool:
        return self.bn is not None and uses_batch_statistics(self.bn)

    def is_plain(self) -> bool:
        """Whether calling the modules does nothing but their formula (:func:`is_plain`)."""
        holds = [m for m in (self.conv, self.bn) if m is not None]
        if self.pair is not None and not (is_plain(self.pair) and list(self.pair.children()) == holds):
            return False
        known = isinstance(self.conv, nn.Conv2d | None) and isinstance(self.bn, _BatchNorm | None)
        return known and all(is_plain(m) for m in holds)


def uses_batch_statistics(bn: nn.Module) -> bool:
    """Whether a batch norm normalises by its batch: in training, or when it tracks no statistics."""
    return bn.training or getattr(bn, "running_mean", None) is None


# Modules whose call is their formula and nothing else. Their subclasses are not: quantisation-aware layers
# round the weight, other libraries' batch norms apply an activation.
_PLAIN_TYPES: tuple[type[nn.Module], ...] = (
    nn.Conv2d,
    DepthwiseConv2d,
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    nn.Identity,
    nn.AvgPool2d,
    nn.Sequential,
    nn.ModuleList,
)


def is_plain(module: nn.Module, types: tuple[type[nn.Module], ...] = ()) -> bool:
    """Whether computing from the module's parameters skips nothing that calling it would do.

    True for the exact types of convolutions (padded by zeros), batch norms and containers, and for those in
    ``types``, unless a hook or a ``forward`` of its own is set on the module. All others are to be called.
    """
    exact = _hooks.is_plain(module, *_PLAIN_TYPES, *types)
    return exact and getattr(module, "padding_mode", "zeros") == "zeros"


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad_active()


def _sync_group(parts: Sequence[ConvBN]) -> tuple[bool, dist.ProcessGroup | None]:
    """Whether all batch norms share statistics between processes, and in which group."""
    first = parts[0].bn
    # As SyncBatchNorm itself: never in evaluation mode, in which perhaps one process alone runs.
    shares = isinstance(first, nn.SyncBatchNorm) and first.training
    if not shares or not (dist.is_available() and dist.is_initialized()):
        return False, None
    group = first.process_group or dist.group.WORLD
    return dist.get_world_size(group) > 1, group


def _same_kind(parts: Sequence[ConvBN]) -> bool:
    """Batch norms of one type, mode (and process group); convolutions without bias: what the fused path
    takes."""
    kinds = {(type(p.bn), p.bn.training, getattr(p.bn, "process_group", None)) for p in parts}
    return len(kinds) == 1 and all(p.conv is None or p.conv.bias is None for p in parts)


def _situation(
    input: Tensor,
    parts: Sequence[ConvBN],
    target: Geometry,
    out_channels: int,
    synchronised: bool,
    preferred: str | None,
) -> Situation:
    batch_statistics = tuple(p.uses_batch_statistics() for p in parts)
    plain = all(p.is_plain() for p in parts)
    found = Situation(
        plain=plain and _same_kind(parts) if any(batch_statistics) else plain,
        batch_statistics=batch_statistics,
        # Processes that share statistics must run the same collectives, also one whose batch is empty.
        depthwise=is_depthwise(input.shape[1], out_channels, target.groups)
        and (synchronised or input.numel() > 0),
        cropped=any(p.crop != (0, 0) for p in parts),
        traced=_traced(),
        synchronised=synchronised,
    )
    if preferred or synchronised or plan(found).path != "fused":
        return found  # no matter what it costs
    return replace(found, in_place=_taps_in_place(input, parts, target, out_channels))


def _taps_in_place(
    input: Tensor, parts: Sequence[ConvBN], target: Geometry, out_channels: int
) -> tuple[int, ...] | None:
    """Taps of the kernels that the fused kernels of the CPU would sum in place, None on other backends."""
    dtype = autocast_dtype(input) or input.dtype
    if input.device.type != "cpu" or backends.namespace(input.device, dtype) != "lkconv":
        return None
    first = [parts[members[0]] for members in _of_one_output(parts)]
    geometries = [None if p.conv is None else p.geometry(target) for p in first]
    how = normalised_branches.arrange(input, geometries, out_channels, dtype)
    kernels = () if how is None else how.kernels
    return tuple(math.prod(g.kernel_size) for b in kernels if (g := geometries[b]) is not None)


def run_branches(input: Tensor, parts: Sequence[ConvBN], target: Geometry, out_channels: int) -> Tensor:
    """The sum of all branches, by whichever path :func:`lkconv.reparam.planner.plan` picks.

    Batch norms that train update their running statistics, as when they are called.

    Args:
        input: (N, C, H, W), in the parameters' dtype or what autocast makes of it.
        parts: at least one branch.
        target: the convolution into which all of them fit.
        out_channels: O of every branch.

    Returns:
        (N, O, H', W').

    Raises:
        ValueError: if a branch does not fit into the target where they run merged, or statistics are taken of
            a single value per channel.
        RuntimeError: in a double backward through statistics shared between processes.
    """
    path, keep, shared = _choose(input, parts, target, out_channels)
    if path == "merged":
        return run_merged(
            input, [p.linear(target, input.shape[1], input) for p in parts], target, out_channels
        )
    if path == "branches":
        return _one_by_one(input, parts)
    return _fused(input, parts, target, keep, shared)


def run_fused(
    input: Tensor,
    parts: Sequence[ConvBN],
    target: Geometry,
    out_channels: int,
    gains: Sequence[Tensor] | None = None,
    skip: bool = False,
) -> Tensor | None:
    """``sum_b gains[b] parts[b](input)``, plus ``input`` with ``skip``, as one node; None where
    :func:`run_branches` would not run these branches as one, and nothing has been computed.

    ``gains`` are (O,), one per branch, or None for ones. The rest is as for :func:`run_branches`.
    """
    path, keep, shared = _choose(input, parts, target, out_channels)
    if path in ("merged", "branches"):
        return None
    return _fused(input, parts, target, keep, shared, gains, skip)


class _Shared(NamedTuple):
    """Whether processes share statistics, and which."""

    synchronised: bool
    group: dist.ProcessGroup | None


def _choose(
    input: Tensor, parts: Sequence[ConvBN], target: Geometry, out_channels: int
) -> tuple[str, bool, _Shared]:
    """The path, whether branch outputs are kept, and with whom statistics are shared."""
    shared, preferred = _Shared(*_sync_group(parts)), preferred_path()
    situation = _situation(input, parts, target, out_channels, shared.synchronised, preferred)
    path = plan(situation, preferred).path
    return path, path == "fused", shared


def run_merged(input: Tensor, branches: Sequence[Branch], target: Geometry, out_channels: int) -> Tensor:
    """One convolution: the registered op for depthwise layers, ``F.conv2d`` for the others."""
    if is_depthwise(input.shape[1], out_channels, target.groups):
        return merged_depthwise_conv2d(input, branches, target)
    weight, bias = merge_kernels(branches, target)
    input = autocast_input(input)
    return convolve(input, weight.to(input.dtype), bias.to(input.dtype), target)


def _one_by_one(input: Tensor, parts: Sequence[ConvBN]) -> Tensor:
    out = parts[0](input)
    for part in parts[1:]:
        out = out + part(input)
    return out


def _fused(
    input: Tensor,
    parts: Sequence[ConvBN],
    target: Geometry,
    keep: bool,
    shared: _Shared,
    gains: Sequence[Tensor] | None = None,
    skip: bool = False,
) -> Tensor:
    groups = _of_one_output(parts)
    first = [parts[members[0]] for members in groups]
    spec = SumSpec(
        tuple(None if p.conv is None else p.geometry(target) for p in first),
        tuple(p.bn.eps for p in first),
        target,
        skip,
        keep,
        *shared,
    )
    weights = [None if p.conv is None else p.conv.weight for p in first]
    input = autocast_input(input)
    # A kernel and its input meet in one dtype, as under F.conv2d; the gradient returns in the kernel's own.
    weights = [w if w is None else w.to(input.dtype) for w in weights]
    with torch.autocast(input.device.type, enabled=False):
        gammas = [_summed(parts, members, gains, "weight", input) for members in groups]
        betas = [_summed(parts, members, gains, "bias", input) for members in groups]
        out, means, variances, count = BatchStatisticsSum.apply(input, spec, *weights, *gammas, *betas)
    rows = {part: row for row, members in enumerate(groups) for part in members}
    order = [rows[i] for i in range(len(parts))]
    _update_running_statistics([p.bn for p in parts], order, means, variances, int(count))
    return out


def _of_one_output(parts: Sequence[ConvBN]) -> list[list[int]]:
    """Indices of the parts, those together that normalise the same tensor alike: identities of one eps."""
    groups: dict[Any, list[int]] = {}
    for i, part in enumerate(parts):
        groups.setdefault(("identity", part.bn.eps) if part.conv is None else i, []).append(i)
    return list(groups.values())


def _summed(
    parts: Sequence[ConvBN], members: Sequence[int], gains: Sequence[Tensor] | None, name: str, like: Tensor
) -> Tensor | None:
    """The weight or bias of the batch norms ``members`` together, times their gains; None for that of one
    without."""
    if gains is None and len(members) == 1:
        return getattr(parts[members[0]].bn, name)
    total = None
    for i in members:
        value, gain = getattr(parts[i].bn, name), None if gains is None else gains[i]
        if value is None and name == "bias":
            continue
        wide = fold_dtype(like, *(t for t in (value, gain) if t is not None))
        if value is None:
            value = torch.ones(parts[i].bn.num_features, dtype=wide, device=like.device)
        term = value.to(wide) if gain is None else value.to(wide) * gain.to(wide)
        total = term if total is None else total + term
    return total


@torch.no_grad()
def _update_running_statistics(
    norms: Sequence[nn.Module | None], rows: Sequence[int], means: Tensor, variances: Tensor, count: int
):
    """What BatchNorm does in training: momentum (or a cumulative mean) and the unbiased variance. ``rows``:
    where each norm's statistics are."""
    all_means, all_variances = means.unbind(), (variances * (count / (count - 1))).unbind()
    for bn, row in zip(norms, rows, strict=True):
        assert isinstance(bn, _BatchNorm)
        if not bn.track_running_stats or bn.running_mean is None or bn.running_var is None:
            continue
        momentum = bn.momentum
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(bn.num_batches_tracked)
        bn.running_mean.lerp_(all_means[row].to(bn.running_mean.dtype), momentum or 0.0)
        bn.running_var.lerp_(all_variances[row].to(bn.running_var.dtype), momentum or 0.0)
