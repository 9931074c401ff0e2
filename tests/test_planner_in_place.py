"""The CPU planner where tensors are read in place: what it groups, copies and multiplies at once."""

import itertools

import pytest

from cpu_plans import ISAS, PASSES, candidates, of

all_passes = pytest.mark.parametrize("pass_name", PASSES)


@all_passes
def test_odd_rows_of_channels_last_tensors_are_read_in_place(pass_name):
    def plan(kernel=(7, 7), side=56, channels=96, **options):
        options = {"channels_last": True, "aten": False, **options}
        return of("direct", candidates(pass_name, (8, channels, side, side), kernel, **options))

    for kernel in ((3, 3), (5, 5), (7, 7), (51, 5), (9, 1)):
        assert plan(kernel)["in_place"]
        assert not plan(kernel, channels_last=False)["in_place"]
        for dtype in ("float64", "float16"):
            assert not plan(kernel, dtype=dtype)["in_place"]
        assert plan(kernel)["scratch_bytes"] < plan(kernel, dtype="float16")["scratch_bytes"]
        assert plan(kernel, dtype="bfloat16")["in_place"] == (ISAS[-1] in ("avx512", "amx"))
    assert plan((9, 9))["in_place"] == (pass_name != "backward_weight")
    assert not plan((3, 3), padding=(1, 0))["in_place"], "its rows are not as wide as the image's"
    phases = pass_name == "backward_input"
    assert plan((3, 3), stride=(2, 2))["in_place"] != phases and not plan((3, 3), stride=(1, 3))["in_place"]
    assert plan((3, 3), dilation=(1, 2))["in_place"] == (pass_name != "backward_weight")
    assert plan((3, 3), dilation=(2, 1))["in_place"]
    assert not plan((3, 3), channels=5)["in_place"] and not plan((3, 3), multiplier=2)["in_place"]
    assert not plan((3, 3), channels=24, dtype="bfloat16")["in_place"], "a group is 32 channels"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tasks_in_place_keep_their_rows_near(dtype):
    """A few groups, where rows are short and tensors come from a shared cache; else whole pixels. Enough
    tasks remain."""

    def plan(kernel, channels, side=56, batch=2, **options):
        shape = {
            "size": (batch, channels, side, side),
            "kernel": kernel,
            "channels_last": True,
            "aten": False,
        }
        return of("direct", candidates(**shape, dtype=dtype, isa="avx512", threads=2, **options))

    def groups(*arguments, **options):
        return plan(*arguments, **options)["span"]

    channels_of_a_group = 16 if dtype == "float32" else 32  # 64 bytes

    whole = 256 // channels_of_a_group
    for side, kernel in ((7, (7, 7)), (14, (3, 3)), (28, (3, 3)), (28, (7, 7)), (56, (3, 3))):
        near = 8 if kernel == (3, 3) else 2
        assert groups(kernel, 256, side, batch=8 if side < 28 else 2) == (near if side < 56 else whole)
    assert groups((3, 3), 256, 200, batch=1) == whole, "rows too long for that cache"
    assert groups((3, 3), 256, 14, batch=8, dilation=(3, 3), padding=(3, 3)) == whole
    assert groups((3, 3), 256, 14, batch=8, stride=(2, 2)) == whole
    assert groups((1, 3), 256, 14, batch=8, padding=(0, 1)) == whole
    assert plan((1, 7), 3000, padding=(0, 3))["scratch_bytes"] <= 256 << 10
    spans, rows = whole // groups((3, 3), 256, batch=1), plan((3, 3), 256, batch=1)["tile"][0]
    assert spans * -(-56 // rows) >= 8, "four tasks for each thread"


def test_groups_share_blocks_where_pixels_fall_in_few_cache_sets():
    def together(kernel=(3, 3), channels=1024, side=14, pass_name="forward", **options):
        options = {"isa": "avx512", "channels_last": True, "aten": False, **options}
        plan = of("direct", candidates(pass_name, (8, channels, side, side), kernel, **options))
        assert plan["in_place"] and plan["span"] % plan["together"] == 0
        return plan["together"]

    strided = {"stride": (2, 2), "padding": (1, 1)}
    assert together() == together(pass_name="backward_input") == together((5, 5)) == 2
    assert together(channels=512) == 2 and together(channels=480) == 1, "pixels 2048 bytes apart, and not"
    assert together((7, 7), channels=512) == together(channels=512, pass_name="backward_weight") == 1
    for pass_name in ("forward", "backward_weight"):
        assert together(channels=480, pass_name=pass_name, **strided) == 2
        assert together(channels=496, pass_name=pass_name, **strided) == 1, "an odd number of groups"
        assert together(channels=64, side=224, pass_name=pass_name, **strided) == 1, "memory is slower"
    assert together(dtype="bfloat16") == together(isa="avx2") == 1


def test_weight_gradients_read_longer_runs_of_pixels_far_apart():
    def span(channels, kernel=(3, 3), dtype="float32"):
        options = {"isa": "avx512", "channels_last": True, "threads": 2, "dtype": dtype}
        return of("direct", candidates("backward_weight", (8, channels, 28, 28), kernel, **options))["span"]

    assert span(192) == span(224) == 2 and span(256) == span(512) == 8, "pixels 1024 bytes apart"
    assert span(512, (7, 7)) == 2 and span(512, (7, 7), "bfloat16") == span(256, dtype="bfloat16") == 8


@pytest.mark.parametrize("pass_name", ["forward", "backward_input"])
def test_tall_strips_become_rows_of_channels_last_tensors(pass_name):
    def plan(kernel, **options):
        size = options.pop("size", (8, 64, 20, 28))
        return of("direct", candidates(pass_name, size, kernel, isa="avx512", aten=False, **options))

    def is_exchanged(kernel, **options):
        return plan(kernel, channels_last=True, **options)["exchanged"]

    assert is_exchanged((13, 1)) and is_exchanged((55, 1))
    assert plan((55, 1), channels_last=True)["cycles"] < 0.7 * plan((55, 1))["cycles"]
    for other in ({"kernel": (11, 1)}, {"kernel": (13, 3)}, {"kernel": (13, 1), "dilation": (2, 1)}):
        assert not is_exchanged(**other)
    assert plan((13, 1), channels_last=True)["tile"][0] == 20, "rows of the tile are the output's"
    assert not plan((13, 1))["exchanged"], "planes"
    assert not is_exchanged((13, 1), size=(8, 1, 20, 28)), "one channel is a plane"


def test_columns_of_a_dilation_have_blocks_of_their_own():
    def blocks(width, dilation, kernel=(3, 3), **options):
        options = {"isa": "avx512", "channels_last": True, "aten": False, **options}
        dilation = (1, dilation)
        return of("direct", candidates("forward", (8, 64, 9, width), kernel, dilation=dilation, **options))[
            "blocks"
        ]

    assert blocks(14, 3) == (5, 4) and blocks(14, 4) == (4, 3) and blocks(14, 5) == (3, 2)
    assert blocks(14, 1) == (14, 14) and blocks(56, 1) == (14, 14) and blocks(12, 1, (5, 5)) == (6, 6)
    bfloat16 = {"dtype": "bfloat16", "bf16_pairs": True}
    assert blocks(14, 1, **bfloat16) == (7, 7) and blocks(24, 1, **bfloat16) == (8, 8)
    assert blocks(24, 1, (7, 7), **bfloat16) == (6, 6), (
        "eight outputs and seven taps of two vectors are too many"
    )
    assert blocks(7, 2, (7, 7)) == (4, 3)


def test_pixels_in_one_cache_set_are_copied():
    """Pixels 4096 bytes apart share a set of a first-level cache, which holds too few for large kernels."""

    def copied(kernel, channels, pass_name="forward", side=14, **options):
        shape = {"size": (8, channels, side, side), "kernel": kernel, "channels_last": True, "aten": False}
        options = {"dtype": "bfloat16", "isa": "avx512", "bf16_pairs": True, **options}
        plan = of("direct", candidates(pass_name, **shape, **options))
        assert not (plan["in_place"] and plan["copied"])
        return plan["copied"]

    for kernel in ((5, 5), (13, 13)):
        for channels in (512, 1024, 2048):
            assert copied(kernel, channels) == copied(kernel, channels, "backward_input") == "pixels"
            assert not copied(kernel, channels, side=56), "an image that leaves the cache itself"
        assert not copied(kernel, 96 * 5), "an odd number of lines apart"
    assert not copied((3, 3), 2048) and not copied((1, 9), 1024), "few pixels or taps"
    assert copied((7, 7), 499) == "pixels" and not copied((5, 5), 499), "pixels across two lines, many taps"
    for other in ({"pass_name": "backward_weight"}, {"dtype": "float32"}, {"bf16_pairs": False}):
        assert not copied((5, 5), 1024, **other)


@all_passes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planes_are_transposed_for_kernels_in_place(dtype, pass_name):
    def copied(kernel=(7, 7), side=14, channels=96, **options):
        options = {"dtype": dtype, "isa": "avx512", **options}
        return of("direct", candidates(pass_name, (8, channels, side, side), kernel, **options))["copied"]

    assert copied() == copied((3, 3), 16) == copied(channels=499) == "planes"
    assert not copied(side=40), "their copies would not stay near"
    assert not copied(channels=12) and not copied(dtype="float16") and not copied(isa="avx2")
    assert bool(copied(isa="amx")) == (dtype == "float32"), "not measured beside matrix units"
    assert not copied(stride=(2, 2), padding=(3, 3))
    assert bool(copied((13, 13))) == (pass_name != "backward_weight")
    assert bool(copied(multiplier=2)) == (pass_name != "backward_input")


def test_a_last_group_that_is_not_full_shares_its_task():
    for groups, side, dtype in itertools.product(range(2, 140), (7, 28), ("float32", "bfloat16")):
        lanes = 16 if dtype == "float32" else 32
        shape = {"size": (8, groups * lanes - 1, side, side), "kernel": (9, 9), "channels_last": True}
        plan = of("direct", candidates(**shape, dtype=dtype, isa="avx512", aten=False))
        assert plan["in_place"] or plan["copied"]
        assert (groups - 1) % plan["span"] and plan["span"] <= 64


@all_passes
def test_two_rows_of_bfloat16_at_once(pass_name):
    def paired(kernel=(7, 7), algorithm="direct", **options):
        options = {"dtype": "bfloat16", "isa": "avx512", "bf16_pairs": True, "channels_last": True, **options}
        return of(algorithm, candidates(pass_name, (8, 96, 14, 14), kernel, **options))["paired"]

    assert paired() and paired((3, 3)) and paired((5, 1)) and paired(channels_last=False)
    assert not paired((1, 7)), "one row has no partner"
    assert paired((13, 1)) == (pass_name == "backward_weight"), "a tall strip becomes one row"
    for other in ({"bf16_pairs": False}, {"isa": "avx2"}, {"isa": "amx"}, {"dtype": "float32"}):
        assert not paired(**other)
    assert paired((13, 13)) and not paired((13, 13), algorithm="fft")


def test_weight_gradients_of_contiguous_planes_are_summed_in_place():
    def chosen(side, kernel, stride=1, channels=384, **options):
        options = {"isa": "avx512", "padding": (kernel // 2,) * 2, "stride": (stride,) * 2, **options}
        size = (8, channels, side, side)
        return candidates("backward_weight", size=size, kernel=(kernel, kernel), **options)[0]

    for dtype in ("float32", "bfloat16"):
        for side in (14, 28, 56):
            plan = chosen(side, 3, dtype=dtype)
            assert plan["algorithm"] == "planar" and plan["in_place"] and plan["lanes"] == 16
        assert chosen(40, 3, stride=2, dtype=dtype)["algorithm"] == "planar"
        assert chosen(28, 7, dtype=dtype)["algorithm"] == chosen(80, 5, dtype=dtype)["algorithm"] == "planar"
        assert chosen(7, 7, dtype=dtype)["algorithm"] == "direct", "vectors would be half empty"
    assert chosen(28, 5, dtype="bfloat16", bf16_pairs=True)["flat"]
    assert chosen(14, 3, dtype="float16")["algorithm"] == "direct"
    assert chosen(14, 3, channels_last=True)["algorithm"] == "direct"
    assert chosen(14, 3, isa="avx2")["algorithm"] == "direct"
