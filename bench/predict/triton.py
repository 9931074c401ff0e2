"""The Triton kernels' machine code for sm_90 and how often its loops run. Compiled here, ahead of time."""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch

from .cuda import Launch
from .geometry import Geometry
from .machine import Work
from .sass import Instruction, disassemble, enclosing, exclusive, loops, products

TESTS = Path(__file__).resolve().parents[2] / "tests"  # their recorder and compiler calls serve here too
Compiled = tuple[tuple[Instruction, ...], int, int]  # code, registers, shared bytes
_compiled: dict[tuple, Compiled] = {}


def helper(name: str):
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    return import_module(name)


def recorded(g: Geometry, pass_name: str, dtype: str) -> list:
    """What one call would launch on an H200, from tensors that have sizes but no data."""
    kernels = helper("triton_support").kernels
    launch, operators = kernels("launch"), kernels("depthwise_conv2d")
    recorder = helper("triton_aot").Recorder()
    kind = getattr(torch, "float32" if dtype == "tf32" else dtype)
    x_size = (g.batch, g.channels, g.height, g.width)

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=kind, device="meta")

    x, dy = empty(*x_size), empty(g.batch, g.channels, *g.out)
    weight, geometry = empty(g.channels, 1, *g.kernel), (g.stride, g.padding, g.dilation)
    operators._settled.clear()
    with (
        mock.patch.object(launch, "wrap_triton", recorder),
        mock.patch.object(operators, "tf32_allowed", lambda device: dtype == "tf32"),
    ):
        if pass_name == "forward":
            operators.depthwise_conv2d(x, weight, None, *geometry)
        elif pass_name == "backward_input":
            operators.depthwise_conv2d_backward_input(dy, weight, x_size, *geometry)
        else:
            operators.depthwise_conv2d_backward_weight(dy, x, g.kernel, *geometry)
    return recorder.launches


def compiled(launch) -> Compiled:
    """Machine code, registers and shared memory of a recorded launch; equal specialisations compile once."""
    aot = helper("triton_aot")
    signature, constants, attributes = aot.specialised(launch.kernel, launch.args)
    key = (launch.kernel.__name__, str(signature), str(constants), str(attributes), str(launch.options))
    if key not in _compiled:
        binary = aot.compile_launch(launch, aot.CUDA_TARGETS[90])
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            (code,) = disassemble(Path(file.name)).values()
        used = aot.resources(binary)
        _compiled[key] = (code, used.registers, used.shared)
    return _compiled[key]


def work_of(code: tuple[Instruction, ...], macs: float, kernel_width: int) -> Work:
    """``macs`` multiply-adds through the kernel's innermost loop.

    The direct kernel has a loop over kernel rows around it; small kernels are unrolled and have none.
    """
    found, work = loops(code), Work()
    straight = sum(i.macs for i in code)
    if straight and not any(x.macs for x in found):
        work.add([i for i in code if i.macs], macs / straight)
        return work
    hot = products(found)
    times = macs / hot.macs
    work.add(hot.body, times)
    around = enclosing(found, hot)
    if around is not None:
        work.add(exclusive(around, found), times / kernel_width)
    return work


def outside_loops(code: tuple[Instruction, ...]) -> list[Instruction]:
    """What a warp runs once: addresses before the loop, sums and stores after it."""
    spans = [(x.start, x.end) for x in loops(code) if x.depth == 1]
    end = next(i.address for i in reversed(code) if i.name == "EXIT")
    return [i for i in code if i.address <= end and not any(a <= i.address <= b for a, b in spans)]


def launches(g: Geometry, pass_name: str, dtype: str) -> list[tuple[Launch, int]]:
    """What one call runs, in order, each with its registers a thread."""
    report = helper("triton_support").kernels("report")
    plan = report.plan(
        pass_name, (g.batch, g.channels, g.height, g.width), g.channels, g.kernel, g.stride, g.padding,
        g.dilation, "float32" if dtype == "tf32" else dtype, allow_tf32=dtype == "tf32",
    )[0]  # fmt: skip
    found = []
    for launch in recorded(g, pass_name, dtype):
        code, registers, shared = compiled(launch)
        (blocks,) = launch.grid
        threads = 32 * launch.options.get("num_warps", 4)
        if launch.kernel.__name__ == "reduce_splits_kernel":
            work = Work()
            work.add(code, blocks * threads / 32)
            moved = 0.0  # the plan counts the partial sums with the first launch
        else:
            work, moved = work_of(code, plan["macs"], g.kernel[1]), float(plan["bytes"])
            work.add(outside_loops(code), blocks * threads / 32)
        name = launch.kernel.__name__.removesuffix("_kernel")
        found.append((Launch(name, blocks, threads, shared, work, moved), registers))
    return found
