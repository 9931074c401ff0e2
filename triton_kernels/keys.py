"""Names a problem for the cache of tuning choices."""

from __future__ import annotations

import json
import math

import torch

from .machine import machine_name
from .planner import ITEM_BYTES, is_channels_last
from .problem import ConvProblem, WeightProblem

FORMAT = 2  # raise when kernels or the meaning of a plan change


def problem_key(pass_name: str, facts: object, machine: str) -> str:
    return json.dumps([FORMAT, machine, pass_name, facts])


def tf32_allowed(device: torch.device) -> bool:
    """torch's own switch for convolutions; off everywhere but on NVIDIA devices."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    )


def rounded(n: int) -> int:
    """Batch and map sizes that differ by less than 2x share a choice; blocks depend on this power of 2."""
    return 1 << max(int(n) - 1, 0).bit_length()


def layout(strides: tuple[int, ...], channels: int, width: int) -> str:
    return "nhwc" if is_channels_last(strides, channels, width) else "nchw"


def row_alignment(width: int, dtype: str) -> int:
    """Elements, a power of 2 of at most 16 bytes, at whose multiples every row of a dense input starts.

    Kernels load rows by vectors of so many elements, and planner.toeplitz_plans gives rows that are not
    multiples of 16 bytes other plans.
    """
    return math.gcd(width, 16 // ITEM_BYTES[dtype])


def conv_key(p: ConvProblem, dtype: str, device: torch.device, tf32: bool) -> str:
    axes = [(rounded(a.size_in), rounded(a.size_out), a.taps, a.stride, a.dilation) for a in (p.h, p.w)]
    sizes = [rounded(p.batch), rounded(p.channels), rounded(p.batch * p.h.size_out), p.multiplier, p.reduce]
    form = (layout(p.x_strides, p.channels, p.w.size_in), row_alignment(p.w.size_in, dtype))
    facts = [sizes, axes, form, dtype, tf32]
    return problem_key("conv", facts, machine_name(device))


def weight_key(p: WeightProblem, dtype: str, device: torch.device, tf32: bool) -> str:
    # The window of a single column block depends on the exact width: see planner.weight_window.
    sizes = [rounded(p.batch), rounded(p.channels), p.multiplier, rounded(p.h.size_in), rounded(p.h.size_out)]
    axes = [(a.taps, a.stride, a.padding, a.dilation) for a in (p.h, p.w)]
    widths = (p.w.size_in, p.w.size_out)
    facts = [sizes, widths, axes, layout(p.x_strides, p.channels, p.w.size_in), dtype, tf32]
    return problem_key("backward_weight", facts, machine_name(device))
