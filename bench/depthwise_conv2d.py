"""Measures ``depthwise_conv2d`` and its gradients against every peer, a row per implementation and layout."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product

import torch

from bench import gate, machine, measure
from bench.contention import Contention
from bench.implementations import Implementation, explained, implementations, is_ours
from bench.problem import LAYOUTS, Problem, make_problems
from bench.schedule import Cell, Schedule
from bench.shapes import Layer

LONG = 4.0  # seconds: a cell that takes longer is measured once
# By Settings.quick: how often a cell that others disturbed is measured. They do not slow a GPU: once there.
ATTEMPTS = {True: 2, False: 3}


@dataclass(frozen=True)
class Settings:
    dtypes: tuple[str, ...] = ("float32",)
    passes: tuple[str, ...] = ("forward",)
    device: str = "cpu"
    batch: int | None = None
    quick: bool = False
    compiled: bool = False
    tf32: bool = False
    backends: tuple[str, ...] = ()
    seconds: float | None = None  # in which the run must end

    @property
    def budget(self) -> measure.Budget:
        return measure.QUICK if self.quick else measure.FULL

    def precision(self, dtype: str) -> str:
        """What products are rounded to: the dtype, or tf32 where a GPU may do that to float32."""
        return "tf32" if self.tf32 and dtype == "float32" and self.device == "cuda" else dtype

    def batch_of(self, layer: Layer) -> int:
        """The asked batch; else the layer's own on a GPU, and one of about a second's work on a CPU."""
        if self.batch is not None:
            return self.batch
        return layer.cpu_batch(1e9 if self.quick else 2e9) if self.device == "cpu" else layer.batch


def cells(rows: tuple[Layer, ...], settings: Settings) -> list[Cell]:
    """What is measured together."""
    return [(layer, *rest) for layer in rows for rest in product(settings.dtypes, settings.passes)]


def measure_cell(
    layer: Layer,
    dtype: str,
    pass_name: str,
    settings: Settings,
    candidates: list[Implementation] | None = None,
) -> list[dict]:
    """Gates, times and compares all implementations of one cell; returns its rows."""
    if candidates is None:
        candidates = implementations(settings.compiled, settings.backends)
    batch = settings.batch_of(layer)
    problems = make_problems(layer, batch, dtype, pass_name, settings.device)
    expected = gate.reference(problems["contiguous"])
    rows, runs = [], {}
    with torch.no_grad():
        for candidate, layout in product(candidates, LAYOUTS):
            problem = problems[layout]
            if layout not in candidate.layouts or candidate.declines(problem):
                continue
            verdict, run = _gate(candidate, problem, expected, settings.tf32)
            rows.append(_row(candidate, problem, verdict, settings))
            if verdict.ok:
                runs[len(rows) - 1] = (candidate, problem, run)
        del expected
        times, foreign = _time_undisturbed(runs, settings)
    for index, timed in times.items():
        _add_times(rows[index], timed.summary(), foreign, problems["contiguous"])
    _add_ratios(rows)
    return rows


def _gate(candidate: Implementation, problem: Problem, expected, tf32: bool):
    """(verdict, run). Whatever an implementation raises is a verdict on it, not the end of the table."""
    limit = gate.tolerance(problem, tf32)
    try:
        run = candidate.prepare(problem)
        return gate.check(run(), expected, limit), run
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        return gate.Verdict(False, float("nan"), limit, f"{type(error).__name__}: {first_line}"), None


def _time_undisturbed(runs: dict, settings: Settings) -> tuple[dict[int, measure.Times], float | None]:
    """Times, and the cores that other processes kept busy meanwhile: the calmest of up to three attempts."""
    best: tuple[dict[int, measure.Times], float | None] = ({}, None)
    for attempt in range(ATTEMPTS[settings.quick] if settings.device == "cpu" else 1):
        with Contention() as contention:
            times = _time(runs, settings)
        calmer = best[1] is None or (contention.cores or 0) < best[1]
        if attempt == 0 or calmer:
            best = times, contention.cores
        if not contention.busy or sum(sum(t.samples) for t in times.values()) > LONG:
            break
    return best


def _time(runs: dict, settings: Settings) -> dict[int, measure.Times]:
    if not runs:
        return {}
    if settings.device == "cpu":
        return measure.time_cpu({index: run for index, (_, _, run) in runs.items()}, settings.budget)
    some = next(iter(runs.values()))[1]
    cache = machine.l2_bytes(settings.device)
    count = measure.input_sets(some.bytes, cache)
    rotated = {}
    others = [
        make_problems(some.layer, some.batch, some.dtype, some.pass_name, settings.device, seed=seed)
        for seed in range(1, count)
    ]
    for index, (candidate, problem, run) in runs.items():
        rotated[index] = [run, *(candidate.prepare(other[problem.layout]) for other in others)]
    return measure.time_cuda(rotated, some.bytes, cache, settings.budget)


def _row(candidate: Implementation, problem: Problem, verdict: gate.Verdict, settings: Settings) -> dict:
    backend, algorithm = explained(problem, candidate.backend) if candidate.ours else ("", "")
    layer = asdict(problem.layer)
    layer["layer"] = layer.pop("name")
    layer.pop("batch")
    return {
        **layer,
        "batch": problem.batch,
        "size_class": problem.layer.size_class,
        "dtype": problem.dtype,
        "precision": settings.precision(problem.dtype),
        "layout": problem.layout,
        "pass": problem.pass_name,
        "implementation": candidate.name,
        "backend": backend,
        "algorithm": algorithm,
        "device": settings.device,
        "correct": verdict.ok,
        "reason": verdict.reason,
        "error": verdict.error if math.isfinite(verdict.error) else None,  # which JSON cannot say
        "tolerance": verdict.tolerance,
        "flops": problem.flops,
        "bytes": problem.bytes,
        "time": None,
        "foreign_cores": None,
        "gflops": None,
        "gbps": None,
        "best_peer": None,
        "ratio": None,
        "ratio_conv2d": None,
        "ratio_fft": None,
    }


def _add_times(row: dict, summary: dict, foreign: float | None, problem: Problem) -> None:
    row["time"] = summary
    row["foreign_cores"] = foreign
    row["gflops"] = problem.flops / summary["median"] * 1e-9
    row["gbps"] = problem.bytes / summary["median"] * 1e-9


def _best(rows: list[dict], family: str = "") -> dict | None:
    peers = [r for r in rows if not is_ours(r["implementation"]) and r["time"]]
    peers = [r for r in peers if r["implementation"].startswith(family)]
    return min(peers, key=lambda r: r["time"]["median"], default=None)


def _add_ratios(rows: list[dict]) -> None:
    """Speed of each row relative to the best peer of all layouts, to F.conv2d's best, and to torch.fft."""
    families = {
        "ratio": _best(rows),
        "ratio_conv2d": _best(rows, "conv2d"),
        "ratio_fft": _best(rows, "torch.fft"),
    }
    for row in rows:
        if not row["time"]:
            continue
        for key, peer in families.items():
            if peer is not None:
                row[key] = peer["time"]["median"] / row["time"]["median"]
        if (best := families["ratio"]) is not None:
            row["best_peer"] = f"{best['implementation']} {best['layout']}"


def schedule(layers: tuple[Layer, ...], settings: Settings, started: float | None = None) -> Schedule:
    """The cells of a run, whose time counts from ``started`` (on ``time.monotonic``; default: now)."""
    started = time.monotonic() if started is None else started
    deadline = None if settings.seconds is None else started + settings.seconds
    return Schedule(
        cells(layers, settings), lambda cell: float(cell[0].flops(settings.batch_of(cell[0]))), deadline
    )


def set_up_gpu(settings: Settings) -> None:
    """The fastest that peers have; float32 products in float32 unless tf32 is asked for."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = settings.tf32
    torch.backends.cuda.matmul.allow_tf32 = settings.tf32


def run(planned: Schedule, settings: Settings, progress=iter) -> Iterator[list[dict]]:
    """Yields the rows of one cell after another, each with its machine and versions.

    A cell that fails on a GPU, for want of memory say, is noted in ``planned`` and does not end the run.
    """
    facts, used = machine.machine(settings.device), machine.versions()
    for cell in progress(planned):
        try:
            rows = measure_cell(*cell, settings)
        except RuntimeError as error:
            if settings.device == "cpu":
                raise
            planned.failed(cell, error)
            continue
        yield [{**row, "machine": facts, "versions": used} for row in rows]
