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
