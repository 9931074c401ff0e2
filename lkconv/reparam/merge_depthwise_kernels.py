"""``lkconv::merge_depthwise_kernels``: branch kernels placed, scaled and summed by one kernel; its adjoint.

    K = sum_b place_b(s_b W_b),  bias = sum_j bias_j                                     (the fold)
    dW_b = s_b gather_b(G),  ds_b = <gather_b(G), W_b>,  dbias_j = g                     (the adjoint)

The fold is linear in the weights and in the scales, and the adjoint is linear in (G, g) and in each of them,
so that derivatives of every order stay inside the two: with cotangents W'_b, s'_b, bias'_j of the adjoint's
outputs,

    G' = sum_b place_b(s_b W'_b + s'_b W_b),  g' = sum_j bias'_j             a fold of twice as many branches
    W_b' = s'_b gather_b(G),  s_b' = <gather_b(G), W'_b>                     the adjoint, on (W', s')

:func:`register_hooks` adds fake kernels, autograd and vmap to the two ops of a namespace, as
:func:`lkconv.ops.register_hooks` does for the convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lkconv import backends, reference_merge
from lkconv.reparam.geometry import Placement

NAME = "merge_depthwise_kernels"
_registered: set[str] = set()
_libraries: list[torch.library.Library] = []  # a Library's registrations end with its life


def merge_depthwise_kernels(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    kernel_size: tuple[int, int],
    placements: Sequence[Placement],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The fold on the backend in use, as :func:`lkconv.reference.merge_depthwise_kernels` specifies it."""
    ops = _ops(dtype, *weights, *scales, *biases)
    return ops.merge_depthwise_kernels(
        list(weights), list(scales), list(biases), kernel_size, *_flat(placements), dtype
    )


def merge_depthwise_kernels_backward(
    grad_weight: Tensor,
    grad_bias: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    placements: Sequence[Placement],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The adjoint on the backend in use: gradients of weights, scales and biases."""
    ops = _ops(grad_weight.dtype, grad_bias, *weights, *scales, *biases)
    return ops.merge_depthwise_kernels_backward(
        grad_weight, grad_bias, list(weights), list(scales), list(biases), *_flat(placements)
    )


def _flat(placements: Sequence[Placement]) -> tuple[list[int], list[int]]:
    return [o for p in placements for o in p.offset], [s for p in placements for s in p.step]


def _ops(dtype: torch.dtype, *tensors: Tensor) -> Any:
    """The op packets of the backend that takes every operand, else the functions in plain PyTorch."""
    dtypes = {dtype, *(t.dtype for t in tensors)}
    found = {backends.namespace(tensors[0].device, d, "merge_depthwise_kernels") for d in dtypes}
    namespace = found.pop()
    if namespace is None or found or any(t.layout is not torch.strided for t in tensors):
        return reference_merge
    return getattr(torch.ops, namespace)


def register_hooks(namespace: str) -> None:
    """Fake kernels, autograd and vmap for the two ops of ``namespace``; a second call does nothing."""
    if namespace in _registered:
        return
    _registered.add(namespace)
    packets = getattr(torch.ops, namespace)
    fold = packets.merge_depthwise_kernels.default
    adjoint = packets.merge_depthwise_kernels_backward.default
    library = torch.library.Library(namespace, "FRAGMENT")
    _libraries.append(library)
    fold_gradient, adjoint_gradient = _gradients(fold, adjoint)
    fold_batching, adjoint_batching = _batching(fold, adjoint)
    for op, fake, gradient, setup, batching in (
        (fold, _fake_fold, fold_gradient, _setup_fold, fold_batching),
        (adjoint, _fake_adjoint, adjoint_gradient, _setup_adjoint, adjoint_batching),
    ):
        name = op.name()
        torch.library.register_fake(name, fake, lib=library, allow_override=True)
        torch.library.register_autograd(name, gradient, setup_context=setup, lib=library)
        torch.library.register_vmap(name, batching, lib=library)


# --- fake kernels -----------------------------------------------------------------------------------------


def _fake_fold(weights, scales, biases, kernel_size, offset, step, dtype):
    channels = weights[0].shape[0]
    kernel = weights[0].new_empty((channels, 1, *kernel_size), dtype=dtype)
    return kernel, kernel.new_empty((channels,))


def _fake_adjoint(grad_weight, grad_bias, weights, scales, biases, offset, step):
    return tuple([t.new_empty(t.shape) for t in group] for group in (weights, scales, biases))


# --- autograd ---------------------------------------------------------------------------------------------


def _setup_fold(ctx, inputs, output) -> None:
    weights, scales, biases, _, ctx.offset, ctx.step, _ = inputs
    ctx.counts = len(weights), len(scales)
    ctx.save_for_backward(*weights, *scales, *biases)


def _setup_adjoint(ctx, inputs, output) -> None:
    grad_weight, grad_bias, weights, scales, biases, ctx.offset, ctx.step = inputs
    ctx.counts = len(weights), len(scales)
    ctx.bias_count = len(biases)
    ctx.save_for_backward(grad_weight, grad_bias, *weights, *scales)


def _split(tensors: Sequence[Tensor], counts: tuple[int, int]) -> tuple[list[Tensor], ...]:
    """Weights, scales and what follows them."""
    weights, scales = counts
    return (
        list(tensors[:weights]),
        list(tensors[weights : weights + scales]),
        list(tensors[weights + scales :]),
    )


def _gradients(fold: Any, adjoint: Any) -> tuple[Any, Any]:
    def fold_gradient(ctx, grad_weight, grad_bias):
        weights, scales, biases = _split(ctx.saved_tensors, ctx.counts)
        found = adjoint(grad_weight, grad_bias, weights, scales, biases, ctx.offset, ctx.step)
        return *found, None, None, None, None

    def adjoint_gradient(ctx, to_weights, to_scales, to_biases):
        grad_weight, grad_bias, *rest = ctx.saved_tensors
        weights, scales, _ = _split(rest, ctx.counts)
        grads: list[Any] = [None, None, [None] * len(weights), [None] * len(scales)]
        need_weight, need_bias, need_weights, need_scales = ctx.needs_input_grad[:4]
        if need_weight or need_bias:
            size = grad_weight.shape[2:]
            # Without scales the second half, s'_b W_b, is absent.
            times = 2 if scales else 1
            grads[0], bias = fold(
                [*to_weights, *weights] if scales else to_weights,
                [*scales, *to_scales],
                to_biases,
                size,
                list(ctx.offset) * times,
                list(ctx.step) * times,
                grad_weight.dtype,
            )
            grads[1] = bias.to(grad_bias.dtype)
        if scales and (any(need_weights) or any(need_scales)):
            grads[2], grads[3], _ = adjoint(
                grad_weight, grad_bias, to_weights, to_scales, [], ctx.offset, ctx.step
            )
        return *grads, [None] * ctx.bias_count, None, None

    return fold_gradient, adjoint_gradient


# --- vmap -------------------------------------------------------------------------------------------------


def _into_channels(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Sample b's channel c becomes channel ``b * C + c``: every channel is folded by itself."""
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


def _batching(fold: Any, adjoint: Any) -> tuple[Any, Any]:
    def flatten(info, tensors, dims):
        return [_into_channels(t, d, info.batch_size) for t, d in zip(tensors, dims, strict=True)]

    def unflatten(info, tensor):
        return tensor.unflatten(0, (info.batch_size, tensor.shape[0] // info.batch_size))

    def batched_fold(info, in_dims, weights, scales, biases, *rest):
        groups = [flatten(info, t, d) for t, d in zip((weights, scales, biases), in_dims[:3], strict=True)]
        kernel, bias = fold(*groups, *rest)
        return (unflatten(info, kernel), unflatten(info, bias)), (0, 0)

    def batched_adjoint(info, in_dims, grad_weight, grad_bias, weights, scales, biases, *rest):
        dense = flatten(info, (grad_weight, grad_bias), in_dims[:2])
        groups = [flatten(info, t, d) for t, d in zip((weights, scales, biases), in_dims[2:5], strict=True)]
        found = tuple([unflatten(info, t) for t in group] for group in adjoint(*dense, *groups, *rest))
        return found, tuple([0] * len(group) for group in found)

    return batched_fold, batched_adjoint


register_hooks("lkconv")
