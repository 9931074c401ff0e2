"""The Triton planner as a pure function, and the stride phases it is given."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from triton_support import kernels

pytest.importorskip("triton")
planner = kernels("planner")
problem = kernels("problem")
plan = kernels().plan

LAYERS = [  # (N, C, H, k) of real large-kernel models
    (64, 384, 32, 31),
    (32, 128, 56, 31),
    (32, 512, 14, 27),
    (32, 1024, 7, 13),
    (32, 96, 56, 7),
    (1, 320, 14, 13),
    (8, 64, 112, 3),
]


def best(pass_name, layer, dtype, **kwargs):
    n, c, h, k = layer
    kwargs = {"every": True, **kwargs}
    return plan(pass_name, (n, c, h, h), c, (k, k), padding=(k // 2, k // 2), dtype=dtype, **kwargs)


@pytest.mark.parametrize("pass_name", ["forward", "backward_input", "backward_weight"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_every_layer_has_a_plan(pass_name, layer, dtype):
    rows = best(pass_name, layer, dtype)
    possible = [row for row in rows if row["possible"]]
    assert possible and possible == sorted(possible, key=lambda row: row["cycles"])
    assert all(row["reason"] for row in rows)
    # A plan executes at least the multiply-adds whose pixels lie inside the image.
    n, c, h, k = layer
    inside = sum(min(h, o + k // 2 + 1) - max(0, o - k // 2) for o in range(h))
    assert possible[0]["macs"] >= n * c * inside * inside


@pytest.mark.parametrize("pass_name", ["forward", "backward_input", "backward_weight"])
@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer[3] >= 13])
def test_large_half_kernels_use_matrix_units(pass_name, layer):
    assert best(pass_name, layer, "bfloat16")[0]["algorithm"] == "toeplitz"


@pytest.mark.parametrize("pass_name", ["forward", "backward_weight"])
def test_small_kernels_do_not(pass_name):
    # "3: do not use it": a 3-tap band fills 17% of its product.
    assert best(pass_name, (8, 64, 112, 3), "float32")[0]["algorithm"] == "direct"


def test_a_kernel_wider_than_the_map_costs_the_map():
    """Columns outside the image are clipped: at (W, k) = (32, 31) no more than a dense 32-column product."""
    row = best("forward", (64, 384, 32, 31), "bfloat16")[0]
    assert row["macs"] <= 64 * 384 * 32 * 31 * 32 * 32
    row = best("backward_weight", (64, 384, 32, 31), "bfloat16")[0]
    assert row["macs"] <= 64 * 384 * 32 * 32 * 32 * 32


@pytest.mark.parametrize("pass_name", ["forward", "backward_input", "backward_weight"])
def test_float64_never_uses_matrix_units(pass_name):
    rows = best(pass_name, (32, 128, 56, 31), "float64")
    assert {row["algorithm"] for row in rows if row["possible"]} == {"direct"}
    declined = [row for row in rows if not row["possible"]]
    assert [row["algorithm"] for row in declined] == ["toeplitz"] and "float64" in declined[0]["reason"]


def test_float32_products_are_exact_unless_tf32_is_allowed():
    for allowed, precision in ((False, "ieee"), (True, "tf32")):
        rows = best("forward", (64, 384, 32, 31), "float32", allow_tf32=allowed)
        assert {row["precision"] for row in rows if row.get("algorithm") == "toeplitz"} == {precision}


@pytest.mark.parametrize("machine", [planner.H200, planner.A100, planner.B200, planner.MI300, planner.XPU])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_fit_shared_memory(machine, dtype):
    item = planner.ITEM_BYTES[dtype]
    for layer in LAYERS:
        for row in best("forward", layer, dtype, machine=machine):
            if row["algorithm"] == "toeplitz" and row["possible"]:
                blocks = row["blocks"]
                tiles = (blocks["BLOCK_M"] + blocks["BLOCK_T"]) * blocks["BLOCK_K"] * item
                assert row["num_stages"] * tiles <= machine.shared_bytes
                assert min(blocks.values()) >= planner.SMALLEST_DOT


def test_split_weight_gradient_fills_the_machine_and_bounds_scratch():
    machine = planner.H200
    row = best("backward_weight", (64, 16, 64, 7), "bfloat16")[0]
    assert row["splits"] > 1
    assert planner.split_count(1, 10**6, 10**9, machine) == 1, "scratch of one split is all that fits"
    assert planner.split_count(10**6, 10**6, 10, machine) == 1, "enough programs already"
    assert planner.split_count(1, 12, 10, machine) == 3, "at least four steps to a split"


def test_few_plans_are_worth_timing():
    for layer in LAYERS:
        n, c, h, k = layer
        size = (n, c, h, h)
        strides = (c * h * h, h * h, h, 1)
        conv = problem.forward_problem(
            size, strides, (c, 1, k, k), (k * k, k * k, k, 1), strides, (1, 1), (k // 2, k // 2), (1, 1)
        )
        plans, _ = planner.plan_conv(conv, "bfloat16", planner.H200)
        shortlist = planner.worth_tuning(plans)
        assert 1 <= len(shortlist) <= planner.TUNE_LIMIT
        assert shortlist[0] is plans[0]


def test_plans_do_not_depend_on_anything_hidden():
    args = ("forward", (64, 384, 32, 31), "bfloat16")
    assert best(*args) == best(*args)
    fewer = best(*args, machine=replace(planner.H200, multiprocessors=8))
    assert fewer[0]["cycles"] > best(*args)[0]["cycles"]


@pytest.mark.parametrize("pass_name", ["forward", "backward_input", "backward_weight"])
def test_report_names_each_algorithm_once(pass_name):
    for layer in LAYERS:
        rows = best(pass_name, layer, "bfloat16", every=False)
        assert sorted(row["algorithm"] for row in rows) == ["direct", "toeplitz"]
        everything = best(pass_name, layer, "bfloat16")
        assert rows[0]["blocks"] == everything[0]["blocks"] and rows[0]["flops"] == 2 * everything[0]["macs"]
        assert all(len(row["tile"]) == 2 for row in rows)
        _, c, _, k = layer
        partial = rows[0]["splits"] * c * k * k * 4 if pass_name == "backward_weight" else 0
        assert rows[0]["scratch_bytes"] == partial


def test_report_of_a_device_shows_the_stored_choice(monkeypatch, tmp_path):
    """explain() must name what runs, not what the table would have said."""
    tuning, report = kernels("tuning"), kernels("report")
    monkeypatch.setenv("LKCONV_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("LKCONV_TRITON_AUTOTUNE", raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        args = ("forward", (64, 384, 32, 32), 384, (31, 31), (1, 1), (15, 15), (1, 1), "float16")
        (conv,) = report.make_problems(*args[:-1], False)[0]
        device = report.device_at(0)
        plans, _ = planner.plan_conv(conv, "float16", kernels("machine").machine_of(device))
        other = plans[3]
        assert plan(*args, 0)[0]["blocks"] == plans[0].blocks
        tuning.store(kernels("keys").conv_key(conv, "float16", device, False), other, plans)
        row = plan(*args, 0, allow_tf32=False)[0]
        assert row["blocks"] == other.blocks and "timed" in row["reason"]
    finally:
        torch.use_deterministic_algorithms(before)


WIDTHS = (1, 2, 7, 8, 14, 15, 16, 17, 28, 30, 31, 32, 33, 56, 64)


def planned(pass_name, width, dtype, stride, padding):
    """The key of one problem, and the plans that share it, without the costs of the exact sizes."""
    tuning, keys = kernels("tuning"), kernels("keys")
    facts = (pass_name, (4, 6, 9, width), 6, (3, 5), stride, padding, (1, 1))
    device = torch.device("cpu")
    found = []
    for channels_last in (False, True):
        for one in kernels("report").make_problems(*facts, channels_last)[0]:
            conv = pass_name != "backward_weight"
            plans, _ = (planner.plan_conv if conv else planner.plan_weight)(one, dtype, planner.H200)
            key = (keys.conv_key if conv else keys.weight_key)(one, dtype, device, False)
            found.append((key, sorted((tuning.identity(p) for p in plans), key=repr)))
    return found


@pytest.mark.parametrize("pass_name", ["forward", "backward_input", "backward_weight"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_problems_that_share_a_key_have_the_same_plans(pass_name, dtype):
    """Otherwise each would throw away the other's stored choice, and both were timed in every process."""
    of_key = {}
    for width in WIDTHS:
        for stride, padding in (((1, 1), (1, 2)), ((2, 2), (1, 2)), ((2, 1), (1, 3))):
            if width + 2 * padding[1] < 5:
                continue
            for key, plans in planned(pass_name, width, dtype, stride, padding):
                assert of_key.setdefault(key, plans) == plans, key


@pytest.mark.parametrize("widths", [(28, 32), (30, 32), (31, 32), (14, 16)])
def test_stored_choices_of_two_widths_hold_beside_each_other(widths, monkeypatch, tmp_path):
    """28 and 32 round to the same power of 2, but only rows of 32 halves start at multiples of 16 bytes."""
    tuning, keys, device = kernels("tuning"), kernels("keys"), torch.device("cpu")
    monkeypatch.setenv("LKCONV_CACHE_DIR", str(tmp_path))
    stored = []
    for width in widths:
        args = ("forward", (8, 64, width, width), 64, (13, 13), (1, 1), (6, 6), (1, 1))
        (conv,) = kernels("report").make_problems(*args, False)[0]
        plans, _ = planner.plan_conv(conv, "float16", planner.H200)
        key = keys.conv_key(conv, "float16", device, False)
        last = [p for p in plans if p.algorithm == "toeplitz"][-1]
        assert tuning.store(key, last, plans) == last
        stored.append((key, plans, last))
    for key, plans, last in stored:
        assert tuning.load(key, plans) == last


def test_unknown_pass_is_refused():
    with pytest.raises(ValueError, match="backward_bias"):
        plan("backward_bias", (1, 1, 8, 8), 1, (3, 3))


@pytest.mark.parametrize("size", [1, 7, 20])
@pytest.mark.parametrize("taps", [1, 2, 5, 9])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("padding", [0, 3, 11])
@pytest.mark.parametrize("dilation", [1, 2, 3, 6])
def test_stride_phases_are_the_gradient(size, taps, stride, padding, dilation):
    """The phases of one axis, computed naively, are autograd's gradient."""
    out = problem.output_size(size, taps, stride, padding, dilation)
    if out < 1:
        assert size + 2 * padding < dilation * (taps - 1) + 1
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, size, dtype=torch.float64, generator=generator, requires_grad=True)
    w = torch.randn(1, 1, taps, dtype=torch.float64, generator=generator)
    dy = torch.randn(1, 1, out, dtype=torch.float64, generator=generator)
    (expected,) = torch.autograd.grad(F.conv1d(x, w, None, stride, padding, dilation), x, dy)
    got = torch.zeros(size, dtype=torch.float64)
    for phase in problem.axis_phases(size, out, taps, stride, padding, dilation):
        axis = phase.axis
        for i in range(axis.size_out):
            for t in range(axis.taps):
                o = i + t * axis.dilation - axis.padding
                if 0 <= o < out:
                    tap = phase.first + phase.step * (axis.taps - 1 - t)
                    got[stride * i + phase.remainder] += w[0, 0, tap] * dy[0, 0, o]
    torch.testing.assert_close(got, expected[0, 0])
