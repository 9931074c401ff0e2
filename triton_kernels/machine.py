"""What the planner should know of a torch device."""

from __future__ import annotations

import functools
import os
from dataclasses import replace

import torch

from .planner import A100, B200, H200, MI300, XPU, Machine


def is_available(device: torch.device | str | int | None = None) -> tuple[bool, str]:
    """Whether the Triton kernels can run on ``device``, and if not, why.

    With ``TRITON_INTERPRET=1`` set before the first import, CPU tensors are accepted (not bfloat16).
    """
    try:
        import triton
    except ImportError as error:
        return False, f"triton cannot be imported ({error})"
    from .launch import interpreting

    kind = torch.device("cuda" if device is None else device)
    if interpreting():
        return True, f"triton {triton.__version__}, interpreted (TRITON_INTERPRET=1)"
    if kind.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return False, "TRITON_INTERPRET=1 was set after lkconv.triton_kernels was imported"
        return False, "Triton runs on GPUs; set TRITON_INTERPRET=1 to interpret its kernels on CPU tensors"
    if kind.type not in ("cuda", "xpu"):
        return False, f"Triton has no backend for device type {kind.type!r}"
    module = torch.get_device_module(kind.type)
    if not module.is_available():
        return False, f"torch {torch.__version__} finds no usable {kind.type} device"
    if kind.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(kind)
        if capability < (8, 0):
            return False, f"compute capability {capability[0]}.{capability[1]} is older than 8.0"
    return True, f"triton {triton.__version__}"


@functools.lru_cache
def machine_of(device: torch.device) -> Machine:
    """The device's planner entry: a table row by family, with the multiprocessors it really has."""
    if device.type == "cpu":
        return Machine("interpreter")
    if device.type == "xpu":
        return XPU
    if not torch.cuda.is_available():
        return H200
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return replace(MI300, multiprocessors=properties.multi_processor_count)
    major, minor = properties.major, properties.minor
    family = {8: A100, 9: H200, 10: B200}.get(major, A100)
    shared = 99 * 1024 if (major, minor) in ((8, 6), (8, 9)) or major == 12 else family.shared_bytes
    return replace(family, multiprocessors=properties.multi_processor_count, shared_bytes=shared)


@functools.lru_cache
def machine_name(device: torch.device) -> str:
    """Names device, driver stack and compiler: a choice of plan holds for this combination only."""
    import triton

    if device.type not in ("cuda", "xpu") or not torch.get_device_module(device.type).is_available():
        name = device.type
    else:
        name = torch.get_device_module(device.type).get_device_name(device)
    return f"{name}, triton {triton.__version__}"
