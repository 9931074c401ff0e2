"""Call overhead: microseconds of one call on an input too small to take any time itself."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import lkconv
from bench import machine

SIZE = (1, 8, 4, 4)
CALLS = 500
TURNS = 15


def _functions(device: str) -> dict[tuple[str, str], tuple[bool, Callable]]:
    """(call, implementation) -> (whether gradients are recorded, the call)."""
    channels = SIZE[1]
    x = torch.randn(SIZE, device=device, requires_grad=True)
    dy = torch.randn(SIZE, device=device)
    modules = {
        "conv2d": torch.nn.Conv2d(
            channels, channels, 3, padding=1, groups=channels, bias=False, device=device
        ),
        "lkconv": lkconv.DepthwiseConv2d(channels, 3, padding=1, bias=False, device=device),
    }
    weight = torch.randn(channels, 1, 3, 3, device=device, requires_grad=True)
    functions = {
        "conv2d": lambda: F.conv2d(x, weight, None, 1, 1, 1, channels),
        "lkconv": lambda: lkconv.depthwise_conv2d(x, weight, None, 1, 1, 1),
    }
    calls: dict[tuple[str, str], tuple[bool, Callable]] = {}
    for who, module in modules.items():
        for mode, grad in (("no grad", False), ("grad", True)):
            calls[f"function, forward, {mode}", who] = grad, functions[who]
            calls[f"module, forward, {mode}", who] = grad, partial(module, x)
        leaves = (x, module.weight)
        backward = lambda module=module, leaves=leaves: torch.autograd.grad(module(x), leaves, dy)  # noqa: E731
        calls["module, forward + backward", who] = True, backward
    return calls


def _microseconds(grad: bool, run: Callable, device: str, between: Callable | None = None) -> float:
    """Host time of one call; a GPU is waited for afterwards, so that its queue never fills. With ``between``,
    which runs before each call, the median."""
    if between is not None:
        return statistics.median(_one(grad, run, between) for _ in range(CALLS // 5)) * 1e6
    with torch.set_grad_enabled(grad):
        start = time.perf_counter()
        for _ in range(CALLS):
            run()
        elapsed = time.perf_counter() - start
    if device == "cuda":
        torch.cuda.synchronize()
    return elapsed / CALLS * 1e6


def _one(grad: bool, run: Callable, between: Callable) -> float:
    between()
    with torch.set_grad_enabled(grad):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


def _pass_over(megabytes: float) -> Callable:
    """Reads a tensor of this size and writes another: what they leave in the caches is theirs."""
    x = torch.ones(int(megabytes * 1e6 / 4))
    y = torch.empty_like(x)
    return lambda: torch.mul(x, 1.5, out=y)


def measure(device: str, behind: float = 0) -> list[dict]:
    """Rows of every call. ``behind``: megabytes of two tensors that are passed over before each call."""
    functions, between = _functions(device), _pass_over(behind) if behind else None
    samples: dict[tuple[str, str], list[float]] = {name: [] for name in functions}
    for turn in range(TURNS + 1):  # turn 0 warms up
        for name, (grad, run) in functions.items():
            elapsed = _microseconds(grad, run, device, between)
            if turn:
                samples[name].append(elapsed)
    rows: dict[str, dict] = {}
    for (call, who), values in samples.items():
        rows.setdefault(call, {"call": call})[who] = statistics.median(values)
    return list(rows.values())


def main(arguments: argparse.Namespace) -> int:
    facts = machine.machine(arguments.device)
    behind = f", behind two tensors of {arguments.behind:g} MB" if arguments.behind else ""
    print(f"{machine.describe(facts)}\nmicroseconds a call, input {SIZE}, 3x3{behind}")
    print(f"{'call':<30} {'conv2d':>8} {'lkconv':>8} {'extra':>8}")
    rows = measure(arguments.device, arguments.behind)
    for row in rows:
        extra = row["lkconv"] - row["conv2d"]
        print(f"{row['call']:<30} {row['conv2d']:8.2f} {row['lkconv']:8.2f} {extra:+8.2f}")
    if arguments.json:
        content = {"machine": facts, "versions": machine.versions(), "behind_mb": arguments.behind}
        content["rows"] = rows
        Path(arguments.json).write_text(json.dumps(content, indent=1) + "\n")
    return 0
