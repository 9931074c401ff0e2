"""One convolution problem, as the kernels see it: sizes, signed padding and element strides.

The forward pass is one such problem. The gradient of the input is one per stride phase: input pixels
h = stride * i + r see only the taps u with ``(r + padding - u * dilation) % stride == 0``, which form an
arithmetic progression, so each phase is a stride-1 convolution of ``grad_output`` with every ``step``-th
tap, flipped. Flips, steps and phases are strides and offsets here; the kernels know none of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Axis:
    """One spatial axis: ``y[o] = sum_t w[t] x[o * stride + t * dilation - padding]``, padding signed."""

    size_in: int
    size_out: int
    taps: int
    stride: int
    padding: int
    dilation: int


@dataclass(frozen=True)
class ConvProblem:
    """``y[n, c] = sum_{r < reduce} conv(x[n, (c // multiplier) * reduce + r], w[c * reduce + r])``.

    Strides and offsets are in elements: ``x_strides`` and ``y_strides`` in the order (n, c, h, w),
    ``w_strides`` (c, h, w), possibly negative.
    """

    batch: int
    channels: int
    multiplier: int
    reduce: int
    h: Axis
    w: Axis
    x_strides: tuple[int, ...]
    w_strides: tuple[int, ...]
    y_strides: tuple[int, ...]
    w_offset: int = 0
    y_offset: int = 0
    whole: bool = True  # every pixel of the output tensor is written, not one stride phase of them

    def with_strides(self, x_strides: Sequence[int], y_strides: Sequence[int]) -> ConvProblem:
        return replace(self, x_strides=tuple(x_strides), y_strides=tuple(y_strides))


@dataclass(frozen=True)
class WeightProblem:
    """``dw[c, u, v] = sum_{n, h, w} dy[n, c, h, w] x[n, c // multiplier, window(h, u), window(w, v)]``."""

    batch: int
    channels: int
    multiplier: int
    h: Axis
    w: Axis
    x_strides: tuple[int, ...]
    dy_strides: tuple[int, ...]

    def with_strides(self, x_strides: Sequence[int], dy_strides: Sequence[int]) -> WeightProblem:
        return replace(self, x_strides=tuple(x_strides), dy_strides=tuple(dy_strides))


def has_rows(strides: Sequence[int], width: int) -> bool:
    """Whether neighbouring columns of a (n, c, h, w) tensor are neighbours in memory."""
    return strides[3] == 1 or width == 1


def output_size(size: int, taps: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1


def forward_problem(
    x_size: Sequence[int],
    x_strides: Sequence[int],
    w_size: Sequence[int],
    w_strides: Sequence[int],
    y_strides: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> ConvProblem:
    """The forward pass. Sizes are (N, C, H, W) and (C * m, 1, kh, kw)."""
    axes = [
        Axis(
            x_size[2 + i],
            output_size(x_size[2 + i], w_size[2 + i], stride[i], padding[i], dilation[i]),
            w_size[2 + i],
            stride[i],
            padding[i],
            dilation[i],
        )
        for i in (0, 1)
    ]
    return ConvProblem(
        batch=x_size[0],
        channels=w_size[0],
        multiplier=w_size[0] // max(x_size[1], 1),
        reduce=1,
        h=axes[0],
        w=axes[1],
        x_strides=tuple(x_strides),
        w_strides=(w_strides[0], w_strides[2], w_strides[3]),
        y_strides=tuple(y_strides),
    )


@dataclass(frozen=True)
class Phase:
    """The taps first, first + step, ... that reach pixels ``stride * i + remainder``, as a stride-1 axis."""

    remainder: int
    first: int
    step: int
    axis: Axis


def axis_phases(
    size_in: int, size_out: int, taps: int, stride: int, padding: int, dilation: int
) -> list[Phase]:
    """The phases of one axis that any tap reaches; a missing remainder has gradient zero.

    A gradient pixel h = stride * i + r takes tap u from output pixel
    ``(h + padding - u * dilation) / stride``. With u = first + step * t this is ``i + base - t * dilation'``
    where ``dilation' = dilation / gcd``; counting the taps from the far end turns it into
    ``i + t' * dilation' - padding'``.
    """
    common = math.gcd(stride, dilation)
    step, phase_dilation = stride // common, dilation // common
    phases = []
    for r in range(stride):
        first = next((u for u in range(min(step, taps)) if (r + padding - u * dilation) % stride == 0), None)
        if first is None:
            continue
        count = (taps - first + step - 1) // step
        base = (r + padding - first * dilation) // stride
        axis = Axis(
            size_in=size_out,
            size_out=(size_in - r + stride - 1) // stride,
            taps=count,
            stride=1,
            padding=(count - 1) * phase_dilation - base,
            dilation=phase_dilation,
        )
        phases.append(Phase(r, first, step, axis))
    return phases


def backward_input_problems(
    input_size: Sequence[int],
    dy_size: Sequence[int],
    dy_strides: Sequence[int],
    w_size: Sequence[int],
    w_strides: Sequence[int],
    dx_strides: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[list[ConvProblem], bool]:
    """The phases of the input gradient, and whether together they write every pixel of it."""
    per_axis = [
        axis_phases(input_size[2 + i], dy_size[2 + i], w_size[2 + i], stride[i], padding[i], dilation[i])
        for i in (0, 1)
    ]
    complete = all(len(phases) == stride[i] for i, phases in enumerate(per_axis))
    problems = []
    for ph in per_axis[0]:
        for pw in per_axis[1]:
            last_h = ph.first + ph.step * (ph.axis.taps - 1)
            last_w = pw.first + pw.step * (pw.axis.taps - 1)
            problems.append(
                ConvProblem(
                    batch=input_size[0],
                    channels=input_size[1],
                    multiplier=1,
                    reduce=w_size[0] // max(input_size[1], 1),
                    h=ph.axis,
                    w=pw.axis,
                    x_strides=tuple(dy_strides),
                    w_strides=(w_strides[0], -ph.step * w_strides[2], -pw.step * w_strides[3]),
                    y_strides=(
                        dx_strides[0],
                        dx_strides[1],
                        dx_strides[2] * stride[0],
                        dx_strides[3] * stride[1],
                    ),
                    w_offset=last_h * w_strides[2] + last_w * w_strides[3],
                    y_offset=ph.remainder * dx_strides[2] + pw.remainder * dx_strides[3],
                    whole=stride[0] == 1 and stride[1] == 1,
                )
            )
    return problems, complete


def backward_weight_problem(
    x_size: Sequence[int],
    x_strides: Sequence[int],
    dy_size: Sequence[int],
    dy_strides: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> WeightProblem:
    axes = [
        Axis(x_size[2 + i], dy_size[2 + i], kernel_size[i], stride[i], padding[i], dilation[i])
        for i in (0, 1)
    ]
    return WeightProblem(
        batch=x_size[0],
        channels=dy_size[1],
        multiplier=dy_size[1] // max(x_size[1], 1),
        h=axes[0],
        w=axes[1],
        x_strides=tuple(x_strides),
        dy_strides=tuple(dy_strides),
    )
