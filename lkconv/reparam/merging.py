"""Merge a whole model: every block, and the batch norms that follow where a family has them."""

from __future__ import annotations

import copy
import warnings

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lkconv.reparam.block import ReparamBlock
from lkconv.reparam.following_norm import fold_norms_after_refconv
from lkconv.reparam.unireplknet import fold_unireplknet_block, is_unireplknet_block


def merge(model: nn.Module, inplace: bool = False) -> nn.Module:
    """A copy of ``model`` whose blocks all hold their merged form.

    Every :class:`ReparamBlock` is merged; in UniRepLKNet blocks the norm after the depthwise convolution,
    GRN's beta, the layer scale and the last batch norm are folded as well. A batch norm right after a RefConv
    moves into it where the ``forward`` that calls both can be traced symbolically and shows that nothing else
    reads the convolution's output (:mod:`lkconv.reparam.following_norm`); elsewhere both stay. Blocks that
    already are merged stay as they are. Merge before ``torch.compile``.

    Args:
        model: any module, in evaluation mode. inplace: change ``model`` itself and return it.

    Returns:
        The merged model: in evaluation mode it computes what ``model`` computes in evaluation mode.

    Raises:
        ValueError: if a block's batch norm keeps no running statistics, or pruning would leave a
            :class:`ResRepBlock` no channel.

    Warns:
        UserWarning: if ``model`` is in training mode, where batch norms use other statistics than merging
            does.
    """
    if any(m.training for m in model.modules() if isinstance(m, _BatchNorm)):
        warnings.warn(
            "merge() uses running statistics, so its result equals this model in evaluation mode, but the "
            "model is in training mode. Call model.eval() before comparing or deploying.",
            stacklevel=2,
        )
    if not inplace:
        model = copy.deepcopy(model)
    modules = list(model.modules())
    for module in modules:
        if isinstance(module, ReparamBlock):
            module._merge_if_needed()
    for module in modules:
        if is_unireplknet_block(module):
            fold_unireplknet_block(module)
    fold_norms_after_refconv(model)
    return model
