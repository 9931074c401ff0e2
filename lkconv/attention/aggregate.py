"""``group_mix_aggregate``: validation, choice of implementation, batch statistics and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import backends
from .. import reference_group_mix as reference
from . import registration
from .checks import MOST_SEGMENT, check_aggregate
from .derivatives import composed_aggregate, differentiable_gradients, sample_of, under_derivative
from .parameters import AggregateParameters

Group = Any  # a torch.distributed process group


def computed_dtype(tokens: Tensor) -> torch.dtype:
    """The dtype of tokens, or the one that autocast asks of a matrix product."""
    kind = tokens.device.type
    if tokens.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tokens.dtype


def namespace(tokens: Tensor) -> str | None:
    """The op namespace of the backend whose fused kernels take these tokens, (B, N, 15 * d); None for plain
    PyTorch."""
    if tokens.numel() == 0 or tokens.shape[-1] > 15 * MOST_SEGMENT or under_derivative():
        return None
    return backends.namespace(tokens.device, computed_dtype(tokens), "group_mix")


def autocast(tokens: Tensor) -> Tensor:
    """tokens in :func:`computed_dtype`."""
    return tokens.to(computed_dtype(tokens))


def _combine_statistics(mean: Tensor, var: Tensor, count: int, group: Group) -> tuple[Tensor, Tensor, float]:
    """Statistics over all processes of a group, with one collective for the four BatchNorms."""
    mine = torch.cat([mean.double().flatten(), var.double().flatten(), mean.new_tensor([count]).double()])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    table = torch.stack(everyone)
    means, variances = table[:, :-1].view(len(everyone), 2, *mean.shape).unbind(1)
    counts = table[:, -1]
    share = (counts / counts.sum()).view(-1, 1, 1)
    total_mean = (means * share).sum(0)
    total_var = ((variances + (means - total_mean) ** 2) * share).sum(0)
    return total_mean.to(mean.dtype), total_var.to(var.dtype), float(counts.sum())


class _BatchStatistics(torch.autograd.Function):
    """Aggregation normalised by the statistics of the batch.

    Inputs: op namespace, qkv, height, width, eps, layer_norm_eps, process group, then the 18 parameters
    (:meth:`AggregateParameters.flat`). Outputs: mixed, local, mean and biased variance (4, d), the number of
    values they are of, and for the backward pass premix and prelocal.
    """

    @staticmethod
    def forward(namespace, qkv, height, width, eps, layer_norm_eps, group, *parameters):
        ops = getattr(torch.ops, namespace)
        depthwise, pointwise, nw, nb, lw, lb = AggregateParameters.of(parameters)
        premix, prelocal, local, mean, var = ops.group_mix_mix(
            qkv, height, width, depthwise, pointwise, lw, lb, layer_norm_eps
        )
        count: float = 3 * qkv.shape[0] * qkv.shape[1]
        if group is not None:
            mean, var, count = _combine_statistics(mean, var, int(count), group)
        mixed = ops.group_mix_normalize(qkv, premix, nw, nb, mean, var, eps)
        return mixed, local, mean, var, count, premix, prelocal

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.namespace, qkv, ctx.height, ctx.width, *rest = inputs
        ctx.eps, ctx.layer_norm_eps, ctx.group, *parameters = rest
        _, _, mean, var, ctx.count, premix, prelocal = output
        ctx.mark_non_differentiable(mean, var, premix, prelocal)
        ctx.save_for_backward(qkv, premix, prelocal, mean, var, *parameters)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple[Any, Any]:
        """Every sample has statistics of its own."""
        namespace, *rest = arguments
        samples = [
            _BatchStatistics.apply(
                namespace, *(sample_of(a, d, i) for a, d in zip(rest, in_dims[1:], strict=True))
            )
            for i in range(info.batch_size)
        ]
        columns = list(zip(*samples, strict=True))
        stacked = tuple(c[0] if not isinstance(c[0], Tensor) else torch.stack(c) for c in columns)
        return stacked, tuple(None if not isinstance(c[0], Tensor) else 0 for c in columns)

    @staticmethod
    def backward(ctx: Any, grad_mixed: Tensor, grad_local: Tensor, *_: Any) -> tuple:
        qkv, premix, prelocal, mean, var, *flat = ctx.saved_tensors
        parameters = AggregateParameters.of(flat)
        nw, nb = parameters.norm_weights, parameters.norm_biases
        size, eps = (ctx.height, ctx.width), (ctx.eps, ctx.layer_norm_eps)
        if torch.is_grad_enabled():
            if ctx.group is not None:
                raise RuntimeError("double backward through synchronised batch statistics is not supported")
            outputs = composed_aggregate(qkv, size, parameters, None, eps)
            found = differentiable_gradients(outputs, (grad_mixed, grad_local), [qkv, *flat])
            return None, found[0], *[None] * 5, *found[1:]
        ops = getattr(torch.ops, ctx.namespace)
        sums = ops.group_mix_backward_reduce(grad_mixed, qkv, premix, nw, nb, mean, var, ctx.eps)
        grad_nw, grad_nb = registration.norm_gradients(sums, nw, nb)
        if ctx.group is not None:
            sums = sums.clone()
            dist.all_reduce(sums, group=ctx.group)
        grad_qkv, grads = registration.aggregate_backward(
            ops, grad_mixed, grad_local, qkv, premix, prelocal, size, parameters, (mean, var), eps, sums,
            float(ctx.count),
        )  # fmt: skip
        return (
            None, grad_qkv, None, None, None, None, None, *grads[:8], *grad_nw, *grad_nb, *grads[8:],
        )  # fmt: skip


class BatchStatistics(NamedTuple):
    """Mean and biased variance of a batch, (4, d), over a number of ``values``."""

    mean: Tensor
    var: Tensor
    values: float

    def update(self, means: Sequence[Tensor], variances: Sequence[Tensor], momentum: float) -> None:
        """running <- (1 - momentum) running + momentum batch, the variance being the unbiased estimate."""
        with torch.no_grad():
            unbiased = self.var * (self.values / (self.values - 1))
            for i in range(4):
                means[i].lerp_(self.mean[i].to(means[i].dtype), momentum)
                variances[i].lerp_(unbiased[i].to(variances[i].dtype), momentum)


def aggregate_tokens(
    namespace: str,
    qkv: Tensor,
    size: tuple[int, int],
    parameters: AggregateParameters,
    running: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    eps: tuple[float, float],
    group: Group = None,
) -> tuple[Tensor, Tensor, BatchStatistics | None]:
    """The fused aggregation of a namespace in its own layout: mixed (3, B, N, 4 * d), local (B, N, d).

    ``running``: means and variances to normalise by; None for those of the batch, which are then returned
    and noted nowhere, because another backend repeats a call that fails later on. ``eps``: of the BatchNorms
    and of the LayerNorm.
    """
    height, width = size
    if running is not None:
        depthwise, pointwise, nw, nb, lw, lb = parameters
        mixed, local = getattr(torch.ops, namespace).group_mix_aggregate(
            qkv, height, width, depthwise, pointwise, nw, nb, *map(list, running), lw, lb, *eps
        )
        return mixed, local, None
    mixed, local, mean, var, count, _, _ = _BatchStatistics.apply(
        namespace, qkv, height, width, *eps, group, *parameters.flat()
    )
    return mixed, local, BatchStatistics(mean.detach(), var.detach(), count)


class _SplitHeads(torch.autograd.Function):
    """Views of q, k and v, whose gradients are gathered in one pass (unbind's would be permuted twice)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(mixed: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        parts, batch, tokens, channels = mixed.shape
        q, k, v = mixed.view(parts, batch, tokens, num_heads, channels // num_heads).transpose(2, 3).unbind()
        return q, k, v

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.stack([g.transpose(1, 2).reshape(ctx.shape[1:]) for g in grads]), None


def split_heads(mixed: Tensor, num_heads: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as (B, heads, N, 4 * d / heads): views of (3, B, N, 4 * d)."""
    return _SplitHeads.apply(mixed, num_heads)


@backends.retried
def group_mix_aggregate(
    qkv: Tensor,
    size: tuple[int, int],
    depthwise_weights: Sequence[Tensor],
    pointwise_weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    running_means: Sequence[Tensor] | None,
    running_vars: Sequence[Tensor] | None,
    layer_norm_weight: Tensor,
    layer_norm_bias: Tensor,
    *,
    num_heads: int = 8,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    layer_norm_eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Group proxies of Group-Mix attention, fused (GroupMixFormer, arXiv 2311.15157).

    The channels of q, k and v are cut into five segments of d = C / 5. Segment 0 passes through BatchNorm and
    hardswish; segments 1 to 3 through a depthwise 3 x 3, 5 x 5 or 7 x 7 convolution, a d x d pointwise one,
    BatchNorm and hardswish; segment 4 of q, k and v together through a depthwise 3 x 3, a 3d -> d pointwise
    convolution, LayerNorm and hardswish. q, k and v share all parameters and BatchNorm statistics.

    Where a backend has fused kernels (CPUs; GPUs through CUDA C++ or Triton) this is one pass over ``qkv`` in
    evaluation and two in training, without permuted copies. Elsewhere, for empty tensors, C > 2480, under
    ``torch.func.grad`` and its kin, in forward mode and under ``use_backend("torch")``, it runs as plain
    PyTorch (:mod:`lkconv.reference`), through which second derivatives are taken too.

    Args:
        qkv: (B, N, 3 * C), the output of ``Linear(C, 3 * C)``; float64, float32, float16 or bfloat16.
            Parameters may have any floating dtype; arithmetic is float32 (float64 for float64).
        size: (H, W) with H * W = N; any positive numbers.
        depthwise_weights: (d, 1, 3, 3), (d, 1, 5, 5), (d, 1, 7, 7) and, for segment 4, (3 * d, 1, 3, 3).
        pointwise_weights: three (d, d) and (d, 3 * d), with or without two trailing ones.
        norm_weights, norm_biases: four (d,), of the BatchNorms of segments 0 to 3.
        running_means, running_vars: four (d,). With ``training`` they are updated in place (the variance with
            the unbiased estimate over 3 * B * N values), or may be None.
        layer_norm_weight, layer_norm_bias: (d,).
        num_heads: 8.
        training: normalise by the statistics of the batch.
        momentum: of the running statistics.
        eps, layer_norm_eps: added to the variances.

    Returns:
        q, k, v: (B, 8, N, d / 2), segment s being heads 2s and 2s + 1. In memory the heads of a token are
            next to each other: these are views of one (3, B, N, 4 * d) tensor.
        local: (B, N, d), the non-attention branch.

    Raises:
        ValueError: a shape does not fit; C is not a multiple of 5; 4 C / 5 is not divisible by 8;
            ``num_heads`` is not 8; statistics are missing.
        TypeError: ``qkv`` is not a floating-point tensor, or ``size`` not of integers.
    """
    norms = {"norm_weights": norm_weights, "norm_biases": norm_biases}
    if (running_means is None) != (running_vars is None):
        raise ValueError("running_means and running_vars must be given together")
    if running_means is not None and running_vars is not None:
        norms |= {"running_means": running_means, "running_vars": running_vars}
    elif not training:
        raise ValueError("running_means and running_vars are needed when training=False, got None")
    layer_norm = {"layer_norm_weight": layer_norm_weight, "layer_norm_bias": layer_norm_bias}
    check_aggregate(qkv, size, depthwise_weights, pointwise_weights, norms, layer_norm, num_heads)
    qkv = autocast(qkv)
    if (kernels := namespace(qkv)) is not None:
        parameters = AggregateParameters(
            list(depthwise_weights), list(pointwise_weights), list(norm_weights), list(norm_biases),
            layer_norm_weight, layer_norm_bias,
        )  # fmt: skip
        given = None if running_means is None or running_vars is None else (running_means, running_vars)
        mixed, local, statistics = aggregate_tokens(
            kernels, qkv, size, parameters, None if training else given, (eps, layer_norm_eps)
        )
        if statistics is not None and given is not None:
            statistics.update(*given, momentum)
        return *split_heads(mixed), local
    return reference.group_mix_aggregate(
        qkv, size, depthwise_weights, pointwise_weights, norm_weights, norm_biases, running_means,
        running_vars, layer_norm_weight, layer_norm_bias, num_heads=num_heads, training=training,
        momentum=momentum, eps=eps, layer_norm_eps=layer_norm_eps,
    )  # fmt: skip
