"""RepOptimizers (https://arxiv.org/abs/2205.15242): train a plain kernel as if it had scaled branches.

A sum of branches a_b conv(x, W_b) with constant scales is one convolution with W = sum_b place_b(a_b W_b),
and an optimiser step on all W_b moves W as a step on W itself does with its gradient (SGD) or its update
(AdamW) multiplied, tap by tap, by a constant:

    SGD:    dW_b = a_b gather_b(G)             so  W moves along  sum_b place_b(a_b^2) G
    AdamW:  the update is free of the gradient's scale, so  W moves along  sum_b place_b(|a_b|) update

SGD multiplies before weight decay and momentum, which act on W as they do on every W_b. Clipping gradients
would act on other norms than in the model with branches: do not clip. AdamW is exact as far as its eps is
negligible, for eps does not scale with a_b.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lkconv.reparam.algebra import identity_kernel, place
from lkconv.reparam.csla import LinearAddBlock
from lkconv.reparam.geometry import Geometry

_POWERS = {"sgd": 2, "adamw": 1}


def gradient_multipliers(
    weight_shape: Sequence[int],
    scales: Sequence[Tensor | float],
    geometries: Sequence[Geometry],
    target: Geometry,
    identities: Sequence[bool] | None = None,
    rule: str = "sgd",
) -> Tensor:
    """The constant by which gradients (SGD) or updates (AdamW) of a plain kernel are multiplied.

    Args:
        weight_shape: (O, I / groups, kh, kw) of the plain kernel.
        scales: per branch a_b, a number or (O,).
        geometries: per branch where its kernel lies; target: that of the plain kernel.
        identities: per branch whether it is an identity with a trained scale: it reaches the centre tap of a
            channel onto itself only. None: no branch is.
        rule: "sgd" (sum of squares) or "adamw" (sum of magnitudes).

    Returns:
        Tensor of ``weight_shape`` in the scales' dtype. For RepVGG's branches under SGD: a3^2 everywhere,
        + a1^2 at the centre, + a0^2 at the centre of the diagonal.

    Raises:
        ValueError: for another rule, empty lists or lists of different lengths, a scale of another shape, a
            branch that does not fit, or a weight_shape that is not the target's.
    """
    if rule not in _POWERS:
        raise ValueError(f"rule must be one of {sorted(_POWERS)}, got {rule!r}")
    identities = [False] * len(scales) if identities is None else identities
    if not len(scales) == len(geometries) == len(identities):
        raise ValueError(
            f"scales, geometries and identities must be equally long, got {len(scales)}, {len(geometries)}, "
            f"{len(identities)}"
        )
    out_channels, per_group = int(weight_shape[0]), int(weight_shape[1])
    total = None
    for b, (scale, geometry) in enumerate(zip(scales, geometries, strict=True)):
        factor = torch.as_tensor(scale).detach().abs().pow(_POWERS[rule])
        if factor.dim() not in (0, 1) or (factor.dim() == 1 and factor.numel() != out_channels):
            raise ValueError(f"scales[{b}] must be a number or ({out_channels},), got {tuple(factor.shape)}")
        if identities[b]:
            mask = identity_kernel(out_channels, target.groups, 1, factor.device, factor.dtype)
        else:
            mask = factor.new_ones(out_channels, per_group, *geometry.kernel_size)
        placed = place(mask * factor.reshape(-1, 1, 1, 1), geometry, target, f"branch {b}")
        total = placed if total is None else total + placed
    if total is None:
        raise ValueError("gradient_multipliers needs at least one branch")
    if tuple(total.shape) != tuple(weight_shape):
        raise ValueError(
            f"weight_shape must be {tuple(total.shape)} for this target, got {tuple(weight_shape)}"
        )
    return total


def block_multiplier(block: LinearAddBlock, rule: str = "sgd") -> Tensor:
    """The multiplier for the merged kernel of a trained :class:`LinearAddBlock`, from its scales.

    Args:
        block: in its training form.
        rule: as for :func:`gradient_multipliers`.

    Returns:
        (O, I / groups, kh, kw), in the scales' dtype.

    Raises:
        ValueError: for another rule.
    """
    kernels = block.scaled_kernels()
    shape = block.conv.weight.shape
    return gradient_multipliers(
        shape, kernels.scales, kernels.geometries, block._target, kernels.identities, rule
    )


def _checked(multipliers: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    found = {}
    for parameter, multiplier in multipliers.items():
        if multiplier.shape != parameter.shape:
            raise ValueError(
                f"a multiplier must have its parameter's shape {tuple(parameter.shape)}, got "
                f"{tuple(multiplier.shape)}"
            )
        found[parameter] = multiplier.detach().to(parameter)
    return found


class RepSGD(torch.optim.SGD):
    """``torch.optim.SGD`` that multiplies gradients before weight decay and momentum.

    Args:
        params, and all keyword arguments: as ``torch.optim.SGD``.
        multipliers: parameter -> tensor of its shape (:func:`gradient_multipliers` with rule "sgd").
            Parameters without one are optimised as usual. ``.grad`` is left as backward made it.

    Raises:
        ValueError: if a multiplier has another shape than its parameter.
    """

    def __init__(self, params: Iterable[Any], multipliers: Mapping[Tensor, Tensor], **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self.multipliers = _checked(multipliers)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        original = {p: p.grad for p in self.multipliers if p.grad is not None}
        for parameter, gradient in original.items():
            parameter.grad = gradient * self.multipliers[parameter]
        try:
            super().step()
        finally:
            for parameter, gradient in original.items():
                parameter.grad = gradient
        return loss


class RepAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` that multiplies the update, but not the decoupled weight decay.

    Args:
        params, and all keyword arguments: as ``torch.optim.AdamW``.
        multipliers: parameter -> tensor of its shape (:func:`gradient_multipliers` with rule "adamw").
            Parameters without one are optimised as usual.

    Raises:
        ValueError: if a multiplier has another shape than its parameter.
    """

    def __init__(self, params: Iterable[Any], multipliers: Mapping[Tensor, Tensor], **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self.multipliers = _checked(multipliers)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # A gradient scaler leaves it to a fused step to do nothing where gradients are not finite.
        skipped = getattr(self, "found_inf", None)
        moved = [
            (p, group["lr"] * group["weight_decay"] * (1 if skipped is None else 1 - skipped.to(p)))
            for group in self.param_groups
            for p in group["params"]
            if p in self.multipliers and p.grad is not None
        ]
        before = [p.clone() for p, _ in moved]
        # From zero, AdamW's step leaves the bare update: decay has nothing to act on and no digit is lost.
        for parameter, _ in moved:
            parameter.zero_()
        super().step()
        for (parameter, decay), start in zip(moved, before, strict=True):
            parameter.mul_(self.multipliers[parameter]).add_(start * (1 - decay))
        return loss
