"""What the CUDA kernels of Group-Mix aggregation execute in evaluation, counted in their machine code.

Loops are counted: staging, depthwise rows, the pointwise product. Left out is what a tile runs through once,
because it holds the code of all variants (statistics, three layouts of stores, LayerNorm): times are lower
bounds. Nothing is measured.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from bench.models.group_mix_former import CONFIGS

from . import machine, sass
from .geometry import ceil_div
from .machine import Work

ARCH, BATCH, IMAGE = "sm_90a", 32, 224
THREADS, WARPS, STRIP = 256, 8, 8  # of a block; pixels of a thread in a depthwise row
DEPTH_STEP, OUT_STEP = 32, 64  # terms and columns of a product that are staged at a time
WINDOWS = (3, 5, 7, 3)  # of the segments 1 to 3, and of the branch past the attention
SIZE = {"bfloat16": 2, "float32": 4}
EAGER_TRAFFIC = 6  # times the fused op's, of PyTorch's operators in evaluation

Code = dict[str, tuple[sass.Instruction, ...]]


@dataclass(frozen=True)
class Tile:
    """Pixels of a block, channels staged at a time, and tiles of an image."""

    height: int
    width: int
    chunk: int
    count: int


def shapes(pixels: int, height: int, width: int, halo: int) -> tuple[int, int, int]:
    """The planner's rectangle of ``pixels``: fewest tiles, then the smallest window. And the tiles."""
    widths = [8 << i for i in range((pixels // 8).bit_length())]
    count, _, w = min(
        (ceil_div(height, pixels // w) * ceil_div(width, w), (pixels // w + halo) * (w + halo), w)
        for w in widths
    )
    return pixels // w, w, count


def tile_of(launch: dict, images: int, side: int, d: int, window: int, matrices: int) -> Tile:
    """The tile whose blocks and shared memory are those of the launch that the planner reports."""
    pitch, halo = ceil_div(d, 4) * 4 + 4, window - 1
    for pixels in (512, 256, 128, 64, 32, 16, 8):
        height, width, count = shapes(pixels, side, side, halo)
        for chunk in (32, 16, 8):
            staged = (height + halo) * (width + halo) * chunk + window * window * chunk
            numbers = pixels * pitch * matrices + DEPTH_STEP * OUT_STEP + staged
            if (launch["blocks"], launch["shared_bytes"]) == (images * count, 4 * numbers):
                return Tile(height, width, chunk, count)
    raise ValueError(f"no tile explains {launch}; adapt bench/predict/group_mix.py")


@dataclass(frozen=True)
class Loops:
    """The loops of ``aggregate<T, k>`` over tokens with aligned pairs of channels."""

    window: sass.Loop
    taps: sass.Loop
    row: sass.Loop
    strip: tuple[sass.Instruction, ...]  # around the rows of taps
    weights: sass.Loop
    product: sass.Loop


def loops_of(code: tuple[sass.Instruction, ...], k: int) -> Loops:
    found = sass.loops(code)
    inner = [x for x in found if x.innermost]
    row = sass.find(
        inner, "depthwise rows", lambda x: x.macs == 32 * STRIP * k and x.count("LDS") > 8, _length
    )
    product = sass.find(inner, "the product", lambda x: x.macs == 32 * 64, _length)
    around = sass.enclosing(found, row)
    if around is None:
        raise LookupError("no loop around the depthwise rows")
    before = [x for x in inner if x.end < row.start and x.count("LDG") == 4]
    weights = [x for x in inner if row.end < x.start < product.start and x.count("LDG") == 4]
    return Loops(
        window=sass.find(before, "the window, by pairs", lambda x: x.count("STS") == 8, _length),
        taps=sass.find(before, "taps", lambda x: x.count("STS") == 4, lambda x: -len(x.body)),
        row=row,
        strip=sass.exclusive(around, found),
        weights=sass.find(weights, "weights", lambda x: x.count("STS") == 4, _length),
        product=product,
    )


def _length(x: sass.Loop) -> int:
    return len(x.body)


def add_tile(work: Work, loops: Loops, tile: Tile, d: int, window: int, times: float) -> None:
    """One part of one tile, ``times`` over: the depthwise convolution of d channels and the product."""
    halo, pairs = window - 1, tile.chunk // 2
    positions = (tile.height + halo) * (tile.width + halo)
    chunks = times * WARPS * ceil_div(d, tile.chunk)
    # Four steps of the threads in a body.
    work.add(loops.window.body, chunks * ceil_div(positions, 4 * (THREADS // pairs)))
    work.add(loops.taps.body, chunks * ceil_div(window * window * tile.chunk, 4 * THREADS))
    strips = ceil_div(tile.height * tile.width // STRIP, THREADS // tile.chunk)
    work.add(loops.strip, chunks * strips)
    work.add(loops.row.body, chunks * strips * window)
    columns = min(OUT_STEP, 4 << (ceil_div(d, 4) - 1).bit_length())
    for o0 in range(0, d, columns):
        width = ceil_div(min(columns, d - o0), 4) * 4
        for k0 in range(0, d, DEPTH_STEP):
            terms = ceil_div(min(DEPTH_STEP, d - k0), 4) * 4
            work.add(loops.weights.body, times * WARPS * ceil_div(terms * width, 4 * THREADS))
            work.add(loops.product.body, times * WARPS * (terms // 4))


def predicted(code: Code, side: int, d: int, dtype: str) -> Iterator[tuple[str, Work, int, float]]:
    """Kernel, work, blocks and bytes of each launch over a batch of square maps."""
    module = import_module("lkconv._C_cuda")
    tokens, size = BATCH * side * side, SIZE[dtype]
    plan = module.plan_group_mix("group_mix_aggregate", (BATCH, side, side, d), dtype)["launches"]
    launches = [x for x in plan if x["name"] == "group_mix_aggregate"]
    for kind, (launch, window) in enumerate(zip(launches, WINDOWS, strict=True)):
        local, work = kind == 3, Work()
        images = BATCH if local else 3 * BATCH
        tile = tile_of(launch, images, side, d, window, 2 if local else 1)
        name = f"aggregate<{dtype}, {window}>"
        add_tile(work, loops_of(code[name], window), tile, d, window, launch["blocks"] * (3 if local else 1))
        yield name, work, launch["blocks"], tokens * d * size * (4 if local else 6)
    work, name = Work(), f"normalize<{dtype}>"
    body = max(sass.loops(code[name]), key=lambda x: x.count("STG"))
    work.add(body.body, 3 * tokens * d / 32 / body.count("STG"))
    yield name, work, next(x["blocks"] for x in plan if "normalize" in x["name"]), tokens * d * size * 6


def load_code() -> Code:
    """Machine code of ``aggregate<T, k>`` and ``normalize<T>`` in the built CUDA module."""
    found: Code = {}
    types = {"NS0_6BFloatE": "bfloat16", "f": "float32"}
    pattern = re.compile(r"_ZN6lkconv4cuda\d+(aggregate|normalize)I(NS0_6BFloatE|f)(?:Li(\d))?E")
    with tempfile.TemporaryDirectory() as folder:
        for cubin in sass.extract(Path(import_module("lkconv._C_cuda").__file__), ARCH, Path(folder)):
            if not any(pattern.match(name) for name in sass.register_counts(cubin)):
                continue
            for mangled, instructions in sass.disassemble(cubin).items():
                if match := pattern.match(mangled):
                    kernel, letters, window = match.groups()
                    found[f"{kernel}<{types[letters]}{f', {window}' if window else ''}>"] = instructions
    return found


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"


def table() -> str:
    """Markdown: what the aggregation takes in evaluation, stage by stage, against two floors.

    Instructions and bytes are a token's and channel's of a segment, times are microseconds.
    """
    code = load_code()
    heads = ("stage", "dtype", "instructions", "bytes", "issue", "memory", "at least", "floor", "times floor")
    lines = ["| " + " | ".join((*heads, "eager's traffic")) + " |", "|---" * (len(heads) + 1) + "|"]
    each = [(IMAGE // (4 << i), c) for model in "SB" for i, c in enumerate(CONFIGS[model].channels)]
    for side, channels in dict.fromkeys(each):
        d = channels // 5
        for dtype in SIZE:
            found = list(predicted(code, side, d, dtype))
            seconds = [machine.pipe_seconds(work, blocks, moved) for _, work, blocks, moved in found]
            elements = BATCH * side * side * d
            floor = 28 * elements * SIZE[dtype] / machine.MEMORY
            total = sum(max(s.values()) for s in seconds)
            numbers = [
                32 * sum(work.instructions for _, work, _, _ in found) / elements,
                sum(moved for *_, moved in found) / elements,
                *(1e6 * sum(s[unit] for s in seconds) for unit in ("issue", "memory")),
                1e6 * total, 1e6 * floor, total / floor, EAGER_TRAFFIC * 1e6 * floor,
            ]  # fmt: skip
            cells = [f"{side}x{side}, C={channels}", dtype, *map(_number, numbers)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
