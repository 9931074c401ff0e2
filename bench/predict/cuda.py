"""How often each loop of the CUDA convolution kernels runs for a layer.

The arithmetic is that of ``csrc/cuda``: tiles come from the planner, and what it does not tell is derived as
the kernels derive it. Where the planner counts multiply-adds itself, the two counts must agree
(`matrix_products`, and a test).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from .machine import Work
from .sass import (
    Instruction,
    Loop,
    enclosing,
    exclusive,
    find,
    loops,
    products,
    without_blocks,
)

SIZE = {"float32": 4, "tf32": 4, "bfloat16": 2}
STRIP = 8  # outputs, or taps, of a thread of the direct kernels
MMA_ROWS, MMA_COLS = 16, 8
REDUCE_THREADS = 256
Code = dict[str, tuple[Instruction, ...]]


@dataclass(frozen=True)
class Geometry:
    """A convolution as a kernel sees it; backward_input is one with other padding."""

    batch: int
    channels: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)

    @property
    def out(self) -> tuple[int, int]:
        sizes = zip(
            (self.height, self.width), self.kernel, self.stride, self.padding, self.dilation, strict=True
        )
        h, w = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
        return h, w

    def transposed(self) -> Geometry:
        """backward_input's: the flipped kernel over grad_output. Stride 1 only; others run in phases."""
        if self.stride != (1, 1):
            raise ValueError("backward_input with a stride runs in phases, which are not predicted")
        padding = tuple(
            d * (k - 1) - p for k, p, d in zip(self.kernel, self.padding, self.dilation, strict=True)
        )
        return Geometry(self.batch, self.channels, *self.out, self.kernel, (1, 1), padding, self.dilation)

    def elements(self) -> tuple[int, int, int]:
        """Of the input, the output and the weight."""
        planes = self.batch * self.channels
        return (
            planes * self.height * self.width,
            planes * math.prod(self.out),
            self.channels * math.prod(self.kernel),
        )

    def inside_taps(self) -> int:
        """Multiply-adds of one plane that meet a pixel of the image."""
        axes = zip(
            (self.height, self.width),
            self.out,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            strict=True,
        )
        return math.prod(
            sum(0 <= y * s - p + u * d < n for y in range(o) for u in range(k)) for n, o, k, s, p, d in axes
        )


@dataclass(frozen=True)
class Launch:
    kernel: str  # as _C_cuda.kernels() names it
    blocks: int
    threads: int
    shared: int
    work: Work
    memory_bytes: float


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def spans(size: int, tile: int) -> list[tuple[int, int]]:
    """(start, length) of an axis cut into tiles."""
    return [(start, min(tile, size - start)) for start in range(0, size, tile)]


def lanes_of(columns: int) -> int:
    """Threads that share a row: a power of two, at most a warp."""
    return min(32, 1 << max(columns - 1, 0).bit_length())


def kernel_rows(g: Geometry, y_low: int, y_high: int) -> int:
    """Kernel rows that reach the image from output rows [y_low, y_high)."""
    s, p, d = g.stride[0], g.padding[0], g.dilation[0]
    top, bottom = (y_high - 1) * s - p, y_low * s - p
    first = 0 if top >= 0 else ceil_div(-top, d)
    last = 0 if g.height - 1 - bottom < 0 else min(g.kernel[0], (g.height - 1 - bottom) // d + 1)
    return max(0, last - first)


def window_rows(g: Geometry, y0: int, rows: int, u_low: int, u_high: int) -> int:
    """Image rows under output rows [y0, y0 + rows) and kernel rows [u_low, u_high]."""
    first = y0 * g.stride[0] - g.padding[0] + u_low * g.dilation[0]
    last = (y0 + rows - 1) * g.stride[0] - g.padding[0] + u_high * g.dilation[0]
    return max(0, min(g.height - 1, last) - max(0, first) + 1)


def window_columns(g: Geometry, x0: int, cols: int) -> tuple[int, int]:
    """First and last image column under output columns [x0, x0 + cols), the first a multiple of 16."""
    left = max(0, x0 - g.padding[1]) // MMA_ROWS * MMA_ROWS
    extent = (g.kernel[1] - 1) * g.dilation[1]
    return left, min(g.width - 1, x0 - g.padding[1] + cols - 1 + extent)


def vector_bytes(width: int, dtype: str, packed: bool = False) -> int:
    """Bytes of one copy: the largest power of two that divides a row, at most 16; packed rows are aligned."""
    row = 16 if packed else width * SIZE[dtype] | 16
    return row & -row


def iterations(items: int, threads: int) -> int:
    """Executions, counted by warps, of a loop over items that all threads of a block share."""
    return ceil_div(items, threads) * (threads // 32)


# ---- which loop is which ----


def staging(found: list[Loop]) -> list[Loop]:
    """Loops that bring a tile's rows into shared memory, in order of address: the most deeply nested ones,
    because the other kind, by channels, needs one loop less."""
    some = [x for x in found if x.innermost and x.count("LDG") >= 4 and x.count("STS")]
    deepest = find(some, "loads and shared stores", lambda x: True, lambda x: x.depth).depth
    return [x for x in some if x.depth == deepest]


def copies(found: list[Loop], width: int) -> Loop:
    """The copies to shared memory, ``width`` bytes each, inside the loop over tiles."""

    def is_copy(x: Loop) -> bool:
        if width == 2:
            return x.count("LDG") > 0 and x.count("STS") > 0
        return any(i.name == "LDGSTS" and i.bytes_per_lane == width for i in x.body)

    return find(
        [x for x in found if x.innermost],
        f"copies of {width} bytes",
        is_copy,
        lambda x: (x.depth, len(x.body)),
    )


def copies_in_body(loop: Loop) -> int:
    return loop.count("LDGSTS") or loop.count("LDG")


def band(found: list[Loop]) -> Loop:
    """The Toeplitz forward kernel's construction of the band: the last of its prologue's loads."""
    tiles = enclosing(found, products(found))
    start = find(
        found,
        "tiles",
        lambda x: x.depth == 1 and tiles is not None and x.start <= tiles.start <= x.end,
        len_of,
    )
    before = [x for x in found if x.end < start.start]
    asynchronous = max((x.start for x in before if x.count("LDGSTS")), default=0)
    return find(
        before,
        "band elements",
        lambda x: x.start > asynchronous and x.count("LDG") > 0,
        lambda x: x.count("LDG"),
    )


def len_of(x: Loop) -> int:
    return len(x.body)


# ---- the kernels ----


def row_overhead(found: list[Loop], inner: Loop) -> list[Instruction]:
    """What a row of the direct kernels costs beside its products: code of the loop around them."""
    around = enclosing(found, inner)
    code = exclusive(around, found) if around else ()
    return [i for i in code if i.name not in ("FFMA", "LDS")]


def by_rows(plan: dict) -> None:
    """Tiles of channels_last tensors are 16 channels deep, and staged by a loop that is not counted here."""
    if plan.get("channels_last"):
        raise ValueError("direct kernels over channels_last tensors are not predicted")


def direct_forward(code: Code, g: Geometry, dtype: str, plan: dict) -> Launch:
    by_rows(plan)
    name = {-1: "strided", 0: "any"}.get(plan["kernel"][0], plan["kernel"][0])
    kernel = f"direct_forward<{'float32' if dtype == 'tf32' else dtype}, {name}>"
    found = loops(code[kernel])
    channels, _, tile_h, tile_w = plan["tile"]
    threads, warps, strips = plan["threads"], plan["threads"] // 32, ceil_div(tile_w, STRIP)
    work, hot, rows_loop = Work(), products(found), staging(found)[0]
    weights = find(
        found,
        "weights",
        lambda x: x.innermost and x.count("LDG") > 0 and x.end < hot.start,
        lambda x: -x.start,
    )
    store = find(found, "stores", lambda x: x.innermost and x.count("STG") > 0, lambda x: x.depth)
    store_line = enclosing(found, store)
    planes = g.batch * ceil_div(g.channels, channels)
    for y0, rows in spans(g.out[0], tile_h):
        staged = window_rows(g, y0, rows, 0, g.kernel[0] - 1) * channels
        run = warp_rows(g, y0, rows, strips, tile_h, channels, warps)
        for _, cols in spans(g.out[1], tile_w):
            window = (cols - 1) * g.stride[1] + (g.kernel[1] - 1) * g.dilation[1] + 1
            full = (tile_w - 1) * g.stride[1] + (g.kernel[1] - 1) * g.dilation[1] + 1
            lanes = lanes_of(full)
            passes = ceil_div(window, lanes) * ceil_div(staged, threads // lanes * 4)
            work.add(rows_loop.body, planes * warps * passes * 4 / rows_loop.count("LDG"))
            taps = channels * g.kernel[0] * ceil_div(g.kernel[1], 4) * 4
            work.add(weights.body, planes * iterations(taps, threads) / weights.count("LDG"))
            work.add(hot.body, planes * run * g.kernel[1] * STRIP * 32 / hot.macs)
            if plan["kernel"][0] <= 0:
                work.add(row_overhead(found, hot), planes * run)
            lines = planes * warps * ceil_div(channels * rows, threads // lanes_of(tile_w))
            each = ceil_div(cols, lanes_of(tile_w))
            if store_line:
                work.add(exclusive(store_line, found), lines)
            work.add(store.body, lines * (each // store.count("STG")))
    return Launch(kernel, plan["blocks"], threads, plan["shared_bytes"], work, tensor_bytes(g, dtype))


def warp_rows(g: Geometry, y0: int, rows: int, strips: int, tile_h: int, channels: int, warps: int) -> int:
    """Kernel rows run by all warps of a block: a warp runs as many as its longest thread."""
    total = 0
    for warp in range(warps):
        own = range(warp * 32, min(warp * 32 + 32, strips * tile_h * channels))
        ys = {y for t in own if (y := t // strips % tile_h) < rows}
        total += max((kernel_rows(g, y0 + y, y0 + y + 1) for y in ys), default=0)
    return total


def direct_weight(code: Code, g: Geometry, dtype: str, plan: dict) -> Launch:
    by_rows(plan)
    unit = bool(plan["kernel"][0])
    kernel = f"direct_weight<{'float32' if dtype == 'tf32' else dtype}, {'unit' if unit else 'strided'}>"
    found = loops(code[kernel])
    channels, images, tile_h, tile_w = plan["tile"]
    threads, warps = plan["threads"], plan["threads"] // 32
    groups = ceil_div(g.kernel[1], STRIP)
    owned = channels * g.kernel[0] * groups
    workers = min(max(REDUCE_THREADS // owned, 1), images * tile_h)
    if ceil_div(owned * workers, 32) * 32 != threads:
        raise ValueError(
            f"{kernel}: {threads} threads do not own {owned} groups of taps; adapt bench/predict"
        )
    hot, (input_loop, grad_loop) = products(found), staging(found)
    work, owners = Work(), ceil_div(g.channels, channels)
    for _, n in spans(g.batch, images):
        for y0, rows in spans(g.out[0], tile_h):
            for _, cols in spans(g.out[1], tile_w):
                lines = channels * n * window_rows(g, y0, rows, 0, g.kernel[0] - 1)
                window = (cols - 1) * g.stride[1] + (groups * STRIP - 1) * g.dilation[1] + 1
                for loop, count, width, lanes in (
                    (input_loop, lines, window, 32),
                    (grad_loop, channels * n * rows, cols, lanes_of(tile_w)),
                ):
                    passes = ceil_div(width, lanes) * ceil_div(count, threads // lanes * 4)
                    work.add(loop.body, owners * warps * passes * 4 / loop.count("LDG"))
                each = owners * warps * ceil_div(n * rows, workers)
                work.add(hot.body, each * cols * STRIP * 32 / hot.macs)
                work.add(row_overhead(found, hot), each)
    partial = plan["workspace_slots"] * g.elements()[2] * 4
    return Launch(kernel, plan["blocks"], threads, plan["shared_bytes"], work, map_bytes(g, dtype) + partial)


@dataclass(frozen=True)
class Columns:
    k_tiles: int  # staged
    steps: int  # of them on the band of some n tile
    band: int  # pairs of k tile and n tile on the band


def columns(g: Geometry, x0: int, n_tiles: int, depth: int) -> Columns:
    cols = min(n_tiles * MMA_COLS, g.out[1] - x0)
    left, right = window_columns(g, x0, cols)
    extent, corner = (g.kernel[1] - 1) * g.dilation[1], left - x0 + g.padding[1]
    k_tiles = max(0, ceil_div(right - left + 1, depth))
    on_band = []
    for i in range(k_tiles):
        q = [corner + i * depth - j * MMA_COLS for j in range(n_tiles)]
        on_band.append(sum(c + depth - 1 >= 0 and c - (MMA_COLS - 1) <= extent for c in q))
    return Columns(k_tiles, sum(n > 0 for n in on_band), sum(on_band))


def forward_row_steps(g: Geometry, y0: int, rows: int, images: int, m_tiles: int, image_major: bool) -> int:
    """Kernel rows run by all warps of a block over one tile."""
    tiles = ceil_div(images * rows, MMA_ROWS)
    each = ceil_div(tiles, min(8, ceil_div(tiles, m_tiles)))
    steps = 0
    for first in range(0, tiles, each):
        last, low, high = min(tiles, first + each), 0, rows
        if image_major:
            low, high = first * MMA_ROWS // images, min(rows, ceil_div(last * MMA_ROWS, images))
        elif images == 1:
            low, high = first * MMA_ROWS, min(rows, last * MMA_ROWS)
        steps += kernel_rows(g, y0 + low, y0 + high)
    return steps


def toeplitz_forward(code: Code, g: Geometry, dtype: str, plan: dict) -> Launch:
    m_tiles, n_tiles = plan["kernel"]
    kernel = f"toeplitz_forward<{dtype}, {m_tiles}x{n_tiles}>"
    found, depth = loops(code[kernel]), 8 if dtype == "tf32" else 16
    _, images, tile_h, tile_w = plan["tile"]
    threads, warps, vector = (
        plan["threads"],
        plan["threads"] // 32,
        vector_bytes(g.width, dtype, plan["packs"] > 0),
    )
    hot, copy, work = products(found), copies(found, vector), Work()
    around = [x for x in found if x.depth == 1 and x.start <= hot.start <= x.end]
    tile_code = once_a_tile(found, around[0], wide=g.out[1] % 2 == 0)
    repeats = ceil_div(g.batch, images) * g.channels
    issued = total = 0.0
    for x0, _ in spans(g.out[1], tile_w):
        c = columns(g, x0, n_tiles, depth)
        for y0, rows in spans(g.out[0], tile_h):
            steps = forward_row_steps(g, y0, rows, images, m_tiles, plan["image_major"])
            issued += steps * c.steps * m_tiles * n_tiles
            total += steps * c.band * m_tiles
            staged = images * window_rows(g, y0, rows, 0, g.kernel[0] - 1) * c.k_tiles * depth
            vectors = staged * SIZE[dtype] // vector
            work.add(copy.body, repeats * iterations(vectors, threads) / copies_in_body(copy))
            if dtype == "tf32":
                add_rounding(work, found, repeats * iterations(vectors, threads), vector)
            work.add(tile_code, repeats * warps)
    work.add(hot.body, repeats * issued / hot.count("HMMA"), total / issued)
    pitch = ceil_div((g.kernel[1] - 1) * g.dilation[1] + 50, 8) * 8
    elements = g.kernel[0] * pitch * (1 if dtype == "tf32" else 2)
    built = band(found)
    work.add(built.body, plan["blocks"] * iterations(elements, threads) / built.count("LDG"))
    return Launch(kernel, plan["blocks"], threads, plan["shared_bytes"], work, tensor_bytes(g, dtype))


def once_a_tile(found: list[Loop], tiles: Loop, wide: bool) -> list[Instruction]:
    """Straight-line code of the loop over tiles: indices and stores, of the two widths the one taken."""

    def other_width(i: Instruction) -> bool:
        return i.name == "STG" and ((i.bytes_per_lane > 4 or ".U16" not in i.opcode) != wide)

    float_code = any(i.name == "STG" and ".64" in i.opcode for i in tiles.body)
    if float_code:
        return without_blocks(
            exclusive(tiles, found), lambda i: i.name == "STG" and (i.bytes_per_lane == 8) != wide
        )
    return without_blocks(exclusive(tiles, found), other_width)


def add_rounding(work: Work, found: list[Loop], vectors: float, vector: int) -> None:
    """tf32 only: each thread rounds what it copied, in loops over the elements of a vector."""

    def rounds(x: Loop) -> bool:
        return x.innermost and x.count("FSETP") > 0 and x.count("STS") > 0 and not x.count("LDG")

    inner = find(found, "rounding to tf32", rounds, lambda x: -x.count("STS"))
    outer = enclosing(found, inner)
    if outer is not None:
        work.add([i for i in exclusive(outer, found) if i.name not in ("LDS", "STS", "FSETP")], vectors)
    work.add(inner.body, vectors * (vector // 4) / inner.count("STS"))


def toeplitz_weight(code: Code, g: Geometry, dtype: str, plan: dict) -> Launch:
    diagonals = plan["kernel"][0]
    kernel = f"toeplitz_weight<{dtype}, {diagonals}>"
    found, depth = loops(code[kernel]), 8 if dtype == "tf32" else 16
    _, images, tile_h, tile_w = plan["tile"]
    threads, warps, vector = (
        plan["threads"],
        plan["threads"] // 32,
        vector_bytes(g.width, dtype, plan["packs"] > 0),
    )
    own = owned_rows(g, plan)
    hot, copy, work = products(found), copies(found, vector), Work()
    table = find(
        found,
        "the depth's rows",
        lambda x: x.innermost and x.depth == 2 and not x.count("LDG", "LDS", "LDGSTS"),
        len_of,
    )
    chunks = own.row_chunks * own.diagonal_chunks * g.channels
    issued = total = 0.0
    for _, n in spans(g.batch, images):
        for y0, rows in spans(g.out[0], tile_h):
            depths = ceil_div(ceil_div(n * rows, depth), own.workers)
            rows_in = window_rows(g, y0, rows, 0, min(own.row_groups * own.rows_each, g.kernel[0]) - 1)
            for x0, cols in spans(g.out[1], tile_w):
                m_tiles, steps, on_band = weight_columns(
                    g, x0, cols, own.first_diagonal, diagonals, own.diagonal_chunks
                )
                issued += g.channels * own.row_chunks * warps * depths * steps * diagonals * own.rows_each
                total += g.channels * own.row_chunks * warps * depths * on_band * own.rows_each
                elements = n * rows_in * m_tiles * MMA_ROWS + n * rows * ceil_div(cols, MMA_COLS) * MMA_COLS
                times = chunks * iterations(elements * SIZE[dtype] // vector, threads)
                work.add(copy.body, times / copies_in_body(copy))
                if dtype == "tf32":
                    add_rounding(work, found, times, vector)
                work.add(table.body, chunks * iterations(ceil_div(n * rows, MMA_ROWS) * MMA_ROWS, threads))
    work.add(hot.body, issued / hot.count("HMMA"), total / issued)
    partial = plan["workspace_slots"] * g.elements()[2] * 4
    return Launch(kernel, plan["blocks"], threads, plan["shared_bytes"], work, map_bytes(g, dtype) + partial)


@dataclass(frozen=True)
class OwnedRows:
    rows_each: int
    row_groups: int
    row_chunks: int
    workers: int
    first_diagonal: int
    diagonal_chunks: int


def owned_rows(g: Geometry, plan: dict) -> OwnedRows:
    """How the Toeplitz weight kernel shares out kernel rows and diagonals among warps and blocks."""
    diagonals, pad, extent = plan["kernel"][0], g.padding[1], (g.kernel[1] - 1) * g.dilation[1]
    rows_each = 4 if diagonals == 4 else 2
    groups = ceil_div(g.kernel[0], rows_each)
    row_groups = ceil_div(groups, ceil_div(groups, 16))
    workers = max(1, 8 // row_groups)
    if row_groups * workers * 32 != plan["threads"]:
        raise ValueError(
            f"toeplitz_weight: {plan['threads']} threads do not hold {row_groups} x {workers} warps"
        )
    first = -((pad + MMA_ROWS - 1) // MMA_COLS)
    count = (extent - pad + MMA_COLS - 1) // MMA_COLS - first + 1
    return OwnedRows(
        rows_each, row_groups, ceil_div(groups, row_groups), workers, first, ceil_div(count, diagonals)
    )


def weight_columns(
    g: Geometry, x0: int, cols: int, first: int, diagonals: int, chunks: int
) -> tuple[int, int, int]:
    """m tiles, steps of the loop over them that meet the band, and pairs of m tile and n tile on it."""
    left, right = window_columns(g, x0, cols)
    n_tiles, m_tiles = ceil_div(cols, MMA_COLS), max(0, ceil_div(right - left + 1, MMA_ROWS))
    steps = on_band = 0
    for chunk in range(chunks):
        for i in range(m_tiles):
            j0 = (left - x0) // MMA_COLS + 2 * i - first - chunk * diagonals
            met = min(diagonals - 1, j0) - max(0, j0 - n_tiles + 1) + 1
            steps += met > 0
            on_band += max(0, met)
    return m_tiles, steps, on_band


def reduce_splits(code: Code, g: Geometry, dtype: str, slots: int) -> Launch:
    kernel = f"reduce_splits<{'float32' if dtype == 'tf32' else dtype}>"
    found, count, work = loops(code[kernel]), g.elements()[2], Work()
    unrolled = find(found, "partial sums", lambda x: x.count("LDG") > 0, lambda x: x.count("LDG"))
    work.add(unrolled.body, ceil_div(count, 32) * slots / unrolled.count("LDG"))
    bytes_moved = count * (4 * slots + SIZE[dtype])
    return Launch(kernel, ceil_div(count, REDUCE_THREADS), REDUCE_THREADS, 0, work, bytes_moved)


def pack(code: Code, elements: int, dtype: str) -> Launch:
    """Copies a channels_last tensor to planes, or back: 32 x 32 elements a block of 256 threads."""
    kernel = f"pack<{8 * SIZE[dtype]}>"
    found, work, size = loops(code[kernel]), Work(), SIZE[dtype]
    for name in ("LDG", "STG"):
        other = "STG" if name == "LDG" else "LDG"
        one_way = find(
            found,
            f"{name} alone",
            lambda x, n=name, o=other: x.innermost and x.count(n) > 0 and not x.count(o),
            len_of,
        )
        work.add(one_way.body, elements / 32 / one_way.count(name))
    return Launch(kernel, ceil_div(elements, 1024), 256, 32 * 33 * size, work, 2 * elements * size)


def map_bytes(g: Geometry, dtype: str) -> int:
    x, y, _ = g.elements()
    return (x + y) * SIZE[dtype]


def tensor_bytes(g: Geometry, dtype: str) -> int:
    return map_bytes(g, dtype) + g.elements()[2] * SIZE[dtype]


def launches(code: Code, g: Geometry, pass_name: str, dtype: str, plan: dict) -> list[Launch]:
    """What one call runs, in order. ``plan`` is the planner's first candidate for it.

    Raises ``ValueError`` for direct kernels over channels_last tensors, which stage by channels.
    """
    weight = pass_name == "backward_weight"
    seen = g.transposed() if pass_name == "backward_input" else g
    kernels: dict[str, Callable[..., Launch]] = {
        "direct": direct_weight if weight else direct_forward,
        "toeplitz": toeplitz_weight if weight else toeplitz_forward,
    }
    found = []
    if plan["packs"]:
        x, y, _ = seen.elements()
        found = [pack(code, x, dtype), pack(code, y, dtype)]
    found.append(kernels[plan["algorithm"]](code, seen, dtype, plan))
    if weight:
        found.append(reduce_splits(code, g, dtype, plan["workspace_slots"]))
    return found


@dataclass(frozen=True)
class Moves:
    """Instructions that a kernel spends outside its products; None where it has no such code."""

    staged: float | None = None  # an element of the window, direct kernels
    copied: tuple[float, ...] = ()  # a copy of 16, 8 and 4 bytes, and of one element, Toeplitz kernels
    band: float | None = None  # an element of the band
    row: int | None = None  # a kernel row of the direct kernels, beside its products
    tile: int | None = None  # a tile, once a warp: indices and stores, of an even width


def moves(code: Code, kernel: str) -> Moves:
    """The costs of a kernel's loops beside the one that multiplies."""
    found = loops(code[kernel])
    hot = products(found)
    if kernel.startswith("direct_"):
        loop = staging(found)[0]
        fixed = re.search(r", [357]>", kernel)
        return Moves(len(loop.body) / loop.count("LDG"), row=None if fixed else len(row_overhead(found, hot)))
    widths = (16, 8, 4) if "tf32" in kernel else (16, 8, 4, 2)
    copied = tuple(len(x.body) / copies_in_body(x) for x in (copies(found, width) for width in widths))
    if kernel.startswith("toeplitz_weight"):
        return Moves(copied=copied)
    built = band(found)
    tiles = next(x for x in found if x.depth == 1 and x.start <= hot.start <= x.end)
    return Moves(
        copied=copied,
        band=len(built.body) / built.count("LDG"),
        tile=len(once_a_tile(found, tiles, wide=True)),
    )


def matrix_products(g: Geometry, pass_name: str, dtype: str, plan: dict) -> int:
    """mma instructions of a Toeplitz plan, counted as the kernels run them; the planner counts the same."""
    depth = 8 if dtype == "tf32" else 16
    _, images, tile_h, tile_w = plan["tile"]
    if pass_name == "backward_weight":
        own = owned_rows(g, plan)
        band_tiles = sum(
            weight_columns(g, x0, cols, own.first_diagonal, plan["kernel"][0], own.diagonal_chunks)[2]
            for x0, cols in spans(g.out[1], tile_w)
        )
        tiles = ceil_div(g.batch, images) * ceil_div(g.out[0], tile_h)
        groups = ceil_div(g.kernel[0], own.rows_each)
        return band_tiles * ceil_div(images * tile_h, depth) * tiles * g.channels * groups * own.rows_each
    seen = g.transposed() if pass_name == "backward_input" else g
    m_tiles, n_tiles = plan["kernel"]
    band_tiles = sum(columns(seen, x0, n_tiles, depth).band for x0, _ in spans(seen.out[1], tile_w))
    steps = sum(
        forward_row_steps(seen, y0, rows, images, m_tiles, plan["image_major"])
        for y0, rows in spans(seen.out[0], tile_h)
    )
    return band_tiles * steps * m_tiles * ceil_div(g.batch, images) * g.channels
