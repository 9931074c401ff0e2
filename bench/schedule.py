"""Which cells are measured, in which order, and which there was no time for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from bench.shapes import Layer

Cell = tuple[Layer, str, str]  # layer, dtype, pass

RESERVE = 5.0  # seconds kept for the summary and the files
_DTYPES = ("bfloat16", "float32", "float16", "float64")
_FIRST = ("bfloat16", "float32")  # in which 31x31 kernels come before everything else


def by_importance(cells: list[Cell]) -> list[Cell]:
    """31x31 in bfloat16 and float32 first, then from large kernels to small; small maps before large ones."""

    def key(cell: Cell) -> tuple:
        layer, dtype, _ = cell
        first = layer.kernel_size == (31, 31) and dtype in _FIRST
        return not first, -layer.taps, layer.flops(1), layer.name, _DTYPES.index(dtype)

    return sorted(cells, key=key)


class Schedule:
    """Iterates over cells; with a deadline, most important first, leaving out what would outlast it.

    A cell is taken to last as long as the last one of its dtype and pass did, longer by the ratio of their
    work. ``left_out`` holds (cell, reason) of what was not measured.
    """

    def __init__(
        self,
        cells: list[Cell],
        work: Callable[[Cell], float],
        deadline: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cells = cells if deadline is None else by_importance(cells)
        self._work, self._deadline, self._clock = work, deadline, clock
        self._seconds: dict[tuple[str, str], tuple[float, float]] = {}  # dtype, pass: duration, work
        self.left_out: list[tuple[Cell, str]] = []
        self.failures = 0

    def __len__(self) -> int:
        return len(self._cells)

    def __iter__(self) -> Iterator[Cell]:
        for cell in self._cells:
            start = self._clock()
            if self._deadline is not None and start + self._expected(cell) > self._deadline - RESERVE:
                self.left_out.append((cell, "no time left"))
                continue
            yield cell
            self._seconds[cell[1:]] = self._clock() - start, self._work(cell)

    def failed(self, cell: Cell, error: Exception) -> None:
        """Notes a cell that ended with an error of the machine, such as too little memory."""
        self.failures += 1
        first_line = (str(error).splitlines() or [""])[0]
        self.left_out.append((cell, f"{type(error).__name__}: {first_line}"))

    def _expected(self, cell: Cell) -> float:
        if cell[1:] not in self._seconds:
            return max((seconds for seconds, _ in self._seconds.values()), default=0.0)
        seconds, work = self._seconds[cell[1:]]
        return seconds * max(1.0, self._work(cell) / work)
