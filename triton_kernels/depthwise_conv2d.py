"""The three operators ``lkconv_triton::depthwise_conv2d*``: problem -> plan -> launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lkconv._fake import memory_format

from . import tuning
from .keys import conv_key, tf32_allowed, weight_key
from .launch import launch_conv, launch_weight
from .machine import machine_of
from .planner import Plan, plan_conv, plan_weight
from .problem import (
    ConvProblem,
    WeightProblem,
    backward_input_problems,
    backward_weight_problem,
    forward_problem,
    has_rows,
    output_size,
)
from .scratch import copies_output
from .symbolic import hinted, is_real

MAX_SETTLED = 4096
_settled: dict[tuple[object, ...], Plan] = {}


def empty_output(size: Sequence[int], like: Tensor) -> Tensor:
    """Uninitialised (N, C, H, W) in the memory format ``like`` suggests."""
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format(like))


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def run_planned(planner: Callable, key_of: Callable, problem, x: Tensor, execute: Callable[[Plan], None]):
    """Executes the plan chosen for a problem, or the next one where Triton cannot compile it.

    Choices for concrete sizes are remembered: planning costs more than launching.
    """
    facts, tf32 = hinted(problem), tf32_allowed(x.device)
    memo = (facts, x.dtype, x.device, tf32, tuning.enabled())
    while True:
        plan = _settled.get(memo)
        if plan is None:
            plans, _ = planner(facts, dtype_name(x), machine_of(x.device), tf32)
            key = key_of(facts, dtype_name(x), x.device, tf32)
            plan, settled = tuning.choose(key, plans, timer(x, execute))
            if settled:
                remember(memo, plan)
        try:
            return execute(plan)
        except Exception as error:
            if not tuning.reject(key_of(facts, dtype_name(x), x.device, tf32), plan, error):
                raise
            _settled.pop(memo, None)


def remember(memo: tuple[object, ...], plan: Plan) -> None:
    if len(_settled) >= MAX_SETTLED:
        _settled.clear()
    _settled[memo] = plan


def timer(x: Tensor, run: Callable[[Plan], None]) -> Callable[[Plan], float] | None:
    """Measures a plan in milliseconds, or None while tensors are fake or a graph is being captured."""
    if not is_real(x) or x.device.type in ("cpu", "meta"):
        return None
    if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    from triton.testing import do_bench

    def measure(plan: Plan) -> float:
        return do_bench(lambda: run(plan), warmup=5, rep=20, return_mode="median")

    return measure


def rows_of(x: Tensor) -> Tensor:
    """``x`` with neighbouring columns adjacent in memory, copied only if they are not."""
    return x if has_rows(x.stride(), x.size(3)) else x.contiguous()


def run_conv(problem: ConvProblem, x: Tensor, w: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Runs one convolution problem into ``y``, which may be any strided view."""
    run_planned(plan_conv, conv_key, problem, x, lambda plan: execute_conv(plan, problem, x, w, bias, y))


def execute_conv(plan: Plan, p: ConvProblem, x: Tensor, w: Tensor, bias: Tensor | None, y: Tensor) -> None:
    if not plan.needs_rows:
        launch_conv(plan, p, x, w, bias, y)
        return
    x = rows_of(x)
    if copies_output(p):
        rows = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        launch_conv(plan, p.with_strides(x.stride(), rows.stride()), x, w, bias, rows)
        y.copy_(rows)
    else:
        launch_conv(plan, p.with_strides(x.stride(), p.y_strides), x, w, bias, y)


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Depthwise convolution of (N, C, H, W) with (C * m, 1, kh, kw); see ``lkconv.depthwise_conv2d``."""
    height, width = (
        output_size(input.size(2 + i), weight.size(2 + i), stride[i], padding[i], dilation[i]) for i in (0, 1)
    )
    output = empty_output((input.size(0), weight.size(0), height, width), input)
    if output.numel() == 0:
        return output
    problem = forward_problem(
        input.shape, input.stride(), weight.shape, weight.stride(), output.stride(), stride, padding, dilation
    )
    run_conv(problem, input, weight, bias if bias is None else bias.contiguous(), output)
    return output


def depthwise_conv2d_backward_input(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Gradient of the input, (N, C, H, W) = ``input_size``: one convolution per stride phase."""
    grad_input = empty_output(input_size, grad_output)
    if grad_input.numel() == 0:
        return grad_input
    if grad_output.numel() == 0:
        return grad_input.zero_()
    problems, complete = backward_input_problems(
        input_size,
        grad_output.shape,
        grad_output.stride(),
        weight.shape,
        weight.stride(),
        grad_input.stride(),
        stride,
        padding,
        dilation,
    )
    if not complete:
        grad_input.zero_()
    for problem in problems:
        if problem.h.size_out > 0 and problem.w.size_out > 0:
            run_conv(problem, grad_output, weight, None, grad_input)
    return grad_input


def depthwise_conv2d_backward_weight(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Gradient of the weight, (C * m, 1, kh, kw): split over pixels, summed in a fixed order."""
    size = (grad_output.size(1), 1, kernel_size[0], kernel_size[1])
    grad_weight = torch.empty(size, dtype=input.dtype, device=input.device)
    if grad_weight.numel() == 0:
        return grad_weight
    if grad_output.numel() == 0 or input.numel() == 0:
        return grad_weight.zero_()
    problem = backward_weight_problem(
        input.shape,
        input.stride(),
        grad_output.shape,
        grad_output.stride(),
        kernel_size,
        stride,
        padding,
        dilation,
    )

    def execute(plan: Plan) -> None:
        execute_weight(plan, problem, input, grad_output, grad_weight)

    run_planned(plan_weight, weight_key, problem, input, execute)
    return grad_weight


def execute_weight(plan: Plan, p: WeightProblem, x: Tensor, dy: Tensor, out: Tensor) -> None:
    if plan.needs_rows:
        x, dy = rows_of(x), rows_of(dy)
        p = p.with_strides(x.stride(), dy.stride())
    launch_weight(plan, p, x, dy, out)
