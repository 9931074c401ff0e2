"""Branch kernels for every test of the fold: CPU, Triton and CUDA kernels run the same cases."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Branch:
    """Taps of a (kh, kw) kernel at ``offset + u step``; ``layout`` is how its weight lies in memory."""

    kernel: tuple[int, int]
    offset: tuple[int, int] = (0, 0)
    step: tuple[int, int] = (1, 1)
    layout: str = "dense"


@dataclass(frozen=True)
class Case:
    name: str
    channels: int
    kernel: tuple[int, int]
    branches: tuple[Branch, ...]
    scaled: bool = True
    biases: int = 1

    def offset(self) -> list[int]:
        return [o for b in self.branches for o in b.offset]

    def step(self) -> list[int]:
        return [s for b in self.branches for s in b.step]


def centred(kernel: int, size: int, dilation: int = 1, **kwargs) -> Branch:
    at = (size - 1 - dilation * (kernel - 1)) // 2
    return Branch((kernel, kernel), (at, at), (dilation, dilation), **kwargs)


UNIREPLKNET_13 = ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5))
CASES = (
    Case("single", 5, (7, 7), (Branch((7, 7)),), scaled=False, biases=0),
    Case("replknet", 6, (31, 31), (Branch((31, 31)), centred(5, 31)), biases=2),
    Case("unireplknet", 9, (13, 13), (Branch((13, 13)), *(centred(k, 13, r) for k, r in UNIREPLKNET_13))),
    Case("identity", 4, (5, 5), (Branch((5, 5)), centred(1, 5)), biases=3),
    Case("even", 3, (4, 6), (Branch((4, 6)), Branch((2, 4), (1, 1)), Branch((1, 2), (3, 4)))),
    Case("rectangular", 3, (9, 3), (Branch((9, 3)), Branch((9, 1), (0, 1)), Branch((1, 3), (4, 0)))),
    Case("unequal steps", 2, (12, 16), (Branch((3, 4), (1, 2), (5, 4)), Branch((6, 1), (0, 15), (2, 7)))),
    Case("holes", 3, (9, 9), (Branch((2, 2), (1, 2), (3, 4)),), biases=1),
    Case("unscaled", 4, (7, 7), (Branch((7, 7)), centred(3, 7, 2)), scaled=False, biases=2),
    Case("strided weights", 4, (5, 17), (
        Branch((5, 17), layout="sliced"), Branch((5, 17), layout="transposed"),
        Branch((3, 9), (1, 4), layout="flipped"), Branch((3, 3), (0, 2), (2, 5), layout="expanded"))),
    Case("misaligned", 3, (3, 35), (Branch((3, 35), layout="misaligned"), Branch((1, 33), (1, 1)))),
    Case("many", 2, (5, 5), tuple(centred(1 + 2 * (i % 3), 5) for i in range(20)), biases=20),
)  # fmt: skip


def lay_out(weight: Tensor, layout: str) -> Tensor:
    """The values of ``weight`` (some of them repeated, where expanded) behind other strides."""
    if layout == "transposed":
        return weight.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return weight[:1, :, :, :1].expand(weight.shape)
    if layout == "misaligned":
        flat = torch.full((weight.numel() + 1,), float("nan"), dtype=weight.dtype, device=weight.device)
        flat[1:] = weight.flatten()
        return flat[1:].view(weight.shape)
    if layout in ("sliced", "flipped"):
        o, one, h, w = weight.shape
        wide = torch.full((o + 1, one, 2 * h, 2 * w), float("nan"), dtype=weight.dtype, device=weight.device)
        view = wide[1:, :, ::2, 1::2]
        if layout == "flipped":  # rows far apart, columns next to each other
            view = wide[:o, :, h:, w:]
        return view.copy_(weight)
    return weight


@dataclass
class Operands:
    weights: list[Tensor]
    scales: list[Tensor]
    biases: list[Tensor]
    grad_weight: Tensor
    grad_bias: Tensor

    def leaves(self) -> list[Tensor]:
        return [*self.weights, *self.scales, *self.biases]

    def to(self, dtype: torch.dtype) -> Operands:
        groups = ([t.detach().cpu().to(dtype) for t in g] for g in (self.weights, self.scales, self.biases))
        return Operands(*groups, self.grad_weight.cpu().to(dtype), self.grad_bias.cpu().to(dtype))


def operands(case: Case, dtype: torch.dtype, grad: bool = False, device: str = "cpu") -> Operands:
    generator = torch.Generator().manual_seed(len(case.name) + case.channels)

    def random(*size: int, as_dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(device, as_dtype)

    o, n = case.channels, len(case.branches)
    weights = [lay_out(random(o, 1, *b.kernel), b.layout) for b in case.branches]
    scales = [random(2 * o)[::2] if i % 2 else random(o) for i in range(n if case.scaled else 0)]
    biases = [random(o) for _ in range(case.biases)]
    found = Operands(weights, scales, biases, random(o, 1, *case.kernel), random(o))
    for t in found.leaves():
        t.requires_grad_(grad)
    return found


def exact(case: Case, given: Operands) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Kernel, bias, gradients of weights and of scales in float64, tap by tap: nothing of the package."""
    t = given.to(torch.float64)
    kernel = torch.zeros(case.channels, 1, *case.kernel, dtype=torch.float64)
    grad_weights, grad_scales = [], []
    for i, b in enumerate(case.branches):
        scale = t.scales[i] if t.scales else torch.ones(case.channels, dtype=torch.float64)
        gradient, dot = torch.zeros_like(t.weights[i]), torch.zeros(case.channels, dtype=torch.float64)
        for u in range(b.kernel[0]):
            for v in range(b.kernel[1]):
                y, x = b.offset[0] + u * b.step[0], b.offset[1] + v * b.step[1]
                kernel[:, 0, y, x] += scale * t.weights[i][:, 0, u, v]
                gradient[:, 0, u, v] = scale * t.grad_weight[:, 0, y, x]
                dot += t.weights[i][:, 0, u, v] * t.grad_weight[:, 0, y, x]
        grad_weights.append(gradient)
        if t.scales:
            grad_scales.append(dot)
    bias = sum(t.biases, torch.zeros(case.channels, dtype=torch.float64))
    return kernel, bias, grad_weights, grad_scales
