"""Markdown tables of ``--json`` files: ``python -m bench table FILE.json [...] [--layers WORD ...]``."""

from __future__ import annotations

import argparse

from bench import machine, report, verdicts
from bench.implementations import is_ours
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


def _copy_gbps(content: dict) -> float | None:
    return (content["ceilings"] or {}).get("copy_gbps")


def _name(summary: dict) -> str:
    """The precision, with the backend where it is not the one that was named first."""
    backend = summary["implementation"].partition(":")[2]
    return f"{summary['precision']}, {backend}" if backend else summary["precision"]


def summary_table(contents: list[dict]) -> str:
    """One line for each dtype, pass, size class and layout, with its target and its worst layer."""
    lines = [
        "| dtype | pass | kernels | layout | layers | best peer | F.conv2d | torch.fft | target | worst |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for content in contents:
        for s in report.summarise(content["rows"], _copy_gbps(content)):
            goal = ""
            if s["target"] is not None:
                goal = f"{s['target']:g}" + (" of F.conv2d" if s["target_of"] == "geomean_conv2d" else "")
            lines.append(
                f"| {_name(s)} | {s['pass']} | {s['size_class']} | {s['layout']} | {s['layers']} "
                f"| {_ratio(s['geomean'])} | {_ratio(s['geomean_conv2d'])} | {_ratio(s['geomean_fft'])} "
                f"| {goal} | {_ratio(s['worst'])} {s['worst_layer']} |"
            )
    return "\n".join(lines)


def _fastest(rows: list[dict], ours: bool) -> str:
    timed = [r for r in rows if is_ours(r["implementation"]) == ours and r["time"]]
    return f"{max(r['gflops'] for r in timed):.0f}" if timed else "-"


def layers_table(contents: list[dict], layers: list[str]) -> str:
    """lkconv against the best peer, each in its better layout, a column for each pass."""
    lines = ["| dtype | layer | " + " | ".join(PASSES) + " |", "|---" * (2 + len(PASSES)) + "|"]
    for content in contents:
        for name in layers:
            rows = [r for r in content["rows"] if r["layer"] == name]
            for precision in dict.fromkeys(report.precision_of(r) for r in rows):
                cells = []
                for pass_name in PASSES:
                    cell = [r for r in rows if report.precision_of(r) == precision and r["pass"] == pass_name]
                    cells.append(f"{_fastest(cell, True)} / {_fastest(cell, False)}" if cell else "-")
                batch = rows[0]["batch"]
                lines.append(f"| {precision} | {name}, N={batch} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gpu_tables(contents: list[dict]) -> str:
    """The promises about GPUs, all files together, and what the runs left out."""
    rows = [{**row, "run": i} for i, content in enumerate(contents) for row in content["rows"]]
    copies = [_copy_gbps(content) for content in contents if _copy_gbps(content)]
    parts = [verdicts.markdown(verdicts.evaluate(rows, max(copies, default=None)))]
    for content in contents:
        if content.get("not_run"):
            cells = len(content["not_run"]) + len({report.cell_title(row) for row in content["rows"]})
            parts.append(f"```\n{report.format_not_run(content['not_run'], cells)}\n```")
    return "\n\n".join(parts)


def run(arguments: argparse.Namespace) -> int:
    contents = [content for file in arguments.files if (content := report.load(file))["rows"]]
    if not contents:
        print("no row was measured")
        return 1
    for content in contents:
        row = content["rows"][0]
        print(f"{machine.describe(row['machine'])}, torch {row['versions']['torch']}")
    print(f"\n{summary_table(contents)}")
    if arguments.layers:
        print(f"\n{layers_table(contents, arguments.layers)}")
    if any(content["rows"][0]["device"] == "cuda" for content in contents):
        print(f"\n{gpu_tables(contents)}")
    return 0
