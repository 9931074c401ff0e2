"""``lkconv::scaled_channel_sum``: shift + sum_b scales_b inputs_b, per channel, in one pass over all inputs.

The sum of normalised branch outputs, sum_b s_b y_b + shift, and the gradient through batch statistics,
a dy + b y + c, are such sums. As a chain of ``addcmul`` each further input reads and writes the running sum
again: 3 B - 1 passes over memory for B inputs instead of B + 1, and in half precision a rounding for each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lkconv import backends, reference_merge
from lkconv._fake import memory_format
from lkconv.reference_merge import fold_dtype

NAME = "lkconv::scaled_channel_sum"


def scaled_channel_sum(inputs: Sequence[Tensor], scales: Tensor, shift: Tensor) -> Tensor:
    """``shift[c] + sum_b scales[b, c] inputs[b][:, c]``, by one kernel on CPUs, else in plain PyTorch.

    Args:
        inputs: at least one (N, C, H, W), all of one shape and dtype.
        scales: (B, C) and shift: (C,), in float32 (float64 for float64 inputs).

    Returns:
        (N, C, H, W) in the inputs' dtype and the first one's memory format.
    """
    first = inputs[0]
    cpu = first.device.type == "cpu" and backends.namespace(first.device, first.dtype) == "lkconv"
    if not cpu or scales.dtype != fold_dtype(first):
        return reference_merge.scaled_channel_sum(inputs, scales, shift)
    return torch.ops.lkconv.scaled_channel_sum(list(inputs), scales, shift)


def _fake(inputs, scales, shift):
    return torch.empty_like(inputs[0], memory_format=memory_format(inputs[0]))


def _setup_context(ctx, inputs, output) -> None:
    tensors, scales, _ = inputs
    ctx.save_for_backward(scales, *tensors)


def _backward(ctx, grad: Tensor):
    """In differentiable operations of PyTorch, so it is also its own double backward."""
    scales, *inputs = ctx.saved_tensors
    wide = grad.to(scales.dtype)
    grads = [(s.reshape(1, -1, 1, 1) * wide).to(t.dtype) for s, t in zip(scales, inputs, strict=True)]
    dots = torch.stack([(t * wide).sum((0, 2, 3)) for t in inputs])
    return grads, dots, wide.sum((0, 2, 3))


torch.library.register_fake(NAME, _fake)
torch.library.register_autograd(NAME, _backward, setup_context=_setup_context)
