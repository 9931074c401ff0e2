"""Direct convolution: one fused multiply-add per tap and output, for any stride, dilation and layout.

A program owns ``BLOCK_P`` output pixels, counted over (n, h, w), of ``BLOCK_C`` channels. NCHW runs with
BLOCK_C = 1, so that neighbouring threads read neighbouring columns and the tap is one scalar; NHWC runs with
channels on the fast axis.
"""

import triton
import triton.language as tl


@triton.jit
def conv_direct_kernel(
    x,
    w,
    bias,
    y,
    pixels,
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
    ACC: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks_p = tl.cdiv(pixels, BLOCK_P)
    pid = tl.program_id(0)
    pid_p = pid % blocks_p
    pid_c = pid // blocks_p
    if INT64:
        pid_p = pid_p.to(tl.int64)
        pid_c = pid_c.to(tl.int64)
    p = pid_p * BLOCK_P + tl.arange(0, BLOCK_P)
    c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    p_ok = p < pixels
    c_ok = c < channels
    out_col = p % out_w
    out_row = (p // out_w) % out_h
    n = p // (out_w * out_h)
    row = out_row * STRIDE_H - pad_h
    col = out_col * STRIDE_W - pad_w
    x_pixel = x + (n * x_stride_n + row * x_stride_h + col * x_stride_w)
    acc = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for r in range(REDUCE):
        x_tile = x_pixel[:, None] + (((c // multiplier) * REDUCE + r) * x_stride_c)[None, :]
        w_tile = w + w_offset + (c * REDUCE + r) * w_stride_c
        for u in range(KH):
            row_u = row + u * DIL_H
            row_ok = p_ok & (row_u >= 0) & (row_u < in_h)
            for v in range(KW):
                col_v = col + v * DIL_W
                ok = row_ok & (col_v >= 0) & (col_v < in_w)
                x_step = u * DIL_H * x_stride_h + v * DIL_W * x_stride_w
                tap = tl.load(w_tile + (u * w_stride_h + v * w_stride_w), mask=c_ok, other=0)
                pixel = tl.load(x_tile + x_step, mask=ok[:, None] & c_ok[None, :], other=0)
                acc = tl.fma(pixel.to(ACC), tl.broadcast_to(tap.to(ACC)[None, :], acc.shape), acc)
    if HAS_BIAS:
        acc += tl.load(bias + c, mask=c_ok, other=0).to(ACC)[None, :]
    y_pixel = y + (y_offset + n * y_stride_n + out_row * y_stride_h + out_col * y_stride_w)
    y_tile = y_pixel[:, None] + (c * y_stride_c)[None, :]
    tl.store(y_tile, acc.to(y.dtype.element_ty), mask=p_ok[:, None] & c_ok[None, :])
