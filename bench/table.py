"""Markdown tables of ``--json`` files: ``python -m bench table FILE.json [...] [--layers WORD ...]``."""

from __future__ import annotations

import argparse

from bench import machine, report
from bench.problem import PASSES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE.json")
    parser.add_argument(
        "--layers",
        nargs="+",
        default=[],
        metavar="NAME",
        help="also a row for each of these layers, named exactly, in nominal GFLOP/s",
    )


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def summary_table(contents: list[dict]) -> str:
    """One line for each dtype, pass, size class and layout, with its target and its worst layer."""
    lines = [
        "| dtype | pass | kernels | layout | layers | best peer | F.conv2d | torch.fft | target | worst |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for content in contents:
        for s in report.summarise(content["rows"]):
            goal = ""
            if s["target"] is not None:
                goal = f"{s['target']:g}" + (" of F.conv2d" if s["target_of"] == "geomean_conv2d" else "")
            lines.append(
                f"| {s['dtype']} | {s['pass']} | {s['size_class']} | {s['layout']} | {s['layers']} "
                f"| {_ratio(s['geomean'])} | {_ratio(s['geomean_conv2d'])} | {_ratio(s['geomean_fft'])} "
                f"| {goal} | {_ratio(s['worst'])} {s['worst_layer']} |"
            )
    return "\n".join(lines)


def _fastest(rows: list[dict], ours: bool) -> str:
    timed = [r for r in rows if (r["implementation"] == "lkconv") == ours and r["time"]]
    return f"{max(r['gflops'] for r in timed):.0f}" if timed else "-"


def layers_table(contents: list[dict], layers: list[str]) -> str:
    """lkconv against the best peer, each in its better layout, a column for each pass."""
    lines = ["| dtype | layer | " + " | ".join(PASSES) + " |", "|---" * (2 + len(PASSES)) + "|"]
    for content in contents:
        for name in layers:
            rows = [r for r in content["rows"] if r["layer"] == name]
            for dtype in dict.fromkeys(r["dtype"] for r in rows):
                cells = []
                for pass_name in PASSES:
                    cell = [r for r in rows if r["dtype"] == dtype and r["pass"] == pass_name]
                    cells.append(f"{_fastest(cell, True)} / {_fastest(cell, False)}" if cell else "-")
                batch = rows[0]["batch"]
                lines.append(f"| {dtype} | {name}, N={batch} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> int:
    contents = [report.load(file) for file in arguments.files]
    for content in contents:
        row = content["rows"][0]
        print(f"{machine.describe(row['machine'])}, torch {row['versions']['torch']}")
    print(f"\n{summary_table(contents)}")
    if arguments.layers:
        print(f"\n{layers_table(contents, arguments.layers)}")
    return 0
