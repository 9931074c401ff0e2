"""Timers. Candidates of one row are timed in turns, so that a drifting machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

Run = Callable[[], object]


@dataclass(frozen=True)
class Budget:
    """How long to measure one candidate: ``seconds`` in all over ``turns`` turns, and limits on the calls."""

    seconds: float = 0.2
    turns: int = 4
    least: int = 2
    most: int = 200


FULL = Budget()
QUICK = Budget(seconds=0.1, turns=2, most=40)


@dataclass
class Times:
    """Seconds of each timed call."""

    samples: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float | int]:
        return {
            "min": min(self.samples),
            "median": statistics.median(self.samples),
            "max": max(self.samples),
            "repeats": len(self.samples),
        }


def _turn_cpu(run: Run, seconds: float, calls: int) -> list[float]:
    """Calls ``run`` for about ``seconds``, at most ``calls`` times counted.

    The first call of a turn finds the caches full of another candidate's data. It counts only where it
    takes a good part of the turn; then caches hardly matter, and a repetition would be dear.
    """
    samples: list[float] = []
    first, begin = True, time.perf_counter()
    while len(samples) < calls:
        start = time.perf_counter()
        run()
        end = time.perf_counter()
        if not first or end - start > seconds / 4:
            samples.append(end - start)
        first = False
        if samples and end - begin >= seconds:
            break
    return samples


def time_cpu(runs: dict[str, Run], budget: Budget) -> dict[str, Times]:
    """Times of each candidate, in turns. The gate, which ran them all, was their warm-up."""
    times = {name: Times() for name in runs}
    for turn in range(budget.turns):
        for name, run in runs.items():
            have = len(times[name].samples)
            if sum(times[name].samples) >= budget.seconds and have >= budget.least:
                continue
            calls = max(1, (budget.most - have) // (budget.turns - turn))
            times[name].samples += _turn_cpu(run, budget.seconds / budget.turns, calls)
    return times


def input_sets(bytes_per_set: int, cache_bytes: int, most: int = 8) -> int:
    """How many sets of tensors to rotate so that a set has left the cache when its turn comes again."""
    return max(1, min(most, -(-3 * cache_bytes // max(bytes_per_set, 1))))


def _flusher(bytes_per_set: int, sets: int, cache_bytes: int) -> Run:
    """Reads a buffer of twice the cache, where rotation is too small; a write would leave dirty lines."""
    if bytes_per_set * sets >= 2 * cache_bytes:
        return lambda: None
    buffer = torch.empty(2 * cache_bytes // 4, dtype=torch.float32, device="cuda").zero_()
    return buffer.sum


def time_cuda(
    runs: dict[str, Sequence[Run]], bytes_per_set: int, cache_bytes: int, budget: Budget
) -> dict[str, Times]:
    """Times of each candidate on the current stream, by one pair of events a call.

    ``runs[name]`` holds one call for each of the rotated sets of tensors. Before each turn the GPU
    sleeps, so that the host is ahead and launch latency stays out of the events.
    """
    times = {name: Times() for name in runs}
    flush = {name: _flusher(bytes_per_set, len(sets), cache_bytes) for name, sets in runs.items()}
    for turn in range(budget.turns + 1):  # turn 0 warms up and finds how many calls fit
        for name, sets in runs.items():
            spent, done = sum(times[name].samples), times[name].samples
            if turn and spent >= budget.seconds and len(done) >= budget.least:
                continue
            if not done:
                times[name].samples = _first_calls(sets, budget, flush[name])
                continue
            calls = int(budget.seconds / budget.turns / max(statistics.median(done), 1e-6))
            calls = max(1, min(calls, budget.most // budget.turns))
            samples = _turn_cuda(sets, calls, flush[name])
            times[name].samples = samples if turn <= 1 else done + samples
    return times


def _first_calls(sets: Sequence[Run], budget: Budget, flush: Run) -> list[float]:
    """Three calls; one where that takes long, as warming up does not change what seconds of work cost."""
    samples = _turn_cuda(sets, 1, flush)
    return samples if samples[0] > budget.seconds / 2 else samples + _turn_cuda(sets, 2, flush)


def _turn_cuda(sets: Sequence[Run], calls: int, flush: Run) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    torch.cuda.synchronize()
    torch.cuda._sleep(10_000_000)  # cycles: about 5 ms, in which the host queues the calls
    for i, (start, end) in enumerate(events):
        flush()
        start.record()
        sets[i % len(sets)]()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in events]
