"""Derivatives of the fused ops beyond the first gradient: double backward through plain PyTorch, and vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

from .. import reference_group_mix as reference
from ..ops import direct, forward_ad_active
from .checks import NUM_HEADS
from .parameters import AggregateParameters


def accumulation_dtype(t: Tensor) -> torch.dtype:
    """The dtype of statistics and of gradients of parameters inside the kernels."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def under_derivative() -> bool:
    """Whether ``torch.func`` or forward mode differentiates what runs now: a registered autograd formula
    serves ``torch.autograd`` alone, so that these take the composition in plain PyTorch."""
    if not torch._C._are_functorch_transforms_active():
        return forward_ad_active()
    levels = retrieve_all_functorch_interpreters()
    return forward_ad_active() or any(level.key() != TransformType.Vmap for level in levels)


def call_op(op: Any, *arguments: Any) -> Any:
    """``op(*arguments)``; where eager mode records no graph, without the visit to Python that its registered
    gradient costs: 6 microseconds."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return direct(op.default)(*arguments)


# ---- eager mode --------------------------------------------------------------------------------------------
def eager_form(function: Any) -> Any:
    """An autograd function with ``setup_context`` as one without, which plain eager mode calls much faster:
    for the former torch binds the arguments to the signature, which takes 30 microseconds."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = function.forward(*arguments)
        function.setup_context(ctx, arguments, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(f"{function.__name__}Eager", (torch.autograd.Function,), members)


def apply(function: Any, eager: Any, *arguments: Any) -> Any:
    """Calls ``function``, or its :func:`eager_form` where neither a compiler nor a transform looks on."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return eager.apply(*arguments)


# ---- double backward --------------------------------------------------------------------------------------
def composed_aggregate(
    qkv: Tensor,
    size: tuple[int, int],
    parameters: AggregateParameters,
    statistics: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    eps: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """``mixed`` and ``local`` in differentiable operations; batch statistics where none are given."""
    wide = accumulation_dtype(qkv)
    means, variances = (None, None) if statistics is None else ([t.to(wide) for t in s] for s in statistics)
    q, k, v, local = reference.group_mix_aggregate(
        qkv.to(wide),
        size,
        parameters.depthwise,
        parameters.pointwise,
        [t.to(wide) for t in parameters.norm_weights],
        [t.to(wide) for t in parameters.norm_biases],
        means,
        variances,
        parameters.layer_norm_weight,
        parameters.layer_norm_bias,
        training=statistics is None,
        eps=eps[0],
        layer_norm_eps=eps[1],
    )
    mixed = torch.stack([q, k, v]).transpose(2, 3).flatten(3)
    return mixed.to(qkv.dtype), local.to(qkv.dtype)


def composed_attention(
    mixed: Tensor,
    local: Tensor,
    size: tuple[int, int],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    scale: float,
) -> Tensor:
    """The attention core in differentiable operations."""
    parts = mixed.to(accumulation_dtype(mixed)).unflatten(3, (NUM_HEADS, -1)).transpose(2, 3)
    q, k, v = parts.unbind()
    out = reference.group_mix_attention(q, k, v, local.to(q.dtype), size, weights, biases, scale)
    return out.to(mixed.dtype)


def differentiable_gradients(
    outputs: Sequence[Tensor], grads: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of ``inputs``, which can be differentiated again; None where none is wanted or given."""
    wanted = [t for t in inputs if t.requires_grad]
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    if not wanted or not pairs:
        return [None] * len(inputs)
    found = torch.autograd.grad(
        [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
    )
    by_input = iter(found)
    return [next(by_input) if t.requires_grad else None for t in inputs]


# ---- vmap -------------------------------------------------------------------------------------------------
def sample_of(argument: Any, dim: Any, index: int) -> Any:
    """Sample ``index`` of one argument: a tensor, a list of tensors or a number."""
    if isinstance(argument, list | tuple):
        dims = dim if isinstance(dim, list | tuple) else [None] * len(argument)
        return [sample_of(a, d, index) for a, d in zip(argument, dims, strict=True)]
    return argument if dim is None else argument.select(dim, index)


def sample_by_sample(op: Callable) -> Callable:
    """The vmap rule of an op whose samples have nothing in common: one call for each, results stacked."""

    def rule(info: Any, in_dims: tuple, *arguments: Any) -> tuple[Any, Any]:
        calls = [
            op(*(sample_of(a, d, i) for a, d in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(calls[0])

    return rule


def _batched(dim: Any) -> bool:
    return any(map(_batched, dim)) if isinstance(dim, list | tuple) else dim is not None


def into_batch(op: Callable, batch_dims: Sequence[int], out_batch_dims: Sequence[int]) -> Callable:
    """The vmap rule of an op that treats the images of a batch alike: samples become images.

    ``batch_dims`` are those of the op's first arguments, ``out_batch_dims`` those of its outputs. With any
    other argument batched there is one call per sample.
    """
    slow = sample_by_sample(op)

    def rule(info: Any, in_dims: tuple, *arguments: Any) -> tuple[Any, Any]:
        images = len(batch_dims)
        if any(map(_batched, in_dims[images:])) or info.batch_size == 0:
            return slow(info, in_dims, *arguments)
        folded = []
        for tensor, dim, at in zip(arguments, in_dims, batch_dims, strict=False):
            shape = list(tensor.shape)
            tensor = tensor.unsqueeze(at) if dim is None else tensor.movedim(dim, at)
            if dim is None:
                tensor = tensor.expand(*shape[:at], info.batch_size, *shape[at:])
            folded.append(tensor.flatten(at, at + 1))
        outputs = op(*folded, *arguments[images:])
        found = tuple(
            t.unflatten(at, (info.batch_size, -1)) for t, at in zip(outputs, out_batch_dims, strict=True)
        )
        return found, tuple(out_batch_dims)

    return rule
