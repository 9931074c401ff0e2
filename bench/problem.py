"""One measured problem: a layer, a batch, a dtype, a memory layout, a pass, and its tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.shapes import Layer

PASSES = ("forward", "backward_input", "backward_weight")
LAYOUTS = ("contiguous", "channels_last")
DTYPES = ("float32", "bfloat16", "float16", "float64")
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Problem:
    """Tensors and hyper-parameters of one pass; whatever runs it reads only this.

    ``input`` (N, C, H, W), ``weight`` (C*m, 1, kh, kw) and ``grad_output`` (N, C*m, Ho, Wo) share
    ``dtype`` and device; all are in ``layout``, as ``module.to(memory_format=...)`` makes them.
    """

    layer: Layer
    pass_name: str
    layout: str
    input: torch.Tensor
    weight: torch.Tensor
    grad_output: torch.Tensor

    @property
    def dtype(self) -> str:
        return str(self.input.dtype).removeprefix("torch.")

    @property
    def batch(self) -> int:
        return self.input.shape[0]

    @property
    def flops(self) -> int:
        return self.layer.flops(self.batch)

    @property
    def bytes(self) -> int:
        """Compulsory traffic: both maps and the weight, each moved once (every pass touches all three)."""
        return sum(self.layer.elements(self.batch)) * self.input.element_size()

    @property
    def summands(self) -> int:
        """Products summed into one element of the result; rounding errors grow with its root."""
        if self.pass_name == "backward_weight":
            return self.batch * self.layer.out_size[0] * self.layer.out_size[1]
        return self.layer.taps


def _random(size: tuple[int, ...], device: str, seed: int) -> torch.Tensor:
    """Drawn where they are used: a CPU takes minutes for the maps of a GPU's suite."""
    return torch.randn(size, generator=torch.Generator(device).manual_seed(seed), device=device)


def make_problems(
    layer: Layer, batch: int, dtype: str, pass_name: str, device: str, layouts=LAYOUTS, seed: int = 0
) -> dict[str, Problem]:
    """The same random values in each layout. ``seed`` selects one of several sets of values."""
    if layer.parent_channels and layer.multiplier != 1:
        raise ValueError(
            f"layer {layer.name!r}: a channel slice with a channel multiplier is no layer of any model"
        )
    wide = layer.parent_channels  # of the tensor that the layer reads a channel slice of, else 0
    values = (
        _random((batch, wide or layer.channels, layer.height, layer.width), device, 3 * seed),
        _random((batch, wide or layer.out_channels, *layer.out_size), device, 3 * seed + 1),
    )
    weight = _random((layer.out_channels, 1, *layer.kernel_size), device, 3 * seed + 2) / layer.taps**0.5
    kind = getattr(torch, dtype)
    weight = weight.to(kind)
    problems = {}
    for layout in layouts:
        maps = [value.to(kind).contiguous(memory_format=MEMORY_FORMATS[layout]) for value in values]
        if layer.parent_channels:
            maps = [value[:, layer.offset : layer.offset + layer.channels] for value in maps]
        own_weight = weight.clone(memory_format=MEMORY_FORMATS[layout])
        problems[layout] = Problem(layer, pass_name, layout, maps[0], own_weight, maps[1])
    return problems
