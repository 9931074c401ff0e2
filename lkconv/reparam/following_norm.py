"""Batch norms that follow a RefConv, found in the ``forward`` of the module that owns both.

RefConv's training form ends before the batch norm, which is the next attribute of the user's own module
(``bn1(conv1(x))``). That one follows the other is a fact of that module's ``forward``, not of names, so
``forward`` is traced symbolically with all submodules opaque, and a norm is folded where the trace shows that
nothing else reads the convolution's output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lkconv.reparam.algebra import fold_batch_norm
from lkconv.reparam.branches import is_plain
from lkconv.reparam.refconv import RefConv

_WITHOUT_FORWARD = (nn.ModuleList, nn.ModuleDict)


class _OpaqueSubmodules(fx.Tracer):
    proxy_buffer_attributes = True  # so that reading a norm's statistics shows in the trace

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def fold_norms_after_refconv(model: nn.Module) -> None:
    """Move every batch norm that follows a merged :class:`RefConv` into it; Identity takes its place.

    Folded where the owner's ``forward`` can be traced and calls both exactly once, the norm on the
    convolution's output and nothing else on it; both are registered once in ``model``, have no hooks, and the
    norm keeps running statistics. Everything else stays as it is.
    """
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    for owner in list(model.modules()):
        if isinstance(owner, _WITHOUT_FORWARD) or not any(isinstance(m, RefConv) for m in _children(owner)):
            continue
        for conv_name, norm_name in _called_in_turn(owner):
            conv, norm = owner.get_submodule(conv_name), owner.get_submodule(norm_name)
            once = places[id(conv)] == places[id(norm)] == 1
            if once and isinstance(conv, RefConv) and _can_fold(conv, norm):
                _fold(conv.reparam_conv, norm)
                owner.set_submodule(norm_name, nn.Identity().train(norm.training))


def _children(owner: nn.Module) -> Iterator[nn.Module]:
    """Submodules that ``owner`` calls itself: its children, and those in lists and dictionaries of them."""
    for child in owner.children():
        if isinstance(child, _WITHOUT_FORWARD):
            yield from _children(child)
        else:
            yield child


def _called_in_turn(owner: nn.Module) -> list[tuple[str, str]]:
    """Names of (a, b) where ``forward`` calls b on a's output, which nothing else reads, and each once."""
    training = {m: m.training for m in owner.modules()}
    attributes = set(owner.__dict__)
    owner.eval()  # as the merged model runs
    try:
        nodes = list(_OpaqueSubmodules().trace(owner).nodes)
    except Exception:  # whatever a user's forward does to a symbol: it cannot be looked into
        return []
    finally:
        for module, mode in training.items():
            module.training = mode
        for name in set(owner.__dict__) - attributes:  # constants that the tracer keeps on what it traces
            delattr(owner, name)
    calls = Counter(n.target for n in nodes if n.op == "call_module")
    reads = [str(n.target) for n in nodes if n.op == "get_attr"]
    found = []
    for node in nodes:
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        before = node.args[0]
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        names = str(before.target), str(node.target)
        once = all(calls[name] == 1 for name in names)
        if once and not any(read.startswith(f"{name}.") for read in reads for name in names):
            found.append(names)
    return found


def _can_fold(conv: RefConv, norm: nn.Module) -> bool:
    channels = conv.out_channels == getattr(norm, "num_features", None)
    kept = isinstance(norm, _BatchNorm) and norm.running_mean is not None
    return channels and kept and is_plain(norm) and is_plain(conv.reparam_conv) and is_plain(conv, (RefConv,))


@torch.no_grad()
def _fold(layer: nn.Conv2d, norm: nn.Module) -> None:
    dtype, trainable = layer.weight.dtype, layer.weight.requires_grad
    weight, bias = fold_batch_norm(layer.weight, layer.bias, norm)
    layer.weight = nn.Parameter(weight.to(dtype), trainable)
    layer.bias = nn.Parameter(bias.to(dtype), trainable)
