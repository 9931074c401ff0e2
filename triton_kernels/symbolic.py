"""Sizes while torch.compile traces: plans need numbers, kernels take the symbols themselves."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=Any)
UNKNOWN_SIZE = 64  # a size no input has shown yet: any value gives correct results


def hint(value):
    """The number a symbolic size had when it was traced; adds no guard."""
    if isinstance(value, torch.SymInt):
        known = value.node.hint
        return UNKNOWN_SIZE if known is None else int(known)
    return value


def hinted(problem: T) -> T:
    """The problem with every symbolic size replaced by its hint."""

    def concrete(value):
        if is_dataclass(value):
            return hinted(value)
        if isinstance(value, tuple):
            return tuple(hint(v) for v in value)
        return hint(value)

    return replace(problem, **{f.name: concrete(getattr(problem, f.name)) for f in fields(problem)})


def is_real(tensor: Tensor) -> bool:
    """Whether the tensor holds data that a kernel could be timed on."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
