"""The algebra of merging: place, scale and sum kernels. Pure, differentiable functions of tensors.

Half-precision kernels are folded in float32 and cast once at the end; float64 stays float64.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkconv.reference_merge import fold_dtype, spread_and_pad
from lkconv.reparam.geometry import Geometry, place_geometry


@dataclass
class Branch:
    """One linear branch: ``scale * conv(input, weight) + bias``, all per output channel.

    weight: (O, I / groups, kh, kw); geometry: where it lies, ``kernel_size`` being (kh, kw); scale, bias:
    (O,) or None; each in any floating dtype. name: how error messages call it. What takes branches checks
    them.
    """

    weight: Tensor
    geometry: Geometry
    scale: Tensor | None = None
    bias: Tensor | None = None
    name: str = "branch"


def place(weight: Tensor, branch: Geometry, target: Geometry, name: str = "branch") -> Tensor:
    """The target-sized kernel that computes what ``weight`` does.

    Args:
        weight: (O, I / groups, kh, kw), kh and kw those of ``branch``.
        branch, target: geometries of the branch and of the kernel it moves into.
        name: how error messages call the branch.

    Returns:
        (O, I / groups, *target.kernel_size), same dtype.

    Raises:
        ValueError: if ``weight`` has another kernel size, the branch's taps do not fit, strides, groups or
            output sizes differ, or a padding mode is not zeros.
    """
    check_kernel_size(weight, branch, name)
    return spread_and_pad(weight, place_geometry(branch, target, name), target.kernel_size)


def check_kernel_size(weight: Tensor, geometry: Geometry, name: str) -> None:
    if weight.dim() != 4 or tuple(weight.shape[2:]) != geometry.kernel_size:
        raise ValueError(
            f"{name}: weight must be (O, I / groups, {geometry.kernel_size[0]}, {geometry.kernel_size[1]}), "
            f"got {tuple(weight.shape)}"
        )


def batch_norm_affine(
    running_mean: Tensor,
    running_var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What batch normalisation with fixed statistics does to ``y + bias``: (scale, shift), each (O,).

    s = gamma / sqrt(var + eps), b' = beta + (bias - mean) s. gamma and beta are None without affine.
    """
    dtype = fold_dtype(running_mean, running_var, gamma, beta, bias)
    scale = torch.rsqrt(running_var.to(dtype) + eps)
    if gamma is not None:
        scale = scale * gamma.to(dtype)
    centre = -running_mean.to(dtype) if bias is None else bias.to(dtype) - running_mean.to(dtype)
    shift = centre * scale
    return scale, shift if beta is None else shift + beta.to(dtype)


def module_affine(bn: Any, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """:func:`batch_norm_affine` of a BatchNorm module's running statistics."""
    if getattr(bn, "running_var", None) is None:
        raise ValueError(f"{type(bn).__name__} keeps no running statistics, so it cannot be folded")
    return batch_norm_affine(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps, bias)


def fold_batch_norm(weight: Tensor, bias: Tensor | None, bn: nn.Module) -> tuple[Tensor, Tensor]:
    """The convolution that equals ``bn(conv(x))`` with the running statistics of ``bn``.

    Args:
        weight: (O, ...), a convolution's or linear layer's weight; bias: (O,) or None.
        bn: a BatchNorm or SyncBatchNorm over O channels, affine or not.

    Returns:
        weight' = s weight and bias' = beta + (bias - mean) s, in float32 (float64 if any operand is), so that
        a half-precision model is rounded once, at the end.

    Raises:
        ValueError: if ``bn`` keeps no running statistics or counts other channels.
    """
    scale, shift = module_affine(bn, bias)
    if scale.numel() != weight.shape[0]:
        raise ValueError(f"batch norm over {scale.numel()} channels after a weight with {weight.shape[0]}")
    return weight.to(scale.dtype) * scale.reshape(-1, *[1] * (weight.dim() - 1)), shift


def identity_kernel(
    channels: int,
    groups: int = 1,
    kernel_size: int | tuple[int, int] = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(channels, channels / groups, kh, kw) with W[i, i mod (channels / groups)] = 1 at the centre tap.

    Raises:
        ValueError: for an even kernel (it has no centre) or channels not divisible by groups.
    """
    kh, kw = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    if kh % 2 == 0 or kw % 2 == 0:
        raise ValueError(f"an identity kernel needs odd sizes, got {(kh, kw)}")
    if channels % groups:
        raise ValueError(f"channels {channels} is not divisible by groups {groups}")
    per_group = channels // groups
    eye = torch.eye(per_group, device=device, dtype=dtype).repeat(groups, 1)
    return F.pad(eye.reshape(channels, per_group, 1, 1), (kw // 2, kw // 2, kh // 2, kh // 2))


def identity_geometry(target: Geometry) -> Geometry:
    """The 1x1 convolution that reads the pixel under the target's output pixel."""
    return Geometry((1, 1), target.stride, (0, 0), (1, 1), target.groups, target.padding_mode)


def compose_1x1(
    first: Tensor, first_bias: Tensor | None, second: Tensor, second_bias: Tensor | None, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """One k x k convolution for a 1x1 followed by a k x k, group by group.

    K[o, i] = sum_m K2[o, m] K1[m, i] and b = b2 + sum_{m, u, v} K2[o, m, u, v] b1[m]. The bias is exact where
    the k x k convolution sees b1 beyond the border as well (pad the intermediate with b1, not with zeros).

    Args:
        first: (M, I / groups, 1, 1); second: (O, M / groups, kh, kw); biases: (M,), (O,) or None.

    Returns:
        (O, I / groups, kh, kw) and (O,), in float32 (float64 if any operand is).

    Raises:
        ValueError: if ``first`` is not 1x1, or ``second`` does not follow its channels in these groups.
    """
    middle, out = first.shape[0], second.shape[0]
    if tuple(first.shape[2:]) != (1, 1):
        raise ValueError(f"first must be a 1x1 kernel, got {tuple(first.shape)}")
    if middle % groups or out % groups or second.shape[1] != middle // groups:
        raise ValueError(
            f"second must be (O, {middle} / {groups}, kh, kw) to follow {middle} channels in {groups} "
            f"groups, got {tuple(second.shape)}"
        )
    dtype = fold_dtype(first, first_bias, second, second_bias)
    with torch.autocast(first.device.type, enabled=False):
        k1 = first.to(dtype).reshape(groups, middle // groups, -1)
        k2 = second.to(dtype).reshape(groups, out // groups, middle // groups, *second.shape[2:])
        weight = torch.einsum("gomhw,gmi->goihw", k2, k1).reshape(out, -1, *second.shape[2:])
        bias = weight.new_zeros(out) if second_bias is None else second_bias.to(dtype)
        if first_bias is not None:
            carried = torch.einsum("gomhw,gm->go", k2, first_bias.to(dtype).reshape(groups, -1))
            bias = bias + carried.reshape(out)
    return weight, bias


def scaled_kernel(branch: Branch, target: Geometry, dtype: torch.dtype) -> Tensor:
    """One branch as a target-sized kernel in ``dtype``."""
    check_kernel_size(branch.weight, branch.geometry, branch.name)
    weight = branch.weight.to(dtype)
    if branch.scale is not None:
        weight = weight * branch.scale.to(dtype).reshape(-1, 1, 1, 1)
    placement = place_geometry(branch.geometry, target, branch.name)
    return spread_and_pad(weight, placement, target.kernel_size)


def merge_kernels(
    branches: Sequence[Branch], target: Geometry, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The single kernel and bias that equal the sum of all branches.

    K = sum_b place_b(s_b W_b), bias = sum_b bias_b, summed in float32 or float64 and cast last.

    Args:
        branches: at least one, all with the same (O, I / groups).
        target: the merged convolution's geometry.
        dtype: of the result; by default that of the first branch's weight.

    Returns:
        (O, I / groups, *target.kernel_size) and (O,). Differentiable in every weight, scale and bias.

    Raises:
        ValueError: naming the branch and the condition it violates.
    """
    if not branches:
        raise ValueError("merge_kernels needs at least one branch")
    first = branches[0].weight
    for branch in branches:
        if branch.weight.shape[:2] != first.shape[:2]:
            raise ValueError(
                f"{branch.name}: (O, I / groups) is {tuple(branch.weight.shape[:2])}, other branches have "
                f"{tuple(first.shape[:2])}"
            )
        for what, vector in (("scale", branch.scale), ("bias", branch.bias)):
            if vector is not None and tuple(vector.shape) != (first.shape[0],):
                raise ValueError(
                    f"{branch.name}: {what} must have shape ({first.shape[0]},), got {tuple(vector.shape)}"
                )
    compute = fold_dtype(*(t for b in branches for t in (b.weight, b.scale, b.bias)))
    weight = reduce(operator.add, (scaled_kernel(b, target, compute) for b in branches))
    biases = [b.bias.to(compute) for b in branches if b.bias is not None]
    bias = reduce(operator.add, biases) if biases else weight.new_zeros(first.shape[0])
    dtype = dtype or first.dtype
    return weight.to(dtype), bias.to(dtype)
