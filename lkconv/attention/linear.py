"""``nn.Linear`` by oneDNN, where torch's own way takes longer.

torch multiplies float32 matrices with MKL, which gives AVX-512 to Intel's processors alone: others with
AVX-512 run its AVX2 kernels. oneDNN takes what the processor has: 230 against 105 GFlop/s on one core of an
AMD Zen 5. bfloat16 matrices torch multiplies with oneDNN itself, but copies the bias to the output first,
which is then read again: 4 to 8% of the product. :func:`linear` asks oneDNN for all of it at once in these
cases, and everywhere else calls the module.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .. import _C, backends
from .._hooks import is_plain
from .derivatives import under_derivative


@functools.lru_cache
def prefers_onednn(dtype: torch.dtype, vendor: str, isa: str) -> bool:
    """Whether this torch has a product of oneDNN for 512-bit vectors that takes less time than its own way:
    in bfloat16, and in float32 where MKL leaves these vectors unused."""
    if dtype == torch.float32:
        slow = vendor not in ("GenuineIntel", "") and torch.backends.mkl.is_available()
    else:
        slow = dtype == torch.bfloat16
    return (
        slow
        and isa in ("avx512", "amx")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias by oneDNN; strides of ``weight`` do not matter."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """``F.linear`` and its gradients as products of oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat, rows = grad.flatten(0, -2), x.flatten(0, -2)
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad_bias = flat.sum(0) if wants_bias else None
        # torch's products have derivatives of their own, and in bfloat16 they are oneDNN's as well.
        if torch.is_grad_enabled() or x.dtype != torch.float32:
            grad_x = (flat @ weight).view_as(x) if wants_x else None
            return grad_x, flat.t() @ rows if wants_weight else None, grad_bias
        grad_x = _product(flat, weight.t()).view_as(x) if wants_x else None
        # The transpose of the product: its longer side, usually that of the outputs, is then contiguous.
        return grad_x, _product(rows.t(), flat.t()).t() if wants_weight else None, grad_bias


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether this is a product of plain tensors of one dtype, at full precision, where lkconv's kernels
    run."""
    given = (x, weight) if bias is None else (x, weight, bias)
    return (
        all(type(t) in (Tensor, nn.Parameter) and t.dtype == x.dtype for t in given)
        and x.numel() > 0
        and x.shape[-1] == weight.shape[-1]  # else the module says what is wrong
        and all(t.device.type == "cpu" for t in given)
        and not torch.is_autocast_enabled("cpu")
        and (x.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest")
        and bool(torch.backends.mkldnn.enabled)
        and backends.namespace(x.device, x.dtype, "group_mix") == "lkconv"
    )


def _observed() -> bool:
    """Whether a compiler, a tracer or a transform looks on: they know more of torch's own operator."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or under_derivative()
    )


def linear(module: Any, x: Tensor) -> Tensor:
    """``module(x)``, by oneDNN where the module is a plain ``nn.Linear`` and torch takes longer."""
    if _observed() or not prefers_onednn(x.dtype, _C.processor_vendor(), _C.active_isa()):
        return module(x)
    if not is_plain(module, nn.Linear) or not _fits(x, module.weight, module.bias):
        return module(x)
    weight, bias = module.weight, module.bias
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)
