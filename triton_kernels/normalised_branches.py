"""The operators ``lkconv_triton::normalised_branches*``: sizes -> tiles -> launches.

Schemas and meanings are those of the CPU's ops (``csrc/module.cpp``), but for the form of the outputs that
are kept: here (kernels, N, C, H', W'), each in the input's memory format. Every other tensor is read in that
format and copied into it first if it has another. Tensors were validated in Python before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lkconv._fake import memory_format, stacked

from .launch import REDUCE_BLOCK, ceil_div, device_guard, needs_int64, triton_dtype
from .machine import machine_of
from .normalised_branches_backward import (
    add_tiles_kernel,
    backward_given_kernel,
    backward_input_kernel,
    dots_kernel,
)
from .normalised_branches_forward import MOMENTS, outputs_kernel, statistics_kernel, sum_kernel
from .normalised_branches_planner import REDUCE_CHANNELS, REDUCE_TILES, Tiles, tiles_for, weight_splits
from .normalised_branches_weight import add_weight_splits_kernel, backward_weight_kernel
from .planner import is_channels_last
from .problem import output_size

Tensors = Sequence[Tensor]
Place = tuple[int, int, int, int, int, int, int]  # kernel, padding, dilation, first row among packed taps


def places(weights: Tensors, padding: Sequence[int], dilation: Sequence[int]) -> tuple[Place, ...]:
    found: list[Place] = []
    first = 0
    for b, weight in enumerate(weights):
        kh, kw = (int(size) for size in weight.shape[2:])
        at = slice(2 * b, 2 * b + 2)
        found.append((kh, kw, *map(int, (*padding[at], *dilation[at])), first))  # type: ignore[arg-type]
        first += kh * kw
    return tuple(found)


def pack(weights: Tensors) -> Tensor:
    """(taps of all branches, C): neighbouring channels of a tap side by side."""
    return torch.cat([w.reshape(w.shape[0], -1).t() for w in weights])


@dataclass(frozen=True)
class Call:
    """One call's tensors in one memory format: the input, an output of the branches, and launch arguments."""

    input: Tensor
    output: Tensor

    @property
    def format(self) -> torch.memory_format:
        return memory_format(self.input)

    @property
    def both(self) -> tuple[tuple[int, ...], ...]:
        """Sizes of input and output, strides of input and output: arguments of kernels that read windows."""
        in_size, out_size = (tuple(t.shape[2:]) for t in (self.input, self.output))
        return in_size, out_size, self.input.stride(), self.output.stride()

    @property
    def output_only(self) -> tuple[tuple[int, ...], ...]:
        """Size and strides of the output, and of every tensor like it."""
        return tuple(self.output.shape[2:]), self.output.stride()

    @property
    def channels(self) -> int:
        return self.input.shape[1]

    @cached_property
    def pixels(self) -> int:
        return self.output.numel() // max(self.output.shape[1], 1)

    @cached_property
    def tiles(self) -> Tiles:
        nhwc = is_channels_last(self.input.stride(), self.channels, self.input.shape[3])
        return tiles_for(max(self.pixels, 1), self.channels, nhwc)

    @property
    def block(self) -> dict[str, int]:
        return {"BLOCK_P": self.tiles.pixels, "BLOCK_C": self.tiles.channels}

    @property
    def blocks(self) -> int:
        """Blocks of output pixels."""
        return ceil_div(self.pixels, self.tiles.pixels)

    @property
    def grid(self) -> tuple[int]:
        return (self.blocks * ceil_div(self.channels, self.tiles.channels),)

    @property
    def acc(self):
        return triton_dtype(self.input.dtype)

    @property
    def wide(self) -> torch.dtype:
        """What sums are kept in."""
        return torch.float64 if self.input.dtype == torch.float64 else torch.float32

    def dense(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=self.format)

    def scratch(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=self.wide, device=self.input.device)

    def int64(self, geometry: Sequence[Place] = (), *scratch: Tensor) -> bool:
        """Whether an offset passes 32 bits; ``geometry`` says how far windows reach past an image."""
        reach = [max((p[i] * p[4 + i] + p[2 + i] for p in geometry), default=0) for i in (0, 1)]
        extents = [
            ((t.shape[0], t.shape[1], t.shape[2] + reach[0], t.shape[3] + reach[1]), t.stride())
            for t in (self.input, self.output)
        ]
        return needs_int64(*extents, ((self.pixels,), (1,)), *(((t.numel(),), (1,)) for t in scratch))


def call_of(input: Tensor, output: Tensor) -> Call:
    """``output``: any tensor in the format and of the size of the branches' outputs."""
    return Call(input.contiguous(memory_format=memory_format(input)), output)


def branches_of(call: Call, saved: Tensors, given: Tensors, identity: bool) -> tuple[Tensor, ...]:
    """Every branch's output in the ops' order; the identity's is the input."""
    return (*saved, *((call.input,) if identity else ()), *(call.dense(t) for t in given))


# --- forward ----------------------------------------------------------------------------------------------


def normalised_branches(
    input: Tensor,
    weights: Tensors,
    given: Tensors,
    padding: Sequence[int],
    dilation: Sequence[int],
    identity: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(outputs (kernels, N, C, H', W'), means (B, C), biased variances (B, C))."""
    out_h, out_w = (
        output_size(input.shape[2 + i], weights[0].shape[2 + i], 1, padding[i], dilation[i]) for i in (0, 1)
    )
    saved = stacked(input, len(weights), out_h, out_w)
    outputs = saved.unbind(0)
    call = call_of(input, outputs[0])
    tensors = branches_of(call, (), given, identity)
    branches = len(outputs) + len(tensors)
    means, variances = (call.scratch(branches, call.channels) for _ in range(2))
    if saved.numel() == 0:
        return saved, means.fill_(torch.nan), variances.fill_(torch.nan)
    with device_guard(input):
        launch_outputs(
            call, pack(weights), outputs, tensors, places(weights, padding, dilation), means, variances
        )
    return saved, means, variances


def launch_outputs(
    call: Call, taps: Tensor, outputs: Tensors, given: Tensors, geometry: tuple[Place, ...], means: Tensor,
    variances: Tensor,
) -> None:  # fmt: skip
    branches = means.shape[0]
    partial = call.scratch(MOMENTS, branches, call.blocks, call.channels)
    int64 = call.int64(geometry, partial)
    outputs_kernel[call.grid](
        call.input,
        taps,
        tuple(outputs),
        tuple(given),
        partial,
        call.pixels,
        call.channels,
        *call.both,
        GEOMETRY=geometry,
        ACC=call.acc,
        INT64=int64,
        **call.block,
    )
    statistics_kernel[(branches * ceil_div(call.channels, REDUCE_CHANNELS),)](
        partial,
        means,
        variances,
        call.pixels,
        call.channels,
        partial[0].numel(),
        INT64=int64,
        BLOCK_P=call.tiles.pixels,
        BLOCK_T=REDUCE_TILES,
        BLOCK_C=REDUCE_CHANNELS,
    )


def normalised_branches_sum(
    input: Tensor, outputs: Tensor, given: Tensors, identity: bool, scales: Tensor, shift: Tensor
) -> Tensor:
    """``sum_b scales_b y_b + shift``, (N, C, H', W') in the input's memory format."""
    saved = outputs.unbind(0)
    call = call_of(input, saved[0])
    output = torch.empty_like(saved[0])
    if output.numel() == 0:
        return output
    with device_guard(input):
        sum_kernel[call.grid](
            branches_of(call, saved, given, identity),
            scales.contiguous(),
            shift.contiguous(),
            output,
            call.pixels,
            call.channels,
            *call.output_only,
            ACC=call.acc,
            INT64=call.int64(),
            **call.block,
        )
    return output


# --- backward ---------------------------------------------------------------------------------------------


def normalised_branches_dots(
    grad_output: Tensor, input: Tensor, outputs: Tensor, given: Tensors, identity: bool, means: Tensor
) -> tuple[Tensor, Tensor]:
    """(sum of grad_output (C,), sums of grad_output (y_b - means_b) (B, C))."""
    saved = outputs.unbind(0)
    call = call_of(input, saved[0])
    branches = means.shape[0]
    total, dots = call.scratch(call.channels), call.scratch(branches, call.channels)
    if outputs.numel() == 0:
        return total.zero_(), dots.zero_()
    partial = call.scratch(1 + branches, call.blocks, call.channels)
    int64 = call.int64((), partial)
    with device_guard(input):
        dots_kernel[call.grid](
            call.dense(grad_output),
            branches_of(call, saved, given, identity),
            means.contiguous(),
            partial,
            call.pixels,
            call.channels,
            *call.output_only,
            ACC=call.acc,
            INT64=int64,
            **call.block,
        )
        add_tiles_kernel[((1 + branches) * ceil_div(call.channels, REDUCE_CHANNELS),)](
            partial,
            total,
            dots,
            call.blocks,
            call.channels,
            INT64=int64,
            BLOCK_T=REDUCE_TILES,
            BLOCK_C=REDUCE_CHANNELS,
        )
    return total, dots


def normalised_branches_backward(
    grad_output: Tensor,
    input: Tensor,
    outputs: Tensor,
    weights: Tensors,
    given: Tensors,
    padding: Sequence[int],
    dilation: Sequence[int],
    identity: bool,
    scales: Tensor,
    slopes: Tensor,
    constants: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of input, weights and tensors given where that of y_b is
    ``scales_b grad_output + slopes_b y_b + constants_b``."""
    saved = outputs.unbind(0)
    call = call_of(input, saved[0])
    grad_input = torch.empty_like(call.input, memory_format=call.format)
    grad_weights = [torch.empty(w.shape, dtype=w.dtype, device=w.device) for w in weights]
    grad_given = [torch.empty_like(saved[0]) for _ in given]
    if outputs.numel() == 0:
        for grad in (grad_input, *grad_weights):
            grad.zero_()
        return grad_input, grad_weights, grad_given
    grad = call.dense(grad_output)
    factors = tuple(t.contiguous() for t in (scales, slopes, constants))
    geometry = places(weights, padding, dilation)
    with device_guard(input):
        launch_backward_input(call, grad, saved, pack(weights), factors, geometry, identity, grad_input)
        launch_backward_weight(call, grad, saved, factors, geometry, grad_weights)
        if given:
            first = len(saved) + int(identity)
            launch_backward_given(call, grad, given, factors, first, grad_given)
    return grad_input, grad_weights, grad_given


def launch_backward_input(
    call: Call, grad: Tensor, saved: Tensors, taps: Tensor, factors: Tensors, geometry: tuple[Place, ...],
    identity: bool, grad_input: Tensor,
) -> None:  # fmt: skip
    pixels = call.input.numel() // call.channels
    blocks = ceil_div(pixels, call.tiles.pixels)
    backward_input_kernel[(blocks * ceil_div(call.channels, call.tiles.channels),)](
        call.input,
        grad,
        tuple(saved),
        taps,
        factors,
        grad_input,
        pixels,
        call.channels,
        *call.both,
        GEOMETRY=geometry,
        IDENTITY=identity,
        ACC=call.acc,
        INT64=call.int64(geometry),
        **call.block,
    )


def launch_backward_weight(
    call: Call, grad: Tensor, saved: Tensors, factors: Tensors, geometry: tuple[Place, ...],
    grad_weights: Tensors,
) -> None:  # fmt: skip
    tiles, taps = call.tiles, sum(p[0] * p[1] for p in geometry)
    starts = [0]
    for place in geometry:
        starts.append(starts[-1] + ceil_div(place[0] * place[1], tiles.taps))
    splits = weight_splits(starts[-1], call.pixels, call.channels, taps, tiles, machine_of(call.input.device))
    partial = call.scratch(splits, call.channels, taps)
    int64 = call.int64(geometry, partial)
    backward_weight_kernel[(starts[-1] * splits * ceil_div(call.channels, tiles.weight_channels),)](
        call.input,
        grad,
        tuple(saved),
        factors,
        partial,
        call.pixels,
        ceil_div(ceil_div(call.pixels, tiles.weight_pixels), splits),
        splits,
        call.channels,
        *call.both,
        GEOMETRY=geometry,
        STARTS=tuple(starts),
        TAPS=taps,
        ACC=call.acc,
        INT64=int64,
        BLOCK_U=tiles.taps,
        BLOCK_P=tiles.weight_pixels,
        BLOCK_C=tiles.weight_channels,
    )
    add_weight_splits_kernel[(ceil_div(partial[0].numel(), REDUCE_BLOCK),)](
        partial,
        tuple(grad_weights),
        partial[0].numel(),
        splits,
        GEOMETRY=geometry,
        TAPS=taps,
        INT64=int64,
        BLOCK=REDUCE_BLOCK,
    )


def launch_backward_given(
    call: Call, grad: Tensor, given: Tensors, factors: Tensors, first: int, grad_given: Tensors
) -> None:
    backward_given_kernel[call.grid](
        grad,
        tuple(call.dense(t) for t in given),
        factors,
        tuple(grad_given),
        call.pixels,
        call.channels,
        *call.output_only,
        FIRST=first,
        ACC=call.acc,
        INT64=call.int64(),
        **call.block,
    )
