"""GroupMixFormer M, T, S, B and L (arXiv 2311.15157) with the published parameter names.

A published checkpoint, which holds its parameters under ``"model"``, loads strictly:
``load_checkpoint(group_mix_former("T"), torch.load(path))``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from lkconv.attention import GroupMixBlock
from lkconv.attention.aggregator import SeparableConv2d


@dataclass(frozen=True)
class Config:
    """Channels, blocks and MLP ratio of the four stages, and stochastic depth of the last block."""

    channels: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    mlp_ratios: tuple[float, float, float, float] = (4, 4, 4, 4)
    drop_path: float = 0.2


CONFIGS = {
    "M": Config((40, 80, 160, 160), (3, 3, 12, 4)),
    "T": Config((80, 160, 200, 240), (4, 4, 12, 4)),
    "S": Config((80, 160, 320, 320), (2, 4, 12, 4)),
    "B": Config((200, 240, 320, 480), (8, 8, 12, 8), (2, 2, 4, 4)),
    # The published 70.3 M parameters and the published sizes of L disagree; these are the sizes.
    "L": Config((240, 320, 360, 480), (8, 10, 30, 10), (4, 4, 2, 2)),
}


class ConvStem(nn.Module):
    """Two 3 x 3 convolutions of stride 2, each with BatchNorm and hardswish."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.proj1 = nn.Conv2d(in_channels, channels // 2, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(channels // 2)
        self.proj2 = nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norm1(self.proj1(x)))
        return F.hardswish(self.norm2(self.proj2(x)))


class PatchEmbed(nn.Module):
    """What stands before a stage: separable 3 x 3, BatchNorm, hardswish."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.proj = SeparableConv2d(in_channels, channels, 3, stride)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.hardswish(self.norm(self.proj(x)))


class Stage(nn.Module):
    """Blocks of one resolution; ``rates`` are those of stochastic depth, one a block."""

    def __init__(
        self, channels: int, mlp_ratio: float, rates: list[float], drop: float = 0.0, attn_drop: float = 0.0
    ) -> None:
        super().__init__()
        make = partial(
            GroupMixBlock, channels, 8, mlp_ratio, qkv_bias=True, drop=drop, attn_drop=attn_drop,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )  # fmt: skip
        self.gma_stage = nn.ModuleList(make(drop_path_rate=r) for r in rates)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); the size may be odd."""
        size = (x.shape[2], x.shape[3])
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.gma_stage:
            tokens = block(tokens, size)
        return tokens.transpose(1, 2).unflatten(2, size)


class GroupMixFormer(nn.Module):
    """The classifier: stem, four stages, BatchNorm, mean over tokens, linear. Any image size is taken.

    ``drop_rate``: dropout after the blocks' projections and inside their MLPs. ``attn_drop_rate``: dropout of
    softmax(k), which the published code takes and does not apply.
    """

    def __init__(
        self,
        config: Config,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        c = config.channels
        self.conv_stem = ConvStem(in_channels, c[0])
        self.patch_embed_layers = nn.ModuleList(
            PatchEmbed(c[max(i - 1, 0)], c[i], 2 if i else 1) for i in range(4)
        )
        blocks = sum(config.depths)
        rates = [config.drop_path * i / max(blocks - 1, 1) for i in range(blocks)]
        first = [sum(config.depths[:i]) for i in range(5)]
        self.groupmixformer_backbone = nn.ModuleList(
            Stage(c[i], config.mlp_ratios[i], rates[first[i] : first[i + 1]], drop_rate, attn_drop_rate)
            for i in range(4)
        )
        self.norm4 = nn.BatchNorm2d(c[3])
        self.head = nn.Linear(c[3], num_classes)
        self.apply(_initialise)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The four stages' maps, (B, C_i, H_i, W_i), for dense prediction."""
        x = self.conv_stem(x)
        maps = []
        for embed, stage in zip(self.patch_embed_layers, self.groupmixformer_backbone, strict=True):
            x = stage(embed(x))
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, num_classes)."""
        return self.head(self.norm4(self.forward_features(x)[-1]).mean(dim=(2, 3)))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def group_mix_former(size: str, num_classes: int = 1000, **options: float) -> GroupMixFormer:
    """The model of size "M", "T", "S", "B" or "L"; options are those of :class:`GroupMixFormer`."""
    if size not in CONFIGS:
        raise ValueError(f"size must be one of {', '.join(CONFIGS)}, got {size!r}")
    return GroupMixFormer(CONFIGS[size], num_classes, **options)


def load_checkpoint(model: GroupMixFormer, checkpoint: dict) -> None:
    """Loads a published checkpoint, strictly."""
    model.load_state_dict(checkpoint.get("model", checkpoint), strict=True)
