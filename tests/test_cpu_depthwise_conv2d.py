"""The CPU kernels against a float64 oracle: every pass, dtype, layout and kind of geometry."""

import pytest
import torch

import accuracy
import cases
import lkconv._C

pytestmark = pytest.mark.usefixtures("poisoned_memory")

all_passes = pytest.mark.parametrize("pass_name", accuracy.PASSES)
all_dtypes = pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def chosen_plan(pass_name: str, case: cases.Case, dtype: torch.dtype, fft: bool = True) -> dict:
    """The plan that a call of `case` follows in this process."""
    return lkconv._C.plan(
        pass_name,
        case.size,
        case.out_channels,
        case.kernel,
        case.stride,
        case.padding,
        case.dilation,
        str(dtype).removeprefix("torch."),
        lkconv._C.active_isa(),
        torch.get_num_threads(),
        fft,
    )[0]


def test_poisoning_reaches_the_ops_own_output():
    assert torch.empty(3).isnan().all()
    t = cases.make_tensors(cases.CORE[0], torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        accuracy.op_result("forward", cases.CORE[0], t)
    assert [e.name for e in profile.events()] == ["lkconv::depthwise_conv2d", "aten::empty", "aten::fill_"]


@all_passes
@all_dtypes
@pytest.mark.parametrize("case", cases.CORE, ids=str)
def test_core(case, dtype, pass_name):
    accuracy.check(pass_name, case, cases.make_tensors(case, dtype))


@all_passes
@all_dtypes
@pytest.mark.parametrize("case", cases.LARGE, ids=str)
def test_large(case, dtype, pass_name):
    accuracy.check(pass_name, case, cases.make_tensors(case, dtype))
