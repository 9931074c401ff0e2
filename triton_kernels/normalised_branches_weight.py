"""The gradients of all kernels of a sum of normalised branches: a tile of taps times a tile of output pixels.

As in ``direct_weight``: a program owns BLOCK_U taps of one branch, of BLOCK_C channels, and one contiguous
share of the output pixels; it keeps one partial sum per (tap, pixel lane, channel), so that the order of
summation is fixed by sizes alone. A second launch adds the shares.
"""

import triton
import triton.language as tl

from .normalised_branches_tiles import branch_gradient, factor, position


@triton.jit
def weight_share(
    x,
    grad_output,
    output,
    scale,
    slope,
    constant,
    partial,
    tap_block,
    first_block,
    blocks,
    c,
    c_ok,
    pixels,
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
    step = (down * x_stride_h + right * x_stride_w)[:, None, None] + (c * x_stride_c)[None, None, :]
    acc = tl.zeros([BLOCK_U, BLOCK_P, BLOCK_C], ACC)
    for block in range(blocks):
        p = (first_block + block) * BLOCK_P + tl.arange(0, BLOCK_P)
        p_ok = p < pixels
        n, out_row, out_col = position(p, out_h, out_w)
        at = (n * y_stride_n + out_row * y_stride_h + out_col * y_stride_w)[:, None]
        at += (c * y_stride_c)[None, :]
        there = p_ok[:, None] & c_ok[None, :]
        dz = branch_gradient(grad_output, output, at, there, scale, slope, constant, ACC)
        row = down[:, None] + out_row[None, :]
        col = right[:, None] + out_col[None, :]
        ok = (row >= 0) & (row < in_h) & (col >= 0) & (col < in_w) & tap_ok[:, None] & p_ok[None, :]
        pixel = (n * x_stride_n + out_row * x_stride_h + out_col * x_stride_w)[None, :, None]
        window = tl.load(x + (step + pixel), mask=ok[:, :, None] & c_ok[None, None, :], other=0)
        acc = tl.fma(window.to(ACC), tl.broadcast_to(dz[None, :, :], acc.shape), acc)
    out = partial[None, :] + (PLACE[6] + tap)[:, None]
    tl.store(out, tl.sum(acc, axis=1), mask=tap_ok[:, None] & c_ok[None, :])


@triton.jit
def backward_weight_kernel(
    x,
    grad_output,
    outputs,
    scales,
    slopes,
    constants,
    partial,
    pixels,
    blocks_per_split,
    splits,
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
            scale = factor(scales, b, channels, c, c_ok, ACC)
            slope = factor(slopes, b, channels, c, c_ok, ACC)
            constant = factor(constants, b, channels, c, c_ok, ACC)
            weight_share(
                x, grad_output, outputs[b], scale, slope, constant, lines, pid_u - STARTS[b],
                split * blocks_per_split, blocks_per_split, c, c_ok, pixels,
                in_h, in_w, out_h, out_w, x_stride_n, x_stride_c, x_stride_h, x_stride_w,
                y_stride_n, y_stride_c, y_stride_h, y_stride_w, GEOMETRY[b], ACC, BLOCK_U, BLOCK_P, BLOCK_C,
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
    pid = tl.program_id(0)
    if INT64:
        pid = pid.to(tl.int64)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    ok = i < numel
    line = partial + i
    total = tl.load(line, mask=ok, other=0)
    for _ in range(1, splits):
        line += numel
        total += tl.load(line, mask=ok, other=0)
    c = i // TAPS
    for b in tl.static_range(len(grad_weights)):
        tap = i % TAPS - GEOMETRY[b][6]
        mine = ok & (tap >= 0) & (tap < GEOMETRY[b][0] * GEOMETRY[b][1])
        to = grad_weights[b] + (c * (GEOMETRY[b][0] * GEOMETRY[b][1]) + tap)
        tl.store(to, total.to(grad_weights[b].dtype.element_ty), mask=mine)
