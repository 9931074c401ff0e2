"""Draws a run: speed-up against kernel size, and a roofline, for each pass."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench import machine
from bench.report import geomean

INK, GRID, PEER = "#222222", "#e3e3e3", "#9a9a9a"
COLOURS = {"float32": "#0b6fa4", "bfloat16": "#d1495b", "float16": "#e19c24", "float64": "#5a8f3d"}
MARKERS = {"contiguous": "o", "channels_last": "^"}
TITLES = {
    "forward": "forward",
    "backward_input": "gradient of the input",
    "backward_weight": "gradient of the weight",
}
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.dpi": 130,
}


def _times(value: float, _position: object = None) -> str:
    return f"{value:g}x"


def kernel_side(row: dict) -> float:
    """Side of the square with as many taps: 16 for 51x5, so that strips and squares share an axis."""
    kh, kw = row["kernel_size"]
    return (kh * kw) ** 0.5


def _speedup(axes: Axes, rows: list[dict], pass_name: str) -> None:
    groups: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["implementation"] == "lkconv" and row["pass"] == pass_name and row["ratio"] is not None:
            groups[row["dtype"], row["layout"]][kernel_side(row)].append(row["ratio"])
    for (dtype, layout), by_side in groups.items():
        colour, marker = COLOURS[dtype], MARKERS[layout]
        sides = sorted(by_side)
        xs = [side for side in sides for _ in by_side[side]]
        ys = [ratio for side in sides for ratio in by_side[side]]
        axes.plot(xs, ys, marker, color=colour, alpha=0.35, markersize=4, markeredgewidth=0)
        style = "-" if layout == "contiguous" else "--"
        axes.plot(sides, [geomean(by_side[side]) for side in sides], style, color=colour, linewidth=1.6)
    axes.axhline(1, color=INK, linewidth=0.9)
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(_times))
    axes.xaxis.set_major_locator(FixedLocator([3, 5, 7, 9, 13, 17, 23, 31, 51]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("kernel side (square root of taps)")
    axes.set_title(TITLES[pass_name], loc="left")
    axes.grid(color=GRID, linewidth=0.8)


def _ceiling_lines(axes: Axes, ceilings: dict, low: float, high: float) -> None:
    """Bandwidth times intensity, cut at the highest compute ceiling; a horizontal line for each dtype."""
    top = max(ceilings["matmul_gflops"].values())
    copies = []
    for key, style, name in (
        ("copy_gbps", "-", "memory (solid)"),
        ("cached_copy_gbps", ":", "cache (dotted)"),
    ):
        if ceilings.get(key):
            ends = [low, min(high, top / ceilings[key])]
            axes.plot(ends, [ceilings[key] * x for x in ends], style, color=INK, linewidth=1.1)
            copies.append(f"{name} {ceilings[key]:,.0f}")
    peaks = []
    for dtype, peak in ceilings["matmul_gflops"].items():
        axes.plot([low, high], [peak, peak], "-", color=COLOURS[dtype], linewidth=1.1)
        peaks.append(f"{dtype} {peak:,.0f}")
    note = f"copy, GB/s: {', '.join(copies)}\nmatmul, GFLOP/s (level): {', '.join(peaks)}"
    axes.set_title(note, loc="left", fontsize=8, color="#555555")


def _roofline(axes: Axes, rows: list[dict], ceilings: dict, pass_name: str) -> None:
    mine = [row for row in rows if row["pass"] == pass_name and row["time"]]
    if not mine:
        return
    intensity = [row["flops"] / row["bytes"] for row in mine]
    low, high = min(intensity) / 1.6, max(intensity) * 1.6
    _ceiling_lines(axes, ceilings, low, high)
    for row, x in zip(mine, intensity, strict=True):
        if row["implementation"] == "lkconv":
            axes.plot(
                x,
                row["gflops"],
                MARKERS[row["layout"]],
                color=COLOURS[row["dtype"]],
                alpha=0.6,
                markersize=4.5,
            )
        elif row["best_peer"] == f"{row['implementation']} {row['layout']}":
            axes.plot(x, row["gflops"], "x", color=PEER, markersize=4.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("nominal flop per byte")
    axes.grid(color=GRID, linewidth=0.8)


def _legend(figure, rows: list[dict]) -> None:
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    handles = [
        Line2D([], [], marker="s", linestyle="", color=COLOURS[d], label=f"lkconv {d}") for d in dtypes
    ]
    handles += [
        Line2D([], [], marker="o", linestyle="-", color="#666666", label="contiguous input"),
        Line2D([], [], marker="^", linestyle="--", color="#666666", label="channels_last input"),
        Line2D([], [], marker="x", linestyle="", color=PEER, label="best peer"),
    ]
    figure.legend(handles=handles, loc="lower center", ncol=len(handles), frameon=False)


def draw(rows: list[dict], ceilings: dict, path: str | Path) -> None:
    """Writes one picture: a column for each pass, speed-ups above, rooflines below."""
    passes = [name for name in TITLES if any(row["pass"] == name for row in rows)]
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            2, len(passes), figsize=(4.6 * len(passes) + 0.8, 8.4), squeeze=False, sharey="row"
        )
        for column, pass_name in enumerate(passes):
            _speedup(grid[0][column], rows, pass_name)
            _roofline(grid[1][column], rows, ceilings, pass_name)
        grid[0][0].set_ylabel("speed relative to the best peer")
        grid[1][0].set_ylabel("nominal GFLOP/s")
        figure.suptitle(
            f"depthwise_conv2d: {machine.describe(rows[0]['machine'])}", x=0.01, ha="left", fontsize=11
        )
        _legend(figure, rows)
        figure.tight_layout(rect=(0, 0.035, 1, 1))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)
