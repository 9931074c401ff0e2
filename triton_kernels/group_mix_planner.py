"""Blocks and splits of the Group-Mix kernels: pure functions of sizes and machine.

There is one algorithm, so nothing is timed. ``tests/test_triton_group_mix_aot.py`` reads from compiled code
that no block chosen here spills.
"""

from __future__ import annotations

from dataclasses import dataclass

from .planner import SMALLEST_DOT, Machine

GRADIENT_LANES = 8  # columns of a window row that one program sums at once, a power of 2
MIN_TILES_PER_SPLIT = 4  # a split writes as much as it sums in a few tiles
MAX_SPLITS = 256


@dataclass(frozen=True)
class Blocks:
    """Tile sizes of segments (or heads) of one width.

    ``outputs`` covers all channels of a pixel, which LayerNorm needs, and ``inputs`` those summed at a time.
    ``pixels`` are of a tile that is written, ``sum_pixels`` of one that a product sums over,
    ``window_pixels`` of one that the gradients of a window row sum over.
    """

    pixels: int
    sum_pixels: int
    window_pixels: int
    inputs: int
    outputs: int
    num_warps: int


def power_of_2(n: int) -> int:
    return 1 << max(int(n) - 1, 0).bit_length()


def input_block(channels: int) -> int:
    """16 or 32 channels, whichever leaves fewer lanes idle: 40 channels are 48 lanes or 64."""
    return min((32, 16), key=lambda block: -(-channels // block) * block)


def blocks_for(channels: int, item_bytes: int) -> Blocks:
    """Tiles with which no kernel spills in half types on Hopper.

    A window's taps are loaded once per thread, so that narrow segments take more pixels to share them. Half
    types keep 64, the fewest rows of Hopper's matrix instruction; float32 and float64 multiply in ordinary
    registers and take what these hold.
    """
    outputs = max(SMALLEST_DOT, power_of_2(channels))
    inputs = input_block(channels)
    if item_bytes <= 2:
        pixels = 128 if outputs == SMALLEST_DOT else max(SMALLEST_DOT, min(64, 8192 // outputs))
        sum_pixels = max(SMALLEST_DOT, min(64, 2048 // outputs))
    else:
        pixels = max(SMALLEST_DOT, min(64, 8192 // item_bytes // outputs))
        sum_pixels = max(SMALLEST_DOT, min(32, 2048 // item_bytes // outputs))
    window_pixels = max(1, min(16, 16384 // (GRADIENT_LANES * inputs * max(item_bytes, 4))))
    wide = outputs * item_bytes > 64
    return Blocks(pixels, sum_pixels, window_pixels, inputs, outputs, 8 if wide else 4)


def splits_for(programs: int, tiles: int, machine: Machine) -> int:
    """How often to cut a sum over ``tiles`` so that with ``programs`` side by side the machine is full."""
    useful = -(-tiles // MIN_TILES_PER_SPLIT)
    return max(1, min(useful, -(-machine.wave // max(programs, 1)), MAX_SPLITS))
