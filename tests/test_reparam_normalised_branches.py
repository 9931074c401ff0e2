"""lkconv::normalised_branches and its sisters: statistics, sum and gradients of all branches of a block."""

from functools import partial

import pytest
import torch

import lkconv._C
from lkconv import reparam, use_backend
from lkconv.reparam import normalised_branches
from normalised_branches_cases import (
    LAYOUTS,
    SUMS,
    TOLERANCE,
    Sum,
    check_gradients,
    check_large_mean_of,
    check_outputs_and_sum,
    check_with_opcheck,
    error,
    everything,
    same,
    same_size,
    take_strided_operands,
    training_step,
)
from processes import run_pytest

OPS = torch.ops.lkconv


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=LAYOUTS.values(), ids=str)
def layout(request):
    return request.param


@pytest.mark.parametrize("name", SUMS)
def test_outputs_and_sum(name, dtype, layout):
    check_outputs_and_sum(Sum(name, dtype, layout))


@pytest.mark.parametrize("name", SUMS)
def test_gradients(name, dtype, layout):
    check_gradients(Sum(name, dtype, layout))


@pytest.mark.parametrize("name", ["all", "tiles"])
def test_neither_threads_nor_repetition_change_bits(name, layout):
    s = Sum(name, torch.float32, layout)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            found.append(everything(s))
    finally:
        torch.set_num_threads(threads)
    assert all(same(found[0], other) for other in found[1:])


def test_statistics_of_a_large_mean(layout):
    check_large_mean_of("lkconv", layout, "cpu")


def test_strided_operands():
    s = Sum("all", torch.float32)
    want = everything(s)
    take_strided_operands(s)
    for got, wanted in zip(everything(s), want, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_opcheck():
    for name in ("all", "smaller"):
        check_with_opcheck(Sum(name, torch.float32, torch.channels_last))
        check_with_opcheck(Sum(name, torch.float64))


def test_memory_safety_checks():
    s = Sum("all", torch.float32)
    saved, means, variances = s.outputs()
    outputs = (s.input, s.weights, s.given, s.padding, s.dilation, s.identity)
    wrong = [
        (OPS.normalised_branches, {**dict(enumerate(outputs)), **change})
        for change in (
            {0: s.input[0]},
            {0: s.input.double()},
            {1: []},
            {1: [w[1:] for w in s.weights]},
            {2: [s.given[0][:, :, 1:], s.given[1]]},
            {2: [t.half() for t in s.given]},
            {3: s.padding[:-1]},
            {3: [p + 1 for p in s.padding]},
            {4: [0] * len(s.dilation)},
        )
    ]
    sums = (s.input, saved, s.given, s.identity, means, variances[0])
    wrong += [
        (OPS.normalised_branches_sum, {**dict(enumerate(sums)), **change})
        for change in (
            {1: saved[:1]},
            {1: saved.double()},
            {1: saved.transpose(3, 4)},
            {1: saved.flatten()},
            {3: False},
            {4: means[1:]},
            {4: means.double()},
            {5: means},
        )
    ]
    dots = (s.grad, s.input, saved, s.given, s.identity, means)
    wrong += [
        (OPS.normalised_branches_dots, {**dict(enumerate(dots)), **change})
        for change in ({0: s.grad[:1]}, {0: s.grad.double()}, {5: means[0]})
    ]
    for op, arguments in wrong:
        with pytest.raises(RuntimeError, match="lkconv"):
            op(*arguments.values())


def test_arrangement():
    """Large kernels run apart, small ones in place; what the ops cannot take runs otherwise."""
    x = torch.randn(4, 160, 28, 28)
    geometry = partial(same_size, 160)
    found = normalised_branches.arrange(x, [geometry(31), None, geometry(5)], 160)
    assert (found.kernels, found.identity, found.apart, found.order) == ((2,), (1,), (0,), (2, 1, 0))
    assert normalised_branches.arrange(x, [geometry(3, 2), geometry(5, 2)], 160) is None
    assert normalised_branches.arrange(x, [geometry(3), None, None], 160) is None
    assert normalised_branches.arrange(x, [geometry(3)], 320) is None
    assert normalised_branches.arrange(x.to("meta"), [geometry(3)], 160) is None
    with use_backend("torch"):
        assert normalised_branches.arrange(x, [geometry(3)], 160) is None


def test_training_uses_them_once(layout):
    block = reparam.ReparamLargeKernelConv(64, 64, 31, 1, 64, 5).train()
    x = torch.randn(2, 64, 40, 40).contiguous(memory_format=layout)
    got, ran = training_step(block, x, "fused")
    wanted, ran_alone = training_step(block, x, "branches")
    stages = ("", "_sum", "_dots", "_backward")
    names = [f"lkconv::{name}" for name in (*(f"normalised_branches{s}" for s in stages), "depthwise_conv2d")]
    assert [ran.get(name, 0) for name in names] == [1, 1, 1, 1, 1]
    assert [ran_alone.get(name, 0) for name in names] == [0, 0, 0, 0, 2]
    for name, value in wanted.items():
        assert error(got[name], value.double()) <= 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_instruction_sets(isa):
    if isa == lkconv._C.active_isa() or isa not in lkconv._C.compiled_isas():
        pytest.skip(f"{isa} is what every test runs on, or is not compiled")
    chosen = "test_outputs_and_sum or test_gradients or test_opcheck"
    passed = run_pytest(
        "tests/test_reparam_normalised_branches.py", "-k", chosen, env={"LKCONV_MAX_CPU_ISA": isa}
    )
    assert passed == 2 * len(SUMS) * len(TOLERANCE) * len(LAYOUTS) + 1
