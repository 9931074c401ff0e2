"""The fold of branch kernels into one dense kernel, and its adjoint, for all branches in one launch.

Operands come as tuples of contiguous tensors, in dtypes of their own. ``GEOMETRY[b]`` holds kernel, offset
and step of branch b, each as height and width: its tap u lies at ``offset + u step`` of the dense kernel.
"""

import triton
import triton.language as tl


@triton.jit
def merge_depthwise_kernels_kernel(
    kernel,
    bias,
    weights,
    scales,
    biases,
    count,
    KH: tl.constexpr,
    KW: tl.constexpr,
    GEOMETRY: tl.constexpr,
    ACC: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program owns BLOCK of the ``count`` = channels * KH * KW taps; a channel's first sums its biases."""
    pid = tl.program_id(0)
    if INT64:
        pid = pid.to(tl.int64)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    ok = i < count
    c = i // (KH * KW)
    tap = i % (KH * KW)
    acc = tl.zeros([BLOCK], ACC)
    for b in tl.static_range(len(weights)):
        down = tap // KW - GEOMETRY[b][2]
        right = tap % KW - GEOMETRY[b][3]
        u = down // GEOMETRY[b][4]
        v = right // GEOMETRY[b][5]
        hit = ok & (down >= 0) & (u < GEOMETRY[b][0]) & (u * GEOMETRY[b][4] == down)
        hit = hit & (right >= 0) & (v < GEOMETRY[b][1]) & (v * GEOMETRY[b][5] == right)
        at = (c * GEOMETRY[b][0] + u) * GEOMETRY[b][1] + v
        weight = tl.load(weights[b] + at, mask=hit, other=0).to(ACC)
        if len(scales) > 0:
            acc = tl.fma(tl.load(scales[b] + c, mask=hit, other=0).to(ACC), weight, acc)
        else:
            acc += weight
    tl.store(kernel + i, acc.to(kernel.dtype.element_ty), mask=ok)
    first = ok & (tap == 0)
    total = tl.zeros([BLOCK], ACC)
    for j in tl.static_range(len(biases)):
        total += tl.load(biases[j] + c, mask=first, other=0).to(ACC)
    tl.store(bias + c, total.to(bias.dtype.element_ty), mask=first)


@triton.jit
def gather_branch(
    kernel,
    weight,
    scale,
    grad_weight,
    grad_scale,
    c,
    KH: tl.constexpr,
    KW: tl.constexpr,
    PLACE: tl.constexpr,
    SCALED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of one branch in channel ``c``. Without a scale, ``grad_scale`` is left alone."""
    taps: tl.constexpr = PLACE[0] * PLACE[1]
    dots = tl.zeros([BLOCK], ACC)
    for start in range(0, taps, BLOCK):
        t = start + tl.arange(0, BLOCK)
        ok = t < taps
        y = PLACE[2] + t // PLACE[1] * PLACE[4]
        x = PLACE[3] + t % PLACE[1] * PLACE[5]
        grad = tl.load(kernel + ((c * KH + y) * KW + x), mask=ok, other=0).to(ACC)
        if SCALED:
            tap = tl.load(weight + (c * taps + t), mask=ok, other=0).to(ACC)
            dots = tl.fma(grad, tap, dots)
            grad = grad * tl.load(scale + c).to(ACC)
        tl.store(grad_weight + (c * taps + t), grad.to(grad_weight.dtype.element_ty), mask=ok)
    if SCALED:
        tl.store(grad_scale + c, tl.sum(dots).to(grad_scale.dtype.element_ty))


@triton.jit
def merge_depthwise_kernels_backward_kernel(
    kernel,
    bias,
    weights,
    scales,
    grad_weights,
    grad_scales,
    grad_biases,
    KH: tl.constexpr,
    KW: tl.constexpr,
    GEOMETRY: tl.constexpr,
    SCALED: tl.constexpr,
    ACC: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program gathers all gradients of one channel from ``kernel`` and ``bias``, the dense gradients.

    Where not SCALED, ``scales`` and ``grad_scales`` are unused, but must be as long as the others.
    """
    c = tl.program_id(0)
    if INT64:
        c = c.to(tl.int64)
    for b in tl.static_range(len(grad_weights)):
        gather_branch(
            kernel,
            weights[b],
            scales[b],
            grad_weights[b],
            grad_scales[b],
            c,
            KH,
            KW,
            GEOMETRY[b],
            SCALED,
            ACC,
            BLOCK,
        )
    for j in tl.static_range(len(grad_biases)):
        tl.store(grad_biases[j] + c, tl.load(bias + c).to(grad_biases[j].dtype.element_ty))
