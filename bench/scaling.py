"""Time against batch and channels: both must be linear, whatever algorithm runs."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

from bench import depthwise_conv2d, machine
from bench.implementations import LKCONV
from bench.problem import PASSES
from bench.shapes import Layer

BASE = Layer("scaling", "-", 64, 28, 28, (13, 13), padding=(6, 6))
BATCHES = (1, 2, 4, 8, 16, 32)
CHANNELS = (16, 32, 64, 128, 256, 512)


def slope(xs: list[float], ys: list[float]) -> float:
    """Exponent of the power law y = a x^b that fits best (least squares of the logarithms)."""
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    covariance = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True))
    return covariance / sum((a - mean_u) ** 2 for a in u)


def _seconds(layer: Layer, batch: int, pass_name: str, device: str) -> float:
    settings = depthwise_conv2d.Settings(device=device, batch=batch, quick=True)
    rows = depthwise_conv2d.measure_cell(layer, "float32", pass_name, settings, [LKCONV])
    row = next(row for row in rows if row["layout"] == "contiguous")
    if not row["time"]:
        raise RuntimeError(f"lkconv is wrong on {layer}: {row['reason']}")
    return row["time"]["median"]


def measure(device: str, batches=BATCHES, channels=CHANNELS) -> list[dict]:
    rows = []
    for pass_name in PASSES:
        for axis, values in (("N", batches), ("C", channels)):
            seconds = [
                _seconds(BASE, value, pass_name, device)
                if axis == "N"
                else _seconds(replace(BASE, channels=value), 8, pass_name, device)
                for value in values
            ]
            rows.append(
                {
                    "pass": pass_name,
                    "axis": axis,
                    "values": list(values),
                    "seconds": seconds,
                    "exponent": slope(list(values), seconds),
                }
            )
    return rows


def main(arguments: argparse.Namespace) -> int:
    facts = machine.machine(arguments.device)
    print(
        f"{machine.describe(facts)}\nfloat32, 28x28, 13x13; microseconds per unit of N (C=64) and of C (N=8)"
    )
    rows = measure(arguments.device)
    for row in rows:
        each = [s / v * 1e6 for s, v in zip(row["seconds"], row["values"], strict=True)]
        points = "  ".join(f"{v}: {t:.3g}" for v, t in zip(row["values"], each, strict=True))
        print(f"{row['pass']:<16} {row['axis']}  exponent {row['exponent']:.2f}   {points}")
    if arguments.json:
        content = {"machine": facts, "versions": machine.versions(), "rows": rows}
        Path(arguments.json).write_text(json.dumps(content, indent=1) + "\n")
    return 0
