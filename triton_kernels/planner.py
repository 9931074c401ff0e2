"""Chooses an algorithm and its blocks: a pure function of problem, dtype and machine.

Costs are counted, per multiprocessor and in clock cycles, from the same three things everywhere:
multiply-adds over the rate of the unit that does them, instructions issued to load and place operands, and
bytes over the share of memory bandwidth. They rank candidates; they are not promises. The counts are derived
in ``docs/triton-notes.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .problem import ConvProblem, WeightProblem, has_rows

HALF = ("float16", "bfloat16")
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

TUNE_LIMIT = 6  # configurations tried per problem; each costs one compilation (about a second)
MAX_PARTIAL_BYTES = 256 << 20  # scratch of the split weight gradient
SMALLEST_DOT = 16  # every side of a tl.dot, on every backend


@dataclass(frozen=True)
class Machine:
    """What the planner knows of a device. Rates are per multiprocessor and clock cycle."""

    backend: str = "cuda"  # cuda | hip | xpu | interpreter
    multiprocessors: int = 132
    shared_bytes: int = 227 * 1024
    bytes_per_clock: float = 18.0
    fma_per_clock: float = 128.0
    half_mac_per_clock: float = 2048.0
    tf32_mac_per_clock: float = 1024.0

    @property
    def wave(self) -> int:
        """Programs that fill the device twice: fewer leave multiprocessors idle at the end."""
        return 4 * self.multiprocessors


H200 = Machine()
A100 = Machine("cuda", 108, 163 * 1024, 12.0, 64.0, 1024.0, 512.0)
B200 = Machine("cuda", 148, 227 * 1024, 28.0, 128.0, 4096.0, 2048.0)
MI300 = Machine("hip", 304, 64 * 1024, 8.0, 128.0, 1024.0, 512.0)
XPU = Machine("xpu", 64, 64 * 1024, 12.0, 128.0, 1024.0, 512.0)


@dataclass(frozen=True)
class Plan:
    """One way to run a problem. ``blocks`` are the kernel's block sizes by name."""

    algorithm: str  # direct | toeplitz
    blocks: dict[str, int] = field(hash=False)
    num_warps: int = 4
    num_stages: int = 2
    splits: int = 1
    precision: str = "ieee"
    needs_rows: bool = False  # the input's columns must be adjacent in memory (an NHWC input is copied)
    macs: int = 0
    bytes: int = 0
    cycles: float = 0.0


@dataclass(frozen=True)
class Declined:
    algorithm: str
    reason: str


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def dot_precision(dtype: str, allow_tf32: bool) -> str:
    """``input_precision`` of tl.dot: exact float32 products unless torch allows tf32; moot for halves."""
    return "tf32" if dtype == "float32" and allow_tf32 else "ieee"


def mac_rate(dtype: str, precision: str, machine: Machine) -> float:
    """Multiply-adds per clock that a tl.dot of small tiles sustains: half of what the unit can do."""
    if dtype in HALF:
        return 0.5 * machine.half_mac_per_clock
    return 0.5 * (machine.tf32_mac_per_clock if precision == "tf32" else machine.fma_per_clock)


def finish(work_cycles: float, programs: int, traffic: float, machine: Machine) -> float:
    """Cycles of the whole launch: whole waves of programs, or memory, whichever is longer."""
    concurrent = 2 * machine.multiprocessors
    waves = ceil_div(max(programs, 1), concurrent)
    compute = work_cycles / max(programs, 1) * waves * 2
    memory = traffic / (machine.bytes_per_clock * machine.multiprocessors)
    return max(compute, memory) + 0.2 * min(compute, memory)


def clipped_window(problem_w, start_t: int, block_t: int, align: int) -> tuple[int, int]:
    """First and last + 1 image columns that output columns [start_t, start_t + block_t) reach."""
    low = start_t * problem_w.stride - problem_w.padding
    high = (start_t + block_t - 1) * problem_w.stride - problem_w.padding
    high += (problem_w.taps - 1) * problem_w.dilation + 1
    return max(low, 0) // align * align, min(high, problem_w.size_in)


# --- forward and backward_input ---


def plan_conv(
    problem: ConvProblem, dtype: str, machine: Machine, allow_tf32: bool = False
) -> tuple[list[Plan], list[Declined]]:
    """Plans for a forward problem or a phase of backward_input, best first, and what was declined and why."""
    plans = direct_plans(problem, dtype, machine)
    reason = why_no_toeplitz(problem.h, problem.w, dtype, machine)
    declined = [Declined("toeplitz", reason)] if reason else []
    if not reason:
        plans += toeplitz_plans(problem, dtype, machine, dot_precision(dtype, allow_tf32))
    return sorted(plans, key=lambda plan: plan.cycles), declined


def why_no_toeplitz(h, w, dtype: str, machine: Machine) -> str:
    if dtype == "float64":
        return "float64 accumulates in float64, which matrix units of most devices do not do"
    if w.taps < 3:
        return f"a kernel {w.taps} wide leaves the band almost empty"
    if w.dilation > 1 and w.taps * w.dilation > 8 * w.taps:
        return f"dilation {w.dilation} leaves at most one column of the band in 8"
    return ""


def conv_traffic(problem: ConvProblem, dtype: str) -> int:
    x = problem.batch * (problem.channels // problem.multiplier) * problem.reduce
    x *= problem.h.size_in * problem.w.size_in
    y = problem.batch * problem.channels * problem.h.size_out * problem.w.size_out
    w = problem.channels * problem.reduce * problem.h.taps * problem.w.taps
    return (x + y + w) * ITEM_BYTES[dtype]


def is_channels_last(strides: tuple[int, ...], channels: int, width: int) -> bool:
    return strides[1] == 1 and channels > 1 and strides[3] != 1 and width > 1


def direct_plans(problem: ConvProblem, dtype: str, machine: Machine) -> list[Plan]:
    """Blocks of the direct kernel: pixels for NCHW, pixels x channels for NHWC."""
    nhwc = is_channels_last(problem.x_strides, problem.channels, problem.w.size_in)
    pixels = problem.batch * problem.h.size_out * problem.w.size_out
    macs = pixels * problem.channels * problem.reduce * problem.h.taps * problem.w.taps
    rate = 0.25 * machine.fma_per_clock * (0.5 if dtype == "float64" else 1.0)
    plans = []
    for block_p, block_c, warps in (
        ((16, 32, 4), (8, 64, 4), (32, 32, 4), (4, 128, 4), (8, 32, 2))
        if nhwc
        else ((512, 1, 4), (256, 1, 4), (1024, 1, 4), (128, 1, 4), (64, 1, 2))
    ):
        programs = ceil_div(pixels, block_p) * ceil_div(problem.channels, block_c)
        padded = programs * block_p * block_c / max(pixels * problem.channels, 1)
        # Per tap: a broadcast load of the weight, then per element a load, two range checks and the product.
        per_thread = max(block_p * block_c / (32 * warps), 1.0)
        overhead = 1.0 + 1.0 / per_thread + (0.15 if per_thread > 4 else 0.0)
        traffic = conv_traffic(problem, dtype)
        plans.append(
            Plan(
                "direct",
                {"BLOCK_P": block_p, "BLOCK_C": block_c},
                warps,
                macs=macs,
                bytes=traffic,
                cycles=finish(macs * padded * overhead / rate, programs, traffic, machine),
            )
        )
    return plans


def toeplitz_plans(problem: ConvProblem, dtype: str, machine: Machine, precision: str) -> list[Plan]:
    """Blocks of the Toeplitz kernel that fit shared memory, each costed by what it executes."""
    item, w = ITEM_BYTES[dtype], problem.w
    rows = problem.batch * problem.h.size_out
    planes = problem.channels * problem.reduce
    align = 16 // item
    copied = not has_rows(problem.x_strides, w.size_in)
    traffic = conv_traffic(problem, dtype) * (3 if copied else 1)
    rate = mac_rate(dtype, precision, machine)
    plans = []
    for block_m, block_t, block_k, warps in toeplitz_blocks(rows, w.size_out, dtype):
        stages = 3 if item == 2 else 2
        if stages * (block_m + block_t) * block_k * item > machine.shared_bytes // 2:
            stages = 2
        if stages * (block_m + block_t) * block_k * item > machine.shared_bytes:
            continue
        if w.size_in % align != 0:
            # Rows of odd lengths are loaded an element at a time, each with an address and a mask in
            # registers: 64 elements a thread spill on sm_90, 32 fill all 255 registers. The FMA products of
            # float32 hold more operands beside them and spill three registers already at 8.
            warps = 8 if item == 4 or block_m * block_k >= 4096 else warps
            if block_m * block_k > 16 * 32 * warps:
                continue
        chunks = 0
        for start in range(0, w.size_out, block_t):
            low, high = clipped_window(w, start, block_t, align)
            chunks += ceil_div(max(high - low, 0), block_k)
        blocks_m = ceil_div(rows, block_m)
        steps = chunks * problem.h.taps * planes * blocks_m
        macs = steps * block_m * block_t * block_k
        # Per step: vector copies of the window, and the band by one masked gather per element.
        vector = align if w.size_in % align == 0 else 1
        instructions = block_m * block_k / vector * 8 + block_k * block_t * 12
        per_step = max(block_m * block_t * block_k / rate, instructions / 128) + 30
        programs = blocks_m * ceil_div(w.size_out, block_t) * problem.channels
        plans.append(
            Plan(
                "toeplitz",
                {"BLOCK_M": block_m, "BLOCK_T": block_t, "BLOCK_K": block_k},
                warps,
                stages,
                precision=precision,
                needs_rows=True,
                macs=macs,
                bytes=traffic,
                cycles=finish(steps * per_step, programs, traffic, machine),
            )
        )
    return plans


def toeplitz_blocks(rows: int, out_w: int, dtype: str) -> list[tuple[int, int, int, int]]:
    """(BLOCK_M, BLOCK_T, BLOCK_K, warps): accumulators of at most 64 registers a thread."""
    most_m = min(max(power_of_2(rows), SMALLEST_DOT), 512 if dtype in HALF else 128)
    most_t = min(max(power_of_2(out_w), SMALLEST_DOT), 64)
    blocks = []
    for block_m in (64, 128, 256, 512):
        for block_t in (16, 32, 64):
            for block_k in (16, 32, 64):
                if block_m > max(most_m, 64) or block_t > most_t:
                    continue
                accumulators = block_m * block_t
                if accumulators > 16384 or (dtype not in HALF and block_m * block_k > 8192):
                    continue
                blocks.append((block_m, block_t, block_k, 8 if accumulators >= 8192 else 4))
    return blocks


# --- backward_weight ---


def plan_weight(
    problem: WeightProblem, dtype: str, machine: Machine, allow_tf32: bool = False
) -> tuple[list[Plan], list[Declined]]:
    """Plans for a weight gradient, best first, and what was declined and why."""
    plans = weight_direct_plans(problem, dtype, machine)
    reason = why_no_toeplitz(problem.h, problem.w, dtype, machine)
    toeplitz = []
    if not reason:
        toeplitz = weight_toeplitz_plans(problem, dtype, machine, dot_precision(dtype, allow_tf32))
        if not toeplitz:
            reason = "no block of the correlation fits: the window of one block is wider than 256 columns"
    declined = [Declined("toeplitz", reason)] if reason else []
    return sorted(plans + toeplitz, key=lambda plan: plan.cycles), declined


def weight_traffic(problem: WeightProblem, dtype: str, splits: int) -> int:
    x = problem.batch * (problem.channels // problem.multiplier) * problem.h.size_in * problem.w.size_in
    dy = problem.batch * problem.channels * problem.h.size_out * problem.w.size_out
    partial = 8 * splits * problem.channels * problem.h.taps * problem.w.taps
    return (x + dy) * ITEM_BYTES[dtype] + partial


def split_count(programs: int, steps: int, weights: int, machine: Machine) -> int:
    """Shares of the reduction: enough programs for two waves, each with at least 4 steps, scratch bounded."""
    splits = ceil_div(machine.wave, max(programs, 1))
    splits = min(splits, max(steps // 4, 1), max(MAX_PARTIAL_BYTES // max(4 * weights, 1), 1))
    return max(splits, 1)


def weight_direct_plans(problem: WeightProblem, dtype: str, machine: Machine) -> list[Plan]:
    nhwc = is_channels_last(problem.x_strides, problem.channels, problem.w.size_in)
    pixels = problem.batch * problem.h.size_out * problem.w.size_out
    taps = problem.h.taps * problem.w.taps
    weights = taps * problem.channels
    rate = 0.12 * machine.fma_per_clock * (0.5 if dtype == "float64" else 1.0)
    plans = []
    for block_u, block_p, block_c, warps in (
        ((16, 2, 32, 4), (8, 4, 32, 4), (16, 4, 32, 4), (4, 4, 64, 4))
        if nhwc
        else ((16, 128, 1, 4), (16, 64, 1, 4), (32, 64, 1, 4), (8, 128, 1, 4))
    ):
        steps = ceil_div(pixels, block_p)
        tiles = ceil_div(taps, block_u) * ceil_div(problem.channels, block_c)
        splits = split_count(tiles, steps, weights, machine)
        programs = tiles * splits
        macs = tiles * block_u * block_c * steps * block_p
        traffic = weight_traffic(problem, dtype, splits)
        plans.append(
            Plan(
                "direct",
                {"BLOCK_U": block_u, "BLOCK_P": block_p, "BLOCK_C": block_c},
                warps,
                splits=splits,
                macs=macs,
                bytes=traffic,
                cycles=finish(macs / rate, programs, traffic, machine),
            )
        )
    return plans


def weight_window(w, block_t: int, align: int) -> tuple[int, int]:
    """(first column relative to a block's first input column, columns): what one block's windows reach.

    A single block is clipped to the image, so a kernel wider than the map costs no more than the map.
    """
    first = -w.padding // align * align
    reach = (block_t - 1) * w.stride + (w.taps - 1) * w.dilation + 1 - w.padding
    if w.size_out <= block_t:
        first, reach = max(first, 0), min(reach, w.size_in)
    return first, max(reach - first, 1)


def weight_toeplitz_plans(problem: WeightProblem, dtype: str, machine: Machine, precision: str) -> list[Plan]:
    item, w, h = ITEM_BYTES[dtype], problem.w, problem.h
    rows = problem.batch * h.size_out
    align = 16 // item
    copied = not has_rows(problem.x_strides, w.size_in)
    rate = mac_rate(dtype, precision, machine)
    weights = problem.channels * h.taps * w.taps
    plans = []
    for block_t in (16, 32, 64):
        if block_t > max(power_of_2(w.size_out), SMALLEST_DOT):
            continue
        window = max(power_of_2(weight_window(w, block_t, align)[1]), SMALLEST_DOT)
        for block_u in (1, 2, 4, 8, 16):
            stacked = block_u * window
            if stacked > 256 or stacked * block_t > 16384 or block_u > power_of_2(h.taps):
                continue
            if block_u > 1 and stacked < 64:
                continue
            block_r = 64 if dtype in HALF and stacked <= 128 else 32
            steps = ceil_div(rows, block_r) * ceil_div(w.size_out, block_t)
            tiles = problem.channels * ceil_div(h.taps, block_u)
            splits = split_count(tiles, steps, weights, machine)
            total = tiles * steps
            macs = total * block_r * stacked * block_t
            vector = align if w.size_in % align == 0 else 1
            instructions = block_r * stacked / vector * 10 + block_r * block_t / vector * 8
            per_step = max(block_r * stacked * block_t / rate, instructions / 128) + 40
            ending = tiles * splits * (block_u * power_of_2(w.taps) * block_t * 8 / 128 + 500)
            traffic = weight_traffic(problem, dtype, splits) * (3 if copied else 1)
            blocks = {
                "BLOCK_U": block_u,
                "BLOCK_V": power_of_2(w.taps),
                "BLOCK_R": block_r,
                "BLOCK_T": block_t,
                "WINDOW": window,
            }
            plans.append(
                Plan(
                    "toeplitz",
                    blocks,
                    8 if stacked * block_t >= 8192 else 4,
                    2,
                    splits,
                    precision,
                    needs_rows=True,
                    macs=macs,
                    bytes=traffic,
                    cycles=finish(total * per_step + ending, tiles * splits, traffic, machine),
                )
            )
    return plans


def worth_tuning(plans: Sequence[Plan], limit: int = TUNE_LIMIT) -> Sequence[Plan]:
    """The plans to time: the best by count, at most ``limit``, none counted over twice the best."""
    return [plan for plan in plans if plan.cycles <= 2 * plans[0].cycles][:limit]
