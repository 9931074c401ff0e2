"""The CPU kernels read any strides and write the memory format that PyTorch would."""

import pytest
import torch

import accuracy
import cases
from cases import Case, same

pytestmark = pytest.mark.usefixtures("poisoned_memory")

all_passes = pytest.mark.parametrize("pass_name", accuracy.PASSES)
all_dtypes = pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
all_layouts = pytest.mark.parametrize("layout", cases.LAYOUTS)

LAYOUT_CASES = [
    same((2, 5, 9, 11), (3, 3)),
    same((2, 16, 10, 17), (7, 5)),
    same((3, 35, 6, 7), (5, 5), bias=False),
    same((2, 18, 24, 26), (25, 25)),  # through the FFT in float32 and the half types
    Case((2, 17, 14, 13), (7, 7), padding=(3, 3), stride=(2, 2)),
    Case((2, 6, 15, 16), (4, 3), padding=(2, 1), stride=(1, 2), dilation=(2, 1), multiplier=2),
    same((2, 33, 1, 9), (1, 3)),
    same((2, 33, 9, 1), (3, 1)),
]


@all_passes
@all_dtypes
@all_layouts
@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_input_layouts(case, layout, dtype, pass_name):
    accuracy.check(pass_name, case, cases.make_tensors(case, dtype, layout))


@all_dtypes
@all_layouts
@pytest.mark.parametrize("pass_name", ["forward", "backward_input"])
@pytest.mark.parametrize("case", LAYOUT_CASES[:5], ids=str)
def test_weight_layouts(case, pass_name, dtype, layout):
    t = cases.make_tensors(case, dtype)
    weight = cases.place(t.weight, layout)
    accuracy.check(pass_name, case, cases.Tensors(t.input, weight, t.bias, t.grad_output))


@all_dtypes
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "channel_slice", "expanded_everywhere"])
@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_input_and_grad_output_in_different_layouts(case, layout, dtype):
    plain, other = cases.make_tensors(case, dtype), cases.make_tensors(case, dtype, layout)
    for x, g in ((plain.input, other.grad_output), (other.input, plain.grad_output)):
        accuracy.check("backward_weight", case, cases.Tensors(x, plain.weight, plain.bias, g))


@all_dtypes
def test_strided_and_expanded_bias(dtype):
    case = LAYOUT_CASES[1]
    t = cases.make_tensors(case, dtype)
    wide = torch.full((case.out_channels, 3), float("nan"), dtype=dtype)
    wide[:, 1] = t.bias
    for bias in (wide[:, 1], t.bias[:1].expand(case.out_channels)):
        accuracy.check("forward", case, cases.Tensors(t.input, t.weight, bias, t.grad_output))


@all_layouts
@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_outputs_keep_the_memory_format(case, layout):
    t = cases.make_tensors(case, torch.float32, layout)
    for pass_name, first in (("forward", t.input), ("backward_input", t.grad_output)):
        result = accuracy.op_result(pass_name, case, t)
        wanted = torch.empty_like(result, memory_format=suggested_memory_format(first))
        assert result.stride() == wanted.stride(), (pass_name, first.stride())
    assert accuracy.op_result("backward_weight", case, t).is_contiguous()


def suggested_memory_format(t: torch.Tensor) -> torch.memory_format:
    """The format torch gives to a fresh tensor made after `t`, found by asking an operator of torch."""
    like = torch.nn.functional.avg_pool2d(t, 1)
    last = like.is_contiguous(memory_format=torch.channels_last)
    if last and like.is_contiguous():  # ambiguous sizes: the strides tell
        plain = like.clone(memory_format=torch.contiguous_format).stride()
        last = like.stride(1) == 1 and like.stride() != plain
    return torch.channels_last if last else torch.contiguous_format
