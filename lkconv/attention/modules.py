"""Modules of GroupMixFormer with the published parameter names (arXiv 2311.15157)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from .. import reference_group_mix as reference
from ..modules import DepthwiseConv2d
from . import aggregate as fused
from .checks import check_dim, check_tokens
from .parameters import AggregateParameters


def _tensors(modules: Iterable[nn.Module], name: str) -> list[Tensor]:
    """The parameter or buffer of that name of each module."""
    return [getattr(m, name) for m in modules]


class SeparableConv2d(nn.Module):
    """Depthwise then pointwise convolution without biases; nothing between them."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(
            in_channels, in_channels, kernel_size, stride, kernel_size // 2, groups=in_channels, bias=False
        )
        self.pointwise_conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise_conv(self.conv1(x))


class LocalBranch(nn.Module):
    """The non-attention branch: q, k and v of the last segment to d channels, LayerNorm, hardswish."""

    def __init__(self, segment: int) -> None:
        super().__init__()
        self.conv = SeparableConv2d(3 * segment, segment, 3)
        self.norm = nn.LayerNorm(segment)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3 * d, H, W) -> (B, N, d)."""
        return F.hardswish(self.norm(self.conv(x).flatten(2).transpose(1, 2)))


class GroupMixAggregator(nn.Module):
    """:func:`lkconv.group_mix_aggregate` with the published parameters.

    Args:
        dim: C, a multiple of 5 with 4 C / 5 divisible by 8.
        num_heads: 8.

    The BatchNorms may be ``nn.SyncBatchNorm`` (``nn.SyncBatchNorm.convert_sync_batchnorm``): their statistics
    are then exchanged with one collective for all four. Other norms in their place, or BatchNorms of which
    some are frozen, run as plain PyTorch.

    Shapes: qkv (B, N, 3 * C) and size (H, W) with H * W = N -> q, k, v (B, 8, N, d / 2) and local (B, N, d),
    d = C / 5; float64, float32, float16 or bfloat16.

    Raises:
        ValueError: dim or num_heads is another, or on a call a shape does not fit.
        TypeError: on a call, qkv is not a floating-point tensor.
    """

    def __init__(self, dim: int, num_heads: int = 8) -> None:
        super().__init__()
        check_dim(dim, num_heads)
        self.dim, self.num_heads = dim, num_heads
        d = dim // 5
        self.norm0 = nn.BatchNorm2d(d)
        self.agg1, self.norm1 = SeparableConv2d(d, d, 3), nn.BatchNorm2d(d)
        self.agg2, self.norm2 = SeparableConv2d(d, d, 5), nn.BatchNorm2d(d)
        self.agg3, self.norm3 = SeparableConv2d(d, d, 7), nn.BatchNorm2d(d)
        self.agg0 = LocalBranch(d)

    def norms(self) -> list[nn.Module]:
        return [self.norm0, self.norm1, self.norm2, self.norm3]

    def _fusible(self) -> bool:
        """Whether the four norms are BatchNorms that agree on everything but their parameters."""
        norms = self.norms()
        if not all(isinstance(n, nn.BatchNorm2d | nn.SyncBatchNorm) and n.affine for n in norms):
            return False
        settings = {(type(n), n.training, n.eps, n.momentum, n.running_mean is None) for n in norms}
        return len(settings) == 1

    def _group(self) -> object | None:
        """The processes that share statistics, if any."""
        norm = self.norm0
        if isinstance(norm, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized():
            group = norm.process_group or dist.group.WORLD
            return group if dist.get_world_size(group) > 1 else None
        return None

    def _momentum(self) -> float:
        """Counts the batch, as BatchNorm does, and returns the weight it gets in the running statistics."""
        for norm in self.norms():
            norm.get_buffer("num_batches_tracked").add_(1)
        momentum = self.norm0.momentum
        return 1.0 / float(self.norm0.get_buffer("num_batches_tracked")) if momentum is None else momentum

    def tokens(self, namespace: str, qkv: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """qkv (B, N, 3 * C) -> mixed (3, B, N, 4 * d), local (B, N, d), through a namespace's fused op."""
        norms = self.norms()
        training = self.norm0.training or self.norm0.running_mean is None
        track = self.norm0.running_mean is not None
        momentum = self._momentum() if training and track else 0.0
        separable = [self.agg1, self.agg2, self.agg3, self.agg0.conv]
        parameters = AggregateParameters(
            _tensors([s.conv1 for s in separable], "weight"),
            _tensors([s.pointwise_conv for s in separable], "weight"),
            _tensors(norms, "weight"),
            _tensors(norms, "bias"),
            self.agg0.norm.weight,
            self.agg0.norm.bias,
        )
        return fused.aggregate_tokens(
            namespace,
            fused.autocast(qkv),
            size,
            parameters,
            _tensors(norms, "running_mean") if track else None,
            _tensors(norms, "running_var") if track else None,
            training,
            momentum,
            self.norm0.eps,
            self.agg0.norm.eps,
            self._group() if training else None,
        )

    def composed(self, qkv: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same from this module's own submodules, one after another."""
        batch, tokens, channels = qkv.shape
        d, (height, width) = channels // 15, size
        x = qkv.reshape(batch, height, width, 3, 5, d).permute(4, 3, 0, 5, 1, 2)
        convs: Sequence[Callable[[Tensor], Tensor]] = (nn.Identity(), self.agg1, self.agg2, self.agg3)
        mixed = [
            F.hardswish(norm(conv(x[s].reshape(3 * batch, d, height, width))))
            for s, (conv, norm) in enumerate(zip(convs, self.norms(), strict=True))
        ]
        heads = (
            torch.cat(mixed, 1)
            .reshape(3, batch, self.num_heads, 4 * d // self.num_heads, tokens)
            .transpose(-1, -2)
        )
        local = self.agg0(x[4].transpose(0, 1).reshape(batch, 3 * d, height, width))
        q, k, v = heads.unbind()
        return q, k, v, local

    def namespace(self, qkv: Tensor) -> str | None:
        """Whose fused kernels this call takes; None where it runs as plain PyTorch."""
        return fused.namespace(qkv) if self._fusible() else None

    @backends.retried
    def forward(self, qkv: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """qkv (B, N, 3 * C) of an H x W grid -> q, k, v (B, 8, N, d / 2) and local (B, N, d)."""
        check_tokens(qkv, size, "qkv")
        if qkv.shape[2] != 3 * self.dim:
            raise ValueError(f"qkv must have 3 * dim = {3 * self.dim} channels, got {qkv.shape[2]}")
        namespace = self.namespace(qkv)
        if namespace is None:
            return self.composed(qkv, size)
        mixed, local = self.tokens(namespace, qkv, size)
        return *fused.split_heads(mixed, self.num_heads), local


class PositionEncoding(nn.Module):
    """Depthwise convolutions of v with windows 3, 5 and 7 for heads 0-1, 2-4 and 5-7."""

    def __init__(self, head_channels: int) -> None:
        super().__init__()
        self.conv_list = nn.ModuleList(
            nn.Conv2d(h * head_channels, h * head_channels, k, padding=k // 2, groups=h * head_channels)
            for h, k in zip(reference.POSITION_HEADS, (3, 5, 7), strict=True)
        )

    def parameter_lists(self) -> tuple[list[Tensor], list[Tensor]]:
        return _tensors(self.conv_list, "weight"), _tensors(self.conv_list, "bias")


class GroupMixAttention(nn.Module):
    """Group-Mix attention, a drop-in for the published module: same signature, same parameter names.

    Args:
        dim: C, a multiple of 5 with 4 C / 5 divisible by 8.
        num_heads: 8.
        qkv_bias: whether the qkv projection has a bias.
        qk_scale: factor of the attention term; (dim / 8) ** -0.5 by default.
        attn_drop: dropout of softmax(k). The published code declares it without applying it; with a positive
            value training runs the attention core as plain PyTorch.
        proj_drop: dropout of the output.

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

    def _check(self, x: Tensor, size: tuple[int, int]) -> None:
        check_tokens(x, size, "x")
        if x.shape[2] != self.dim:
            raise ValueError(f"x must have dim = {self.dim} channels, got {x.shape[2]}")

    @backends.retried
    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x (B, N, C), tokens of an H x W grid -> (B, N, C)."""
        self._check(x, size)
        qkv = self.qkv(x)
        weights, biases = self.crpe.parameter_lists()
        drop = self.attn_drop.p if self.attn_drop.training else 0.0
        namespace = self.aggregator.namespace(qkv) if drop == 0.0 else None
        if namespace is not None:
            mixed, local = self.aggregator.tokens(namespace, qkv, size)
            core = getattr(torch.ops, namespace).group_mix_attention
            out, _, _ = core(mixed, local, size[0], size[1], weights, biases, self.scale)
        else:
            q, k, v, local = self.aggregator(qkv, size)
            out = reference.group_mix_attention(q, k, v, local, size, weights, biases, self.scale, drop)
        return self.proj_drop(self.proj(out))

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
        self._check(x, size)
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
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


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
