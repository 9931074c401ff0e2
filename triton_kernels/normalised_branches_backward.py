"""The backward pass of a sum of normalised branches, from one grad_output and every branch's output.

The gradient at branch b is dz_b = scales_b grad_output + slopes_b y_b + constants_b. It is formed wherever
it is read and never stored, except for the tensors given, whose gradient it is. Beyond the image's edge it
is zero, although the formula is not.
"""

import triton
import triton.language as tl

from .normalised_branches_tiles import (
    branch_gradient,
    factor,
    factors_of,
    offsets,
    own_row,
    own_tile,
    position,
)


@triton.jit
def dots_kernel(
    grad_output,
    branches,
    means,
    partial,
    pixels,
    channels,
    size,
    strides,
    ACC: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over a tile of grad_output and of grad_output (y_b - means_b): ``partial`` is (1 + branches,
    blocks of pixels, channels). Centred before the product: sum g y - mean sum g would cancel."""
    blocks, block, p, c = own_tile(pixels, channels, INT64, BLOCK_P, BLOCK_C)
    c_ok = c < channels
    ok = (p < pixels)[:, None] & c_ok[None, :]
    n, row, col = position(p, size)
    at = offsets(n, row, col, c, strides)
    g = tl.load(grad_output + at, mask=ok, other=0).to(ACC)
    line = partial + (block * channels + c)
    tl.store(line, tl.sum(g, axis=0), mask=c_ok)
    for b in tl.static_range(len(branches)):
        y = tl.load(branches[b] + at, mask=ok, other=0).to(ACC)
        line += blocks * channels
        dots = tl.where(ok, g * (y - factor(means, b, channels, c, c_ok, ACC)), 0)
        tl.store(line, tl.sum(dots, axis=0), mask=c_ok)


@triton.jit
def add_tiles_kernel(
    partial,
    total,
    dots,
    blocks,
    channels,
    INT64: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds what the tiles left: row 0 to ``total``, row 1 + b to row b of ``dots``."""
    row, c = own_row(channels, INT64, BLOCK_C)
    c_ok = c < channels
    lines = partial + (row * blocks * channels + c)[None, :]
    values = tl.zeros([BLOCK_T, BLOCK_C], partial.dtype.element_ty)
    for start in range(0, blocks, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        if INT64:
            t = t.to(tl.int64)
        ok = (t < blocks)[:, None] & c_ok[None, :]
        values += tl.load(lines + (t * channels)[:, None], mask=ok, other=0)
    found = tl.sum(values, axis=0)
    if row == 0:
        tl.store(total + c, found, mask=c_ok)
    else:
        tl.store(dots + ((row - 1) * channels + c), found, mask=c_ok)


@triton.jit
def backward_given_kernel(
    grad_output,
    given,
    factors,
    grad_given,
    pixels,
    channels,
    size,
    strides,
    FIRST: tl.constexpr,
    ACC: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Writes dz_b of the tensors given, branches FIRST and following."""
    _, _, p, c = own_tile(pixels, channels, INT64, BLOCK_P, BLOCK_C)
    c_ok = c < channels
    ok = (p < pixels)[:, None] & c_ok[None, :]
    n, row, col = position(p, size)
    at = offsets(n, row, col, c, strides)
    for j in tl.static_range(len(given)):
        own = factors_of(factors, FIRST + j, channels, c, c_ok, ACC)
        dz = branch_gradient(grad_output, given[j], at, ok, own, ACC)
        tl.store(grad_given[j] + at, dz.to(grad_given[j].dtype.element_ty), mask=ok)


@triton.jit
def add_transposed(
    acc, grad_output, output, at, row, col, c, p_ok, c_ok, taps, channels, size, strides, factors,
    PLACE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``acc`` and what branch PLACE adds to the input's gradient at (row, col).

    Tap (u, v) took this pixel to output (row + pad - u dil, col + pad - v dil). ``at`` are the offsets of
    the outputs' pixels of position (row, col).
    """
    for u in range(PLACE[0]):
        down = PLACE[2] - u * PLACE[4]
        row_ok = p_ok & (row + down >= 0) & (row + down < size[0])
        for v in range(PLACE[1]):
            right = PLACE[3] - v * PLACE[5]
            ok = row_ok & (col + right >= 0) & (col + right < size[1])
            ok = ok[:, None] & c_ok[None, :]
            step = down * strides[2] + right * strides[3]
            dz = branch_gradient(grad_output, output, at + step, ok, factors, ACC)
            tap = tl.load(taps + ((PLACE[6] + u * PLACE[1] + v) * channels + c), mask=c_ok, other=0)
            acc = tl.fma(dz, tl.broadcast_to(tap.to(ACC)[None, :], acc.shape), acc)
    return acc


@triton.jit
def backward_input_kernel(
    x,
    grad_output,
    outputs,
    taps,
    factors,
    grad_input,
    pixels,
    channels,
    in_size,
    out_size,
    x_strides,
    y_strides,
    GEOMETRY: tl.constexpr,
    IDENTITY: tl.constexpr,
    ACC: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient of the input through all kernels, and with IDENTITY through the branch that is the
    input."""
    _, _, p, c = own_tile(pixels, channels, INT64, BLOCK_P, BLOCK_C)
    p_ok = p < pixels
    c_ok = c < channels
    n, row, col = position(p, in_size)
    here = offsets(n, row, col, c, x_strides)
    there = offsets(n, row, col, c, y_strides)
    ok = p_ok[:, None] & c_ok[None, :]
    acc = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for b in tl.static_range(len(outputs)):
        own = factors_of(factors, b, channels, c, c_ok, ACC)
        acc = add_transposed(
            acc, grad_output, outputs[b], there, row, col, c, p_ok, c_ok, taps, channels, out_size,
            y_strides, own, GEOMETRY[b], ACC,
        )  # fmt: skip
    if IDENTITY:  # input and outputs have one size, and so the same offsets
        own = factors_of(factors, len(outputs), channels, c, c_ok, ACC)
        acc += branch_gradient(grad_output, x, there, ok, own, ACC)
    tl.store(grad_input + here, acc.to(grad_input.dtype.element_ty), mask=ok)
