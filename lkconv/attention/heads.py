"""q, k and v as heads: views of what the kernels write, the heads of a token next to each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import NUM_HEADS
from .derivatives import apply, eager_form


def head_views(mixed: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(3, B, N, 4 * d) as q, k and v, each (B, heads, N, 4 * d / heads)."""
    parts, batch, tokens, channels = mixed.shape
    q, k, v = mixed.view(parts, batch, tokens, num_heads, channels // num_heads).transpose(2, 3).unbind()
    return q, k, v


def token_rows(heads: Tensor) -> Tensor:
    """(B, heads, N, c) as (B, N, heads * c): a view where a token's heads are next to each other."""
    return heads.transpose(1, 2).flatten(2)


class _SplitHeads(torch.autograd.Function):
    """Views of q, k and v, whose gradients are gathered in one pass (unbind's would be permuted twice)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(mixed: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        return head_views(mixed, num_heads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.stack([token_rows(g) for g in grads]), None


_SplitHeadsEager = eager_form(_SplitHeads)


def split_heads(mixed: Tensor, num_heads: int = NUM_HEADS) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as (B, heads, N, 4 * d / heads): views of (3, B, N, 4 * d)."""
    if not torch.is_grad_enabled():
        return head_views(mixed, num_heads)
    return apply(_SplitHeads, _SplitHeadsEager, mixed, num_heads)
