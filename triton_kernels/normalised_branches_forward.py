"""All branches from one read of the input, their statistics, and their sum.

Statistics come in two passes. A tile leaves its mean and the sum of squared distances from it, so that a
large mean costs no digits; the second pass joins the tiles of a channel by M2 = sum_t M2_t + n_t (mean_t -
mean)^2. Both sum in an order that sizes alone decide.
"""

import triton
import triton.language as tl

from .normalised_branches_tiles import convolve, factor, own_tile, position


@triton.jit
def store_moments(partial, squares, y, ok, c, c_ok, count):
    """Mean and squared distances of (P, C) values, of which ``count`` rows are there, at ``partial + c`` and
    ``partial + squares + c``."""
    mean = tl.sum(tl.where(ok, y, 0), axis=0) / count
    off = tl.where(ok, y - mean[None, :], 0)
    # The mean was rounded: what the distances from it add up to says by how much.
    total = tl.sum(off, axis=0)
    rest = total / count
    tl.store(partial + c, mean + rest, mask=c_ok)
    tl.store(partial + (squares + c), tl.sum(off * off, axis=0) - rest * total, mask=c_ok)


@triton.jit
def outputs_kernel(
    x,
    taps,
    outputs,
    given,
    partial,
    pixels,
    channels,
    in_h,
    in_w,
    out_h,
    out_w,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    y_stride_n,
    y_stride_c,
    y_stride_h,
    y_stride_w,
    GEOMETRY: tl.constexpr,
    ACC: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Writes ``outputs[b]`` of every kernel, and for every branch, ``given`` ones last, the moments of a
    tile: ``partial`` is (means and squares, branches, blocks of pixels, channels)."""
    blocks, block, p, c = own_tile(pixels, channels, INT64, BLOCK_P, BLOCK_C)
    p_ok = p < pixels
    c_ok = c < channels
    n, row, col = position(p, out_h, out_w)
    x_pixel = n * x_stride_n + row * x_stride_h + col * x_stride_w
    x_tile = x + (x_pixel[:, None] + (c * x_stride_c)[None, :])
    at = (n * y_stride_n + row * y_stride_h + col * y_stride_w)[:, None] + (c * y_stride_c)[None, :]
    ok = p_ok[:, None] & c_ok[None, :]
    count = tl.minimum(pixels - block * BLOCK_P, BLOCK_P).to(ACC)
    squares = (len(outputs) + len(given)) * blocks * channels
    moments = partial + block * channels
    for b in tl.static_range(len(outputs)):
        acc = convolve(
            x_tile, row, col, c, p_ok, c_ok, taps, channels, in_h, in_w, x_stride_h, x_stride_w,
            GEOMETRY[b], ACC, BLOCK_P, BLOCK_C,
        )  # fmt: skip
        # Statistics are those of the values that are kept.
        y = acc.to(outputs[b].dtype.element_ty)
        tl.store(outputs[b] + at, y, mask=ok)
        store_moments(moments, squares, y.to(ACC), ok, c, c_ok, count)
        moments += blocks * channels
    for j in tl.static_range(len(given)):
        y = tl.load(given[j] + at, mask=ok, other=0).to(ACC)
        store_moments(moments, squares, y, ok, c, c_ok, count)
        moments += blocks * channels


@triton.jit
def statistics_kernel(
    partial,
    means,
    variances,
    pixels,
    channels,
    squares,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and biased variance (branches, channels) from the moments of tiles; a program joins the tiles of
    BLOCK_C channels of one branch."""
    groups = tl.cdiv(channels, BLOCK_C)
    blocks = tl.cdiv(pixels, BLOCK_P)
    branch = tl.program_id(0) // groups
    if INT64:
        branch = branch.to(tl.int64)
        blocks = tl.cast(blocks, tl.int64)
    c = (tl.program_id(0) % groups) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < channels
    first = partial + branch * blocks * channels
    origin = tl.load(first + c, mask=c_ok, other=0)
    values = tl.zeros([BLOCK_T, BLOCK_C], origin.dtype)
    for start in range(0, blocks, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        ok = (t < blocks)[:, None] & c_ok[None, :]
        count = tl.minimum(pixels - t * BLOCK_P, BLOCK_P).to(origin.dtype)[:, None]
        mean = tl.load(first + ((t * channels)[:, None] + c[None, :]), mask=ok, other=0)
        values += tl.where(ok, count * (mean - origin[None, :]), 0)
    centre = origin + tl.sum(values, axis=0) / pixels
    values = tl.zeros([BLOCK_T, BLOCK_C], origin.dtype)
    for start in range(0, blocks, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        ok = (t < blocks)[:, None] & c_ok[None, :]
        count = tl.minimum(pixels - t * BLOCK_P, BLOCK_P).to(origin.dtype)[:, None]
        at = (t * channels)[:, None] + c[None, :]
        off = tl.load(first + at, mask=ok, other=0) - centre[None, :]
        inside = tl.load(first + (squares + at), mask=ok, other=0)
        values += tl.where(ok, inside + count * (off * off), 0)
    out = branch * channels + c
    tl.store(means + out, centre, mask=c_ok)
    tl.store(variances + out, tl.sum(values, axis=0) / pixels, mask=c_ok)


@triton.jit
def sum_kernel(
    branches,
    scales,
    shift,
    output,
    pixels,
    channels,
    height,
    width,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    ACC: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """output = sum_b scales[b] branches[b] + shift, all tensors of one size and layout."""
    _, _, p, c = own_tile(pixels, channels, INT64, BLOCK_P, BLOCK_C)
    c_ok = c < channels
    ok = (p < pixels)[:, None] & c_ok[None, :]
    n, row, col = position(p, height, width)
    at = (n * stride_n + row * stride_h + col * stride_w)[:, None] + (c * stride_c)[None, :]
    acc = tl.zeros([BLOCK_P, BLOCK_C], ACC) + factor(shift, 0, channels, c, c_ok, ACC)
    for b in tl.static_range(len(branches)):
        y = tl.load(branches[b] + at, mask=ok, other=0).to(ACC)
        acc += factor(scales, b, channels, c, c_ok, ACC) * y
    tl.store(output + at, acc.to(output.dtype.element_ty), mask=ok)
