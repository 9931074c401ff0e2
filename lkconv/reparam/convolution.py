"""The only door from merging to convolution: the depthwise ops for tensors, the layer classes for modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkconv import backends, reference
from lkconv.functional import depthwise_conv2d
from lkconv.modules import DepthwiseConv2d
from lkconv.ops import autocast_dtype
from lkconv.reparam.geometry import Geometry


def forward(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Depthwise convolution on the backend in use; every derivative of it as well."""
    return depthwise_conv2d(input, weight, bias, geometry.stride, geometry.padding, geometry.dilation)


def _ops(tensor: Tensor):
    """The op packets of the backend for ``tensor``, or None for plain PyTorch."""
    namespace = backends.namespace(tensor.device, tensor.dtype)
    return None if namespace is None else getattr(torch.ops, namespace)


def backward_input(grad: Tensor, weight: Tensor, input_size: tuple[int, ...], geometry: Geometry) -> Tensor:
    """dL/dinput of :func:`forward`, (N, C, H, W) = ``input_size``."""
    place = (geometry.stride, geometry.padding, geometry.dilation)
    ops = _ops(grad)
    if ops is None:
        return reference.depthwise_conv2d_backward_input(grad, weight, input_size, *place)
    return ops.depthwise_conv2d_backward_input(grad, weight, input_size, *place)


def backward_weight(grad: Tensor, input: Tensor, geometry: Geometry) -> Tensor:
    """dL/dweight of :func:`forward`, (O, 1, kh, kw)."""
    place = (geometry.stride, geometry.padding, geometry.dilation)
    ops = _ops(grad)
    if ops is None:
        return reference.depthwise_conv2d_backward_weight(grad, input, geometry.kernel_size, *place)
    return ops.depthwise_conv2d_backward_weight(grad, input, geometry.kernel_size, *place)


def is_depthwise(in_channels: int, out_channels: int, groups: int) -> bool:
    return groups == in_channels > 1 and out_channels % in_channels == 0


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Any uncropped convolution: depthwise ones run on lkconv, the others on ``F.conv2d``."""
    if is_depthwise(input.shape[1], weight.shape[0], geometry.groups):
        return forward(input, weight, bias, geometry)
    place = (geometry.stride, geometry.padding, geometry.dilation)
    return F.conv2d(input, weight, bias, *place, geometry.groups)


def autocast_input(input: Tensor) -> Tensor:
    """The input in the dtype that autocast runs convolutions in; folded kernels are cast to it afterwards."""
    dtype = autocast_dtype(input)
    if dtype is None or not input.is_floating_point() or input.dtype == torch.float64:
        return input
    return input.to(dtype)


def make_layer(
    in_channels: int,
    out_channels: int,
    geometry: Geometry,
    bias: bool,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Conv2d:
    """``lkconv.DepthwiseConv2d`` where that is what it is, else ``nn.Conv2d``; both are an ``nn.Conv2d``."""
    k, s, p, d = geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation
    if is_depthwise(in_channels, out_channels, geometry.groups):
        multiplier = out_channels // in_channels
        return DepthwiseConv2d(
            in_channels, k, s, p, d, bias, channel_multiplier=multiplier, device=device, dtype=dtype
        )
    return nn.Conv2d(in_channels, out_channels, k, s, p, d, geometry.groups, bias, device=device, dtype=dtype)
