"""Windows on slices of channels: the token mixers of InceptionNeXt-T, whole, against PyTorch.

The peer cuts the channels, convolves three slices with ``F.conv2d`` and concatenates, in contiguous and in
channels_last memory; lkconv writes slices of one output. A row is timed only when the outputs, and in
training the input's gradient, agree with float64.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import lkconv
from bench import machine, measure
from bench.shapes import layers
from lkconv import reference

LIMITS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MODES = ("forward", "training")


def mixers() -> dict[str, tuple[int, int, list[tuple[int, int, int]]]]:
    """Name -> channels, height and the (channels, kh, kw) of the convolved slices, which come last."""
    found: dict[str, tuple[int, int, list[tuple[int, int, int]]]] = {}
    for layer in sorted(layers("inceptionnext"), key=lambda one: one.offset):
        name = f"{layer.model} {layer.height}x{layer.width} C={layer.parent_channels}"
        _, _, windows = found.setdefault(name, (layer.parent_channels, layer.height, []))
        windows.append((layer.channels, *layer.kernel_size))
    return dict(sorted(found.items(), key=lambda item: item[1][0]))


def _step(function: Callable[[Tensor], Tensor], x: Tensor, seed: Tensor, mode: str) -> Callable[[], list]:
    """A forward pass, or one with the gradients of input, weights and biases."""
    if mode == "forward":

        def forward():
            with torch.no_grad():
                return [function(x)]

        return forward
    leaf = x.detach().requires_grad_()

    def step():
        leaf.grad = None
        out = function(leaf)
        out.backward(seed)
        return [out, leaf.grad]

    return step


def measure_mixer(
    name: str, batch: int, dtype: str, mode: str, device: str, budget: measure.Budget
) -> list[dict]:
    """One row per implementation and layout: error, and median seconds where it is right."""
    channels, side, windows = mixers()[name]
    torch.manual_seed(0)
    weights = [torch.randn(c, 1, kh, kw) / (kh * kw) ** 0.5 for c, kh, kw in windows]
    biases = [torch.randn(c) for c, _, _ in windows]
    x, seed = torch.randn(2, batch, channels, side, side)
    functions = {"lkconv": lkconv.segmented_depthwise_conv2d, "eager": reference.segmented_depthwise_conv2d}
    rows, runs = [], {}

    def prepared(function: Callable, kind: torch.dtype, layout: torch.memory_format) -> Callable[[], list]:
        own = [
            [None, *(t.to(device, kind).requires_grad_(mode == "training") for t in tensors)]
            for tensors in (weights, biases)
        ]
        data = [t.to(device, kind).to(memory_format=layout) for t in (x, seed)]
        return _step(partial(function, weights=own[0], biases=own[1]), *data, mode)

    exact = [t.detach() for t in prepared(functions["eager"], torch.float64, torch.contiguous_format)()]
    for (implementation, function), (layout, format) in itertools.product(functions.items(), LAYOUTS.items()):
        step = prepared(function, getattr(torch, dtype), format)
        pairs = zip((t.detach() for t in step()), exact, strict=True)
        error = max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)
        rows.append(
            {"mixer": name, "batch": batch, "dtype": dtype, "mode": mode, "implementation": implementation,
             "layout": layout, "error": error, "median": None}
        )  # fmt: skip
        if error <= LIMITS[dtype]:
            runs[f"{implementation} {layout}"] = step
    if device == "cuda":
        sets = {key: [run] for key, run in runs.items()}
        times = measure.time_cuda(sets, x.nbytes, machine.l2_bytes("cuda"), budget)
    else:
        times = measure.time_cpu(runs, budget)
    for row in rows:
        key = f"{row['implementation']} {row['layout']}"
        row["median"] = times[key].summary()["median"] if key in times else None
    return rows


def show(rows: list[dict]) -> str:
    """One line a mixer: the better layout of either side, and their ratio."""
    best = {}
    for row in rows:
        if row["median"] is not None:
            best[row["implementation"]] = min(best.get(row["implementation"], 1e9), row["median"])
    first = rows[0]
    text = f"{first['mixer']:<30s} N={first['batch']} {first['dtype']:<8s} {first['mode']:<8s}"
    if len(best) < 2:
        return f"{text} WRONG, not timed"
    ours, eager = best["lkconv"] * 1e3, best["eager"] * 1e3
    return f"{text} lkconv {ours:8.3f} ms  eager {eager:8.3f} ms  {eager / ours:5.2f}x"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m bench segmented``."""
    parser.add_argument("--dtype", nargs="+", choices=list(LIMITS), default=["float32"])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--json", metavar="FILE", help="write all rows")


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints; 1 when a result of lkconv is wrong."""
    facts = machine.machine(arguments.device)
    print(machine.describe(facts), flush=True)
    budget = measure.QUICK if arguments.quick else measure.FULL
    rows: list[dict] = []
    for name, dtype, mode in itertools.product(mixers(), arguments.dtype, arguments.mode):
        found = measure_mixer(name, arguments.batch, dtype, mode, arguments.device, budget)
        rows += found
        print(show(found), flush=True)
    if arguments.json:
        content = {"machine": facts, "versions": machine.versions(), "rows": rows}
        Path(arguments.json).write_text(json.dumps(content, indent=1))
    return int(any(r["median"] is None for r in rows if r["implementation"] == "lkconv"))
