"""The gradients of all kernels of a sum of normalised branches: a tile of taps times a tile of output pixels.

As in ``direct_weight``: a program owns BLOCK_U taps of one branch, of BLOCK_C channels, and one contiguous
share of the output pixels; it keeps one partial sum per (tap, pixel lane, channel), so that the order of
summation is fixed by sizes alone. A second launch adds the shares.
"""

import triton
import triton.language as tl

from .normalised_branches_tiles import branch_gradient, factors_of, offsets, position
from .reduce import sum_splits


@triton.jit
def weight_share(
    x,
    grad_output,
    output,
    factors,
    partial,
    tap_block,
    first_block,
    blocks,
    c,
    c_ok,
    pixels,
    in_size,
    out_size,
    x_strides,
    y_strides,
    PLACE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums one branch's taps over ``blocks`` blocks of pixels; ``partial`` are pointers to the channels' rows
    of taps."""
    taps: tl.constexpr = PLACE[0] * PLACE[1]
    tap = tap_block * BLOCK_U + tl.arange(0, BLOCK_U)
    tap_ok = tap < taps
    down = (tap // PLACE[1]) * PLACE[4] - PLACE[2]
    right = (tap % PLACE[1]) * PLACE[5] - PLACE[3]
    step = (down * x_strides[2] + right * x_strides[3])[:, None, None] + (c * x_strides[1])[None, None, :]
    acc = tl.zeros([BLOCK_U, BLOCK_P, BLOCK_C], ACC)
    for block in range(blocks):
        p = (first_block + block) * BLOCK_P + tl.arange(0, BLOCK_P)
        p_ok = p < pixels
        n, out_row, out_col = position(p, out_size)
        at = offsets(n, out_row, out_col, c, y_strides)
        there = p_ok[:, None] & c_ok[None, :]
        dz = branch_gradient(grad_output, output, at, there, factors, ACC)
        row = down[:, None] + out_row[None, :]
        col = right[:, None] + out_col[None, :]
        ok = (row >= 0) & (row < in_size[0]) & (col >= 0) & (col < in_size[1])
        ok = ok & tap_ok[:, None] & p_ok[None, :]
        pixel = (n * x_strides[0] + out_row * x_strides[2] + out_col * x_strides[3])[None, :, None]
        window = tl.load(x + (step + pixel), mask=ok[:, :, None] & c_ok[None, None, :], other=0)
        acc = tl.fma(window.to(ACC), tl.broadcast_to(dz[None, :, :], acc.shape), acc)
    out = partial[None, :] + (PLACE[6] + tap)[:, None]
    tl.store(out, tl.sum(acc, axis=1), mask=tap_ok[:, None] & c_ok[None, :])


@triton.jit
def backward_weight_kernel(
    x,
    grad_output,
    outputs,
    factors,
    partial,
    pixels,
    blocks_per_split,
    splits,
    channels,
    in_size,
    out_size,
    x_strides,
    y_strides,
    GEOMETRY: tl.constexpr,
    STARTS: tl.constexpr,
    TAPS: tl.constexpr,
    ACC: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``partial`` (splits, channels, TAPS of all branches). Blocks of taps ``STARTS[b]`` up to
    ``STARTS[b + 1]`` belong to branch b."""
    BLOCKS_U: tl.constexpr = STARTS[len(outputs)]
    pid = tl.program_id(0)
    pid_u = pid % BLOCKS_U
    split = (pid // BLOCKS_U) % splits
    pid_c = pid // (BLOCKS_U * splits)
    if INT64:
        split = split.to(tl.int64)
        pid_c = pid_c.to(tl.int64)
    c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < channels
    lines = partial + (split * channels + c) * TAPS
    for b in tl.static_range(len(outputs)):
        if (pid_u >= STARTS[b]) & (pid_u < STARTS[b + 1]):
            own = factors_of(factors, b, channels, c, c_ok, ACC)
            weight_share(
                x, grad_output, outputs[b], own, lines, pid_u - STARTS[b], split * blocks_per_split,
                blocks_per_split, c, c_ok, pixels, in_size, out_size, x_strides, y_strides, GEOMETRY[b], ACC,
                BLOCK_U, BLOCK_P, BLOCK_C,
            )  # fmt: skip


@triton.jit
def add_weight_splits_kernel(
    partial,
    grad_weights,
    numel,
    splits,
    GEOMETRY: tl.constexpr,
    TAPS: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds (splits, channels, TAPS) in order and deals the taps out to the branches, each (channels,
    taps)."""
    i, ok, total = sum_splits(partial, numel, splits, INT64, BLOCK)
    c = i // TAPS
    for b in tl.static_range(len(grad_weights)):
        tap = i % TAPS - GEOMETRY[b][6]
        mine = ok & (tap >= 0) & (tap < GEOMETRY[b][0] * GEOMETRY[b][1])
        to = grad_weights[b] + (c * (GEOMETRY[b][0] * GEOMETRY[b][1]) + tap)
        tl.store(to, total.to(grad_weights[b].dtype.element_ty), mask=mine)
