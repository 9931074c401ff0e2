"""What the kernels of normalised branches share: tiles of pixels and channels, and depthwise windows.

A program owns BLOCK_P pixels, counted over (n, h, w), of BLOCK_C channels. ``GEOMETRY[b]`` of a branch with a
kernel is (kh, kw, pad_h, pad_w, dil_h, dil_w, first): its taps are rows ``first`` and following of the packed
taps, (taps of all branches, channels). Sizes are (height, width), strides those of (n, c, h, w).
"""

import triton
import triton.language as tl


@triton.jit
def own_tile(pixels, channels, INT64: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """(blocks of pixels, which of them, its pixels, channels) of this program, in 64 bits where offsets need
    them."""
    blocks = tl.cdiv(pixels, BLOCK_P)
    pid = tl.program_id(0)
    block = pid % blocks
    pid_c = pid // blocks
    if INT64:
        blocks = tl.cast(blocks, tl.int64)
        block = block.to(tl.int64)
        pid_c = pid_c.to(tl.int64)
    return blocks, block, block * BLOCK_P + tl.arange(0, BLOCK_P), pid_c * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def own_row(channels, INT64: tl.constexpr, BLOCK_C: tl.constexpr):
    """(row, its channels) of a program that joins the tiles of (rows, blocks of pixels, channels)."""
    groups = tl.cdiv(channels, BLOCK_C)
    row = tl.program_id(0) // groups
    if INT64:
        row = row.to(tl.int64)
    return row, (tl.program_id(0) % groups) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def position(p, size):
    """(image, row, column) of pixels."""
    return p // (size[1] * size[0]), (p // size[1]) % size[0], p % size[1]


@triton.jit
def offsets(n, row, col, c, strides):
    """(P, C) offsets of channels ``c`` of pixels."""
    return (n * strides[0] + row * strides[2] + col * strides[3])[:, None] + (c * strides[1])[None, :]


@triton.jit
def factor(factors, b, channels, c, c_ok, ACC: tl.constexpr):
    """Row b of (branches, channels) numbers, one for each channel, as (1, C)."""
    return tl.load(factors + (b * channels + c), mask=c_ok, other=0).to(ACC)[None, :]


@triton.jit
def convolve(
    x, at, row, col, c, p_ok, c_ok, taps, channels, size, strides, PLACE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(P, C) outputs at (row, col) of one branch; ``at`` are the offsets of the input's pixels of that
    position."""
    acc = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for u in range(PLACE[0]):
        down = u * PLACE[4] - PLACE[2]
        row_ok = p_ok & (row + down >= 0) & (row + down < size[0])
        for v in range(PLACE[1]):
            right = v * PLACE[5] - PLACE[3]
            ok = row_ok & (col + right >= 0) & (col + right < size[1])
            tap = tl.load(taps + ((PLACE[6] + u * PLACE[1] + v) * channels + c), mask=c_ok, other=0)
            step = down * strides[2] + right * strides[3]
            pixel = tl.load(x + (at + step), mask=ok[:, None] & c_ok[None, :], other=0)
            acc = tl.fma(pixel.to(ACC), tl.broadcast_to(tap.to(ACC)[None, :], acc.shape), acc)
    return acc


@triton.jit
def factors_of(factors, b, channels, c, c_ok, ACC: tl.constexpr):
    """Branch b's (scale, slope, constant), each (1, C)."""
    return (
        factor(factors[0], b, channels, c, c_ok, ACC),
        factor(factors[1], b, channels, c, c_ok, ACC),
        factor(factors[2], b, channels, c, c_ok, ACC),
    )


@triton.jit
def branch_gradient(grad_output, output, at, ok, factors, ACC: tl.constexpr):
    """scale grad_output + slope y + constant where ``ok``, else 0: outside the image there is no output.

    ``at`` are (P, C) offsets in both tensors, ``factors`` those of the branch (:func:`factors_of`).
    """
    g = tl.load(grad_output + at, mask=ok, other=0).to(ACC)
    y = tl.load(output + at, mask=ok, other=0).to(ACC)
    return tl.where(ok, factors[0] * g + (factors[1] * y + factors[2]), 0)
