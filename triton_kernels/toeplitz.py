"""Convolution on matrix units: one banded Toeplitz product per channel and kernel row.

    Y[m, t] += X[m + u, q] @ T_u[q, t],    T_u[q, t] = w[u, (q + pad - stride * t) / dilation]

Rows m run over batch x height, so that one image already fills a tile; t is a block of output columns and q
the image columns its windows reach. Columns outside the image are never multiplied: the q loop is clipped to
it, so a kernel as wide as the map costs one dense product. A non-finite value spreads at most to the other
columns of its block in the same row of the same image and channel (it meets the zeros of the band).
"""

import triton
import triton.language as tl


@triton.jit
def conv_toeplitz_kernel(
    x,
    w,
    bias,
    y,
    rows,
    multiplier,
    in_h,
    in_w_units,
    out_h,
    out_w,
    pad_h,
    pad_w,
    x_units_n,
    x_units_c,
    x_units_h,
    w_stride_c,
    w_stride_h,
    w_stride_w,
    y_stride_n,
    y_stride_c,
    y_stride_h,
    y_stride_w,
    w_offset,
    y_offset,
    REDUCE: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INT64: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks_m = tl.cdiv(rows, BLOCK_M)
    blocks_t = tl.cdiv(out_w, BLOCK_T)
    pid = tl.program_id(0)
    pid_t = pid % blocks_t
    pid_m = (pid // blocks_t) % blocks_m
    c = pid // (blocks_t * blocks_m)
    if INT64:
        pid_m = pid_m.to(tl.int64)
        c = c.to(tl.int64)
    # Widths and strides come in units of VEC elements: the compiler then knows that a row starts on a
    # multiple of VEC and copies VEC elements at a time.
    in_w = in_w_units * VEC
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = m < rows
    out_row = m % out_h
    n = m // out_h
    row = out_row * STRIDE_H - pad_h
    x_rows = x + (n * x_units_n + row * x_units_h) * VEC
    t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    t_start = t * STRIDE_W - pad_w

    first = (tl.maximum(pid_t * BLOCK_T * STRIDE_W - pad_w, 0) // VEC) * VEC
    last = tl.minimum(((pid_t + 1) * BLOCK_T - 1) * STRIDE_W - pad_w + (KW - 1) * DIL_W + 1, in_w)
    chunks = tl.cdiv(tl.maximum(last - first, 0), BLOCK_K)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_T], tl.float32)
    # One flat loop over (reduced channel, kernel row, chunk): the compiler pipelines innermost loops only,
    # and the chunk loop alone has one to four turns.
    for step in range(chunks * (KH * REDUCE)):
        line = step // chunks
        u = line % KH
        r = line // KH
        q = first + (step % chunks) * BLOCK_K + k
        row_u = row + u * DIL_H
        x_channel = ((c // multiplier) * REDUCE + r) * x_units_c
        x_tile = (x_rows + (x_channel + u * DIL_H * x_units_h) * VEC)[:, None] + q[None, :]
        x_ok = (m_ok & (row_u >= 0) & (row_u < in_h))[:, None] & (q < in_w)[None, :]
        window = tl.load(x_tile, mask=x_ok, other=0)
        reach = q[:, None] - t_start[None, :]
        in_band = (reach >= 0) & (reach <= (KW - 1) * DIL_W)
        if DIL_W > 1:
            in_band = in_band & (reach % DIL_W == 0)
        w_line = w + (w_offset + (c * REDUCE + r) * w_stride_c + u * w_stride_h)
        band = tl.load(w_line + (reach // DIL_W) * w_stride_w, mask=in_band, other=0)
        acc = tl.dot(window, band, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + c).to(tl.float32)
    y_tile = (y + (y_offset + n * y_stride_n + c * y_stride_c + out_row * y_stride_h))[:, None]
    y_tile += (t * y_stride_w)[None, :]
    tl.store(y_tile, acc.to(y.dtype.element_ty), mask=m_ok[:, None] & (t < out_w)[None, :])
