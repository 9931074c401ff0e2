"""Compiles the kernels for GPUs this machine does not have, with the arguments a real launch would pass."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import namedtuple
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}

CUDA_TARGETS = {80: GPUTarget("cuda", 80, 32), 90: GPUTarget("cuda", 90, 32), 100: GPUTarget("cuda", 100, 32)}
HIP_TARGET = GPUTarget("hip", "gfx942", 64)

Launch = namedtuple("Launch", "kernel grid args options")
Resources = namedtuple("Resources", "registers stack shared")


class Recorder:
    """Stands in for wrap_triton: keeps what would have been launched."""

    def __init__(self):
        self.launches: list[Launch] = []

    def __call__(self, kernel):
        def at(grid):
            def run(*args, **kwargs):
                options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
                bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
                self.launches.append(Launch(kernel, grid, bound, options))

            return run

        return type("Grid", (), {"__getitem__": lambda _, grid: at(grid)})()


def specialised(kernel, bound):
    """(signature, constants, attributes) as the just-in-time compiler would specialise these arguments."""
    signature, constants, attributes = {}, {}, {}

    def argument(value, path, constant=False):
        if isinstance(value, tuple) and not constant:
            return tuple(argument(v, (*path, i)) for i, v in enumerate(value))
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return POINTERS[value.dtype]
        if constant or value == 1:
            constants[path] = value
            return "constexpr"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for index, param in enumerate(kernel.params):
        signature[param.name] = argument(bound[param.name], (index,), param.is_constexpr)
    return signature, constants, attributes


def compile_launch(launch: Launch, target: GPUTarget):
    signature, constants, attributes = specialised(launch.kernel, launch.args)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=launch.options)


def resources(compiled) -> Resources:
    """Registers and stack bytes (spills) from a CUDA kernel's cubin; shared bytes from Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    text = report.stdout + report.stderr
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", text))
    stack = max(int(n) for n in re.findall(r"STACK:(\d+)", text))
    return Resources(registers, stack, compiled.metadata.shared)
