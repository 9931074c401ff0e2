"""What happens where Triton cannot compile a kernel: the reason is kept and something else computes the call.

A plan that does not compile is left out and the next one runs (``tuning.py``). Where no plan is left, the
backend declines such calls from then on (:func:`lkconv.backends.give_up`, and ``lkconv.explain`` says why)
and plain PyTorch computes this one; unless Triton was asked for by name: then the error is the caller's.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lkconv import backends

# Modules in which only compilation happens; launching is in triton.backends.<vendor>.driver.
COMPILING = re.compile(r"triton\.(compiler\b|runtime\.build$|backends\.\w+\.compiler$)")
ASKED_FOR = (
    "Backend triton was asked for by name: without use_backend('triton') or LKCONV_BACKEND=triton, "
    "another backend computes such calls."
)
SUMMARY = 300  # characters of a message in logs and reasons; the exception carries all of it


class CannotCompile(RuntimeError):
    """Triton compiled no kernel for a call; the message and ``__cause__`` carry what the compiler said."""


def compile_failure(error: BaseException) -> str | None:
    """What the compiler said if ``error`` is a failure to compile a kernel, None for every other error.

    Triton's own errors are told by their class. Passes of its compiler, assemblers and the C compiler also
    raise RuntimeError, CalledProcessError and others: those are told by where they were raised. What the
    driver answers ("Triton Error [CUDA]: ...") is no failure to compile: it may belong to an earlier kernel.
    """
    from triton.errors import TritonError
    from triton.runtime.errors import InterpreterError

    if isinstance(error, (CannotCompile, InterpreterError)) or str(error).startswith("Triton Error ["):
        return None
    if isinstance(error, TritonError) or raised_while_compiling(error):
        return f"{type(error).__name__}: {error}"
    return None


def raised_while_compiling(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None:
        if COMPILING.match(trace.tb_frame.f_globals.get("__name__", "")):
            return True
        trace = trace.tb_next
    return False


def summary(message: str) -> str:
    """Both ends of a long message on one line: what is wrong comes first or, after a listing, last."""
    line, half = " ".join(message.split()), SUMMARY // 2
    return line if len(line) <= SUMMARY else f"{line[:half]} ... {line[-half:]}"


def guarded(name: str, family: str, function: Callable, plain: Callable | None) -> Callable:
    """The op ``function``, with ``plain`` in its place for calls that Triton cannot compile.

    An op without a plain form raises :class:`lkconv.backends.GaveUp`: its callers take the next backend.
    """

    @functools.wraps(function)
    def op(*args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:
            failure = str(error) if isinstance(error, CannotCompile) else compile_failure(error)
            if failure is None:
                raise
            message = f"Triton cannot compile lkconv_triton::{name}: {failure}"
            if backends.requested() == "triton":
                raise CannotCompile(f"{message}\n{ASKED_FOR}") from error
            place = first_tensor(args)
            backends.give_up("triton", place.device, place.dtype, family, summary(message))
            if plain is None:
                raise backends.GaveUp(message) from error
        return plain(*args)

    # torch 2.11 reads the schema from the annotations, and would look their names up in this module.
    op.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    return op


def first_tensor(args: tuple[Any, ...]) -> Tensor:
    """The tensor that an op's backend was chosen by."""
    first = args[0]
    return first if isinstance(first, torch.Tensor) else first[0]
