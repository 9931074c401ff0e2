"""Wrong arguments given to the ops themselves, past the checks of the public function: never a crash."""

from __future__ import annotations

import pytest
import torch

import lkconv  # noqa: F401  (registers the ops)

OPS = torch.ops.lkconv
X, W, B = torch.randn(2, 4, 9, 8), torch.randn(8, 1, 3, 5), torch.randn(8)
GY = torch.randn(2, 8, 9, 8)
FAR = 2**62
RIGHT = {
    "depthwise_conv2d": (X, W, B, [1, 1], [1, 2], [1, 1]),
    "depthwise_conv2d_backward_input": (GY, W, [2, 4, 9, 8], [1, 1], [1, 2], [1, 1]),
    "depthwise_conv2d_backward_weight": (GY, X, [3, 5], [1, 1], [1, 2], [1, 1]),
}

# Every op has two tensors, a third argument, and the geometry. Name -> position and value.
GEOMETRY = {
    "zero stride": (3, [0, 1]),
    "negative stride": (3, [1, -1]),
    "stride of one axis": (3, [1]),
    "stride of three axes": (3, [1, 1, 1]),
    "no stride": (3, []),
    "stride beyond 64 bits": (3, [2**64, 1]),
    "stride of floats": (3, [1.5, 1.0]),
    "negative padding": (4, [-1, 2]),
    "padding of one axis": (4, [1]),
    "padding of three axes": (4, [1, 2, 3]),
    "padding that overflows when it is doubled": (4, [FAR, 2]),
    "padding that wraps around when it is doubled": (4, [2**63 - 1, 2]),
    "padding with more output than 64 bits count": (4, [2**40, 2**40]),
    "dilation that wraps around": (5, [2**62 + 1, 1]),
    "dilation that wraps around along the row": (5, [1, 2**62 + 1]),
    "padding with more output than memory": (4, [1, 2**33]),
    "zero dilation": (5, [0, 1]),
    "negative dilation": (5, [1, -2]),
    "dilation of one axis": (5, [1]),
    "dilation of three axes": (5, [1, 1, 1]),
    "dilation that leaves no output": (5, [6, 1]),
    "enormous dilation": (5, [FAR, 1]),
    "enormous dilation along the row": (5, [1, 2**60]),
}
TENSORS = {
    "first: 3-D": (0, lambda t: t[0]),
    "first: 5-D": (0, lambda t: t[None]),
    "first: no dimensions": (0, lambda t: t.sum()),
    "first: float64": (0, lambda t: t.double()),
    "first: bfloat16": (0, lambda t: t.bfloat16()),
    "first: integers": (0, lambda t: t.int()),
    "first: complex": (0, lambda t: t.to(torch.complex64)),
    "first: bool": (0, lambda t: t > 0),
    "first: one channel too few": (0, lambda t: t[:, :-1]),
    "first: None": (0, lambda t: None),
    "first: sparse": (0, lambda t: t.to_sparse()),
    "second: 3-D": (1, lambda t: t[0]),
    "second: 5-D": (1, lambda t: t[None]),
    "second: float64": (1, lambda t: t.double()),
    "second: float16": (1, lambda t: t.half()),
    "second: integers": (1, lambda t: t.int()),
    "second: None": (1, lambda t: None),
}
PARTICULAR = {
    "depthwise_conv2d": {
        "weight of two input channels": (1, W.expand(8, 2, 3, 5)),
        "weight of no multiple of the channels": (1, W[:7]),
        "weight without channels": (1, W[:0]),
        "kernel without rows": (1, W[:, :, :0]),
        "kernel larger than the padded input": (1, torch.randn(8, 1, 12, 5)),
        "bias too short": (2, B[:7]),
        "bias too long": (2, torch.randn(9)),
        "bias of two dimensions": (2, B[:, None]),
        "bias of no dimensions": (2, B[0]),
        "bias in float64": (2, B.double()),
        "input without channels": (0, X[:, :0]),
    },
    "depthwise_conv2d_backward_input": {
        "size of another batch": (2, [3, 4, 9, 8]),
        "size of more channels": (2, [2, 16, 9, 8]),
        "size of no divisor of the channels": (2, [2, 3, 9, 8]),
        "size without channels": (2, [2, 0, 9, 8]),
        "size of another image": (2, [2, 4, 10, 8]),
        "size of three axes": (2, [4, 9, 8]),
        "size of five axes": (2, [1, 2, 4, 9, 8]),
        "negative size": (2, [2, 4, -9, 8]),
        "enormous size": (2, [2, 4, FAR, 8]),
        "weight of more channels": (1, torch.randn(12, 1, 3, 5)),
        "weight of two input channels": (1, W.expand(8, 2, 3, 5)),
        "kernel without columns": (1, W[..., :0]),
        "gradient without channels": (0, GY[:, :0]),
        "stride of another output": (3, [2, 1]),
    },
    "depthwise_conv2d_backward_weight": {
        "kernel of another size": (2, [5, 5]),
        "kernel of one axis": (2, [3]),
        "kernel of three axes": (2, [1, 3, 5]),
        "no kernel": (2, []),
        "kernel without rows": (2, [0, 5]),
        "negative kernel": (2, [3, -5]),
        "enormous kernel": (2, [FAR, 5]),
        "input of another batch": (1, X[:1]),
        "input of more channels": (1, torch.randn(2, 16, 9, 8)),
        "input of another image": (1, X[..., :-1]),
        "stride of another output": (3, [2, 1]),
    },
}


def with_argument(name: str, position: int, value: object) -> list:
    arguments = list(RIGHT[name])
    arguments[position] = value
    return arguments


def misuses() -> list:
    found = []
    for name, right in RIGHT.items():
        wrong = {**GEOMETRY, **{n: (i, make(right[i])) for n, (i, make) in TENSORS.items()}}
        wrong |= PARTICULAR[name]
        found += [pytest.param(name, *case, id=f"{name}-{label}") for label, case in wrong.items()]
    return found


@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize(("name", "position", "value"), misuses())
def test_misuse_is_an_exception(name, position, value, grad):
    arguments = with_argument(name, position, value)
    if grad:
        arguments = [
            a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
            for a in arguments
        ]
    with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError)) as info:
        getattr(OPS, name)(*arguments)
    assert str(info.value)


@pytest.mark.parametrize("name", RIGHT)
def test_the_arguments_that_are_spoiled_are_right(name):
    y = getattr(OPS, name)(*RIGHT[name])
    assert y.isfinite().all()


X6 = torch.randn(2, 6, 9, 8)
SEGMENTS = (X6, [W[:3], None, W[3:5]], [B[:3], None, None], [3, 1, 2])
NOT_SEGMENTS = {
    "input 3-D": (0, X6[0]),
    "input 5-D": (0, X6[None]),
    "input of integers": (0, X6.int()),
    "input in another dtype": (0, X6.bfloat16()),
    "input sparse": (0, X6.to_sparse()),
    "input None": (0, None),
    "input of fewer channels": (0, X6[:, :5]),
    "input of more channels": (0, X),
    "input without rows": (0, X6[:, :, :0]),
    "fewer weights": (1, [W[:3], None]),
    "no weights": (1, []),
    "a weight where there is none": (1, [W[:3], W[:2], W[3:5]]),
    "a weight of fewer channels": (1, [W[:2], None, W[3:5]]),
    "a weight of a multiple of the channels": (1, [W[:6], None, W[3:5]]),
    "a weight of two input channels": (1, [W[:3].expand(3, 2, 3, 5), None, W[3:5]]),
    "an even window": (1, [W[:3, :, :2], None, W[3:5]]),
    "a window without columns": (1, [W[:3, ..., :0], None, W[3:5]]),
    "a weight 3-D": (1, [W[:3, 0], None, W[3:5]]),
    "a weight in float64": (1, [W[:3].double(), None, W[3:5]]),
    "a weight that is a number": (1, [1.0, None, W[3:5]]),
    "fewer biases": (2, [B[:3], None]),
    "more biases": (2, [B[:3], None, None, None]),
    "a bias of an identity": (2, [B[:3], B[:1], None]),
    "a bias too short": (2, [B[:2], None, None]),
    "a bias of two dimensions": (2, [B[:3, None], None, None]),
    "a bias in float64": (2, [B[:3].double(), None, None]),
    "fewer splits": (3, [3, 3]),
    "more splits": (3, [3, 1, 2, 0]),
    "no splits": (3, []),
    "splits of another sum": (3, [3, 2, 2]),
    "a negative split": (3, [3, -1, 4]),
    "negative splits of the right sum": (3, [-1, 4, 3]),
    "an enormous split": (3, [3, FAR, 2]),
    "splits that wrap around": (3, [3, 2**63 - 1, 2]),
    "splits of floats": (3, [3.0, 1.5, 1.5]),
}


@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("label", NOT_SEGMENTS)
def test_misuse_of_segments_is_an_exception(label, layout, grad):
    position, value = NOT_SEGMENTS[label]
    arguments = list(SEGMENTS)
    if layout == "channels_last":
        arguments[0] = X6.to(memory_format=torch.channels_last)
    arguments[position] = value
    if grad and isinstance(arguments[0], torch.Tensor) and arguments[0].is_floating_point():
        arguments[0] = arguments[0].detach().requires_grad_()
    with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError)) as info:
        OPS.segmented_depthwise_conv2d(*arguments)
    assert str(info.value)


def test_the_segments_that_are_spoiled_are_right():
    assert OPS.segmented_depthwise_conv2d(*SEGMENTS).isfinite().all()
