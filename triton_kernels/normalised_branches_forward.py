"""All branches from one read of the input, their statistics, and their sum.

Statistics come in two passes. A tile leaves its mean, how far that number is off, and the sum of squared
distances from the mean, so that a large mean costs no digits; the second pass joins the tiles of a channel by
M2 = sum_t M2_t + n_t (mean_t - mean)^2, with means counted from the first tile's. Both sum in an order that
sizes alone decide.
"""

import triton
import triton.language as tl

from .normalised_branches_tiles import convolve, factor, offsets, own_row, own_tile, position

MOMENTS = 3  # numbers that describe one channel of a tile: mean, rest, squares


@triton.jit
def store_moments(partial, plane, y, ok, c, c_ok, count):
    """Moments of (P, C) values, of which ``count`` rows are there: mean, rest and squares, ``plane`` elements
    apart. The mean is that number and the rest, which rounding would lose in their sum."""
    mean = tl.sum(tl.where(ok, y, 0), axis=0) / count
    off = tl.where(ok, y - mean[None, :], 0)
    total = tl.sum(off, axis=0)
    rest = total / count
    tl.store(partial + c, mean, mask=c_ok)
    tl.store(partial + (plane + c), rest, mask=c_ok)
    tl.store(partial + (2 * plane + c), tl.sum(off * off, axis=0) - rest * total, mask=c_ok)


@triton.jit
def outputs_kernel(
    x,
    taps,
    outputs,
    given,
    partial,
    pixels,
    channels,
    in_size,
    out_size,
    x_strides,
    y_strides,
    GEOMETRY: tl.constexpr,
    ACC: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Writes ``outputs[b]`` of every kernel, and for every branch, ``given`` ones last, the moments of a
    tile: ``partial`` is (moments, branches, blocks of pixels, channels)."""
    blocks, block, p, c = own_tile(pixels, channels, INT64, BLOCK_P, BLOCK_C)
    p_ok = p < pixels
    c_ok = c < channels
    n, row, col = position(p, out_size)
    here = offsets(n, row, col, c, x_strides)
    at = offsets(n, row, col, c, y_strides)
    ok = p_ok[:, None] & c_ok[None, :]
    count = tl.minimum(pixels - block * BLOCK_P, BLOCK_P).to(ACC)
    plane = (len(outputs) + len(given)) * blocks * channels
    moments = partial + block * channels
    for b in tl.static_range(len(outputs)):
        acc = convolve(
            x, here, row, col, c, p_ok, c_ok, taps, channels, in_size, x_strides, GEOMETRY[b], ACC,
            BLOCK_P, BLOCK_C,
        )  # fmt: skip
        # Statistics are those of the values that are kept.
        y = acc.to(outputs[b].dtype.element_ty)
        tl.store(outputs[b] + at, y, mask=ok)
        store_moments(moments, plane, y.to(ACC), ok, c, c_ok, count)
        moments += blocks * channels
    for j in tl.static_range(len(given)):
        y = tl.load(given[j] + at, mask=ok, other=0).to(ACC)
        store_moments(moments, plane, y, ok, c, c_ok, count)
        moments += blocks * channels


@triton.jit
def tile_offset(
    first, plane, origin, start, blocks, pixels, channels, c, c_ok, BLOCK_P, BLOCK_T: tl.constexpr
):
    """Of BLOCK_T tiles from ``start`` on: offsets, presence, counts (T, 1), and means less ``origin``."""
    t = start + tl.arange(0, BLOCK_T)
    at = (t * channels)[:, None] + c[None, :]
    ok = (t < blocks)[:, None] & c_ok[None, :]
    count = tl.minimum(pixels - t * BLOCK_P, BLOCK_P).to(origin.dtype)[:, None]
    mean = tl.load(first + at, mask=ok, other=0) - origin[None, :]
    return at, ok, count, mean + tl.load(first + (plane + at), mask=ok, other=0)


@triton.jit
def statistics_kernel(
    partial,
    means,
    variances,
    pixels,
    channels,
    plane,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and biased variance (branches, channels) from the moments of tiles, (moments, branches, blocks,
    channels); a program joins the tiles of BLOCK_C channels of one branch."""
    branch, c = own_row(channels, INT64, BLOCK_C)
    blocks = tl.cdiv(pixels, BLOCK_P)
    if INT64:
        blocks = tl.cast(blocks, tl.int64)
        plane = tl.cast(plane, tl.int64)
    c_ok = c < channels
    first = partial + branch * blocks * channels
    origin = tl.load(first + c, mask=c_ok, other=0)
    values = tl.zeros([BLOCK_T, BLOCK_C], origin.dtype)
    for start in range(0, blocks, BLOCK_T):
        at, ok, count, mean = tile_offset(
            first, plane, origin, start, blocks, pixels, channels, c, c_ok, BLOCK_P, BLOCK_T
        )
        values += tl.where(ok, count * mean, 0)
    centre = tl.sum(values, axis=0) / pixels
    values = tl.zeros([BLOCK_T, BLOCK_C], origin.dtype)
    for start in range(0, blocks, BLOCK_T):
        at, ok, count, mean = tile_offset(
            first, plane, origin, start, blocks, pixels, channels, c, c_ok, BLOCK_P, BLOCK_T
        )
        off = mean - centre[None, :]
        inside = tl.load(first + (2 * plane + at), mask=ok, other=0)
        values += tl.where(ok, inside + count * (off * off), 0)
    out = branch * channels + c
    tl.store(means + out, origin + centre, mask=c_ok)
    tl.store(variances + out, tl.sum(values, axis=0) / pixels, mask=c_ok)


@triton.jit
def sum_kernel(
    branches,
    scales,
    shift,
    output,
    pixels,
    channels,
    size,
    strides,
    ACC: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """output = sum_b scales[b] branches[b] + shift, all tensors of one size and layout."""
    _, _, p, c = own_tile(pixels, channels, INT64, BLOCK_P, BLOCK_C)
    c_ok = c < channels
    ok = (p < pixels)[:, None] & c_ok[None, :]
    n, row, col = position(p, size)
    at = offsets(n, row, col, c, strides)
    acc = tl.zeros([BLOCK_P, BLOCK_C], ACC) + factor(shift, 0, channels, c, c_ok, ACC)
    for b in tl.static_range(len(branches)):
        y = tl.load(branches[b] + at, mask=ok, other=0).to(ACC)
        acc += factor(scales, b, channels, c, c_ok, ACC) * y
    tl.store(output + at, acc.to(output.dtype.element_ty), mask=ok)
