"""Whether calling a module does nothing but its formula, so that a fused or folded path may stand for it."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrize import is_parametrized


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs a user's hook, which folding would skip."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether the module is exactly of one of these types, without hooks or a ``forward`` of its own.

    Parametrisations (``torch.nn.utils.parametrize``) are allowed: they show in the parameter that is read.
    """
    kind = type(module)
    if kind not in kinds:  # asked first: a module that has no parametrisations is slow to say so
        kind = kind.__bases__[0] if is_parametrized(module) else kind
    return kind in kinds and "forward" not in module.__dict__ and not has_hooks(module)
