"""Packaging: the switches of setup.py, what an sdist and an install hold, what the compiled module needs."""

import importlib.util
import os
import shutil
import stat
import sys
import tarfile
from pathlib import Path

import pytest
import setuptools
import torch

import lkconv._C
from processes import ROOT, exclusive, run

EXTENSION = Path(lkconv._C.__file__)
TARGETS = ("demo", "test", "bench", "lint", "clean")


@pytest.fixture
def load_setup(monkeypatch):
    """Runs setup.py up to its call of setup() and returns the module and that call's arguments."""

    def load():
        passed = {}
        monkeypatch.setattr(setuptools, "setup", passed.update)
        for name in ("CUDA_HOME", "TORCH_CUDA_ARCH_LIST"):  # setup.py may set them: restored after the test
            monkeypatch.setenv(name, os.environ.get(name, ""))
        spec = importlib.util.spec_from_file_location("lkconv_setup", ROOT / "setup.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setenv("LKCONV_CUDA", os.environ.get("LKCONV_CUDA", "0"))
        monkeypatch.chdir(ROOT)
        spec.loader.exec_module(module)
        return module, passed

    return load


@pytest.fixture
def cuda_tree(load_setup, monkeypatch, tmp_path):
    """setup.py in a tree with CUDA sources, a CUDA build of torch and a toolkit with nvcc."""
    module, _ = load_setup()
    for file in ("csrc/cuda/kernels.cu", "toolkit/bin/nvcc"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "cuda_home", str(tmp_path / "toolkit"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("LKCONV_CUDA", "auto")
    return module


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_auto_builds_cuda_when_everything_is_there(cuda_tree):
    build, why = cuda_tree.cuda_decision()
    assert build and str(cuda_tree.ROOT) in why


def break_sources(module, monkeypatch):
    shutil.rmtree(module.ROOT / "csrc")


def break_torch(module, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)


def break_path(module, monkeypatch):
    monkeypatch.setattr(module, "cuda_home", None)


def break_toolkit(module, monkeypatch):
    (module.ROOT / "toolkit/bin/nvcc").unlink()


@pytest.mark.parametrize(
    ("breaks", "reason"),
    [
        (break_sources, "no CUDA kernels"),
        (break_torch, "is a CPU build"),
        (break_path, "nvcc was not found"),
        (break_toolkit, "no bin/nvcc under CUDA_HOME"),
    ],
)
def test_without_one_of_them_auto_builds_none_and_1_fails_with_the_reason(
    cuda_tree, monkeypatch, breaks, reason
):
    breaks(cuda_tree, monkeypatch)
    build, why = cuda_tree.cuda_decision()
    assert not build and reason in why
    monkeypatch.setenv("LKCONV_CUDA", "1")
    with pytest.raises(SystemExit, match=f"LKCONV_CUDA=1, but .*{reason}"):
        cuda_tree.cuda_decision()


def test_0_never_builds_cuda(cuda_tree, monkeypatch):
    monkeypatch.setenv("LKCONV_CUDA", "0")
    assert cuda_tree.cuda_decision() == (False, "LKCONV_CUDA=0")


def test_a_wrong_switch_ends_the_build_with_one_clear_line():
    done = run([sys.executable, "setup.py", "--version"], env={"LKCONV_CUDA": "maybe"})
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "lkconv: LKCONV_CUDA must be auto, 0 or 1, got 'maybe'" in done.stderr


@pytest.mark.parametrize(
    ("asked", "images"),
    [
        ("", ["sm_80", "sm_90a", "sm_100", "sm_120", "compute_120"]),
        ("9.0a", ["sm_90a"]),
        ("10.0 8.6+PTX", ["sm_86", "sm_100", "compute_86"]),
    ],
)
def test_the_module_is_told_what_nvcc_is_asked_for(load_setup, monkeypatch, asked, images):
    module, _ = load_setup()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert module.cuda_images() == images


def test_the_report_of_kernel_resources_goes_where_the_module_goes(load_setup, monkeypatch, tmp_path):
    """Into the tree that wheels are made from, or into the source tree for an editable install."""
    module, _ = load_setup()
    resources = module.kernel_resources()
    usage = "arch = sm_80\n Function kernel:\n  REG:8 STACK:0 SHARED:0 LOCAL:0\n"
    script(tmp_path / "toolkit/bin/cuobjdump", f"cat <<'EOF'\n{usage}EOF")
    monkeypatch.setattr(module, "cuda_home", str(tmp_path / "toolkit"))
    monkeypatch.setattr(module.BuildExtension, "run", lambda self: None)
    command = module.BuildInPlace(setuptools.Distribution({"ext_modules": [], "name": "lkconv"}))
    command.ensure_finalized()
    command.build_lib, command.in_source_tree = str(tmp_path / "lib"), False
    command.extensions = [setuptools.Extension("lkconv._C_cuda", ["kernel.cu"])]
    (tmp_path / "lib/lkconv").mkdir(parents=True)
    command.run()
    rows, _ = resources.read(tmp_path / "lib/lkconv/_C_cuda.so")
    assert [(k.kernel, k.architecture, k.registers) for k in rows] == [("kernel", "sm_80", 8)]


@pytest.mark.parametrize("name", ["DEBUG", "LKCONV_SANITIZE"])
def test_flag_switches_reject_other_values(load_setup, monkeypatch, name):
    module, _ = load_setup()
    monkeypatch.setenv(name, "maybe")
    with pytest.raises(SystemExit, match=f"{name} must be 0 or 1, got 'maybe'"):
        module.compiler_flags()


def test_setup_prints_the_configuration(load_setup, capsys):
    load_setup()
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    assert "CUDA module no (LKCONV_CUDA=0)" in printed and "-std=c++20" in printed


def test_nvcc_behind_a_wrapper_is_found(load_setup, monkeypatch, tmp_path):
    module, _ = load_setup()
    toolkit = tmp_path / "toolkit"
    real = script(toolkit / "bin" / "nvcc", f'echo "#$ _SPACE_= " >&2; echo "#$ TOP={toolkit}/bin/.." >&2')
    script(tmp_path / "elsewhere" / "nvcc", f'exec {real} "$@"')
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'elsewhere'}:/bin:/usr/bin")
    assert module.find_cuda_home() == str(toolkit)
    monkeypatch.setenv("CUDA_HOME", "/somewhere/else")
    assert module.find_cuda_home() == "/somewhere/else"


def test_no_nvcc_is_no_error(load_setup, monkeypatch, tmp_path):
    module, _ = load_setup()
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module.find_cuda_home() is None


def test_flags_are_portable(load_setup, monkeypatch):
    module, _ = load_setup()
    flags, link = module.compiler_flags()
    assert not [f for f in flags if f.startswith(("-march", "-mtune", "-mavx", "-ffast-math", "-Ofast"))]
    assert f"-DTORCH_TARGET_VERSION={module.TORCH_TARGET}" in flags and "-O3" in flags
    assert not [f for f in link if "rpath" in f]
    monkeypatch.setenv("DEBUG", "1")
    assert {"-O0", "-g"} <= set(module.compiler_flags()[0])


def python_files(folder: Path) -> set[str]:
    found = (p.relative_to(folder) for p in folder.rglob("*.py") if not p.is_symlink())
    return {str(p) for p in found if "__pycache__" not in p.parts and p.parts[0] != "triton_kernels"}


def test_every_python_file_is_installed(load_setup, tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    with exclusive("sdist"):  # both write lkconv.egg-info
        done = run(command, env={"LKCONV_CUDA": "0"})
    assert done.returncode == 0, done.stderr
    assert python_files(tmp_path / "lkconv") == python_files(ROOT / "lkconv")
    if (ROOT / "triton_kernels" / "__init__.py").exists():
        installed = tmp_path / "lkconv" / "triton_kernels"
        assert python_files(installed) == python_files(ROOT / "triton_kernels")
    assert {p.name for p in tmp_path.iterdir()} == {"lkconv"}, "nothing else at the top level"


def test_packages_outside_lkconv_are_relocated(load_setup, monkeypatch, tmp_path):
    module, _ = load_setup()
    for folder in ("lkconv", "lkconv/inner", "triton_kernels", "triton_kernels/deeper", "tests"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    expected = {
        "lkconv": "lkconv",
        "lkconv.inner": "lkconv/inner",
        "lkconv.triton_kernels": "triton_kernels",
        "lkconv.triton_kernels.deeper": "triton_kernels/deeper",
    }
    assert module.packages() == expected
    module.link_packages()
    link = tmp_path / "lkconv" / "triton_kernels"
    assert link.resolve() == tmp_path / "triton_kernels" and not os.path.isabs(os.readlink(link))
    module.link_packages()  # a second build finds the link
    assert module.packages() == expected, "the link is not a second copy"


@pytest.fixture(scope="module")
def sdist_names(tmp_path_factory) -> set[str]:
    """Names inside an sdist of this tree, without the leading folder."""
    out = tmp_path_factory.mktemp("sdist")
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    with exclusive("sdist"):
        done = run([sys.executable, "-c", code, str(out)], env={"LKCONV_CUDA": "0"})
    assert done.returncode == 0, done.stderr[-3000:]
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        return {name.partition("/")[2] for name in tar.getnames()}


@pytest.mark.parametrize("folder", ["csrc", "lkconv", "triton_kernels", "tests"])
def test_sdist_holds_every_source(sdist_names, folder):
    kinds = {".py", ".cpp", ".h", ".cu", ".cuh"}
    files = (p for p in (ROOT / folder).rglob("*") if p.suffix in kinds and p.is_file())
    wanted = {
        str(p.relative_to(ROOT))
        for p in files
        if "triton_kernels" not in p.parts[-2:-1] or folder != "lkconv"
    }
    assert wanted - sdist_names == set()


def test_sdist_holds_what_a_build_needs_and_nothing_built(sdist_names):
    assert {"LICENSE", "Makefile", "pyproject.toml", "setup.py", "PKG-INFO"} <= sdist_names
    assert not [n for n in sdist_names if n.endswith((".so", ".o", ".pyc")) or n.startswith("build/")]


def test_compiled_module_needs_only_torch_and_the_c_library():
    if shutil.which("readelf") is None or EXTENSION.suffix != ".so":
        pytest.skip("needs readelf and an ELF system")
    printed = run(["readelf", "-dW", str(EXTENSION)]).stdout
    needed = {line.split("[")[1].rstrip("]") for line in printed.splitlines() if "(NEEDED)" in line}
    assert needed >= {"libtorch_cpu.so"}
    extra = {n for n in needed if n.startswith(("libtorch", "libc10", "libpython", "libgomp", "libcu"))}
    assert extra <= {"libtorch_cpu.so", "libc10.so"}
    assert "RPATH" not in printed and "RUNPATH" not in printed, "a path of the machine that built it"
    if "-O0" not in (os.environ.get("CFLAGS") or "") and os.environ.get("DEBUG") != "1":
        assert ".debug_info" not in run(["readelf", "-SW", str(EXTENSION)]).stdout


def test_compiled_module_uses_torch_through_its_stable_abi_alone():
    if shutil.which("nm") is None or EXTENSION.suffix != ".so":
        pytest.skip("needs nm and an ELF system")
    symbols = run(["nm", "-DC", "--undefined-only", str(EXTENSION)]).stdout
    unstable = [
        line for line in symbols.splitlines() if "at::" in line or "c10::" in line or "torch::" in line
    ]
    assert unstable == []


def test_makefile_has_every_target_and_builds_with_what_pyproject_requires():
    if shutil.which("make") is None:
        pytest.skip("needs make")
    tomllib = pytest.importorskip("tomllib")
    for target in TARGETS:
        assert run(["make", "-n", target]).returncode == 0
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    printed = run(["make", "-n", "-B", "install"]).stdout
    assert all(f'"{requirement}"' in printed for requirement in required)
