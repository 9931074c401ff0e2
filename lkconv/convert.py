"""``convert``: every depthwise ``nn.Conv2d`` of a model becomes a ``DepthwiseConv2d``."""

from __future__ import annotations

import copy

from torch import nn

from lkconv.modules import DepthwiseConv2d


def convert(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Replace every depthwise ``nn.Conv2d`` in ``model``, itself included, by ``DepthwiseConv2d``.

    Depthwise means exactly ``nn.Conv2d`` (subclasses stay as they are) with
    ``groups == in_channels > 1``. Parameters, buffers, hooks, training mode and sharing stay: a layer
    used in two places is still one layer, and its name in ``state_dict`` is the same.

    Args:
        model: any module.
        inplace: change ``model`` and return it; otherwise change and return a deep copy.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    if not inplace:
        model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is nn.Conv2d and module.groups == module.in_channels > 1:
            # A DepthwiseConv2d holds exactly the state of an nn.Conv2d, so changing the class is the
            # whole conversion, and every reference to the layer (a parent, a hook, a list) sees it.
            module.__class__ = DepthwiseConv2d
    return model
