"""UniRepLKNet (https://arxiv.org/abs/2311.15599): dilated small kernels beside a large depthwise kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lkconv.reparam.algebra import fold_batch_norm, module_affine
from lkconv.reparam.block import BranchSumBlock, batch_norm, require
from lkconv.reparam.branches import ConvBN
from lkconv.reparam.convolution import make_layer
from lkconv.reparam.geometry import Geometry

# Per large kernel K, the (kernel size, dilation) of every further branch: the official defaults.
DILATED_BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}


class DilatedReparamBlock(BranchSumBlock):
    """``bn(conv K x K) + sum of bn(conv k x k, dilation r)``, depthwise, merged into one K x K convolution.

    Training form: ``lk_origin.weight``, ``origin_bn``, ``dil_conv_k{k}_{r}``, ``dil_bn_k{k}_{r}``; merged
    form: ``lk_origin.{weight,bias}``.

    Args:
        channels: C. kernel_size: K, odd.
        deploy: build the merged form. use_sync_bn: SyncBatchNorm instead of BatchNorm2d.
        attempt_use_lk_impl: accepted for the official signature; the fast layer is always used.
        branches: (k, r) of every dilated branch; by default ``DILATED_BRANCHES[kernel_size]``.

    Shapes: (N, C, H, W) to the same.

    Raises:
        ValueError: for a kernel size without default branches or an even one, a branch that does not fit
            into it, or one given twice.
    """

    merged_name = "lk_origin"

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        deploy: bool = False,
        use_sync_bn: bool = False,
        attempt_use_lk_impl: bool = True,
        branches: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        if branches is None:
            require(
                kernel_size in DILATED_BRANCHES,
                f"kernel_size must be one of {sorted(DILATED_BRANCHES)} without branches, got {kernel_size}",
            )
            branches = DILATED_BRANCHES[kernel_size]
        branches = tuple((int(k), int(r)) for k, r in branches)
        require(
            kernel_size % 2 == 1,
            f"branch lk_origin: kernel_size must be odd to keep the map's size, got {kernel_size}",
        )
        require(len({*branches}) == len(branches), f"branches must differ from each other, got {branches}")
        target = Geometry.make(kernel_size, 1, kernel_size // 2, 1, channels)
        super().__init__(channels, channels, target)
        self._config = {"channels": channels, "kernel_size": kernel_size, "branches": branches}
        self.deploy = deploy
        self.attempt_use_lk_impl = attempt_use_lk_impl
        self.kernel_sizes = [k for k, _ in branches]
        self.dilates = [r for _, r in branches]
        for k, r in branches:
            require(
                k % 2 == 1 and r > 0 and r * (k - 1) + 1 <= kernel_size,
                f"branch (kernel {k}, dilation {r}) must be odd and span at most kernel_size {kernel_size}",
            )
        self.lk_origin = make_layer(channels, channels, target, bias=deploy)
        if deploy:
            return
        self.origin_bn = batch_norm(channels, sync=use_sync_bn)
        for k, r in branches:
            geometry = Geometry.make(k, 1, r * (k - 1) // 2, r, channels)
            self.add_module(f"dil_conv_k{k}_{r}", make_layer(channels, channels, geometry, bias=False))
            self.add_module(f"dil_bn_k{k}_{r}", batch_norm(channels, sync=use_sync_bn))

    @property
    def is_merged(self) -> bool:
        return "origin_bn" not in self._modules

    def _training_children(self) -> list[str]:
        names = ["lk_origin", "origin_bn"]
        for k, r in zip(self.kernel_sizes, self.dilates, strict=True):
            names += [f"dil_conv_k{k}_{r}", f"dil_bn_k{k}_{r}"]
        return names

    def _parts(self) -> list[ConvBN]:
        names = self._training_children()
        return [
            ConvBN(conv, getattr(self, conv), getattr(self, bn))
            for conv, bn in zip(names[::2], names[1::2], strict=True)
        ]


def _fold_following_norm(block: Any) -> None:
    """``norm(dwconv(x))`` into dwconv: K s, beta + (b - mu) s."""
    holder = block.dwconv
    conv = holder.lk_origin if isinstance(getattr(holder, "lk_origin", None), nn.Conv2d) else holder
    if not isinstance(conv, nn.Conv2d) or not hasattr(block.norm, "running_var"):
        return
    weight, bias = fold_batch_norm(conv.weight, conv.bias, block.norm)
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype), conv.weight.requires_grad)
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), conv.weight.requires_grad)
    block.norm = nn.Identity()


def _fold_second_linear(block: Any) -> None:
    """GRN's beta, the layer scale and the last batch norm into the linear layer before them.

    z = W2 (u + beta_grn) + b2, then (z - mu) s + beta, then times g: W2' = diag(s g) W2,
    b2' = (beta + (W2 beta_grn + b2 - mu) s) g.
    """
    linear = block.pwconv2[0]
    norm = block.pwconv2[2] if len(block.pwconv2) == 3 else None
    grn = block.act[1]
    weight = linear.weight.to(torch.promote_types(linear.weight.dtype, torch.float32))
    bias = weight.new_zeros(weight.shape[0]) if linear.bias is None else linear.bias.to(weight.dtype)
    if getattr(grn, "use_bias", False):
        bias = bias + weight @ grn.beta.to(weight.dtype).flatten()
        del grn.beta
        grn.use_bias = False
    if norm is not None:
        scale, bias = module_affine(norm, bias)
        weight = weight * scale.unsqueeze(1)
    if block.gamma is not None:
        gamma = block.gamma.to(weight.dtype)
        weight, bias = weight * gamma.unsqueeze(1), bias * gamma
        block.gamma = None
    merged = nn.Linear(linear.in_features, linear.out_features, device="meta", dtype=linear.weight.dtype)
    merged.weight = nn.Parameter(weight.to(linear.weight.dtype), linear.weight.requires_grad)
    merged.bias = nn.Parameter(bias.to(linear.weight.dtype), linear.weight.requires_grad)
    block.pwconv2 = nn.Sequential(merged.train(block.training), block.pwconv2[1])


@torch.no_grad()
def fold_unireplknet_block(block: nn.Module) -> nn.Module:
    """Merge a whole UniRepLKNet block in place: branches, ``norm``, GRN's beta, layer scale, last norm.

    Args:
        block: a module with the official children ``dwconv`` (a :class:`DilatedReparamBlock`, any block with
            ``reparameterize`` or ``merge_dilated_branches``, a 3x3 nn.Conv2d, or Identity), ``norm``, ``act``
            (activation, GRN), ``pwconv2`` (linear, permutation, batch norm) and ``gamma`` (or None).

    Returns:
        The block, computing in evaluation mode what it computed before. Calling it again changes nothing.

    Raises:
        ValueError: if a child is missing.
    """
    missing = [name for name in ("dwconv", "norm", "act", "pwconv2", "gamma") if not hasattr(block, name)]
    require(not missing, f"{type(block).__name__} is not a UniRepLKNet block: it has no {', '.join(missing)}")
    for name in ("reparameterize", "merge_dilated_branches"):
        if hasattr(block.dwconv, name):
            getattr(block.dwconv, name)()
            break
    _fold_following_norm(block)
    _fold_second_linear(block)
    return block


def is_unireplknet_block(module: nn.Module) -> bool:
    """Whether a module has the official block's children."""
    names = ("dwconv", "norm", "act", "pwconv1", "pwconv2")
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in names):
        return False
    pwconv2, act = module.pwconv2, module.act
    return (
        hasattr(module, "gamma")
        and isinstance(pwconv2, nn.Sequential)
        and isinstance(pwconv2[0], nn.Linear)
        and isinstance(act, nn.Sequential)
        and len(act) == 2
        and hasattr(act[1], "use_bias")
    )
