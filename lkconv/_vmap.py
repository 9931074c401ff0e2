"""Batching rules: a vmapped dimension becomes part of the batch, or of the channels.

Depthwise convolution treats (image, channel) pairs alike, so a vmapped dimension folds into the batch
where the other factor is shared, and into the channels where each sample has kernels of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def rules(forward: Any, backward_input: Any, backward_weight: Any) -> tuple[Callable, Callable, Callable]:
    """Batching rules of the three ops, in this order, for ``torch.library.register_vmap``."""

    def vmap_forward(info, in_dims, input, weight, bias, *geometry):
        input_dim, weight_dim, bias_dim = in_dims[:3]
        if weight_dim is None:
            output = (
                unfold(
                    forward(
                        into_batch(input, input_dim),
                        weight,
                        None if bias_dim is not None else bias,
                        *geometry,
                    ),
                    info.batch_size,
                    0,
                )
                if input_dim is not None
                else forward(input, weight, None, *geometry)[None]
            )
            if bias_dim is not None:
                output = output + bias.movedim(bias_dim, 0)[:, None, :, None, None]
            return output, 0
        size = info.batch_size
        folded_bias = None if bias is None else _batched(bias, bias_dim, size, 0).flatten()
        output = forward(
            into_channels(input, input_dim, size, 1),
            into_channels(weight, weight_dim, size, 0),
            folded_bias,
            *geometry,
        )
        return unfold(output, size, 1), 1

    def vmap_backward_input(info, in_dims, grad_output, weight, input_size, *geometry):
        grad_dim, weight_dim = in_dims[:2]
        size = info.batch_size
        batch, channels, height, width = input_size
        if weight_dim is None:
            folded = backward_input(
                into_batch(grad_output, grad_dim), weight, (size * batch, channels, height, width), *geometry
            )
            return unfold(folded, size, 0), 0
        folded = backward_input(
            into_channels(grad_output, grad_dim, size, 1),
            into_channels(weight, weight_dim, size, 0),
            (batch, size * channels, height, width),
            *geometry,
        )
        return unfold(folded, size, 1), 1

    def vmap_backward_weight(info, in_dims, grad_output, input, kernel_size, *geometry):
        size = info.batch_size
        folded = backward_weight(
            into_channels(grad_output, in_dims[0], size, 1),
            into_channels(input, in_dims[1], size, 1),
            kernel_size,
            *geometry,
        )
        return unfold(folded, size, 0), 0

    return vmap_forward, vmap_backward_input, vmap_backward_weight


def _batched(tensor: Tensor, dim: int | None, size: Any, to: int) -> Tensor:
    """``tensor`` with its vmapped dimension at ``to``, repeated there if it has none."""
    if dim is not None:
        return tensor.movedim(dim, to)
    tensor = tensor.unsqueeze(to)
    return tensor.expand(*tensor.shape[:to], size, *tensor.shape[to + 1 :])


def into_batch(tensor: Tensor, dim: int) -> Tensor:
    return tensor.movedim(dim, 0).flatten(0, 1)


def into_channels(tensor: Tensor, dim: int | None, size: Any, channel_dim: int) -> Tensor:
    """Sample b's channel c becomes channel ``b * C + c``."""
    return _batched(tensor, dim, size, channel_dim).flatten(channel_dim, channel_dim + 1)


def unfold(tensor: Tensor, size: Any, dim: int) -> Tensor:
    return tensor.unflatten(dim, (size, tensor.shape[dim] // size))
