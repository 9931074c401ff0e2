"""``group_mix_aggregate``: validation, choice of implementation, batch statistics and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from .. import reference_group_mix as reference
from ..ops import holds_dtensor
from .batch_statistics import (
    BatchStatistics,
    Group,
    composed_synchronised,
    normalised_by_batch,
    shared_group,
)
from .checks import MOST_SEGMENT, NUM_HEADS, check_aggregate
from .derivatives import call_op, under_derivative
from .heads import split_heads
from .parameters import AggregateParameters


def computed_dtype(tokens: Tensor) -> torch.dtype:
    """The dtype of tokens, or the one that autocast asks of a matrix product."""
    kind = tokens.device.type
    if tokens.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tokens.dtype


def namespace(tokens: Tensor, synchronised: bool = False) -> str | None:
    """The op namespace of the backend whose fused kernels take these tokens, (B, N, 15 * d); None for plain
    PyTorch.

    Processes that share statistics must take the same path, or they wait for each other in different
    collectives: ``synchronised`` makes the choice independent of how many images this one has.
    """
    empty = tokens.numel() == 0 and not synchronised
    if empty or tokens.shape[-1] > 15 * MOST_SEGMENT or under_derivative():
        return None
    found = backends.namespace(tokens.device, computed_dtype(tokens), "group_mix")
    if found is not None and holds_dtensor(tokens):
        from . import sharding  # which imports torch.distributed.tensor

        sharding.register(found)
    return found


def autocast(tokens: Tensor) -> Tensor:
    """tokens in :func:`computed_dtype`."""
    dtype = computed_dtype(tokens)
    return tokens if tokens.dtype == dtype else tokens.to(dtype)


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
        mixed, local = call_op(
            getattr(torch.ops, namespace).group_mix_aggregate,
            qkv, height, width, depthwise, pointwise, nw, nb, *map(list, running), lw, lb, *eps,
        )  # fmt: skip
        return mixed, local, None
    (mixed,), local, statistics = normalised_by_batch(namespace, qkv, size, parameters, eps, group)
    return mixed, local, statistics


def aggregate_heads(
    namespace: str,
    qkv: Tensor,
    size: tuple[int, int],
    parameters: AggregateParameters,
    running: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    eps: tuple[float, float],
    group: Group = None,
) -> tuple[tuple[Tensor, ...], Tensor, BatchStatistics | None]:
    """:func:`aggregate_tokens` as heads: (q, k, v), each (B, 8, N, d / 2), local (B, N, d)."""
    if running is not None:
        mixed, local, _ = aggregate_tokens(namespace, qkv, size, parameters, running, eps)
        return split_heads(mixed), local, None
    return normalised_by_batch(namespace, qkv, size, parameters, eps, group, NUM_HEADS)


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
    process_group: Group = None,
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
            Parameters may have any floating dtype; arithmetic is float32 (float64 for float64), but on CPUs
            with AVX512-BF16 the pointwise product of bfloat16 tokens, whose factors are bfloat16.
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
        process_group: a ``torch.distributed`` group whose processes share the statistics of the batch,
            through one collective per direction; their batches may differ in size and be empty.

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
    parameters = AggregateParameters(
        list(depthwise_weights), list(pointwise_weights), list(norm_weights), list(norm_biases),
        layer_norm_weight, layer_norm_bias,
    )  # fmt: skip
    group = shared_group(process_group) if training else None
    running = None if running_means is None or running_vars is None else (running_means, running_vars)
    epsilons = (eps, layer_norm_eps)
    if (kernels := namespace(qkv, group is not None)) is not None:
        (q, k, v), local, statistics = aggregate_heads(
            kernels, qkv, size, parameters, None if training else running, epsilons, group
        )
    elif group is not None:
        q, k, v, local, statistics = composed_synchronised(qkv, size, parameters, epsilons, group)
    else:
        return reference.group_mix_aggregate(
            qkv, size, depthwise_weights, pointwise_weights, norm_weights, norm_biases, running_means,
            running_vars, layer_norm_weight, layer_norm_bias, num_heads=num_heads, training=training,
            momentum=momentum, eps=eps, layer_norm_eps=layer_norm_eps,
        )  # fmt: skip
    if statistics is not None and running is not None:
        statistics.update(*running, momentum)
    return q, k, v, local
