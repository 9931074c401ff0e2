"""What the CUDA convolution kernels execute for a layer: the work of every launch of a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .geometry import (
    MMA_COLS,
    MMA_ROWS,
    SIZE,
    STRIP,
    Geometry,
    ceil_div,
    columns,
    forward_row_steps,
    iterations,
    lanes_of,
    owned_rows,
    spans,
    vector_bytes,
    warp_rows,
    weight_columns,
    window_rows,
)
from .kernel_loops import Code, band, copies, copies_in_body, len_of, once_a_tile, row_overhead, staging
from .machine import Work
from .sass import Loop, enclosing, exclusive, find, loops, products

REDUCE_THREADS = 256


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


def direct_forward(code: Code, g: Geometry, dtype: str, plan: dict) -> Launch:
    refuse_channels_last(plan)
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
    tile_code = once_a_tile(found, wide=g.out[1] % 2 == 0)
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
    inner = [x for x in found if x.innermost]
    loads = find(inner, "loads alone", lambda x: x.count("LDG") > 0 and not x.count("STG"), len_of)
    stores = find(inner, "stores alone", lambda x: x.count("STG") > 0 and not x.count("LDG"), len_of)
    work.add(loads.body, elements / 32 / loads.count("LDG"))
    work.add(stores.body, elements / 32 / stores.count("STG"))
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
