"""bench.predict.group_mix: tiles that explain the planner's launches, and what kernels' loops add up to."""

import pytest

from bench.predict import group_mix
from bench.predict.machine import Work
from bench.predict.sass import Instruction, Loop


def test_tiles_are_the_planners_rectangles():
    """Fewest tiles first: 14 x 14 in one of 16 x 16; 7 x 7 in one of 8 x 8; then the smallest window."""
    assert group_mix.shapes(256, 14, 14, 6) == (16, 16, 1)
    assert group_mix.shapes(64, 7, 7, 2) == (8, 8, 1)
    assert group_mix.shapes(256, 56, 56, 6) == (32, 8, 14)


def test_a_launch_that_no_tile_explains():
    with pytest.raises(ValueError, match="no tile explains"):
        group_mix.tile_of({"blocks": 7, "shared_bytes": 1}, 3, 14, 16, 3, 1)


def test_multiply_adds_of_a_tile():
    """Whatever the loops look like, their products are the formula's: d (k * k + d) a pixel."""
    fma, other = Instruction(0, "FFMA", ""), Instruction(0, "IADD3", "")

    def loop(macs):
        return Loop((fma,) * macs + (other,), 1, True)

    loops = group_mix.Loops(loop(0), loop(0), loop(8 * 5), (other,), loop(0), loop(64))
    work, tile = Work(), group_mix.Tile(16, 16, 16, 1)
    group_mix.add_tile(work, loops, tile, 16, 5, 3.0)
    pixels = 16 * 16
    assert 32 * work.kinds["fma"] == 3 * pixels * (16 * 25 + 16 * 16)


@pytest.fixture(scope="module")
def code():
    module = pytest.importorskip("lkconv._C_cuda", reason="the CUDA module lkconv._C_cuda was not built")
    if group_mix.ARCH not in module.architectures():
        pytest.skip(f"the CUDA module holds {module.architectures()}, not {group_mix.ARCH}")
    try:
        return group_mix.load_code()
    except (FileNotFoundError, LookupError) as error:  # no disassembler
        pytest.skip(str(error))


@pytest.mark.parametrize("dtype", group_mix.SIZE)
@pytest.mark.parametrize("side,d", [(56, 16), (28, 48), (14, 64), (7, 96)])
def test_predictions_of_the_built_kernels(code, side, d, dtype):
    """Five launches that move 28 elements a token and channel, and execute at least their products."""
    found = list(group_mix.predicted(code, side, d, dtype))
    elements = group_mix.BATCH * side * side * d
    assert [name.split("<")[0] for name, *_ in found] == ["aggregate"] * 4 + ["normalize"]
    assert sum(moved for *_, moved in found) == 28 * elements * group_mix.SIZE[dtype]
    for (_, work, _, _), window, parts in zip(found, group_mix.WINDOWS, (3, 3, 3, 3), strict=False):
        assert 32 * work.kinds["fma"] >= parts * elements * (window**2 + d)
