"""Registration of everything PyTorch needs to know about the ops, by one helper over all of them.

The schemas are declared once, in ``csrc/module.cpp``. :func:`register_hooks` adds to a namespace that
holds the three ops of depthwise convolution their fake kernels, autograd, autocast, vmap and DTensor
sharding. The CPU and CUDA kernels live in ``lkconv``; the Triton ones in ``lkconv_triton`` with the
same schemas, so the same helper serves both.

All three ops are bilinear, and each is the derivative of the others::

    y  = forward(x, w)             dx  = backward_input(gy, w)   dw  = backward_weight(gy, x)
    gx = backward_input(gy, w)     dgy = forward(ggx, w)         dw  = backward_weight(gy, ggx)
    gw = backward_weight(gy, x)    dgy = forward(x, ggw)         dx  = backward_input(gy, ggw)

so derivatives of every order stay inside the three.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

import lkconv._C  # noqa: F401  (declares the schemas and registers the CPU kernels)
from lkconv import _vmap
from lkconv._fake import fake_kernels

AUTOCAST_DEVICES = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda", "AutocastXPU": "xpu"}


class Ops(NamedTuple):
    """The three ops of a namespace, and the autograd function of the first for the eager fast path."""

    forward: Any
    backward_input: Any
    backward_weight: Any
    function: Any


_registered: dict[str, Ops] = {}
_libraries: list[torch.library.Library] = []  # a Library's registrations end with its life


def register_hooks(namespace: str) -> Ops:
    """Register fake, autograd, autocast, vmap and sharding hooks for the ops of ``namespace``.

    The namespace must already hold ``depthwise_conv2d``, ``depthwise_conv2d_backward_input`` and
    ``depthwise_conv2d_backward_weight`` with the schemas of ``csrc/module.cpp``. Calling it again
    returns the same ops and registers nothing.
    """
    if namespace in _registered:
        return _registered[namespace]
    packets = getattr(torch.ops, namespace)
    forward = packets.depthwise_conv2d.default
    backward_input = packets.depthwise_conv2d_backward_input.default
    backward_weight = packets.depthwise_conv2d_backward_weight.default
    functions = _autograd_functions(forward, backward_input, backward_weight)
    library = torch.library.Library(namespace, "FRAGMENT")
    _libraries.append(library)
    for op, function, fake, batching in zip(
        (forward, backward_input, backward_weight),
        functions,
        fake_kernels(),
        _vmap.rules(forward, backward_input, backward_weight),
        strict=True,
    ):
        name = op.name()
        torch.library.register_fake(name, fake, lib=library, allow_override=True)
        torch.library.register_vmap(name, batching, lib=library)
        library.impl(
            op._schema.name.split("::")[1],
            _autograd_kernel(op, function),
            "Autograd",
            with_keyset=True,
            allow_override=True,  # torch.library gave the ops of Triton an autograd kernel when it made them
        )
    for key, device_type in AUTOCAST_DEVICES.items():
        library.impl("depthwise_conv2d", _autocast_kernel(forward, device_type, key), key)
    _registered[namespace] = Ops(forward, backward_input, backward_weight, functions[0])
    return _registered[namespace]


def forward_ad_active() -> bool:
    """Whether a forward-mode differentiation level is open, in which tensors may carry tangents."""
    return forward_ad._current_level >= 0


def holds_dtensor(*args: Any) -> bool:
    """Whether any of the arguments is a DTensor; costs next to nothing where nobody uses them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(a, module.DTensor) for a in args)


def ensure_sharding(*args: Any) -> None:
    """Teach DTensor the ops before the first call that holds one."""
    if holds_dtensor(*args):
        from lkconv import _sharding

        for ops in _registered.values():
            _sharding.register(ops)


# --- autograd ---------------------------------------------------------------------------------------------


def _autograd_functions(forward: Any, backward_input: Any, backward_weight: Any) -> tuple[Any, Any, Any]:
    """One autograd function per op.

    A gradient's formula gets the output's gradient, the other factor, its own shape and the geometry.
    """

    convolve, gradient_of_input, gradient_of_weight = map(caller, (forward, backward_input, backward_weight))

    def to_input(grad, weight, shape, geometry):
        return gradient_of_input(grad, weight, shape, *geometry)

    def to_weight(grad, input, shape, geometry):
        return gradient_of_weight(grad, input, shape[2:], *geometry)

    return (
        _bilinear_function("DepthwiseConv2d", forward, to_input, to_weight),
        _bilinear_function(
            "DepthwiseConv2dBackwardInput",
            backward_input,
            lambda grad, weight, shape, geometry: convolve(grad, weight, None, *geometry),
            lambda grad, grad_output, shape, geometry: to_weight(grad_output, grad, shape, geometry),
        ),
        _bilinear_function(
            "DepthwiseConv2dBackwardWeight",
            backward_weight,
            lambda grad, input, shape, geometry: convolve(input, grad, None, *geometry),
            lambda grad, grad_output, shape, geometry: to_input(grad_output, grad, shape, geometry),
        ),
    )


def direct(op: Any) -> Callable:
    """The function under the object that ``torch.ops`` holds, which adds a frame of its own to every call."""
    return getattr(op, "_op", op)


def caller(op: Any) -> Callable:
    """The op, below autograd when nothing can be recorded: saves a trip through the autograd kernel."""
    function = direct(op)

    def call(*args: Any) -> Tensor:
        if torch.is_grad_enabled() or forward_ad_active() or torch.compiler.is_compiling():
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return function(*args)

    return call


def _bilinear_function(name: str, op: Any, grad_first: Callable, grad_second: Callable) -> Any:
    """An autograd function for ``op(first, second, third, stride, padding, dilation)``.

    ``third`` is the bias of the forward and a size for the others.
    """

    function = direct(op)

    def forward(ctx, first, second, third, stride, padding, dilation):
        with below_autograd():
            output = function(first, second, third, stride, padding, dilation)
        need_first, need_second = ctx.needs_input_grad[:2]
        if forward_ad_active():
            ctx.save_for_forward(first, second)
        # A frozen weight needs no input to be kept, and the other way round.
        ctx.save_for_backward(first if need_second else None, second if need_first else None)
        ctx.shapes = first.shape, second.shape
        ctx.third = None if isinstance(third, Tensor) else third
        ctx.geometry = stride, padding, dilation
        return output

    def backward(ctx, grad):
        first, second = ctx.saved_tensors
        need = ctx.needs_input_grad
        shape_first, shape_second = ctx.shapes
        return (
            grad_first(grad, second, shape_first, ctx.geometry) if need[0] else None,
            grad_second(grad, first, shape_second, ctx.geometry) if need[1] else None,
            grad.sum((0, 2, 3)) if need[2] else None,
            None,
            None,
            None,
        )

    def jvp(ctx, first_tangent, second_tangent, third_tangent, *_):
        first, second = ctx.saved_tensors
        tangent = None
        for a, b in ((first_tangent, second), (first, second_tangent)):
            if a is not None and b is not None:
                term = op(a, b, ctx.third, *ctx.geometry)
                tangent = term if tangent is None else tangent + term
        if third_tangent is not None:
            bias = third_tangent[:, None, None]
            tangent = bias if tangent is None else tangent + bias
        return tangent

    members: dict[str, Any] = {
        "forward": staticmethod(forward),
        "backward": staticmethod(backward),
        "jvp": staticmethod(jvp),
        "_compiled_autograd_key": staticmethod(torch.autograd.Function._compiled_autograd_key),
    }
    return type(name, (_SingleLevelFunction,), members)


@contextmanager
def _below_functorch_level() -> Iterator[None]:
    # The function switched gradients off for its own level; those of the levels below stay on.
    with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


def below_autograd() -> Any:
    if torch._C._are_functorch_transforms_active():
        return _below_functorch_level()
    return torch._C._AutoDispatchBelowAutograd()


def is_recorded(*tensors: Any) -> bool:
    """Whether autograd has anything to record of a call with these tensors, some of which may be None."""
    return forward_ad_active() or (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors))


def apply(function: Any, *args: Any) -> Any:
    """Applies a single-level autograd function, under functorch's transforms as well."""
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    with enable_single_level_autograd_function():
        return function.apply(*args)


def redispatch(op: Any, keyset: Any, *args: Any) -> Any:
    """The op from within its autograd kernel, which has nothing to record."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _autograd_kernel(op: Any, function: Any) -> Callable:
    def kernel(keyset, *args):
        ensure_sharding(*args)
        return apply(function, *args) if is_recorded(*args) else redispatch(op, keyset, *args)

    return kernel


# --- autocast ---------------------------------------------------------------------------------------------


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """The dtype that autocast runs a convolution of ``input`` in; None where autocast is off."""
    device_type = input.device.type
    if device_type not in AUTOCAST_DEVICES.values() or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocast_to(dtype: torch.dtype, tensor: Tensor | None) -> Tensor | None:
    """As torch's own autocast: float64 and what is not floating-point stay as they are."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def _autocast_kernel(op: Any, device_type: str, key: str) -> Callable:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(input, weight, bias, stride, padding, dilation):
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            args = (autocast_to(dtype, t) for t in (input, weight, bias))
            return op(*args, stride, padding, dilation)

    return kernel


register_hooks("lkconv")
