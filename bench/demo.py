"""The demonstration: a 31x31 layer and real networks, with torch and with lkconv, on a photograph.

Writes two pictures and prints a table. Weights are not trained: a bank of Gabor filters stands in for
the large layer, so that its maps can be looked at, and the networks keep their initial weights.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib.image
import numpy as np
import skimage.data
import timm
import torch
from torch import nn
from tqdm import tqdm

import lkconv
from bench import demo_pictures, machine

KERNEL, ORIENTATIONS, WAVELENGTHS = 31, 8, (5, 7, 10, 14)
WORST_DIFFERENCE = 1e-3  # of float32 results of a deep network, as a fraction of the largest value
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# timm's own networks. The third is timm's ConvNeXt-T with RepLKNet's kernel sizes: `kernel_sizes` is an
# argument of timm's class. ls_init_value=1 lets the untrained blocks contribute to the result.
NETWORKS = (
    ("ConvNeXt-T, 7x7", "convnext_tiny", {"ls_init_value": 1.0}),
    ("ConvMixer-1024/20, 9x9", "convmixer_1024_20_ks9_p14", {}),
    ("ConvNeXt-T, 31-29-27-13", "convnext_tiny", {"ls_init_value": 1.0, "kernel_sizes": (31, 29, 27, 13)}),
)


@dataclass
class Comparison:
    """Seconds without and with lkconv, in each memory layout, and how far the results lie apart."""

    name: str
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    difference: float = 0.0

    @property
    def best(self) -> tuple[float, float]:
        return min(self.before.values()), min(self.after.values())

    @property
    def ratio(self) -> float:
        before, after = self.best
        return before / after


def photograph(height: int, width: int) -> torch.Tensor:
    """Chelsea the cat, from scikit-image's wheel: (1, 3, height, width), values in [0, 1]."""
    path = Path(skimage.data.__file__).parent / "chelsea.png"
    pixels = torch.from_numpy(np.ascontiguousarray(matplotlib.image.imread(path)[..., :3]))
    image = pixels.permute(2, 0, 1)[None].float()
    size = {"size": (height, width), "mode": "bilinear", "antialias": True, "align_corners": False}
    return nn.functional.interpolate(image, **size)


def gabor_bank() -> torch.Tensor:
    """(32, 1, 31, 31): waves of 4 lengths in 8 directions under a Gaussian, of zero mean and unit norm."""
    axis = torch.arange(KERNEL) - (KERNEL - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    filters = []
    for wavelength in WAVELENGTHS:
        for i in range(ORIENTATIONS):
            angle = math.pi * i / ORIENTATIONS
            along = x * math.cos(angle) + y * math.sin(angle)
            envelope = torch.exp(-(x**2 + y**2) / (2 * (0.42 * wavelength + 1.5) ** 2))
            wave = envelope * torch.cos(2 * math.pi * along / wavelength)
            wave = wave - envelope * (wave.sum() / envelope.sum())
            filters.append(wave / wave.norm())
    return torch.stack(filters)[:, None]


def _seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def _distance(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a fraction of the largest expected value."""
    return float((result - expected).abs().max() / expected.abs().max())


def compare_layer(image: torch.Tensor, progress: Callable[[], object]) -> tuple[list[Comparison], dict]:
    """Forward and both gradients of the 31x31 filter bank; also what the pictures show."""
    bank = gabor_bank()
    channels = bank.shape[0]
    before = nn.Conv2d(channels, channels, KERNEL, padding=KERNEL // 2, groups=channels, bias=False)
    with torch.no_grad():
        before.weight.copy_(bank)
    after = lkconv.convert(before)
    grey = (image.mean(1, keepdim=True) - image.mean()).repeat(1, channels, 1, 1)
    rows = [
        Comparison(f"31x31 layer, {name}")
        for name in ("forward", "gradient of the input", "gradient of the weight")
    ]
    results = {}
    for module, side in ((before, "before"), (after, "after")):
        for layout, memory_format in LAYOUTS.items():
            x = grey.contiguous(memory_format=memory_format).requires_grad_()
            output = module(x)
            dy = output.detach()
            with torch.no_grad():
                getattr(rows[0], side)[layout] = _seconds(lambda m=module, x=x: m(x), 2)
            for row, leaf in ((rows[1], x), (rows[2], module.weight)):
                gradient = partial(torch.autograd.grad, output, leaf, dy, retain_graph=True)
                getattr(row, side)[layout] = _seconds(gradient, 2)
                results[side, row.name] = gradient()[0]
            results[side, rows[0].name] = dy
            progress()
    for row in rows:
        row.difference = _distance(results["after", row.name], results["before", row.name])
    maps = {side: results[side, rows[0].name][0] for side in ("before", "after")}
    return rows, {"bank": bank[:, 0], "maps": maps, "layer": (grey, before)}


def _train_step(network: nn.Module, x: torch.Tensor) -> None:
    network.zero_grad(set_to_none=True)
    network(x).square().mean().backward()


def compare_network(
    name: str, timm_name: str, keywords: dict, image: torch.Tensor, progress
) -> list[Comparison]:
    """Inference and a training step of one of timm's networks, before and after `lkconv.convert`."""
    torch.manual_seed(0)
    before = timm.create_model(timm_name, pretrained=False, num_classes=1000, **keywords)
    after = lkconv.convert(before)
    rows = [Comparison(f"{name}, {what}") for what in ("inference", "training step")]
    outputs = {}
    for network, side in ((before, "before"), (after, "after")):
        for layout, memory_format in LAYOUTS.items():
            network.to(memory_format=memory_format)
            x = image.contiguous(memory_format=memory_format)
            network.eval()
            with torch.no_grad():
                outputs[side] = network(x)
                getattr(rows[0], side)[layout] = _seconds(lambda n=network, x=x: n(x), 2)
            network.train()
            getattr(rows[1], side)[layout] = _seconds(lambda n=network, x=x: _train_step(n, x), 1)
            progress()
    gradients = [torch.cat([p.grad.flatten() for p in n.parameters()]) for n in (before, after)]
    rows[0].difference = _distance(outputs["after"], outputs["before"])
    rows[1].difference = _distance(gradients[1], gradients[0])
    return rows


def format_table(rows: list[Comparison]) -> str:
    """Times in milliseconds, the better layout of each side; the layouts themselves in brackets."""
    lines = [f"{'':<42} {'torch, ms':>26} {'lkconv, ms':>26} {'faster':>8} {'difference':>11}"]
    for row in rows:
        sides = []
        for times in (row.before, row.after):
            each = ", ".join(f"{seconds * 1e3:.4g}" for seconds in times.values())
            sides.append(f"{min(times.values()) * 1e3:.4g} ({each})")
        lines.append(f"{row.name:<42} {sides[0]:>26} {sides[1]:>26} {row.ratio:7.2f}x {row.difference:11.1e}")
    lines.append(
        "ms: the better memory layout (contiguous, channels_last); "
        "difference: largest, as a fraction of the largest value"
    )
    return "\n".join(lines)


def main(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    facts = machine.machine("cpu")
    print(f"{machine.describe(facts)}; torch {torch.__version__}", flush=True)
    with tqdm(total=4 * (1 + len(NETWORKS)), unit="part", leave=False) as bar:
        layer_rows, shown = compare_layer(photograph(150, 225), bar.update)
        rows = list(layer_rows)
        image = (photograph(224, 224) - 0.45) / 0.225
        for network in NETWORKS:
            rows += compare_network(*network, image, bar.update)
    print(format_table(rows))
    wrong = [row.name for row in rows if not row.difference <= WORST_DIFFERENCE]
    if wrong:
        print(f"WRONG: {', '.join(wrong)} differ by more than {WORST_DIFFERENCE:g}")
        return 1
    x, layer = shown["layer"]
    print(f"\nlkconv.explain of the 31x31 layer:\n{lkconv.explain(x, layer.weight, padding=KERNEL // 2)}")
    maps, speed = folder / "feature_maps.png", folder / "speedup.png"
    demo_pictures.feature_maps(photograph(300, 450)[0], shown["bank"], shown["maps"], WAVELENGTHS, maps)
    demo_pictures.speedups(rows, machine.describe(facts), speed)
    print(f"\npictures: {maps}, {speed}")
    return 0
