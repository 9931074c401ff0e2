"""Hooks of the Group-Mix ops, by one helper over all of them: shapes for tracing and gradients.

The CPU kernels live in the namespace ``lkconv``, the Triton ones in ``lkconv_triton`` with the same schemas.
:func:`register_hooks` serves both; autocast is applied before an op is called (``aggregate.autocast``). The
ops are token-major: ``mixed`` is (3, B, N, 4 * d), the heads of a token next to each other. Gradients of
parameters come back as one flat tensor, in the accumulation type, and are cut up here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import AUTOCAST_DEVICES, direct
from .checks import KERNELS, NUM_HEADS
from .derivatives import (
    accumulation_dtype,
    composed_aggregate,
    composed_attention,
    differentiable_gradients,
    into_batch,
    sample_by_sample,
)
from .parameters import AggregateParameters

OUTPUTS: dict[str, Callable] = {}  # op -> its fake kernel
_registered: set[str] = set()
_libraries: list[torch.library.Library] = []  # a Library's registrations end with its life


def register_hooks(namespace: str) -> Any:
    """Registers the Group-Mix ops of a namespace with fake kernels, autograd and autocast, once."""
    ops = getattr(torch.ops, namespace)
    if namespace not in _registered:
        _registered.add(namespace)
        for name, fake in OUTPUTS.items():
            torch.library.register_fake(f"{namespace}::{name}", fake, allow_override=True)
            torch.library.register_vmap(f"{namespace}::{name}", _vmap_rule(name, getattr(ops, name).default))
        for name, backward, setup in (
            ("group_mix_aggregate", _aggregate_backward, _aggregate_setup),
            ("group_mix_attention", _attention_backward, _attention_setup),
        ):
            bound = functools.partial(backward, ops)
            torch.library.register_autograd(f"{namespace}::{name}", bound, setup_context=setup)
        library = torch.library.Library(namespace, "FRAGMENT")
        _libraries.append(library)
        for name, tokens in (("group_mix_aggregate", 1), ("group_mix_attention", 2)):
            for key, device in AUTOCAST_DEVICES.items():
                library.impl(name, _autocast_kernel(getattr(ops, name), key, device, tokens), key)
    return ops


def _autocast_kernel(op: Any, key: str, device: str, tokens: int) -> Callable:
    """``op`` with its first ``tokens`` arguments in autocast's dtype; parameters may have any dtype."""
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*arguments: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        given = (t if t.dtype == torch.float64 else t.to(dtype) for t in arguments[:tokens])
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(*given, *arguments[tokens:])

    return kernel


def _vmap_rule(name: str, op: Callable) -> Callable:
    if name == "group_mix_aggregate":
        return into_batch(op, [0], [1, 0])
    if name == "group_mix_attention":
        return into_batch(op, [1, 0], [0, 0, 0])
    return sample_by_sample(op)


def _outputs_of(name: str) -> Callable[[Callable], Callable]:
    def keep(fake: Callable) -> Callable:
        OUTPUTS[name] = fake
        return fake

    return keep


def unpack(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cuts a flat gradient into tensors of the shapes and dtypes of ``like``."""
    parts = flat.split([t.numel() for t in like])
    if all(t.dtype == flat.dtype for t in like):
        return [p.view(t.shape) for p, t in zip(parts, like, strict=True)]
    return [p.view(t.shape).to(t.dtype) for p, t in zip(parts, like, strict=True)]


# ---- shapes -----------------------------------------------------------------------------------------------
@_outputs_of("group_mix_aggregate")
def _(qkv, height, width, depthwise, pointwise, nw, nb, nm, nv, lw, lb, eps, layer_norm_eps):
    batch, tokens, channels = qkv.shape
    d = channels // 15
    return qkv.new_empty(3, batch, tokens, 4 * d), qkv.new_empty(batch, tokens, d)


@_outputs_of("group_mix_mix")
def _(qkv, height, width, depthwise, pointwise, lw, lb, layer_norm_eps):
    batch, tokens, channels = qkv.shape
    d = channels // 15
    wide = accumulation_dtype(qkv)
    local = qkv.new_empty(batch, tokens, d)
    premix = qkv.new_empty(3, batch, tokens, 3 * d)
    statistics = qkv.new_empty(4, d, dtype=wide)
    return premix, torch.empty_like(local), local, statistics, torch.empty_like(statistics)


@_outputs_of("group_mix_normalize")
def _(qkv, premix, nw, nb, mean, var, eps):
    batch, tokens, channels = qkv.shape
    return qkv.new_empty(3, batch, tokens, channels // 15 * 4)


@_outputs_of("group_mix_backward_reduce")
def _(grad_mixed, qkv, premix, nw, nb, mean, var, eps):
    return qkv.new_empty(2, 4, qkv.shape[2] // 15, dtype=torch.float64)


@_outputs_of("group_mix_backward")
def _(
    grad_mixed,
    grad_local,
    qkv,
    premix,
    prelocal,
    height,
    width,
    depthwise,
    pointwise,
    nw,
    nb,
    mean,
    var,
    lw,
    lb,
    eps,
    layer_norm_eps,
    sums,
    count,
):
    d = qkv.shape[2] // 15
    taps = sum((d if i < 3 else 3 * d) * k * k for i, k in enumerate(KERNELS))
    return (
        qkv.new_empty(qkv.shape),
        qkv.new_empty(taps + 6 * d * d + 2 * d, dtype=accumulation_dtype(qkv)),
    )


@_outputs_of("group_mix_attention")
def _(mixed, local, height, width, position_weight, position_bias, scale):
    _, batch, tokens, channels = mixed.shape
    d, wide = channels // 4, accumulation_dtype(mixed)
    return (
        mixed.new_empty(batch, tokens, 5 * d),
        mixed.new_empty(batch, channels, dtype=wide),
        mixed.new_empty(batch, NUM_HEADS, d // 2, d // 2, dtype=wide),
    )


@_outputs_of("group_mix_attention_backward")
def _(grad_out, mixed, log_sum, context, height, width, position_weight, position_bias, scale):
    count = sum(t.numel() for t in (*position_weight, *position_bias))
    return mixed.new_empty(mixed.shape), mixed.new_empty(count, dtype=accumulation_dtype(mixed))


def call(ops: Any, name: str, qkv: Tensor, *arguments: Any) -> Any:
    """An op's outputs for a batch, qkv's; zeros for one without images, which kernels do not take but which
    a process that shares statistics with others may have."""
    op = getattr(ops, name)
    if qkv.numel():
        return op(*arguments) if torch.compiler.is_compiling() else direct(op.default)(*arguments)
    return torch.utils._pytree.tree_map(torch.zero_, OUTPUTS[name](*arguments))


# ---- gradients --------------------------------------------------------------------------------------------
def aggregate_backward(
    ops: Any,
    grad_mixed: Sequence[Tensor],
    grad_local: Tensor,
    qkv: Tensor,
    premix: Tensor,
    prelocal: Tensor,
    size: tuple[int, int],
    parameters: AggregateParameters,
    statistics: tuple[Tensor, Tensor],
    eps: tuple[float, float],
    sums: Tensor | None,
    count: float,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of qkv and of depthwise (4), pointwise (4), LayerNorm's weight and bias, in this order.

    ``grad_mixed`` is one tensor (3, B, N, 4 * d), or those of q, k and v, (B, N, 4 * d), which need not be
    neighbours in memory.
    """
    depthwise, pointwise, nw, nb, lw, lb = parameters
    grad_qkv, flat = call(
        ops, "group_mix_backward", qkv, grad_mixed, grad_local, qkv, premix, prelocal, *size, depthwise,
        pointwise, nw, nb, *statistics, lw, lb, *eps, sums, count,
    )  # fmt: skip
    return grad_qkv, unpack(flat, [*depthwise, *pointwise, lw, lb])


def norm_gradients(sums: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[list, list]:
    """Gradients of BatchNorm's weights and biases from the sums over tokens."""
    first = weights[0].dtype
    of_biases, of_weights = sums.to(first).unbind()  # usually of one dtype: a single conversion
    if all(t.dtype == first for t in (*weights, *biases)):
        return list(of_weights.unbind()), list(of_biases.unbind())
    return (
        [g.to(w.dtype) for g, w in zip(of_weights.unbind(), weights, strict=True)],
        [g.to(b.dtype) for g, b in zip(of_biases.unbind(), biases, strict=True)],
    )


def _aggregate_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    qkv, height, width, *lists, lw, lb, eps, layer_norm_eps = inputs
    ctx.size, ctx.eps = (height, width), (eps, layer_norm_eps)
    ctx.save_for_backward(qkv, lw, lb, *(t for group in lists for t in group))


def _aggregate_backward(ops: Any, ctx: Any, grad_mixed: Tensor | None, grad_local: Tensor | None) -> tuple:
    """With fixed statistics U is cheap to compute again, so that inference-style graphs keep only inputs."""
    qkv, lw, lb, *rest = ctx.saved_tensors
    depthwise, pointwise, nw, nb, nm, nv = (list(rest[i : i + 4]) for i in range(0, 24, 4))
    parameters = AggregateParameters(depthwise, pointwise, nw, nb, lw, lb)
    eps, layer_norm_eps = ctx.eps
    if torch.is_grad_enabled():
        outputs = composed_aggregate(qkv, ctx.size, parameters, (nm, nv), ctx.eps)
        inputs = [qkv, *parameters.flat()]
        found = differentiable_gradients(outputs, (grad_mixed, grad_local), inputs)
        groups = [found[i : i + 4] for i in range(1, 17, 4)]
        return found[0], None, None, *groups, [None] * 4, [None] * 4, *found[17:], None, None
    premix, prelocal, local, _, _ = ops.group_mix_mix(
        qkv, *ctx.size, depthwise, pointwise, lw, lb, layer_norm_eps
    )
    mean, var = torch.stack(nm), torch.stack(nv)
    if grad_mixed is None:
        grad_mixed = qkv.new_zeros(3, *qkv.shape[:2], qkv.shape[2] // 15 * 4)
    if grad_local is None:
        grad_local = torch.zeros_like(local)
    sums = ops.group_mix_backward_reduce([grad_mixed], qkv, premix, nw, nb, mean, var, eps)
    grad_qkv, grads = aggregate_backward(
        ops, [grad_mixed], grad_local, qkv, premix, prelocal, ctx.size, parameters, (mean, var), ctx.eps,
        None, 1.0,
    )  # fmt: skip
    grad_nw, grad_nb = norm_gradients(sums, nw, nb)
    nothing = [None] * 4
    return (
        grad_qkv,
        None,
        None,
        grads[:4],
        grads[4:8],
        grad_nw,
        grad_nb,
        nothing,
        nothing,
        grads[8],
        grads[9],
        None,
        None,
    )


def _attention_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    mixed, local, height, width, weight, bias, scale = inputs
    _, log_sum, context = output
    ctx.size, ctx.scale = (height, width), scale
    ctx.mark_non_differentiable(log_sum, context)
    ctx.save_for_backward(mixed, local, log_sum, context, *weight, *bias)


def _attention_backward(ops: Any, ctx: Any, grad_out: Tensor, *_: Tensor | None) -> tuple:
    mixed, local, log_sum, context, *parameters = ctx.saved_tensors
    height, width = ctx.size
    if torch.is_grad_enabled():
        out = composed_attention(mixed, local, ctx.size, parameters[:3], parameters[3:], ctx.scale)
        found = differentiable_gradients([out], [grad_out], [mixed, local, *parameters])
        return found[0], found[1], None, None, found[2:5], found[5:], None
    grad_mixed, flat = ops.group_mix_attention_backward(
        grad_out, mixed, log_sum, context, height, width, parameters[:3], parameters[3:], ctx.scale
    )
    grads = unpack(flat, parameters)
    grad_local = grad_out[..., mixed.shape[-1] :]
    return grad_mixed, grad_local, None, None, grads[:3], grads[3:], None


register_hooks("lkconv")
