"""Times the plans the planner shortlists, once per problem and machine, and remembers the winner on disk.

One small JSON file per problem. The first process to finish wins and every other adopts its choice, so a
machine never computes the same problem in two ways: results stay bit-identical from run to run. Where the
choice cannot be kept (no writable folder, ``LKCONV_TRITON_AUTOTUNE=0``, or torch asked to be deterministic)
nothing is timed and the planner's first plan runs.

Environment:
    LKCONV_TRITON_AUTOTUNE  1 (default) | 0
    LKCONV_CACHE_DIR        folder of the choices; default ``$XDG_CACHE_HOME/lkconv`` or ``~/.cache/lkconv``
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .faults import CannotCompile, compile_failure, summary
from .planner import Plan, worth_tuning

_log = logging.getLogger("lkconv")
_rejected: dict[str, list[tuple[Plan, str]]] = {}  # by key: plans that do not compile, and why


def cache_dir() -> Path:
    if folder := os.environ.get("LKCONV_CACHE_DIR"):
        return Path(folder) / "triton"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lkconv" / "triton"


def enabled() -> bool:
    return (
        os.environ.get("LKCONV_TRITON_AUTOTUNE", "1") != "0"
        and not torch.are_deterministic_algorithms_enabled()
    )


def path_of(key: str) -> Path:
    return cache_dir() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def load(key: str, plans: Sequence[Plan]) -> Plan | None:
    """The stored choice for ``key`` if it is one of ``plans``; anything unreadable counts as absent."""
    try:
        stored = json.loads(path_of(key).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(stored, dict) or stored.get("key") != key:
        return None
    return next((plan for plan in plans if identity(plan) == stored.get("plan")), None)


def identity(plan: Plan) -> dict[str, object]:
    """What distinguishes a plan within one problem; ``splits`` follows from the exact sizes."""
    facts = asdict(plan)
    return {name: facts[name] for name in ("algorithm", "blocks", "num_warps", "num_stages", "precision")}


def store(key: str, plan: Plan, plans: Sequence[Plan]) -> Plan | None:
    """Keeps ``plan`` unless another process was first; returns what holds, None if nothing could be kept."""
    path = path_of(key)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            json.dump({"key": key, "plan": identity(plan)}, file)
        try:
            os.link(temporary, path)  # fails if the file exists: the first writer wins
        except FileExistsError:
            if winner := load(key, plans):
                return winner
            os.replace(temporary, path)  # unreadable, or of another key: replace it
            temporary = None
        return plan
    except OSError:
        return None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def choose(key: str, plans: Sequence[Plan], time: Callable[[Plan], float] | None) -> tuple[Plan, bool]:
    """The plan to run, and whether that is settled (not merely because nothing may be timed now).

    ``time`` measures one plan in milliseconds; None while tensors are fake or a graph is being captured.

    Raises:
        CannotCompile: every plan was rejected.
    """
    plans = usable(key, plans)
    if not enabled() or len(plans) == 1:
        return plans[0], True
    if stored := load(key, plans):
        return stored, True
    if time is None:
        return plans[0], False
    if not writable():
        return plans[0], True
    try:
        best = fastest(key, worth_tuning(plans), time)
    except torch.OutOfMemoryError:  # the timer's buffers come on top of what the call itself needs
        return plans[0], False
    if best is None:
        return choose(key, plans, time)
    return store(key, best, plans) or plans[0], True


def usable(key: str, plans: Sequence[Plan]) -> list[Plan]:
    """The plans that were not rejected."""
    failed = [identity(bad) for bad, _ in rejected(key)]
    found = [plan for plan in plans if identity(plan) not in failed]
    if not found:
        raise CannotCompile(
            "; ".join(f"{plan.algorithm} {plan.blocks}: {why}" for plan, why in rejected(key))
        )
    return found


def rejected(key: str) -> Sequence[tuple[Plan, str]]:
    """Plans that :func:`reject` left out, and what the compiler said."""
    return _rejected.get(key, ())


def reject(key: str, plan: Plan, error: Exception) -> bool:
    """Leaves a plan out if ``error`` says that it cannot be compiled; False for every other error."""
    failure = compile_failure(error)
    if failure is None:
        return False
    _rejected.setdefault(key, []).append((plan, failure))
    _log.warning("Triton cannot compile %s %s: %s", plan.algorithm, plan.blocks, summary(failure))
    return True


def writable() -> bool:
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def fastest(key: str, plans: Sequence[Plan], time: Callable[[Plan], float]) -> Plan | None:
    """The fastest of the plans that compile, the others are rejected; None if none does."""
    best, best_time = None, math.inf
    for plan in plans:
        try:
            elapsed = time(plan)
        except Exception as error:
            if not reject(key, plan, error):
                raise
            continue
        if best is None or elapsed < best_time:
            best, best_time = plan, elapsed
    return best
