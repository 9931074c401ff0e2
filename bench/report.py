"""Prints rows, their summary with the targets beside it, and the comparison with an earlier run."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from bench import contention, targets
from bench.implementations import is_ours

SCHEMA = 1
_WHERE = (
    "channels", "height", "width", "kernel_size", "stride", "padding", "dilation", "multiplier",
    "parent_channels", "offset", "batch",
)  # fmt: skip


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else float("nan")


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def precision_of(row: dict) -> str:
    """The dtype, or tf32 for float32 that was rounded to it. Earlier files have the dtype alone."""
    return row.get("precision", row["dtype"])


def cell_title(row: dict) -> str:
    return f"{row['layer']}, N={row['batch']}, {precision_of(row)} {row['pass']}"


def _disturbed(rows: list[dict]) -> str:
    """A warning where other processes kept part of the processor busy in every attempt."""
    foreign = max((row["foreign_cores"] or 0 for row in rows), default=0)
    return f"  [disturbed: others used {foreign:.1f} cores]" if foreign > contention.BUSY else ""


def format_cell(rows: list[dict]) -> str:
    """All implementations of one cell, a line each."""
    lines = [cell_title(rows[0]) + _disturbed(rows)]
    for row in rows:
        head = f"  {row['implementation']:<14} {row['layout']:<13}"
        if not row["time"]:
            lines.append(f"{head} WRONG, not timed: {row['reason']}")
            continue
        t = row["time"]
        spread = f"{_milliseconds(t['median']):>8} ms ({_milliseconds(t['min'])}..{_milliseconds(t['max'])})"
        note = row["algorithm"] and f"  {row['algorithm']}"
        lines.append(
            f"{head} {spread:<32} {row['gflops']:8.1f} GFLOP/s {row['gbps']:7.2f} GB/s"
            f"  error {row['error']:.1e}  {_ratio(row['ratio']):>8}{note}"
        )
    return "\n".join(lines)


def format_cell_compact(rows: list[dict]) -> str:
    """One line a cell: milliseconds of each implementation, then lkconv's ratios in both layouts."""
    parts = []
    for row in rows:
        name = {"conv2d": "conv", "torch.fft": "fft"}.get(row["implementation"], row["implementation"])
        name = name.replace("lkconv", "lk")
        layout = {"contiguous": "c", "channels_last": "l"}[row["layout"]]
        parts.append(f"{name}.{layout} {_milliseconds(row['time']['median']) if row['time'] else 'WRONG'}")
    ours = [row for row in rows if is_ours(row["implementation"])]
    ratios = " ".join(_ratio(row["ratio"]) for row in ours)
    algorithms = "/".join(dict.fromkeys(row["algorithm"] for row in ours))
    return f"{cell_title(rows[0]):<62} {ratios:>14} {algorithms:<8} | " + "  ".join(parts) + _disturbed(rows)


def summarise(rows: list[dict], copy_gbps: float | None = None) -> list[dict]:
    """Geometric mean and worst layer of each group of lkconv's rows.

    A group is one (implementation, device, precision, pass, size class, layout of lkconv's input).
    ``copy_gbps``, the copy bandwidth of the same machine, is what some targets of GPUs are shares of.
    """
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        if is_ours(row["implementation"]) and row["ratio"] is not None:
            key = row["implementation"], row["device"], precision_of(row), row["pass"], row["size_class"]
            groups[(*key, row["layout"])].append(row)
    return [_summary(key, members, copy_gbps) for key, members in groups.items()]


def _summary(key: tuple, members: list[dict], copy_gbps: float | None) -> dict:
    implementation, device, precision, pass_name, size_class, layout = key
    worst = min(members, key=lambda r: r["ratio"])
    against_conv2d = [r["ratio_conv2d"] for r in members if r["ratio_conv2d"]]
    against_fft = [r["ratio_fft"] for r in members if r["ratio_fft"]]
    conv2d = targets.target_is_against_conv2d(device, pass_name)
    summary = {
        "implementation": implementation,
        "device": device,
        "dtype": members[0]["dtype"],
        "precision": precision,
        "pass": pass_name,
        "size_class": size_class,
        "layout": layout,
        "layers": len(members),
        "geomean": geomean(r["ratio"] for r in members),
        "geomean_conv2d": geomean(against_conv2d) if against_conv2d else None,
        "geomean_fft": geomean(against_fft) if against_fft else None,
        "copy_share": geomean(r["gbps"] / copy_gbps for r in members) if copy_gbps else None,
        "worst": worst["ratio"],
        "worst_layer": f"{worst['layer']}, N={worst['batch']}",
        "target": targets.target(device, precision, size_class, pass_name),
        "target_of": "geomean_conv2d" if conv2d else "geomean",
        "fft_floor": targets.fft_floor(device, precision, size_class, pass_name),
    }
    summary["met"] = _met(summary)
    return summary


def _met(summary: dict) -> bool | None:
    """Whether mean, FFT floor and worst layer all reach their targets; None where none is set."""
    if summary["target"] is None:
        return None
    share = targets.copy_share(summary["device"], summary["size_class"], summary["pass"])
    fast = (summary[summary["target_of"]] or 0) >= summary["target"]
    fast = fast or (share is not None and (summary["copy_share"] or 0) >= share)
    reached = fast and summary["worst"] >= targets.WORST
    return reached and (summary["fft_floor"] is None or (summary["geomean_fft"] or 0) >= summary["fft_floor"])


def _other_backend(row: dict) -> str:
    """What tells lkconv's further backends from the one that was named first."""
    return "" if row["implementation"] == "lkconv" else f"  [{row['implementation']}]"


def format_summary(rows: list[dict], copy_gbps: float | None = None) -> str:
    """The summary, then every layer on which lkconv loses and every row that was wrong."""
    lines = [
        "lkconv against the best peer of all layouts, for each layout of its input (geomean over layers)",
        f"{'dtype':<9} {'pass':<16} {'class':<6} {'layout':<14} {'layers':>6} {'geomean':>8} {'conv2d':>8} "
        f"{'fft':>7} {'target':>15} {'worst':>7}  worst layer",
    ]
    for s in summarise(rows, copy_gbps):
        goal = "-"
        if s["target"] is not None:
            goal = f"{s['target']:g}x" + (" conv2d" if s["target_of"] == "geomean_conv2d" else "")
            goal += {True: " met", False: " no"}[s["met"]]
        lines.append(
            f"{s['precision']:<9} {s['pass']:<16} {s['size_class']:<6} {s['layout']:<14} {s['layers']:>6} "
            f"{_ratio(s['geomean']):>8} {_ratio(s['geomean_conv2d']):>8} {_ratio(s['geomean_fft']):>7} "
            f"{goal:>15} {_ratio(s['worst']):>7}  {s['worst_layer']}{_other_backend(s)}"
        )
    ours = [row for row in rows if is_ours(row["implementation"]) and row["ratio"] is not None]
    losing = sorted((row for row in ours if row["ratio"] < targets.WORST), key=lambda row: row["ratio"])
    lines.append(f"\nlosing rows (below {targets.WORST}x): {len(losing)} of {len(ours)}")
    lines += [
        f"  {_ratio(row['ratio']):>7}  {cell_title(row)}, {row['layout']}, {row['algorithm']}; "
        f"best: {row['best_peer']}"
        for row in losing
    ]
    wrong = [row for row in rows if not row["correct"]]
    lines.append(f"wrong rows (not timed): {len(wrong)}")
    lines += [
        f"  {row['implementation']} {row['layout']}: {cell_title(row)}: {row['reason']}" for row in wrong
    ]
    return "\n".join(lines)


def format_not_run(entries: list[dict], cells: int) -> str:
    """What a run left out and why, a line for each reason, precision and pass."""
    lines = [f"not run: {len(entries)} of {cells} cells"]
    groups: dict[tuple, list[str]] = defaultdict(list)
    for entry in entries:
        groups[entry["reason"], entry["precision"], entry["pass"]].append(entry["layer"])
    for (reason, precision, pass_name), names in groups.items():
        lines.append(f"  {precision} {pass_name} ({reason}): {', '.join(names)}")
    return "\n".join(lines)


def save(
    path: str | Path,
    rows: list[dict],
    settings: dict,
    ceilings: dict | None,
    not_run: list[dict] | None = None,
) -> None:
    """Writes the rows with all they need to be read alone. The file is whole at every moment."""
    content = {
        "schema": SCHEMA,
        "settings": settings,
        "ceilings": ceilings,
        "summary": summarise(rows, (ceilings or {}).get("copy_gbps")),
        "not_run": not_run or [],
        "rows": rows,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


def load(path: str | Path) -> dict:
    content = json.loads(Path(path).read_text())
    if content.get("schema") != SCHEMA:
        raise ValueError(
            f"{path}: expected a benchmark file of schema {SCHEMA}, got schema {content.get('schema')!r}"
        )
    return content


def _key(row: dict) -> str:
    names = (*_WHERE, "dtype", "pass", "layout", "implementation", "device")
    return json.dumps([*(row[name] for name in names), precision_of(row)])


def compare(rows: list[dict], base: list[dict]) -> list[dict]:
    """lkconv's rows that ``base`` has too: how much faster than then, raw and corrected for the machine.

    ``ratio`` is the plain quotient of medians. ``adjusted`` divides out what happened to the best peer
    of the same cell in the meantime: a machine that became slower slowed that one as well.
    """
    before = {_key(row): row for row in base if is_ours(row["implementation"]) and row["time"]}
    found = []
    for row in rows:
        old = before.get(_key(row))
        if not row["time"] or old is None:
            continue
        adjusted = row["ratio"] / old["ratio"] if row["ratio"] and old["ratio"] else None
        found.append(
            {"row": row, "ratio": old["time"]["median"] / row["time"]["median"], "adjusted": adjusted}
        )
    return found


def format_comparison(rows: list[dict], base: list[dict]) -> str:
    compared = compare(rows, base)
    if not compared:
        return "base: no row in common"
    lines = ["against the base (above 1: faster now; 'adjusted' divides out the drift of the best peer)"]
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for entry in sorted(compared, key=lambda entry: entry["ratio"]):
        row = entry["row"]
        groups[precision_of(row), row["pass"], row["layout"]].append(entry)
        lines.append(
            f"  {_ratio(entry['ratio']):>7} {_ratio(entry['adjusted']):>7}  "
            f"{cell_title(row)}, {row['layout']}"
        )
    for group, entries in groups.items():
        adjusted = [e["adjusted"] for e in entries if e["adjusted"]]
        lines.append(
            f"geomean {' '.join(group)}: {_ratio(geomean(e['ratio'] for e in entries))}, "
            f"adjusted {_ratio(geomean(adjusted) if adjusted else None)}, {len(entries)} rows"
        )
    return "\n".join(lines)
