"""Reads disassembled GPU code (``cuobjdump -sass``): instructions, loops, and what a loop executes.

Everything is a pure function of text but :func:`disassemble` and :func:`register_counts`, which run NVIDIA's
``cuobjdump``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*[A-Z0-9x.]*)\s*([^;]*);")
_RESOURCES = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+)")

_FMA = ("FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2")
_SPECIAL = ("MUFU", "I2F", "F2I", "F2F", "I2I", "F2FP")
_CONTROL = ("BRA", "BSSY", "BSYNC", "EXIT", "RET", "CALL", "WARPSYNC", "NOP", "YIELD", "BREAK", "BMOV")
_BARRIER = ("BAR", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "SYNCS", "MEMBAR", "ARRIVES", "FENCE")


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with its suffixes: LDS.128, HMMA.16816.F32.BF16
    operands: str
    conditional: bool = False  # runs under a predicate

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def kind(self) -> str:
        """The class an instruction is counted in: mostly the unit that executes it."""
        name = self.name
        for kind, names in (
            ("fma", _FMA),
            ("special", _SPECIAL),
            ("branch", _CONTROL),
            ("barrier", _BARRIER),
        ):
            if name in names:
                return kind
        if name in ("HMMA", "HGMMA", "IMMA"):
            return "matrix"
        if name in ("LDS", "LDSM", "STS", "LDGSTS", "LDG", "STG"):
            return name
        if name.startswith("U") or name.startswith("R2U"):
            return "uniform"
        return "imad" if name == "IMAD" else "integer"

    @property
    def target(self) -> int | None:
        """Where a branch goes, if it is one."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands.strip()) if self.name == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow; a branch's operands may hold a condition, too."""
        if self.name in ("BRA", "EXIT", "RET"):
            return self.conditional or re.match(r"!?U?P\w+", self.operands) is not None
        return True

    @property
    def bytes_per_lane(self) -> int:
        """Of a memory access: 16, 8 or 4 (narrower ones move as much per cycle as 4)."""
        if self.name == "LDSM":
            return 4 * int(self.opcode[-1]) if self.opcode[-1] in "24" else 4
        suffixes = self.opcode.split(".")
        return 16 if "128" in suffixes else 8 if "64" in suffixes else 4

    @property
    def macs(self) -> int:
        """Multiply-adds of one warp."""
        if self.name == "FFMA":
            return 32
        if self.name == "HMMA":
            m, n, k = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}[
                self.opcode.split(".")[1]
            ]
            return m * n * k
        if self.name == "HGMMA":  # of a group of four warps
            m, n, k = map(int, self.opcode.split(".")[1].split("x"))
            return m * n * k // 4
        return 0


@dataclass(frozen=True)
class Loop:
    """Instructions from a backward branch's target to the branch. ``depth`` is 1 for an outermost loop."""

    body: tuple[Instruction, ...]
    depth: int
    innermost: bool

    @property
    def start(self) -> int:
        return self.body[0].address

    @property
    def end(self) -> int:
        return self.body[-1].address

    @property
    def macs(self) -> int:
        return sum(i.macs for i in self.body)

    def count(self, *names: str) -> int:
        """Instructions whose name (LDS, HMMA, ...) is one of ``names``."""
        return sum(i.name in names for i in self.body)


def parse(text: str) -> dict[str, tuple[Instruction, ...]]:
    """Function name -> instructions. Raises ``ValueError`` if there are none."""
    found = {}
    for part in re.split(r"Function : ", text)[1:]:
        name, _, code = part.partition("\n")
        found[name.strip()] = tuple(
            Instruction(int(address, 16), opcode, operands.strip(), bool(predicate))
            for address, predicate, opcode, operands in _INSTRUCTION.findall(code)
        )
    if not found or not all(found.values()):
        raise ValueError("no instructions found; expected the output of cuobjdump -sass")
    return found


def loops(code: Iterable[Instruction]) -> list[Loop]:
    """All loops of a function in order of address, outer ones first.

    A loop is a branch to an earlier address. A branch to itself, which ends every function as padding, is
    none. Loops that share a head (a ``continue``) are one, as long as the longest.
    """
    code = tuple(code)
    spans: dict[int, int] = {}
    for i in code:
        head = i.target
        if head is not None and head < i.address:
            spans[head] = max(i.address, spans.get(head, 0))
    found = []
    for head, tail in sorted(spans.items()):
        around = sum(h <= head and tail <= t for h, t in spans.items())
        inside = any((h, t) != (head, tail) and head <= h and t <= tail for h, t in spans.items())
        body = tuple(i for i in code if head <= i.address <= tail)
        found.append(Loop(body, around, not inside))
    return found


def find(
    candidates: Iterable[Loop], what: str, accept: Callable[[Loop], bool], best: Callable[[Loop], Any]
) -> Loop:
    """The loop that ``accept`` takes and ``best`` ranks highest; ``LookupError`` if there is none."""
    taken = [loop for loop in candidates if accept(loop)]
    if not taken:
        raise LookupError(
            f"the machine code has no loop of {what}; the kernel or the compiler changed: adapt bench/predict"
        )
    return max(taken, key=best)


def products(candidates: Iterable[Loop]) -> Loop:
    """The innermost loop with the most multiply-adds."""
    return find(candidates, "multiply-adds", lambda x: x.innermost and x.macs > 0, lambda x: x.macs)


def enclosing(candidates: Iterable[Loop], inner: Loop) -> Loop | None:
    """The smallest loop around ``inner``."""
    around = [x for x in candidates if x is not inner and x.start <= inner.start and inner.end <= x.end]
    return max(around, key=lambda x: x.depth, default=None)


def enclosed(inner: Loop, outer: Loop) -> bool:
    return outer.start <= inner.start and inner.end <= outer.end


def exclusive(outer: Loop, candidates: Iterable[Loop]) -> tuple[Instruction, ...]:
    """Instructions of ``outer`` outside all loops in it."""
    inner = [x for x in candidates if x.depth > outer.depth and outer.start <= x.start and x.end <= outer.end]
    return tuple(i for i in outer.body if not any(x.start <= i.address <= x.end for x in inner))


def longest_path(
    code: Iterable[Instruction], free: Iterable[Loop], unwanted: Callable[[Instruction], bool]
) -> list[Instruction]:
    """The most instructions that one pass through ``code`` can execute.

    Instructions of the loops ``free`` cost nothing and are left out; paths through an ``unwanted``
    instruction are not taken. So code that exists in several variants, of which a launch takes one, counts
    once. Raises ``LookupError`` if every path is unwanted.
    """
    code = tuple(code)
    index = {i.address: n for n, i in enumerate(code)}
    spans = [(x.start, x.end) for x in free]
    impossible = -(10**9)
    best: list[tuple[int, int]] = [(0, 0)] * (len(code) + 1)  # instructions from here on, next index
    best[len(code)] = (0, len(code))
    for n in range(len(code) - 1, -1, -1):
        i = code[n]
        inside = any(a <= i.address <= b for a, b in spans)
        cost = impossible if unwanted(i) else 0 if inside else 1
        after = [n + 1] if i.falls_through else []
        if i.target is not None and i.target > i.address:
            after.append(index.get(i.target, len(code)))
        if not after:  # the end of the code, of an iteration, or of an inner loop
            after = [len(code)]
        length, following = max((best[m][0], m) for m in after)
        best[n] = (cost + length, following)
    if best[0][0] < 0:
        raise LookupError("every path through the code is unwanted; the kernel changed: adapt bench/predict")
    path, n = [], 0
    while n < len(code):
        if not any(a <= code[n].address <= b for a, b in spans):
            path.append(code[n])
        n = best[n][1]
    return path


def kinds(code: Iterable[Instruction]) -> Counter[str]:
    return Counter(i.kind for i in code)


# Of the direct forward kernels' width classes; the others are called after their width.
DIRECT_NAMES = {-2: "3 stride 2", -1: "strided", 0: "any"}


def kernel_name(mangled: str) -> str:
    """``_C_cuda.kernels()``'s name of a convolution kernel, or "" for another function."""
    match = re.match(r"_ZN6lkconv4cuda\d+(direct_\w+?|toeplitz_\w+?|reduce_splits|pack)I(.*)EEv", mangled)
    if not match:
        return ""
    kernel, arguments = match.groups()
    if kernel == "pack":
        return f"pack<{ {'t': 16, 'j': 32, 'm': 64}[arguments] }>"
    types = {"NS0_6BFloatE": "bfloat16", "NS0_4HalfE": "float16", "f": "float32", "d": "float64"}
    mangled_type = next(t for t in types if arguments.startswith(t))
    dtype = types[mangled_type]
    values = [int(v.replace("n", "-")) for v in re.findall(r"L[ib](n?\d+)E?", arguments[len(mangled_type) :])]
    if kernel.startswith("toeplitz"):
        dtype = "tf32" if dtype == "float32" else dtype
        shape = f"{values[0]}x{values[1]}" if kernel == "toeplitz_forward" else str(values[0])
        return f"{kernel}<{dtype}, {shape}>"
    if kernel == "direct_forward":
        return f"{kernel}<{dtype}, {DIRECT_NAMES.get(values[0], values[0])}>"
    if kernel == "direct_weight":
        return f"{kernel}<{dtype}, {'unit' if values[0] else 'strided'}>"
    return f"{kernel}<{dtype}>"


def cuobjdump() -> Path:
    """The toolkit's disassembler, or the one that comes with Triton."""
    candidates = [Path(found)] if (found := shutil.which("cuobjdump")) else []
    candidates += [Path(p) / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump" for p in sys.path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError("no cuobjdump: put the CUDA toolkit's bin on PATH, or install triton")


def _run(*arguments: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([cuobjdump(), *arguments], capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.stdout + done.stderr


def extract(module: Path, arch: str, folder: Path) -> list[Path]:
    """Writes the module's machine code for ``arch`` (sm_90a) to ``folder``, a file for each source."""
    _run("-xelf", arch, module.resolve(), cwd=folder)
    found = sorted(folder.glob(f"*.{arch}.cubin"))
    if not found:
        raise LookupError(f"{module} holds no machine code for {arch}")
    return found


def disassemble(cubin: Path) -> dict[str, tuple[Instruction, ...]]:
    return parse(_run("-sass", cubin))


def register_counts(cubin: Path) -> dict[str, int]:
    """Function -> registers a thread."""
    return {name: int(registers) for name, registers, _ in _RESOURCES.findall(_run("-res-usage", cubin))}
