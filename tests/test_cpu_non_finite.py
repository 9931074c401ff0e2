"""A non-finite value is never lost, and never reaches another image or channel."""

import math

import pytest
import torch

import accuracy
import cases
import lkconv
from cases import Case, same
from test_cpu_depthwise_conv2d import chosen_plan

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SUMMED = [
    same((2, 18, 9, 11), (3, 3)),
    Case((2, 5, 15, 17), (7, 5), padding=(3, 2), stride=(2, 2)),
    same((2, 4, 20, 21), (5, 3), dilation=(2, 3)),
    Case((2, 4, 12, 13), (5, 5), padding=(2, 2), multiplier=2),
    same((2, 32, 4, 6), (3, 3)),
    same((2, 18, 28, 28), (3, 3)),
    same((2, 32, 7, 7), (1, 13)),
]
FFT = [
    same((2, 18, 28, 28), (27, 27)),
    Case((2, 16, 140, 24), (25, 15), padding=(12, 7), bias=False),  # several tiles
    same((2, 16, 30, 26), (25, 21), multiplier=2),
]
SPOTS = [(0, 0), (3, 5), (-1, -1)]

values = pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
all_dtypes = pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
all_cases = pytest.mark.parametrize("case", SUMMED + FFT, ids=str)


def test_the_cases_run_every_algorithm():
    for pass_name in accuracy.PASSES:
        ran = [chosen_plan(pass_name, case, torch.float32)["algorithm"] for case in SUMMED + FFT]
        summed = set(ran[: len(SUMMED)])
        planar = pass_name != "backward_weight" or lkconv._C.active_isa() in ("avx512", "amx")
        assert summed == {"direct", "planar"} if planar else summed == {"direct"}, (pass_name, ran)
        assert set(ran[len(SUMMED) :]) == {"fft"}, (pass_name, ran)
    tiled = chosen_plan("forward", FFT[1], torch.float32)
    assert tiled["tile"][0] < FFT[1].output_size[2]


def touched(pass_name: str, case: Case, where: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which results depend on the elements that are 1 in `where`: the same pass over zeros and ones."""
    ones = cases.Tensors(
        where.get("input", torch.ones(case.size)),
        where.get("weight", torch.ones(case.weight_size)),
        None,
        where.get("grad_output", torch.ones(case.output_size)),
    )
    return accuracy.torch_result(pass_name, case, ones, torch.float64) > 0.5


def inject(pass_name: str, case: Case, dtype: torch.dtype, name: str, index: tuple, value: float) -> None:
    """Puts `value` at one place of one tensor and compares the results with those of the clean tensors."""
    t = cases.make_tensors(case, dtype)
    clean = accuracy.op_result(pass_name, case, t)
    assert clean.isfinite().all()
    target = getattr(t, name)
    target[index] = value
    mask = torch.zeros(target.shape)
    mask[index] = 1
    result = accuracy.op_result(pass_name, case, t)
    reached = touched(pass_name, case, {name: mask})
    assert reached.any()
    assert not result[reached].isfinite().any(), "a non-finite value was lost"
    summed = chosen_plan(pass_name, case, dtype)["algorithm"] in ("direct", "planar")
    if summed and pass_name == "forward" and name == "input":
        untouched = ~reached
    else:  # may spread within its planes; a gradient or tap times the padding's zeros is NaN, as in PyTorch
        untouched = (~reached.flatten(2).any(2))[:, :, None, None].expand_as(reached)
    assert torch.equal(result[untouched], clean[untouched])


@values
@all_dtypes
@all_cases
def test_input_value_reaches_every_output_that_sees_it(case, dtype, value):
    for y, x in SPOTS:
        inject("forward", case, dtype, "input", (1, 2, y, x), value)


@values
@all_dtypes
@all_cases
def test_grad_output_value_reaches_every_gradient(case, dtype, value):
    for y, x in SPOTS:
        inject("backward_input", case, dtype, "grad_output", (0, 1, y, x), value)
        inject("backward_weight", case, dtype, "grad_output", (0, 1, y, x), value)


@values
@all_cases
def test_input_value_reaches_the_weight_gradient(case, value):
    inject("backward_weight", case, torch.float32, "input", (1, 2, 3, 5), value)


@values
@all_cases
def test_weight_value_reaches_every_output_that_uses_the_tap(case, value):
    tap = (case.kernel[0] // 2, case.kernel[1] // 3)
    inject("forward", case, torch.float32, "weight", (-1, 0, *tap), value)
    inject("backward_input", case, torch.float32, "weight", (-1, 0, *tap), value)


@values
@pytest.mark.parametrize("case", [c for c in SUMMED + FFT if c.bias], ids=str)
def test_bias_value_reaches_its_channel_alone(case, value):
    t = cases.make_tensors(case, torch.float32)
    clean = accuracy.op_result("forward", case, t)
    t.bias[3] = value
    result = accuracy.op_result("forward", case, t)
    assert not result[:, 3].isfinite().any()
    others = torch.arange(case.out_channels) != 3
    assert torch.equal(result[:, others], clean[:, others])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_overflow_is_infinite_and_signed(dtype):
    case = Case((1, 2, 4, 4), (3, 3), padding=(1, 1), bias=False)
    largest = torch.finfo(dtype).max
    x = torch.full(case.size, largest, dtype=dtype)
    x[:, 1] = -largest
    weight = torch.ones(case.weight_size, dtype=dtype)
    result = torch.ops.lkconv.depthwise_conv2d(x, weight, None, *case.geometry)
    assert (result[:, 0] == math.inf).all() and (result[:, 1] == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_values_pass_unchanged(dtype):
    """Every finite half value, subnormals included, times one: conversions are exact in both directions."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = bits[bits.isfinite()]
    x = finite[: finite.numel() // 64 * 64].reshape(1, 64, 1, -1).contiguous()
    for layout in ("contiguous", "channels_last"):
        result = torch.ops.lkconv.depthwise_conv2d(
            cases.place(x, layout), torch.ones(64, 1, 1, 1, dtype=dtype), None, [1, 1], [0, 0], [1, 1]
        )
        assert torch.equal(result, x)
