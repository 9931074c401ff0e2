"""``lkconv::merged_depthwise_conv2d``: fold all branches, then run one depthwise convolution.

Forward: K = sum_b place_b(s_b W_b), bias = sum_b bias_b, one convolution.
Backward, with G = dL/dK (one backward_weight) and g = dL/dbias: dW_b = s_b gather_b(G),
ds_b = <gather_b(G), W_b>, dbias_b = g, and one backward_input on K. K is folded again rather than saved: it
costs C K^2 multiply-adds per branch, nothing beside a convolution over an image.

The schema is flat because op schemas know no structures: branch b uses elements 2b and 2b + 1 of
``branch_padding`` and ``branch_dilation``; ``scales`` is empty or has one (O,) vector per branch; ``biases``
are simply added up, so there may be any number of them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from lkconv.ops import AUTOCAST_DEVICES
from lkconv.reparam import convolution
from lkconv.reparam.algebra import fold_dtype, gather_taps, spread_and_pad
from lkconv.reparam.geometry import Geometry, Placement, place_geometry

NAME = "lkconv::merged_depthwise_conv2d"
SCHEMA = (
    "(Tensor input, Tensor[] weights, Tensor[] scales, Tensor[] biases, SymInt[] kernel_size, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt[] branch_padding, "
    "SymInt[] branch_dilation) -> Tensor"
)


def _pair(values: Sequence[int], index: int = 0) -> tuple[int, int]:
    return int(values[2 * index]), int(values[2 * index + 1])


def _placements(
    weights: Sequence[Tensor],
    input_size: tuple[int, int] | None,
    target: Geometry,
    branch_padding: Sequence[int],
    branch_dilation: Sequence[int],
) -> list[Placement]:
    found = []
    for b, weight in enumerate(weights):
        size = (int(weight.shape[2]), int(weight.shape[3]))
        geometry = Geometry(size, target.stride, _pair(branch_padding, b), _pair(branch_dilation, b))
        found.append(place_geometry(geometry, target, f"branch {b}", input_size))
    return found


def _fold(
    weights: Sequence[Tensor], scales: Sequence[Tensor], placements: Sequence[Placement], target: Geometry
) -> Tensor:
    """The dense kernel in float32 or float64."""
    dtype = fold_dtype(*weights, *scales)
    kernels = []
    for b, weight in enumerate(weights):
        scaled = weight.to(dtype)
        if scales:
            scaled = scaled * scales[b].to(dtype).reshape(-1, 1, 1, 1)
        kernels.append(spread_and_pad(scaled, placements[b], target.kernel_size))
    return reduce(operator.add, kernels)


def _target(
    kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
):
    return Geometry(_pair(kernel_size), _pair(stride), _pair(padding), _pair(dilation))


def _static_size(input: Tensor) -> tuple[int, int] | None:
    """(H, W), or None while they are symbols: the check then asks for agreement at every size."""
    h, w = input.shape[2], input.shape[3]
    return (h, w) if isinstance(h, int) and isinstance(w, int) else None


def _forward(
    input: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    branch_padding: list[int],
    branch_dilation: list[int],
) -> Tensor:
    target = _target(kernel_size, stride, padding, dilation)
    placements = _placements(weights, _static_size(input), target, branch_padding, branch_dilation)
    kernel = _fold(weights, scales, placements, target).to(input.dtype)
    bias = None
    if biases:
        dtype = fold_dtype(*biases)
        bias = reduce(operator.add, (b.to(dtype) for b in biases)).to(input.dtype)
    return convolution.forward(input, kernel, bias, target)


def _fake(input: Tensor, weights: list[Tensor], *rest) -> Tensor:
    kernel_size, stride, padding, dilation = rest[2:6]
    kernel = input.new_empty((weights[0].shape[0], 1, *kernel_size))
    return convolution.forward(input, kernel, None, _target(kernel_size, stride, padding, dilation))


def _setup_context(ctx, inputs, output) -> None:
    input, weights, scales, biases, *geometry = inputs
    ctx.save_for_backward(input, *weights, *scales)
    ctx.counts = (len(weights), len(scales))
    ctx.bias_dtypes = [b.dtype for b in biases]
    ctx.geometry = geometry


def _backward(ctx, grad: Tensor):
    """Written in differentiable operations alone, so it is also its own double backward."""
    input, *rest = ctx.saved_tensors
    weights, scales = rest[: ctx.counts[0]], rest[ctx.counts[0] :]
    target = _target(*ctx.geometry[:4])
    placements = _placements(weights, _static_size(input), target, *ctx.geometry[4:])
    need_input, need_weights, need_scales, need_biases = ctx.needs_input_grad[:4]
    grad_input = None
    if need_input:
        kernel = _fold(weights, scales, placements, target).to(input.dtype)
        grad_input = convolution.backward_input(grad, kernel, tuple(input.shape), target)
    grad_weights: list[Tensor | None] = [None] * len(weights)
    grad_scales: list[Tensor | None] = [None] * len(scales)
    if any(need_weights) or any(need_scales):
        dtype = fold_dtype(*weights, *scales)
        grad_kernel = convolution.backward_weight(grad, input, target).to(dtype)
        for b, weight in enumerate(weights):
            taps = gather_taps(grad_kernel, placements[b], (weight.shape[2], weight.shape[3]))
            if need_weights[b]:
                scaled = taps * scales[b].to(dtype).reshape(-1, 1, 1, 1) if scales else taps
                grad_weights[b] = scaled.to(weight.dtype)
            if scales and need_scales[b]:
                grad_scales[b] = (taps * weight.to(dtype)).sum((1, 2, 3)).to(scales[b].dtype)
    grad_biases: list[Tensor | None] = [None] * len(ctx.bias_dtypes)
    if any(need_biases):
        total = grad.sum((0, 2, 3), dtype=fold_dtype(grad))
        grad_biases = [total.to(d) if n else None for d, n in zip(ctx.bias_dtypes, need_biases, strict=True)]
    return grad_input, grad_weights, grad_scales, grad_biases, *[None] * len(ctx.geometry)


torch.library.define(NAME, SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
torch.library.impl(NAME, "CompositeExplicitAutograd", _forward)
torch.library.register_fake(NAME, _fake)
torch.library.register_autograd(NAME, _backward, setup_context=_setup_context)


def _autocast_kernel(key: str):
    """Autocast casts the input alone: kernels are folded in their own precision and cast once, by the op."""
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(input: Tensor, *args) -> Tensor:
        input = convolution.autocast_input(input)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return torch.ops.lkconv.merged_depthwise_conv2d.default(input, *args)

    return kernel


for _key in AUTOCAST_DEVICES:
    torch.library.impl(NAME, _key, _autocast_kernel(_key))
