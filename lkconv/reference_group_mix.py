"""Group-Mix attention in plain PyTorch: the specification of the fused ops and their fallback.

Method: C. Ge, X. Ding, Z. Tong, L. Yuan, J. Wang, Y. Song, P. Luo, "Advancing Vision Transformers with
Group-Mix Attention", arXiv 2311.15157. Notation: C channels in five segments of d = C / 5, 8 heads of d / 2
channels, N = H * W tokens.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["group_mix_aggregate", "group_mix_attention", "segmented_depthwise_conv2d"]

POSITION_HEADS = (2, 3, 3)  # heads whose position encoding sees windows of 3, 5 and 7 tokens


def _separable(x: Tensor, depthwise: Tensor, pointwise: Tensor) -> Tensor:
    """Depthwise k x k with "same" padding, then 1 x 1, with nothing between them. x: (N, C, H, W)."""
    k = depthwise.shape[-1]
    x = F.conv2d(x, depthwise.to(x.dtype), padding=k // 2, groups=x.shape[1])
    return F.conv2d(x, pointwise.to(x.dtype).reshape(pointwise.shape[0], x.shape[1], 1, 1))


def mix_segments(
    qkv: Tensor, size: tuple[int, int], depthwise: Sequence[Tensor], pointwise: Sequence[Tensor]
) -> list[Tensor]:
    """Segments 0 to 3 of qkv (B, N, 15 * d) before their BatchNorms, (3 * B, d, H, W) each."""
    batch, _, channels = qkv.shape
    d = channels // 15
    segments = qkv.reshape(batch, *size, 3, 5, d).permute(4, 3, 0, 5, 1, 2)  # s, part, B, d, H, W
    images = [segments[s].reshape(3 * batch, d, *size) for s in range(4)]
    weights = zip(images[1:], depthwise, pointwise, strict=False)
    return [images[0], *(_separable(u, dw, pw) for u, dw, pw in weights)]


def heads_of(mixed: Sequence[Tensor], num_heads: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Segments 0 to 3, (3 * B, d, H, W) each -> q, k and v (B, heads, N, 4 * d / heads)."""
    batch, d, height, width = mixed[0].shape
    heads = torch.cat(list(mixed), 1).reshape(3, batch // 3, num_heads, 4 * d // num_heads, height * width)
    q, k, v = heads.transpose(-1, -2).unbind()
    return q, k, v


def local_branch(
    qkv: Tensor,
    size: tuple[int, int],
    depthwise: Tensor,
    pointwise: Tensor,
    layer_norm_weight: Tensor,
    layer_norm_bias: Tensor,
    layer_norm_eps: float,
) -> Tensor:
    """Segment 4 of qkv (B, N, 15 * d), past the attention: (B, N, d)."""
    batch, _, channels = qkv.shape
    d = channels // 15
    last = qkv.reshape(batch, *size, 3, 5, d)[..., 4, :].permute(0, 3, 4, 1, 2)  # B, part, d, H, W
    local = _separable(last.reshape(batch, 3 * d, *size), depthwise, pointwise).flatten(2).transpose(1, 2)
    weight, bias = layer_norm_weight.to(local.dtype), layer_norm_bias.to(local.dtype)
    return F.hardswish(F.layer_norm(local, (d,), weight, bias, layer_norm_eps))


def group_mix_aggregate(
    qkv: Tensor,
    size: tuple[int, int],
    depthwise_weights: Sequence[Tensor],
    pointwise_weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    running_means: Sequence[Tensor] | None,
    running_vars: Sequence[Tensor] | None,
    layer_norm_weight: Tensor,
    layer_norm_bias: Tensor,
    *,
    num_heads: int = 8,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    layer_norm_eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`lkconv.group_mix_aggregate`, one PyTorch operator after another."""
    mixed = []
    for s, u in enumerate(mix_segments(qkv, size, depthwise_weights, pointwise_weights)):
        mean = None if running_means is None else running_means[s]
        var = None if running_vars is None else running_vars[s]
        u = F.batch_norm(u, mean, var, norm_weights[s], norm_biases[s], training, momentum, eps)
        mixed.append(F.hardswish(u))
    local = local_branch(
        qkv, size, depthwise_weights[3], pointwise_weights[3], layer_norm_weight, layer_norm_bias,
        layer_norm_eps,
    )  # fmt: skip
    return *heads_of(mixed, num_heads), local


def group_mix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    local: Tensor,
    size: tuple[int, int],
    position_weights: Sequence[Tensor],
    position_biases: Sequence[Tensor],
    scale: float,
    attn_drop: float = 0.0,
) -> Tensor:
    """Attention on the aggregated q, k, v, followed by the non-attention branch.

    Args:
        q, k, v: (B, 8, N, d / 2).
        local: (B, N, d).
        size: (H, W) of the token grid, H * W = N.
        position_weights: depthwise kernels of heads 0-1 (d, 1, 3, 3), 2-4 (..., 5, 5), 5-7 (..., 7, 7).
        position_biases: their biases.
        scale: factor of the attention term.
        attn_drop: probability with which an entry of softmax(k) is dropped.

    Returns:
        (B, N, 5 * d): scale * q (softmax(k)^T v) + q * position encoding of v, then ``local``.
    """
    batch, heads, tokens, channels = q.shape
    weights = F.dropout(k.softmax(dim=2), attn_drop)
    attended = scale * (q @ (weights.transpose(-1, -2) @ v))
    image = v.transpose(-1, -2).reshape(batch, heads * channels, *size)
    parts = image.split([h * channels for h in POSITION_HEADS], dim=1)
    encoded = torch.cat(
        [
            F.conv2d(x, w.to(x.dtype), b.to(x.dtype), padding=w.shape[-1] // 2, groups=x.shape[1])
            for x, w, b in zip(parts, position_weights, position_biases, strict=True)
        ],
        dim=1,
    )
    encoded = encoded.reshape(batch, heads, channels, tokens).transpose(-1, -2)
    out = (attended + q * encoded).transpose(1, 2).reshape(batch, tokens, heads * channels)
    return torch.cat([out, local], dim=-1)


def segmented_depthwise_conv2d(
    input: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None] | None = None,
    splits: Sequence[int] | None = None,
) -> Tensor:
    """:func:`lkconv.segmented_depthwise_conv2d`, one convolution and one copy per segment."""
    given = [None] * len(weights) if biases is None else list(biases)
    if splits is None:
        known = [0 if w is None else w.shape[0] for w in weights]
        splits = [
            input.shape[1] - sum(known) if w is None else n for w, n in zip(weights, known, strict=True)
        ]

    def convolved(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.conv2d(x, w, b, padding=(w.shape[-2] // 2, w.shape[-1] // 2), groups=x.shape[1])

    out = [
        x if w is None or n == 0 else convolved(x, w, b)
        for x, w, b, n in zip(input.split(list(splits), dim=1), weights, given, splits, strict=True)
    ]
    return torch.cat(out, dim=1)
