"""Measured ceilings of the machine: copy bandwidth and matrix-product throughput."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_MATRIX = {"cpu": 1536, "cuda": 8192}
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_CACHED_COPY_BYTES = 1 << 20  # of one buffer: both fit the second-level caches of two cores


def _best_seconds(run: Callable[[], object], device: str, seconds: float = 0.3, least: int = 3) -> float:
    """The shortest of many calls: a ceiling is what the machine can do, not what it typically does."""
    run()
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < least or time.perf_counter() - begin < seconds:
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) * 1e-3)
        else:
            start_time = time.perf_counter()
            run()
            samples.append(time.perf_counter() - start_time)
    return min(samples)


def copy_gbps(device: str, size: int) -> float:
    """Bytes read plus bytes written per nanosecond, copying ``size`` bytes."""
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source), device) * 1e-9


def matmul_gflops(device: str, dtype: str) -> float:
    n = _MATRIX[device]
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * n**3 / _best_seconds(lambda: a @ b, device) * 1e-9


def ceilings(device: str, dtypes: tuple[str, ...]) -> dict:
    """``copy_gbps``, ``cached_copy_gbps`` (None on a GPU) and ``matmul_gflops`` by dtype."""
    return {
        "copy_gbps": copy_gbps(device, _COPY_BYTES[device]),
        "cached_copy_gbps": copy_gbps(device, _CACHED_COPY_BYTES) if device == "cpu" else None,
        "matmul_gflops": {dtype: matmul_gflops(device, dtype) for dtype in dtypes},
    }
