"""Peak extra memory of a training step, in a fresh process for each implementation.

On a CPU it is the growth of the resident set's high-water mark, which also sees scratch memory that
never passes through torch's allocator; on a GPU it is what the caching allocator handed out.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench import machine

# name, (N, C, H, W), kernel: forward FFT, dense and small-kernel layers
CASES = (
    ("RepLKNet-31B stage 1", (4, 128, 56, 56), 31),
    ("RepLKNet-31B stage 3", (16, 512, 14, 14), 27),
    ("RepLKNet-31B stage 4", (16, 1024, 7, 7), 13),
    ("ConvNeXt-T stage 1", (8, 96, 56, 56), 7),
)
MEGABYTE = 1 << 20


def _resident(field: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS (now) or VmHWM (its high-water mark)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")


def _freed_memory_taken(libc: ctypes.CDLL) -> list[int]:
    """Blocks that the caller frees: what malloc_trim leaves resident at the end of a heap.

    A heap that is not the process's first, or that something else has grown past, keeps its end. Blocks are
    taken until 64 MiB of them, the size of a thread's heap, were new to the process.
    """
    libc.malloc.restype = ctypes.c_void_p
    blocks: list[int] = []
    new = 0
    while new < 64:
        before = _resident("VmRSS")
        block = libc.malloc(ctypes.c_size_t(MEGABYTE))
        if block is None:
            break
        ctypes.memset(block, 1, MEGABYTE)
        blocks.append(block)
        new += _resident("VmRSS") - before > MEGABYTE // 2
    return blocks


def peak_of_a_call(work: Callable[[], object], device: str) -> int | None:
    """Bytes that a call adds at most, its results included; None on a CPU without Linux and glibc.

    For a process that has done other work: what lies freed in it is given back or taken first, so that the
    call's own memory is new to the process again.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        keep = work()
        torch.cuda.synchronize()
        del keep
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists() or platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    taken = _freed_memory_taken(libc)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    before = _resident("VmRSS")
    keep = work()
    peak = _resident("VmHWM")
    del keep
    for block in taken:
        libc.free(ctypes.c_void_p(block))
    return max(0, peak - before)  # the kernel counts in batches of pages per thread


def _step(module: torch.nn.Module, x: torch.Tensor) -> None:
    x = x.detach().requires_grad_()
    y = module(x)
    y.backward(y.detach())


def _module(implementation: str, channels: int, kernel: int, device: str) -> torch.nn.Module:
    keywords = {"padding": kernel // 2, "bias": False, "device": device}
    if implementation == "lkconv":
        import lkconv

        return lkconv.DepthwiseConv2d(channels, kernel, **keywords)
    return torch.nn.Conv2d(channels, channels, kernel, groups=channels, **keywords)


def extra_bytes(implementation: str, size: tuple[int, int, int, int], kernel: int, device: str) -> int:
    """Peak of one step above input and parameters; call it in a fresh process.

    A small step first loads what is loaded once. Output, its gradient and both results are part of the
    extra memory: they are the same for everyone.
    """
    _step(_module(implementation, 8, 3, device), torch.randn(1, 8, 8, 8, device=device))
    module, x = _module(implementation, size[1], kernel, device), torch.randn(size, device=device)
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _step(module, x)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    before = _resident("VmRSS")
    _step(module, x)
    return _resident("VmHWM") - before


def _in_fresh_process(implementation: str, size: tuple, kernel: int, device: str) -> int:
    call = f"extra_bytes({implementation!r}, {size!r}, {kernel}, {device!r})"
    code = f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
    code += f"from bench.memory import extra_bytes; print({call})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{call} failed:\n{done.stderr}")
    return int(done.stdout)


def measure(device: str, cases=CASES) -> list[dict]:
    rows = []
    for name, size, kernel in cases:
        row = {
            "layer": name,
            "size": list(size),
            "kernel_size": kernel,
            "map_bytes": 4 * torch.Size(size).numel(),
        }
        for implementation in ("conv2d", "lkconv"):
            row[implementation] = _in_fresh_process(implementation, size, kernel, device)
        rows.append(row)
    return rows


def main(arguments: argparse.Namespace) -> int:
    if arguments.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        sys.exit("bench memory: on CPUs this needs Linux (/proc/self/clear_refs)")
    facts = machine.machine(arguments.device)
    print(f"{machine.describe(facts)}\npeak extra memory of a float32 training step, MB")
    print(f"{'layer':<22} {'input':<18} {'k':>3} {'one map':>8} {'conv2d':>8} {'lkconv':>8}")
    rows = measure(arguments.device)
    for row in rows:
        numbers = "".join(f" {row[key] / MEGABYTE:8.1f}" for key in ("map_bytes", "conv2d", "lkconv"))
        print(f"{row['layer']:<22} {row['size']!s:<18} {row['kernel_size']:>3}{numbers}")
    if arguments.json:
        content = {"machine": facts, "versions": machine.versions(), "rows": rows}
        Path(arguments.json).write_text(json.dumps(content, indent=1) + "\n")
    return 0
