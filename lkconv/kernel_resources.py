"""What nvcc made of the CUDA kernels: registers, shared memory and stack, read from the compiled module.

``setup.py`` runs :func:`write` once the module is linked and keeps the report beside it;
:func:`lkconv.build_info` reads it, so no GPU and no toolkit are needed later. This file imports nothing of
lkconv: ``setup.py`` loads it before the package can be imported.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FILE_NAME = "_C_cuda_resources.json"


@dataclass(frozen=True)
class KernelResources:
    """One kernel in the machine code of one architecture.

    ``registers`` of a thread; ``shared_bytes`` of a block that the compiler laid out (launches add what
    their plan asks for; from sm_90 on, 1024 bytes are the system's); ``stack_bytes`` of a thread in local
    memory, where spilled registers go: 0 means that nothing was spilled.
    """

    kernel: str
    architecture: str
    registers: int
    shared_bytes: int
    stack_bytes: int


def disassembler(cuda_home: str | None = None) -> str | None:
    """cuobjdump of the toolkit, or else the one that comes with Triton."""
    if cuda_home and (Path(cuda_home) / "bin" / "cuobjdump").is_file():
        return str(Path(cuda_home) / "bin" / "cuobjdump")
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    for folder in (triton.submodule_search_locations or ()) if triton else ():
        path = Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if path.is_file():
            return str(path)
    return None


def parse(text: str) -> list[KernelResources]:
    """What ``cuobjdump -res-usage`` printed, under the names in the machine code."""
    found = []
    for section in re.split(r"^arch = ", text, flags=re.MULTILINE)[1:]:
        architecture = section.split(maxsplit=1)[0]
        usage = re.findall(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", section)
        for name, registers, stack, shared, local in usage:
            local_bytes = int(stack) + int(local)
            found.append(KernelResources(name, architecture, int(registers), int(shared), local_bytes))
    return found


def readable(names: Sequence[str]) -> list[str]:
    """``toeplitz_weight<Half, 4, 4>`` for ``_ZN6lkconv4cuda15toeplitz_weight...``, where c++filt exists."""
    tool = shutil.which("c++filt")
    if tool is None:
        return list(names)
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    signatures = done.stdout.replace("lkconv::cuda::", "").splitlines()
    return [signature.removeprefix("void ").split("(")[0] for signature in signatures]


def measure(module: Path, cuobjdump: str) -> list[KernelResources]:
    """Every kernel of a compiled module for every architecture, sorted by name.

    Raises:
        RuntimeError: cuobjdump failed or found no kernel.
    """
    done = subprocess.run([cuobjdump, "-res-usage", str(module)], capture_output=True, text=True)
    found = parse(done.stdout)
    if done.returncode or not found:
        said = (done.stderr.strip() or "no kernel found").splitlines()[-1]
        raise RuntimeError(f"{cuobjdump} -res-usage {module.name} failed: {said}")
    names = readable([k.kernel for k in found])
    rows = [KernelResources(**{**asdict(k), "kernel": name}) for k, name in zip(found, names, strict=True)]
    return sorted(rows, key=lambda k: (k.kernel, architecture_order(k.architecture)))


def architecture_order(name: str) -> tuple[bool, int, str]:
    """Sorts sm_80, sm_90a, sm_100, compute_120: machine code first, then by number."""
    kind, number = name.split("_")
    return kind != "sm", int(re.sub(r"\D", "", number)), number


def write(module: Path, cuda_home: str | None) -> str:
    """Keeps the report beside ``module``, or removes an older one; returns one line that says which."""
    place = module.with_name(FILE_NAME)
    place.unlink(missing_ok=True)  # an older report would speak of other kernels
    cuobjdump = disassembler(cuda_home)
    if cuobjdump is None:
        return "no report of kernel resources: there is no cuobjdump in the toolkit, on PATH or with Triton"
    try:
        rows = measure(module, cuobjdump)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        return f"no report of kernel resources: {error}"
    place.write_text(json.dumps([list(asdict(k).values()) for k in rows], separators=(",", ":")) + "\n")
    return f"kernel resources: {len(rows)} entries in {place.name}"


def read(module: Path) -> tuple[tuple[KernelResources, ...], str]:
    """The report beside ``module``, or nothing and the reason."""
    place = module.with_name(FILE_NAME)
    try:
        return tuple(KernelResources(*row) for row in json.loads(place.read_text())), ""
    except FileNotFoundError:
        return (), f"{place.name} is not beside the module: cuobjdump was not found when it was built"
    except (OSError, ValueError, TypeError) as error:
        return (), f"{place.name} cannot be read: {error}"


def table(rows: Sequence[KernelResources]) -> str:
    """A line for each kernel, a column for each architecture."""
    architectures = sorted({k.architecture for k in rows}, key=architecture_order)
    cells = {(k.kernel, k.architecture): k for k in rows}
    kernels = list(dict.fromkeys(k.kernel for k in rows))
    width = max(map(len, kernels))
    lines = [
        "CUDA kernels: registers a thread / static shared bytes a block / stack bytes a thread (spills)",
        " ".join([f"{'kernel':{width}}", *(f"{a:>13}" for a in architectures)]),
    ]
    for kernel in kernels:
        line = [f"{kernel:{width}}"]
        for architecture in architectures:
            k = cells.get((kernel, architecture))
            text = f"{k.registers} / {k.shared_bytes} / {k.stack_bytes}" if k else "-"
            line.append(f"{text:>13}")
        lines.append(" ".join(line))
    return "\n".join(lines)
