"""The attention core: softmax of k over tokens, G = A^T v, out = scale q G + q * (position encoding of v).

``mixed`` is (3, B, N, 4 * d), q, k and v; a head is ``head`` = d / 2 neighbouring channels. Heads 0 and 1 see
3 x 3 tokens, 2 to 4 see 5 x 5, 5 to 7 see 7 x 7. Packed taps hold the three windows one after the other,
(tap, channel) each. log_sum (B, 4 * d) is the logarithm of the columns' sums of exp(k), so that A is
exp(k - log_sum).
"""

import triton
import triton.language as tl

from .group_mix_tiles import correlate_row, depthwise, load_tile, load_vector, store_tile


@triton.jit
def context_kernel(
    mixed, partial, batch, tokens, head: tl.constexpr, splits,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A split's running column maximum, sum of exp(k - maximum) and products with v.

    partial is (splits, B * 8, head, 2 + head). A row is a channel of k: maximum, sum, then its products with
    the channels of v.
    """
    pair = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    c = tl.arange(0, BLOCK_H)
    c_ok = c < head
    k_part = mixed + (batch + pair // 8).to(tl.int64) * tokens * 8 * head + pair % 8 * head
    v_part = k_part + tl.cast(batch, tl.int64) * tokens * 8 * head
    biggest = tl.full([BLOCK_H], float("-inf"), ACC)
    total = tl.zeros([BLOCK_H], ACC)
    acc = tl.zeros([BLOCK_H, BLOCK_H], ACC)
    blocks = tl.cdiv(tokens, BLOCK_P)
    each = tl.cdiv(blocks, splits)
    for block in range(split * each, tl.minimum(blocks, (split + 1) * each)):
        p = block * BLOCK_P + tl.arange(0, BLOCK_P)
        at = (p.to(tl.int64) * 8 * head)[:, None] + c[None, :]
        ok = (p < tokens)[:, None] & c_ok[None, :]
        k = tl.load(k_part + at, mask=ok, other=float("-inf")).to(ACC)
        v = tl.load(v_part + at, mask=ok, other=0)
        now = tl.maximum(biggest, tl.max(k, 0))
        # A column of -inf so far must not become -inf - -inf.
        safe = tl.where(now == float("-inf"), 0, now)
        shrink = tl.exp(biggest - safe)
        e = tl.exp(k - safe[None, :])
        total = total * shrink + tl.sum(e, 0)
        acc = tl.dot(tl.trans(e.to(v.dtype)), v, acc * shrink[:, None], input_precision=PRECISION)
        biggest = now
    to = partial + ((split * batch * 8 + pair) * head + c) * (2 + head)
    tl.store(to, biggest, mask=c_ok)
    tl.store(to + 1, total, mask=c_ok)
    tl.store(to[:, None] + 2 + c[None, :], acc, mask=c_ok[:, None] & c_ok[None, :])


@triton.jit
def merge_context_kernel(
    partial, log_sum, context, pairs, head: tl.constexpr, splits, ACC: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Adds the splits in their order; context (B, 8, head, head) is A^T v."""
    pair = tl.program_id(0)
    c = tl.arange(0, BLOCK_H)
    c_ok = c < head
    ok = c_ok[:, None] & c_ok[None, :]
    biggest = tl.full([BLOCK_H], float("-inf"), ACC)
    total = tl.zeros([BLOCK_H], ACC)
    acc = tl.zeros([BLOCK_H, BLOCK_H], ACC)
    for split in range(splits):
        line = partial + ((split * pairs + pair) * head + c) * (2 + head)
        found = tl.load(line, mask=c_ok, other=0)
        now = tl.maximum(biggest, found)
        safe = tl.where(now == float("-inf"), 0, now)
        old = tl.exp(biggest - safe)
        new = tl.exp(found - safe)
        total = total * old + tl.load(line + 1, mask=c_ok, other=1) * new
        acc = acc * old[:, None] + tl.load(line[:, None] + 2 + c[None, :], mask=ok, other=0) * new[:, None]
        biggest = now
    tl.store(log_sum + pair * head + c, biggest + tl.log(total), mask=c_ok)
    to = context + (pair * head + c)[:, None] * head + c[None, :]
    tl.store(to, acc / total[:, None], mask=ok)


@triton.jit
def encode(
    v, token_stride, head_index, head, taps, bias0, bias1, bias2, row, col, p_ok, height, width,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """E (P, head): the position encoding of one head, whose first channel ``v`` points at."""
    c = tl.arange(0, BLOCK_H)
    c_ok = c < head
    e = tl.zeros([BLOCK_P, BLOCK_H], ACC)
    if head_index < 2:
        at = head_index * head
        e = depthwise(v, token_stride, c, c_ok, taps + at, 2 * head, row, col, p_ok, height, width,
                      3, False, ACC, BLOCK_P, BLOCK_H)  # fmt: skip
        e += load_vector(bias0 + at, c, c_ok, ACC)[None, :]
    elif head_index < 5:
        at = (head_index - 2) * head
        e = depthwise(v, token_stride, c, c_ok, taps + 18 * head + at, 3 * head, row, col, p_ok, height,
        width,
                      5, False, ACC, BLOCK_P, BLOCK_H)  # fmt: skip
        e += load_vector(bias1 + at, c, c_ok, ACC)[None, :]
    else:
        at = (head_index - 5) * head
        e = depthwise(v, token_stride, c, c_ok, taps + 93 * head + at, 3 * head, row, col, p_ok, height,
        width,
                      7, False, ACC, BLOCK_P, BLOCK_H)  # fmt: skip
        e += load_vector(bias2 + at, c, c_ok, ACC)[None, :]
    return e


@triton.jit
def attend_kernel(
    mixed, local, out, context, taps, bias0, bias1, bias2, batch, height, width, head: tl.constexpr,
    SCALE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """out (B, N, 10 * head): eight heads, then the 2 * head channels of local, copied in two more "heads"."""
    tokens = height * width
    tiles = tl.cdiv(tokens, BLOCK_P)
    h = 9 - tl.program_id(0) // (batch * tiles)  # copies first, then the widest windows
    image = (tl.program_id(0) // tiles % batch).to(tl.int64)
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    p_ok = p < tokens
    c = tl.arange(0, BLOCK_H)
    c_ok = c < head
    token = image * tokens + p
    to = out + token * 10 * head + h * head
    if h >= 8:
        store_tile(
            to, c, p_ok, c_ok, load_tile(local + token * 2 * head + (h - 8) * head, c, p_ok, c_ok, ACC)
        )
    else:
        part = tl.cast(batch, tl.int64) * tokens * 8 * head
        q_pixel = mixed + token * 8 * head + h * head
        ok = p_ok[:, None] & c_ok[None, :]
        q = tl.load(q_pixel[:, None] + c[None, :], mask=ok, other=0)
        square = c_ok[:, None] & c_ok[None, :]
        g = tl.load(context + ((image * 8 + h) * head + c)[:, None] * head + c[None, :], mask=square, other=0)
        attended = tl.dot(q, g.to(q.dtype), input_precision=PRECISION)
        e = encode(q_pixel + 2 * part, 8 * head, h, head, taps, bias0, bias1, bias2, p // width, p % width,
        p_ok,
                   height, width, ACC, BLOCK_P, BLOCK_H)  # fmt: skip
        store_tile(to, c, p_ok, c_ok, SCALE * attended + q.to(ACC) * e)


@triton.jit
def grad_context_kernel(
    mixed, grad_out, partial, grad_bias, batch, tokens, head: tl.constexpr, splits,
    SCALE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Partial dG = scale q^T dO (splits, B * 8, head, head) and sums of dO * q (splits * B, 8 * head)."""
    pair = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    image = (pair // 8).to(tl.int64)
    c = tl.arange(0, BLOCK_H)
    c_ok = c < head
    acc = tl.zeros([BLOCK_H, BLOCK_H], ACC)
    bias = tl.zeros([BLOCK_H], ACC)
    blocks = tl.cdiv(tokens, BLOCK_P)
    each = tl.cdiv(blocks, splits)
    for block in range(split * each, tl.minimum(blocks, (split + 1) * each)):
        p = block * BLOCK_P + tl.arange(0, BLOCK_P)
        ok = (p < tokens)[:, None] & c_ok[None, :]
        token = image * tokens + p
        at = (pair % 8 * head + c)[None, :]
        q = tl.load(mixed + (token * 8 * head)[:, None] + at, mask=ok, other=0)
        go = tl.load(grad_out + (token * 10 * head)[:, None] + at, mask=ok, other=0)
        acc = tl.dot(tl.trans(q), go, acc, input_precision=PRECISION)
        bias += tl.sum(q.to(ACC) * go.to(ACC), 0)
    line = (split * batch * 8 + pair) * head + c
    tl.store(partial + line[:, None] * head + c[None, :], SCALE * acc, mask=c_ok[:, None] & c_ok[None, :])
    tl.store(grad_bias + line, bias, mask=c_ok)


@triton.jit
def product_depthwise(
    x, x_stride, y, y_stride, c, c_ok, taps, tap_stride, row, col, p_ok, height, width,
    K: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The gradient of a K x K depthwise convolution, of an output gradient that is the product x * y."""
    R: tl.constexpr = K // 2
    x_start = x[:, None] + c[None, :]
    y_start = y[:, None] + c[None, :]
    acc = tl.zeros([BLOCK_P, BLOCK_H], ACC)
    for u in range(K):
        row_ok = p_ok & (row + u >= R) & (row + u < height + R)
        for v in tl.static_range(K):
            step = tl.cast((u - R) * width + v - R, tl.int64)
            ok = (row_ok & (col + v >= R) & (col + v < width + R))[:, None] & c_ok[None, :]
            tap = tl.load(taps + (K * K - 1 - u * K - v) * tap_stride + c, mask=c_ok, other=0).to(ACC)
            product = tl.load(x_start + step * x_stride, mask=ok, other=0).to(ACC)
            product *= tl.load(y_start + step * y_stride, mask=ok, other=0).to(ACC)
            acc = tl.fma(product, tl.broadcast_to(tap[None, :], acc.shape), acc)
    return acc


@triton.jit
def encode_backward(
    go, q, head_index, head, taps, row, col, p_ok, height, width,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dV's part from the position encoding of one head: the turned window over dO * q."""
    c = tl.arange(0, BLOCK_H)
    c_ok = c < head
    dv = tl.zeros([BLOCK_P, BLOCK_H], ACC)
    if head_index < 2:
        dv = product_depthwise(go, 10 * head, q, 8 * head, c, c_ok, taps + head_index * head, 2 * head,
                               row, col, p_ok, height, width, 3, ACC, BLOCK_P, BLOCK_H)  # fmt: skip
    elif head_index < 5:
        dv = product_depthwise(go, 10 * head, q, 8 * head, c, c_ok, taps + (16 + head_index) * head, 3 * head,
                               row, col, p_ok, height, width, 5, ACC, BLOCK_P, BLOCK_H)  # fmt: skip
    else:
        dv = product_depthwise(go, 10 * head, q, 8 * head, c, c_ok, taps + (88 + head_index) * head, 3 * head,
                               row, col, p_ok, height, width, 7, ACC, BLOCK_P, BLOCK_H)  # fmt: skip
    return dv


@triton.jit
def attend_backward_kernel(
    mixed, grad_out, grad_mixed, log_sum, context, grad_context, taps, bias0, bias1, bias2,
    batch, height, width, head: tl.constexpr,
    SCALE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dq = scale dO G^T + dO * E; dv = A dG + turned windows over dO * q; dk = A * (v dG^T - columns' sums).

    The columns' sums of A * dA are the rows' sums of dG * G: no pass of their own.
    """
    tokens = height * width
    tiles = tl.cdiv(tokens, BLOCK_P)
    h = 7 - tl.program_id(0) // (batch * tiles)
    image = (tl.program_id(0) // tiles % batch).to(tl.int64)
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    p_ok = p < tokens
    row = p // width
    col = p % width
    c = tl.arange(0, BLOCK_H)
    c_ok = c < head
    ok = p_ok[:, None] & c_ok[None, :]
    token = image * tokens + p
    part = tl.cast(batch, tl.int64) * tokens * 8 * head
    at = token * 8 * head + h * head
    go_pixel = grad_out + token * 10 * head + h * head
    e = encode(mixed + at + 2 * part, 8 * head, h, head, taps, bias0, bias1, bias2, row, col, p_ok,
               height, width, ACC, BLOCK_P, BLOCK_H)  # fmt: skip
    square = ((image * 8 + h) * head + c)[:, None] * head + c[None, :]
    square_ok = c_ok[:, None] & c_ok[None, :]
    g = tl.load(context + square, mask=square_ok, other=0)
    go = tl.load(go_pixel[:, None] + c[None, :], mask=ok, other=0)
    dq = tl.dot(go, tl.trans(g.to(go.dtype)), input_precision=PRECISION)
    store_tile(grad_mixed + at, c, p_ok, c_ok, SCALE * dq + go.to(ACC) * e)

    dg = tl.load(grad_context + square, mask=square_ok, other=0)
    sums = tl.sum(dg * g, 1)
    offset = tl.load(log_sum + (image * 8 + h) * head + c, mask=c_ok, other=0)
    k = tl.load((mixed + at + part)[:, None] + c[None, :], mask=ok, other=0).to(ACC)
    a = tl.exp(k - offset[None, :])
    v = tl.load((mixed + at + 2 * part)[:, None] + c[None, :], mask=ok, other=0)
    da = tl.dot(v, tl.trans(dg.to(v.dtype)), input_precision=PRECISION)
    store_tile(grad_mixed + at + part, c, p_ok, c_ok, a * (da - sums[None, :]))

    dv = encode_backward(go_pixel, mixed + at, h, head, taps, row, col, p_ok, height, width,
                         ACC, BLOCK_P, BLOCK_H)  # fmt: skip
    dv = tl.dot(a.to(v.dtype), dg.to(v.dtype), dv, input_precision=PRECISION)
    store_tile(grad_mixed + at + 2 * part, c, p_ok, c_ok, dv)


@triton.jit
def position_taps_kernel(
    mixed, grad_out, partial, batch, height, width, head: tl.constexpr, splits,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One window row of one head: 42 slots, 7 rows of heads 5 to 7, 5 of 2 to 4, 3 of 0 and 1.

    partial is (splits, 240 * head): the three weights as (channel, tap), one after the other.
    """
    tokens = height * width
    tiles = tl.cdiv(tokens, BLOCK_P)
    slot = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    kernel = tl.where(slot < 21, 7, tl.where(slot < 36, 5, 3))
    rest = slot - tl.where(slot < 21, 0, tl.where(slot < 36, 21, 36))
    first = tl.where(slot < 21, 5, tl.where(slot < 36, 2, 0))
    u = rest % kernel
    h = first + rest // kernel
    c = tl.arange(0, BLOCK_H)
    c_ok = c < head
    acc = tl.zeros([8, BLOCK_P, BLOCK_H], ACC)
    items = batch * tiles
    each = tl.cdiv(items, splits)
    part = tl.cast(batch, tl.int64) * tokens * 8 * head
    for item in range(split * each, tl.minimum(items, (split + 1) * each)):
        p = item % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
        p_ok = p < tokens
        row = p // width
        col = p % width
        token = tl.cast(item // tiles, tl.int64) * tokens + p
        q_pixel = mixed + token * 8 * head + h * head
        g = load_tile(grad_out + token * 10 * head + h * head, c, p_ok, c_ok, ACC)
        g *= load_tile(q_pixel, c, p_ok, c_ok, ACC)
        v = q_pixel + 2 * part
        if kernel == 7:
            acc += correlate_row(g, v, 8 * head, c, c_ok, u, row, col, p_ok, height, width, 7, 8, ACC)
        elif kernel == 5:
            acc += correlate_row(g, v, 8 * head, c, c_ok, u, row, col, p_ok, height, width, 5, 8, ACC)
        else:
            acc += correlate_row(g, v, 8 * head, c, c_ok, u, row, col, p_ok, height, width, 3, 8, ACC)
    begin = tl.where(slot < 21, 93, tl.where(slot < 36, 18, 0)) * head
    channel = (h - first) * head + c
    columns = tl.arange(0, 8)
    at = channel[None, :] * (kernel * kernel) + u * kernel + columns[:, None]
    to = partial + split.to(tl.int64) * 240 * head + begin
    tl.store(to + at, tl.sum(acc, 1), mask=(columns < kernel)[:, None] & c_ok[None, :])
