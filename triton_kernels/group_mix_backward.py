"""Group aggregation, backward, in the order in which the kernels run.

    reduce_kernel         sums of dA and of dA times the normalised U, which BatchNorm's gradients need
    pointwise_kernel      dT = P^T dU; for kind 0, which is not convolved, dz = dU
    spread_kernel         dz = depthwise of dT with the window turned round
    weight_kernel         dP = sum dU T^T with T = D(z) computed again; LayerNorm's weight and bias
    taps_kernel           dD = sum over pixels of dT times z some taps away

Sums over tokens are cut into SPLITS pieces, one program each, and added up in a fixed order by another
launch, so that results repeat bit for bit. ``partial`` is (SPLITS, parameters): depthwise 1 to 4 as (channel,
tap), pointwise 1 to 4 as (out, in), LayerNorm's weight and bias. dT is (B, N, 3, 4, d), kinds 1 to 4.
"""

import triton
import triton.language as tl

from .group_mix_aggregate import batch_affine, locate, premix_tile
from .group_mix_tiles import (
    correlate_row,
    depthwise,
    hard_swish_slope,
    layer_norm_backward,
    load_tile,
    load_vector,
    norm_backward,
    store_tile,
)


@triton.jit
def reduce_kernel(
    grad_mixed, qkv, premix, partial, nw0, nw1, nw2, nw3, nb0, nb1, nb2, nb3, mean, var,
    lines, d: tl.constexpr, splits, EPS: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """partial (splits, 2, 4, d): sums of dA and of dA times the normalised U over a split's lines."""
    kind = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    c = tl.arange(0, BLOCK_O)
    c_ok = c < d
    scale, shift, centre, rstd = batch_affine(
        kind, nw0, nw1, nw2, nw3, nb0, nb1, nb2, nb3, mean, var, c, d, EPS, ACC
    )
    total = tl.zeros([BLOCK_P, BLOCK_O], ACC)
    product = tl.zeros([BLOCK_P, BLOCK_O], ACC)
    blocks = tl.cdiv(3 * lines, BLOCK_P)
    each = tl.cdiv(blocks, splits)
    for block in range(split * each, tl.minimum(blocks, (split + 1) * each)):
        line = tl.cast(block, tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
        ok = line < 3 * lines
        u = premix_tile(qkv, premix, kind, line, lines, d, c, ok, c_ok, ACC)
        grad = load_tile(grad_mixed + (line * 4 + kind) * d, c, ok, c_ok, ACC)
        da = grad * hard_swish_slope(u * scale[None, :] + shift[None, :])
        total += da
        product += da * (u - centre[None, :])
    to = partial + ((split * 2) * 4 + kind) * d + c
    tl.store(to, tl.sum(total, 0), mask=c_ok)
    tl.store(to + 4 * d, tl.sum(product, 0) * rstd, mask=c_ok)


@triton.jit
def grad_premix(
    grad_mixed, grad_local, qkv, premix, prelocal, means, mean, var,
    nw0, nw1, nw2, nw3, nb0, nb1, nb2, nb3, lw, lb,
    kind, part, image, p, p_ok, batch, tokens, d, gl_image, gl_token,
    HAS_MEANS: tl.constexpr, EPS: tl.constexpr, LN_EPS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """dU (P, O) of a tile, zero outside it, and the tile's sums for LayerNorm's weight and bias (kind 4)."""
    c = tl.arange(0, BLOCK_O)
    c_ok = c < d
    du = tl.zeros([BLOCK_P, BLOCK_O], ACC)
    norm_w = tl.zeros([BLOCK_O], ACC)
    norm_b = tl.zeros([BLOCK_O], ACC)
    if kind == 4:
        token = image.to(tl.int64) * tokens + p
        u = load_tile(prelocal + token * d, c, p_ok, c_ok, ACC)
        grad = load_tile(
            grad_local + image.to(tl.int64) * gl_image + p.to(tl.int64) * gl_token, c, p_ok, c_ok, ACC
        )
        weight = load_vector(lw, c, c_ok, ACC)
        du, w, b = layer_norm_backward(grad, u, weight, load_vector(lb, c, c_ok, ACC), d, c_ok, LN_EPS)
        norm_w = tl.sum(w, 0)
        norm_b = tl.sum(b, 0)
    else:
        line = (part * batch + image).to(tl.int64) * tokens + p
        scale, shift, centre, rstd = batch_affine(
            kind, nw0, nw1, nw2, nw3, nb0, nb1, nb2, nb3, mean, var, c, d, EPS, ACC
        )
        u = premix_tile(qkv, premix, kind, line, batch * tokens, d, c, p_ok, c_ok, ACC)
        grad = load_tile(grad_mixed + (line * 4 + kind) * d, c, p_ok, c_ok, ACC)
        of_grad = tl.zeros([BLOCK_O], ACC)
        of_product = tl.zeros([BLOCK_O], ACC)
        if HAS_MEANS:
            of_grad = load_vector(means + kind * d, c, c_ok, ACC)
            of_product = load_vector(means + (4 + kind) * d, c, c_ok, ACC)
        du = norm_backward(grad, u, scale, shift, centre, rstd, of_grad, of_product)
    return tl.where(p_ok[:, None], du, 0), norm_w, norm_b


@triton.jit
def store_pointwise(
    du, grad_t, pointwise, token, first, d, p_ok,
    PARTS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """dT = dU P for the input channels of one kind; ``first`` is part * 4 + kind - 1 of the first part."""
    o = tl.arange(0, BLOCK_O)
    blocks = tl.cdiv(d, BLOCK_I)
    left = du.to(grad_t.dtype.element_ty)
    for step in range(PARTS * blocks):
        part = step // blocks
        i = (step % blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
        i_ok = i < d
        matrix = pointwise + o[:, None] * (PARTS * d) + (part * d + i)[None, :]
        w = tl.load(matrix, mask=(o < d)[:, None] & i_ok[None, :], other=0).to(left.dtype)
        dt = tl.dot(left, w, input_precision=PRECISION)
        store_tile(grad_t + (token * 12 + part * 4 + first) * d, i, p_ok, i_ok, dt)


@triton.jit
def pointwise_kernel(
    grad_mixed, grad_local, qkv, premix, prelocal, grad_qkv, grad_t, means, mean, var,
    pw1, pw2, pw3, pw4, nw0, nw1, nw2, nw3, nb0, nb1, nb2, nb3, lw, lb,
    batch, height, width, d: tl.constexpr, gl_image, gl_token,
    HAS_MEANS: tl.constexpr, EPS: tl.constexpr, LN_EPS: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    tokens = height * width
    kind, part, image, tile = locate(tl.program_id(0), batch, tl.cdiv(tokens, BLOCK_P))
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    p_ok = p < tokens
    token = image.to(tl.int64) * tokens + p
    du, _, _ = grad_premix(
        grad_mixed, grad_local, qkv, premix, prelocal, means, mean, var,
        nw0, nw1, nw2, nw3, nb0, nb1, nb2, nb3, lw, lb,
        kind, part, image, p, p_ok, batch, tokens, d, gl_image, gl_token,
        HAS_MEANS, EPS, LN_EPS, ACC, BLOCK_P, BLOCK_O,
    )  # fmt: skip
    first = part * 4 + kind - 1
    if kind == 0:
        c = tl.arange(0, BLOCK_O)
        store_tile(grad_qkv + (token * 15 + part * 5) * d, c, p_ok, c < d, du)
    elif kind == 1:
        store_pointwise(du, grad_t, pw1, token, first, d, p_ok, 1, ACC, PRECISION, BLOCK_P, BLOCK_I, BLOCK_O)
    elif kind == 2:
        store_pointwise(du, grad_t, pw2, token, first, d, p_ok, 1, ACC, PRECISION, BLOCK_P, BLOCK_I, BLOCK_O)
    elif kind == 3:
        store_pointwise(du, grad_t, pw3, token, first, d, p_ok, 1, ACC, PRECISION, BLOCK_P, BLOCK_I, BLOCK_O)
    else:
        store_pointwise(du, grad_t, pw4, token, first, d, p_ok, 3, ACC, PRECISION, BLOCK_P, BLOCK_I, BLOCK_O)


@triton.jit
def spread_kernel(
    grad_t, grad_qkv, taps, batch, height, width, d: tl.constexpr,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program is one tile of BLOCK_C channels of a kind from 1 to 4, part and image."""
    tokens = height * width
    tiles = tl.cdiv(tokens, BLOCK_P)
    blocks = tl.cdiv(d, BLOCK_C)
    slab = tl.program_id(0) // (tiles * blocks)
    kind = 4 - slab // (3 * batch)
    part = slab // batch % 3
    image = slab % batch
    c = (tl.program_id(0) // tiles % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < d
    p = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    p_ok = p < tokens
    row = p // width
    col = p % width
    token = image.to(tl.int64) * tokens + p
    dt = grad_t + (token * 12 + part * 4 + kind - 1) * d
    dz = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    if kind == 1:
        dz = depthwise(dt, 12 * d, c, c_ok, taps, d, row, col, p_ok, height, width,
                       3, True, ACC, BLOCK_P, BLOCK_C)  # fmt: skip
    elif kind == 2:
        dz = depthwise(dt, 12 * d, c, c_ok, taps + 9 * d, d, row, col, p_ok, height, width,
                       5, True, ACC, BLOCK_P, BLOCK_C)  # fmt: skip
    elif kind == 3:
        dz = depthwise(dt, 12 * d, c, c_ok, taps + 34 * d, d, row, col, p_ok, height, width,
                       7, True, ACC, BLOCK_P, BLOCK_C)  # fmt: skip
    else:
        dz = depthwise(dt, 12 * d, c, c_ok, taps + 83 * d + part * d, 3 * d, row, col, p_ok, height, width,
                       3, True, ACC, BLOCK_P, BLOCK_C)  # fmt: skip
    store_tile(grad_qkv + (token * 15 + part * 5 + kind) * d, c, p_ok, c_ok, dz)


@triton.jit
def weight_kernel(
    grad_mixed, grad_local, qkv, premix, prelocal, partial, taps, means, mean, var,
    nw0, nw1, nw2, nw3, nb0, nb1, nb2, nb3, lw, lb,
    batch, height, width, d: tl.constexpr, gl_image, gl_token, splits,
    HAS_MEANS: tl.constexpr, EPS: tl.constexpr, LN_EPS: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """dP of BLOCK_I input channels: six slots of channel blocks, kinds 4 (parts 0 to 2), 3, 2 and 1."""
    tokens = height * width
    tiles = tl.cdiv(tokens, BLOCK_P)
    blocks = tl.cdiv(d, BLOCK_I)
    slot = tl.program_id(0) // (blocks * splits)
    block = tl.program_id(0) // splits % blocks
    split = tl.program_id(0) % splits
    kind = tl.where(slot < 3, 4, 6 - slot)
    i = block * BLOCK_I + tl.arange(0, BLOCK_I)
    i_ok = i < d
    o = tl.arange(0, BLOCK_O)
    acc = tl.zeros([BLOCK_O, BLOCK_I], ACC)
    norm_w = tl.zeros([BLOCK_O], ACC)
    norm_b = tl.zeros([BLOCK_O], ACC)
    items = tl.where(slot < 3, 1, 3) * batch * tiles
    each = tl.cdiv(items, splits)
    for item in range(split * each, tl.minimum(items, (split + 1) * each)):
        slab = item // tiles
        image = slab % batch
        part = tl.where(slot < 3, slot, slab // batch)
        p = (item % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
        p_ok = p < tokens
        row = p // width
        col = p % width
        z = qkv + (image.to(tl.int64) * tokens + p) * 15 * d + (part * 5 + kind) * d
        t = tl.zeros([BLOCK_P, BLOCK_I], ACC)
        if kind == 1:
            t = depthwise(z, 15 * d, i, i_ok, taps, d, row, col, p_ok, height, width,
                          3, False, ACC, BLOCK_P, BLOCK_I)  # fmt: skip
        elif kind == 2:
            t = depthwise(z, 15 * d, i, i_ok, taps + 9 * d, d, row, col, p_ok, height, width,
                          5, False, ACC, BLOCK_P, BLOCK_I)  # fmt: skip
        elif kind == 3:
            t = depthwise(z, 15 * d, i, i_ok, taps + 34 * d, d, row, col, p_ok, height, width,
                          7, False, ACC, BLOCK_P, BLOCK_I)  # fmt: skip
        else:
            t = depthwise(z, 15 * d, i, i_ok, taps + 83 * d + part * d, 3 * d, row, col, p_ok, height, width,
                          3, False, ACC, BLOCK_P, BLOCK_I)  # fmt: skip
        du, w, b = grad_premix(
            grad_mixed, grad_local, qkv, premix, prelocal, means, mean, var,
            nw0, nw1, nw2, nw3, nb0, nb1, nb2, nb3, lw, lb,
            kind, part, image, p, p_ok, batch, tokens, d, gl_image, gl_token,
            HAS_MEANS, EPS, LN_EPS, ACC, BLOCK_P, BLOCK_O,
        )  # fmt: skip
        norm_w += w
        norm_b += b
        left = tl.trans(du.to(qkv.dtype.element_ty))
        acc = tl.dot(left, t.to(qkv.dtype.element_ty), acc, input_precision=PRECISION)
    parameters = 110 * d + 6 * d * d + 2 * d
    to = partial + split.to(tl.int64) * parameters + 110 * d
    in_width = tl.where(slot < 3, 3, 1) * d
    at = (kind - 1) * d * d + o[:, None] * in_width + tl.where(slot < 3, slot, 0) * d + i[None, :]
    tl.store(to + at, acc, mask=(o < d)[:, None] & i_ok[None, :])
    if (slot == 0) & (block == 0):
        tl.store(to + 6 * d * d + o, norm_w, mask=o < d)
        tl.store(to + 6 * d * d + d + o, norm_b, mask=o < d)


@triton.jit
def taps_kernel(
    qkv, grad_t, partial, batch, height, width, d: tl.constexpr, splits,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dD of one window row and BLOCK_C channels: 24 slots, kind 4 (part, row), then 3, 2 and 1."""
    tokens = height * width
    tiles = tl.cdiv(tokens, BLOCK_P)
    blocks = tl.cdiv(d, BLOCK_C)
    slot = tl.program_id(0) // (blocks * splits)
    split = tl.program_id(0) % splits
    c = (tl.program_id(0) // splits % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < d
    kind = tl.where(slot < 9, 4, tl.where(slot < 16, 3, tl.where(slot < 21, 2, 1)))
    u = tl.where(slot < 9, slot % 3, slot - tl.where(slot < 16, 9, tl.where(slot < 21, 16, 21)))
    acc = tl.zeros([8, BLOCK_P, BLOCK_C], ACC)
    items = tl.where(slot < 9, 1, 3) * batch * tiles
    each = tl.cdiv(items, splits)
    for item in range(split * each, tl.minimum(items, (split + 1) * each)):
        slab = item // tiles
        part = tl.where(slot < 9, slot // 3, slab // batch)
        p = (item % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
        p_ok = p < tokens
        row = p // width
        col = p % width
        token = (slab % batch).to(tl.int64) * tokens + p
        g = load_tile(grad_t + (token * 12 + part * 4 + kind - 1) * d, c, p_ok, c_ok, ACC)
        z = qkv + (token * 15 + part * 5 + kind) * d
        if kind == 3:
            acc += correlate_row(g, z, 15 * d, c, c_ok, u, row, col, p_ok, height, width, 7, 8, ACC)
        elif kind == 2:
            acc += correlate_row(g, z, 15 * d, c, c_ok, u, row, col, p_ok, height, width, 5, 8, ACC)
        else:
            acc += correlate_row(g, z, 15 * d, c, c_ok, u, row, col, p_ok, height, width, 3, 8, ACC)
    k = tl.where(kind == 3, 7, tl.where(kind == 2, 5, 3))
    begin = tl.where(kind == 4, 83 + slot // 3 * 9, tl.where(kind == 3, 34, tl.where(kind == 2, 9, 0))) * d
    v = tl.arange(0, 8)
    to = partial + split.to(tl.int64) * (110 * d + 6 * d * d + 2 * d) + begin
    at = c[None, :] * (k * k) + u * k + v[:, None]
    tl.store(to + at, tl.sum(acc, 1), mask=(v < k)[:, None] & c_ok[None, :])
