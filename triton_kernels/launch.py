"""Launches one kernel for one plan. Everything a kernel is told comes from the problem and the plan."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from .direct import conv_direct_kernel
from .direct_weight import weight_direct_kernel
from .planner import Plan, weight_window
from .problem import ConvProblem, WeightProblem
from .reduce import reduce_splits_kernel
from .symbolic import is_real
from .toeplitz import conv_toeplitz_kernel
from .toeplitz_weight import weight_toeplitz_kernel

REDUCE_BLOCK = 256
MAX_BLOCK = 1024  # the last block of a launch counts this far past the end


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, decided when they were defined."""
    return type(conv_direct_kernel).__name__ == "InterpretedFunction"


def wrap_triton(kernel):
    """torch.library.wrap_triton, but for the interpreter, whose functions torch does not know."""
    return kernel if interpreting() else torch.library.wrap_triton(kernel)


def device_guard(tensor: torch.Tensor):
    """Makes the tensor's device current: Triton launches on the current device and its current stream."""
    if tensor.device.type in ("cpu", "meta") or not is_real(tensor):
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device.type).device(tensor.device)


def triton_dtype(dtype: torch.dtype):
    """The dtype sums are kept in: float64 for double, float32 for everything else."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def vector_width(tensor: torch.Tensor, width: int, strides: Sequence[int]) -> int:
    """Elements of a 16-byte access at which every row starts and ends."""
    vec = 16 // tensor.element_size()
    while vec > 1 and any(size % vec != 0 for size in (width, *strides)):
        vec //= 2
    return vec


def needs_int64(*extents: tuple[Sequence[int], Sequence[int]]) -> bool:
    """Whether an element offset of any (sizes, strides) can pass 2^31, a block beyond the end included."""
    return any(reach(sizes, strides) >= 2**31 for sizes, strides in extents)


def reach(sizes: Sequence[int], strides: Sequence[int]):
    return sum(
        abs(stride) * (size + MAX_BLOCK if i == 0 else size)
        for i, (size, stride) in enumerate(zip(sizes, strides, strict=True))
    )


def ceil_div(a, b):
    return (a + b - 1) // b


def conv_needs_int64(p: ConvProblem, pixels) -> bool:
    x_channels = ceil_div(p.channels, p.multiplier) * p.reduce
    return needs_int64(
        (
            (
                p.batch,
                x_channels,
                p.h.size_in + p.h.taps * p.h.dilation,
                p.w.size_in + p.w.taps * p.w.dilation,
            ),
            p.x_strides,
        ),
        ((p.batch, p.channels, p.h.size_out, p.w.size_out), p.y_strides),
        ((pixels,), (1,)),
    )


def launch_conv(plan: Plan, p: ConvProblem, x, w, bias, y) -> None:
    if plan.algorithm == "toeplitz":
        launch_conv_toeplitz(plan, p, x, w, bias, y)
    else:
        launch_conv_direct(plan, p, x, w, bias, y)


def launch_conv_direct(plan: Plan, p: ConvProblem, x, w, bias, y) -> None:
    pixels = p.batch * p.h.size_out * p.w.size_out
    grid = (ceil_div(pixels, plan.blocks["BLOCK_P"]) * ceil_div(p.channels, plan.blocks["BLOCK_C"]),)
    with device_guard(x):
        wrap_triton(conv_direct_kernel)[grid](
            x,
            w,
            w if bias is None else bias,
            y,
            pixels,
            p.channels,
            p.multiplier,
            p.h.size_in,
            p.w.size_in,
            p.h.size_out,
            p.w.size_out,
            p.h.padding,
            p.w.padding,
            *p.x_strides,
            *p.w_strides,
            *p.y_strides,
            p.w_offset,
            p.y_offset,
            REDUCE=int(p.reduce),
            KH=int(p.h.taps),
            KW=int(p.w.taps),
            STRIDE_H=int(p.h.stride),
            STRIDE_W=int(p.w.stride),
            DIL_H=int(p.h.dilation),
            DIL_W=int(p.w.dilation),
            HAS_BIAS=bias is not None,
            ACC=triton_dtype(x.dtype),
            INT64=conv_needs_int64(p, pixels),
            **plan.blocks,
            num_warps=plan.num_warps,
            num_stages=plan.num_stages,
        )


def launch_conv_toeplitz(plan: Plan, p: ConvProblem, x, w, bias, y) -> None:
    rows = p.batch * p.h.size_out
    blocks = plan.blocks
    grid = (ceil_div(rows, blocks["BLOCK_M"]) * ceil_div(p.w.size_out, blocks["BLOCK_T"]) * p.channels,)
    vec = vector_width(x, p.w.size_in, p.x_strides[:3])
    with device_guard(x):
        wrap_triton(conv_toeplitz_kernel)[grid](
            x,
            w,
            w if bias is None else bias,
            y,
            rows,
            p.multiplier,
            p.h.size_in,
            p.w.size_in // vec,
            p.h.size_out,
            p.w.size_out,
            p.h.padding,
            p.w.padding,
            *(stride // vec for stride in p.x_strides[:3]),
            *p.w_strides,
            *p.y_strides,
            p.w_offset,
            p.y_offset,
            REDUCE=int(p.reduce),
            KH=int(p.h.taps),
            KW=int(p.w.taps),
            STRIDE_H=int(p.h.stride),
            STRIDE_W=int(p.w.stride),
            DIL_H=int(p.h.dilation),
            DIL_W=int(p.w.dilation),
            HAS_BIAS=bias is not None,
            INT64=conv_needs_int64(p, rows),
            VEC=vec,
            PRECISION=plan.precision,
            **blocks,
            num_warps=plan.num_warps,
            num_stages=plan.num_stages,
        )


def launch_weight(plan: Plan, p: WeightProblem, x, dy, out) -> None:
    """``out`` (C * m, 1, kh, kw) contiguous. Partial sums go to scratch and are added in a second launch."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = torch.empty((plan.splits, *out.shape), dtype=acc, device=x.device)
    if plan.algorithm == "toeplitz":
        launch_weight_toeplitz(plan, p, x, dy, partial)
    else:
        launch_weight_direct(plan, p, x, dy, partial)
    numel = out.numel()
    with device_guard(x):
        wrap_triton(reduce_splits_kernel)[(ceil_div(numel, REDUCE_BLOCK),)](
            partial,
            out,
            numel,
            plan.splits,
            INT64=needs_int64(((plan.splits, numel), (numel, 1))),
            BLOCK=REDUCE_BLOCK,
        )


def weight_needs_int64(p: WeightProblem, partial: torch.Tensor) -> bool:
    x_channels = ceil_div(p.channels, p.multiplier)
    return needs_int64(
        (
            (
                p.batch,
                x_channels,
                p.h.size_in + p.h.taps * p.h.dilation,
                p.w.size_in + p.w.taps * p.w.dilation,
            ),
            p.x_strides,
        ),
        ((p.batch, p.channels, p.h.size_out, p.w.size_out), p.dy_strides),
        ((p.batch * p.h.size_out * p.w.size_out,), (1,)),
        ((partial.numel(),), (1,)),
    )


def launch_weight_direct(plan: Plan, p: WeightProblem, x, dy, partial) -> None:
    pixels = p.batch * p.h.size_out * p.w.size_out
    blocks = plan.blocks
    tiles = ceil_div(p.h.taps * p.w.taps, blocks["BLOCK_U"]) * ceil_div(p.channels, blocks["BLOCK_C"])
    with device_guard(x):
        wrap_triton(weight_direct_kernel)[(tiles * plan.splits,)](
            x,
            dy,
            partial,
            pixels,
            ceil_div(ceil_div(pixels, blocks["BLOCK_P"]), plan.splits),
            plan.splits,
            p.channels,
            p.multiplier,
            p.h.size_in,
            p.w.size_in,
            p.h.size_out,
            p.w.size_out,
            p.h.padding,
            p.w.padding,
            *p.x_strides,
            *p.dy_strides,
            KH=int(p.h.taps),
            KW=int(p.w.taps),
            STRIDE_H=int(p.h.stride),
            STRIDE_W=int(p.w.stride),
            DIL_H=int(p.h.dilation),
            DIL_W=int(p.w.dilation),
            ACC=triton_dtype(x.dtype),
            INT64=weight_needs_int64(p, partial),
            **blocks,
            num_warps=plan.num_warps,
            num_stages=plan.num_stages,
        )


def launch_weight_toeplitz(plan: Plan, p: WeightProblem, x, dy, partial) -> None:
    rows = p.batch * p.h.size_out
    blocks = plan.blocks
    steps = ceil_div(rows, blocks["BLOCK_R"]) * ceil_div(p.w.size_out, blocks["BLOCK_T"])
    vec_x = vector_width(x, p.w.size_in, p.x_strides[:3])
    vec_dy = vector_width(dy, p.w.size_out, p.dy_strides[:3])
    window, reach = weight_window(p.w, blocks["BLOCK_T"], 16 // x.element_size())
    if reach > blocks["WINDOW"]:
        raise AssertionError(f"planned a window of {blocks['WINDOW']} columns, but {reach} are reached")
    with device_guard(x):
        wrap_triton(weight_toeplitz_kernel)[
            (p.channels * ceil_div(p.h.taps, blocks["BLOCK_U"]) * plan.splits,)
        ](
            x,
            dy,
            partial,
            rows,
            steps,
            ceil_div(steps, plan.splits),
            plan.splits,
            p.channels,
            p.multiplier,
            p.h.size_in,
            p.w.size_in // vec_x,
            p.h.size_out,
            p.w.size_out,
            p.h.padding,
            p.w.padding,
            window // vec_x,
            *(stride // vec_x for stride in p.x_strides[:3]),
            *(stride // vec_dy for stride in p.dy_strides[:3]),
            KH=int(p.h.taps),
            KW=int(p.w.taps),
            STRIDE_H=int(p.h.stride),
            STRIDE_W=int(p.w.stride),
            DIL_H=int(p.h.dilation),
            DIL_W=int(p.w.dilation),
            INT64=weight_needs_int64(p, partial),
            VEC_X=vec_x,
            VEC_DY=vec_dy,
            PRECISION=plan.precision,
            **blocks,
            num_warps=plan.num_warps,
            num_stages=plan.num_stages,
        )
