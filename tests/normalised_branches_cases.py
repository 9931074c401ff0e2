"""Random sums of normalised branches and what a namespace's ops must make of them, on any device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lkconv import reparam
from lkconv.reparam.geometry import Geometry

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# Of one op, and of a whole training step against the branches one after the other.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
TRAINING_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# (size, kernels as (kernel, padding, dilation), with the identity, tensors given)
SUMS: dict[str, tuple] = {
    "one": ((2, 3, 5, 7), [(3, 1, 1)], False, 0),
    "dilated": ((2, 20, 12, 9), [(5, 2, 1), (3, 2, 2), (3, 3, 3)], False, 1),
    "identity": ((1, 17, 7, 7), [((3, 1), (1, 0), 1), (1, 0, 1)], True, 0),
    "all": ((3, 33, 6, 14), [(7, 3, 1), ((1, 5), (0, 2), 1)], True, 2),
    "smaller": ((2, 16, 9, 11), [((3, 5), 0, (2, 1)), (5, (0, 0), 1)], False, 0),
    "larger": ((2, 5, 4, 3), [(3, 2, 1), (5, 3, 1)], False, 1),
    "tiles": ((1, 18, 150, 131), [(5, 2, 1), (3, 4, 4)], True, 1),
    "wide kernel": ((2, 9, 4, 4), [(9, 4, 1), (3, 1, 1)], False, 0),
}


def pair(value):
    return (value, value) if isinstance(value, int) else value


def same_size(channels: int, kernel: int | tuple[int, int], stride: int = 1) -> Geometry:
    """A depthwise convolution padded by half its kernel: at stride 1 the output has the input's size."""
    kh, kw = pair(kernel)
    return Geometry((kh, kw), pair(stride), (kh // 2, kw // 2), groups=channels)


class Sum:
    """Random operands of one sum for the ops of ``namespace``, and its formulas in float64 on the CPU."""

    def __init__(
        self,
        case: str | tuple,
        dtype: torch.dtype,
        layout: torch.memory_format = torch.contiguous_format,
        seed: int = 0,
        namespace: str = "lkconv",
        device: str = "cpu",
    ):
        torch.manual_seed(seed)
        self.size, kernels, self.identity, given = SUMS[case] if isinstance(case, str) else case
        self.geometries = [Geometry(*map(pair, (k, 1, p, d)), self.size[1]) for k, p, d in kernels]
        self.dtype, self.layout, self.device = dtype, layout, device
        self.ops = getattr(torch.ops, namespace)
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.input = self.random(*self.size)
        self.weights = [self.random(self.size[1], 1, *g.kernel_size) for g in self.geometries]
        out = self.convolve(self.input, self.weights[0], self.geometries[0]).shape
        self.given = [self.random(*out) for _ in range(given)]
        self.grad = self.random(*out)
        self.padding = [p for g in self.geometries for p in g.padding]
        self.dilation = [d for g in self.geometries for d in g.dilation]

    def random(self, *size: int) -> Tensor:
        tensor = torch.randn(size, dtype=torch.float64).to(self.device, self.dtype)
        return tensor.contiguous(memory_format=self.layout) if tensor.dim() == 4 else tensor

    def factors(self, *size: int) -> Tensor:
        """Numbers small enough that sums stay within float16."""
        return torch.randn(*size, self.size[1], dtype=self.wide).to(self.device) / 8

    @staticmethod
    def convolve(input, weight, g):
        return torch.nn.functional.conv2d(
            exact(input), exact(weight), None, 1, g.padding, g.dilation, input.shape[1]
        )

    def branches(self, input=None, weights=None, given=None) -> list[Tensor]:
        if input is None:
            input, weights, given = self.input, self.weights, self.given
        found = [self.convolve(input, w, g) for w, g in zip(weights, self.geometries, strict=True)]
        return found + [exact(input)] * self.identity + [exact(t) for t in given]

    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.ops.normalised_branches(
            self.input, self.weights, self.given, self.padding, self.dilation, self.identity
        )


def exact(tensor: Tensor) -> Tensor:
    return tensor.cpu().double()


def error(got: Tensor, wanted: Tensor) -> float:
    wanted = wanted.detach()
    return float((exact(got.detach()) - wanted).norm() / wanted.norm().clamp_min(1e-30))


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def per_channel(factor: Tensor) -> Tensor:
    return exact(factor).reshape(1, -1, 1, 1)


def check_outputs_and_sum(s: Sum) -> None:
    dtype = s.dtype
    saved, means, variances = s.outputs()
    branches = s.branches()
    for b, y in enumerate(branches):
        # What is kept is rounded to the dtype, and statistics are those of what is kept.
        assert (exact(means[b]) - y.mean((0, 2, 3))).abs().max() <= TOLERANCE[dtype] * y.abs().max()
        assert error(variances[b], y.var((0, 2, 3), correction=0)) <= 2 * TOLERANCE[dtype]
    scales, shift = s.factors(len(branches)), s.factors()
    out = s.ops.normalised_branches_sum(s.input, saved, s.given, s.identity, scales, shift)
    wanted = sum(per_channel(a) * y for a, y in zip(scales, branches, strict=True)) + per_channel(shift)
    assert out.dtype == dtype and out.is_contiguous(memory_format=s.layout)
    assert error(out, wanted) <= TOLERANCE[dtype]


def check_gradients(s: Sum) -> None:
    dtype = s.dtype
    saved, _, _ = s.outputs()
    branches = s.branches()
    means = s.factors(len(branches))
    total, dots = s.ops.normalised_branches_dots(s.grad, s.input, saved, s.given, s.identity, means)
    assert error(total, exact(s.grad).sum((0, 2, 3))) <= max(2e-6, TOLERANCE[dtype] / 10)
    wanted = torch.stack(
        [(exact(s.grad) * (y - per_channel(m))).sum((0, 2, 3)) for y, m in zip(branches, means, strict=True)]
    )
    assert error(dots, wanted) <= TOLERANCE[dtype]
    a, b, c = (s.factors(len(branches)) for _ in range(3))
    dz = [
        per_channel(a[i]) * exact(s.grad) + per_channel(b[i]) * y + per_channel(c[i])
        for i, y in enumerate(branches)
    ]
    leaves = [exact(t).requires_grad_() for t in (s.input, *s.weights, *s.given)]
    kernels = len(s.weights)
    again = s.branches(leaves[0], leaves[1 : 1 + kernels], leaves[1 + kernels :])
    expected = torch.autograd.grad(again, leaves, dz)
    grad_input, grad_weights, grad_given = s.ops.normalised_branches_backward(
        s.grad, s.input, saved, s.weights, s.given, s.padding, s.dilation, s.identity, a, b, c
    )
    assert grad_input.is_contiguous(memory_format=s.layout)
    for got, want in zip((grad_input, *grad_weights, *grad_given), expected, strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        assert error(got, want) <= TOLERANCE[dtype]


def everything(s: Sum) -> list[Tensor]:
    """All that the four ops give for one sum."""
    saved, means, variances = s.outputs()
    out = s.ops.normalised_branches_sum(s.input, saved, s.given, s.identity, means, variances[0])
    total, dots = s.ops.normalised_branches_dots(s.grad, s.input, saved, s.given, s.identity, means)
    arguments = (s.weights, s.given, s.padding, s.dilation, s.identity, means, variances, dots)
    grads = s.ops.normalised_branches_backward(s.grad, s.input, saved, *arguments)
    return [saved, means, variances, out, total, dots, grads[0], *grads[1], *grads[2]]


def calls(s: Sum) -> Iterator[tuple[Any, tuple]]:
    """Every op with arguments of one training step."""
    saved, means, variances = s.outputs()
    where = (s.given, s.identity)
    convolution = (s.padding, s.dilation, s.identity)
    yield s.ops.normalised_branches, (s.input, s.weights, s.given, *convolution)
    yield s.ops.normalised_branches_sum, (s.input, saved, *where, means, variances[0])
    yield s.ops.normalised_branches_dots, (s.grad, s.input, saved, *where, means)
    factors = (means, means, means)
    arguments = (s.grad, s.input, saved, s.weights, s.given, *convolution, *factors)
    yield s.ops.normalised_branches_backward, arguments


def check_with_opcheck(s: Sum) -> None:
    for op, arguments in calls(s):
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


def take_strided_operands(s: Sum) -> None:
    """The same values with strides that no kernel could guess, between elements that are NaN."""
    for name in ("input", "grad"):
        tensor = getattr(s, name)
        wide = torch.full([2 * n for n in tensor.shape], float("nan"), device=tensor.device)
        setattr(s, name, wide[::2, 1::2, ::2, 1::2].copy_(tensor))
    s.weights = [w.transpose(2, 3).contiguous().transpose(2, 3) for w in s.weights]
    s.given = [t.contiguous(memory_format=torch.channels_last) for t in s.given]


def check_large_mean_of(namespace: str, layout: torch.memory_format, device: str) -> None:
    """Sums of squares less squared means would have no digit left."""
    torch.manual_seed(1)
    x = (torch.randn(4, 3, 20, 20) + 3e4).to(device).contiguous(memory_format=layout)
    weight = torch.ones(3, 1, 1, 1, device=device)
    op = getattr(torch.ops, namespace).normalised_branches
    _, means, variances = op(x, [weight], [], [0, 0], [1, 1], True)
    for b in range(2):
        assert error(variances[b], exact(x).var((0, 2, 3), correction=0)) <= 1e-5
        assert error(means[b], exact(x).mean((0, 2, 3))) <= 1e-7


def training_step(module: nn.Module, x: Tensor, path: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Output, gradients and buffers after one step by a training path, and how often each op ran."""
    module, x = copy.deepcopy(module), x.detach().requires_grad_()
    with reparam.use_training_path(path), torch.profiler.profile() as profile:
        y = module(x)
        y.pow(3).mean().backward()
    found = {"output": y.detach(), "input": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    found |= dict(module.named_buffers())
    return found, {event.key: event.count for event in profile.key_averages()}
