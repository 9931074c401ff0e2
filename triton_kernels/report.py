"""The planner's decision as plain data, for ``lkconv.explain`` and for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch

from . import tuning
from .faults import summary
from .keys import conv_key, tf32_allowed, weight_key
from .machine import machine_of
from .planner import H200, Declined, Machine, Plan, plan_conv, plan_weight
from .problem import (
    ConvProblem,
    backward_input_problems,
    backward_weight_problem,
    forward_problem,
    output_size,
)


def dense_strides(size: Sequence[int], channels_last: bool) -> tuple[int, ...]:
    _, c, h, w = size
    return (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)


def plan(
    pass_name: str,
    size: Sequence[int],
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    dtype: str = "float32",
    machine: Machine | int = H200,
    channels_last: bool = False,
    allow_tf32: bool | None = None,
    every: bool = False,
) -> list[dict[str, object]]:
    """What the planner found for one problem, the choice first: each algorithm's best plan, or ``every``.

    ``size`` is (N, C, H, W) of the input; backward_input reports its first stride phase. With a ``Machine``
    this is a pure function. With the index of a device of this machine, the answer is what a call would run
    there: a choice the tuner stored comes first, plans that do not compile are left out, and tf32 is as
    torch's switches say.

    Keys: algorithm, possible, reason, tile, splits, scratch_bytes, flops, and the fields of a ``Plan``.
    Raises ``ValueError`` for an unknown pass.
    """
    device = device_at(machine) if isinstance(machine, int) else None
    facts = machine_of(device_at(machine)) if isinstance(machine, int) else machine
    tf32 = allow_tf32 if allow_tf32 is not None else device is not None and tf32_allowed(device)
    problem = make_problems(
        pass_name, size, out_channels, kernel_size, stride, padding, dilation, channels_last
    )[0]
    is_conv = isinstance(problem, ConvProblem)
    found = plan_conv(problem, dtype, facts, tf32) if is_conv else plan_weight(problem, dtype, facts, tf32)
    plans, declined = found
    reason = "fewest cycles by count"
    if device is not None:
        key = (conv_key if is_conv else weight_key)(problem, dtype, device, tf32)
        plans, failed = without_rejected(key, plans)
        declined = [*declined, *failed]
        if tuning.enabled() and (stored := tuning.load(key, plans)):
            plans = [stored, *(p for p in plans if p is not stored)]
            reason = "fastest when timed on this machine"
    if not every:
        plans = [p for i, p in enumerate(plans) if p.algorithm not in {q.algorithm for q in plans[:i]}]
    weights = out_channels * kernel_size[0] * kernel_size[1]
    scratch = 0 if is_conv else weights * (8 if dtype == "float64" else 4)
    return [row(p, plans[0], reason, scratch) for p in plans] + [
        {"algorithm": d.algorithm, "possible": False, "reason": d.reason} for d in declined
    ]


def without_rejected(key: str, plans: list[Plan]) -> tuple[list[Plan], list[Declined]]:
    """The plans that compile, and the algorithms of which none does; all plans where nothing else is left."""
    rejected = tuning.rejected(key)
    left = [p for p in plans if tuning.identity(p) not in [tuning.identity(bad) for bad, _ in rejected]]
    if not left:
        return plans, []
    reasons = {bad.algorithm: f"Triton cannot compile it: {summary(why)}" for bad, why in rejected}
    gone = reasons.keys() - {p.algorithm for p in left}
    return left, [Declined(algorithm, reasons[algorithm]) for algorithm in sorted(gone)]


def device_at(index: int) -> torch.device:
    accelerator = torch.accelerator.current_accelerator()
    return torch.device("cpu") if accelerator is None else torch.device(accelerator.type, index)


def make_problems(
    pass_name: str,
    size: Sequence[int],
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
) -> list:
    """The problems of one call on dense tensors: one, or one for each stride phase of backward_input."""
    height, width = (
        output_size(size[2 + i], kernel_size[i], stride[i], padding[i], dilation[i]) for i in (0, 1)
    )
    y_size = (size[0], out_channels, height, width)
    w_size = (out_channels, 1, *kernel_size)
    w_strides = dense_strides(w_size, False)
    x_strides, y_strides = dense_strides(size, channels_last), dense_strides(y_size, channels_last)
    geometry = (stride, padding, dilation)
    if pass_name == "forward":
        return [forward_problem(size, x_strides, w_size, w_strides, y_strides, *geometry)]
    if pass_name == "backward_input":
        return backward_input_problems(size, y_size, y_strides, w_size, w_strides, x_strides, *geometry)[0]
    if pass_name == "backward_weight":
        return [backward_weight_problem(size, x_strides, y_size, y_strides, kernel_size, *geometry)]
    raise ValueError(f"pass_name must be forward, backward_input or backward_weight, got {pass_name!r}")


def row(p: Plan, best: Plan, reason: str, scratch: int) -> dict[str, object]:
    sides = {"direct": ("BLOCK_P", "BLOCK_C"), "toeplitz": ("BLOCK_M", "BLOCK_T")}[p.algorithm]
    if "BLOCK_U" in p.blocks:
        sides = ("BLOCK_U", "BLOCK_P" if p.algorithm == "direct" else "BLOCK_T")
    if p is not best:
        reason = f"{p.cycles:.0f} cycles by count against {best.cycles:.0f}"
    derived = {
        "tile": tuple(p.blocks[side] for side in sides),
        "flops": 2 * p.macs,
        "scratch_bytes": scratch * p.splits,
    }
    return {"possible": True, "reason": reason, **asdict(p), **derived}
