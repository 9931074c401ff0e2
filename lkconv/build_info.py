"""What this installation can run: compiled instruction sets, GPU architectures, modules and reasons."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lkconv import _C, backends, kernel_resources
from lkconv._version import __version__


@dataclass(frozen=True)
class BuildInfo:
    """Result of :func:`build_info`; ``str()`` is a report of one line per fact.

    ``gpu_architectures`` are those of machine code (``sm_NN``) and of PTX (``compute_NN``). ``kernels`` has
    an entry for each CUDA kernel and architecture; where it is empty, ``kernels_reason`` says why.
    """

    version: str
    torch: str
    compiler: str
    isas_compiled: tuple[str, ...]
    isa_detected: str
    isa_active: str
    cuda_module: bool
    cuda_reason: str
    gpu_architectures: tuple[str, ...]
    triton: bool
    triton_reason: str
    kernels: tuple[kernel_resources.KernelResources, ...] = field(repr=False)
    kernels_reason: str

    def __str__(self) -> str:
        cuda = "built" if self.cuda_module else f"none ({self.cuda_reason})"
        triton = "importable" if self.triton else f"none ({self.triton_reason})"
        spilling = len({k.kernel for k in self.kernels if k.stack_bytes})
        kernels = f"{len({k.kernel for k in self.kernels})} CUDA kernels, {spilling} of them spill registers"
        return "\n".join(
            (
                f"lkconv {self.version}",
                f"torch: {self.torch}",
                f"compiler: {self.compiler}",
                f"CPU ISAs compiled: {', '.join(self.isas_compiled)}",
                f"CPU ISA detected: {self.isa_detected}",
                f"CPU ISA active: {self.isa_active}",
                f"CUDA module: {cuda}",
                f"GPU architectures: {', '.join(self.gpu_architectures) or 'none'}",
                f"GPU kernel resources: {kernels if self.kernels else f'none ({self.kernels_reason})'}",
                f"Triton kernels: {triton}",
            )
        )


def build_info() -> BuildInfo:
    """What was compiled, for which instruction sets and GPU architectures, and what this machine has.

    A module that cannot be loaded is no error: the reason stands in the result.
    """
    module, cuda_reason = backends.cuda_module()
    cuda: Any = module
    kernels, kernels_reason = kernel_resources.read(Path(cuda.__file__)) if cuda else ((), cuda_reason)
    triton_reason = _import_reason("triton") or _import_reason("lkconv.triton_kernels")
    return BuildInfo(
        version=__version__,
        torch=f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        compiler=_C.compiler(),
        isas_compiled=tuple(_C.compiled_isas()),
        isa_detected=_C.detected_isa(),
        isa_active=_C.active_isa(),
        cuda_module=cuda is not None,
        cuda_reason=cuda_reason,
        gpu_architectures=tuple(cuda.architectures()) if cuda else (),
        triton=not triton_reason,
        triton_reason=triton_reason,
        kernels=kernels,
        kernels_reason=kernels_reason,
    )


def _import_reason(name: str) -> str:
    try:
        importlib.import_module(name)
    except ImportError as error:
        return str(error)
    return ""
