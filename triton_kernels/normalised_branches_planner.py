"""Tiles and splits of the sums of normalised branches: pure functions of sizes and machine.

There is one algorithm, so nothing is timed. ``tests/test_triton_normalised_branches_aot.py`` reads from
compiled code that no tile chosen here spills.
"""

from __future__ import annotations

from dataclasses import dataclass

from .planner import Machine, ceil_div, power_of_2, split_count

IN_PLACE_TAPS = 49
FEWEST_PIXELS = 64  # of a tile: two for each thread of a warp
MOST_PIXELS = 256  # with twice as many the backward pass spills on some architectures
REDUCE_TILES = 64  # partial results that the second passes hold at once
REDUCE_CHANNELS = 8  # channels of a second pass's program: one memory sector of float32


def in_place(kernel_size: tuple[int, int]) -> bool:
    """Whether a branch is convolved where its sum is formed, and not by the convolution op beforehand.

    Up to 7 x 7 a convolution is bound by memory, or near it, and sharing the reads of its input and output
    is worth more than a faster product. Beyond, matrix units win by more than the reads cost.
    """
    return kernel_size[0] * kernel_size[1] <= IN_PLACE_TAPS


@dataclass(frozen=True)
class Tiles:
    """Block sizes: ``pixels`` x ``channels`` of the passes over images; of the weight gradient ``taps`` x
    ``weight_pixels`` x ``weight_channels``."""

    pixels: int
    channels: int
    taps: int
    weight_pixels: int
    weight_channels: int


def tiles_for(pixels: int, channels: int, channels_last: bool) -> Tiles:
    """Contiguous images run a channel at a time, so that a tap is one number; channels_last ones have
    channels on the fast axis, and 8 values for each thread of 4 warps."""
    if channels_last:
        block_c = min(32, power_of_2(channels))
        return Tiles(1024 // block_c, block_c, 8, 128 // block_c, block_c)
    return Tiles(max(FEWEST_PIXELS, min(MOST_PIXELS, power_of_2(pixels))), 1, 16, 128, 1)


def weight_splits(
    tap_blocks: int, pixels: int, channels: int, taps: int, tiles: Tiles, machine: Machine
) -> int:
    """Shares of the output pixels that one program each sums over for the weight gradients."""
    programs = tap_blocks * ceil_div(channels, tiles.weight_channels)
    return split_count(programs, ceil_div(pixels, tiles.weight_pixels), taps * channels, machine)
