"""The CPU planner is a pure function of sizes, dtype and machine: its properties, not its constants."""

import itertools

import pytest

from cpu_plans import ISAS, PASSES, candidates, of

SUMMED = ("direct", "planar")  # term by term
DTYPES = ("float64", "float32", "float16", "bfloat16")
SCRATCH_LIMIT = 16 << 20  # per thread: kMaxScratchBytes in csrc/cpu/planner.h

SHAPES = [
    {"size": (n, c, side, side), "kernel": (k, k)}
    for n, c, side, k in itertools.product((1, 32), (3, 96, 1000), (7, 28, 112), (3, 7, 13, 31))
] + [
    {"size": (1, 64, 320, 200), "kernel": (31, 31)},
    {"size": (1, 8, 2048, 2048), "kernel": (51, 5)},
    {"size": (4, 40, 14, 14), "kernel": (1, 111)},
    {"size": (2, 64, 56, 56), "kernel": (5, 5), "stride": (2, 1)},
    {"size": (2, 64, 56, 56), "kernel": (7, 7), "dilation": (7, 7)},
    {"size": (2, 64, 56, 56), "kernel": (7, 7), "multiplier": 3},
    {"size": (0, 64, 56, 56), "kernel": (7, 7)},
    {"size": (1, 1, 1, 1), "kernel": (1, 1)},
]
all_shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))
all_passes = pytest.mark.parametrize("pass_name", PASSES)


@all_passes
@all_shapes
def test_every_candidate_is_well_formed(shape, pass_name):
    for dtype, isa, threads in itertools.product(DTYPES, ISAS, (1, 2, 64)):
        plans = candidates(pass_name, **shape, dtype=dtype, isa=isa, threads=threads)
        assert len({p["algorithm"] for p in plans}) == len(plans)
        possible = [p for p in plans if p["possible"]]
        assert possible and plans[: len(possible)] == possible, "what cannot run comes last"
        assert [p["cycles"] for p in possible] == sorted(p["cycles"] for p in possible)
        for i, plan in enumerate(plans):
            assert bool(plan["reason"]) == (i > 0), "all but the chosen one say why not"
            if plan["possible"]:
                assert plan["isa"] == isa or isa == "amx"
                assert plan["lanes"] >= 1 and min(plan["tile"]) >= 1 and plan["splits"] >= 1
                assert plan["cycles"] >= 0 and plan["flops"] >= 0
                least = 0 if plan["algorithm"] == "aten" else 1  # PyTorch's own scratch is not known here
                assert least <= plan["scratch_bytes"] <= SCRATCH_LIMIT


@all_passes
@all_shapes
def test_plans_are_deterministic(shape, pass_name):
    assert candidates(pass_name, **shape) == candidates(pass_name, **shape)


@all_passes
def test_direct_is_always_possible(pass_name):
    for kernel, stride, dilation in itertools.product(
        [(1, 1), (1, 300), (64, 64)], [(1, 1), (3, 2)], [(1, 1), (7, 5)]
    ):
        plans = candidates(pass_name, (1, 5, 40, 40), kernel, stride, dilation=dilation)
        assert of("direct", plans)["possible"]


@all_passes
@all_shapes
def test_float64_never_uses_the_fft(shape, pass_name):
    fft = of("fft", candidates(pass_name, **shape, dtype="float64"))
    assert not fft["possible"] and "float64" in fft["reason"]


@all_passes
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_switch_turns_the_fft_off(pass_name, dtype):
    shape = {"size": (8, 96, 56, 56), "kernel": (31, 31), "dtype": dtype}
    fft = of("fft", candidates(pass_name, **shape, fft=False))
    assert not fft["possible"]
    if dtype != "float64":
        assert fft["reason"] == "LKCONV_FFT=0"
        assert candidates(pass_name, **shape)[0]["algorithm"] not in SUMMED


def test_reasons_name_the_cause():
    shape = {"size": (2, 8, 64, 64), "kernel": (31, 31)}
    assert "stride" in of("fft", candidates(**shape, stride=(2, 1)))["reason"]
    assert "few products" in of("fft", candidates(size=(2, 8, 64, 64), kernel=(3, 3)))["reason"]
    whole = {
        "size": (2, 8, 31, 31),
        "kernel": (31, 31),
        "padding": (0, 0),
    }  # gradients without sums
    assert "few products" in of("fft", candidates("backward_input", **whole))["reason"]
    long = candidates(size=(1, 8, 1, 9000), kernel=(1, 5001), padding=(0, 2500))
    assert "transform" in of("fft", long)["reason"]
    many = candidates("backward_input", (1, 2, 120, 120), (61, 61), multiplier=300)
    assert "memory" in of("fft", many)["reason"]


@all_passes
def test_large_kernels_leave_direct_summation_and_never_return(pass_name):
    """On a 56x56 map there is one kernel size from which on something faster is chosen."""
    chosen = [candidates(pass_name, kernel=(k, k), aten=False)[0]["algorithm"] for k in range(1, 52, 2)]
    summed = [algorithm in SUMMED for algorithm in chosen]
    assert summed[0] and summed[1] and not summed[-1]
    assert sum(a != b for a, b in itertools.pairwise(summed)) == 1, chosen


@pytest.mark.parametrize("pass_name", ["forward", "backward_input"])
def test_small_kernels_are_summed_directly(pass_name):
    for k, side in itertools.product((1, 2, 3), (7, 14, 56, 200)):
        for channels_last in (False, True):
            plan = candidates(
                pass_name, (8, 96, side, side), (k, k), aten=False, channels_last=channels_last
            )[0]
            assert plan["algorithm"] in (("direct",) if channels_last else SUMMED)


@pytest.mark.parametrize("pass_name", ["forward", "backward_input"])
def test_rows_are_summed_along_where_they_fill_vectors_and_are_contiguous(pass_name):
    def chosen(side, **options):
        return candidates(pass_name, (8, 96, side, side), (3, 3), aten=False, **options)[0]["algorithm"]

    for isa in set(ISAS) - {"baseline"}:
        assert chosen(56, isa=isa) == chosen(56, isa=isa, stride=(2, 2)) == "planar"
        assert chosen(56, isa=isa, channels_last=True) == "direct"
        # Fewer columns than pixels: else they are counted through where there are masked loads.
        assert chosen(4, isa=isa, padding=(1, 0)) == "direct"
    assert chosen(56, dtype="float64") == "direct"


def test_planar_says_why_not():
    def reason(*args, **options):
        plan = of("planar", candidates(*args, **options))
        assert not plan["possible"]
        return plan["reason"]

    assert "float64" in reason(dtype="float64")
    assert "masked" in reason("backward_weight", isa="avx2")
    for options in ({"stride": (1, 2)}, {"stride": (3, 3)}, {"stride": (2, 2), "dilation": (2, 2)}):
        assert "stride" in reason("backward_weight", isa="avx512", **options)
    assert "float32 and bfloat16" in reason("backward_weight", isa="avx512", dtype="float16")
    assert "row" in reason(channels_last=True)
    far = {"size": (1, 1, 9000, 9000), "kernel": (7, 7), "dilation": (900, 1), "padding": (2700, 3)}
    assert "memory" in reason(isa="avx2", **far)


def test_contiguous_rows_are_read_in_place():
    def plan(kernel=(3, 3), side=14, **options):
        options = {"padding": (1, 2), "isa": "avx512", **options}
        return of("planar", candidates(size=(2, 16, side, side), kernel=kernel, **options))

    assert plan()["in_place"] and plan(pass_name="backward_input")["in_place"]
    assert plan(dilation=(2, 2), padding=(2, 3))["in_place"] and plan((1, 27), padding=(0, 13))["in_place"]
    assert plan(side=3)["in_place"] and plan(side=200)["in_place"] and plan(multiplier=2)["in_place"]
    for isa in ("baseline", "avx2"):
        assert not plan(isa=isa)["in_place"], "it has no masked loads"
    assert plan(dtype="bfloat16")["in_place"] and plan(dtype="bfloat16")["lanes"] == 2 * plan()["lanes"]
    for options in ({"kernel": (9, 3), "padding": (4, 1)}, {"multiplier": 2, "pass_name": "backward_input"}):
        assert plan(**options)["in_place"], "float32"
        assert not plan(**options, dtype="bfloat16")["in_place"], "its sums would be rounded half-way"
    assert not plan(dtype="float16")["in_place"]
    far = {"dilation": (900, 1), "padding": (2700, 3)}
    assert plan((7, 7), side=9000, **far)["possible"], "it needs no window"
    assert plan()["scratch_bytes"] < 4096


def test_wide_planes_are_swept():
    def swept(side, kernel=(3, 3), dtype="float32", **options):
        # Wider outputs than rows of pixels: else small planes are counted through.
        options = {"padding": (kernel[0] // 2, kernel[1] // 2 + 1), "isa": "avx512", **options}
        plan = of("planar", candidates(size=(2, 16, side, side), kernel=kernel, dtype=dtype, **options))
        assert plan["in_place"] or not plan["swept"]
        assert not plan["flat"]
        return plan["swept"]

    assert [swept(side) for side in (12, 14, 28, 40, 56, 112)] == [0, 0, 2, 3, 4, 4]
    assert [swept(side, dtype="bfloat16") for side in (7, 14, 28, 56, 112)] == [0, 0, 1, 2, 2]
    assert [swept(56, (k, k)) for k in (1, 2, 3, 5, 6, 7)] == [0, 0, 4, 4, 4, 0]
    assert [swept(28, (k, k)) for k in (3, 4, 5)] == [2, 2, 0], "blocks share the loads of taps"
    assert [swept(56, (k, k), dtype="bfloat16") for k in (3, 5, 7, 8)] == [2, 2, 1, 0]
    dilated = {"dilation": (3, 1), "padding": (3, 2)}
    assert [swept(side, dtype="bfloat16", **dilated) for side in (5, 14, 28)] == [0, 1, 1]
    assert [swept(side, **dilated) for side in (7, 14, 28)] == [0, 0, 2]
    assert swept(56, (3, 55)) == swept(56, stride=(2, 2)) == swept(56, isa="avx2") == 0
    assert swept(56, padding=(1, 16)) == 3 and swept(56, padding=(1, 17)) == 0, "inner vectors are whole"
    assert swept(56, multiplier=2) == 4 and swept(56, multiplier=2, pass_name="backward_input") == 0
    assert swept(56, pass_name="backward_input") == 4
    assert [swept(56, (k, k), dtype="bfloat16", isa="amx") for k in (3, 5)] == [2, 0]
    assert swept(56, dtype="float16") == swept(56, dtype="float64") == 0


NOT_ALONG_MASKED_ROWS = (
    {"multiplier": 2, "pass_name": "backward_input"},
    {"dtype": "float16"},
    {"isa": "avx2"},
)


def test_outputs_of_small_planes_are_counted_through():
    def plan(side=14, kernel=(3, 3), dtype="float32", isa="avx512", **options):
        return of(
            "planar", candidates(size=(8, 64, side, side), kernel=kernel, dtype=dtype, isa=isa, **options)
        )

    assert [plan(side)["flat"] for side in (7, 14, 28, 56, 112)] == [True, True, True, False, False]
    wider = plan(28, (7, 7), "bfloat16", bf16_pairs=True)
    assert (
        wider["flat"] and wider["paired"] and not wider["in_place"] and wider["scratch_bytes"] > 2 * 2 * 28**2
    )
    assert not plan(28, (1, 3), "bfloat16", bf16_pairs=True)["paired"]
    assert plan(28, (7, 7), "bfloat16")["cycles"] > wider["cycles"]
    assert plan(dilation=(4, 4))["flat"] and plan(pass_name="backward_input")["flat"]
    assert plan(dilation=(4, 7))["flat"] and not plan(dilation=(4, 8))["flat"], (
        "a column of taps moves too far"
    )
    for kernel in ((3, 9), (9, 3), (3, 4)):
        assert not plan(kernel=kernel)["flat"]
    for options in (
        {"padding": (1, 0)},
        {"stride": (2, 2)},
        *NOT_ALONG_MASKED_ROWS,
        {"channels_last": True},
    ):
        assert not plan(**options)["flat"], options
    assert plan(padding=(3, 1))["flat"] and plan(multiplier=2)["flat"]


def test_weight_gradients_of_small_planes_are_counted_through():
    def plan(side=28, kernel=(3, 3), dtype="bfloat16", isa="avx512", bf16_pairs=True, **options):
        size = (8, 64, side, side)
        options = {
            "size": size,
            "kernel": kernel,
            "dtype": dtype,
            "isa": isa,
            "bf16_pairs": bf16_pairs,
            **options,
        }
        return of("planar", candidates("backward_weight", **options))

    taken = plan()
    assert taken["flat"] and taken["in_place"] and not taken["paired"], "its pairs are neighbouring pixels"
    for side in (14, 28, 56):
        assert not plan(side, dtype="float32")["flat"], "sweeps keep a row of outputs for each kernel row"
    far = {"dilation": (4, 4), "padding": (4, 4), "dtype": "float32"}
    assert plan(20, **far)["flat"] and not plan(56, **far)["flat"]
    assert not plan(bf16_pairs=False)["flat"] and not plan(isa="avx2")["possible"]
    assert plan(dilation=(2, 2))["flat"] and plan(multiplier=2)["flat"] and plan(56)["flat"]
    assert not plan(stride=(2, 2))["flat"] and not plan(dtype="float16")["possible"]
    assert not plan(120)["flat"], "a lane would add up too many products"


def test_long_rows_and_columns_of_taps_are_bands():
    def strip(kernel, side=28, isa="avx512", **options):
        plan = of("planar", candidates(size=(8, 64, side, side), kernel=kernel, isa=isa, **options))
        assert plan["possible"]
        return plan["strip"]

    for dtype in ("float32", "bfloat16"):
        assert all(strip(k, dtype=dtype) for k in ((55, 1), (1, 55), (27, 1)))
        assert not any(strip(k, dtype=dtype) for k in ((5, 1), (1, 3), (3, 27), (27, 3)))
    assert strip((55, 1), pass_name="backward_input") and strip((55, 1), multiplier=2)
    assert strip((31, 1), padding=(30, 0)) and not strip((31, 1), padding=(15, 1))
    for options in (
        {"dilation": (2, 1)},
        {"stride": (2, 1)},
        *NOT_ALONG_MASKED_ROWS,
    ):
        assert not strip((27, 1), **options), options
    # Of bfloat16 a plane of floats would not fit: another kernel takes it.
    assert not strip((9, 1), side=2300, dtype="bfloat16")


def test_strided_rows_are_read_in_place():
    def in_place(kernel=(3, 3), stride=(2, 2), **options):
        options = {"padding": (1, 1), "isa": "avx512", "kernel": kernel, "stride": stride, **options}
        return of("planar", candidates(size=(2, 16, 28, 30), **options))["in_place"]

    for pass_name in ("forward", "backward_input"):
        assert in_place(pass_name=pass_name) and in_place(stride=(1, 2), pass_name=pass_name)
        assert in_place((7, 4), pass_name=pass_name)
        assert not in_place(stride=(2, 3), pass_name=pass_name), "pixels are dealt to two columns"
        assert not in_place(dilation=(3, 1), pass_name=pass_name)
        assert not in_place(isa="avx2", pass_name=pass_name)
    assert not in_place((8, 3)) and in_place((13, 3), pass_name="backward_input"), "phases have half the rows"
    assert not in_place((16, 3), pass_name="backward_input")
    assert in_place(stride=(3, 2), pass_name="backward_input") and not in_place(stride=(3, 2))
    assert in_place(multiplier=2) and not in_place(multiplier=2, pass_name="backward_input")


def test_pytorch_takes_small_kernels_on_large_maps_only():
    def chosen(kernel, side=56, pass_name="forward", **options):
        return candidates(pass_name, (8, 96, side, side), kernel, channels_last=True, **options)[0][
            "algorithm"
        ]

    strided = {"kernel": (3, 3), "stride": (2, 2)}
    assert chosen(**strided) == "aten"
    assert chosen((3, 3)) == chosen((1, 11)) == "direct", "read in place, it needs no help"
    assert chosen((1, 11), side=4) == "direct", "its call overhead outweighs a small map"
    assert chosen(**strided, aten=False) == "direct"
    assert chosen((31, 31)) != "aten" and chosen(**strided, pass_name="backward_weight") != "aten"
    assert chosen((1, 11), pass_name="backward_input") == "direct"
    assert chosen(**strided, dtype="float64") == chosen(**strided, isa="baseline") == "direct"
    declined = of("aten", candidates(kernel=(31, 31), channels_last=True))
    assert not declined["possible"] and "small kernels" in declined["reason"]
    assert of("aten", candidates(aten=False))["reason"] == "LKCONV_ATEN=0"


def test_pytorch_is_not_asked_to_copy_whole_tensors():
    for layout, word in (
        ({"channels_last": False}, "channels_last"),
        ({"channels_last": True, "multiplier": 2}, "multiplier"),
        ({"channels_last": True, "dense": False}, "slice"),
    ):
        declined = of("aten", candidates(kernel=(3, 3), **layout))
        assert not declined["possible"] and word in declined["reason"]


def test_pytorch_takes_strided_input_gradients_of_channels_last_maps():
    shape = {"size": (8, 128, 56, 56), "kernel": (3, 3), "stride": (2, 2), "channels_last": True}
    assert candidates("backward_input", **shape)[0]["algorithm"] == "aten"
    assert candidates("backward_input", **shape, aten=False)[0]["algorithm"] == "direct"
    assert candidates("backward_input", **shape, dtype="bfloat16")[0]["algorithm"] == "direct"


@all_passes
@pytest.mark.parametrize("only", ["direct", "planar", "fft", "toeplitz", "aten"])
def test_one_algorithm_can_be_asked_for(pass_name, only):
    for dtype, kernel in itertools.product(DTYPES, ((3, 3), (13, 13), (31, 31))):
        layout = {"channels_last": only != "planar"}
        free = candidates(pass_name, kernel=kernel, dtype=dtype, **layout)
        asked = candidates(pass_name, kernel=kernel, dtype=dtype, **layout, only=only)
        if of(only, free)["possible"]:
            assert asked[0]["algorithm"] == only
            assert all(c["reason"] == f"LKCONV_ALGORITHM={only}" for c in asked[1:] if c["possible"])
        else:
            assert asked == free


@all_passes
@pytest.mark.parametrize("algorithm", ["direct", "fft"])
def test_cost_grows_linearly_with_batch_and_channels(pass_name, algorithm):
    def cycles(n, c):
        return of(algorithm, candidates(pass_name, (n, c, 40, 40), (15, 15), threads=1))["cycles"]

    lanes = of(algorithm, candidates(pass_name))["lanes"]
    assert cycles(8, 4 * lanes) == pytest.approx(2 * cycles(8, 2 * lanes), rel=1e-9)
    assert cycles(8, 4 * lanes + 1) == pytest.approx(
        cycles(8, 5 * lanes), rel=1e-9
    )  # whole vectors are paid for
    first, second = cycles(8, lanes) - cycles(4, lanes), cycles(16, lanes) - cycles(8, lanes)
    assert second == pytest.approx(2 * first, rel=1e-9)  # affine: the kernel is prepared once


@all_passes
def test_more_work_never_costs_less(pass_name):
    for algorithm in ("direct", "fft"):
        for name, grow in (
            ("kernel", [{"kernel": (k, k)} for k in range(3, 40, 2)]),
            ("image", [{"size": (2, 32, s, s), "kernel": (9, 9)} for s in range(8, 120, 4)]),
        ):
            if algorithm == "fft" and name == "kernel":
                continue  # a longer kernel may meet a better transform length
            costs = [of(algorithm, candidates(pass_name, **g))["cycles"] for g in grow]
            slack = 1.0 if algorithm == "direct" else 1.25  # so may a larger image
            assert all(b * slack >= a for a, b in itertools.pairwise(costs)), (algorithm, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lanes_fill_the_vectors_of_the_instruction_set(dtype):
    for isa, width in (("baseline", 16), ("avx2", 32), ("avx512", 64)):
        if isa in ISAS:
            element = 8 if dtype == "float64" else 4
            assert of("direct", candidates(dtype=dtype, isa=isa))["lanes"] == width // element


def test_only_weight_gradients_split_the_batch():
    for pass_name in PASSES:
        for threads in (1, 2, 16):
            plan = candidates(pass_name, (64, 3, 32, 32), (5, 5), threads=threads)[0]
            assert 1 <= plan["splits"] <= 64
            if pass_name != "backward_weight":
                assert plan["splits"] == 1
    assert candidates("backward_weight", (64, 3, 32, 32), (5, 5), threads=16)[0]["splits"] > 1
    assert candidates("backward_weight", (1, 3, 32, 32), (5, 5), threads=16)[0]["splits"] == 1


@pytest.mark.parametrize(("name", "value"), [("pass_name", "sideways"), ("dtype", "int8"), ("isa", "mmx")])
def test_unknown_names_are_errors(name, value):
    with pytest.raises(ValueError, match=value):
        candidates(**{name: value})
