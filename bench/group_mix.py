"""Group-Mix attention: every stage of every model, fused against the chain of PyTorch operators.

The peer is ``bench.models.group_mix_unfused``, as it is and under ``torch.compile``. Each row says how many
kernels a step launches and how many bytes they read and write (of compiled code as its compiler counts them),
and is timed only when its outputs, and in training the input's gradient, agree with float64.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import inductor_counts, machine, measure
from bench.contention import BUSY, Contention
from bench.models.group_mix_former import CONFIGS
from bench.models.group_mix_unfused import UnfusedAttention
from lkconv import GroupMixAttention

PARTS = ("aggregation", "attention")
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
TRIES = 3  # of a measurement that others disturb
STEM = 4  # pixels per token of the first stage, along either axis


@dataclass
class Row:
    """One stage, part, dtype, mode and implementation. Times are seconds, None where the result is wrong."""

    model: str
    stage: int
    channels: int
    tokens: tuple[int, int]
    batch: int
    part: str
    dtype: str
    mode: str
    implementation: str
    kernels: int
    megabytes: float
    error: float
    median: float | None
    ratio: float | None = None
    foreign_cores: float | None = None  # kept busy by others meanwhile


class Traffic(TorchDispatchMode):
    """Counts operators that launch work, and the bytes of the tensors they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        results = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        given = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        storages = {t.untyped_storage().data_ptr() for t in given}
        fresh = [t for t in results if t.untyped_storage().data_ptr() not in storages]
        if not func.is_view and (fresh or "_(" in str(func._schema.name) or func._schema.is_mutable):
            self.kernels += 1
            self.bytes += sum(t.numel() * t.element_size() for t in (*given, *fresh))
        return out


def stages(names: list[str], image: int) -> list[tuple[str, int, int, int]]:
    """(model, stage, channels, tokens per side) of square images, each distinct shape of a model once."""
    rows = []
    for name in names:
        for i, channels in enumerate(CONFIGS[name].channels):
            rows.append((name, i + 1, channels, image // (STEM << i)))
    return rows


def _modules(
    channels: int, dtype: torch.dtype, training: bool, device: str = "cpu"
) -> tuple[GroupMixAttention, UnfusedAttention]:
    torch.manual_seed(0)
    fused = GroupMixAttention(channels, qkv_bias=True).train(training)
    for norm in fused.aggregator.norms():
        norm.running_var.uniform_(0.5, 2)
    fused = fused.to(device, dtype)
    return fused, UnfusedAttention(channels).to(device, dtype).copy_from(fused)


def _outputs(part: str, fused: GroupMixAttention, plain: UnfusedAttention) -> dict[str, Callable]:
    """Functions of (input, size) that return the tensors of which gradients are taken."""

    def aggregate(x, size):
        q, k, v, local = fused.aggregator(x, size)
        return (q, k, v), local

    if part == "aggregation":
        return {"lkconv": aggregate, "eager": plain.aggregation}
    return {"lkconv": lambda x, size: (fused(x, size),), "eager": lambda x, size: (plain(x, size),)}


def _seeds(outputs: list[torch.Tensor | tuple]) -> list[torch.Tensor]:
    """Gradients of the outputs, the same for every implementation, in the memory layout of each output."""
    generator, found = torch.Generator().manual_seed(1), []
    for out in outputs:
        parts = out if isinstance(out, tuple) else (out,)
        shape = (len(out), *out[0].shape) if isinstance(out, tuple) else out.shape
        seed = torch.randn(shape, generator=generator, dtype=torch.float64)
        for t, s in zip(parts, seed.unbind() if isinstance(out, tuple) else (seed,), strict=True):
            found.append(torch.empty_like(t).copy_(s))
    return found


def _flat(outputs: list[torch.Tensor | tuple]) -> list[torch.Tensor]:
    return [t for o in outputs for t in (o if isinstance(o, tuple) else (o,))]


def _step(function: Callable, x: torch.Tensor, size: tuple[int, int], training: bool) -> Callable[[], list]:
    """One forward pass, or one with all gradients of it; returns the outputs and the input's gradient."""
    if not training:

        def forward():
            with torch.no_grad():
                return list(function(x, size))

        return forward
    leaf = x.detach().requires_grad_()
    seeds: list[torch.Tensor] = []

    def step():
        leaf.grad = None
        outputs = list(function(leaf, size))
        if not seeds:
            seeds.extend(_seeds(outputs))
        torch.autograd.backward(_flat(outputs), seeds)
        return [*outputs, leaf.grad]

    return step


def _error(results: list, exact: list) -> float:
    """Largest relative error of the outputs, and in training of the input's gradient."""
    worst = 0.0
    for a, b in zip(results, exact, strict=True):
        a, b = (torch.stack(t) if isinstance(t, tuple) else t for t in (a, b))
        difference = a.detach().double() - b.detach()
        worst = max(worst, float(difference.norm() / b.detach().norm()))
    return worst


def _counted(step: Callable, compiled: bool) -> tuple[int, int]:
    """Kernels and bytes of one step, which is the first."""
    if compiled:
        with inductor_counts.counting() as found:
            step()
        return found.kernels, found.bytes
    with Traffic() as traffic:
        step()
    return traffic.kernels, traffic.bytes


def _calm_medians(
    runs: dict[str, Callable], x: torch.Tensor, budget: measure.Budget
) -> tuple[dict[str, float], float | None]:
    """Median seconds, and the cores that other processes kept busy: measured again while they do."""
    best: tuple[dict[str, float], float | None] | None = None
    for _ in range(TRIES):
        with Contention() as contention:
            medians = _medians(runs, x, budget)
        if best is None or (contention.cores or 0) < (best[1] or 0):
            best = medians, contention.cores
        if not contention.busy:
            break
    assert best is not None
    return best


def _medians(runs: dict[str, Callable], x: torch.Tensor, budget: measure.Budget) -> dict[str, float]:
    if x.device.type == "cuda":
        cache = machine.l2_bytes("cuda")
        times = measure.time_cuda({n: [r] for n, r in runs.items()}, x.nbytes, cache, budget)
    else:
        times = measure.time_cpu(runs, budget)
    return {name: t.summary()["median"] for name, t in times.items()}


def measure_stage(
    model: str,
    stage: int,
    channels: int,
    side: int,
    batch: int,
    part: str,
    dtype: torch.dtype,
    training: bool,
    compiled: bool,
    budget: measure.Budget,
    device: str = "cpu",
) -> list[Row]:
    """The rows of one stage: the gate, then the timing of what passed it, in turns."""
    size = (side, side)
    fused, plain = _modules(channels, dtype, training, device)
    functions = _outputs(part, fused, plain)
    if compiled:
        functions["compiled"] = inductor_counts.compiled(functions["eager"])
    exact = UnfusedAttention(channels).to(device).double().copy_from(fused).double()
    width = 3 * channels if part == "aggregation" else channels
    x = torch.randn(batch, side * side, width).to(device, dtype)
    expected = _step(_outputs(part, fused, exact)["eager"], x.double(), size, training)()
    rows, runs = [], {}
    for name, function in functions.items():
        step = _step(function, x, size, training)
        kernels, moved = _counted(step, name == "compiled")
        error = _error(step(), expected)
        # The gradient crosses hardswish, whose slope jumps at 3: an input there flips with the rounding.
        if error <= 4 * LIMITS[dtype]:
            runs[name] = step
        rows.append(
            Row(model, stage, channels, size, batch, part, str(dtype).removeprefix("torch."),
                "training" if training else "forward", name, kernels, moved / 1e6, error, None)
        )  # fmt: skip
    medians, foreign = _calm_medians(runs, x, budget)
    for row in rows:
        row.foreign_cores = foreign
        row.median = medians.get(row.implementation)
        if row.median and "lkconv" in medians:
            row.ratio = row.median / medians["lkconv"]
    return rows


def show(row: Row) -> str:
    """One line."""
    work = f"{row.kernels:4d} kernels {row.megabytes:8.1f} MB"
    time = "WRONG, not timed" if row.median is None else f"{row.median * 1e3:9.3f} ms"
    ratio = "" if row.ratio is None else f"{row.ratio:6.2f}x of lkconv's time"
    where = f"{row.model}{row.stage} C={row.channels:<3d} {row.tokens[0]}x{row.tokens[1]} N={row.batch}"
    what = f"{row.part:<11s} {row.dtype:<8s} {row.mode:<8s} {row.implementation:<8s}"
    disturbed = f" [disturbed: others used {row.foreign_cores:.1f} cores]" if _disturbed(row) else ""
    return f"{where} {what} {work:<26s} error {row.error:.1e} {time} {ratio}{disturbed}"


def _disturbed(row: Row) -> bool:
    return row.foreign_cores is not None and row.foreign_cores > BUSY


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m bench group_mix``."""
    parser.add_argument("--model", nargs="+", choices=list(CONFIGS), default=["S", "B"], metavar="MODEL")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32"])
    parser.add_argument("--mode", nargs="+", choices=["forward", "training"], default=["forward", "training"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--image", type=int, default=224, help="side of the image in pixels")
    parser.add_argument("--stage", type=int, nargs="+", choices=[1, 2, 3, 4], default=[1, 2, 3, 4])
    parser.add_argument("--compile", action="store_true", help="also the peer under torch.compile (slow)")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--json", metavar="FILE", help="write all rows, after every stage")


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints; 1 when a result of lkconv is wrong."""
    facts = machine.machine(arguments.device)
    print(machine.describe(facts), flush=True)
    budget = measure.QUICK if arguments.quick else measure.FULL
    rows: list[Row] = []
    for model, stage, channels, side in stages(arguments.model, arguments.image):
        cells = itertools.product(arguments.part, arguments.dtype, arguments.mode)
        for part, dtype, mode in cells if stage in arguments.stage else ():
            found = measure_stage(
                model, stage, channels, side, arguments.batch, part, getattr(torch, dtype),
                mode == "training", arguments.compile, budget, arguments.device,
            )  # fmt: skip
            rows += found
            print("\n".join(show(r) for r in found), flush=True)
            if arguments.json:
                _save(arguments.json, facts, rows)
    return int(any(r.median is None for r in rows if r.implementation == "lkconv"))


def _save(path: str, facts: dict, rows: list[Row]) -> None:
    content = {"machine": facts, "versions": machine.versions(), "rows": [asdict(r) for r in rows]}
    Path(path).write_text(json.dumps(content, indent=1))
