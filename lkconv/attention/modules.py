"""Modules of GroupMixFormer with the published parameter names (arXiv 2311.15157)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import backends
from .. import reference_group_mix as reference
from .._hooks import is_plain
from ..modules import DepthwiseConv2d
from .aggregator import GroupMixAggregator, parameters_of
from .checks import check_dim, check_tokens
from .derivatives import call_op
from .heads import split_heads
from .linear import linear
from .plain import is_plain_depthwise

POSITION_KERNELS = (3, 5, 7)


class PositionEncoding(nn.Module):
    """Depthwise convolutions of v with windows 3, 5 and 7 for heads 0-1, 2-4 and 5-7, times q."""

    def __init__(self, head_channels: int) -> None:
        super().__init__()
        self.channels = [heads * head_channels for heads in reference.POSITION_HEADS]
        self.conv_list = nn.ModuleList(
            nn.Conv2d(c, c, k, padding=k // 2, groups=c)
            for c, k in zip(self.channels, POSITION_KERNELS, strict=True)
        )

    def parameter_lists(self) -> tuple[list[Tensor], list[Tensor]]:
        return parameters_of(self.conv_list, "weight"), parameters_of(self.conv_list, "bias")

    def is_plain(self) -> bool:
        """Whether calling this module and its convolutions is the fused op's formula and nothing else."""
        if not (is_plain(self, PositionEncoding) and len(self.conv_list) == len(POSITION_KERNELS)):
            return False
        wanted = zip(self.conv_list, self.channels, POSITION_KERNELS, strict=True)
        return all(is_plain_depthwise(conv, c, k, True) for conv, c, k in wanted)

    def forward(self, q: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        """q and v (B, 8, N, d / 2) -> q times the encoding of v, of the same shape."""
        batch, heads, tokens, channels = v.shape
        image = v.transpose(-1, -2).reshape(batch, heads * channels, *size)
        parts = zip(self.conv_list, image.split(self.channels, dim=1), strict=True)
        encoded = torch.cat([conv(x) for conv, x in parts], dim=1)
        return q * encoded.reshape(batch, heads, channels, tokens).transpose(-1, -2)


class GroupMixAttention(nn.Module):
    """Group-Mix attention, a drop-in for the published module: same signature, same parameter names.

    Args:
        dim: C, a multiple of 5 with 4 C / 5 divisible by 8.
        num_heads: 8.
        qkv_bias: whether the qkv projection has a bias.
        qk_scale: factor of the attention term; (dim / 8) ** -0.5 by default.
        attn_drop: dropout of softmax(k). The published code declares it without applying it; with a positive
            value training runs the attention core from its submodules.
        proj_drop: dropout of the output.

    Hooks on submodules are honoured and other modules may stand in their place, as
    :class:`GroupMixAggregator` says; whatever the fused op cannot stand for is then called.

    Shapes: x (B, N, C) and size (H, W) with H * W = N -> (B, N, C); float64, float32, float16 or bfloat16.

    Raises:
        ValueError: dim or num_heads is another, or on a call a shape does not fit.
        TypeError: on a call, x is not a floating-point tensor.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_dim(dim, num_heads)
        self.dim, self.num_heads = dim, num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.aggregator = GroupMixAggregator(dim, num_heads)
        self.crpe = PositionEncoding(dim // 5 * 4 // num_heads)

    def check(self, x: Tensor, size: tuple[int, int]) -> None:
        """Raises what is wrong with the arguments of a call."""
        check_tokens(x, size, "x")
        if x.shape[2] != self.dim:
            raise ValueError(f"x must have dim = {self.dim} channels, got {x.shape[2]}")

    def _drops(self) -> bool:
        """Whether ``attn_drop`` does anything, so that softmax(k) has to exist."""
        drop = self.attn_drop
        return not is_plain(drop, nn.Identity) and not (
            is_plain(drop, nn.Dropout) and (drop.p == 0.0 or not drop.training)
        )

    def namespace(self, qkv: Tensor) -> str | None:
        """Whose fused kernels this call takes; None where submodules run one after another."""
        fits = is_plain(self.aggregator, GroupMixAggregator) and self.crpe.is_plain() and not self._drops()
        return self.aggregator.namespace(qkv) if fits else None

    def composed(self, q: Tensor, k: Tensor, v: Tensor, local: Tensor, size: tuple[int, int]) -> Tensor:
        """The attention core from this module's own submodules: (B, N, C), ``local`` in the last channels."""
        weights = self.attn_drop(k.softmax(dim=2))
        out = self.scale * (q @ (weights.transpose(-1, -2) @ v)) + self.crpe(q, v, size)
        return torch.cat([out.transpose(1, 2).flatten(2), local], dim=-1)

    def _core(self, namespace: str, mixed: Tensor, local: Tensor, size: tuple[int, int]) -> Tensor:
        """The attention core through a namespace's op: mixed (3, B, N, 4 * d) and local -> (B, N, C)."""
        if mixed.numel() == 0:  # a process without images among others that share statistics
            return self.composed(*split_heads(mixed), local, size)
        core = getattr(torch.ops, namespace).group_mix_attention
        return call_op(core, mixed, local, size[0], size[1], *self.crpe.parameter_lists(), self.scale)[0]

    @backends.retried
    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x (B, N, C), tokens of an H x W grid -> (B, N, C)."""
        self.check(x, size)
        qkv = linear(self.qkv, x)
        namespace = self.namespace(qkv)
        if namespace is not None:
            mixed, local, statistics = self.aggregator.tokens(namespace, qkv, size)
            out = self._core(namespace, mixed, local, size)
            self.aggregator.track(statistics)
        else:
            q, k, v, local = self.aggregator(qkv, size)
            out = self.composed(q, k, v, local, size)
        return self.proj_drop(linear(self.proj, out))

    @torch.no_grad()
    def attention_maps(self, x: Tensor, size: tuple[int, int], queries: Sequence[int]) -> Tensor:
        """What the given query tokens attend to, for pictures.

        The attention term of token i is ``sum_j map[i, j] v[j]`` with map = scale * q softmax(k)^T, which is
        never formed in the forward pass; entries may be negative and rows need not sum to one.

        Args:
            x: (B, N, C).
            size: (H, W) of the token grid.
            queries: token indices in [0, N).

        Returns:
            (B, 8, len(queries), H, W).

        Raises:
            ValueError: a shape does not fit, or a query is not one of the tokens.
            TypeError: x is not a floating-point tensor.
        """
        self.check(x, size)
        if any(not 0 <= i < x.shape[1] for i in queries):
            raise ValueError(f"queries must lie in [0, {x.shape[1]}), got {list(queries)}")
        training = [m.training for m in self.aggregator.modules()]
        try:
            self.aggregator.eval()
            q, k, _, _ = self.aggregator(self.qkv(x), size)
        finally:
            for m, mode in zip(self.aggregator.modules(), training, strict=True):
                m.training = mode
        maps = self.scale * (q[:, :, list(queries)] @ k.softmax(dim=2).transpose(-1, -2))
        return maps.unflatten(-1, size)


class PositionConv(nn.Module):
    """x + depthwise 3 x 3 of x, on tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = DepthwiseConv2d(dim, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        image = x.transpose(1, 2).unflatten(2, size)
        return (self.proj(image) + image).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    """Linear, activation, linear, with dropout after either."""

    def __init__(self, dim: int, hidden: int, act_layer: Callable[[], nn.Module], drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(linear(self.fc2, self.drop(self.act(linear(self.fc1, x)))))


class DropPath(nn.Module):
    """Stochastic depth: drops the branch of a sample, scaling the others (Huang et al. 2016)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1.0 - self.rate)
        return x * keep / (1.0 - self.rate)


class GroupMixBlock(nn.Module):
    """x + DW3x3(x); x + Attention(LN(x)); x + MLP(LN(x)): one block of GroupMixFormer.

    Args:
        dim, num_heads, qkv_bias, qk_scale, attn_drop: as :class:`GroupMixAttention`.
        mlp_ratio: hidden width of the MLP over dim.
        drop: dropout after the attention's projection and inside the MLP.
        drop_path_rate: stochastic depth.
        act_layer, norm_layer: constructors; the published models use LayerNorm with eps 1e-6.

    Shapes: x (B, N, C) and size (H, W) with H * W = N -> (B, N, C); float64, float32, float16 or bfloat16.

    Raises:
        ValueError: dim or num_heads is another.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.cpe = PositionConv(dim)
        self.norm1 = norm_layer(dim)
        self.att = GroupMixAttention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer, drop)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x (B, N, C), tokens of an H x W grid -> (B, N, C)."""
        x = self.cpe(x, size)
        x = x + self.drop_path(self.att(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    @torch.no_grad()
    def attention_maps(self, x: Tensor, size: tuple[int, int], queries: Sequence[int]) -> Tensor:
        """:meth:`GroupMixAttention.attention_maps` of what this block's attention sees.

        Args:
            x: (B, N, C), what the block is called with.
            size: (H, W) of the token grid.
            queries: token indices in [0, N).

        Returns:
            (B, 8, len(queries), H, W).

        Raises:
            ValueError: a shape does not fit, or a query is not one of the tokens.
            TypeError: x is not a floating-point tensor.
        """
        self.att.check(x, size)
        return self.att.attention_maps(self.norm1(self.cpe(x, size)), size, queries)
