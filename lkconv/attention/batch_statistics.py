"""Aggregation normalised by the statistics of a batch, which processes may share, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import reference_group_mix as reference
from . import registration
from .derivatives import (
    accumulation_dtype,
    apply,
    composed_aggregate,
    differentiable_gradients,
    eager_form,
    sample_of,
)
from .heads import head_views, token_rows
from .parameters import AggregateParameters

Group = Any  # a torch.distributed process group


def _number(values: int, like: Tensor) -> Tensor | float:
    """For compilers a number as a tensor: floats are constants to them, and every batch size is compiled
    anew."""
    if not torch.compiler.is_compiling():
        return float(values)
    return torch.full((), values, dtype=torch.int64, device=like.device).double()


class BatchStatistics(NamedTuple):
    """Mean and biased variance of a batch, (4, d), over a number of ``values``."""

    mean: Tensor
    var: Tensor
    values: int

    def update(self, means: Sequence[Tensor], variances: Sequence[Tensor], momentum: float) -> None:
        """running <- (1 - momentum) running + momentum batch, the variance being the unbiased estimate."""
        if self.values == 0:  # no process has an image
            return
        with torch.no_grad():
            values = _number(self.values, self.var)
            ratio = values / (values - 1)
            unbiased = self.var * (ratio.to(self.var.dtype) if isinstance(ratio, Tensor) else ratio)
            for running, batch in ((means, self.mean), (variances, unbiased)):
                parts = list(batch.to(running[0].dtype).unbind())
                if len({one.dtype for one in running}) > 1:
                    parts = [p.to(one.dtype) for one, p in zip(running, parts, strict=True)]
                torch._foreach_lerp_(list(running), parts, momentum)


def shared_group(group: Group) -> Group | None:
    """The group, or None where it has one process alone or there are no processes to share with."""
    if group is None or not (dist.is_available() and dist.is_initialized()):
        return None
    return group if dist.get_world_size(group) > 1 else None


# ---- through the fused ops --------------------------------------------------------------------------------
def _combine_statistics(mean: Tensor, var: Tensor, count: int, group: Group) -> tuple[Tensor, Tensor, int]:
    """Statistics over all processes of a group, with one collective for the four BatchNorms."""
    mine = torch.cat([mean.double().flatten(), var.double().flatten(), mean.new_tensor([count]).double()])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    table = torch.stack(everyone)
    means, variances = table[:, :-1].view(len(everyone), 2, *mean.shape).unbind(1)
    counts = table[:, -1]
    share = (counts / counts.sum().clamp(min=1)).view(-1, 1, 1)
    total_mean = (means * share).sum(0)
    total_var = ((variances + (means - total_mean) ** 2) * share).sum(0)
    return total_mean.to(mean.dtype), total_var.to(var.dtype), int(counts.sum())


def _grad_mixed(given: Sequence[Tensor | None], premix: Tensor) -> list[Tensor]:
    """The gradient of mixed, or those of its three parts from those of the heads; zeros where none came. GPU
    kernels want the parts side by side: put there once for all ops of a backward pass."""
    shape = [*premix.shape[:3], premix.shape[3] // 3 * 4]
    if len(given) == 1:
        return [premix.new_zeros(shape) if given[0] is None else given[0]]
    parts = [premix.new_zeros(shape[1:]) if g is None else token_rows(g) for g in given]
    return parts if premix.device.type == "cpu" else [torch.stack(parts)]


class _NormalisedByBatch(torch.autograd.Function):
    """Aggregation normalised by the statistics of the batch.

    Inputs: op namespace, number of heads or 0, qkv, height, width, eps, layer_norm_eps, process group, then
    the 18 parameters (:meth:`AggregateParameters.flat`). Outputs: mixed, or q, k and v if heads are asked
    for, whose gradients need not be gathered then; local, mean and biased variance (4, d), the number of
    values they are of, and for the backward pass premix and prelocal.
    """

    @staticmethod
    def forward(namespace, heads, qkv, height, width, eps, layer_norm_eps, group, *parameters):
        ops = getattr(torch.ops, namespace)
        depthwise, pointwise, nw, nb, lw, lb = AggregateParameters.of(parameters)
        premix, prelocal, local, mean, var = registration.call(
            ops, "group_mix_mix", qkv, qkv, height, width, depthwise, pointwise, lw, lb, layer_norm_eps
        )
        count = 3 * qkv.shape[0] * qkv.shape[1]
        if group is not None:
            mean, var, count = _combine_statistics(mean, var, count, group)
        mixed = registration.call(ops, "group_mix_normalize", qkv, qkv, premix, nw, nb, mean, var, eps)
        outputs = head_views(mixed, heads) if heads else (mixed,)
        return *outputs, local, mean, var, count, premix, prelocal

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.namespace, _, qkv, ctx.height, ctx.width, *rest = inputs
        ctx.eps, ctx.layer_norm_eps, ctx.group, *parameters = rest
        *_, mean, var, ctx.count, premix, prelocal = output
        ctx.mark_non_differentiable(mean, var, premix, prelocal)
        ctx.set_materialize_grads(False)  # of premix and prelocal, they would be large tensors of zeros
        ctx.save_for_backward(qkv, premix, prelocal, mean, var, *parameters)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple[Any, Any]:
        """Every sample has statistics of its own."""
        namespace, *rest = arguments
        samples = [
            _NormalisedByBatch.apply(
                namespace, *(sample_of(a, d, i) for a, d in zip(rest, in_dims[1:], strict=True))
            )
            for i in range(info.batch_size)
        ]
        columns = list(zip(*samples, strict=True))
        stacked = tuple(c[0] if not isinstance(c[0], Tensor) else torch.stack(c) for c in columns)
        return stacked, tuple(None if not isinstance(c[0], Tensor) else 0 for c in columns)

    @staticmethod
    def backward(ctx: Any, *of_outputs: Tensor | None) -> tuple:
        *of_mixed, grad_local = of_outputs[:-5]
        qkv, premix, prelocal, mean, var, *flat = ctx.saved_tensors
        grad_mixed = _grad_mixed(of_mixed, premix)
        if grad_local is None:
            grad_local = torch.zeros_like(prelocal)
        parameters = AggregateParameters.of(flat)
        nw, nb = parameters.norm_weights, parameters.norm_biases
        size, eps = (ctx.height, ctx.width), (ctx.eps, ctx.layer_norm_eps)
        if torch.is_grad_enabled():
            outputs = _composed(qkv, size, parameters, eps, ctx.group)
            whole = grad_mixed[0] if len(grad_mixed) == 1 else torch.stack(grad_mixed)
            found = differentiable_gradients(outputs, (whole, grad_local), [qkv, *flat])
            return None, None, found[0], *[None] * 5, *found[1:]
        ops = getattr(torch.ops, ctx.namespace)
        sums = registration.call(
            ops, "group_mix_backward_reduce", qkv, grad_mixed, qkv, premix, nw, nb, mean, var, ctx.eps
        )
        grad_nw, grad_nb = registration.norm_gradients(sums, nw, nb)
        if ctx.group is not None:
            sums = sums.clone()
            dist.all_reduce(sums, group=ctx.group)
        means = sums / _number(ctx.count, sums)  # of which the op is told that they are of one value
        grad_qkv, grads = registration.aggregate_backward(
            ops, grad_mixed, grad_local, qkv, premix, prelocal, size, parameters, (mean, var),
            eps, means, 1.0,
        )  # fmt: skip
        return (
            None, None, grad_qkv, None, None, None, None, None, *grads[:8], *grad_nw, *grad_nb, *grads[8:],
        )  # fmt: skip


_NormalisedByBatchEager = eager_form(_NormalisedByBatch)


def normalised_by_batch(
    namespace: str,
    qkv: Tensor,
    size: tuple[int, int],
    parameters: AggregateParameters,
    eps: tuple[float, float],
    group: Group,
    heads: int = 0,
) -> tuple[tuple[Tensor, ...], Tensor, BatchStatistics]:
    """Through a namespace's fused ops: mixed (3, B, N, 4 * d), alone in a tuple, or with ``heads`` q, k and
    v, each (B, heads, N, 4 * d / heads); local (B, N, d); and the statistics."""
    *mixed, local, mean, var, count, _, _ = apply(
        _NormalisedByBatch, _NormalisedByBatchEager, namespace, heads, qkv, *size, *eps, group,
        *parameters.flat(),
    )  # fmt: skip
    return tuple(mixed), local, BatchStatistics(mean.detach(), var.detach(), count)


# ---- in plain PyTorch -------------------------------------------------------------------------------------
class _SumOver(torch.autograd.Function):
    """The sum of a tensor over processes; so is its gradient, of every order."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: Group) -> Tensor:
        ctx.group = group
        total = mine.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SumOver.apply(grad, ctx.group), None


def composed_synchronised(
    qkv: Tensor,
    size: tuple[int, int],
    parameters: AggregateParameters,
    eps: tuple[float, float],
    group: Group,
) -> tuple[Tensor, Tensor, Tensor, Tensor, BatchStatistics]:
    """q, k, v, local and the statistics of all processes, in differentiable operations and one collective."""
    depthwise, pointwise, nw, nb, lw, lb = parameters
    mixed = reference.mix_segments(qkv, size, depthwise, pointwise)
    # In float64, in which a difference of sums loses nothing that float32 holds.
    wide = [u.double() for u in mixed]
    sums = [torch.stack([u.sum((0, 2, 3)) for u in parts]) for parts in (wide, [u.square() for u in wide])]
    count = sums[0].new_tensor([mixed[0].numel() // mixed[0].shape[1]])
    *flat, values = _SumOver.apply(torch.cat([*(t.flatten() for t in sums), count]), group).split(
        [sums[0].numel()] * 2 + [1]
    )
    mean, square = (t.view_as(sums[0]) / values.clamp(min=1) for t in flat)
    var = square - mean.square()
    scale = (var + eps[0]).rsqrt() * torch.stack([w.double() for w in nw])
    shift = torch.stack([b.double() for b in nb]) - mean * scale
    normal = [
        (u * a.view(-1, 1, 1) + b.view(-1, 1, 1)).to(qkv.dtype)
        for u, a, b in zip(wide, scale, shift, strict=True)
    ]
    local = reference.local_branch(qkv, size, depthwise[3], pointwise[3], lw, lb, eps[1])
    found = BatchStatistics(mean.detach(), var.detach(), int(values.detach()))
    return *reference.heads_of([F.hardswish(u) for u in normal]), local, found


def _composed(
    qkv: Tensor,
    size: tuple[int, int],
    parameters: AggregateParameters,
    eps: tuple[float, float],
    group: Group,
) -> tuple[Tensor, Tensor]:
    """``mixed`` and ``local`` in differentiable operations, for the second derivative."""
    if group is None:
        return composed_aggregate(qkv, size, parameters, None, eps)
    q, k, v, local, _ = composed_synchronised(qkv.to(accumulation_dtype(qkv)), size, parameters, eps, group)
    mixed = torch.stack([q, k, v]).transpose(2, 3).flatten(3)
    return mixed.to(qkv.dtype), local.to(qkv.dtype)
