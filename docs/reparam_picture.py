"""Draws docs/reparam.png: the branches of a UniRepLKNet block becoming one kernel."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from lkconv.reparam import DilatedReparamBlock, place


def draw(path: Path) -> None:
    """One channel of a 13 x 13 block: its branches, where their taps fall, and the sum."""
    torch.manual_seed(7)
    block = DilatedReparamBlock(1, 13, branches=((5, 1), (7, 2), (3, 3), (3, 4), (3, 5))).eval()
    for part in block._parts():
        torch.nn.init.normal_(part.conv.weight, std=0.5)
        torch.nn.init.uniform_(part.bn.running_var, 0.5, 1.5)
    target = block._target
    kernels, titles = [], []
    for part in block._parts():
        branch = part.linear(target, 1, part.conv.weight)
        size, rate = part.conv.kernel_size[0], part.conv.dilation[0]
        scaled = (branch.weight * branch.scale.reshape(-1, 1, 1, 1)).detach()
        kernels.append((scaled[0, 0], place(scaled, part.geometry(target), target)[0, 0]))
        titles.append(f"{size} x {size}" + (f", dilation {rate}" if rate > 1 else ""))
    merged = block.get_equivalent_kernel_bias()[0][0, 0].detach()
    assert torch.allclose(sum(placed for _, placed in kernels), merged, atol=1e-6)

    figure, axes = plt.subplots(2, 7, figsize=(15.4, 4.9), layout="constrained")
    limit = merged.abs().max().item()
    style = {"cmap": "RdBu", "vmin": -limit, "vmax": limit}
    for column, ((own, placed), title) in enumerate(zip(kernels, titles, strict=True)):
        axes[0, column].imshow(own, **style)
        axes[0, column].set_title(title)
        empty = torch.where(placed == 0, torch.nan, placed)
        axes[1, column].imshow(empty, **style)
    axes[0, 0].set_ylabel("scaled by\nbatch norm")
    axes[1, 0].set_ylabel("placed in\n13 x 13")
    axes[0, 6].axis("off")
    axes[0, 6].text(0.5, 0.5, "sum of all\n270 taps → 169\n17 ops → 1", ha="center", va="center", fontsize=13)
    image = axes[1, 6].imshow(merged, **style)
    axes[1, 6].set_title("= one kernel")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_facecolor("0.93")
    figure.colorbar(image, ax=axes[1, 6], shrink=0.8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("reparam.png"))
