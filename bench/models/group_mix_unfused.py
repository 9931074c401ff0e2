"""Group-Mix attention as a chain of PyTorch operators: what users run today, and the peer of the benchmark.

Written against the paper alone, sharing no code with the package: q, k and v are folded into the batch once,
tokens are viewed as channels-last images, and every step is a module.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _separable(c_in: int, c_out: int, k: int) -> nn.Sequential:
    depthwise = nn.Conv2d(c_in, c_in, k, padding=k // 2, groups=c_in, bias=False)
    return nn.Sequential(depthwise, nn.Conv2d(c_in, c_out, 1, bias=False))


class UnfusedAggregation(nn.Module):
    """(B, N, 3C) -> q, k, v (3, B, 8, N, d / 2) and the non-attention branch (B, N, d)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.d = d = dim // 5
        self.mixers = nn.ModuleList([nn.Identity(), *(_separable(d, d, k) for k in (3, 5, 7))])
        self.norms = nn.ModuleList(nn.BatchNorm2d(d) for _ in range(4))
        self.local = _separable(3 * d, d, 3)
        self.local_norm = nn.LayerNorm(d)

    def forward(self, qkv: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        b, n, channels = qkv.shape
        folded = qkv.view(b, n, 3, channels // 3).permute(2, 0, 1, 3).reshape(3 * b, n, channels // 3)
        images = folded.transpose(1, 2).view(3 * b, channels // 3, *size).split(self.d, dim=1)
        proxies = [F.hardswish(self.norms[s](self.mixers[s](images[s]))) for s in range(4)]
        heads = torch.cat(proxies, dim=1).reshape(3, b, 8, self.d // 2, n).transpose(3, 4)
        last = images[4].reshape(3, b, self.d, *size).transpose(0, 1).reshape(b, 3 * self.d, *size)
        local = self.local(last).reshape(b, self.d, n).transpose(1, 2)
        return heads, F.hardswish(self.local_norm(local))


class UnfusedAttention(nn.Module):
    """Group-Mix attention, (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        head = dim // 10
        self.scale = (dim // 8) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.aggregation = UnfusedAggregation(dim)
        self.position = nn.ModuleList(
            nn.Conv2d(h * head, h * head, k, padding=k // 2, groups=h * head)
            for h, k in ((2, 3), (3, 5), (3, 7))
        )
        self.proj = nn.Linear(dim, dim)

    def core(self, heads: Tensor, local: Tensor, size: tuple[int, int]) -> Tensor:
        q, k, v = heads
        b, h, n, c = q.shape
        attended = torch.einsum("bhnk,bhkv->bhnv", q, torch.einsum("bhnk,bhnv->bhkv", k.softmax(dim=2), v))
        images = (
            v.transpose(2, 3).reshape(b, h * c, *size).split([m.in_channels for m in self.position], dim=1)
        )
        encoded = torch.cat([conv(x) for conv, x in zip(self.position, images, strict=True)], dim=1)
        encoded = q * encoded.reshape(b, h, c, n).transpose(2, 3)
        out = (self.scale * attended + encoded).transpose(1, 2).reshape(b, n, h * c)
        return torch.cat([out, local], dim=-1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        heads, local = self.aggregation(self.qkv(x), size)
        return self.proj(self.core(heads, local, size))

    @torch.no_grad()
    def copy_from(self, fused: nn.Module) -> UnfusedAttention:
        """Takes over the parameters and statistics of a :class:`lkconv.GroupMixAttention`."""
        theirs, mine = fused.aggregator, self.aggregation
        pairs = [(self.qkv, fused.qkv), (self.proj, fused.proj), (mine.local_norm, theirs.agg0.norm)]
        pairs += [(mine.norms[s], getattr(theirs, f"norm{s}")) for s in range(4)]
        separable = [theirs.agg1, theirs.agg2, theirs.agg3, theirs.agg0.conv]
        for mixer, source in zip([*mine.mixers[1:], mine.local], separable, strict=True):
            pairs += [(mixer[0], source.conv1), (mixer[1], source.pointwise_conv)]
        pairs += list(zip(self.position, fused.crpe.conv_list, strict=True))
        for to, source in pairs:
            to.load_state_dict(source.state_dict(), strict=True)
        return self.train(fused.training)
