"""What the CUDA convolution kernels execute for a layer: the work of every launch of a call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from .geometry import (
    DEPTH,
    FIXED_ROWS,
    MMA_COLS,
    MMA_ROWS,
    SIZE,
    STRIP,
    Geometry,
    Walk,
    ceil_div,
    column_walk,
    columns,
    forward_row_steps,
    iterations,
    lanes_of,
    outside_rows,
    owned_rows,
    spans,
    vector_bytes,
    warp_rows,
    weight_columns,
    window_rows,
)
from .kernel_loops import (
    Code,
    Widths,
    band,
    children,
    copies,
    copies_in_body,
    is_copy,
    len_of,
    narrow_row,
    once,
    prologue,
    row_overhead,
    step_overhead,
    tile_code,
    tile_levels,
    tile_loop,
    unwanted,
)
from .machine import SECTOR, Work
from .sass import DIRECT_NAMES, Loop, enclosed, enclosing, exclusive, find, longest_path, loops, products

REDUCE_THREADS = 256
TAPS_AT_ONCE = 4  # of a kernel row, in the direct kernels of any width


@dataclass(frozen=True)
class Launch:
    kernel: str  # as _C_cuda.kernels() names it
    blocks: int
    threads: int
    shared: int
    work: Work
    memory_bytes: float


def refuse_channels_last(plan: dict) -> None:
    """Tiles of channels_last tensors are 16 channels deep, and staged by a loop that is not counted here."""
    if plan.get("channels_last"):
        raise ValueError("direct kernels over channels_last tensors are not predicted")


def add_window(work: Work, code: Code, kernel: str, width: int, nth: int, walk: Walk, times: float) -> None:
    """The code around the copies of one window, and the copies: `nth` of those in the loop over tiles."""
    found = loops(code[kernel])
    copy = copies(found, width)[nth]
    outer = enclosing(found, copy)
    columns = outer and enclosing(found, outer)
    if outer is None or columns is None:
        raise LookupError(f"{kernel}: copies without the loops around them; adapt bench/predict")
    work.add(exclusive(columns, found), times * walk.warps)
    work.add(exclusive(outer, found), times * walk.warps * walk.outer)
    passes = ceil_div(walk.inner, copies_in_body(copy))
    work.add(copy.body, times * walk.warps * walk.outer * passes)


def add_sides(work: Work, found: list[Loop], nth: int, warps: int, times: float) -> None:
    """The columns outside the image: a thread zeroes those of a row, here of one."""
    sides = [
        x for x in found if x.count("STS") == len(children(x, found)) > 1 and not x.count("LDG", "LDGSTS")
    ]
    if nth < len(sides):
        work.add(sides[nth].body, times * warps)


def store_bytes(g: Geometry, tile_w: int, dtype: str) -> int:
    """Of a direct kernel's store from registers; 0 where it would be narrower than 8 bytes."""
    if g.apart > 1:
        return 0
    width = g.out[1]
    found = vector_bytes(width if tile_w >= width else math.gcd(width, tile_w), dtype)
    return found if found >= 8 else 0


def direct_forward(code: Code, g: Geometry, dtype: str, plan: dict) -> Launch:
    refuse_channels_last(plan)
    width = plan["kernel"][0]
    name, fixed = DIRECT_NAMES.get(width, width), width not in (-1, 0)
    kernel = f"direct_forward<{'float32' if dtype == 'tf32' else dtype}, {name}>"
    found = loops(code[kernel])
    channels, _, tile_h, tile_w = plan["tile"]
    threads, warps, strips = plan["threads"], plan["threads"] // 32, ceil_div(tile_w, STRIP)
    rows_each = FIXED_ROWS if fixed else 1
    row_groups = ceil_div(tile_h, rows_each)
    widths = Widths(vector_bytes(g.width, dtype), 0 if width == -1 else store_bytes(g, tile_w, dtype))
    work = Work()
    work.add(prologue(code[kernel], found, widths), plan["blocks"] * warps)
    weights = find(
        found,
        "weights",
        lambda x: x.innermost and x.count("LDG") > 0 and x.count("LDG") == x.count("STS") and not is_copy(x),
        lambda x: -x.count("LDG"),
    )
    taps = channels * g.kernel[0] * ceil_div(g.kernel[1], 4) * 4
    work.add(weights.body, plan["blocks"] * iterations(taps, threads) / weights.count("LDG"))
    planes = g.batch * ceil_div(g.channels, channels)
    around = tile_levels(found)  # the loops over images, and chunks of taps
    for y0, rows in spans(g.out[0], tile_h):
        in_rows, most = (
            window_rows(g, y0, rows, 0, g.kernel[0] - 1),
            min(g.height, (tile_h - 1) * g.stride[0] + (g.kernel[0] - 1) * g.dilation[0] + 1),
        )
        for x0, cols in spans(g.out[1], tile_w):
            work.add(tile_code(found, widths), planes * warps)
            window = min(g.width, (strips * STRIP - 1) * g.stride[1] + (g.kernel[1] - 1) * g.dilation[1] + 8)
            lanes = min(ceil_div(window * SIZE[dtype], widths.copy), threads)
            walk = column_walk(channels, in_rows, most, lanes, threads, gapless=in_rows == g.height)
            add_window(work, code, kernel, widths.copy, 0, walk, planes)
            if touches_sides(g, x0, cols):
                add_sides(work, found, 0, ceil_div(channels * most, 32), planes)
            if fixed:
                strip_warps = ceil_div(channels * row_groups * ceil_div(cols, STRIP), 32)
                add_fixed_strips(work, found, g, widths, planes * strip_warps)
            else:
                run = warp_rows(g, y0, rows, strips, tile_h, channels, warps)
                add_rows(work, found, g, name, planes * run)
            if widths.store == 0:
                store = find(
                    found,
                    "stores",
                    lambda x: x.depth > 1 and x.innermost and x.count("STG") > 0 and x.count("LDS") > 0,
                    lambda x: x.depth,
                )
                lines = planes * warps * ceil_div(channels * rows, threads // lanes_of(tile_w))
                line = enclosing(found, store)
                if line and line is not around[0] and line.depth > around[-1].depth:
                    work.add(exclusive(line, found), lines)
                work.add(store.body, lines * ceil_div(cols, lanes_of(tile_w)) / store.count("STG"))
    return Launch(kernel, plan["blocks"], threads, plan["shared_bytes"], work, tensor_bytes(g, dtype))


def add_rows(work: Work, found: list[Loop], g: Geometry, name: str, times: float) -> None:
    """Kernel rows of the kernels of any width."""
    hot = products(found)
    if name == "any" and g.kernel[1] < TAPS_AT_ONCE:
        work.add(narrow_row(found, hot, g.kernel[1] * STRIP), times)
        return
    work.add(hot.body, times * g.kernel[1] * STRIP * 32 / hot.macs)
    work.add(row_overhead(found, hot), times)


def add_fixed_strips(work: Work, found: list[Loop], g: Geometry, widths: Widths, times: float) -> None:
    """Strips of the kernels of fixed width: unrolled where the kernel is a square below 7, else in turns of
    three rows of inputs. Rows outside the image are counted too."""
    hot = products(found)  # the turns of three rows; a stride of 2 has none
    if g.stride != (1, 1):
        work.add(longest_path(hot.body, [], unwanted(found, widths)), times)
        return
    strip = enclosing(found, hot)
    if strip is None:
        raise LookupError("no loop over strips; the kernel changed: adapt bench/predict")
    straight = sum(i.macs for i in exclusive(strip, found)) > 0 and g.kernel[0] == g.kernel[1]
    if straight:
        path = longest_path(
            strip.body, [], lambda i: hot.start <= i.address <= hot.end or unwanted(found, widths)(i)
        )
        work.add(path, times)
        return
    path = once(strip, found, widths)
    work.add([i for i in path if not i.macs], times)
    turns = ceil_div(g.kernel[0] + FIXED_ROWS - 1, FIXED_ROWS)
    share = g.kernel[0] / (FIXED_ROWS * turns)  # of the products in the turns, those that exist
    work.add(hot.body, times * turns * share)
    work.add([i for i in hot.body if not i.macs], times * turns * (1 - share))


def touches_sides(g: Geometry, x0: int, cols: int) -> bool:
    first = x0 * g.stride[1] - g.padding[1]
    return first < 0 or first + (cols - 1) * g.stride[1] + (g.kernel[1] - 1) * g.dilation[1] >= g.width


def direct_weight(code: Code, g: Geometry, dtype: str, plan: dict) -> Launch:
    refuse_channels_last(plan)
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
    hot, owners = products(found), ceil_div(g.channels, channels)
    grad_width = g.out[1] if tile_w >= g.out[1] else math.gcd(g.out[1], tile_w)
    vectors = (vector_bytes(g.width, dtype), vector_bytes(grad_width, dtype))
    widths = Widths(vectors[0])  # the code around either width's copies is the same
    work, each_tile = Work(), once(tile_loop(found), found, widths)
    work.add(prologue(code[kernel], found, widths), plan["blocks"] * warps)
    most = min(g.height, (tile_h - 1) * g.stride[0] + (g.kernel[0] - 1) * g.dilation[0] + 1)
    for _, n in spans(g.batch, images):
        for y0, rows in spans(g.out[0], tile_h):
            for x0, cols in spans(g.out[1], tile_w):
                work.add(each_tile, owners * warps)
                window = min(g.width, (tile_w - 1) * g.stride[1] + (groups * STRIP - 1) * g.dilation[1] + 8)
                in_rows = window_rows(g, y0, rows, 0, g.kernel[0] - 1)
                for nth, (size, tall, high, wide) in enumerate(
                    ((vectors[0], in_rows, most, window), (vectors[1], rows, tile_h, tile_w))
                ):
                    lanes = min(ceil_div(wide * SIZE[dtype], size), threads)
                    walk = column_walk(n, tall, high, lanes, threads, gapless=n == 1)
                    add_window(work, code, kernel, size, nth, walk, owners)
                if touches_sides(g, x0, cols):
                    add_sides(work, found, 0, ceil_div(n * most, 32), owners)
                each = owners * warps * ceil_div(n * rows, workers)
                work.add(hot.body, each * cols * STRIP * 32 / hot.macs)
                work.add(row_overhead(found, hot), each)
    partial = plan["workspace_slots"] * g.elements()[2] * 4
    return Launch(kernel, plan["blocks"], threads, plan["shared_bytes"], work, map_bytes(g, dtype) + partial)


def toeplitz_forward(code: Code, g: Geometry, dtype: str, plan: dict) -> Launch:
    m_tiles, n_tiles = plan["kernel"]
    kernel = f"toeplitz_forward<{dtype}, {m_tiles}x{n_tiles}>"
    found, depth = loops(code[kernel]), DEPTH[dtype]
    _, images, tile_h, tile_w = plan["tile"]
    threads, warps, vector = (
        plan["threads"],
        plan["threads"] // 32,
        vector_bytes(g.width, dtype, plan["packs"] > 0),
    )
    pairs = (g.out[1] % 2 == 0 and g.apart == 1) or plan["packs"] > 0
    widths = Widths(vector, SIZE[dtype] * (2 if pairs else 1))
    hot, work, each_tile = products(found), Work(), tile_code(found, widths)
    repeats = ceil_div(g.batch, images) * g.channels
    issued = total = 0.0
    most = min(g.height, (tile_h - 1) * g.stride[0] + (g.kernel[0] - 1) * g.dilation[0] + 1)
    cols = max(16, max(columns(g, x0, n_tiles, depth).k_tiles * depth for x0, _ in spans(g.out[1], tile_w)))
    lanes = min(cols * SIZE[dtype] // vector, threads)
    for x0, _ in spans(g.out[1], tile_w):
        c = columns(g, x0, n_tiles, depth)
        for y0, rows in spans(g.out[0], tile_h):
            steps = forward_row_steps(g, y0, rows, images, m_tiles, plan["image_major"])
            issued += steps * c.steps * m_tiles * n_tiles
            total += steps * c.band * m_tiles
            in_rows = window_rows(g, y0, rows, 0, g.kernel[0] - 1)
            walk = column_walk(images, in_rows, most, lanes, threads, gapless=images == 1)
            add_window(work, code, kernel, vector, 0, walk, repeats)
            if dtype == "tf32":
                add_rounding(work, found, 0, walk, vector, repeats)
            work.add(each_tile, repeats * warps)
            work.add(step_overhead(found, widths), repeats * warps * c.steps)
    zeroed = min(2 * plan["blocks"], repeats * len(spans(g.out[1], tile_w)))
    if tile_h < g.out[0]:  # else both stages once a block
        zeroed = repeats * len(spans(g.out[0], tile_h)) * len(spans(g.out[1], tile_w))
    add_zero_rows(work, found, images * outside_rows(g, plan), cols * SIZE[dtype] // 16, zeroed)
    work.add(hot.body, repeats * issued / hot.count("HMMA"), total / issued)
    work.add(prologue(code[kernel], found, widths), plan["blocks"] * warps)
    pitch = ceil_div((g.kernel[1] - 1) * g.dilation[1] + 50, 8) * 8
    lanes = min(pitch, threads)
    rows = ceil_div(g.kernel[0], threads // lanes) * ceil_div(pitch, lanes)
    built, copies_built = band(found), 1 if dtype == "tf32" else 2
    work.add(built.body, plan["blocks"] * warps * rows * copies_built)
    around: Loop | None = built
    while around := enclosing(found, around):  # a column of taps
        work.add(exclusive(around, found), plan["blocks"] * warps * ceil_div(pitch, lanes) * copies_built)
    return Launch(kernel, plan["blocks"], threads, plan["shared_bytes"], work, tensor_bytes(g, dtype))


def add_zero_rows(work: Work, found: list[Loop], rows: int, vectors: int, times: float) -> None:
    """Rows outside the image: a thread zeroes some of them whole."""
    step = tile_levels(found)[-1]
    row = next(x for x in children(step, found) if x.count("STS") and not x.count("LDG", "LDGSTS"))
    vector = next(x for x in found if x.innermost and enclosed(x, row))
    warps = ceil_div(rows, 32)
    work.add(exclusive(row, found), warps * times)
    work.add(vector.body, warps * times * vectors / vector.count("STS"))


def add_rounding(work: Work, found: list[Loop], nth: int, walk: Walk, vector: int, times: float) -> None:
    """tf32 only: each thread rounds what it copied."""
    inner = [
        x
        for x in found
        if x.innermost and x.count("LDS") == 1 and x.count("STS") == 1 and not x.count("LDG", "LDGSTS")
        and all(i.bytes_per_lane == vector for i in x.body if i.name == "STS")
    ]  # fmt: skip
    if nth >= len(inner):
        raise LookupError("the machine code does not round to tf32 where expected: adapt bench/predict")
    work.add(inner[nth].body, times * walk.warps * walk.outer * walk.inner)
    around: Loop | None = inner[nth]
    while (around := enclosing(found, around)) and around.depth > tile_levels(found)[-1].depth:
        work.add(exclusive(around, found), times * walk.warps * walk.outer)


def toeplitz_weight(code: Code, g: Geometry, dtype: str, plan: dict) -> Launch:
    diagonals = plan["kernel"][0]
    kernel = f"toeplitz_weight<{dtype}, {diagonals}>"
    found, depth = loops(code[kernel]), DEPTH[dtype]
    _, images, tile_h, tile_w = plan["tile"]
    threads, warps = plan["threads"], plan["threads"] // 32
    packed = plan["packs"] > 0
    vectors = (vector_bytes(g.width, dtype, packed), vector_bytes(g.out[1], dtype, packed))
    own, widths = owned_rows(g, plan), Widths(vectors[0])
    hot, work = products(found), Work()
    table = find(
        found,
        "the depth's rows",
        lambda x: x.innermost and x.depth == 2 and x.count("STS") > 0 and not x.count("LDG", "LDS", "LDGSTS"),
        len_of,
    )
    chunks = own.row_chunks * own.diagonal_chunks * g.channels
    each_tile = tile_code(found, widths)
    rows_owned = min(own.row_groups * own.rows_each, g.kernel[0])
    most = min(g.height, (tile_h - 1) * g.stride[0] + (rows_owned - 1) * g.dilation[0] + 1)
    issued = total = 0.0
    for _, n in spans(g.batch, images):
        for y0, rows in spans(g.out[0], tile_h):
            depths = ceil_div(ceil_div(n * rows, depth), own.workers)
            rows_in = window_rows(g, y0, rows, 0, rows_owned - 1)
            for x0, cols in spans(g.out[1], tile_w):
                m_tiles, steps, on_band = weight_columns(
                    g, x0, cols, own.first_diagonal, diagonals, own.diagonal_chunks
                )
                issued += g.channels * own.row_chunks * warps * depths * steps * diagonals * own.rows_each
                total += g.channels * own.row_chunks * warps * depths * on_band * own.rows_each
                work.add(each_tile, chunks * warps)
                work.add(step_overhead(found, widths), g.channels * own.row_chunks * warps * steps)
                for nth, (tall, high, wide) in enumerate(
                    (
                        (rows_in, most, m_tiles * MMA_ROWS),
                        (rows, tile_h, ceil_div(cols, MMA_COLS) * MMA_COLS),
                    )
                ):
                    lanes = min(max(1, wide * SIZE[dtype] // vectors[nth]), threads)
                    walk = column_walk(n, tall, high, lanes, threads, gapless=n == 1)
                    add_window(work, code, kernel, vectors[nth], nth, walk, chunks)
                    if dtype == "tf32":
                        add_rounding(work, found, nth, walk, vectors[nth], chunks)
                work.add(
                    table.body,
                    chunks
                    * iterations(ceil_div(n * rows, MMA_ROWS) * MMA_ROWS, threads)
                    / table.count("STS"),
                )
    work.add(hot.body, issued / hot.count("HMMA"), total / issued)
    work.add(prologue(code[kernel], found, widths), plan["blocks"] * warps)
    partial = plan["workspace_slots"] * g.elements()[2] * 4
    return Launch(kernel, plan["blocks"], threads, plan["shared_bytes"], work, map_bytes(g, dtype) + partial)


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
    work, size = Work(), SIZE[dtype]
    blocks = ceil_div(elements, 1024)
    inner = [x for x in loops(code[kernel]) if x.depth == 1]  # rows ended: rarely
    work.add(longest_path(code[kernel], inner, lambda i: i.name == "CALL"), blocks * 8)
    return Launch(kernel, blocks, 256, 32 * 33 * size, work, 2 * elements * size)


def map_bytes(g: Geometry, dtype: str) -> int:
    x, y, _ = g.elements()
    return (x + y) * SIZE[dtype]


def tensor_bytes(g: Geometry, dtype: str) -> int:
    """Of all tensors, in whole sectors: what lies between outputs that are apart is moved with them."""
    _, y, weights = g.elements()
    between = y * (min(g.apart, SECTOR // SIZE[dtype]) - 1)
    return map_bytes(g, dtype) + (weights + between) * SIZE[dtype]


def launches(code: Code, g: Geometry, pass_name: str, dtype: str, plan: dict) -> list[Launch]:
    """What one call runs, in order. ``plan`` is the planner's first candidate for it.

    Raises ``ValueError`` for direct kernels over channels_last tensors, which stage by channels, and for
    stride phases that no tap reaches.
    """
    seen = g.phases() if pass_name == "backward_input" else [g]
    found = []
    for problem, chosen in zip(seen, plan["problems"], strict=True):
        found += problem_launches(code, problem, pass_name, dtype, chosen)
    return found


def problem_launches(code: Code, g: Geometry, pass_name: str, dtype: str, plan: dict) -> list[Launch]:
    weight = pass_name == "backward_weight"
    kernels: dict[str, Callable[..., Launch]] = {
        "direct": direct_weight if weight else direct_forward,
        "toeplitz": toeplitz_weight if weight else toeplitz_forward,
    }
    found = []
    if plan["packs"]:
        x, y, _ = g.elements()
        found = [pack(code, x, dtype), pack(code, y, dtype)]
        g = replace(g, apart=1)  # packed outputs have no gaps
    found.append(kernels[plan["algorithm"]](code, g, dtype, plan))
    if weight:
        found.append(reduce_splits(code, g, dtype, plan["workspace_slots"]))
    return found
