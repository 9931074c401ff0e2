"""The Group-Mix calls that the CUDA kernels are tested on, and their results through plain PyTorch."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from lkconv import reference
from lkconv.reference_group_mix import POSITION_HEADS as HEADS

WINDOWS = (3, 5, 7)


@dataclasses.dataclass(frozen=True)
class Case:
    """Tokens of `batch` images of height x width, segments of `segment` channels."""

    segment: int
    batch: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.height * self.width

    def __str__(self) -> str:
        return f"d{self.segment}-{self.batch}x{self.height}x{self.width}"


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def aggregate_inputs(case: Case, dtype: torch.dtype, parameters: torch.dtype) -> dict[str, list[Tensor]]:
    """Every input of the aggregation's kernels in their order, rounded to the dtypes that they have there.

    hardswish's derivative jumps at +-3: a value that rounding carries across changes a gradient by half of
    itself, in PyTorch as in the kernels. With half types the norms therefore keep their outputs inside.
    """
    gain = 1.0 if dtype.itemsize > 2 else 0.3
    d, b, n = case.segment, case.batch, case.tokens
    taps = [(d, 1, k, k) for k in WINDOWS] + [(3 * d, 1, 3, 3)]
    square = [(d, d)] * 3 + [(d, 3 * d)]
    found = {
        "qkv": [random(b, n, 15 * d, seed=1)],
        "grad_mixed": [random(3, b, n, 4 * d, seed=2)],
        "grad_out": [random(b, n, 5 * d, seed=3)],
        "depthwise": [random(*s, seed=10 + i, scale=1 / s[-1]) for i, s in enumerate(taps)],
        "pointwise": [random(*s, seed=20 + i, scale=s[-1] ** -0.5) for i, s in enumerate(square)],
        "norm_weight": [gain * (1 + random(d, seed=30 + i, scale=0.3)) for i in range(4)],
        "norm_bias": [random(d, seed=40 + i, scale=gain) for i in range(4)],
        "norm_mean": [random(d, seed=50 + i, scale=0.5) for i in range(4)],
        "norm_var": [0.5 + random(d, seed=60 + i).abs() for i in range(4)],
        "layer_norm": [gain * (1 + random(d, seed=70, scale=0.3)), random(d, seed=71, scale=gain)],
    }
    tokens = ("qkv", "grad_mixed", "grad_out")
    return {k: [t.to(dtype if k in tokens else parameters) for t in v] for k, v in found.items()}


def attention_inputs(case: Case, dtype: torch.dtype, parameters: torch.dtype) -> dict[str, list[Tensor]]:
    """Every input of the attention core's kernels in their order."""
    d, b, n = case.segment, case.batch, case.tokens
    head = d // 2
    weights = [
        random(h * head, 1, k, k, seed=10 + k, scale=1 / k) for h, k in zip(HEADS, WINDOWS, strict=True)
    ]
    return {
        "mixed": [random(3, b, n, 4 * d, seed=1).to(dtype)],
        "local": [random(b, n, d, seed=2).to(dtype)],
        "grad_out": [random(b, n, 5 * d, seed=3).to(dtype)],
        "weight": [w.to(parameters) for w in weights],
        "bias": [random(h * head, seed=30 + h + i).to(parameters) for i, h in enumerate(HEADS)],
    }


def heads_of(mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(3, B, N, 4d) as q, k, v of shape (B, 8, N, d / 2)."""
    q, k, v = mixed.unflatten(-1, (8, -1)).transpose(2, 3).unbind()
    return q, k, v


def flat(grads: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in grads])


def aggregate_exact(
    case: Case, inputs: dict[str, list[Tensor]], training: bool, dtype: torch.dtype, eps: float
) -> dict[str, Tensor]:
    """What the kernels should give, through plain PyTorch and autograd in `dtype`."""
    t = {k: [v.to(dtype, copy=True) for v in values] for k, values in inputs.items()}
    order = ["qkv", "depthwise", "pointwise", "layer_norm", "norm_weight", "norm_bias"]
    leaves = [v.requires_grad_() for name in order for v in t[name]]
    means, variances = [m.clone() for m in t["norm_mean"]], [v.clone() for v in t["norm_var"]]
    q, k, v, local = reference.group_mix_aggregate(
        t["qkv"][0], (case.height, case.width), t["depthwise"], t["pointwise"], t["norm_weight"],
        t["norm_bias"], means, variances, *t["layer_norm"], training=training, momentum=1.0, eps=eps,
        layer_norm_eps=eps,
    )  # fmt: skip
    mixed = torch.stack([x.transpose(1, 2).flatten(2) for x in (q, k, v)])
    grad_local = t["grad_out"][0][..., 4 * case.segment :]
    grads = list(torch.autograd.grad([mixed, local], leaves, [t["grad_mixed"][0], grad_local]))
    found = {
        "mixed": mixed.detach(),
        "local": local.detach(),
        "grad_norm_bias": flat(grads[15:19]),
        "grad_norm_weight": flat(grads[11:15]),
        "grad_qkv": grads[0],
        "grad_depthwise": flat(grads[1:5]),
        "grad_pointwise": flat(grads[5:9]),
        "grad_layer_norm": flat(grads[9:11]),
    }
    if training:
        count = 3 * case.batch * case.tokens
        found["mean"], found["var"] = torch.stack(means), torch.stack(variances) * (count - 1) / count
    return found


def attention_exact(
    case: Case, inputs: dict[str, list[Tensor]], dtype: torch.dtype, scale: float
) -> dict[str, Tensor]:
    """What the kernels should give, through plain PyTorch and autograd in `dtype`."""
    t = {k: [v.to(dtype, copy=True) for v in values] for k, values in inputs.items()}
    leaves = [v.requires_grad_() for name in ("mixed", "weight", "bias") for v in t[name]]
    out = reference.group_mix_attention(
        *heads_of(t["mixed"][0]), t["local"][0], (case.height, case.width), t["weight"], t["bias"], scale
    )
    grads = list(torch.autograd.grad(out, leaves, t["grad_out"][0]))
    return {
        "out": out.detach(),
        "grad_mixed": grads[0],
        "grad_weight": flat(grads[1:4]),
        "grad_bias": flat(grads[4:]),
    }


def relative(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of b; infinite where a is not a number."""
    error = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
    return error if math.isfinite(error) else math.inf


def error_limit(name: str, case: Case, dtype: torch.dtype, eager: float) -> float:
    """Largest relative error of a result; `eager` is PyTorch's in the same dtype.

    Results of tokens sum the taps of a window and the terms of a pointwise product, gradients of parameters
    all tokens.
    """
    if dtype == torch.float64:
        return 1e-12
    of_tokens = name in ("mixed", "local", "out", "grad_qkv", "grad_mixed")
    terms = 49 + 3 * case.segment if of_tokens else 3 * case.batch * case.tokens
    if dtype == torch.float32:
        return 1e-6 * terms**0.5
    return 2 * eager + torch.finfo(dtype).eps / 4
