"""What is measured: lkconv, and every way a user could compute the same without it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import lkconv
from bench.gate import fast_length
from bench.problem import LAYOUTS, Problem
from lkconv.ops import direct

Run = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Implementation:
    """``prepare`` does what is not timed and returns the timed call; ``declines`` gives a reason or ''.

    lkconv's are named ``lkconv`` and, on further backends, ``lkconv:NAME``; ``backend`` is the asked one.
    """

    name: str
    prepare: Callable[[Problem], Run]
    declines: Callable[[Problem], str] = lambda problem: ""
    layouts: tuple[str, ...] = LAYOUTS
    backend: str | None = None

    @property
    def ours(self) -> bool:
        return is_ours(self.name)


def is_ours(implementation: str) -> bool:
    """Whether rows of this name are lkconv's, not a peer's."""
    return implementation.partition(":")[0] == "lkconv"


def _geometry(problem: Problem) -> tuple[list[int], list[int], list[int]]:
    layer = problem.layer
    return list(layer.stride), list(layer.padding), list(layer.dilation)


def prepare_lkconv(problem: Problem) -> Run:
    """The public function forward; the op that its autograd function calls, as it calls it, backward."""
    x, w, dy = problem.input, problem.weight, problem.grad_output
    geometry = _geometry(problem)
    if problem.pass_name == "forward":
        return lambda: lkconv.depthwise_conv2d(x, w, None, *geometry)
    ops = lkconv.backends.choose(x.device, x.dtype).ops
    if problem.pass_name == "backward_input":
        op = ops.backward_input if ops else lkconv.reference.depthwise_conv2d_backward_input
        arguments = (dy, w, list(x.shape), *geometry)
    else:
        op = ops.backward_weight if ops else lkconv.reference.depthwise_conv2d_backward_weight
        arguments = (dy, x, list(problem.layer.kernel_size), *geometry)

    function = direct(op)

    def run() -> torch.Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return function(*arguments)

    return run


def lkconv_on(backend: str, name: str) -> Implementation:
    """lkconv held to one backend."""

    def prepare(problem: Problem) -> Run:
        with lkconv.use_backend(backend):
            run = prepare_lkconv(problem)

        def held() -> torch.Tensor:
            with lkconv.use_backend(backend):
                return run()

        return held

    def declines(problem: Problem) -> str:
        return why_not(backend, problem.input.device, problem.input.dtype)

    return Implementation(name, prepare, declines, backend=backend)


def why_not(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why lkconv would not take this backend if asked to, or ''."""
    with lkconv.use_backend(backend):
        choice = lkconv.backends.choose(device, dtype)
    return "" if choice.name == backend else dict(choice.declined)[backend]


def prepare_conv2d(problem: Problem) -> Run:
    """F.conv2d, and the aten op that its autograd calls, asked for one gradient only."""
    x, w, dy = problem.input, problem.weight, problem.grad_output
    stride, padding, dilation = _geometry(problem)
    groups = problem.layer.channels
    if problem.pass_name == "forward":
        return lambda: F.conv2d(x, w, None, stride, padding, dilation, groups)
    wanted = 0 if problem.pass_name == "backward_input" else 1
    mask = [wanted == 0, wanted == 1, False]

    def run() -> torch.Tensor:
        return torch.ops.aten.convolution_backward.default(
            dy, x, w, None, stride, padding, dilation, False, [0, 0], groups, mask
        )[wanted]

    return run


def prepare_compiled_conv2d(problem: Problem) -> Run:
    torch._dynamo.reset()  # each problem is compiled for its own shape, without a dynamic one
    return torch.compile(prepare_conv2d(problem), dynamic=False, fullgraph=True)


def _kernel_spectrum(problem: Problem, weight: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Spectrum of the dilated kernel, shifted by the padding so that the result starts at index 0."""
    layer = problem.layer
    (kh, kw), (dh, dw) = layer.kernel_size, layer.dilation
    kernel = weight[:, 0]
    if (dh, dw) != (1, 1):
        spread = kernel.new_zeros(kernel.shape[0], (kh - 1) * dh + 1, (kw - 1) * dw + 1)
        spread[:, ::dh, ::dw] = kernel
        kernel = spread
    kernel = F.pad(kernel, (0, sizes[1] - kernel.shape[2], 0, sizes[0] - kernel.shape[1]))
    return torch.fft.rfft2(kernel.roll((-layer.padding[0], -layer.padding[1]), dims=(1, 2))).conj()


def prepare_fft(problem: Problem) -> Run:
    """Unfused torch.fft: rfft2, multiply, irfft2, at the shortest length that does not wrap (H + p).

    The kernel's transform is not counted in the forward pass. The gradients are those of autograd; what
    the forward pass keeps for them is not counted either.
    """
    layer, (out_h, out_w) = problem.layer, problem.layer.out_size
    sizes = [
        fast_length(max(n + p, (k - 1) * d + 1, out))
        for n, p, k, d, out in zip(
            (layer.height, layer.width),
            layer.padding,
            layer.kernel_size,
            layer.dilation,
            layer.out_size,
            strict=True,
        )
    ]

    def convolve(x: torch.Tensor, kernel_spectrum: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfft2(x, s=sizes)
        if layer.multiplier > 1:
            spectrum = spectrum.repeat_interleave(layer.multiplier, dim=1)
        return torch.fft.irfft2(spectrum * kernel_spectrum, s=sizes)[..., :out_h, :out_w]

    if problem.pass_name == "forward":
        x, spectrum = problem.input, _kernel_spectrum(problem, problem.weight, sizes)
        return lambda: convolve(x, spectrum)
    with torch.enable_grad():
        to_weight = problem.pass_name == "backward_weight"
        x = problem.input.detach().requires_grad_(not to_weight)
        weight = problem.weight.detach().requires_grad_(to_weight)
        output = convolve(x, _kernel_spectrum(problem, weight, sizes))
    leaf = weight if to_weight else x
    return lambda: torch.autograd.grad(output, leaf, problem.grad_output, retain_graph=True)[0]


def fft_declines(problem: Problem) -> str:
    if problem.layer.stride != (1, 1):
        return "torch.fft computes stride 1 only"
    if problem.dtype not in ("float32", "float64"):
        return f"torch.fft has no {problem.dtype} of any length"
    return ""


LKCONV = Implementation("lkconv", prepare_lkconv)
CONV2D = Implementation("conv2d", prepare_conv2d)
COMPILED = Implementation("conv2d+compile", prepare_compiled_conv2d)
FFT = Implementation("torch.fft", prepare_fft, fft_declines, layouts=("contiguous",))


def implementations(compiled: bool = False, backends: tuple[str, ...] = ()) -> list[Implementation]:
    """lkconv, on its own choice of a backend or on each of ``backends``, and its peers."""
    ours = [lkconv_on(b, f"lkconv:{b}" if i else "lkconv") for i, b in enumerate(backends)] or [LKCONV]
    return [*ours, CONV2D, *([COMPILED] if compiled else []), FFT]


def explained(problem: Problem, backend: str | None = None) -> tuple[str, str]:
    """Backend and algorithm that lkconv picks for this problem; off the CPU the second names both.

    Never raises: a report that cannot be made must not cost the measurement it describes.
    """
    try:
        with lkconv.use_backend(backend) if backend else nullcontext():
            report = lkconv.explain(problem.input, problem.weight, None, *_geometry(problem))
        name = report.passes[problem.pass_name].algorithm
    except Exception as error:
        return backend or "unknown", f"unknown ({type(error).__name__}: {error})"
    return report.backend, name if report.backend == "cpu" else f"{report.backend}:{name}"
