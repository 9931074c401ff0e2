"""Group aggregation, forward: depthwise window, pointwise product, norm and hardswish of a tile of tokens.

One program is one tile of one image and one segment (kind): kinds 0 to 3 for each of q, k and v, kind 4 for
the three together. The launch is one, with the widest work first; a kind is a branch that all of a program's
threads take alike. Layouts: qkv (B, N, 3, 5, d), mixed (3, B, N, 4, d), premix (3, B, N, 3, d), local and
prelocal (B, N, d).
"""

import triton
import triton.language as tl

from .group_mix_tiles import (
    affine,
    depthwise,
    hard_swish,
    load_tile,
    load_vector,
    standardise,
    store_tile,
)


@triton.jit
def pack_taps(w, out, channels, TAPS: tl.constexpr, i):
    """The i-th elements of a weight (channels, taps) as (taps, channels)."""
    ok = i < channels * TAPS
    value = tl.load(w + (i % channels) * TAPS + i // channels, mask=ok, other=0)
    tl.store(out + i, value.to(out.dtype.element_ty), mask=ok)


@triton.jit
def pack_taps_kernel(w0, w1, w2, w3, out, width, POSITION: tl.constexpr, BLOCK: tl.constexpr):
    """Packs the windows of the aggregation (``width`` is d) or of the position encoding (a head's channels).

    A window's tap of neighbouring channels is then one vector, and not one memory sector per channel.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if POSITION:
        pack_taps(w0, out, 2 * width, 9, i)
        pack_taps(w1, out + 18 * width, 3 * width, 25, i)
        pack_taps(w2, out + 93 * width, 3 * width, 49, i)
    else:
        pack_taps(w0, out, width, 9, i)
        pack_taps(w1, out + 9 * width, width, 25, i)
        pack_taps(w2, out + 34 * width, width, 49, i)
        pack_taps(w3, out + 83 * width, 3 * width, 9, i)


@triton.jit
def locate(program, batch, tiles):
    """(kind, part, image, tile) of a program: kind 4 first, three parts at once, then 3, 2, 1 and 0."""
    first = batch * tiles
    rest = tl.maximum(program - first, 0)
    each = 3 * batch * tiles
    kind = tl.where(program < first, 4, 3 - rest // each)
    at = tl.where(program < first, program, rest % each)
    slab = at // tiles
    return kind, slab // batch, slab % batch, at % tiles


@triton.jit
def mix_tile(
    z, taps, pointwise, d, row, col, p_ok, height, width,
    K: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """(P, O): P D(z). ``z`` points at the pixels' first channel of the first part; parts are 5 * d apart."""
    o = tl.arange(0, BLOCK_O)
    blocks = tl.cdiv(d, BLOCK_I)
    acc = tl.zeros([BLOCK_P, BLOCK_O], ACC)
    for step in range(PARTS * blocks):
        part = step // blocks
        i = (step % blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
        i_ok = i < d
        t = depthwise(
            z + part * 5 * d, 15 * d, i, i_ok, taps + part * d, PARTS * d, row, col, p_ok, height, width,
            K, False, ACC, BLOCK_P, BLOCK_I,
        )  # fmt: skip
        matrix = pointwise + o[None, :] * (PARTS * d) + (part * d + i)[:, None]
        w = tl.load(matrix, mask=i_ok[:, None] & (o < d)[None, :], other=0)
        acc = tl.dot(t.to(z.dtype.element_ty), w.to(z.dtype.element_ty), acc, input_precision=PRECISION)
    return acc


@triton.jit
def store_statistics(u, partial, line, c, d, count, p_ok):
    """Mean and sum of squared differences of a tile, which pairs of tiles can be merged from without loss."""
    mean = tl.sum(tl.where(p_ok[:, None], u, 0), 0) / count
    difference = tl.where(p_ok[:, None], u - mean[None, :], 0)
    to = partial + line.to(tl.int64) * 2 * d + c
    tl.store(to, mean, mask=c < d)
    tl.store(to + d, tl.sum(difference * difference, 0), mask=c < d)


@triton.jit
def aggregate_kernel(
    qkv, mixed, premix, prelocal, local, partial, taps,
    pw1, pw2, pw3, pw4, nw0, nw1, nw2, nw3, nb0, nb1, nb2, nb3, nm0, nm1, nm2, nm3, nv0, nv1, nv2, nv3, lw,
    lb,
    batch, height, width, d: tl.constexpr,
    TRAIN: tl.constexpr, EPS: tl.constexpr, LN_EPS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Evaluation: mixed and local. TRAIN: premix, prelocal, local, and partial (4, 3 * B * tiles, 2, d)."""
    tokens = height * width
    tiles = tl.cdiv(tokens, BLOCK_P)
    kind, part, image, tile = locate(tl.program_id(0), batch, tiles)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    p_ok = p < tokens
    row = p // width
    col = p % width
    token = image.to(tl.int64) * tokens + p
    z = qkv + token * 15 * d + (part * 5 + kind) * d
    c = tl.arange(0, BLOCK_O)
    c_ok = c < d
    u = tl.zeros([BLOCK_P, BLOCK_O], ACC)
    scale = tl.zeros([BLOCK_O], ACC)
    shift = tl.zeros([BLOCK_O], ACC)
    if kind == 0:
        u = load_tile(z, c, p_ok, c_ok, ACC)
        if not TRAIN:
            scale, shift = affine(nw0, nb0, nm0, nv0, c, c_ok, EPS, ACC)
    elif kind == 1:
        u = mix_tile(z, taps, pw1, d, row, col, p_ok, height, width,
                     3, 1, ACC, PRECISION, BLOCK_P, BLOCK_I, BLOCK_O)  # fmt: skip
        if not TRAIN:
            scale, shift = affine(nw1, nb1, nm1, nv1, c, c_ok, EPS, ACC)
    elif kind == 2:
        u = mix_tile(z, taps + 9 * d, pw2, d, row, col, p_ok, height, width,
                     5, 1, ACC, PRECISION, BLOCK_P, BLOCK_I, BLOCK_O)  # fmt: skip
        if not TRAIN:
            scale, shift = affine(nw2, nb2, nm2, nv2, c, c_ok, EPS, ACC)
    elif kind == 3:
        u = mix_tile(z, taps + 34 * d, pw3, d, row, col, p_ok, height, width,
                     7, 1, ACC, PRECISION, BLOCK_P, BLOCK_I, BLOCK_O)  # fmt: skip
        if not TRAIN:
            scale, shift = affine(nw3, nb3, nm3, nv3, c, c_ok, EPS, ACC)
    else:
        u = mix_tile(z, taps + 83 * d, pw4, d, row, col, p_ok, height, width,
                     3, 3, ACC, PRECISION, BLOCK_P, BLOCK_I, BLOCK_O)  # fmt: skip

    if kind == 4:
        if TRAIN:
            store_tile(prelocal + token * d, c, p_ok, c_ok, u)
        normalised, _ = standardise(u, d, c_ok, LN_EPS)
        a = normalised * load_vector(lw, c, c_ok, ACC)[None, :] + load_vector(lb, c, c_ok, ACC)[None, :]
        store_tile(local + token * d, c, p_ok, c_ok, hard_swish(a))
    else:
        slab = part * batch + image
        out_token = slab.to(tl.int64) * tokens + p
        if TRAIN:
            if kind > 0:
                store_tile(premix + (out_token * 3 + kind - 1) * d, c, p_ok, c_ok, u)
            line = (kind * 3 * batch + slab) * tiles + tile
            store_statistics(u, partial, line, c, d, tl.minimum(tokens - tile * BLOCK_P, BLOCK_P), p_ok)
        else:
            a = u * scale[None, :] + shift[None, :]
            store_tile(mixed + (out_token * 4 + kind) * d, c, p_ok, c_ok, hard_swish(a))


@triton.jit
def pick(kind, v0, v1, v2, v3, c, ok, ACC: tl.constexpr):
    """The vector of one of four parameters."""
    value = tl.zeros(c.shape, ACC)
    if kind == 0:
        value = load_vector(v0, c, ok, ACC)
    elif kind == 1:
        value = load_vector(v1, c, ok, ACC)
    elif kind == 2:
        value = load_vector(v2, c, ok, ACC)
    else:
        value = load_vector(v3, c, ok, ACC)
    return value


@triton.jit
def batch_affine(
    kind, nw0, nw1, nw2, nw3, nb0, nb1, nb2, nb3, mean, var, c, d, EPS: tl.constexpr, ACC: tl.constexpr
):
    """(scale, shift, mean, rstd) of the BatchNorm of one kind; mean and var are (4, d)."""
    ok = c < d
    centre = load_vector(mean + kind * d, c, ok, ACC)
    rstd = 1 / tl.sqrt(tl.load(var + kind * d + c, mask=ok, other=1).to(ACC) + EPS)
    scale = pick(kind, nw0, nw1, nw2, nw3, c, ok, ACC) * rstd
    return scale, pick(kind, nb0, nb1, nb2, nb3, c, ok, ACC) - centre * scale, centre, rstd


@triton.jit
def premix_tile(qkv, premix, kind, line, lines, d, c, ok, c_ok, ACC: tl.constexpr):
    """U of (part, image, token) lines: kind 0 is not convolved and still lies in qkv (image, token, part)."""
    u = tl.zeros([line.shape[0], c.shape[0]], ACC)
    if kind == 0:
        u = load_tile(qkv + ((line % lines) * 15 + (line // lines) * 5) * d, c, ok, c_ok, ACC)
    else:
        u = load_tile(premix + (line * 3 + kind - 1) * d, c, ok, c_ok, ACC)
    return u


@triton.jit
def normalize_kernel(
    qkv, premix, mixed, nw0, nw1, nw2, nw3, nb0, nb1, nb2, nb3, mean, var,
    lines, d: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Training, second pass: mixed = hardswish(BatchNorm(U)); ``lines`` is B * N."""
    blocks = tl.cdiv(3 * lines, BLOCK_P)
    kind = tl.program_id(0) // blocks
    line = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    ok = line < 3 * lines
    c = tl.arange(0, BLOCK_O)
    c_ok = c < d
    scale, shift, _, _ = batch_affine(kind, nw0, nw1, nw2, nw3, nb0, nb1, nb2, nb3, mean, var, c, d, EPS, ACC)
    u = premix_tile(qkv, premix, kind, line, lines, d, c, ok, c_ok, ACC)
    a = u * scale[None, :] + shift[None, :]
    store_tile(mixed + (line * 4 + kind) * d, c, ok, c_ok, hard_swish(a))
