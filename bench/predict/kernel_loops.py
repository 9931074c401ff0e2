"""Which loop of a CUDA convolution kernel does what, and what it costs beside the products."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .sass import Instruction, Loop, enclosed, enclosing, exclusive, find, longest_path, loops, products

Code = dict[str, tuple[Instruction, ...]]


@dataclass(frozen=True)
class Widths:
    """Which variant of a kernel's code a launch takes: bytes of a copy to shared memory, and of a store."""

    copy: int
    store: int | None = None  # 0: outputs go through shared memory; None: there is one kind


def element_bytes(i: Instruction) -> int:
    """Of a lane's access to memory; narrow ones are told apart here."""
    return 2 if ".U16" in i.opcode or ".S16" in i.opcode else i.bytes_per_lane


def is_copy(x: Loop) -> bool:
    """Brings rows to shared memory: asynchronously, or several loads and then their stores."""
    if x.count("LDGSTS"):
        return x.innermost
    return x.innermost and x.count("LDG") in (2, 4) and x.count("STS") >= x.count("LDG") and x.depth > 2


def copies(found: list[Loop], width: int) -> list[Loop]:
    """The loops over copies to shared memory of ``width`` bytes each, in order of address."""
    some = [
        x
        for x in found
        if is_copy(x) and all(element_bytes(i) == width for i in x.body if i.name in ("LDGSTS", "LDG"))
    ]
    find(some, f"copies of {width} bytes", lambda x: True, len_of)
    deepest = max(x.depth for x in some)  # that of the loop over tiles; others precede it
    return [x for x in some if x.depth == deepest]


def copies_in_body(loop: Loop) -> int:
    return loop.count("LDGSTS") or loop.count("LDG")


def children(loop: Loop, found: list[Loop]) -> list[Loop]:
    inside = [x for x in found if x is not loop and loop.start <= x.start and x.end <= loop.end]
    return [x for x in inside if x.depth == loop.depth + 1]


def once(loop: Loop, found: list[Loop], widths: Widths) -> list[Instruction]:
    """What one iteration executes outside the loops in it, at most."""
    return longest_path(loop.body, children(loop, found), unwanted(found, widths))


def prologue(code: tuple[Instruction, ...], found: list[Loop], widths: Widths) -> list[Instruction]:
    """What a warp executes outside all loops, at most."""
    return longest_path(code, [x for x in found if x.depth == 1], unwanted(found, widths))


def unwanted(found: list[Loop], widths: Widths) -> Callable[[Instruction], bool]:
    """Code of copies and stores of other widths, and of channels_last tensors, which alone divides by numbers
    that no host has prepared."""

    def other(x: Loop) -> bool:
        if is_copy(x):
            return any(element_bytes(i) != widths.copy for i in x.body if i.name in ("LDGSTS", "LDG"))
        if x.depth > 1 and x.innermost and not x.macs and x.count("STG") and x.count("LDS"):
            return bool(widths.store)  # outputs on their way out of shared memory
        by_channels = x.count("LDG") == 4 and x.count("STS") == 4 and not x.innermost
        return by_channels and not any(is_copy(y) for y in found if x.start <= y.start and y.end <= x.end)

    others = [(x.start, x.end) for x in found if other(x)]
    inner = [(x.start, x.end) for x in found if x.innermost and not x.macs]
    outermost = [(x.start, x.end) for x in found if x.depth == 1]

    def test(i: Instruction) -> bool:
        divides = i.name == "MUFU" and any(a <= i.address <= b for a, b in outermost)
        if divides or any(a <= i.address <= b for a, b in others):
            return True
        if i.name != "STG" or widths.store is None or any(a <= i.address <= b for a, b in inner):
            return False
        return element_bytes(i) != widths.store

    return test


def tile_loop(found: list[Loop]) -> Loop:
    """The Toeplitz kernels' loop over tiles: the outermost one around the products."""
    hot = products(found)
    return find(found, "tiles", lambda x: x.depth == 1 and x.start <= hot.start <= x.end, len_of)


def tile_levels(found: list[Loop]) -> list[Loop]:
    """The loop over tiles and those inside it that bring in windows: each runs once a tile, but for channel
    multipliers and enormous kernels."""
    levels, hot = [tile_loop(found)], products(found)
    while inner := next((x for x in children(levels[-1], found) if encloses_copies(x, hot, found)), None):
        levels.append(inner)
    return levels


def encloses_copies(x: Loop, hot: Loop, found: list[Loop]) -> bool:
    return enclosed(hot, x) and any(is_copy(y) and enclosed(y, x) for y in found)


def tile_code(found: list[Loop], widths: Widths) -> list[Instruction]:
    """What a warp executes for a tile outside inner loops, at most."""
    return [i for level in tile_levels(found) for i in once(level, found, widths)]


def band(found: list[Loop]) -> Loop:
    """The Toeplitz forward kernel's construction of the band: the last of its prologue's loads."""
    before = [x for x in found if x.end < tile_loop(found).start and x.innermost]
    return find(
        before, "band elements", lambda x: x.count("LDG") == 1 and x.count("STS") == 1, lambda x: x.start
    )


def len_of(x: Loop) -> int:
    return len(x.body)


def step_overhead(found: list[Loop], widths: Widths) -> list[Instruction]:
    """What the loop around the Toeplitz kernels' products executes beside them, at most; products that are
    left over when it was unrolled count with the others."""
    around, other = enclosing(found, products(found)), unwanted(found, widths)
    if around is None:
        raise LookupError("no loop around the products; the kernel changed: adapt bench/predict")
    return longest_path(around.body, children(around, found), lambda i: i.name == "HMMA" or other(i))


def row_overhead(found: list[Loop], inner: Loop) -> list[Instruction]:
    """What a row of the direct kernels costs beside its products: code of the loop around them."""
    around = enclosing(found, inner)
    code = exclusive(around, found) if around else ()
    return [i for i in code if i.name not in ("FFMA", "LDS")]


def narrow_row(found: list[Loop], inner: Loop, multiply_adds: int) -> list[Instruction]:
    """A kernel row of fewer taps than the direct kernels' loop takes at once: it jumps over that loop, and of
    the products behind it executes ``multiply_adds``."""
    around = enclosing(found, inner)
    for i in around.body if around else ():
        target = i.target or 0
        if around and i.address < inner.start and inner.end < target:
            path = [x for x in around.body if x.address <= i.address or x.address >= target]
            return [x for x in path if not x.macs] + [x for x in path if x.macs][:multiply_adds]
    raise LookupError("no jump over the products; the kernel changed: adapt bench/predict")


@dataclass(frozen=True)
class Moves:
    """Instructions that a kernel spends outside its products; None where it has no such code."""

    copied: tuple[float | None, ...] = ()  # an element, by copies of 16, 8 and 4 bytes, and of one element
    band: float | None = None  # an element of the band
    row: int | None = None  # a kernel row of the direct kernels, beside its products
    tile: int | None = None  # a tile (direct: an image of it), once a warp: indices, and stores of full width
    block: int | None = None  # before the first tile and after the last, once a warp


def moves(code: Code, kernel: str) -> Moves:
    """The costs of a kernel's loops beside the one that multiplies."""
    found, whole = loops(code[kernel]), Widths(16, full_store(kernel))
    hot, size = products(found), 2 if "float16" in kernel else 4
    loops_of = {width: copies(found, width)[0] for width in (16, 8, 4, 2) if width >= size}
    copied = tuple(len(x.body) / copies_in_body(x) * size / width for width, x in loops_of.items())
    row = None
    if kernel.startswith("direct_") and not re.search(r", [357]( stride 2)?>", kernel):
        row = len(row_overhead(found, hot))
    built = band(found) if kernel.startswith("toeplitz_forward") else None
    return Moves(
        copied=copied,
        band=len(built.body) / built.count("LDG") if built else None,
        row=row,
        tile=len(tile_code(found, whole)),
        block=len(prologue(code[kernel], found, whole)),
    )


def full_store(kernel: str) -> int | None:
    """Bytes of a store of the aligned variant."""
    if kernel.startswith("direct_forward"):
        return 0 if "strided" in kernel else 16
    if kernel.startswith("toeplitz_forward"):
        return 8 if "tf32" in kernel else 4
    return None
