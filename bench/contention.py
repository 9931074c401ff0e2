"""Notices other processes: two threads that must meet lose far more than their share to a third."""

from __future__ import annotations

import os
import time
from pathlib import Path

BUSY = 0.15  # cores' worth of foreign work from which a measurement is repeated
_SLACK = 0.03  # seconds: /proc/stat counts whole ticks of 10 ms on each core


def _busy_seconds() -> float | None:
    """Seconds of work, of all processes on all cores, since boot; None where /proc/stat is missing."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Contention:
    """Context manager; ``cores`` afterwards is how many cores others kept busy (None: unknown)."""

    cores: float | None = None

    def __enter__(self) -> Contention:
        self._start = time.perf_counter(), _busy_seconds(), time.process_time()
        return self

    def __exit__(self, *unused: object) -> None:
        wall, busy, own = self._start
        now = _busy_seconds()
        if busy is None or now is None:
            return
        foreign = (now - busy) - (time.process_time() - own) - _SLACK
        self.cores = max(0.0, foreign / max(time.perf_counter() - wall, 1e-9))

    @property
    def busy(self) -> bool:
        return self.cores is not None and self.cores > BUSY
