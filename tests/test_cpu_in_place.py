"""Tensors that the kernels read and write where they are: whole and part groups of channels, every edge.

tests/test_cpu_isa.py runs this file again with the algorithm given, which the planner might not choose.
"""

import pytest
import torch

import accuracy
import cases
from cases import Case, same

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Channels on both sides of one and two vectors, and far more than a task holds at once; widths below, at and
# above one block; kernels higher and wider than the image.
CHANNELS_LAST = [
    same((2, 32, 9, 15), (3, 3)),
    same((1, 64, 8, 31), (3, 3), bias=False),
    same((2, 40, 7, 7), (5, 5)),
    same((1, 100, 11, 14), (7, 7)),
    same((1, 33, 6, 30), (7, 7), bias=False),
    same((1, 48, 10, 8), (51, 5)),
    same((1, 63, 4, 16), (9, 1)),
    same((1, 35, 16, 3), (1, 7)),
    same((1, 2100, 3, 7), (3, 3)),
    same((2, 96, 12, 9), (3, 3), dilation=(2, 1)),
    same((1, 47, 10, 20), (5, 3), dilation=(3, 1)),
    # Columns that a dilation keeps apart; even and odd numbers of them.
    same((2, 64, 14, 14), (3, 3), dilation=(3, 3)),
    same((1, 37, 9, 14), (3, 3), dilation=(1, 5)),
    same((1, 48, 14, 13), (7, 7), dilation=(2, 2)),
    same((1, 32, 30, 57), (5, 5), dilation=(2, 2), bias=False),
    # Strides along rows, with and without a last pixel of halo.
    Case((2, 48, 15, 17), (3, 3), padding=(1, 1), stride=(2, 2)),
    Case((1, 64, 16, 16), (3, 3), padding=(1, 1), stride=(2, 2), bias=False),
    Case((1, 33, 20, 31), (7, 7), padding=(3, 3), stride=(2, 2)),
    Case((1, 40, 12, 30), (7, 7), padding=(3, 3), stride=(3, 2)),
    Case((1, 35, 14, 12), (5, 5), padding=(2, 2), stride=(1, 2)),
    Case((1, 32, 9, 33), (4, 5), padding=(0, 2), stride=(2, 2)),
    # Rows wider than registers hold: narrower and wider than the image, even and off centre.
    same((1, 64, 14, 14), (1, 27)),
    same((2, 48, 7, 7), (13, 13)),
    same((1, 33, 9, 30), (3, 9)),
    same((1, 36, 6, 28), (5, 55), bias=False),
    Case((2, 40, 9, 16), (3, 12), padding=(1, 2)),
    Case((1, 34, 8, 20), (9, 10), padding=(4, 14)),
    Case((1, 70, 5, 60), (2, 8)),
    same((1, 32, 12, 12), (31, 31)),
    # Two rows of bfloat16 at once: even numbers of rows, one alone, rows beyond either edge.
    Case((1, 96, 10, 12), (4, 13), padding=(2, 6)),
    Case((2, 64, 5, 9), (6, 3), padding=(5, 1)),
    Case((1, 32, 1, 14), (2, 5), padding=(1, 2)),
    # Groups whose pixels are copied first, several of them in a task.
    same((2, 512, 9, 9), (5, 5)),
    same((1, 65, 7, 7), (7, 7)),
    same((1, 223, 7, 6), (13, 13), bias=False),
    Case((1, 1024, 8, 6), (6, 6), padding=(3, 2)),
    Case((1, 512, 12, 12), (5, 5), padding=(2, 2), stride=(2, 2)),
    # Sums of two groups at once: pixels that fall in few sets of a cache, and a stride.
    same((2, 512, 7, 14), (3, 3)),
    same((1, 1024, 6, 9), (5, 5), bias=False),
    same((1, 512, 5, 7), (4, 3), dilation=(1, 2)),
    Case((2, 64, 9, 15), (3, 3), padding=(1, 1), stride=(2, 2)),
    Case((1, 96, 8, 13), (5, 5), padding=(2, 2), stride=(2, 2), bias=False),
    Case((1, 640, 5, 10), (3, 5), padding=(1, 2), stride=(1, 2)),
    # Blocks of two to eight outputs, of which the dilation leaves some columns one fewer.
    same((1, 48, 6, 11), (3, 3), dilation=(2, 2)),
    same((1, 32, 5, 17), (5, 5), dilation=(1, 3)),
    same((1, 64, 5, 13), (7, 7), dilation=(1, 2)),
    same((2, 33, 7, 7), (5, 5), dilation=(2, 2)),
    same((1, 32, 4, 9), (3, 3), dilation=(1, 4)),
    same((1, 32, 3, 24), (5, 5)),
    # Sums of more rows than registers keep for one lane, and of a row that is longer still.
    same((1, 32, 40, 28), (7, 7)),
    same((1, 33, 5, 300), (5, 3), bias=False),
    # Tall strips, whose rows and columns are exchanged.
    same((2, 64, 14, 9), (27, 1)),
    same((1, 1, 14, 9), (13, 1)),
    Case((1, 40, 16, 7), (14, 1), padding=(3, 0)),
    Case((2, 35, 9, 6), (13, 1), padding=(6, 2), bias=False),
    Case((1, 32, 30, 5), (13, 1), padding=(6, 0), stride=(1, 2)),
]
# Rows of one pixel up to several vectors, for one plane and many; kernels of all of planar's blocks.
CONTIGUOUS = [
    same((2, 3, 5, 1), (3, 3)),
    same((1, 4, 9, 16), (3, 3), bias=False),
    same((1, 37, 14, 14), (3, 3)),
    same((3, 2, 20, 33), (5, 5)),
    same((1, 3, 40, 67), (7, 7)),
    same((2, 2, 9, 130), (7, 3), bias=False),
    Case((1, 5, 12, 12), (4, 6), padding=(2, 3)),
    Case((2, 3, 10, 29), (8, 3), padding=(9, 0)),
    same((1, 3, 31, 18), (3, 3), dilation=(2, 3)),
    same((1, 3, 18, 40), (1, 27)),
    Case((2, 3, 17, 35), (3, 3), padding=(1, 1), stride=(2, 2)),
    Case((1, 4, 19, 20), (7, 7), padding=(3, 3), stride=(2, 2)),
    Case((2, 3, 11, 70), (3, 5), padding=(0, 4), stride=(1, 2), bias=False),
    # Sums over several images, and over parts of one; groups of channels that are not full.
    same((40, 3, 14, 14), (3, 3)),
    Case((2, 17, 300, 20), (3, 3), padding=(1, 1), bias=False),
    Case((3, 5, 13, 47), (2, 9), padding=(3, 2)),
    same((2, 18, 16, 16), (11, 1)),
    same((1, 3, 8, 34), (1, 11)),
    Case((2, 4, 9, 12), (1, 1)),
    Case((2, 6, 13, 18), (3, 3), padding=(1, 1), multiplier=3),
    Case((2, 18, 22, 37), (7, 7), padding=(3, 3), stride=(2, 2), multiplier=2),
    Case((1, 2, 20, 66), (1, 8), padding=(2, 5), stride=(2, 2)),
    # Planes that are swept row after row: one to four vectors and several blocks of them, rows that end in
    # one; rows apart, fewer than the kernel's; halos that are missing, one-sided and wider than a vector.
    same((2, 3, 11, 28), (3, 3)),
    same((1, 5, 9, 48), (4, 3), bias=False),
    same((3, 2, 12, 56), (3, 3)),
    same((1, 3, 7, 64), (6, 5)),
    same((1, 2, 10, 113), (3, 3), bias=False),
    same((2, 2, 6, 200), (5, 5)),
    Case((1, 3, 9, 60), (3, 3)),
    Case((1, 3, 8, 57), (3, 4), padding=(2, 0)),
    Case((2, 2, 3, 50), (5, 3), padding=(4, 1)),
    Case((1, 2, 5, 60), (3, 3), padding=(7, 22), bias=False),
    same((2, 3, 14, 14), (3, 3), dilation=(5, 5)),
    same((1, 7, 8, 7), (3, 3), dilation=(3, 3)),
    same((3, 3, 9, 8), (5, 3), dilation=(2, 1), bias=False),
    Case((2, 5, 13, 6), (4, 4), padding=(1, 2), dilation=(3, 2)),
    same((1, 3, 23, 61), (3, 7), dilation=(4, 3)),
    same((1, 2, 9, 58), (7, 3), dilation=(11, 20)),
    # The same at a stride of 2, two narrow planes at a time.
    Case((3, 5, 14, 14), (3, 3), padding=(1, 1), stride=(2, 2)),
    Case((1, 4, 9, 15), (3, 3), padding=(1, 1), stride=(2, 2), bias=False),
    Case((2, 3, 8, 17), (3, 3), padding=(0, 1), stride=(2, 2)),
    Case((1, 3, 7, 10), (3, 3), padding=(2, 3), stride=(2, 2)),
    Case((2, 3, 6, 70), (3, 3), padding=(3, 0), stride=(2, 2)),
    Case((2, 3, 5, 6), (3, 3), padding=(1, 1), stride=(2, 2), multiplier=2),
    Case((8, 96, 28, 28), (3, 3), padding=(1, 1), stride=(2, 2)),
    # Enough channels for planes to be transposed: whole and part groups, runs of 32 pixels and less.
    same((2, 32, 14, 14), (7, 7)),
    same((1, 37, 9, 11), (5, 5)),
    same((2, 65, 8, 20), (13, 13), bias=False),
    Case((1, 33, 5, 3), (3, 3)),
    same((1, 223, 7, 7), (13, 13)),
    Case((1, 70, 13, 16), (6, 5), padding=(3, 2)),
    same((1, 48, 12, 12), (3, 3), dilation=(2, 2)),
    same((1, 40, 6, 9), (1, 9)),
    Case((1, 20, 9, 9), (5, 5), padding=(2, 2), multiplier=2),
    # Large enough to ask for planes ahead; planes that are summed in tiles.
    same((3, 40, 60, 60), (3, 3)),
    same((1, 3, 600, 130), (7, 7), bias=False),
    same((1, 2, 530, 150), (5, 5), dilation=(3, 2)),
]

# Planes whose outputs are counted through: every kernel of that kind, with planes of less than a vector and
# of an odd number of them, and rows that begin anywhere in one.
FLAT = [
    Case((2, 3, *side), (kh, kw), padding=(kh // 2, kw // 2))
    for kh in range(1, 8)
    for kw, side in zip((1, 3, 5, 7), ((5, 1), (7, 9), (13, 18), (10, 21)), strict=True)
] + [
    same((1, 2, 1, 1), (3, 3)),
    same((3, 5, 3, 4), (7, 7)),
    same((2, 3, 14, 14), (3, 3), dilation=(4, 4), bias=False),
    same((1, 3, 6, 20), (5, 3), dilation=(5, 7)),
    same((2, 2, 17, 18), (5, 5), dilation=(3, 3)),
    Case((1, 4, 9, 12), (3, 3), padding=(0, 1)),
    Case((2, 3, 5, 11), (3, 5), padding=(6, 2), bias=False),
    Case((1, 3, 8, 10), (3, 3), padding=(1, 1), multiplier=2),
    same((2, 600, 14, 14), (3, 3)),  # large enough to ask for outputs ahead
    same((3, 19, 28, 28), (3, 3)),
    same((9, 18, 28, 28), (5, 5), bias=False),  # weight gradients of more images than a lane adds up
    same((2, 3, 28, 28), (3, 3), dilation=(3, 3)),
    same((8, 3, 20, 20), (3, 3), dilation=(4, 4)),
]

# Rows and columns of taps: kernels whose windows all hold the whole line, and others; one block and several,
# of one to four vectors and of every height.
STRIPS = [
    case
    for count, size in (
        (27, (2, 3, 14, 14)),
        (55, (1, 5, 28, 28)),
        (13, (2, 2, 7, 9)),
        (21, (1, 3, 3, 60)),
        (9, (1, 2, 2, 100)),
        (51, (1, 2, 30, 45)),
        (111, (1, 2, 20, 130)),
        (15, (2, 3, 1, 17)),
        (35, (1, 3, 40, 1)),
    )
    for case in (same(size, (1, count)), same(size, (count, 1), bias=False))
] + [
    Case((2, 3, 20, 24), (16, 1), padding=(15, 0)),
    Case((2, 3, 20, 24), (1, 16), padding=(0, 3)),
    Case((1, 2, 18, 50), (12, 1), multiplier=2),
    same((2, 300, 28, 28), (55, 1)),  # large enough to ask for planes ahead
]

all_passes = pytest.mark.parametrize("pass_name", accuracy.PASSES)
all_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@all_passes
@all_dtypes
@pytest.mark.parametrize("case", CHANNELS_LAST, ids=str)
@pytest.mark.parametrize(
    "layout", ["channels_last", "channel_slice_channels_last", "spatial_slice_channels_last"]
)
def test_channels_last(case, layout, dtype, pass_name):
    accuracy.check(pass_name, case, cases.make_tensors(case, dtype, layout))


@all_passes
@all_dtypes
@pytest.mark.parametrize("case", CONTIGUOUS, ids=str)
@pytest.mark.parametrize(
    "layout", ["contiguous", "spatial_slice", "misaligned", "expanded_batch_and_channels"]
)
def test_contiguous(case, layout, dtype, pass_name):
    accuracy.check(pass_name, case, cases.make_tensors(case, dtype, layout))


@all_passes
@all_dtypes
@pytest.mark.parametrize("case", FLAT, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "spatial_slice", "expanded_batch_and_channels"])
def test_outputs_counted_through(case, layout, dtype, pass_name):
    accuracy.check(pass_name, case, cases.make_tensors(case, dtype, layout))


@pytest.mark.parametrize("pass_name", ["forward", "backward_input"])
@all_dtypes
@pytest.mark.parametrize("case", STRIPS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "spatial_slice", "expanded_batch_and_channels"])
def test_strips(case, layout, dtype, pass_name):
    accuracy.check(pass_name, case, cases.make_tensors(case, dtype, layout))


@all_passes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_rows_that_are_asked_for_ahead(layout, stride, dtype, pass_name):
    size = (2, 48, 190, 190) if dtype == torch.float32 else (2, 96, 190, 190)
    case = Case(size, (3, 3), padding=(1, 1), stride=(stride, stride))
    accuracy.check(pass_name, case, cases.make_tensors(case, dtype, layout))
