"""The planner's decision as plain data, for ``lkconv.explain`` and for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

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
from .scratch import launches, scratch_bytes


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
    """What the planner found for one call, the choice first: each algorithm's best plan, or ``every``.

    ``size`` is (N, C, H, W) of the input. backward_input runs one problem for each stride phase: sums are
    over all of them, plans are those of the phase that costs most, and each row but the first is a call
    whose phases take that algorithm where they can. With a ``Machine`` this is a pure function. With the
    index of a device of this machine, the answer is what a call would run there: a choice the tuner stored
    comes first, plans that do not compile are left out, and tf32 is as torch's switches say.

    Keys: algorithm, possible, reason, tile, and the fields of a ``Plan``; of the whole call: macs, flops,
    bytes, cycles, scratch_bytes (everything it allocates) and the names of its launches.
    Raises ``ValueError`` for an unknown pass.
    """
    device = device_at(machine) if isinstance(machine, int) else None
    facts = machine_of(device_at(machine)) if isinstance(machine, int) else machine
    tf32 = allow_tf32 if allow_tf32 is not None else device is not None and tf32_allowed(device)
    geometry = (size, out_channels, kernel_size, stride, padding, dilation)
    problems, complete = make_problems(pass_name, *geometry, channels_last)
    phases = [find_plans(p, dtype, facts, tf32, device) for p in problems]
    zeroed = [] if complete else ["zero"]
    if not phases:
        return [{**NOTHING_TO_MULTIPLY, "launches": zeroed}]
    main = max(phases, key=lambda phase: phase.plans[0].cycles)
    plans = main.plans
    if not every:
        plans = [p for i, p in enumerate(plans) if p.algorithm not in {q.algorithm for q in plans[:i]}]
    calls = [Call([(phase.problem, phase.plans[0]) for phase in phases], main.plans[0], dtype)]
    for p in plans[1:]:
        parts = [(phase.problem, p if phase is main else phase.best(p.algorithm)) for phase in phases]
        calls.append(Call(parts, p, dtype))
    rows = [call.row(main.reason if i == 0 else calls[0], zeroed) for i, call in enumerate(calls)]
    return rows + [{"algorithm": d.algorithm, "possible": False, "reason": d.reason} for d in main.declined]


NOTHING_TO_MULTIPLY: dict[str, object] = {
    "algorithm": "zero",
    "possible": True,
    "reason": "no window reaches a pixel of the input",
    "tile": None,
    "splits": 1,
    **dict.fromkeys(("macs", "flops", "bytes", "cycles", "scratch_bytes"), 0),
}


@dataclass(frozen=True)
class Phase:
    """One problem of a call, what the planner found for it, the choice first, and why it is chosen."""

    problem: Any
    plans: list[Plan]
    declined: list[Declined]
    reason: str

    def best(self, algorithm: str) -> Plan:
        return next((p for p in self.plans if p.algorithm == algorithm), self.plans[0])


def find_plans(problem, dtype: str, facts: Machine, tf32: bool, device: torch.device | None) -> Phase:
    is_conv = isinstance(problem, ConvProblem)
    plans, declined = (plan_conv if is_conv else plan_weight)(problem, dtype, facts, tf32)
    reason = "fewest cycles by count"
    if device is not None:
        key = (conv_key if is_conv else weight_key)(problem, dtype, device, tf32)
        plans, failed = without_rejected(key, plans)
        declined = [*declined, *failed]
        if tuning.enabled() and (stored := tuning.load(key, plans)):
            plans = [stored, *(p for p in plans if p is not stored)]
            reason = "fastest when timed on this machine"
    return Phase(problem, plans, declined, reason)


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
) -> tuple[list, bool]:
    """The problems of one call on dense tensors, and whether they write all of the result.

    One problem, or one for each stride phase of backward_input that has pixels.
    """
    height, width = (
        output_size(size[2 + i], kernel_size[i], stride[i], padding[i], dilation[i]) for i in (0, 1)
    )
    y_size = (size[0], out_channels, height, width)
    w_size = (out_channels, 1, *kernel_size)
    w_strides = dense_strides(w_size, False)
    x_strides, y_strides = dense_strides(size, channels_last), dense_strides(y_size, channels_last)
    geometry = (stride, padding, dilation)
    if pass_name == "forward":
        return [forward_problem(size, x_strides, w_size, w_strides, y_strides, *geometry)], True
    if pass_name == "backward_input":
        phases, complete = backward_input_problems(
            size, y_size, y_strides, w_size, w_strides, x_strides, *geometry
        )
        return [p for p in phases if p.h.size_out > 0 and p.w.size_out > 0], complete
    if pass_name == "backward_weight":
        problem = backward_weight_problem(size, x_strides, y_size, y_strides, kernel_size, *geometry)
        return [problem], True
    raise ValueError(f"pass_name must be forward, backward_input or backward_weight, got {pass_name!r}")


@dataclass(frozen=True)
class Call:
    """The problems of one call, each with its plan, and the plan that stands for the call."""

    parts: list[tuple[Any, Plan]]
    main: Plan
    dtype: str

    @property
    def cycles(self) -> float:
        return sum(p.cycles for _, p in self.parts)

    def row(self, reason: str | Call, zeroed: list[str]) -> dict[str, object]:
        """``reason``: why this call is chosen, or the one that is chosen instead."""
        p = self.main
        sides = {"direct": ("BLOCK_P", "BLOCK_C"), "toeplitz": ("BLOCK_M", "BLOCK_T")}[p.algorithm]
        if "BLOCK_U" in p.blocks:
            sides = ("BLOCK_U", "BLOCK_P" if p.algorithm == "direct" else "BLOCK_T")
        if isinstance(reason, Call):
            reason = f"{self.cycles:.0f} cycles by count against {reason.cycles:.0f}"
        macs = sum(part.macs for _, part in self.parts)
        of_call = {
            "tile": tuple(p.blocks[side] for side in sides),
            "macs": macs,
            "flops": 2 * macs,
            "bytes": sum(part.bytes for _, part in self.parts),
            "cycles": self.cycles,
            "scratch_bytes": sum(scratch_bytes(part, problem, self.dtype) for problem, part in self.parts),
            "launches": zeroed + [n for x, part in self.parts for n in launches(part, x, self.dtype)],
        }
        return {"possible": True, "reason": reason, **asdict(p), **of_call}
