"""The limits of an H200, and from counts to times.

Sources: NVIDIA's H200 data sheet (4.8 TB/s; dense peaks of 67, 495 and 989 TFLOP/s in float32, tf32 and
16 bits) and the CUDA C++ programming guide (throughput of instructions, limits of compute capability 9.0).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from .sass import Instruction

SMS = 132
CLOCK = 1.75e9  # assumed under load; the planners assume the same
MEMORY, SECTOR = 4.8e12, 32  # bytes a second, and of the least that is moved
# FLOP/s of the unit that may do the work.
PEAK = {"float32": 67e12, "tf32": 494.7e12, "bfloat16": 989.4e12, "float16": 989.4e12}
REGISTERS, SHARED, RESERVED, THREADS, BLOCKS = 65536, 233472, 1024, 2048, 32  # of an SM

# Multiply-adds per cycle and SM. mma.sync reaches about 62% of what wgmma does on this architecture (Luo et
# al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking", 2024).
MMA_SYNC = 0.62
MATRIX_RATE = {16: 2048.0, 8: 1024.0}  # by depth of one instruction: 16-bit types, tf32


def blocks_per_sm(registers: int, threads: int, shared: int) -> int:
    """Blocks that an SM holds at once. Registers are handed out to warps in units of 256."""
    warps = math.ceil(threads / 32)
    by_registers = REGISTERS // (warps * math.ceil(max(registers, 1) * 32 / 256) * 256)
    by_shared = SHARED // (math.ceil(shared / 128) * 128 + RESERVED)
    return min(BLOCKS, THREADS // (warps * 32), by_registers, by_shared)


@dataclass
class Work:
    """What a launch executes on all SMs together, in warp instructions and cycles of one SM's units."""

    instructions: float = 0.0
    kinds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    wavefronts: float = 0.0  # of 128 bytes, between registers and shared memory or the first cache
    matrix_cycles: float = 0.0
    in_products: float = 0.0  # of the instructions, those of loops that multiply

    def add(self, code: Iterable[Instruction], times: float, matrix_share: float = 1.0) -> None:
        """``code`` executed ``times`` by some warp; ``matrix_share`` of its matrix products do work."""
        code = tuple(code)
        if any(i.macs for i in code):
            self.in_products += times * len(code)
        for i in code:
            self.instructions += times
            self.kinds[i.kind] += times
            if i.kind in ("LDS", "LDSM", "STS", "LDGSTS", "LDG", "STG"):
                self.wavefronts += times * i.bytes_per_lane / 4
            if i.kind == "matrix":
                self.matrix_cycles += times * matrix_share * matrix_cycles(i)
                self.wavefronts += times * shared_operand_bytes(i) / 128


def matrix_cycles(i: Instruction) -> float:
    """Cycles of an SM's four tensor cores for one warp's share of a product."""
    if i.name == "HGMMA":
        return i.macs / MATRIX_RATE[int(i.opcode.split(".")[1].split("x")[2])]
    depth = 16 if i.opcode.split(".")[1] == "16816" else i.macs // 128
    return i.macs / (MMA_SYNC * MATRIX_RATE[depth])


def shared_operand_bytes(i: Instruction) -> float:
    """What one warp's share of a wgmma reads from shared memory: B, and A unless registers hold it."""
    if i.name != "HGMMA":
        return 0.0
    _, columns, _ = map(int, i.opcode.split(".")[1].split("x"))
    rows = 0 if re.match(r"R\d+, R\d+, gdesc", i.operands) else 64
    return (rows + columns) * 32 / 4  # a row of either operand is 32 bytes deep


def imbalance(blocks: int) -> float:
    """How much more than the mean the busiest SM has to do."""
    return math.ceil(blocks / SMS) / (blocks / SMS) if blocks else 1.0


def pipe_seconds(work: Work, blocks: int, memory_bytes: float) -> dict[str, float]:
    """Time of each unit if nothing else held it up; ``fma`` executes integer multiply-adds at half rate."""
    k = work.kinds
    cycles = {
        "issue": work.instructions / 4,
        "fma": (k["fma"] + 2 * k["imad"]) / 4,
        "integer": k["integer"] / 2,
        "special": k["special"] * 2,
        "matrix": work.matrix_cycles,
        "shared": work.wavefronts,
    }
    scale = imbalance(blocks) / (SMS * CLOCK)
    return {name: value * scale for name, value in cycles.items()} | {"memory": memory_bytes / MEMORY}
