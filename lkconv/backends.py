"""Which backend computes a call: the automatic order, :func:`use_backend`, and why each other declines.

A backend is asked with one predicate, which returns the reason for declining or None; the choice, the
fallback of a request that cannot be met, and :func:`lkconv.explain` all read the same answer.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from lkconv import gpu_images
from lkconv._validate import CONVOLVED, Pair
from lkconv.ops import Ops, register_hooks

# Size (N, C, H, W) of the input, output channels, kernel size, stride, padding, dilation: ints.
Problem = tuple[tuple[int, ...], int, tuple[int, ...], Pair, Pair, Pair]

DTYPES = CONVOLVED[:4]
PASSES = ("forward", "backward_input", "backward_weight")

MAX_CHOICES = 1024

_log = logging.getLogger("lkconv")


class Backend(NamedTuple):
    """``declines(device, dtype)`` gives the reason or None; ``load()`` the ops, None for plain PyTorch.

    ``lacks(family)`` gives the reason why the backend has no kernels for a family of ops, or None.
    """

    name: str
    declines: Callable[[torch.device, torch.dtype], str | None]
    load: Callable[[], Ops | None]
    lacks: Callable[[str], str | None] = lambda family: None


class GaveUp(RuntimeError):
    """A backend failed in a call and was recorded by :func:`give_up`: another one takes the next call."""


class Choice(NamedTuple):
    """The backend taken, its ops (None: plain PyTorch) and the (name, reason) of every other."""

    name: str
    ops: Ops | None
    declined: tuple[tuple[str, str], ...]


# --- the backends -----------------------------------------------------------------------------------------


def _dtype_reason(dtype: torch.dtype) -> str | None:
    if dtype in DTYPES:
        return None
    return f"takes float64, float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"


def _cpu_declines(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"takes CPU tensors, not {device.type}"
    return _dtype_reason(dtype)


def cuda_module() -> tuple[Any, str]:
    """The compiled CUDA module, or None and the reason for its absence."""
    return _cuda_module


def _import_cuda_module() -> tuple[Any, str]:
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is not a CUDA build"
    try:
        return importlib.import_module("lkconv._C_cuda"), ""
    except ModuleNotFoundError:
        return None, "the CUDA module lkconv._C_cuda was not built"
    except (ImportError, OSError) as error:
        return None, f"the CUDA module lkconv._C_cuda failed to load: {error}"


_cuda_module = _import_cuda_module()


def _cuda_declines(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"takes CUDA tensors, not {device.type}"
    module, reason = cuda_module()
    if module is None:
        return reason
    capability = _capability(device)
    too_old = None if capability is None else gpu_images.reason_against(module.architectures(), capability)
    return too_old or _dtype_reason(dtype)


def _capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU of this machine; None where it has none to ask, as for fake tensors."""
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        return None
    return torch.cuda.get_device_capability(device)


class CudaMachine(NamedTuple):
    """A GPU as the CUDA planner wants to know it. Where there is none to ask, an H100: its own default."""

    sms: int = 132
    shared_per_block: int = 232448
    shared_per_sm: int = 233472


@functools.lru_cache
def cuda_machine(device: torch.device) -> CudaMachine:
    """The GPU ``device``; fake tensors may be of one that is not there."""
    if _capability(device) is None:
        return CudaMachine()
    module: Any = cuda_module()[0]
    with torch.cuda.device(device):
        return CudaMachine(**module.machine())


@functools.lru_cache(maxsize=4096)
def _no_cuda_plan(
    machine: CudaMachine, dtype: torch.dtype, problem: Problem, channels_last: bool
) -> str | None:
    """Why no CUDA kernel takes a pass of ``problem``, or None.

    Triton may be faster than what the op does then, so eager calls ask first; compiled graphs do not.
    """
    if 0 in problem[0]:
        return None
    module: Any = cuda_module()[0]
    name = str(dtype).removeprefix("torch.")
    for pass_name in PASSES:
        # Without tf32: what depends on a switch of torch must not be remembered.
        found = module.plan(pass_name, *problem, name, channels_last, False, **machine._asdict())
        if not any(candidate["possible"] for candidate in found):
            return f"no kernel takes {pass_name}, which its op leaves to PyTorch: {found[0]['reason']}"
    return None


def _cuda_lacks(family: str) -> str | None:
    """Whether the compiled module serves a family: what it lacks is not with the dispatcher."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if family == "group_mix" and not has_kernel("lkconv::group_mix_aggregate", "CUDA"):
        return "the CUDA module has no Group-Mix kernels"
    if family == "normalised_branches" and not has_kernel("lkconv::normalised_branches", "CUDA"):
        return "the CUDA module has no kernels for sums of normalised branches"
    if family == "segmented_depthwise_conv2d" and not has_kernel(f"lkconv::{family}", "CUDA"):
        return "the CUDA module does not convolve slices of channels in place"
    return None


def _triton_declines(device: torch.device, dtype: torch.dtype) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type not in (("cuda", "xpu", "cpu") if interpreted else ("cuda", "xpu")):
        return f"takes GPU tensors, and CPU tensors under TRITON_INTERPRET=1, not {device.type}"
    if interpreted and dtype == torch.bfloat16:
        return "Triton's interpreter does not do bfloat16"
    if reason := _dtype_reason(dtype):
        return reason
    try:
        module = importlib.import_module("lkconv.triton_kernels")
    except ImportError as error:
        return f"lkconv.triton_kernels failed to load: {error}"
    available, reason = module.is_available(device)
    return None if available else reason


FAMILIES = {  # ops that a backend has or has not as a whole -> where their hooks are registered
    "depthwise_conv2d": "lkconv.ops",
    "segmented_depthwise_conv2d": "lkconv.attention.segmented_registration",
    "group_mix": "lkconv.attention.registration",
    "normalised_branches": "lkconv.reparam.normalised_branches",
    "merge_depthwise_kernels": "lkconv.reparam.merge_depthwise_kernels",
}

BACKENDS = (
    Backend("cpu", _cpu_declines, lambda: register_hooks("lkconv")),
    Backend("cuda", _cuda_declines, lambda: register_hooks("lkconv"), _cuda_lacks),
    Backend("triton", _triton_declines, lambda: register_hooks("lkconv_triton")),
    Backend("torch", lambda device, dtype: None, lambda: None),
)


# --- the choice -------------------------------------------------------------------------------------------


def _known(name: str, source: str) -> str:
    names = [backend.name for backend in BACKENDS]
    if name not in names:
        raise ValueError(f"{source} must be one of {', '.join(names)}; got {name!r}")
    return name


_environment = (
    _known(os.environ["LKCONV_BACKEND"], "LKCONV_BACKEND") if os.environ.get("LKCONV_BACKEND") else None
)
_Key = tuple[str | None, torch.device, torch.dtype, str, str | None]  # the arguments of _decide
_choices: dict[_Key, Choice] = {}
_gave_up: dict[tuple[str, torch.device, torch.dtype, str], str] = {}


class _Request(threading.local):
    """What this thread asked for. Not a ContextVar: Dynamo guards on a thread-local in every release."""

    def __init__(self) -> None:  # runs once in each thread; a class attribute would not be guarded on
        self.name: str | None = _environment


request = _Request()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Ask for a backend inside a ``with`` block: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"torch"``.

    Applies to the calling thread alone and nests; the environment variable ``LKCONV_BACKEND``
    asks for the whole process. A backend that cannot take a call leaves it to the next one that can:
    :func:`lkconv.explain` says which and why, and the logger ``lkconv`` warns once.

    Raises:
        ValueError: the name is unknown.
    """
    before, request.name = request.name, _known(name, "backend")
    try:
        yield
    finally:
        request.name = before


def requested() -> str | None:
    """The backend asked for in this thread, or None for the automatic choice."""
    return request.name


def give_up(name: str, device: torch.device, dtype: torch.dtype, family: str, reason: str) -> None:
    """Record why a backend cannot do what it took: it declines from now on, unless asked for by name."""
    _gave_up[name, device, dtype, family] = reason
    _choices.clear()
    _log.warning("backend %s gives up %s of %s tensors of %s: %s", name, family, device.type, dtype, reason)


def retried(function: Callable) -> Callable:
    """``function``, called again where a backend gave up in it: for ops that have no plain form."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # nothing is launched, and Dynamo need not trace the handler
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except GaveUp:
            return function(*args, **kwargs)

    return call


def choose(device: torch.device, dtype: torch.dtype, family: str = "depthwise_conv2d") -> Choice:
    """The backend of a family of ops for tensors of ``device`` and ``dtype`` in this thread."""
    return _cached((request.name, device, dtype, family, None))


def choose_for(
    choice: Choice,
    device: torch.device,
    dtype: torch.dtype,
    problem: Problem,
    channels_last: bool,
    family: str = "depthwise_conv2d",
) -> Choice:
    """What computes one convolution, ``choice`` or, where that has no algorithm for it, the next backend.

    Sizes that are symbols count as ordinary ones.
    """
    if choice.name != "cuda" or torch.SymInt in map(type, (*problem[0], *problem[2])):
        return choice  # the others take every size
    refused = _no_cuda_plan(cuda_machine(device), dtype, problem, channels_last)
    return choice if refused is None else _cached((request.name, device, dtype, family, refused))


def namespace(device: torch.device, dtype: torch.dtype, family: str = "depthwise_conv2d") -> str | None:
    """The op namespace of :func:`choose`'s backend, None for plain PyTorch; for code under a compiler."""
    return _namespace_for(request.name, device, dtype, family)


def _namespace_for(request: str | None, device: torch.device, dtype: torch.dtype, family: str) -> str | None:
    ops = _cached((request, device, dtype, family, None)).ops
    return None if ops is None else ops.forward.namespace


# Dynamo calls it while it traces: tracing into it would guard on what imports and caches hold and
# recompile when they grow. The request is an argument read outside, so Dynamo does guard on that.
# This is what torch.compiler.assume_constant_result sets, without importing Dynamo here.
_namespace_for._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _cached(key: _Key) -> Choice:
    choice = _choices.get(key)
    if choice is None:
        if len(_choices) >= MAX_CHOICES:
            _choices.clear()
        choice = _choices[key] = _decide(*key)
    return choice


def _decide(
    request: str | None,
    device: torch.device,
    dtype: torch.dtype,
    family: str = "depthwise_conv2d",
    refused: str | None = None,
) -> Choice:
    """``refused``: why the CUDA kernels cannot take the call at hand, whose tensors they would take."""
    taken: Backend | None = None
    declined = []
    for backend in sorted(BACKENDS, key=lambda b: b.name != request):  # stable: the request first
        why = backend.declines(device, dtype) or backend.lacks(family)
        if backend.name == "cuda":
            why = why or refused
        if backend.name != request:
            why = why or _gave_up.get((backend.name, device, dtype, family))
        if taken is not None:
            reason = f"{taken.name} comes first" + (" (asked for)" if taken.name == request else "")
            declined.append((backend.name, why or reason))
        elif why is not None:
            declined.append((backend.name, ("asked for, but " if backend.name == request else "") + why))
            if backend.name == request:
                _log.warning("backend %s declines %s tensors of %s: %s", request, device.type, dtype, why)
        else:
            taken = backend
    assert taken is not None  # "torch" never declines
    ops = taken.load()
    if ops is not None:
        importlib.import_module(FAMILIES[family]).register_hooks(ops.forward.namespace)
    return Choice(taken.name, ops, tuple(declined))
