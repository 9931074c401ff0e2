"""The operators ``lkconv_triton::merge_depthwise_kernels*``: one launch folds all branches, one gathers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .launch import ceil_div, device_guard, needs_int64, triton_dtype
from .merge import merge_depthwise_kernels_backward_kernel, merge_depthwise_kernels_kernel

BLOCK = 256  # taps a program holds at once


def accumulator(dtype: torch.dtype, *groups: Iterable[Tensor]):
    """The dtype that sums are kept in: float64 if anything is float64."""
    wide = dtype == torch.float64 or any(t.dtype == torch.float64 for group in groups for t in group)
    return triton_dtype(torch.float64 if wide else torch.float32)


def geometry_of(weights: Sequence[Tensor], offset: Sequence[int], step: Sequence[int]):
    """(kernel, offset, step) of every branch, each as height and width."""
    return tuple(
        (int(w.shape[2]), int(w.shape[3]), *map(int, (*offset[i : i + 2], *step[i : i + 2])))
        for w, i in zip(weights, range(0, len(offset), 2), strict=True)
    )


def contiguous(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(t.contiguous() for t in tensors)


def merge_depthwise_kernels(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    kernel_size: Sequence[int],
    offset: Sequence[int],
    step: Sequence[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The dense kernel (C * m, 1, *kernel_size) and bias (C * m,); see ``lkconv.reference``."""
    channels, device = weights[0].shape[0], weights[0].device
    kernel = torch.empty((channels, 1, *kernel_size), dtype=dtype, device=device)
    bias = torch.empty((channels,), dtype=dtype, device=device)
    count = kernel.numel()
    if count == 0:
        return kernel, bias
    with device_guard(kernel):
        merge_depthwise_kernels_kernel[(ceil_div(count, BLOCK),)](
            kernel,
            bias,
            contiguous(weights),
            contiguous(scales),
            contiguous(biases),
            count,
            KH=int(kernel_size[0]),
            KW=int(kernel_size[1]),
            GEOMETRY=geometry_of(weights, offset, step),
            ACC=accumulator(dtype, weights, scales, biases),
            INT64=needs_int64(((count,), (1,))),
            BLOCK=BLOCK,
        )
    return kernel, bias


def merge_depthwise_kernels_backward(
    grad_weight: Tensor,
    grad_bias: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    offset: Sequence[int],
    step: Sequence[int],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The gradients of weights, scales and biases, each in its operand's dtype."""
    grads = [
        [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in group]
        for group in (weights, scales, biases)
    ]
    channels, _, kernel_h, kernel_w = grad_weight.shape
    if channels > 0:
        taps, scaled = contiguous(weights), len(scales) > 0
        to_weights, to_scales, to_biases = (tuple(group) for group in grads)
        with device_guard(grad_weight):
            merge_depthwise_kernels_backward_kernel[(channels,)](
                grad_weight.contiguous(),
                grad_bias.contiguous(),
                taps,
                contiguous(scales) if scaled else taps,
                to_weights,
                to_scales if scaled else to_weights,
                to_biases,
                KH=int(kernel_h),
                KW=int(kernel_w),
                GEOMETRY=geometry_of(weights, offset, step),
                SCALED=scaled,
                ACC=accumulator(grad_weight.dtype, [grad_bias], weights, scales, biases),
                INT64=needs_int64(((grad_weight.numel(),), (1,))),
                BLOCK=BLOCK,
            )
    return grads[0], grads[1], grads[2]
