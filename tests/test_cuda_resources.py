"""What nvcc made of the CUDA kernels: registers, spills, shared memory and matrix instructions.

The kernels are compiled for sm_80 and sm_90a, or for all default architectures with
``LKCONV_TEST_ALL_ARCHES=1``; no GPU is needed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARCHES = ("80", "90a", "100", "120") if os.environ.get("LKCONV_TEST_ALL_ARCHES") == "1" else ("80", "90a")
# Source -> how many kernels its tables name: the report must speak of each.
SOURCES = {
    "kernels_direct": 32,
    "kernels_toeplitz": 18,
    "kernels_merge": 4,
    "kernels_group_mix": 52,
    "kernels_group_mix_attention": 28,
}

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@dataclass(frozen=True)
class Resources:
    registers: int
    stack_bytes: int
    spilled_bytes: int


def parse_report(text: str) -> dict[str, Resources]:
    """Kernel -> resources, from what ``ptxas -v`` prints."""
    found = {}
    pattern = (
        r"Compiling entry function '(\S+)'.*?\n.*?Function properties for \S+\n\s*"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*?Used (\d+) registers"
    )
    for name, stack, stores, loads, registers in re.findall(pattern, text):
        found[name] = Resources(int(registers), int(stack), int(stores) + int(loads))
    return found


def demangled(names: list[str]) -> dict[str, str]:
    filt = shutil.which("c++filt")
    if filt is None:
        return {n: n for n in names}
    out = subprocess.run([filt], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return dict(zip(names, (line.split("(")[0] for line in out.splitlines()), strict=True))


@pytest.fixture(scope="session")
def compiled(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[str, str], tuple[Path, dict[str, Resources]]]:
    """(architecture, source) -> cubin and resources, two compilers at a time."""
    folder = tmp_path_factory.mktemp("cubins")
    processes = {}
    found = {}

    def finish(key: tuple[str, str]) -> None:
        process, cubin = processes.pop(key)
        _, report = process.communicate(timeout=1200)
        assert process.returncode == 0, report
        found[key] = (cubin, parse_report(report))

    for arch in ARCHES:
        for source in SOURCES:
            cubin = folder / f"{source}-{arch}.cubin"
            command = ["nvcc", "-std=c++20", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin"]
            command += [f"-I{ROOT / 'csrc'}", str(ROOT / "csrc" / "cuda" / f"{source}.cu"), "-o", str(cubin)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            processes[arch, source] = (process, cubin)
            if len(processes) == 2:
                finish(next(iter(processes)))
    for key in list(processes):
        finish(key)
    return found


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("arch", ARCHES)
def test_no_kernel_spills(compiled, arch: str, source: str) -> None:
    _, resources = compiled[arch, source]
    names = demangled(list(resources))
    assert len(resources) == SOURCES[source]
    spilling = {names[k]: r for k, r in resources.items() if r.spilled_bytes or r.stack_bytes}
    assert not spilling


@pytest.mark.parametrize("arch", ARCHES)
def test_occupancy(compiled, arch: str) -> None:
    """Registers leave two blocks, and one of the weight kernels or of float64, on an SM of 65536."""
    for name, r in compiled[arch, "kernels_toeplitz"][1].items():
        threads, blocks = (512, 1) if "toeplitz_weight" in name else (256, 2)
        assert r.registers * threads * blocks <= 65536, name
    for name, r in compiled[arch, "kernels_direct"][1].items():
        if "direct_forward" in name and "IdLi" not in name:
            assert r.registers <= 80, name  # three blocks of 256 threads
    for source in ("kernels_group_mix", "kernels_group_mix_attention"):
        resources = compiled[arch, source][1]
        for mangled, name in demangled(list(resources)).items():
            blocks = 1 if "<double" in name else 2
            assert resources[mangled].registers * 256 * blocks <= 65536, name


def disassembler() -> str | None:
    """cuobjdump of the toolkit, or the one that comes with Triton."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    for folder in map(Path, sys.path):
        candidate = folder / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump"
        if candidate.is_file():
            return str(candidate)
    return None


@pytest.mark.skipif(disassembler() is None, reason="neither the toolkit nor Triton brings cuobjdump")
@pytest.mark.parametrize("arch", ARCHES)
def test_toeplitz_kernels_use_matrix_instructions(compiled, arch: str) -> None:
    cubin, resources = compiled[arch, "kernels_toeplitz"]
    sass = subprocess.run(
        [str(disassembler()), "-sass", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    functions = re.split(r"Function : ", sass)[1:]
    assert len(functions) == len(resources)
    for text in functions:
        name = text.split("\n", 1)[0].strip()
        assert "HMMA" in text, name
        assert "LDL" not in text and "STL" not in text, f"{name} uses local memory"
        half = "If" not in name.split("toeplitz_", 1)[1]
        assert ("LDSM" in text) == (half or "forward" in name), name
        assert "LDGSTS" in text, f"{name} copies synchronously"
