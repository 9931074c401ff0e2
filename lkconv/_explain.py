"""``explain``: which backend and algorithm compute a call, and why each alternative does not."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lkconv import _C, backends
from lkconv._fake import output_size
from lkconv._validate import Pair, check_sizes, check_types, computed_dtype, is_strided, padding_pair, pair

Alternatives = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PassPlan:
    """How one pass is computed.

    ``tile`` is rows by columns (Triton: the sides of a block); ``block`` says what a block of threads does
    with such tiles (CUDA). ``flops`` and ``scratch_bytes`` are those of the whole call, all stride phases
    together; scratch on a CPU is that of one thread. ``in_place`` says that tensors are read where they are,
    without copies in scratch; ``copied`` that they are so after a copy, of "pixels" or of transposed
    "planes"; ``swept`` that planes are summed row after row; ``flat`` that the outputs of planes are
    counted through, whatever their width; ``strip`` that a row or column of taps is a band that rows or
    columns of pixels are multiplied with; ``paired`` that products are of two kernel rows
    of bfloat16 at once; ``exchanged`` that a tall strip is computed as a row, rows and columns exchanged.
    ``alternatives`` are the other algorithms of the same backend, each with the reason why it was not taken.
    """

    algorithm: str
    tile: Pair | None
    isa: str | None
    flops: float
    scratch_bytes: int
    alternatives: Alternatives
    in_place: bool = False
    copied: str = ""
    swept: bool = False
    flat: bool = False
    strip: bool = False
    paired: bool = False
    exchanged: bool = False
    block: str | None = None

    def __str__(self) -> str:
        parts = [self.algorithm]
        if self.in_place:
            parts.append("in place")
        if self.copied:
            parts.append(f"{self.copied} copied")
        if self.swept:
            parts.append("row after row")
        if self.flat:
            parts.append("outputs counted through")
        if self.strip:
            parts.append("a band of taps")
        if self.paired:
            parts.append("two rows at once")
        if self.exchanged:
            parts.append("rows and columns exchanged")
        if self.tile is not None:
            parts.append(f"tile {self.tile[0]}x{self.tile[1]}")
        if self.block is not None:
            parts.append(self.block)
        if self.isa is not None:
            parts.append(self.isa)
        parts.append(f"{self.flops / 1e6:.3g} MFLOP")
        parts.append(f"{self.scratch_bytes / 1024:.0f} KiB scratch")
        return ", ".join(parts)


@dataclass(frozen=True)
class Explanation:
    """Result of :func:`explain`; ``str()`` is the report.

    ``algorithm``, ``tile``, ``isa``, ``flops`` and ``scratch_bytes`` are the forward's; ``passes`` holds
    those of the forward and both gradients. ``alternatives`` names every other backend, and every other
    algorithm of the forward as ``backend:algorithm``, each with the reason it was not taken.
    """

    call: str
    backend: str
    passes: dict[str, PassPlan]
    backends_declined: Alternatives

    @property
    def algorithm(self) -> str:
        return self.passes["forward"].algorithm

    @property
    def tile(self) -> Pair | None:
        return self.passes["forward"].tile

    @property
    def isa(self) -> str | None:
        return self.passes["forward"].isa

    @property
    def flops(self) -> float:
        return self.passes["forward"].flops

    @property
    def scratch_bytes(self) -> int:
        return self.passes["forward"].scratch_bytes

    @property
    def alternatives(self) -> Alternatives:
        algorithms = ((f"{self.backend}:{n}", reason) for n, reason in self.passes["forward"].alternatives)
        return (*self.backends_declined, *algorithms)

    def __str__(self) -> str:
        lines = [self.call, f"backend: {self.backend}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.backends_declined]
        for name, plan in self.passes.items():
            lines.append(f"{name}: {plan}")
            lines += [f"  not {self.backend}:{n}: {reason}" for n, reason in plan.alternatives]
        return "\n".join(lines)


def explain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
) -> Explanation:
    """Which backend and algorithm :func:`lkconv.depthwise_conv2d` takes for these arguments, and why.

    Nothing is computed.

    Args:
        As :func:`lkconv.depthwise_conv2d`.

    Returns:
        An :class:`Explanation`; ``print`` it.

    Raises:
        TypeError, ValueError: as :func:`lkconv.depthwise_conv2d`.
    """
    check_types(input, weight, bias)
    stride, dilation = pair("stride", stride, 1), pair("dilation", dilation, 1)
    padding, extra = padding_pair(padding, weight.shape[2:], stride, dilation)
    check_sizes(input.shape, weight.shape, bias, stride, padding, dilation, extra)
    batch = input.shape[:-2] if input.dim() == 4 else (1, input.shape[0])
    size = (*batch, input.shape[-2] + extra[0], input.shape[-1] + extra[1])
    dtype = computed_dtype(input)
    problem = (size, weight.shape[0], tuple(weight.shape[2:]), stride, padding, dilation)
    strided = is_strided(input, weight)
    channels_last = input.dim() == 4 and input.stride(1) == 1 and input.shape[1] > 1
    choice = backends.choose(input.device, dtype)
    if strided:
        choice = backends.choose_for(choice, input.device, dtype, problem, channels_last)
    name, declined = choice.name, choice.declined
    if name != "torch" and not strided:
        declined = ((name, "takes strided tensors"), *(d for d in declined if d[0] != "torch"))
        name = "torch"
    dtype_name = str(dtype).removeprefix("torch.")
    call = (
        f"depthwise_conv2d of input {size} {dtype_name} on {input.device}, weight {tuple(weight.shape)}, "
        f"stride {stride}, padding {padding}, dilation {dilation}"
    )
    layout = _Layout(channels_last, dense=not channels_last or input.stride(3) == input.shape[1])
    passes = {p: _plan(name, p, problem, dtype_name, input.device, layout) for p in backends.PASSES}
    return Explanation(call, name, passes, declined)


class _Layout(NamedTuple):
    """What planners know of the tensors' memory; ``dense``: pixels are no slices of wider ones."""

    channels_last: bool
    dense: bool


def _plan(
    backend: str, pass_name: str, problem: Any, dtype: str, device: torch.device, layout: _Layout
) -> PassPlan:
    if backend in ("cuda", "triton") and 0 in (*problem[0], problem[1]):
        return PassPlan("none: the tensors are empty", None, None, 0.0, 0, ())
    candidates = _candidates(backend, pass_name, problem, dtype, device, layout)
    if candidates is None:
        algorithm = "aten convolution" if backend == "torch" else backend
        return PassPlan(algorithm, None, None, _direct_flops(*problem), 0, ())
    taken, *others = candidates
    if not taken["possible"]:
        return PassPlan("none", None, None, 0.0, 0, tuple((c["algorithm"], c["reason"]) for c in candidates))
    return PassPlan(
        algorithm=taken["algorithm"],
        tile=None if taken.get("tile") is None else tuple(taken["tile"][-2:]),
        isa=taken.get("isa"),
        flops=taken["flops"],
        scratch_bytes=taken["scratch_bytes"],
        alternatives=tuple((c["algorithm"], _why_not(backend, c, taken)) for c in others),
        in_place=taken.get("in_place", False),
        copied=taken.get("copied", ""),
        swept=bool(taken.get("swept", 0)),
        flat=taken.get("flat", False),
        strip=taken.get("strip", False),
        paired=taken.get("paired", False),
        exchanged=taken.get("exchanged", False),
        block=_block(taken) if backend == "cuda" else None,
    )


def _why_not(backend: str, declined: dict[str, Any], taken: dict[str, Any]) -> str:
    reason = declined["reason"]
    if backend == "cuda" and declined["possible"]:
        reason += f": {declined['cycles']:.3g} cycles against {taken['cycles']:.3g}"
    return reason


def _block(plan: dict[str, Any]) -> str:
    """What a block of the CUDA kernel does: tiles, one after the other, and the planes of each."""
    channels, images = plan["tile"][:2]
    tiles = plan["tiles_per_block"]
    return (
        f"{tiles} tile{'s' * (tiles > 1)} a block, each of {channels} channel{'s' * (channels > 1)} "
        f"and {images} image{'s' * (images > 1)}"
    )


def _candidates(
    backend: str, pass_name: str, problem: Any, dtype: str, device: torch.device, layout: _Layout
) -> list[dict[str, Any]] | None:
    """The backend's planner's answer, the chosen one first; None where the backend has no planner."""
    if backend == "cpu":
        size, out_channels, kernel_size, stride, padding, dilation = problem
        return _C.plan(
            pass_name,
            size,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            dtype,
            _C.active_isa(),
            torch.get_num_threads(),
            **_C.switches(),
            **layout._asdict(),
        )
    if backend == "torch":
        return None
    if backend == "cuda":
        module: Any = backends.cuda_module()[0]
        cudnn: Any = torch.backends.cudnn
        tf32 = cudnn.conv.fp32_precision == "tf32"
        machine = backends.cuda_machine(device)._asdict()
        return module.plan(pass_name, *problem, dtype, layout.channels_last, tf32, **machine)
    planner = importlib.import_module("lkconv.triton_kernels").plan
    return planner(pass_name, *problem, dtype, device.index or 0, layout.channels_last)


def _direct_flops(
    size: Any, out_channels: int, kernel_size: Any, stride: Pair, padding: Pair, dilation: Pair
) -> float:
    height, width = output_size(size[2:], kernel_size, stride, padding, dilation)
    return 2.0 * size[0] * out_channels * height * width * kernel_size[0] * kernel_size[1]
