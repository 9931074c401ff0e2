"""Folding branches into one, in plain PyTorch: the specification of the fused ops and their fallback.

Tap u of branch b lies at ``offset_b + u step_b`` of the dense kernel, per axis. Flat lists hold two elements
per branch, (height, width), as in the ops' schemas.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["merge_depthwise_kernels", "merge_depthwise_kernels_backward", "scaled_channel_sum"]

Pair = tuple[int, int]


def fold_dtype(*operands: Tensor | torch.dtype | None) -> torch.dtype:
    """float64 if any operand is, else float32: the precision in which kernels are folded."""
    dtypes = (t.dtype if isinstance(t, Tensor) else t for t in operands)
    return torch.float64 if any(d == torch.float64 for d in dtypes) else torch.float32


def spread_and_pad(weight: Tensor, placement: tuple[Pair, Pair], kernel_size: Pair) -> Tensor:
    """``weight`` (..., kh, kw) as (..., *kernel_size): taps at the placement, zeros elsewhere."""
    (offset_h, offset_w), (step_h, step_w) = placement
    *lead, kh, kw = weight.shape
    if step_h > 1 or step_w > 1:
        stuffed = F.pad(weight.reshape(*lead, kh, 1, kw, 1), (0, step_w - 1, 0, 0, 0, step_h - 1))
        weight = stuffed.reshape(*lead, kh * step_h, kw * step_w)
    # The right and bottom padding may be negative: it crops the zeros stuffed after the last tap.
    right = kernel_size[1] - offset_w - kw * step_w
    bottom = kernel_size[0] - offset_h - kh * step_h
    if not (offset_h or offset_w or right or bottom):
        return weight
    return F.pad(weight, (offset_w, right, offset_h, bottom))


def gather_taps(kernel: Tensor, placement: tuple[Pair, Pair], kernel_size: Pair) -> Tensor:
    """The transpose of :func:`spread_and_pad`: the branch's taps (..., kh, kw) read out of ``kernel``."""
    (oh, ow), (sh, sw) = placement
    kh, kw = kernel_size
    return kernel[..., oh : oh + sh * (kh - 1) + 1 : sh, ow : ow + sw * (kw - 1) + 1 : sw]


def _placements(offset: Sequence[int], step: Sequence[int]) -> list[tuple[Pair, Pair]]:
    return [((offset[i], offset[i + 1]), (step[i], step[i + 1])) for i in range(0, len(offset), 2)]


def merge_depthwise_kernels(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    kernel_size: Sequence[int],
    offset: Sequence[int],
    step: Sequence[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """K = sum_b place_b(s_b W_b) and bias = sum_j bias_j.

    Args:
        weights: at least one, (C m, 1, kh, kw), floating dtypes. scales: none, or (C m,) for each weight.
        biases: any number of (C m,). kernel_size: (kh, kw) of the dense kernel.
        offset, step: where the taps of each weight lie, two elements per weight.
        dtype: of the results. Sums are kept in float32, or float64 if anything is float64.

    Returns:
        (C m, 1, *kernel_size) and (C m,). Differentiable in every weight, scale and bias.
    """
    wide = fold_dtype(dtype, *weights, *scales, *biases)
    size = (kernel_size[0], kernel_size[1])
    kernels = []
    for b, (weight, placement) in enumerate(zip(weights, _placements(offset, step), strict=True)):
        scaled = weight.to(wide)
        if scales:
            scaled = scaled * scales[b].to(wide).reshape(-1, 1, 1, 1)
        kernels.append(spread_and_pad(scaled, placement, size))
    kernel = reduce(operator.add, kernels)
    bias = reduce(operator.add, (b.to(wide) for b in biases)) if biases else kernel.new_zeros(kernel.shape[0])
    return kernel.to(dtype), bias.to(dtype)


def merge_depthwise_kernels_backward(
    grad_weight: Tensor,
    grad_bias: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    offset: Sequence[int],
    step: Sequence[int],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The adjoint of :func:`merge_depthwise_kernels`: dW_b = s_b gather_b(G), ds_b = <gather_b(G), W_b>, g.

    Args:
        grad_weight: G, (C m, 1, KH, KW). grad_bias: g, (C m,). The others: those of the fold; of ``biases``
            only the dtypes matter.

    Returns:
        The gradients of weights, scales and biases, each in its operand's dtype. Twice differentiable.
    """
    wide = fold_dtype(grad_weight, grad_bias, *weights, *scales, *biases)
    dense = grad_weight.to(wide)
    grad_weights, grad_scales = [], []
    for b, (weight, placement) in enumerate(zip(weights, _placements(offset, step), strict=True)):
        taps = gather_taps(dense, placement, (weight.shape[2], weight.shape[3]))
        scaled = taps * scales[b].to(wide).reshape(-1, 1, 1, 1) if scales else taps
        grad_weights.append(scaled.to(weight.dtype))
        if scales:
            grad_scales.append((taps * weight.to(wide)).sum((1, 2, 3)).to(scales[b].dtype))
    return grad_weights, grad_scales, [grad_bias.to(b.dtype) for b in biases]


def scaled_channel_sum(inputs: Sequence[Tensor], scales: Tensor, shift: Tensor) -> Tensor:
    """``shift[c] + sum_b scales[b, c] inputs[b][:, c]``, one input after the other, in the inputs' dtype.

    Args:
        inputs: at least one (N, C, H, W), all of one shape and dtype. scales: (B, C); shift: (C,).
    """

    def channelwise(vector: Tensor) -> Tensor:
        return vector.to(inputs[0].dtype).reshape(1, -1, 1, 1)

    out = torch.addcmul(channelwise(shift), inputs[0], channelwise(scales[0]))
    for scale, y in zip(scales[1:], inputs[1:], strict=True):
        out = out.addcmul_(y, channelwise(scale))
    return out
