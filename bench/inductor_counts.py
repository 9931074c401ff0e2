"""What ``torch.compile`` made of a function: kernels and the bytes they read and write."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class Compiled:
    """Kernels of all graphs compiled inside :func:`counting`, and the bytes of their inputs and outputs."""

    kernels: int = 0
    bytes: int = 0


@contextmanager
def counting() -> Iterator[Compiled]:
    """Counts what Inductor compiles inside: every kernel it generates and every library call.

    Inductor counts when its log of metrics is on, and not when a graph comes from its cache: the log is on
    here, without being shown, and the cache off.
    """
    from torch._functorch import config as aot_config
    from torch._inductor import compile_fx, config, metrics
    from torch._inductor.scheduler import NopKernelSchedulerNode

    log, found = compile_fx.inductor_metrics_log, Compiled()
    level, propagates = log.level, log.propagate
    metrics.reset()
    log.setLevel(logging.INFO)
    log.propagate = False
    handlers, log.handlers = log.handlers, [logging.NullHandler()]
    try:
        with config.patch(fx_graph_cache=False), aot_config.patch(enable_autograd_cache=False):
            yield found
    finally:
        log.handlers, log.propagate = handlers, propagates
        log.setLevel(level)
        kernels = [n for n, _ in metrics.nodes_num_elem if not isinstance(n, NopKernelSchedulerNode)]
        found.kernels, found.bytes = len(kernels), metrics.num_bytes_accessed
        metrics.reset()


def compiled(function):
    """``function`` under torch.compile as a benchmark wants it: specialised, and forgetting earlier shapes.

    Without the reset, a second shape would be compiled with symbolic sizes and a ninth not at all.
    """
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)
