"""How a sum of convolution + batch-norm branches runs: a pure function of what it consists of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

PATHS = ("merged", "fused", "fused-recompute", "branches")


@dataclass(frozen=True)
class Situation:
    """What the decision depends on.

    plain: every branch is exactly a convolution and a batch norm without hooks, so that calling the modules
        has no effect beyond their formula.
    batch_statistics: per branch, whether its batch norm uses (and updates) statistics of the batch.
    depthwise: whether the target is depthwise; cropped: whether a branch reads a cropped input.
    traced: under torch.compile, torch.export, a functorch transform or forward-mode differentiation, which
        a node with a backward formula alone does not serve.
    synchronised: whether statistics are shared between processes.
    in_place: taps of each kernel that the fused passes would sum in place; None where no costs are known (on
        GPUs, on other backends).
    """

    plain: bool
    batch_statistics: tuple[bool, ...]
    depthwise: bool
    cropped: bool = False
    traced: bool = False
    synchronised: bool = False
    in_place: tuple[int, ...] | None = None


class Plan(NamedTuple):
    path: str
    reason: str


# A kernel alone is worth fusing up to here. Step of a lone branch, fused against module by module, float32,
# batch 4, two threads: 3x3 1.28x, 7x7 1.20x (96 channels, 56 x 56); 5x13 1.02x, 13x13 0.98x (998 and 1024
# channels, 7 x 7); 5x47 0.81x (499 channels, 14 x 14).
LONE_TAPS = 49


def slower_fused(branches: int, in_place: tuple[int, ...]) -> str | None:
    """Why a training step of this sum on a CPU is slower fused than module by module, or None.

    What the fused passes save are reads and writes of branch outputs: statistics are taken and gradients
    formed while an output summed in place is still in cache. Where every kernel is convolved apart, fused and
    module by module read and write the same in the backward pass, and what the forward pass saves, 4 (B - 1)
    passes for B branches, pays at best for taking statistics in a call of its own. Steps as many times as
    fast, of sums run apart (batch 4): 31x31 0.91x, 5x51 0.92x, 31 + 29 1.00x, 31 + 29 + 27 1.02x (56 x 56);
    27x27 0.84x (14 x 14); with stride 2, 7 + 3 0.91x, five branches of 3x3 and 1x1 0.95x. With one small
    kernel in place: 31 + 5 1.13x, 51x5 + 5 1.15x.

    Args:
        branches: B. in_place: taps of each kernel that would be summed in place.
    """
    if not in_place:
        return "every kernel is convolved apart: fusing saves too few passes"
    if branches == 1 and in_place[0] > LONE_TAPS:
        return f"a lone kernel of more than {LONE_TAPS} taps: its sums are the work, not the passes"
    return None


def plan(s: Situation, preferred: str | None = None) -> Plan:
    """The path and why. ``preferred`` is a training path the user asked for, taken where it is possible."""
    if not s.plain:
        return Plan("branches", "a branch has hooks or is not a plain convolution and batch norm")
    if not any(s.batch_statistics):
        if preferred == "branches":
            return Plan("branches", "asked for")
        return Plan("merged", "no branch uses batch statistics")
    if not all(s.batch_statistics):
        return Plan("branches", "some branches use batch statistics and some do not")
    if not s.depthwise or s.cropped:
        return Plan("branches", "the fused path is for depthwise branches of an uncropped input")
    if s.traced:
        return Plan("branches", "compilers, transforms and forward mode take the plain composition")
    if preferred in ("fused", "fused-recompute", "branches"):
        return Plan(preferred, "asked for")
    if s.synchronised:
        return Plan("fused", "one all-reduce per pass instead of one per branch")
    slower = None if s.in_place is None else slower_fused(len(s.batch_statistics), s.in_place)
    if slower is not None:
        return Plan("branches", slower)
    return Plan("fused", "fewer passes over the branch outputs")


_preferred: str | None = None


def preferred_path() -> str | None:
    return _preferred


@contextmanager
def use_training_path(path: str) -> Iterator[None]:
    """Within the block, sums of branches run as ``path`` wherever that is possible.

    Args:
        path: "fused" (default where it applies and is faster), "fused-recompute" (saves the input instead of
            every branch output: less memory, one more pass of convolutions) or "branches" (module by module).

    Raises:
        ValueError: for any other name.
    """
    global _preferred
    if path not in ("fused", "fused-recompute", "branches"):
        raise ValueError(f"path must be 'fused', 'fused-recompute' or 'branches', got {path!r}")
    before, _preferred = _preferred, path
    try:
        yield
    finally:
        _preferred = before
