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
    """

    plain: bool
    batch_statistics: tuple[bool, ...]
    depthwise: bool
    cropped: bool = False
    traced: bool = False
    synchronised: bool = False
    needs_grad: bool = True


class Plan(NamedTuple):
    path: str
    reason: str


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
    return Plan("fused", "fewer passes over the branch outputs")


_preferred: str | None = None


def preferred_path() -> str | None:
    return _preferred


@contextmanager
def use_training_path(path: str) -> Iterator[None]:
    """Within the block, sums of branches run as ``path`` wherever that is possible.

    Args:
        path: "fused" (default where it applies), "fused-recompute" (saves the input instead of every branch
            output: less memory, one more pass of convolutions) or "branches" (module by module).

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
