"""The correctness gate: no implementation is timed before its result agrees with float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.problem import Problem

# Relative rounding unit of the result itself; float32 and float64 add what their sums lose.
_RESULT_EPS = {"float64": 1e-15, "float32": 1e-7, "float16": 2**-10, "bfloat16": 2**-7}
_SUM_EPS = {"float64": 1e-14, "float32": 1e-6, "float16": 1e-6, "bfloat16": 1e-6}
_TF32_EPS = 2**-10
_MAX_ELEMENTS = 1 << 25  # elements of one float64 transform that may exist at a time


@dataclass(frozen=True)
class Verdict:
    """``error`` is ||result - reference|| / ||reference||; ``reason`` says why a result is wrong."""

    ok: bool
    error: float
    tolerance: float
    reason: str = ""


def fast_length(n: int) -> int:
    """The smallest even number >= n whose prime factors are 2, 3, 5 and 7."""
    while True:
        rest = n
        for p in (2, 3, 5, 7):
            while rest % p == 0:
                rest //= p
        if rest == 1 and n % 2 == 0:
            return n
        n += 1


def reference(problem: Problem) -> torch.Tensor:
    """The exact result in float64, through circular convolutions that are long enough not to wrap.

    With S >= H + 2p no two different index sums between -p and H - 1 + p meet modulo S, so one pair of
    transforms serves all passes: output row i sits at i*stride - p, tap u at u*dilation. A float64
    transform errs by about 1e-15, and takes seconds where float64 ``F.conv2d`` takes minutes.
    """
    maps = (problem.input, problem.grad_output)
    batch, channels = problem.input.shape[:2]
    layer = problem.layer
    sizes = [fast_length(n + 2 * p) for n, p in zip((layer.height, layer.width), layer.padding, strict=True)]
    per_channel = batch * layer.multiplier * sizes[0] * sizes[1]
    step = max(1, _MAX_ELEMENTS // per_channel)
    parts = []
    for first in range(0, channels, step):
        x, dy = (
            m[:, first * r : (first + step) * r].double()
            for m, r in zip(maps, (1, layer.multiplier), strict=True)
        )
        w = problem.weight[first * layer.multiplier : (first + step) * layer.multiplier, 0].double()
        parts.append(_reference_channels(problem, sizes, x, dy, w))
    return torch.cat(parts, dim=0 if problem.pass_name == "backward_weight" else 1)


def _reference_channels(problem: Problem, sizes, x, dy, w) -> torch.Tensor:
    layer, m = problem.layer, problem.layer.multiplier
    out_at = [
        (torch.arange(n, device=x.device) * s - p) % size
        for n, s, p, size in zip(layer.out_size, layer.stride, layer.padding, sizes, strict=True)
    ]
    tap_at = [
        torch.arange(k, device=x.device) * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True)
    ]

    def spread(values: torch.Tensor, at) -> torch.Tensor:
        grid = values.new_zeros(*values.shape[:-2], *sizes)
        grid[..., at[0][:, None], at[1]] = values
        return torch.fft.rfft2(grid)

    def gather(spectrum: torch.Tensor, at) -> torch.Tensor:
        return torch.fft.irfft2(spectrum, s=sizes)[..., at[0][:, None], at[1]]

    if problem.pass_name == "forward":
        spectrum = torch.fft.rfft2(x, s=sizes).repeat_interleave(m, dim=1)
        return gather(spectrum * spread(w, tap_at).conj(), out_at)
    if problem.pass_name == "backward_input":
        spectrum = spread(dy, out_at) * spread(w, tap_at)
        full = torch.fft.irfft2(spectrum.unflatten(1, (-1, m)).sum(2), s=sizes)
        return full[..., : layer.height, : layer.width]
    spectrum = torch.fft.rfft2(x, s=sizes).repeat_interleave(m, dim=1) * spread(dy, out_at).conj()
    return gather(spectrum.sum(0), tap_at).unsqueeze(1)


def tolerance(problem: Problem, tf32: bool = False) -> float:
    """Largest relative error of a right result: 1e-6 sqrt(summands) in float32, one rounding in half."""
    eps = _RESULT_EPS[problem.dtype] + _SUM_EPS[problem.dtype] * problem.summands**0.5
    return eps + _TF32_EPS if tf32 and problem.dtype == "float32" else eps


def check(result: torch.Tensor, expected: torch.Tensor, limit: float) -> Verdict:
    """Compares by norm, and by the worst element so that one lost pixel among millions does not pass."""
    if tuple(result.shape) != tuple(expected.shape):
        return Verdict(
            False, float("nan"), limit, f"shape {tuple(result.shape)}, not {tuple(expected.shape)}"
        )
    difference = (result.to(expected.device, torch.float64) - expected).abs_()
    scale = float(expected.norm())
    error = float(difference.norm()) / max(scale, 1e-300)
    if not error <= limit:  # also catches NaN
        return Verdict(False, error, limit, f"relative error {error:.2e} > {limit:.2e}")
    rms = scale / max(expected.numel(), 1) ** 0.5
    worst = float((difference - limit * expected.abs()).max()) if expected.numel() else 0.0
    if worst > 20 * limit * rms:
        return Verdict(False, error, limit, f"an element is off by {worst / rms:.2e} of the result's rms")
    return Verdict(True, error, limit)
