"""The public function over the op: named arguments, shapes checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lkconv.ops import forward_ad_active
from lkconv.reparam import convolution
from lkconv.reparam import op as _op  # noqa: F401  (registers lkconv::merged_depthwise_conv2d)
from lkconv.reparam.algebra import Branch, check_kernel_size, merge_kernels
from lkconv.reparam.geometry import Geometry, place_geometry


def merged_depthwise_conv2d(input: Tensor, branches: Sequence[Branch], target: Geometry) -> Tensor:
    """The sum of depthwise branches as one depthwise convolution.

    The branches' kernels are placed, scaled and summed in float32 (float64 if any is), cast to the input's
    dtype last, and convolved once. The backward pass is one backward_input and one backward_weight on the
    merged kernel, gathered into the gradient of every weight, scale and bias: exact wherever scales and
    biases do not depend on the batch (evaluation, frozen batch norm, learned scales, no normalisation).
    Twice differentiable.

    Args:
        input: (N, C, H, W), C = target.groups; float64, float32, float16 or bfloat16.
        branches: each with weight (C m, 1, kh, kw) in any floating dtype; scale and bias (C m,) or None.
        target: the merged convolution's kernel size, stride, padding and dilation.

    Returns:
        (N, C m, H', W') in the input's dtype and memory format.

    Raises:
        TypeError: ``input`` is not a tensor of one of these dtypes.
        ValueError: ``input`` is not 4-D, its channels are not the target's groups or do not divide the output
            channels, or there is no branch; else naming the branch and the condition it violates.
    """
    if not isinstance(input, Tensor) or not input.is_floating_point():
        raise TypeError(
            f"input must be a floating-point tensor, got {getattr(input, 'dtype', type(input).__name__)}"
        )
    if input.dim() != 4:
        raise ValueError(f"input must be (N, C, H, W), got shape {tuple(input.shape)}")
    if target.groups != input.shape[1]:
        raise ValueError(f"target groups {target.groups} must equal the input's {input.shape[1]} channels")
    if not branches:
        raise ValueError("branches must hold at least one branch")
    out_channels = branches[0].weight.shape[0]
    if out_channels % target.groups:
        raise ValueError(
            f"{out_channels} output channels are not a multiple of {target.groups} input channels"
        )
    padding, dilation = _check_branches(branches, target, out_channels)
    if torch._C._are_functorch_transforms_active() or forward_ad_active():
        # A registered autograd formula serves reverse mode alone; these transforms take the composition.
        weight, bias = merge_kernels(branches, target)
        input = convolution.autocast_input(input)
        return convolution.forward(input, weight.to(input.dtype), bias.to(input.dtype), target)
    scales: list[Tensor] = []
    if any(b.scale is not None for b in branches):
        scales = [b.weight.new_ones(out_channels) if b.scale is None else b.scale for b in branches]
    return torch.ops.lkconv.merged_depthwise_conv2d(
        input,
        [b.weight for b in branches],
        scales,
        [b.bias for b in branches if b.bias is not None],
        target.kernel_size,
        target.stride,
        target.padding,
        target.dilation,
        padding,
        dilation,
    )


def _check_branches(
    branches: Sequence[Branch], target: Geometry, out_channels: int
) -> tuple[list[int], list[int]]:
    """Paddings and dilations as the op's flat lists, or a ValueError naming the branch and condition."""
    padding: list[int] = []
    dilation: list[int] = []
    for branch in branches:
        check_kernel_size(branch.weight, branch.geometry, branch.name)
        if tuple(branch.weight.shape[:2]) != (out_channels, 1):
            raise ValueError(
                f"{branch.name}: weight must be ({out_channels}, 1, kh, kw), got {tuple(branch.weight.shape)}"
            )
        for what, vector in (("scale", branch.scale), ("bias", branch.bias)):
            if vector is not None and tuple(vector.shape) != (out_channels,):
                raise ValueError(
                    f"{branch.name}: {what} must be ({out_channels},), got {tuple(vector.shape)}"
                )
        place_geometry(branch.geometry, target, branch.name)
        padding += branch.geometry.padding
        dilation += branch.geometry.dilation
    return padding, dilation
