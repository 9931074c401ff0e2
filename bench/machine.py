"""What a row was measured on, and with which versions."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

import lkconv
from lkconv import _C


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.machine()


def l2_bytes(device: str) -> int:
    """Size of the cache that rotating inputs must exceed on a GPU."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def machine(device: str) -> dict:
    """CPU model, instruction sets and threads; on a GPU its name, architecture and clock as well."""
    facts = {
        "device": device,
        "cpu": cpu_model(),
        "isa": _C.active_isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = properties.name
        facts["arch"] = f"sm_{properties.major}{properties.minor}"
        facts["multiprocessors"] = properties.multi_processor_count
        facts["l2_bytes"] = l2_bytes(device)
    return facts


def _git_commit() -> str | None:
    """The commit of this source tree, with ``-dirty`` for uncommitted changes; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def versions() -> dict:
    facts = {
        "torch": torch.__version__,
        "lkconv": getattr(lkconv, "__version__", "unknown"),
        "commit": _git_commit(),
        "python": platform.python_version(),
    }
    if torch.version.cuda is not None and torch.cuda.is_available():
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


def describe(facts: dict) -> str:
    name = facts.get("gpu", f"{facts['cpu']}, {facts['threads']} threads")
    return f"{name}; lkconv {facts.get('arch', facts['isa'])}, torch {facts['torch_isa']}"
