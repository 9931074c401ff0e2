"""Weight gradient by direct summation: a tile of taps times a tile of output pixels.

A program owns ``BLOCK_U`` taps, counted over (u, v), of ``BLOCK_C`` channels, and one contiguous share of the
output pixels. It keeps one partial sum per (tap, pixel lane, channel) and adds the lanes once at the end, so
the order of summation is fixed by the block sizes alone.
"""

import triton
import triton.language as tl


@triton.jit
def weight_direct_kernel(
    x,
    dy,
    partial,
    pixels,
    blocks_per_split,
    splits,
    channels,
    multiplier,
    in_h,
    in_w,
    out_h,
    out_w,
    pad_h,
    pad_w,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    dy_stride_n,
    dy_stride_c,
    dy_stride_h,
    dy_stride_w,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    ACC: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    TAPS: tl.constexpr = KH * KW
    BLOCKS_U: tl.constexpr = (TAPS + BLOCK_U - 1) // BLOCK_U
    pid = tl.program_id(0)
    pid_u = pid % BLOCKS_U
    split = (pid // BLOCKS_U) % splits
    pid_c = pid // (BLOCKS_U * splits)
    if INT64:
        split = split.to(tl.int64)
        pid_c = pid_c.to(tl.int64)
    tap = pid_u * BLOCK_U + tl.arange(0, BLOCK_U)
    c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    tap_ok = tap < TAPS
    c_ok = c < channels
    tap_row = (tap // KW) * DIL_H - pad_h
    tap_col = (tap % KW) * DIL_W - pad_w
    x_tap = x + tap_row * x_stride_h + tap_col * x_stride_w
    x_channel = (c // multiplier) * x_stride_c
    acc = tl.zeros([BLOCK_U, BLOCK_P, BLOCK_C], ACC)
    for block in range(blocks_per_split):
        p = (split * blocks_per_split + block) * BLOCK_P + tl.arange(0, BLOCK_P)
        p_ok = p < pixels
        out_col = p % out_w
        out_row = (p // out_w) % out_h
        n = p // (out_w * out_h)
        dy_pixel = n * dy_stride_n + out_row * dy_stride_h + out_col * dy_stride_w
        dy_ok = p_ok[:, None] & c_ok[None, :]
        grad = tl.load(dy + dy_pixel[:, None] + (c * dy_stride_c)[None, :], mask=dy_ok, other=0)
        row = tap_row[:, None] + (out_row * STRIDE_H)[None, :]
        col = tap_col[:, None] + (out_col * STRIDE_W)[None, :]
        ok = (row >= 0) & (row < in_h) & (col >= 0) & (col < in_w) & tap_ok[:, None] & p_ok[None, :]
        x_pixel = n * x_stride_n + out_row * (STRIDE_H * x_stride_h) + out_col * (STRIDE_W * x_stride_w)
        x_tile = (x_tap[:, None] + x_pixel[None, :])[:, :, None] + x_channel[None, None, :]
        window = tl.load(x_tile, mask=ok[:, :, None] & c_ok[None, None, :], other=0)
        acc = tl.fma(window.to(ACC), tl.broadcast_to(grad.to(ACC)[None, :, :], acc.shape), acc)
    out = partial + ((split * channels + c) * TAPS)[None, :] + tap[:, None]
    tl.store(out, tl.sum(acc, axis=1), mask=tap_ok[:, None] & c_ok[None, :])
