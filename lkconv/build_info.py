"""What this installation can run: compiled instruction sets, GPU architectures, modules and reasons."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch

from lkconv import _C, backends
from lkconv._version import __version__


@dataclass(frozen=True)
class BuildInfo:
    """Result of :func:`build_info`; ``str()`` is a report of one line per fact."""

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

    def __str__(self) -> str:
        cuda = "built" if self.cuda_module else f"none ({self.cuda_reason})"
        triton = "importable" if self.triton else f"none ({self.triton_reason})"
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
                f"Triton kernels: {triton}",
            )
        )


def build_info() -> BuildInfo:
    """What was compiled, for which instruction sets and GPU architectures, and what this machine has.

    A module that cannot be loaded is no error: the reason stands in the result.
    """
    cuda, cuda_reason = backends.cuda_module()
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
        gpu_architectures=tuple(getattr(cuda, "architectures", list)()),
        triton=not triton_reason,
        triton_reason=triton_reason,
    )


def _import_reason(name: str) -> str:
    try:
        importlib.import_module(name)
    except ImportError as error:
        return str(error)
    return ""
