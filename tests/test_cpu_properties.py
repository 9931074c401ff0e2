"""Property-based tests over the whole argument space, and PyTorch's own samples of convolutions."""

import math

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch.testing._internal.common_methods_invocations import op_db

import accuracy
import cases
from cases import Case

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@st.composite
def convolutions(draw: st.DrawFn) -> Case:
    """Any depthwise convolution of up to a few thousand pixels whose output is not empty."""
    whole = st.integers
    large = draw(st.booleans())  # large kernels on few channels take the FFT, small ones the direct sums
    kernel = tuple(draw(st.tuples(*[whole(1, 31 if large else 7)] * 2)))
    stride = draw(st.tuples(whole(1, 3), whole(1, 3)))
    dilation = draw(st.tuples(whole(1, 2 if large else 7), whole(1, 2 if large else 7)))
    padding = tuple(draw(whole(0, d * (k - 1) // 2 + 3)) for k, d in zip(kernel, dilation, strict=True))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    image = tuple(n + draw(whole(0, 30 if large else 14)) for n in least)
    size = (draw(whole(0, 3)), draw(whole(1, 4 if large else 35)), *image)
    return Case(size, kernel, padding, stride, dilation, draw(whole(1, 3)), draw(st.booleans()))


@settings(max_examples=400)
@given(
    case=convolutions(),
    dtype=st.sampled_from(accuracy.DTYPES),
    layout=st.sampled_from(sorted(cases.LAYOUTS)),
    pass_name=st.sampled_from(accuracy.PASSES),
)
def test_any_convolution(case, dtype, layout, pass_name):
    note(str(case))
    sizes = {"forward": case.output_size, "backward_input": case.size, "backward_weight": case.weight_size}
    samples = 1 if math.prod(sizes[pass_name]) > 1000 else 16
    accuracy.check(pass_name, case, *(cases.make_tensors(case, dtype, layout, i) for i in range(samples)))


@settings(max_examples=100)
@given(case=convolutions(), data=st.data())
def test_the_passes_are_adjoint(case, data):
    """<conv(x, w), g> = <x, backward_input(g, w)> = <w, backward_weight(g, x)>, for any x, w and g."""
    layout = data.draw(st.sampled_from(sorted(cases.LAYOUTS)))
    t = cases.make_tensors(case, torch.float64, layout)
    plain = cases.Tensors(t.input, t.weight, None, t.grad_output)
    forward, grad_input, grad_weight = (accuracy.op_result(p, case, plain) for p in accuracy.PASSES)
    product = (forward * t.grad_output).sum()
    scale = forward.norm() * t.grad_output.norm() + 1e-300
    assert abs(product - (grad_input * t.input).sum()) <= 1e-13 * scale
    assert abs(product - (grad_weight * t.weight).sum()) <= 1e-13 * scale


def depthwise_samples(dtype: torch.dtype):
    """PyTorch's samples for conv2d, their weights cut down to one input channel each."""
    info = next(op for op in op_db if op.name == "nn.functional.conv2d")
    names = ("bias", "stride", "padding", "dilation")
    usual = {"bias": None, "stride": 1, "padding": 0, "dilation": 1}
    for sample in info.sample_inputs("cpu", dtype):
        x, weight = sample.input, sample.args[0]
        arguments = {**usual, **dict(zip(names, sample.args[1:], strict=False)), **sample.kwargs}
        x = x if x.dim() == 4 else x[None]
        channels = x.shape[1]
        multiplier = max(1, weight.shape[0] // channels)
        weight = weight[:1, :1].repeat(channels * multiplier, 1, 1, 1)
        weight += torch.arange(len(weight))[:, None, None, None].to(dtype) / 8
        stride, dilation = (
            (v, v) if isinstance(v := arguments[n], int) else tuple(v) for n in ("stride", "dilation")
        )
        padding = arguments["padding"]
        if isinstance(padding, str):
            total = [d * (k - 1) for k, d in zip(weight.shape[2:], dilation, strict=True)]
            low = [0, 0] if padding == "valid" else [n // 2 for n in total]
            if padding == "same":  # what an even kernel needs more at the end
                x = torch.nn.functional.pad(x, (0, total[1] - 2 * low[1], 0, total[0] - 2 * low[0]))
            padding = tuple(low)
        padding = (padding, padding) if isinstance(padding, int) else tuple(padding)
        if len(stride) == len(dilation) == len(padding) == 2:
            case = Case(tuple(x.shape), tuple(weight.shape[2:]), padding, stride, dilation, multiplier)
            if min(case.output_size[2:]) > 0:
                yield case, x.detach(), weight.detach()


@pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_samples_of_pytorch(dtype):
    count = 0
    for case, x, weight in depthwise_samples(dtype):
        t = cases.make_tensors(case, dtype)
        for pass_name in accuracy.PASSES:
            accuracy.check(pass_name, case, cases.Tensors(x, weight, t.bias, t.grad_output))
        count += 1
    assert count >= 8
