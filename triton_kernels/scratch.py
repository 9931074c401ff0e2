"""What a plan allocates and launches beside its main kernel: copies to rows and back, partial sums."""

from __future__ import annotations

from .planner import ITEM_BYTES, Plan, is_channels_last
from .problem import ConvProblem, WeightProblem, has_rows


def copies_output(p: ConvProblem) -> bool:
    """Whether rows are stored and then transposed: with a stride of C, each element would touch a sector."""
    return p.whole and is_channels_last(p.y_strides, p.channels, p.w.size_out)


def copied_bytes(plan: Plan, p: ConvProblem | WeightProblem, dtype: str) -> list[int]:
    """The sizes of the copies that ``plan`` makes of its operands and of its output, in order."""
    if not plan.needs_rows:
        return []
    reduce = p.reduce if isinstance(p, ConvProblem) else 1
    x_plane, y_plane = p.h.size_in * p.w.size_in, p.h.size_out * p.w.size_out
    sizes = [] if has_rows(p.x_strides, p.w.size_in) else [p.channels // p.multiplier * reduce * x_plane]
    copied = copies_output(p) if isinstance(p, ConvProblem) else not has_rows(p.dy_strides, p.w.size_out)
    return [p.batch * n * ITEM_BYTES[dtype] for n in (*sizes, *([p.channels * y_plane] * copied))]


def partial_bytes(plan: Plan, p: ConvProblem | WeightProblem, dtype: str) -> int:
    """The sums over shares of the pixels, which the weight gradient adds in a second launch."""
    if isinstance(p, ConvProblem):
        return 0
    return plan.splits * p.channels * p.h.taps * p.w.taps * (8 if dtype == "float64" else 4)


def scratch_bytes(plan: Plan, p: ConvProblem | WeightProblem, dtype: str) -> int:
    return sum(copied_bytes(plan, p, dtype)) + partial_bytes(plan, p, dtype)


def launches(plan: Plan, p: ConvProblem | WeightProblem, dtype: str) -> list[str]:
    """The names of what runs for one problem, in order; copies are torch's own."""
    copies = ["copy"] * len(copied_bytes(plan, p, dtype))
    if isinstance(p, WeightProblem):
        return [*copies, f"weight_{plan.algorithm}", "reduce_splits"]
    after = copies[:1] if plan.needs_rows and copies_output(p) else []
    return [*copies[len(after) :], f"conv_{plan.algorithm}", *after]
