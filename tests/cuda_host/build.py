"""Builds the host emulator's driver: the CUDA kernels compiled by the C++ compiler, against the shim.

Objects are kept under ``build/cuda_host`` and named after a hash of everything they were compiled from, so
that an unchanged source is compiled once.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "cuda_host"
EMULATOR = ("tests/cuda_host/cuda_shim.cpp", "tests/cuda_host/fiber.cpp")
SOURCES = {
    "driver": (
        "csrc/cuda/kernels_direct.cu",
        "csrc/cuda/kernels_toeplitz.cu",
        "csrc/cuda/planner.cpp",
        "csrc/cuda/planner_direct.cpp",
        "csrc/cuda/planner_toeplitz.cpp",
        "tests/cuda_host/driver.cpp",
        *EMULATOR,
    ),
    "group_mix_driver": (
        "csrc/cuda/kernels_group_mix.cu",
        "csrc/cuda/kernels_group_mix_attention.cu",
        "csrc/cuda/planner_group_mix.cpp",
        "tests/cuda_host/group_mix_driver.cpp",
        *EMULATOR,
    ),
    "merge_driver": ("csrc/cuda/kernels_merge.cu", "tests/cuda_host/merge_driver.cpp", *EMULATOR),
    "faults_driver": ("tests/cuda_host/faults_driver.cpp", *EMULATOR),
}
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")


def compiler() -> str | None:
    """The C++ compiler, or None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def headers_of(path: Path, include: list[Path], seen: dict[Path, None]) -> None:
    """Adds `path` and every project header it includes, directly or not, to `seen`."""
    if path in seen:
        return
    seen[path] = None
    for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
        for folder in [path.parent, *include]:
            if (folder / name).is_file():
                headers_of((folder / name).resolve(), include, seen)
                break


def compile_object(source: Path, include: list[Path], flags: tuple[str, ...]) -> Path:
    """The object of `source`, compiled unless the cache holds it."""
    read: dict[Path, None] = {}
    headers_of(source.resolve(), include, read)
    digest = hashlib.sha256(" ".join([compiler() or "", *flags]).encode())
    for path in read:
        digest.update(path.name.encode() + path.read_bytes())
    target = CACHE / f"{source.stem}-{digest.hexdigest()[:20]}.o"
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}.o")
    folders = [f"-I{folder}" for folder in include]
    command = [str(compiler()), "-std=c++20", *flags, *folders, "-c", "-x", "c++", str(source)]
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    partial.replace(target)
    return target


def build_driver(tree: Path = ROOT, sanitize: bool = True, name: str = "driver") -> Path:
    """A driver of the kernels under `tree`/csrc; unsanitized builds compile faster, for mutation checks."""
    flags = ("-g1", "-Wall", "-Wno-unknown-pragmas", *(("-O1", *SANITIZE) if sanitize else ("-O0",)))
    include = [tree / "csrc", ROOT / "tests" / "cuda_host"]

    def build(source: str) -> Path:
        return compile_object((tree if source.startswith("csrc") else ROOT) / source, include, flags)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(build, SOURCES[name]))
    digest = hashlib.sha256(" ".join(str(o) for o in objects).encode()).hexdigest()[:20]
    driver = CACHE / f"{name}-{digest}"
    if not driver.exists():
        link = [str(compiler()), *(SANITIZE if sanitize else ()), *map(str, objects)]
        partial = driver.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*link, "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        partial.replace(driver)
    return driver
