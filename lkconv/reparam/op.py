"""``lkconv::merged_depthwise_conv2d``: fold all branches, then run one depthwise convolution.

Forward: K = sum_b place_b(s_b W_b), bias = sum_b bias_b in one kernel, one convolution.
Backward, with G = dL/dK (one backward_weight) and g = dL/dbias: dW_b = s_b gather_b(G),
ds_b = <gather_b(G), W_b>, dbias_b = g in one kernel, and one backward_input on K. K is folded again rather
than saved: it costs a multiply-add per tap of each branch, nothing beside a convolution over an image.

The schema is flat because op schemas know no structures: branch b uses elements 2b and 2b + 1 of
``branch_padding`` and ``branch_dilation``; ``scales`` is empty or has one (O,) vector per branch; ``biases``
are simply added up, so there may be any number of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lkconv.ops import AUTOCAST_DEVICES
from lkconv.reparam import convolution
from lkconv.reparam.algebra import fold_dtype
from lkconv.reparam.geometry import Geometry, Placement, place_geometry
from lkconv.reparam.merge_depthwise_kernels import (
    merge_depthwise_kernels,
    merge_depthwise_kernels_backward,
)

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
    kernel, bias = merge_depthwise_kernels(
        weights, scales, biases, target.kernel_size, placements, input.dtype
    )
    return convolution.forward(input, kernel, bias if biases else None, target)


def _fake(input: Tensor, weights: list[Tensor], *rest) -> Tensor:
    kernel_size, stride, padding, dilation = rest[2:6]
    kernel = input.new_empty((weights[0].shape[0], 1, *kernel_size))
    return convolution.forward(input, kernel, None, _target(kernel_size, stride, padding, dilation))


def _setup_context(ctx, inputs, output) -> None:
    input, weights, scales, biases, *geometry = inputs
    ctx.save_for_backward(input, *weights, *scales, *biases)
    ctx.counts = (len(weights), len(scales))
    ctx.geometry = geometry


def _backward(ctx, grad: Tensor):
    """Written in differentiable operations alone, so it is also its own double backward."""
    input, *rest = ctx.saved_tensors
    split = sum(ctx.counts)
    weights, scales, biases = rest[: ctx.counts[0]], rest[ctx.counts[0] : split], rest[split:]
    target = _target(*ctx.geometry[:4])
    placements = _placements(weights, _static_size(input), target, *ctx.geometry[4:])
    need_input, need_weights, need_scales, need_biases = ctx.needs_input_grad[:4]
    grad_input = None
    if need_input:
        kernel, _ = merge_depthwise_kernels(weights, scales, [], target.kernel_size, placements, input.dtype)
        grad_input = convolution.backward_input(grad, kernel, tuple(input.shape), target)
    grad_bias = grad.sum((0, 2, 3), dtype=fold_dtype(grad)) if any(need_biases) else None
    if any(need_weights) or any(need_scales):
        grads = _gather(grad, grad_bias, input, (weights, scales, biases), target, placements)
    else:
        grads = [None] * len(weights), [None] * len(scales), _cast(grad_bias, biases, need_biases)
    return grad_input, *grads, *[None] * len(ctx.geometry)


def _gather(grad, grad_bias, input, operands, target, placements):
    """Gradients of weights, scales and biases from that of the merged kernel."""
    weights, scales, biases = operands
    grad_kernel = convolution.backward_weight(grad, input, target)
    if grad_bias is None:
        unused = grad_kernel.new_empty(grad_kernel.shape[0])
        found = merge_depthwise_kernels_backward(grad_kernel, unused, weights, scales, [], placements)
        return found[0], found[1], [None] * len(biases)
    return merge_depthwise_kernels_backward(grad_kernel, grad_bias, weights, scales, biases, placements)


def _cast(grad_bias: Tensor | None, biases: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    return [
        grad_bias.to(b.dtype) if n and grad_bias is not None else None
        for b, n in zip(biases, needed, strict=True)
    ]


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
