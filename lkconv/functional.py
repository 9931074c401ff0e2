"""The functional interface: validate, normalise, choose a backend, call its op."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled
from torch._C import _are_functorch_transforms_active, _AutoDispatchBelowAutograd, _is_tracing
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter
from torch.overrides import handle_torch_function, has_torch_function_variadic

from lkconv import backends, reference
from lkconv._validate import (
    NO_EXTRA,
    Pair,
    check_sizes,
    check_types,
    computed_dtype,
    is_strided,
    padding_pair,
    pair,
)
from lkconv.backends import request
from lkconv.ops import Ops, direct, ensure_sharding, forward_ad_active

PLAIN = (Tensor, Parameter)
_forward_on_cpu = direct(torch.ops.lkconv.depthwise_conv2d.default)


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
) -> Tensor:
    """Depthwise 2-D convolution, ``F.conv2d`` with one group per input channel.

    Args:
        input: (N, C, H, W) or (C, H, W); float64, float32, float16 or bfloat16. Any strides. Other
            dtypes that ``F.conv2d`` takes (complex, integers) go there.
        weight: (C*m, 1, kh, kw), input's dtype (or what autocast makes of it). Output channel
            ``c*m + j`` reads input channel c.
        bias: (C*m,) or None.
        stride, dilation: int or pair, at least 1.
        padding: int or pair, at least 0; or ``"valid"``, or ``"same"`` (stride 1; where the total is
            odd, the extra row or column of zeros is at the bottom or right, as in ``F.conv2d``).

    Returns:
        (N, C*m, H', W') in input's memory format, or (C*m, H', W').

    Raises:
        TypeError: an argument is of the wrong type, or the dtypes differ.
        ValueError: shapes, devices or numbers do not fit, or the output would be empty.
    """
    if has_torch_function_variadic(input, weight, bias):
        # Tensor subclasses, torch-function modes and torch.fx proxies see one call, as of any torch function.
        return handle_torch_function(
            depthwise_conv2d, (input, weight, bias), input, weight, bias, stride, padding, dilation
        )
    if not is_dynamo_compiling() and _at_once(input, weight, bias, padding):
        geometry = pair("stride", stride, 1), pair("padding", padding, 0), pair("dilation", dilation, 1)
        out = _on_cpu(input, weight, bias, *geometry)
        if out is not None:
            return out
    check_types(input, weight, bias)
    stride = pair("stride", stride, 1)
    dilation = pair("dilation", dilation, 1)
    padding, extra = padding_pair(padding, weight.shape[2:], stride, dilation)
    check_sizes(input.shape, weight.shape, bias, stride, padding, dilation, extra)
    if extra != NO_EXTRA:
        input = F.pad(input, (0, extra[1], 0, extra[0]))
    if input.dim() == 3:
        return _dispatch(input.unsqueeze(0), weight, bias, stride, padding, dilation).squeeze(0)
    return _dispatch(input, weight, bias, stride, padding, dilation)


def _at_once(input: Any, weight: Any, bias: Any, padding: Any) -> bool:
    """Whether this is the common call of inference: ordinary tensors on the CPU in plain eager mode, nothing
    to record for a gradient, and no backend asked for.

    Behind a layer whose tensors fill the caches, every object that a call touches comes from memory: there
    the checks and choices of other calls take 70 microseconds, these 20.
    """
    return (
        type(input) is Tensor
        and type(weight) in PLAIN
        and (bias is None or (type(bias) in PLAIN and bias.is_cpu))
        and input.is_cpu
        and weight.is_cpu
        and request.name is None
        and type(padding) is not str
        and input.dim() == 4
        and input.numel() > 0
        and weight.numel() > 0
        and not _are_functorch_transforms_active()
        and not _is_tracing()
        and forward_ad._current_level < 0
        and not (
            is_grad_enabled()
            and (input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))
        )
    )


def _on_cpu(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Pair) -> Tensor | None:
    """The CPU's op, which checks its arguments by itself; None where it refuses them, so that the checks of
    this module say what is wrong, or another path takes them."""
    try:
        with _AutoDispatchBelowAutograd():
            return _forward_on_cpu(input, weight, bias, *geometry)
    except RuntimeError as error:
        if isinstance(error, NotImplementedError) or "lkconv: " in str(error):
            return None
        raise


def _dispatch(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    if torch.compiler.is_compiling():
        return _compiled(input, weight, bias, stride, padding, dilation)
    # Autocast changes the dtype to choose for; asking whether it is on at all is the cheaper question.
    dtype = computed_dtype(input) if torch._C._is_any_autocast_enabled() else input.dtype
    choice = backends.choose(input.device, dtype)
    if choice.name == "cuda" and is_strided(input, weight):
        size, (out_channels, _, *kernel_size) = tuple(input.shape), weight.shape
        problem = (size, out_channels, tuple(kernel_size), stride, padding, dilation)
        channels_last = input.stride(1) == 1 and size[1] > 1
        choice = backends.choose_for(choice, input.device, dtype, problem, channels_last)
    ops = choice.ops
    if ops is None or not is_strided(input, weight):
        return reference.depthwise_conv2d(input, weight, bias, stride, padding, dilation)
    if _is_plain(input, weight, bias):
        return _eager(ops, input, weight, bias, stride, padding, dilation)
    ensure_sharding(input, weight, bias)
    return ops.forward(input, weight, bias, stride, padding, dilation)


def _compiled(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Pair) -> Tensor:
    """The path that compilers trace: one op in the graph, and guards on nothing but the arguments."""
    namespace = backends.namespace(input.device, computed_dtype(input))
    if namespace is None or not is_strided(input, weight):
        return reference.depthwise_conv2d(input, weight, bias, *geometry)
    return getattr(torch.ops, namespace).depthwise_conv2d.default(input, weight, bias, *geometry)


def _is_plain(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are ordinary tensors in plain eager mode: no subclass, transform, trace or autocast."""
    return (
        type(input) in PLAIN
        and type(weight) in PLAIN
        and (bias is None or type(bias) in PLAIN)
        and in_plain_eager_mode()
    )


def in_plain_eager_mode() -> bool:
    """Whether no transform, trace, mode or autocast sees the call, so that an op's hooks can be passed by."""
    return not (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_tracing()
        or torch._C._is_any_autocast_enabled()
        or forward_ad_active()
    )


def _eager(ops: Ops, input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Pair) -> Tensor:
    """The same op without the trip through the Python autograd kernel, which costs several microseconds."""
    if torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return ops.function.apply(input, weight, bias, *geometry)
    with torch._C._AutoDispatchBelowAutograd():
        return ops.forward(input, weight, bias, *geometry)
