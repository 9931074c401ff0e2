"""The operators ``lkconv_triton::group_mix_*``: sizes -> blocks -> launches.

Schemas, layouts and meanings are those of the CPU's ops (``csrc/cpu/group_mix_ops.cpp``). Arguments were
validated in Python before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .group_mix_aggregate import aggregate_kernel, normalize_kernel, pack_taps_kernel
from .group_mix_attention import (
    attend_backward_kernel,
    attend_kernel,
    context_kernel,
    grad_context_kernel,
    merge_context_kernel,
    position_taps_kernel,
)
from .group_mix_backward import pointwise_kernel, reduce_kernel, spread_kernel, taps_kernel, weight_kernel
from .group_mix_planner import Blocks, blocks_for, splits_for
from .keys import tf32_allowed
from .launch import REDUCE_BLOCK, ceil_div, device_guard, needs_int64, triton_dtype, wrap_triton
from .machine import machine_of
from .reduce import reduce_splits_kernel
from .symbolic import hint

HEADS = 8
PACK_BLOCK = 1024
Tensors = Sequence[Tensor]


class Sizes(NamedTuple):
    """Of one call: images, image size, d, blocks of the kernels, accumulation type, precision of products."""

    batch: Any
    height: Any
    width: Any
    d: int
    blocks: Blocks
    wide: torch.dtype
    precision: str

    @property
    def tokens(self) -> Any:
        return self.height * self.width

    @property
    def tiles(self) -> Any:
        return ceil_div(self.tokens, self.blocks.pixels)

    def splits(self, programs: Any, tiles: Any, device: torch.device) -> int:
        return splits_for(hint(programs), hint(tiles), machine_of(device))


def wide_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def sizes_of(t: Tensor, batch: Any, height: Any, width: Any, d: Any) -> Sizes:
    """The aggregation's; products follow torch's switch for convolutions."""
    d = int(hint(d))
    precision = "tf32" if t.dtype == torch.float32 and tf32_allowed(t.device) else "ieee"
    return Sizes(batch, height, width, d, blocks_for(d, t.element_size()), wide_dtype(t), precision)


def dense(tensors: Tensors) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def pack(weights: Tensors, width: int, dtype: torch.dtype, position: bool) -> Tensor:
    """Depthwise weights as (tap, channel) in the dtype of the tokens."""
    w = dense(weights)
    out = torch.empty((240 if position else 110) * width, dtype=dtype, device=w[0].device)
    largest = 147 * width if position else 49 * width
    wrap_triton(pack_taps_kernel)[(ceil_div(largest, PACK_BLOCK),)](
        w[0], w[1], w[2], w[0] if position else w[3], out, width, POSITION=position, BLOCK=PACK_BLOCK
    )
    return out


def add_splits(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """(splits, n) -> (n,), in the order of the splits."""
    splits, numel = partial.shape
    out = torch.empty(numel, dtype=dtype, device=partial.device)
    wrap_triton(reduce_splits_kernel)[(ceil_div(numel, REDUCE_BLOCK),)](
        partial, out, numel, splits, INT64=needs_int64(((splits, numel), (numel, 1))), BLOCK=REDUCE_BLOCK
    )
    return out


# ---- aggregation, forward ---------------------------------------------------------------------------------
def launch_aggregate(
    s: Sizes, qkv: Tensor, outputs: Tensors, depthwise: Tensors, pointwise: Tensors, norms: Tensors,
    layer_norm: Tensors, train: bool, eps: float, layer_norm_eps: float,
) -> None:  # fmt: skip
    """``outputs``: mixed, premix, prelocal, local, partial; what a mode does not write is any tensor."""
    b = s.blocks
    taps = pack(depthwise, s.d, qkv.dtype, False)
    wrap_triton(aggregate_kernel)[(13 * s.batch * s.tiles,)](
        qkv, *outputs, taps, *dense(pointwise), *dense(norms), *dense(layer_norm), s.batch, s.height,
        s.width, s.d,
        TRAIN=train, EPS=eps, LN_EPS=layer_norm_eps, ACC=triton_dtype(s.wide), PRECISION=s.precision,
        BLOCK_P=b.pixels, BLOCK_I=b.inputs, BLOCK_O=b.outputs, num_warps=b.num_warps, num_stages=1,
    )  # fmt: skip


def group_mix_aggregate(
    qkv: Tensor, height: int, width: int, depthwise: Tensors, pointwise: Tensors, norm_weight: Tensors,
    norm_bias: Tensors, norm_mean: Tensors, norm_var: Tensors, layer_norm_weight: Tensor,
    layer_norm_bias: Tensor,
    eps: float, layer_norm_eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Evaluation, one pass: mixed (3, B, N, 4 * d) and local (B, N, d)."""
    batch, tokens, channels = qkv.shape
    s = sizes_of(qkv, batch, height, width, channels // 15)
    mixed = torch.empty((3, batch, tokens, 4 * s.d), dtype=qkv.dtype, device=qkv.device)
    local = torch.empty((batch, tokens, s.d), dtype=qkv.dtype, device=qkv.device)
    if mixed.numel() == 0:
        return mixed, local
    norms = [*norm_weight, *norm_bias, *norm_mean, *norm_var]
    with device_guard(qkv):
        launch_aggregate(
            s, qkv.contiguous(), (mixed, mixed, local, local, mixed), depthwise, pointwise, norms,
            (layer_norm_weight, layer_norm_bias), False, eps, layer_norm_eps,
        )  # fmt: skip
    return mixed, local


def group_mix_mix(
    qkv: Tensor, height: int, width: int, depthwise: Tensors, pointwise: Tensors, layer_norm_weight: Tensor,
    layer_norm_bias: Tensor, layer_norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Training, first pass: premix, prelocal, local, and the batch's mean and biased variance (4, d)."""
    batch, tokens, channels = qkv.shape
    s = sizes_of(qkv, batch, height, width, channels // 15)
    premix = torch.empty((3, batch, tokens, 3 * s.d), dtype=qkv.dtype, device=qkv.device)
    prelocal = torch.empty((batch, tokens, s.d), dtype=qkv.dtype, device=qkv.device)
    local = torch.empty_like(prelocal)
    if premix.numel() == 0:
        nothing = torch.full((4, s.d), float("nan"), dtype=s.wide, device=qkv.device)
        return premix, prelocal, local, nothing, nothing.clone()
    partial = torch.empty((4, 3 * batch, s.tiles, 2, s.d), dtype=s.wide, device=qkv.device)
    unused = [layer_norm_weight] * 16
    with device_guard(qkv):
        launch_aggregate(
            s, qkv.contiguous(), (premix, premix, prelocal, local, partial), depthwise, pointwise, unused,
            (layer_norm_weight, layer_norm_bias), True, 0.0, layer_norm_eps,
        )  # fmt: skip
    mean, var = merge_statistics(partial, tokens, s.blocks.pixels)
    return premix, prelocal, local, mean, var


def merge_statistics(partial: Tensor, tokens: Any, pixels: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance from (4, images, tiles, 2, d): means and squared differences of tiles."""
    images, tiles = partial.shape[1:3]
    begins = torch.arange(tiles, dtype=torch.float64, device=partial.device) * pixels
    share = ((tokens - begins).clamp(max=pixels) / (images * tokens))[None, None, :, None]
    means, squares = partial.double().unbind(3)
    mean = (means * share).sum((1, 2))
    spread = (means - mean[:, None, None]) ** 2 * share
    var = spread.sum((1, 2)) + squares.sum((1, 2)) / (images * tokens)
    return mean.to(partial.dtype), var.to(partial.dtype)


def group_mix_normalize(
    qkv: Tensor,
    premix: Tensor,
    norm_weight: Tensors,
    norm_bias: Tensors,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> Tensor:
    """Training, second pass: mixed (3, B, N, 4 * d)."""
    batch, tokens, channels = qkv.shape
    s = sizes_of(qkv, batch, 1, tokens, channels // 15)
    mixed = torch.empty((3, batch, tokens, 4 * s.d), dtype=qkv.dtype, device=qkv.device)
    if mixed.numel() == 0:
        return mixed
    lines = batch * tokens
    with device_guard(qkv):
        wrap_triton(normalize_kernel)[(4 * ceil_div(3 * lines, s.blocks.pixels),)](
            qkv.contiguous(), premix.contiguous(), mixed, *dense(norm_weight), *dense(norm_bias),
            *dense((mean, var)), lines, s.d, EPS=eps, ACC=triton_dtype(s.wide), BLOCK_P=s.blocks.pixels,
            BLOCK_O=s.blocks.outputs, num_warps=s.blocks.num_warps,
        )  # fmt: skip
    return mixed


# ---- aggregation, backward --------------------------------------------------------------------------------
def side_by_side(parts: Tensors) -> Tensor:
    """(3, B, N, 4d) of one such tensor or of the three of q, k and v."""
    return parts[0].contiguous() if len(parts) == 1 else torch.stack(list(parts))


def group_mix_backward_reduce(
    grad_mixed: Tensors, qkv: Tensor, premix: Tensor, norm_weight: Tensors, norm_bias: Tensors, mean: Tensor,
    var: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """(2, 4, d) in float64: sums of dA and of dA times the normalised U."""
    batch, tokens, channels = qkv.shape
    s = sizes_of(qkv, batch, 1, tokens, channels // 15)
    if qkv.numel() == 0:
        return torch.zeros((2, 4, s.d), dtype=torch.float64, device=qkv.device)
    lines = batch * tokens
    splits = s.splits(4, ceil_div(3 * lines, s.blocks.pixels), qkv.device)
    partial = torch.empty((splits, 8 * s.d), dtype=s.wide, device=qkv.device)
    with device_guard(qkv):
        wrap_triton(reduce_kernel)[(4 * splits,)](
            side_by_side(grad_mixed), qkv.contiguous(), premix.contiguous(), partial, *dense(norm_weight),
            *dense(norm_bias), *dense((mean, var)), lines, s.d, splits, EPS=eps, ACC=triton_dtype(s.wide),
            BLOCK_P=s.blocks.pixels, BLOCK_O=s.blocks.outputs, num_warps=s.blocks.num_warps,
        )  # fmt: skip
        return add_splits(partial, torch.float64).view(2, 4, s.d)


def dense_channels(t: Tensor) -> Tensor:
    """grad_local is a slice of the output's gradient: its tokens may lie apart, its channels may not."""
    return t if t.stride(2) == 1 else t.contiguous()


def group_mix_backward(
    grad_mixed: Tensors, grad_local: Tensor, qkv: Tensor, premix: Tensor, prelocal: Tensor, height: int,
    width: int,
    depthwise: Tensors, pointwise: Tensors, norm_weight: Tensors, norm_bias: Tensors, mean: Tensor,
    var: Tensor,
    layer_norm_weight: Tensor, layer_norm_bias: Tensor, eps: float, layer_norm_eps: float,
    sums: Tensor | None,
    count: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """grad_qkv, and the flat gradients of depthwise, pointwise and LayerNorm's parameters."""
    batch, _, channels = qkv.shape
    s = sizes_of(qkv, batch, height, width, channels // 15)
    b, d = s.blocks, s.d
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    parameters = 112 * d + 6 * d * d
    if qkv.numel() == 0:
        return grad_qkv, torch.zeros(parameters, dtype=s.wide, device=qkv.device)
    qkv, grad_local = qkv.contiguous(), dense_channels(grad_local)
    grad_t = torch.empty((batch, s.tokens, 12 * d), dtype=qkv.dtype, device=qkv.device)
    means = mean if sums is None else sums / count
    read = (side_by_side(grad_mixed), grad_local, qkv, premix.contiguous(), prelocal.contiguous())
    statistics = dense((means, mean, var))
    norms = dense((*norm_weight, *norm_bias, layer_norm_weight, layer_norm_bias))
    image = (batch, height, width, d)
    strides = grad_local.stride()[:2]
    options = {
        "HAS_MEANS": sums is not None, "EPS": eps, "LN_EPS": layer_norm_eps, "ACC": triton_dtype(s.wide),
        "PRECISION": s.precision, "BLOCK_I": b.inputs, "BLOCK_O": b.outputs, "num_warps": b.num_warps,
        "num_stages": 1,
    }  # fmt: skip
    slots = 6 * ceil_div(d, b.inputs)
    splits = s.splits(slots, batch * ceil_div(s.tokens, b.sum_pixels), qkv.device)
    partial = torch.empty((splits, parameters), dtype=s.wide, device=qkv.device)
    with device_guard(qkv):
        taps = pack(depthwise, d, s.wide, False)
        wrap_triton(pointwise_kernel)[(13 * batch * s.tiles,)](
            *read, grad_qkv, grad_t, *statistics, *dense(pointwise), *norms, *image, *strides,
            BLOCK_P=b.pixels, **options,
        )  # fmt: skip
        launch_spread(s, grad_t, grad_qkv, taps)
        wrap_triton(weight_kernel)[(slots * splits,)](
            *read,
            partial,
            taps,
            *statistics,
            *norms,
            *image,
            *strides,
            splits,
            BLOCK_P=b.sum_pixels,
            **options,
        )
        launch_taps(s, qkv, grad_t, partial)
        return grad_qkv, add_splits(partial, s.wide)


def launch_spread(s: Sizes, grad_t: Tensor, grad_qkv: Tensor, taps: Tensor) -> None:
    b = s.blocks
    programs = 12 * s.batch * ceil_div(s.d, b.inputs) * s.tiles
    wrap_triton(spread_kernel)[(programs,)](
        grad_t, grad_qkv, taps, s.batch, s.height, s.width, s.d, ACC=triton_dtype(s.wide), BLOCK_P=b.pixels,
        BLOCK_C=b.inputs, num_warps=b.num_warps,
    )  # fmt: skip


def launch_taps(s: Sizes, qkv: Tensor, grad_t: Tensor, partial: Tensor) -> None:
    b, splits = s.blocks, partial.shape[0]
    wrap_triton(taps_kernel)[(24 * ceil_div(s.d, b.inputs) * splits,)](
        qkv, grad_t, partial, s.batch, s.height, s.width, s.d, splits, ACC=triton_dtype(s.wide),
        BLOCK_P=b.window_pixels, BLOCK_C=b.inputs, num_warps=b.num_warps,
    )  # fmt: skip


# ---- attention core ---------------------------------------------------------------------------------------
def attention_sizes(mixed: Tensor, height: Any, width: Any) -> tuple[Sizes, dict[str, Any]]:
    """Sizes with blocks for heads, and the kernels' shared options; products follow torch's for matmul."""
    d = int(hint(mixed.shape[3])) // 4
    tf32 = (
        mixed.dtype == torch.float32
        and mixed.device.type == "cuda"
        and torch.version.hip is None
        and torch.backends.cuda.matmul.fp32_precision == "tf32"  # type: ignore[attr-defined]
    )
    blocks = blocks_for(d // 2, mixed.element_size())
    s = Sizes(mixed.shape[1], height, width, d, blocks, wide_dtype(mixed), "tf32" if tf32 else "ieee")
    options = {
        "ACC": triton_dtype(s.wide), "BLOCK_P": blocks.pixels, "BLOCK_H": blocks.outputs,
        "num_warps": blocks.num_warps, "num_stages": 1,
    }  # fmt: skip
    return s, options


def group_mix_attention(
    mixed: Tensor, local: Tensor, height: int, width: int, position_weight: Tensors, position_bias: Tensors,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out (B, N, 5 * d), log_sum (B, 4 * d) and context (B, 8, d / 2, d / 2)."""
    s, options = attention_sizes(mixed, height, width)
    batch, tokens, head = s.batch, mixed.shape[2], s.d // 2
    out = torch.empty((batch, tokens, 5 * s.d), dtype=mixed.dtype, device=mixed.device)
    log_sum = torch.empty((batch, 4 * s.d), dtype=s.wide, device=mixed.device)
    context = torch.empty((batch, HEADS, head, head), dtype=s.wide, device=mixed.device)
    if out.numel() == 0:
        return out, log_sum, context
    mixed = mixed.contiguous()
    pairs = HEADS * batch
    splits = s.splits(pairs, s.tiles, mixed.device)
    partial = torch.empty((splits, pairs, head, 2 + head), dtype=s.wide, device=mixed.device)
    with device_guard(mixed):
        taps = pack(position_weight, head, mixed.dtype, True)
        wrap_triton(context_kernel)[(pairs * splits,)](
            mixed, partial, batch, tokens, head, splits, PRECISION=s.precision, **options
        )
        wrap_triton(merge_context_kernel)[(pairs,)](
            partial, log_sum, context, pairs, head, splits, ACC=options["ACC"], BLOCK_H=options["BLOCK_H"]
        )
        wrap_triton(attend_kernel)[(10 * batch * s.tiles,)](
            mixed, local.contiguous(), out, context, taps, *dense(position_bias), batch, height, width, head,
            SCALE=scale, PRECISION=s.precision, **options,
        )  # fmt: skip
    return out, log_sum, context


def group_mix_attention_backward(
    grad_out: Tensor, mixed: Tensor, log_sum: Tensor, context: Tensor, height: int, width: int,
    position_weight: Tensors, position_bias: Tensors, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """grad_mixed, and the flat gradients of position_weight and position_bias."""
    s, options = attention_sizes(mixed, height, width)
    batch, tokens, head = s.batch, mixed.shape[2], s.d // 2
    grad_mixed = torch.empty(mixed.shape, dtype=mixed.dtype, device=mixed.device)
    if mixed.numel() == 0:
        return grad_mixed, torch.zeros(248 * head, dtype=s.wide, device=mixed.device)
    mixed, grad_out, context = mixed.contiguous(), grad_out.contiguous(), context.contiguous()
    pairs = HEADS * batch
    splits = s.splits(pairs, s.tiles, mixed.device)
    partial = torch.empty((splits, pairs * head * head), dtype=s.wide, device=mixed.device)
    bias_partial = torch.empty((splits * batch, HEADS * head), dtype=s.wide, device=mixed.device)
    with device_guard(mixed):
        taps = pack(position_weight, head, mixed.dtype, True)
        wrap_triton(grad_context_kernel)[(pairs * splits,)](
            mixed, grad_out, partial, bias_partial, batch, tokens, head, splits, SCALE=scale,
            PRECISION=s.precision, **options,
        )  # fmt: skip
        grad_context = add_splits(partial, s.wide)
        wrap_triton(attend_backward_kernel)[(HEADS * batch * s.tiles,)](
            mixed, grad_out, grad_mixed, log_sum.contiguous(), context, grad_context, taps,
            *dense(position_bias),
            batch, height, width, head, SCALE=scale, PRECISION=s.precision, **options,
        )  # fmt: skip
        grad_weight = launch_position_taps(s, mixed, grad_out)
        grad_bias = bias_partial.sum(0)
    return grad_mixed, torch.cat([grad_weight, grad_bias])


def launch_position_taps(s: Sizes, mixed: Tensor, grad_out: Tensor) -> Tensor:
    """The flat gradient of the three position weights."""
    b, head = s.blocks, s.d // 2
    pixels = max(1, b.window_pixels * b.inputs // b.outputs)
    tiles = s.batch * ceil_div(s.tokens, pixels)
    splits = s.splits(42, tiles, mixed.device)
    partial = torch.empty((splits, 240 * head), dtype=s.wide, device=mixed.device)
    wrap_triton(position_taps_kernel)[(42 * splits,)](
        mixed, grad_out, partial, s.batch, s.height, s.width, head, splits, ACC=triton_dtype(s.wide),
        BLOCK_P=pixels, BLOCK_H=b.outputs, num_warps=b.num_warps,
    )  # fmt: skip
    return add_splits(partial, s.wide)
