"""``python -m bench reparam``: blocks as branches, fused and merged, in time and memory.

Rows: the forward pass in training (batch statistics), a training step (forward and backward) and inference.
Implementations are timed in turns:

    torch     plain F.conv2d and nn.BatchNorm2d, branch by branch; torch-nhwc: the same in channels_last.
              Ratios are against the faster of the two.
    branches  the same modules with lkconv's convolutions
    fused     all branches in one autograd node
    recompute the same, keeping the input instead of every branch output
    default   what lkconv's planner chooses in training
    merged    inference only: the training form folded on every call ("folding"), and the merged layer
    plain     inference only: a layer of the merged kernel's shape without a block around it

Blocks that have one way to train have no rows for branches, fused and recompute. "saves" is what autograd
keeps between forward and backward, "peak" what a call adds to the resident memory (on GPUs, to what is
allocated) at most. Each result is compared with plain PyTorch first; a wrong one is not timed.
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

from bench import machine, memory
from bench.allocator import keep_freed_memory
from lkconv import reparam, use_backend

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PEERS = ("torch", "torch-nhwc")
MODES = ("forward in training", "training step", "inference")
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}

# name, block, (C, H): layers of RepLKNet-31B, UniRepLKNet-T, MobileOne, FastViT, SLaK-T, RepViT-M0.9,
# RepVGG-A1, ResNet-18 and RepMLPNet-T at 224 x 224.


def filled(block: nn.Module) -> nn.Module:
    """A RefConv with a kernel in the buffer that otherwise waits for a pretrained one."""
    nn.init.normal_(block.weight)  # type: ignore[arg-type]
    return block


BLOCKS: tuple[tuple[str, Callable[[], nn.Module], tuple[int, int]], ...] = (
    ("RepLKNet 31+5", lambda: reparam.ReparamLargeKernelConv(128, 128, 31, 1, 128, 5), (128, 56)),
    ("RepLKNet 13+5", lambda: reparam.ReparamLargeKernelConv(1024, 1024, 13, 1, 1024, 5), (1024, 7)),
    ("UniRepLKNet 13", lambda: reparam.DilatedReparamBlock(160, 13), (160, 28)),
    ("UniRepLKNet 13", lambda: reparam.DilatedReparamBlock(320, 13), (320, 14)),
    ("UniRepLKNet 7", lambda: reparam.DilatedReparamBlock(80, 7), (80, 56)),
    ("MobileOne 3x3",
     lambda: reparam.MobileOneBlock(96, 96, 3, 1, 1, groups=96, num_conv_branches=4), (96, 56)),
    ("RepMixer 3x3", lambda: reparam.RepMixer(76), (76, 56)),
    ("SLaK 51x5",
     lambda: reparam.SLaKReparamLargeKernelConv(124, 124, 51, 1, 124, 5, Decom=True), (124, 56)),
    ("RepViT 3x3", lambda: reparam.RepVGGDW(96), (96, 28)),
    ("RepCPE 7x7", lambda: reparam.RepConditionalPosEnc(512), (512, 7)),
    ("RefConv 3x3", lambda: filled(reparam.RefConv(96, 96, 3, groups=96)), (96, 28)),
    ("RepVGG 3x3", lambda: reparam.RepVGGBlock(128, 128, 3, padding=1), (128, 28)),
    ("ACNet 3x3", lambda: reparam.ACBlock(64, 64, 3, padding=1), (64, 56)),
    ("DBB 3x3", lambda: reparam.DiverseBranchBlock(64, 64, 3, padding=1), (64, 56)),
    ("OREPA 3x3", lambda: reparam.OREPA(64, 64, 3, padding=1), (64, 56)),
    ("RepMLP 14x14", lambda: reparam.RepMLPBlock(256, 256, 14, 14, (1, 3), num_sharesets=16), (256, 14)),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=4, help="images (default: 4)")
    parser.add_argument("--repeats", type=int, default=7, help="median of this many (default: 7)")
    parser.add_argument("--filter", default="", help="only blocks whose name contains this")
    parser.add_argument(
        "--mode", choices=(*MODES, "all"), default="all", help="one of the rows (default: all)"
    )
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
    peers: dict[str, Callable[[], object]] = {name: lambda: use_backend("torch") for name in PEERS}
    ours = ("branches", "fused", "recompute", "default") if training else ("branches", "folding", *_MERGED)
    return peers | dict.fromkeys(ours, nullcontext)


_MERGED = ("merged", "plain")
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
        if name in _MERGED:
            self.block.reparameterize()  # type: ignore[operator]
        if name == "plain":
            self.block = getattr(self.block, self.block.merged_name)  # type: ignore[arg-type]
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


def _is_fused(out: Tensor) -> bool:
    """Whether a node of all branches together is among those that made ``out``."""
    seen, waiting = set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name().startswith("BatchStatisticsSum"):
            return True
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return False


def _is_one_layer(merged: Candidate, plain: Candidate) -> bool:
    """Whether the merged block computes what one of its layers does."""
    layer = plain.block
    if not isinstance(layer, nn.Conv2d) or layer.in_channels != plain.leaf.shape[1]:
        return False
    return torch.equal(merged.work(), plain.work())


def _implementations(block: nn.Module, x: Tensor, mode: str) -> dict[str, Callable[[], object]]:
    """Those that differ for this block: not every family has several paths, or one layer as merged form."""
    contexts = _paths(mode != "inference")
    if mode == "inference":
        merged, plain = (Candidate(name, block, x, mode, nullcontext) for name in _MERGED)
        if not _is_one_layer(merged, plain):
            del contexts["plain"]
    elif not _is_fused(Candidate("fused", block, x, mode, nullcontext).step()):
        for name in ("branches", "fused", "recompute"):
            del contexts[name]
    return contexts


def measure(block: nn.Module, x: Tensor, mode: str, dtype: str, repeats: int) -> list[dict]:
    """All implementations of one block: time, memory and error against plain PyTorch."""
    device, training = x.device.type, mode != "inference"
    gradient = torch.randn_like(block.train(training)(x).detach())
    rows, right, expected = [], [], None
    for name, context in _implementations(block, x, mode).items():
        one = Candidate(name, block, x, mode, context)
        one.gradient = gradient
        result = one.work().detach().float()
        expected = result if expected is None else expected
        rows.append({"implementation": name, "error": _error(result, expected)})
        del result
        if rows[-1]["error"] <= TOLERANCE[dtype]:
            rows[-1]["saved_bytes"] = saved_bytes(one.step) if training else 0
            rows[-1]["peak_bytes"] = memory.peak_of_a_call(one.work, device)
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
        if row["peak_bytes"] is not None:
            line += f"   peak {row['peak_bytes'] / 2**20:7.1f} MiB"
        lines.append(f"{line}   error {row['error']:.1e}")
    return "\n".join(lines)


def without_kinks(block: nn.Module) -> nn.Module:
    """Without its ReLU, whose gradient jumps where rounding decides the sign: all results are compared."""
    for name in ("activation", "nonlinearity"):
        if isinstance(getattr(block, name, None), nn.ReLU):
            setattr(block, name, nn.Identity())
    return block


def run(arguments: argparse.Namespace) -> int:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    facts, versions = machine.machine(arguments.device), machine.versions()
    print(machine.describe(facts))
    print(", ".join(f"{name} {version}" for name, version in versions.items()), flush=True)
    everything: list[dict] = []
    for name, make, (channels, size) in BLOCKS:
        if arguments.filter not in name:
            continue
        dtype = DTYPES[arguments.dtype]
        block = without_kinks(make().to(arguments.device, dtype))
        x = torch.randn(arguments.batch, channels, size, size, device=arguments.device, dtype=dtype)
        for mode in MODES if arguments.mode == "all" else (arguments.mode,):
            title = f"{name}, ({arguments.batch}, {channels}, {size}, {size}), {arguments.dtype}, {mode}"
            rows = measure(block, x, mode, arguments.dtype, arguments.repeats)
            print(format_rows(title, rows), flush=True)
            shape, where = [*x.shape], {"block": name, "dtype": arguments.dtype, "mode": mode}
            everything += [{**where, "shape": shape, **row} for row in rows]
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"machine": facts, "versions": versions, "rows": everything}, file, indent=1)
    return int(any("milliseconds" not in row for row in everything))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench reparam", description=__doc__.splitlines()[0])
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    raise SystemExit(main())
