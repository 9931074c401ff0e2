"""Weight gradient on matrix units: correlate whole rows, then add diagonals.

    D_u[q, t] = sum_{n, h} X[n, h + u, q] dY[n, h, t]
    dw[u, v] = sum_t D_u[stride * t + dilation * v - pad, t]

Only q - stride * t matters, so all column blocks add into one accumulator. A program owns ``BLOCK_U`` kernel
rows of one channel, stacked along the first axis of the product, and one contiguous share of the (row block,
column block) steps.
"""

import triton
import triton.language as tl


@triton.jit
def weight_toeplitz_kernel(
    x,
    dy,
    partial,
    rows,
    steps,
    steps_per_split,
    splits,
    channels,
    multiplier,
    in_h,
    in_w_units,
    out_h,
    out_w,
    pad_h,
    pad_w,
    window_units,
    x_units_n,
    x_units_c,
    x_units_h,
    dy_units_n,
    dy_units_c,
    dy_units_h,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    INT64: tl.constexpr,
    VEC_X: tl.constexpr,
    VEC_DY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    WINDOW: tl.constexpr,
):
    BLOCKS_U: tl.constexpr = (KH + BLOCK_U - 1) // BLOCK_U
    blocks_t = tl.cdiv(out_w, BLOCK_T)
    pid = tl.program_id(0)
    u0 = (pid % BLOCKS_U) * BLOCK_U
    split = (pid // BLOCKS_U) % splits
    c = pid // (BLOCKS_U * splits)
    if INT64:
        c = c.to(tl.int64)
        split = split.to(tl.int64)
    in_w = in_w_units * VEC_X
    stacked = tl.arange(0, BLOCK_U * WINDOW)
    u = u0 + stacked // WINDOW
    j = stacked % WINDOW
    t = tl.arange(0, BLOCK_T)
    x_channel = (c // multiplier) * x_units_c
    acc = tl.zeros([BLOCK_U * WINDOW, BLOCK_T], tl.float32)
    begin = split * steps_per_split
    for step in range(begin, tl.minimum(begin + steps_per_split, steps)):
        t0 = (step % blocks_t) * BLOCK_T
        m = (step // blocks_t) * BLOCK_R + tl.arange(0, BLOCK_R)
        m_ok = m < rows
        out_row = m % out_h
        n = m // out_h
        dy_rows = dy + (n * dy_units_n + c * dy_units_c + out_row * dy_units_h) * VEC_DY
        dy_ok = m_ok[:, None] & (t0 + t < out_w)[None, :]
        grad = tl.load(dy_rows[:, None] + (t0 + t)[None, :], mask=dy_ok, other=0)
        row = (out_row * STRIDE_H - pad_h)[:, None] + (u * DIL_H)[None, :]
        q = (t0 * STRIDE_W + window_units * VEC_X) + j
        x_rows = n[:, None] * x_units_n + row * x_units_h + x_channel
        x_ok = (m_ok[:, None] & (row >= 0) & (row < in_h)) & ((q >= 0) & (q < in_w))[None, :]
        window = tl.load(x + x_rows * VEC_X + q[None, :], mask=x_ok, other=0)
        acc = tl.dot(tl.trans(window), grad, acc, input_precision=PRECISION)
    # Column t meets tap v in row STRIDE_W * t + DIL_W * v - pad - window of its kernel row's block.
    tap = tl.arange(0, BLOCK_U * BLOCK_V)
    tap_u = tap // BLOCK_V
    tap_v = tap % BLOCK_V
    source = (t * STRIDE_W)[None, :] + (tap_v * DIL_W - pad_w - window_units * VEC_X)[:, None]
    inside = (source >= 0) & (source < WINDOW)
    index = tap_u[:, None] * WINDOW + tl.where(inside, source, 0)
    diagonal = tl.where(inside, tl.gather(acc, index, axis=0), 0.0)
    out = partial + (((split * channels + c) * KH + u0 + tap_u) * KW + tap_v)
    tl.store(out, tl.sum(diagonal, axis=1), mask=(u0 + tap_u < KH) & (tap_v < KW))
