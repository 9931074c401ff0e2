"""``lkconv::normalised_branches`` and its sisters: a sum of batch-normalised branches in four passes.

    outputs    y_b of every branch and its mean and variance, from one read of the input
    sum        sum_b scale_b y_b + shift
    dots       sum of grad_output, and of grad_output (y_b - mean_b)
    backward   gradients of the input and of all kernels, from one read of grad_output and of every y_b

Stride 1, one kernel per channel; on CPUs, and on GPUs in Triton (``lkconv_triton``). A branch is a kernel,
the input itself, or a tensor given: a large kernel that another algorithm convolves faster than the sums in
place is convolved by ``lkconv``'s own op and joins as a tensor. Branch outputs are kept as the kernels of a
namespace read and write them: on CPUs in blocks of channels, in Triton in the input's memory format.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lkconv import _C, backends
from lkconv._fake import memory_format, output_size, stacked
from lkconv.reference_merge import fold_dtype
from lkconv.reparam import convolution
from lkconv.reparam.geometry import Geometry


@dataclass(frozen=True)
class Arrangement:
    """Which branch runs how: indices of kernels convolved in place, of the identity (or none), and of
    kernels convolved apart. The ops, those of ``namespace``, number branches in this order."""

    namespace: str
    kernels: tuple[int, ...]
    identity: tuple[int, ...]
    apart: tuple[int, ...]
    values_per_channel: int

    @property
    def order(self) -> tuple[int, ...]:
        return self.kernels + self.identity + self.apart

    @property
    def ops(self) -> Any:
        return getattr(torch.ops, self.namespace)


def arrange(
    input: Tensor,
    geometries: Sequence[Geometry | None],
    channels: int,
    dtype: torch.dtype | None = None,
) -> Arrangement | None:
    """The arrangement of a sum's branches, or None where these ops do not take it. ``dtype``: in which the
    input will be read, if not its own."""
    dtype = dtype or input.dtype
    convolutions = [(b, g) for b, g in enumerate(geometries) if g is not None]
    identity = tuple(b for b, g in enumerate(geometries) if g is None)
    strided = any(g.stride != (1, 1) for _, g in convolutions)
    namespace = backends.namespace(input.device, dtype, "normalised_branches")
    if namespace is None or strided or channels != input.shape[1] or len(identity) > 1 or input.dim() != 4:
        return None
    if input.numel() == 0:
        return None
    apart = tuple(b for b, g in convolutions if not _in_place(namespace, input, dtype, g))
    kernels = tuple(b for b, _ in convolutions if b not in apart)
    if not kernels:
        return None
    g = convolutions[0][1]
    height, width = output_size(input.shape[2:], g.kernel_size, g.stride, g.padding, g.dilation)
    return Arrangement(namespace, kernels, identity, apart, input.shape[0] * height * width)


def _in_place(namespace: str, input: Tensor, dtype: torch.dtype, geometry: Geometry) -> bool:
    if namespace != "lkconv":
        planner = importlib.import_module("lkconv.triton_kernels.normalised_branches_planner")
        return planner.in_place(geometry.kernel_size)
    channels_last = not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last)
    return _cheaper_in_place(
        tuple(input.shape),
        geometry.kernel_size,
        geometry.padding,
        geometry.dilation,
        str(dtype).removeprefix("torch."),
        channels_last,
        torch.get_num_threads(),
    )


@functools.lru_cache(maxsize=1024)
def _cheaper_in_place(size, kernel_size, padding, dilation, dtype, channels_last, threads) -> bool:
    isa = _C.active_isa()
    return _C.cheaper_in_place(size, kernel_size, padding, dilation, dtype, channels_last, isa, threads)


@dataclass(frozen=True)
class Kept:
    """What a forward pass keeps of its branches: outputs of kernels in place, and of those apart."""

    outputs: Tensor
    given: list[Tensor]


def outputs(
    input: Tensor, weights: Sequence[Tensor | None], geometries: Sequence[Geometry | None], how: Arrangement
) -> tuple[Kept, Tensor, Tensor]:
    """All branches, and their means and biased variances (B, C) in float32 or float64."""
    given = [_forward(input, weights[b], geometries[b]) for b in how.apart]
    kernels = [weights[b] for b in how.kernels]
    found = how.ops.normalised_branches(
        input, kernels, given, *_flat(geometries, how.kernels), bool(how.identity)
    )
    return Kept(found[0], given), _from_ops(found[1], how), _from_ops(found[2], how)


def normalised_sum(input: Tensor, kept: Kept, how: Arrangement, scales: Tensor, shift: Tensor) -> Tensor:
    """``sum_b scales[b] y_b + shift``, (N, C, H', W')."""
    return how.ops.normalised_branches_sum(
        input, kept.outputs, kept.given, bool(how.identity), _to_ops(scales, how), shift
    )


def dots(grad: Tensor, input: Tensor, kept: Kept, how: Arrangement, means: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of grad (C,) and of grad (y_b - means[b]) (B, C)."""
    total, found = how.ops.normalised_branches_dots(
        grad, input, kept.outputs, kept.given, bool(how.identity), _to_ops(means, how)
    )
    return total, _from_ops(found, how)


def backward(
    grad: Tensor,
    input: Tensor,
    weights: Sequence[Tensor | None],
    geometries: Sequence[Geometry | None],
    kept: Kept,
    how: Arrangement,
    coefficients: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of the input and of every weight, where the gradient at y_b is a[b] grad + b[b] y_b + c[b]
    for the three (B, C) ``coefficients``."""
    grad_input, in_place, apart = how.ops.normalised_branches_backward(
        grad,
        input,
        kept.outputs,
        [weights[b] for b in how.kernels],
        kept.given,
        *_flat(geometries, how.kernels),
        bool(how.identity),
        *(_to_ops(t, how) for t in coefficients),
    )
    grad_weights: list[Tensor | None] = [None] * len(weights)
    for b, found in zip(how.kernels, in_place, strict=True):
        grad_weights[b] = found
    for b, dz in zip(how.apart, apart, strict=True):
        weight, geometry = weights[b], geometries[b]
        assert weight is not None and geometry is not None
        grad_weights[b] = convolution.backward_weight(dz, input, geometry)
        grad_input += convolution.backward_input(dz, weight, tuple(input.shape), geometry)
    return grad_input, grad_weights


def _forward(input: Tensor, weight: Tensor | None, geometry: Geometry | None) -> Tensor:
    assert weight is not None and geometry is not None
    return convolution.forward(input, weight, None, geometry)


def _flat(geometries: Sequence[Geometry | None], kernels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Paddings and dilations of the branches ``kernels`` as the ops take them."""
    padding: list[int] = []
    dilation: list[int] = []
    for b in kernels:
        geometry = geometries[b]
        assert geometry is not None
        padding += geometry.padding
        dilation += geometry.dilation
    return padding, dilation


def _to_ops(rows: Tensor, how: Arrangement) -> Tensor:
    """Rows of branches in the order of the ops."""
    return _reordered(rows, how.order)


def _from_ops(rows: Tensor, how: Arrangement) -> Tensor:
    order = how.order
    return _reordered(rows, tuple(order.index(b) for b in range(len(order))))


def _reordered(rows: Tensor, order: tuple[int, ...]) -> Tensor:
    """``rows[order]``; few rows are stacked in half the time that an index takes."""
    if order == tuple(range(len(order))):
        return rows
    parts = rows.unbind()
    return torch.stack([parts[i] for i in order])


# --- fake kernels -----------------------------------------------------------------------------------------


def _fake_outputs(input, weights, given, padding, dilation, identity):
    size = _output_size(input, weights, padding, dilation)
    lanes = _lanes(input)
    n, c = input.shape[:2]
    saved = input.new_empty((len(weights), n, -(-c // lanes), *size, lanes))
    return saved, *_fake_statistics(input, weights, given, identity)


def _fake_triton_outputs(input, weights, given, padding, dilation, identity):
    saved = stacked(input, len(weights), *_output_size(input, weights, padding, dilation))
    return saved, *_fake_statistics(input, weights, given, identity)


def _output_size(input, weights, padding, dilation):
    return output_size(input.shape[2:], weights[0].shape[2:], (1, 1), padding[:2], dilation[:2])


def _fake_statistics(input, weights, given, identity):
    size = (len(weights) + identity + len(given), input.shape[1])
    means = input.new_empty(size, dtype=fold_dtype(input))
    return means, torch.empty_like(means)


def _lanes(input: Tensor) -> int:
    bytes_of = {"baseline": 16, "avx2": 32, "avx512": 64, "amx": 64}[_C.active_isa()]
    return bytes_of // fold_dtype(input).itemsize


def _fake_sum(input, outputs, given, identity, scales, shift):
    n, c = input.shape[:2]
    return torch.empty_like(input.new_empty((n, c, *outputs.shape[3:5])), memory_format=memory_format(input))


def _fake_dots(grad_output, input, outputs, given, identity, means):
    return means.new_empty(means.shape[1]), torch.empty_like(means)


def _fake_backward(grad_output, input, outputs, weights, given, *rest):
    return _fake_gradients(input, weights, given, [memory_format(t) for t in given])


def _fake_triton_backward(grad_output, input, outputs, weights, given, *rest):
    return _fake_gradients(input, weights, given, [memory_format(input)] * len(given))


def _fake_gradients(input, weights, given, formats):
    return (
        torch.empty_like(input, memory_format=memory_format(input)),
        [w.new_empty(w.shape) for w in weights],
        [torch.empty_like(t, memory_format=f) for t, f in zip(given, formats, strict=True)],
    )


_registered: set[str] = set()


def register_hooks(namespace: str) -> None:
    """Fake kernels of the ops of ``namespace``; a second call does nothing."""
    if namespace in _registered:
        return
    _registered.add(namespace)
    native = namespace == "lkconv"
    for name, fake in (
        ("normalised_branches", _fake_outputs if native else _fake_triton_outputs),
        ("normalised_branches_sum", _fake_sum),
        ("normalised_branches_dots", _fake_dots),
        ("normalised_branches_backward", _fake_backward if native else _fake_triton_backward),
    ):
        torch.library.register_fake(f"{namespace}::{name}", fake, allow_override=True)


register_hooks("lkconv")
