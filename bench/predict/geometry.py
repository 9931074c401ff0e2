"""The arithmetic of the CUDA convolution kernels' tiles: how many rows, columns and matrix tiles they visit.

It follows ``csrc/cuda`` line by line: tiles come from the planner, and what it does not tell is derived as
the kernels derive it. Where the planner counts products itself, `matrix_products` must agree with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SIZE = {"float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2}
DEPTH = {"tf32": 8, "bfloat16": 16, "float16": 16}  # of a matrix product
STRIP = 8  # outputs of a row, or taps, of a thread of the direct kernels
FIXED_ROWS = 3  # rows of outputs of a thread, in those of a fixed width
MMA_ROWS, MMA_COLS = 16, 8
COLUMNS_ALIGNED = 8  # where the Toeplitz forward kernel's windows begin


@dataclass(frozen=True)
class Geometry:
    """A convolution as a kernel sees it; backward_input is one or several with other padding.

    ``outputs`` is needed where padding is not the same on both sides, and outputs of a row that lie ``apart``
    elements from each other have those of other stride phases between them.
    """

    batch: int
    channels: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    outputs: tuple[int, int] | None = None
    apart: int = 1

    @property
    def out(self) -> tuple[int, int]:
        if self.outputs is not None:
            return self.outputs
        sizes = zip(
            (self.height, self.width), self.kernel, self.stride, self.padding, self.dilation, strict=True
        )
        h, w = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
        return h, w

    def phases(self) -> list[Geometry]:
        """What backward_input runs: the flipped kernel over grad_output, for each stride phase the taps that
        reach its inputs. The order is that of `backward_input_phases` in csrc/problem.h."""
        axes = zip(
            (self.height, self.width), self.kernel, self.stride, self.padding, self.dilation, strict=True
        )
        rows, cols = ([phase_axis(r, *axis) for r in range(min(axis[2], axis[0]))] for axis in axes)
        maps, apart = (self.batch, self.channels, *self.out), self.stride[1]
        found = []
        for y in rows:
            for x in cols:
                kernel, padding, dilation, count = zip(y, x, strict=True)
                if 0 in kernel:
                    raise ValueError("stride phases that no tap reaches are not predicted")
                found.append(Geometry(*maps, kernel, (1, 1), padding, dilation, count, apart))
        return found

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


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def phase_axis(
    r: int, size: int, kernel: int, stride: int, padding: int, dilation: int
) -> tuple[int, int, int, int]:
    """Taps, padding, dilation and outputs of inputs r, r + stride, ... along one axis."""
    common = math.gcd(stride, dilation)
    step, apart = stride // common, dilation // common
    tap = next((u for u in range(min(kernel, step)) if (r + padding - u * dilation) % stride == 0), kernel)
    taps = ceil_div(kernel - tap, step)
    first = (r + padding - tap * dilation) // stride  # row of grad_output under the first of both
    return taps, (taps - 1) * apart - first, apart, ceil_div(size - r, stride)


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


def window_columns(g: Geometry, x0: int, cols: int, aligned: int) -> tuple[int, int]:
    """First and last column under output columns [x0, x0 + cols); the first a multiple of ``aligned``."""
    left = max(0, x0 - g.padding[1]) // aligned * aligned
    extent = (g.kernel[1] - 1) * g.dilation[1]
    return left, min(g.width - 1, x0 - g.padding[1] + cols - 1 + extent)


def vector_bytes(width: int, dtype: str, packed: bool = False) -> int:
    """Bytes of one copy: the largest power of two that divides a row, at most 16; packed rows are aligned."""
    row = 16 if packed else width * SIZE[dtype] | 16
    return row & -row


def iterations(items: int, threads: int) -> int:
    """Executions, counted by warps, of a loop over items that all threads of a block share."""
    return ceil_div(items, threads) * (threads // 32)


@dataclass(frozen=True)
class Walk:
    """How a window is copied: `outer` times, `inner` vectors by each thread of `warps` warps."""

    warps: int
    outer: int
    inner: int


def column_walk(images: int, rows: int, most_rows: int, lanes: int, threads: int, gapless: bool) -> Walk:
    """The same arithmetic as ColumnWalk in tile_io.cuh."""
    step = threads // max(1, lanes)
    if gapless or images == 1:
        return Walk(threads // 32, 1, ceil_div(images * rows, step))
    if step >= most_rows:
        return Walk(threads // 32, 1, ceil_div(images, step // most_rows))
    return Walk(threads // 32, images, ceil_div(rows, step))


def warp_rows(g: Geometry, y0: int, rows: int, strips: int, tile_h: int, channels: int, warps: int) -> int:
    """Kernel rows run by all warps of a block: a warp runs as many as its longest thread."""
    total = 0
    for warp in range(warps):
        own = range(warp * 32, min(warp * 32 + 32, strips * tile_h * channels))
        ys = {y for t in own if (y := t // strips % tile_h) < rows}
        total += max((kernel_rows(g, y0 + y, y0 + y + 1) for y in ys), default=0)
    return total


@dataclass(frozen=True)
class Columns:
    k_tiles: int  # staged
    steps: int  # of them on the band of some n tile
    band: int  # pairs of k tile and n tile on the band


def columns(g: Geometry, x0: int, n_tiles: int, depth: int) -> Columns:
    cols = min(n_tiles * MMA_COLS, g.out[1] - x0)
    left, right = window_columns(g, x0, cols, COLUMNS_ALIGNED)
    extent, corner = (g.kernel[1] - 1) * g.dilation[1], left - x0 + g.padding[1]
    k_tiles = max(0, ceil_div(right - left + 1, depth))
    on_band = []
    for i in range(k_tiles):
        q = [corner + i * depth - j * MMA_COLS for j in range(n_tiles)]
        on_band.append(sum(c + depth - 1 >= 0 and c - (MMA_COLS - 1) <= extent for c in q))
    return Columns(k_tiles, sum(n > 0 for n in on_band), sum(on_band))


def outside_rows(g: Geometry, plan: dict) -> int:
    """Rows of zeros above and below an image in the Toeplitz forward kernel's window."""
    _, images, tile_h, _ = plan["tile"]
    m_tiles = plan["kernel"][0]
    rows = m_tiles if plan["image_major"] else min(tile_h, m_tiles * MMA_ROWS) if images == 1 else tile_h
    apart = (rows - 1) * g.stride[0]
    last = (g.out[0] - 1) * g.stride[0] - g.padding[0] + (g.kernel[0] - 1) * g.dilation[0]
    return min(max(g.padding[0], 0), apart) + min(max(last - (g.height - 1), 0), apart)


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
    left, right = window_columns(g, x0, cols, MMA_ROWS)
    n_tiles, m_tiles = ceil_div(cols, MMA_COLS), max(0, ceil_div(right - left + 1, MMA_ROWS))
    steps = on_band = 0
    for chunk in range(chunks):
        for i in range(m_tiles):
            j0 = (left - x0) // MMA_COLS + 2 * i - first - chunk * diagonals
            met = min(diagonals - 1, j0) - max(0, j0 - n_tiles + 1) + 1
            steps += met > 0
            on_band += max(0, met)
    return m_tiles, steps, on_band


def matrix_products(g: Geometry, pass_name: str, dtype: str, plan: dict) -> int:
    """mma instructions of a Toeplitz plan, counted as the kernels run them; the planner counts the same."""
    if pass_name == "backward_weight":
        return weight_products(g, dtype, plan)
    seen = g.phases() if pass_name == "backward_input" else [g]
    return sum(forward_products(s, dtype, p) for s, p in zip(seen, plan["problems"], strict=True))


def weight_products(g: Geometry, dtype: str, plan: dict) -> int:
    _, images, tile_h, tile_w = plan["tile"]
    own = owned_rows(g, plan)
    band_tiles = sum(
        weight_columns(g, x0, cols, own.first_diagonal, plan["kernel"][0], own.diagonal_chunks)[2]
        for x0, cols in spans(g.out[1], tile_w)
    )
    tiles = ceil_div(g.batch, images) * ceil_div(g.out[0], tile_h)
    groups = ceil_div(g.kernel[0], own.rows_each)
    depths = ceil_div(images * tile_h, DEPTH[dtype])
    return band_tiles * depths * tiles * g.channels * groups * own.rows_each


def forward_products(g: Geometry, dtype: str, plan: dict) -> int:
    _, images, tile_h, tile_w = plan["tile"]
    m_tiles, n_tiles = plan["kernel"]
    band_tiles = sum(columns(g, x0, n_tiles, DEPTH[dtype]).band for x0, _ in spans(g.out[1], tile_w))
    steps = sum(
        forward_row_steps(g, y0, rows, images, m_tiles, plan["image_major"])
        for y0, rows in spans(g.out[0], tile_h)
    )
    return band_tiles * steps * m_tiles * ceil_div(g.batch, images) * g.channels
