"""What the Group-Mix kernels share: depthwise windows on tokens, hardswish, the derivatives of the norms.

Tokens are rows of channels, (image, token, channel): a tile is (pixels, channels), its pixels consecutive in
one image, and a window's tap is the same tile some tokens further on. Packed taps are (tap, channel).
"""

import triton
import triton.language as tl


@triton.jit
def hard_swish(a):
    """a * clamp(a + 3, 0, 6) / 6."""
    return a * (tl.minimum(tl.maximum(a + 3, 0), 6) / 6)


@triton.jit
def hard_swish_slope(a):
    """0 up to -3, 1 from 3 on, a / 3 + 1 / 2 between; NaN for NaN."""
    return tl.where(a <= -3, 0, tl.where(a >= 3, 1, a / 3 + 0.5))


@triton.jit
def load_vector(p, offsets, ok, ACC: tl.constexpr):
    return tl.load(p + offsets, mask=ok, other=0).to(ACC)


@triton.jit
def load_tile(pixel, c, p_ok, c_ok, ACC: tl.constexpr):
    """(P, C) from pointers of pixels and channels; zero where either is not there."""
    return tl.load(pixel[:, None] + c[None, :], mask=p_ok[:, None] & c_ok[None, :], other=0).to(ACC)


@triton.jit
def store_tile(pixel, c, p_ok, c_ok, value):
    to = pixel[:, None] + c[None, :]
    tl.store(to, value.to(pixel.dtype.element_ty), mask=p_ok[:, None] & c_ok[None, :])


@triton.jit
def affine(weight, bias, mean, var, c, ok, EPS: tl.constexpr, ACC: tl.constexpr):
    """BatchNorm with given statistics as (scale, shift)."""
    scale = load_vector(weight, c, ok, ACC) / tl.sqrt(tl.load(var + c, mask=ok, other=1).to(ACC) + EPS)
    return scale, load_vector(bias, c, ok, ACC) - load_vector(mean, c, ok, ACC) * scale


@triton.jit
def depthwise(
    pixel, token_stride, c, c_ok, taps, tap_stride, row, col, p_ok, height, width,
    K: tl.constexpr, FLIP: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sum over (u, v) of taps[u, v] x[p + (u, v) - K // 2] for K x K windows with zeros around the image.

    FLIP turns the window round, which makes it the gradient of the same convolution. Rows are a loop and
    columns are unrolled: K loads are in flight, and the code stays small.
    """
    R: tl.constexpr = K // 2
    stride = tl.cast(token_stride, tl.int64)
    start = pixel[:, None] + c[None, :]
    acc = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for u in range(K):
        row_ok = p_ok & (row + u >= R) & (row + u < height + R)
        line = start + (u - R) * width * stride
        for v in tl.static_range(K):
            at = u * K + v
            if FLIP:
                at = K * K - 1 - at
            ok = row_ok & (col + v >= R) & (col + v < width + R)
            tap = tl.load(taps + at * tap_stride + c, mask=c_ok, other=0).to(ACC)
            x = tl.load(line + (v - R) * stride, mask=ok[:, None] & c_ok[None, :], other=0).to(ACC)
            acc = tl.fma(x, tl.broadcast_to(tap[None, :], acc.shape), acc)
    return acc


@triton.jit
def correlate_row(
    g, pixel, token_stride, c, c_ok, u, row, col, p_ok, height, width,
    K: tl.constexpr, BLOCK_V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(BLOCK_V, P, C): g[p] x[p + (u, v) - K // 2] for the K columns v of window row u."""
    R: tl.constexpr = K // 2
    v = tl.arange(0, BLOCK_V)
    at = col[None, :] + (v - R)[:, None]
    ok = (p_ok & (row + u >= R) & (row + u < height + R))[None, :] & (at >= 0) & (at < width)
    ok = ok & (v < K)[:, None]
    step = ((u - R) * width + v - R) * tl.cast(token_stride, tl.int64)
    start = (pixel[None, :] + step[:, None])[:, :, None] + c[None, None, :]
    x = tl.load(start, mask=ok[:, :, None] & c_ok[None, None, :], other=0).to(ACC)
    return g[None, :, :] * x


@triton.jit
def norm_backward(grad, u, scale, shift, mean, rstd, grad_mean, product_mean):
    """dU of hardswish(scale * u + shift), where the batch's statistics may depend on u.

    ``grad_mean`` and ``product_mean`` are the means of dA and of dA times the normalised u; zeros where the
    statistics are fixed.
    """
    da = grad * hard_swish_slope(u * scale[None, :] + shift[None, :])
    normalised = (u - mean[None, :]) * rstd[None, :]
    return scale[None, :] * (da - grad_mean[None, :] - normalised * product_mean[None, :])


@triton.jit
def standardise(u, d, c_ok, EPS: tl.constexpr):
    """Rows of u (P, C), of which d columns exist, to mean 0 and variance 1; and 1 / standard deviation."""
    centred = tl.where(c_ok[None, :], u - (tl.sum(u, 1) / d)[:, None], 0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / d + EPS)
    return centred * rstd[:, None], rstd


@triton.jit
def layer_norm_backward(grad, u, weight, bias, d, c_ok, EPS: tl.constexpr):
    """dU of hardswish(LayerNorm(u)), and what tokens add to the gradients of weight and bias."""
    normalised, rstd = standardise(u, d, c_ok, EPS)
    da = grad * hard_swish_slope(normalised * weight[None, :] + bias[None, :])
    dn = da * weight[None, :]
    mean = tl.sum(dn, 1) / d
    product = tl.sum(dn * normalised, 1) / d
    du = rstd[:, None] * (dn - mean[:, None] - normalised * product[:, None])
    return tl.where(c_ok[None, :], du, 0), da * normalised, da
