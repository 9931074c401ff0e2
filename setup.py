"""Build switches of lkconv. Everything that is not a switch lives in pyproject.toml.

Environment variables:
    LKCONV_CUDA            auto (default) | 0 | 1: build the CUDA module. ``auto`` builds it when this
                           torch is a CUDA build and nvcc is found; ``1`` fails with the reason when not.
    TORCH_CUDA_ARCH_LIST   GPU architectures, as for every PyTorch extension.
    MAX_JOBS               parallel compiler processes.
    DEBUG                  1: unoptimised build with debug symbols.
    LKCONV_SANITIZE        1: AddressSanitizer and UndefinedBehaviorSanitizer (tests only).
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = "0x020b000000000000"  # the oldest torch whose stable ABI the modules may call: 2.11
DEFAULT_CUDA_ARCHES = "8.0;9.0a;10.0;12.0+PTX"
# Package -> folder of the source tree, where the two differ: ``triton_kernels`` is another project's name.
RELOCATED = {"lkconv.triton_kernels": "triton_kernels"}


def find_cuda_home() -> str | None:
    """The CUDA toolkit that nvcc itself reports.

    nvcc on PATH may be a wrapper script, so its folder's parent need not be the toolkit;
    ``nvcc --dryrun`` prints the real one as ``TOP``.
    """
    if os.environ.get("CUDA_HOME"):
        return os.environ["CUDA_HOME"]
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    found = re.search(r"^#\$ TOP=(.+)$", dryrun.stdout + dryrun.stderr, re.MULTILINE)
    return str(Path(found.group(1)).resolve()) if found else None


cuda_home = find_cuda_home()
if cuda_home:
    os.environ["CUDA_HOME"] = cuda_home  # before torch.utils.cpp_extension makes its own guess

import pybind11  # noqa: E402
import torch  # noqa: E402
from torch.utils.cpp_extension import (  # noqa: E402
    BuildExtension,
    CppExtension,
    CUDAExtension,
    _get_cuda_arch_flags,
)


def switch(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, default)
    if value not in allowed:
        sys.exit(f"lkconv: {name} must be {', '.join(allowed[:-1])} or {allowed[-1]}, got {value!r}")
    return value


def cuda_decision() -> tuple[bool, str]:
    """Whether to build the CUDA module, and why."""
    wanted = switch("LKCONV_CUDA", "auto", ("auto", "0", "1"))
    if wanted == "0":
        return False, "LKCONV_CUDA=0"
    if not any((ROOT / "csrc" / "cuda").glob("*.cu")):
        reason = "this source tree has no CUDA kernels"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a CPU build"
    elif cuda_home is None:
        reason = "nvcc was not found on PATH and CUDA_HOME is not set"
    elif not (Path(cuda_home) / "bin" / "nvcc").exists():
        reason = f"there is no bin/nvcc under CUDA_HOME={cuda_home}"
    else:
        return True, f"nvcc of {cuda_home}"
    if wanted == "1":
        sys.exit(f"lkconv: LKCONV_CUDA=1, but {reason}")
    return False, reason


def compiler_flags() -> tuple[list[str], list[str]]:
    """Compiler and linker flags. Instruction sets are chosen inside the sources, never here."""
    debug = switch("DEBUG", "0", ("0", "1")) == "1"
    sanitize = switch("LKCONV_SANITIZE", "0", ("0", "1")) == "1"
    flags = ["-std=c++20", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    flags += ["-O0", "-g"] if debug else ["-O3", "-g0"]
    # -ffp-contract=fast lets a*b+c become one FMA; the other fast-math rewrites would lose NaN and Inf.
    flags += ["-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wno-psabi", "-Wno-attributes"]
    link: list[str] = []
    if sys.platform == "linux":
        link += ["-Wl,--as-needed", "-Wl,-z,relro,-z,now"]
        if not debug and not sanitize:
            link.append("-Wl,--strip-debug")
    if sanitize:
        flags += [
            "-fsanitize=address,undefined",
            "-fno-omit-frame-pointer",
            "-fno-sanitize-recover=undefined",
        ]
        link += ["-fsanitize=address,undefined"]
    return flags, link


def cuda_images() -> list[str]:
    """What nvcc is asked for, as torch reads TORCH_CUDA_ARCH_LIST: sm_NN (machine code), compute_NN (PTX)."""
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_CUDA_ARCHES
    found = {re.sub(".*,code=", "", flag) for flag in _get_cuda_arch_flags()}
    return sorted(found, key=kernel_resources().architecture_order)


def kernel_resources():
    """The module of that name, by its path: the package needs what is only about to be built."""
    place = ROOT / "lkconv" / "kernel_resources.py"
    spec = importlib.util.spec_from_file_location("lkconv_kernel_resources", place)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def extensions() -> list:
    flags, link = compiler_flags()
    build_cuda, why = cuda_decision()
    include = [str(ROOT / "csrc"), pybind11.get_include()]
    headers = sources("csrc/*.h", "csrc/cpu/*.h", "csrc/cuda/*.h", "csrc/cuda/*.cuh")
    found = [
        CppExtension(
            "lkconv._C",
            sources("csrc/module.cpp", "csrc/cpu/*.cpp"),
            include_dirs=include,
            extra_compile_args={"cxx": flags},
            extra_link_args=link,
            depends=headers,
        )
    ]
    if build_cuda:
        nvcc_flags = ["-O3", "-std=c++20", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
        nvcc_flags.append(f"-DLKCONV_CUDA_IMAGES={'+'.join(cuda_images())}")  # nvcc splits at commas
        found.append(
            CUDAExtension(
                "lkconv._C_cuda",
                sources("csrc/cuda/*.cu", "csrc/cuda/*.cpp"),
                include_dirs=include,
                extra_compile_args={"cxx": [*flags, "-DUSE_CUDA"], "nvcc": nvcc_flags},
                extra_link_args=link,
                depends=headers,
            )
        )
    arches = os.environ.get("TORCH_CUDA_ARCH_LIST", "-") if build_cuda else "-"
    print(
        f"lkconv: torch {torch.__version__}, {platform.machine()}, "
        f"CUDA module {'yes' if build_cuda else 'no'} ({why}), architectures {arches}, "
        f"jobs {os.environ.get('MAX_JOBS', 'one per core')}, flags {' '.join(flags)}",
        flush=True,
    )
    return found


class BuildInPlace(BuildExtension):
    """Keeps objects between editable installs and completes the source tree that in-place builds run from."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.in_source_tree = self.inplace or self.editable_mode
        if self.in_source_tree:
            tag = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
            self.build_temp = str(
                ROOT / "build" / f"in-place-{tag}"
            )  # pip's own would be a new folder each time

    def run(self) -> None:
        super().run()
        for extension in self.extensions:
            if extension.name == "lkconv._C_cuda":
                module = Path(self.get_ext_fullpath(extension.name))
                print(f"lkconv: {kernel_resources().write(module, cuda_home)}", flush=True)
        if self.in_source_tree:
            link_packages()


def link_packages() -> None:
    """Links packages that live outside lkconv/ into it, so that the bare source tree can be imported."""
    for package, folder in RELOCATED.items():
        place = ROOT / package.replace(".", "/")
        if place.is_symlink() or not (ROOT / folder).is_dir():
            continue
        try:
            place.symlink_to(os.path.relpath(ROOT / folder, place.parent), target_is_directory=True)
        except OSError as error:  # Windows without the privilege; an editable install needs no link
            print(f"lkconv: {package} is importable from installed copies alone ({error})")


def packages() -> dict[str, str]:
    """Every package to install and its folder."""
    moved = [pattern for package in RELOCATED for pattern in (package, f"{package}.*")]
    found = {
        p: p.replace(".", "/")
        for p in find_packages(str(ROOT), include=["lkconv", "lkconv.*"], exclude=moved)
    }
    for package, folder in RELOCATED.items():
        if (ROOT / folder / "__init__.py").exists():
            found[package] = folder
            for inner in find_packages(str(ROOT / folder)):
                found[f"{package}.{inner}"] = f"{folder}/{inner.replace('.', '/')}"
    return found


setup(
    packages=list(packages()),
    package_dir=packages(),
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildInPlace.with_options(use_ninja=True)},
)
