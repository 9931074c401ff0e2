"""What nvcc made of the CUDA kernels: registers, spills, shared memory and matrix instructions.

Read by cuobjdump out of the built module, for every architecture that it was compiled for: no GPU is needed,
and nothing is compiled again.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lkconv import backends, kernel_resources
from lkconv.kernel_resources import KernelResources

module, reason = backends.cuda_module()
cuobjdump = kernel_resources.disassembler()
needs_module = [
    pytest.mark.skipif(module is None, reason=reason or "-"),
    pytest.mark.skipif(cuobjdump is None, reason="neither the toolkit nor Triton brings cuobjdump"),
    pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt is not on PATH: names are mangled"),
]
ARCHITECTURES = [a for a in module.architectures() if a.startswith("sm_")] if module else ["none"]
SYSTEM_SHARED = 1024  # bytes of a block that belong to the system, from sm_90 on
REGISTERS = 65536  # of an SM


@pytest.fixture(scope="session")
def kernels() -> dict[str, list[KernelResources]]:
    """Architecture -> its kernels."""
    rows = kernel_resources.measure(Path(module.__file__), str(cuobjdump))
    return {a: [k for k in rows if k.architecture == a] for a in {k.architecture for k in rows}}


def family(kernel: KernelResources) -> str:
    return kernel.kernel.split("<")[0]


def fixed_width_registers(kernel: str) -> int:
    """Three blocks of 256 threads an SM; of the direct kernels of fixed width, and for a stride of 2 (-2),
    five of 128, or four at 7."""
    width = int(kernel.rsplit(",", 1)[1].strip(" >()int"))
    return 80 if width in (-1, 0) else 96 if width < 7 else 128


def on(parameter: Any) -> Any:
    for mark in needs_module:
        parameter = mark(parameter)
    return parameter


@on
def test_the_module_holds_what_it_says(kernels) -> None:
    assert sorted(kernels) == sorted(ARCHITECTURES)


@on
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills(kernels, architecture: str) -> None:
    assert len(kernels[architecture]) == len(module.kernels())
    assert not [k for k in kernels[architecture] if k.stack_bytes]


@on
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_memory_is_what_the_planner_counts(kernels, architecture: str) -> None:
    """Every byte is asked for at the launch: a static array would come on top of the planner's count."""
    system = SYSTEM_SHARED if kernel_resources.architecture_order(architecture)[1] >= 90 else 0
    assert {k.shared_bytes for k in kernels[architecture]} == {system}


@on
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_occupancy(kernels, architecture: str) -> None:
    """Registers leave two blocks, and one of the weight kernels or of float64, on an SM."""
    checked = set()
    for k in kernels[architecture]:
        double = "<double" in k.kernel
        if family(k).startswith("direct") or family(k) in ("merge_depthwise_kernels", "pack"):
            if family(k) == "direct_forward" and not double:
                assert k.registers <= fixed_width_registers(k.kernel), k
        elif family(k) == "toeplitz_weight":
            assert k.registers * 512 <= REGISTERS, k
        else:
            assert k.registers * 256 * (1 if double else 2) <= REGISTERS, k
        checked.add(family(k))
    assert {"direct_forward", "toeplitz_forward", "toeplitz_weight", "attention_forward"} <= checked


@on
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_toeplitz_kernels_use_matrix_instructions(architecture: str) -> None:
    path = module.__file__
    usage = subprocess.run([str(cuobjdump), "-res-usage", path], capture_output=True, text=True, check=True)
    names = sorted(set(re.findall(r"Function (_Z\w*toeplitz_(?:forward|weight)\w*):", usage.stdout)))
    command = [str(cuobjdump), "-sass", "-arch", architecture, "-fun", ",".join(names), path]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = re.split(r"Function : ", sass)[1:]
    assert len(functions) == len(names) == 18
    for text in functions:
        name = text.split("\n", 1)[0].strip()
        assert "HMMA" in text, name
        assert "LDL" not in text and "STL" not in text, f"{name} uses local memory"
        half = "If" not in name.split("toeplitz_", 1)[1]
        assert ("LDSM" in text) == (half or "forward" in name), name
        assert "LDGSTS" in text, f"{name} copies synchronously"


# --- the report that setup.py keeps beside the module -----------------------------------------------------

USAGE = """
Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function _ZN6lkconv4cuda4packIfEEvNS0_10PackParamsE:
  REG:40 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:1112 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin ptx code:
================
arch = sm_120
compressed

Fatbin elf code:
================
arch = sm_80
 Function _ZN6lkconv4cuda4packIfEEvNS0_10PackParamsE:
  REG:38 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:472 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
MANGLED = "_ZN6lkconv4cuda4packIfEEvNS0_10PackParamsE"


def tool(path: Path, answer: str, status: int = 0) -> str:
    path.write_text(f"#!/bin/sh\ncat <<'EOF'\n{answer}\nEOF\nexit {status}\n")
    path.chmod(0o755)
    return str(path)


def toolkit(tmp_path: Path, answer: str, status: int = 0) -> str:
    (tmp_path / "bin").mkdir()
    tool(tmp_path / "bin" / "cuobjdump", answer, status)
    return str(tmp_path)


def test_reading_cuobjdump() -> None:
    assert kernel_resources.parse(USAGE) == [
        KernelResources(MANGLED, "sm_90a", 40, 1024, 0),
        KernelResources(MANGLED, "sm_80", 38, 0, 24),
    ]
    assert kernel_resources.parse("no device code") == []


def test_the_report_is_written_and_read(tmp_path: Path) -> None:
    extension = tmp_path / "_C_cuda.so"
    line = kernel_resources.write(extension, toolkit(tmp_path, USAGE))
    assert line == f"kernel resources: 2 entries in {kernel_resources.FILE_NAME}"
    rows, why = kernel_resources.read(extension)
    assert why == "" and [k.architecture for k in rows] == ["sm_80", "sm_90a"]
    assert {k.kernel for k in rows} == {"pack<float>" if shutil.which("c++filt") else MANGLED}
    lines = kernel_resources.table(rows).splitlines()
    assert lines[1].split() == ["kernel", "sm_80", "sm_90a"]
    assert lines[2].split()[1:] == ["38", "/", "0", "/", "24", "40", "/", "1024", "/", "0"]


def test_a_tool_that_fails_leaves_no_report(tmp_path: Path) -> None:
    """Not even that of an earlier build: it would speak of other kernels."""
    extension = tmp_path / "_C_cuda.so"
    place = tmp_path / kernel_resources.FILE_NAME
    place.write_text("[]")
    line = kernel_resources.write(extension, toolkit(tmp_path, "", status=1))
    assert line.startswith("no report of kernel resources") and not place.exists()
    rows, why = kernel_resources.read(extension)
    assert rows == () and "is not beside the module" in why


def test_without_cuobjdump_the_build_says_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(kernel_resources, "disassembler", lambda home: None)
    line = kernel_resources.write(tmp_path / "_C_cuda.so", None)
    assert "there is no cuobjdump in the toolkit, on PATH or with Triton" in line


@pytest.mark.parametrize("content", ["", "{", "[[1]]", json.dumps({"kernel": 1}), "3"])
def test_a_damaged_report_is_a_reason(tmp_path: Path, content: str) -> None:
    (tmp_path / kernel_resources.FILE_NAME).write_text(content)
    rows, why = kernel_resources.read(tmp_path / "_C_cuda.so")
    assert rows == () and "cannot be read" in why


def test_order_of_architectures() -> None:
    names = ["compute_120", "sm_120", "sm_100", "sm_90a", "sm_80"]
    assert sorted(names, key=kernel_resources.architecture_order) == [*names[:0:-1], names[0]]
