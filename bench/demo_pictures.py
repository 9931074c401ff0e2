"""The two pictures of the demonstration."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.plots import GRID, INK, STYLE

DARKEST = 1e-6  # difference drawn black, as a fraction of the largest value
BEFORE, AFTER = "#9a9a9a", "#0b6fa4"


def _bare(axes, title: str = "", **style) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if title:
        axes.set_title(title, **style)


def feature_maps(photo: torch.Tensor, bank: torch.Tensor, maps: dict, wavelengths, path: Path) -> None:
    """Photograph, four of the 31x31 kernels, and their maps by torch and lkconv with the difference.

    ``photo`` is (3, H, W) in [0, 1], ``bank`` (C, 31, 31), each map (C, H, W).
    """
    directions = len(bank) // len(wavelengths)
    chosen = [0, directions + 2, 2 * directions + 4, 3 * directions + 6]
    with plt.rc_context({**STYLE, "axes.titlesize": 10}):
        figure, grid = plt.subplots(
            4,
            5,
            figsize=(14, 8.6),
            gridspec_kw={"width_ratios": [1.15, 1, 1, 1, 1], "height_ratios": [1.05, 1, 1, 1]},
        )
        figure.suptitle(
            "One 31x31 depthwise layer on a photograph", x=0.012, ha="left", fontsize=14, weight="bold"
        )
        grid[0][0].imshow(photo.permute(1, 2, 0).numpy())
        _bare(grid[0][0], "photograph (scikit-image)", loc="left")
        captions = (
            "nn.Conv2d",
            "lkconv.DepthwiseConv2d",
            f"difference\n(black: {DARKEST:g} of the\nlargest value)",
        )
        for row, caption in enumerate(captions, start=1):
            _bare(grid[row][0])
            grid[row][0].text(0.98, 0.5, caption, ha="right", va="center", fontsize=12, color=INK)
        for column, channel in enumerate(chosen, start=1):
            _column(grid[:, column], bank[channel], maps["before"][channel], maps["after"][channel])
        figure.tight_layout(rect=(0, 0, 1, 0.985))
        figure.savefig(path, dpi=90)
        plt.close(figure)


def _column(column, kernel: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> None:
    limit = float(kernel.abs().max())
    column[0].imshow(kernel.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    _bare(column[0], "31x31 kernel", loc="center")
    top = float(before.abs().max()) * 0.6
    for axes, values in ((column[1], before), (column[2], after)):
        axes.imshow(values.numpy(), cmap="RdBu_r", vmin=-top, vmax=top)
        _bare(axes)
    difference = (after - before).abs()
    scale = float(before.abs().max())
    column[3].imshow(difference.numpy(), cmap="Greys", vmin=0, vmax=DARKEST * scale)
    _bare(column[3])
    column[3].set_xlabel(f"largest difference {float(difference.max()) / scale:.1e}", fontsize=9)


def speedups(rows, subtitle: str, path: Path) -> None:
    """Times of both sides as bars on a logarithmic axis, the better memory layout of each."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(11, 0.62 * len(rows) + 1.9))
        for i, row in enumerate(rows):
            before, after = (1e3 * seconds for seconds in row.best)
            axes.barh(i - 0.18, before, height=0.34, color=BEFORE)
            axes.barh(i + 0.18, after, height=0.34, color=AFTER)
            axes.annotate(
                f"{before:.4g} ms", (before, i - 0.18), xytext=(4, 0), textcoords="offset points",
                va="center", fontsize=9, color="#555555",
            )  # fmt: skip
            axes.annotate(
                f"{after:.4g} ms   {row.ratio:.1f}x", (after, i + 0.18), xytext=(4, 0),
                textcoords="offset points", va="center", fontsize=9, weight="bold", color=AFTER,
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlim(min(min(row.best) for row in rows) * 500, max(max(row.best) for row in rows) * 3000)
        axes.set_xlabel("milliseconds (logarithmic; the better memory layout of each side)")
        axes.grid(axis="x", color=GRID)
        axes.tick_params(axis="y", length=0)
        axes.legend(
            handles=[plt.Rectangle((0, 0), 1, 1, color=BEFORE), plt.Rectangle((0, 0), 1, 1, color=AFTER)],
            labels=["torch", "lkconv"], loc="upper right", bbox_to_anchor=(1, 1.09), ncol=2, frameon=False,
        )  # fmt: skip
        figure.suptitle("Before and after lkconv.convert", x=0.012, ha="left", fontsize=14, weight="bold")
        axes.set_title(subtitle, loc="left", fontsize=10, color="#555555")
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)
