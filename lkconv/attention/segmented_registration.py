"""Hooks of ``segmented_depthwise_conv2d``: fake kernel, autograd, autocast and vmap, in every namespace.

Backends write the outputs of the segments into slices of one tensor. With x and the weights w of the segments
(none for an identity), and f the flip of a window::

    y = op(x, w)        gx = op(gy, f(w))        gw = depthwise_conv2d_backward_weight(gy, x)

where the last reads slices of gy and x in place: derivatives of every order stay inside the two ops. In
forward mode and for DTensors, whose sharding knows no lists with gaps, segments are convolved one by one and
put side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction

from .. import _vmap
from .._fake import memory_format
from ..ops import (
    AUTOCAST_DEVICES,
    apply,
    autocast_to,
    below_autograd,
    caller,
    forward_ad_active,
    holds_dtensor,
    is_recorded,
    redispatch,
)

NAME = "segmented_depthwise_conv2d"
ONES = (1, 1)

Segments = Sequence[Tensor | None]
_functions: dict[str, Any] = {}  # namespace -> the autograd function of its op
_libraries: list[torch.library.Library] = []  # a Library's registrations end with its life


def register_hooks(namespace: str) -> None:
    """Registers the op of a namespace with its hooks, once."""
    if namespace in _functions:
        return
    ops = getattr(torch.ops, namespace)
    op, convolve = ops.segmented_depthwise_conv2d.default, ops.depthwise_conv2d.default
    function = _autograd_function(op, convolve, ops.depthwise_conv2d_backward_weight.default)
    _functions[namespace] = function
    library = torch.library.Library(namespace, "FRAGMENT")
    _libraries.append(library)
    torch.library.register_fake(op.name(), _fake, lib=library, allow_override=True)
    torch.library.register_vmap(op.name(), _vmap_rule(op), lib=library)
    for key, device_type in AUTOCAST_DEVICES.items():
        library.impl(NAME, _autocast_kernel(op, device_type, key), key)
    # torch.library gave the op of Triton an autograd kernel when it made it.
    kernel = _autograd_kernel(op, convolve, function)
    library.impl(NAME, kernel, "Autograd", with_keyset=True, allow_override=True)


def eager(
    namespace: str, input: Tensor, weights: Segments, biases: Segments, splits: Sequence[int]
) -> Tensor:
    """The op in plain eager mode, without the trip through its autograd kernel in Python."""
    if is_recorded(input, *weights, *biases):
        return _functions[namespace].apply(input, splits, *weights, *biases)
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops, namespace).segmented_depthwise_conv2d.default(
            input, weights, biases, splits
        )


def same_padding(weight: Tensor) -> tuple[int, int]:
    """The padding that keeps the size of what an odd window slides over."""
    return weight.shape[2] // 2, weight.shape[3] // 2


def one_by_one(
    convolve: Callable, input: Tensor, weights: Segments, biases: Segments, splits: Sequence[int]
) -> Tensor:
    """The op as one ``depthwise_conv2d``, ``convolve``, for each segment, and ``torch.cat``."""

    def convolved(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return x if w is None or w.shape[0] == 0 else convolve(x, w, b, ONES, same_padding(w), ONES)

    return torch.cat(list(map(convolved, input.split(list(splits), dim=1), weights, biases)), dim=1)


def _fake(input: Tensor, weights: Segments, biases: Segments, splits: Sequence[int]) -> Tensor:
    return torch.empty_like(input, memory_format=memory_format(input))


# --- autograd ---------------------------------------------------------------------------------------------


def _autograd_kernel(op: Any, convolve: Any, function: Any) -> Callable:
    def kernel(keyset, input, weights, biases, splits):
        if holds_dtensor(input):
            return one_by_one(convolve, input, weights, biases, splits)
        if is_recorded(input, *weights, *biases):  # autograd sees no tensors inside lists
            return apply(function, input, splits, *weights, *biases)
        return redispatch(op, keyset, input, weights, biases, splits)

    return kernel


def _autograd_function(op: Any, convolve: Any, backward_weight: Any) -> Any:
    """The autograd function of ``op``, called with ``(input, splits, *weights, *biases)``."""
    again, gradient_of_weight = caller(op), caller(backward_weight)

    def forward(ctx, input, splits, *segments):
        weights, biases = _halves(segments)
        with below_autograd():
            output = op(input, weights, biases, splits)
        need_weights, _ = _halves(ctx.needs_input_grad[2:])
        if forward_ad_active():
            ctx.save_for_forward(input, *weights)
        # Frozen weights need no input to be kept, and the other way round.
        kept = weights if ctx.needs_input_grad[0] else [None] * len(weights)
        ctx.save_for_backward(input if any(need_weights) else None, *kept)
        ctx.splits = splits
        ctx.windows = [None if w is None else (w.shape[2:], same_padding(w)) for w in weights]
        return output

    def backward(ctx, grad):
        input, *weights = ctx.saved_tensors
        need_input, _, *need = ctx.needs_input_grad
        need_weights, need_biases = _halves(need)
        grads = grad.split(ctx.splits, dim=1)
        inputs = input.split(ctx.splits, dim=1) if any(need_weights) else grads

        def to_weight(g, x, window):
            kernel_size, padding = window
            return gradient_of_weight(g, x, kernel_size, ONES, padding, ONES)

        return (
            again(grad, _flipped(weights), [None] * len(weights), ctx.splits) if need_input else None,
            None,
            *(
                to_weight(g, x, window) if needed else None
                for g, x, window, needed in zip(grads, inputs, ctx.windows, need_weights, strict=True)
            ),
            *(g.sum((0, 2, 3)) if needed else None for g, needed in zip(grads, need_biases, strict=True)),
        )

    def jvp(ctx, input_tangent, _, *tangents):
        input, *weights = ctx.saved_tensors
        inputs = input.split(ctx.splits, dim=1)
        of_inputs = [None] * len(inputs) if input_tangent is None else input_tangent.split(ctx.splits, dim=1)
        segments = zip(inputs, weights, of_inputs, *_halves(tangents), strict=True)
        return torch.cat([_tangent(convolve, *segment) for segment in segments], dim=1)

    members: dict[str, Any] = {
        "forward": staticmethod(forward),
        "backward": staticmethod(backward),
        "jvp": staticmethod(jvp),
        "_compiled_autograd_key": staticmethod(torch.autograd.Function._compiled_autograd_key),
    }
    return type("SegmentedDepthwiseConv2d", (_SingleLevelFunction,), members)


def _halves(segments: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """What belongs to the weights and what to the biases, as many."""
    count = len(segments) // 2
    return list(segments[:count]), list(segments[count:])


def _flipped(weights: Segments) -> list[Tensor | None]:
    return [None if w is None else w.flip(2, 3) for w in weights]


def _tangent(
    convolve: Any,
    x: Tensor,
    w: Tensor | None,
    x_tangent: Tensor | None,
    w_tangent: Tensor | None,
    b_tangent: Tensor | None,
) -> Tensor:
    """The tangent of one segment."""
    total = torch.zeros_like(x)
    if w is None:
        return total if x_tangent is None else x_tangent
    for a, b in ((x_tangent, w), (x, w_tangent)):
        if a is not None and b is not None:
            total = total + convolve(a, b, None, ONES, same_padding(w), ONES)
    return total if b_tangent is None else total + b_tangent[:, None, None]


# --- autocast and vmap ------------------------------------------------------------------------------------


def _autocast_kernel(op: Any, device_type: str, key: str) -> Callable:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(input, weights, biases, splits):
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            weights, biases = ([autocast_to(dtype, t) for t in segments] for segments in (weights, biases))
            return op(autocast_to(dtype, input), weights, biases, splits)

    return kernel


def _vmap_rule(op: Any) -> Callable:
    def rule(info, in_dims, input, weights, biases, splits):
        size, input_dim = info.batch_size, in_dims[0]
        weight_dims, bias_dims = (_dims(d, len(splits)) for d in in_dims[1:3])
        if all(d is None for d in (*weight_dims, *bias_dims)):
            return _vmap.unfold(op(_vmap.into_batch(input, input_dim), weights, biases, splits), size, 0), 0

        def of_samples(segments, dims):
            pairs = list(zip(segments, dims, strict=True))
            return [t if d is None else t.select(d, i) for i in range(size) for t, d in pairs]

        # Samples with kernels of their own have segments of their own.
        folded = _vmap.into_channels(input, input_dim, size, 1)
        output = op(folded, of_samples(weights, weight_dims), of_samples(biases, bias_dims), [*splits] * size)
        return _vmap.unfold(output, size, 1), 1

    return rule


def _dims(dims: Any, count: int) -> Sequence[int | None]:
    """The vmapped dimension of every tensor in a list: one None may stand for all."""
    return dims if isinstance(dims, list | tuple) else [None] * count


register_hooks("lkconv")
