"""Which loop of a CUDA convolution kernel does what, and what it costs beside the products."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .sass import Instruction, Loop, enclosing, exclusive, find, loops, products, without_blocks

Code = dict[str, tuple[Instruction, ...]]


def staging(found: list[Loop]) -> list[Loop]:
    """Loops that bring a tile's rows into shared memory, in order of address: the most deeply nested ones,
    because the other kind, by channels, needs one loop less."""
    some = [x for x in found if x.innermost and x.count("LDG") >= 4 and x.count("STS")]
    deepest = find(some, "loads and shared stores", lambda x: True, lambda x: x.depth).depth
    return [x for x in some if x.depth == deepest]


def copies(found: list[Loop], width: int) -> Loop:
    """The copies to shared memory, ``width`` bytes each, inside the loop over tiles."""

    def is_copy(x: Loop) -> bool:
        if width == 2:
            return x.count("LDG") > 0 and x.count("STS") > 0
        return any(i.name == "LDGSTS" and i.bytes_per_lane == width for i in x.body)

    return find(
        [x for x in found if x.innermost],
        f"copies of {width} bytes",
        is_copy,
        lambda x: (x.depth, len(x.body)),
    )


def copies_in_body(loop: Loop) -> int:
    return loop.count("LDGSTS") or loop.count("LDG")


def tile_loop(found: list[Loop]) -> Loop:
    """The Toeplitz kernels' loop over tiles: the outermost one around the products."""
    hot = products(found)
    return find(found, "tiles", lambda x: x.depth == 1 and x.start <= hot.start <= x.end, len_of)


def band(found: list[Loop]) -> Loop:
    """The Toeplitz forward kernel's construction of the band: the last of its prologue's loads."""
    before = [x for x in found if x.end < tile_loop(found).start]
    asynchronous = max((x.start for x in before if x.count("LDGSTS")), default=0)
    return find(
        before,
        "band elements",
        lambda x: x.start > asynchronous and x.count("LDG") > 0,
        lambda x: x.count("LDG"),
    )


def len_of(x: Loop) -> int:
    return len(x.body)


def row_overhead(found: list[Loop], inner: Loop) -> list[Instruction]:
    """What a row of the direct kernels costs beside its products: code of the loop around them."""
    around = enclosing(found, inner)
    code = exclusive(around, found) if around else ()
    return [i for i in code if i.name not in ("FFMA", "LDS")]


def once_a_tile(found: list[Loop], wide: bool) -> list[Instruction]:
    """Straight-line code of the loop over tiles: indices, and stores of one width.

    Pairs of outputs are stored at once where ``wide``, else one by one; the code holds both.
    """
    code = exclusive(tile_loop(found), found)
    single = ".U16" if any(".U16" in i.opcode for i in code if i.name == "STG") else None

    def is_pair(i: Instruction) -> bool:
        return single not in i.opcode if single else i.bytes_per_lane == 8

    return without_blocks(code, lambda i: i.name == "STG" and is_pair(i) != wide)


@dataclass(frozen=True)
class Moves:
    """Instructions that a kernel spends outside its products; None where it has no such code."""

    staged: float | None = None  # an element of the window, direct kernels
    copied: tuple[float, ...] = ()  # a copy of 16, 8 and 4 bytes, and of one element, Toeplitz kernels
    band: float | None = None  # an element of the band
    row: int | None = None  # a kernel row of the direct kernels, beside its products
    tile: int | None = None  # a tile, once a warp: indices and stores, of an even width


def moves(code: Code, kernel: str) -> Moves:
    """The costs of a kernel's loops beside the one that multiplies."""
    found = loops(code[kernel])
    hot = products(found)
    if kernel.startswith("direct_"):
        loop = staging(found)[0]
        fixed = re.search(r", [357]>", kernel)
        return Moves(len(loop.body) / loop.count("LDG"), row=None if fixed else len(row_overhead(found, hot)))
    widths = (16, 8, 4) if "tf32" in kernel else (16, 8, 4, 2)
    copied = tuple(len(x.body) / copies_in_body(x) for x in (copies(found, width) for width in widths))
    if kernel.startswith("toeplitz_weight"):
        return Moves(copied=copied)
    built = band(found)
    return Moves(
        copied=copied,
        band=len(built.body) / built.count("LDG"),
        tile=len(once_a_tile(found, wide=True)),
    )
