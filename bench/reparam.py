"""``python -m bench reparam``: blocks as branches, fused and merged, in time and memory.

Rows: the forward pass in training (batch statistics), a training step (forward and backward) and inference.
Implementations are timed in turns:

    torch     plain F.conv2d and nn.BatchNorm2d, branch by branch; torch-nhwc: the same in channels_last.
              Ratios are against the faster of the two.
    branches  the same modules with lkconv's convolutions
    fused     all branches in one autograd node (lkconv's default in training)
    recompute the same, keeping the input instead of every branch output
    merged    inference only: the training form folded on every call ("folding"), and the merged layer

Each result is compared with plain PyTorch first; a wrong one is not timed.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bench.allocator import keep_freed_memory
from lkconv import reparam, use_backend

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PEERS = ("torch", "torch-nhwc")
MODES = ("forward in training", "training step", "inference")
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}

# name, block, (C, H): layers of RepLKNet-31B, UniRepLKNet-T, MobileOne, FastViT, SLaK-T at 224 x 224.
BLOCKS: tuple[tuple[str, Callable[[], nn.Module], tuple[int, int]], ...] = (
    ("RepLKNet 31+5", lambda: reparam.ReparamLargeKernelConv(128, 128, 31, 1, 128, 5), (128, 56)),
    ("RepLKNet 13+5", lambda: reparam.ReparamLargeKernelConv(1024, 1024, 13, 1, 1024, 5), (1024, 7)),
    ("UniRepLKNet 13", lambda: reparam.DilatedReparamBlock(160, 13), (160, 28)),
    ("UniRepLKNet 13", lambda: reparam.DilatedReparamBlock(320, 13), (320, 14)),
    ("UniRepLKNet 7", lambda: reparam.DilatedReparamBlock(80, 7), (80, 56)),
    ("MobileOne 3x3",
     lambda: reparam.MobileOneBlock(96, 96, 3, 1, 1, groups=96, num_conv_branches=4), (96, 56)),
    ("RepMixer 3x3", lambda: reparam.RepMixer(76), (76, 56)),
    ("SLaK 51x5", lambda: reparam.SLaKReparamLargeKernelConv(124, 124, 51, 1, 124, 5), (124, 56)),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=4, help="images (default: 4)")
    parser.add_argument("--repeats", type=int, default=7, help="median of this many (default: 7)")
    parser.add_argument("--filter", default="", help="only blocks whose name contains this")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--json", metavar="FILE", help="write all rows")


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _milliseconds(work: Callable[[], object], device: str) -> float:
    _synchronise(device)
    start = time.perf_counter()
    work()
    _synchronise(device)
    return 1e3 * (time.perf_counter() - start)


def median_milliseconds(works: Sequence[Callable[[], object]], repeats: int, device: str) -> list[float]:
    """Median wall time of each, in turns so that a slow moment slows all; two warm-up calls after each turn's
    change, as another implementation has just had the caches."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, found in zip(works, times, strict=True):
            work()
            found += [_milliseconds(work, device) for _ in range(3)]
    return [statistics.median(found) for found in times]


def saved_bytes(work: Callable[[], Tensor]) -> int:
    """Bytes of all storages that autograd keeps between forward and backward."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep = work()
    del keep
    return sum(sizes.values())


def _error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def _paths(training: bool) -> dict[str, Callable[[], object]]:
    """Context per implementation, entered around forward and backward."""
    branches = {name: lambda: use_backend("torch") for name in PEERS} | {"branches": nullcontext}
    if not training:
        return {**branches, "folding": nullcontext, "merged": nullcontext}
    return {**branches, "fused": nullcontext, "recompute": nullcontext}


_TRAINING_PATH = {
    "torch": "branches",
    "torch-nhwc": "branches",
    "branches": "branches",
    "fused": "fused",
    "recompute": "fused-recompute",
}


class Candidate:
    """One implementation of a block: ``step`` is its forward pass, ``work`` what is timed."""

    def __init__(self, name: str, block: nn.Module, x: Tensor, mode: str, context: Callable[[], Any]) -> None:
        self.name, self.mode, self.context = name, mode, context
        training = mode != "inference"
        self.block = copy.deepcopy(block).train(training)
        if name == "merged":
            self.block.reparameterize()  # type: ignore[operator]
        last = torch.channels_last if name == "torch-nhwc" else torch.contiguous_format
        self.leaf = x.clone(memory_format=last).requires_grad_(training)
        self.gradient: Tensor | None = None
        path = _TRAINING_PATH.get(name)
        self.path = (lambda: reparam.use_training_path(path)) if path else nullcontext

    def step(self) -> Tensor:
        with self.context(), self.path():
            return self.block(self.leaf)

    def work(self) -> Tensor:
        if self.mode == "inference":
            with torch.inference_mode():
                return self.step()
        out = self.step()
        if self.mode == "forward in training":
            return out
        self.leaf.grad = None
        self.block.zero_grad()
        out.backward(self.gradient)
        assert self.leaf.grad is not None
        return self.leaf.grad


def measure(block: nn.Module, x: Tensor, mode: str, dtype: str, repeats: int) -> list[dict]:
    """All implementations of one block: time, saved bytes (training) and error against plain PyTorch."""
    device, training = x.device.type, mode != "inference"
    gradient = torch.randn_like(block.train(training)(x).detach())
    rows, right, expected = [], [], None
    for name, context in _paths(training).items():
        one = Candidate(name, block, x, mode, context)
        one.gradient = gradient
        result = one.work().detach().float()
        expected = result if expected is None else expected
        rows.append({"implementation": name, "error": _error(result, expected)})
        if rows[-1]["error"] <= TOLERANCE[dtype]:
            rows[-1]["saved_bytes"] = saved_bytes(one.step) if training else 0
            right.append((one, rows[-1]))
    times = median_milliseconds([one.work for one, _ in right], repeats, device)
    for (_, row), milliseconds in zip(right, times, strict=True):
        row["milliseconds"] = milliseconds
    return rows


def format_rows(title: str, rows: list[dict]) -> str:
    """One line per implementation; ratios against the faster layout of plain PyTorch in the same run."""
    base = min(r["milliseconds"] for r in rows if r["implementation"] in PEERS and "milliseconds" in r)
    lines = [title]
    for row in rows:
        line = f"  {row['implementation']:<10}"
        if "milliseconds" not in row:
            lines.append(f"{line} wrong: relative error {row['error']:.1e}")
            continue
        line += f"{row['milliseconds']:9.2f} ms {base / row['milliseconds']:7.2f}x"
        if row["saved_bytes"]:
            line += f"   saves {row['saved_bytes'] / 2**20:7.1f} MiB"
        lines.append(f"{line}   error {row['error']:.1e}")
    return "\n".join(lines)


def without_kinks(block: nn.Module) -> nn.Module:
    """Without its ReLU, whose gradient jumps where rounding decides the sign: all results are compared."""
    if isinstance(getattr(block, "activation", None), nn.ReLU):
        block.activation = nn.Identity()
    return block


def run(arguments: argparse.Namespace) -> int:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    everything = []
    for name, make, (channels, size) in BLOCKS:
        if arguments.filter not in name:
            continue
        dtype = DTYPES[arguments.dtype]
        block = without_kinks(make().to(arguments.device, dtype))
        x = torch.randn(arguments.batch, channels, size, size, device=arguments.device, dtype=dtype)
        for mode in MODES:
            title = f"{name}, ({arguments.batch}, {channels}, {size}, {size}), {arguments.dtype}, {mode}"
            rows = measure(block, x, mode, arguments.dtype, arguments.repeats)
            print(format_rows(title, rows), flush=True)
            everything += [{"block": title, **row} for row in rows]
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(everything, file, indent=1)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench reparam", description=__doc__.splitlines()[0])
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    raise SystemExit(main())
