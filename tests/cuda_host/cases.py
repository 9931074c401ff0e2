"""The convolutions that the CUDA kernels are tested on, on the host emulator and on a GPU alike: the list of
every backend (``tests/cases.py``), and what only GPU tiles ask for."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cases as shared

Pair = tuple[int, int]
DTYPES = ("f64", "f32", "tf32", "f16", "bf16")
PASSES = ("forward", "backward_input", "backward_weight")
ORDERS = ("forward", "reverse", "random")


@dataclasses.dataclass(frozen=True)
class Case(shared.Case):
    """A convolution, and how its tensors lie in memory: nchw, nhwc, expand, or slices of wider ones."""

    layout: str = "nchw"

    @property
    def products(self) -> int:
        """Multiply-adds, those outside the image included: what emulating it costs."""
        return math.prod(self.output_size) * self.taps

    def __str__(self) -> str:
        return super().__str__() + (f"-{self.layout}" if self.layout != "nchw" else "")

    def words(self, **more: object) -> str:
        """The driver's line for this case."""
        pairs = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | more
        pairs["bias"] = int(self.bias)
        return " ".join(
            f"{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in pairs.items()
        )


def placed(case: shared.Case, layout: str = "nchw") -> Case:
    return Case(
        **{field.name: getattr(case, field.name) for field in dataclasses.fields(shared.Case)}, layout=layout
    )


def same(size: tuple[int, int, int, int], kernel: Pair, layout: str = "nchw", **more) -> Case:
    """Stride 1 and the padding that keeps an odd kernel's image size."""
    return placed(shared.same(size, kernel, **more), layout)


GPU_TILES = (
    # enough images for M tiles that run over images, whole and cut
    same((17, 1, 14, 14), (27, 27)),
    same((20, 1, 7, 9), (5, 5)),
    # rows of whole vectors, two tiles of columns, more diagonals than a warp holds
    same((2, 1, 32, 32), (31, 31)),
    same((1, 1, 33, 57), (31, 31)),
    Case((1, 2, 12, 70), (3, 67), (1, 33)),
    # more kernel rows than a block's warps own, windows that begin far outside the image
    same((1, 2, 20, 24), (51, 5)),
    same((1, 2, 24, 20), (5, 51)),
    Case((1, 2, 5, 6), (9, 17), (8, 16)),
    Case((2, 3, 1, 37), (1, 13), (0, 12)),
    Case((2, 3, 37, 1), (13, 1), (6, 0)),
    Case((2, 2, 11, 16), (5, 9), (2, 4), stride=(2, 2), multiplier=3),
    # several images a block, the last with fewer; tiles of rows and of columns, the last ones narrower
    same((130, 1, 6, 8), (3, 3)),
    same((131, 2, 5, 8), (3, 9)),
    same((129, 1, 5, 7), (7, 3), "nhwc"),
    same((1, 1, 210, 40), (3, 3)),
    same((1, 3, 21, 72), (5, 5)),
    # outputs that share an input's window; other padding than "same" with kernels of fixed width
    Case((2, 5, 9, 16), (3, 3), (1, 1), multiplier=2),
    Case((1, 2, 12, 32), (7, 7), (3, 3), multiplier=3),
    Case((2, 3, 10, 16), (5, 5), (0, 0)),
    Case((2, 3, 10, 24), (3, 3), (2, 2)),
    Case((1, 2, 14, 16), (51, 5), (25, 6)),
    # 3x3 at a stride of 2: rows and columns of tiles, partial strips, several images a block, other padding
    Case((1, 3, 17, 24), (3, 3), (1, 1), stride=(2, 2)),
    Case((2, 1, 150, 144), (3, 3), (1, 1), stride=(2, 2)),
    Case((130, 1, 6, 8), (3, 3), (1, 1), stride=(2, 2)),
    Case((2, 2, 15, 20), (3, 3), (0, 5), stride=(2, 2), multiplier=2),
    # layouts: staged by channels, packed to planes, copied by elements, read again and again
    same((2, 20, 9, 11), (7, 7), "nhwc"),
    same((1, 9, 14, 16), (13, 13), "nhwc"),
    Case((2, 6, 12, 12), (3, 3), (1, 1), stride=(2, 2), layout="nhwc"),
    same((0, 6, 12, 12), (13, 13), "nhwc"),
    same((2, 3, 13, 15), (9, 9), "slice"),
    same((2, 4, 10, 24), (3, 3), "slice"),
    same((2, 20, 9, 11), (7, 7), "nhwc_slice"),
    same((3, 12, 10, 16), (1, 11), "nhwc_slice"),
    same((2, 3, 10, 24), (7, 13), "expand"),
)
CASES = (*map(placed, shared.CORE), *GPU_TILES)

# What bounds the emulator's run: every case meets every dtype, pass and algorithm, but cases of more than
# LARGE products, which take half of the time, meet all three orders of threads in bfloat16 alone. It runs all
# kernels, and the barriers of the other types' are the same lines.
LARGE = 1_500_000


def orders(case: Case, dtype: str) -> tuple[str, ...]:
    return ORDERS if case.products <= LARGE or dtype == "bf16" else ("random",)


# With a NaN in one tensor and an infinity in another; small, because each runs once more.
NON_FINITE = tuple(c for c in CASES if 0 < c.products < 60_000)
