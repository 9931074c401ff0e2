"""Matrix-unit (AMX) kernels: run on emulated tiles, their planner, and the real unit where there is one."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lkconv import _C

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "tests" / "amx_emulation"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
VECTORS = {
    "generic": [],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
SOURCES = (
    "toeplitz_plan",
    "planar_plan",
    "planar_weight_plan",
    "direct_plan",
    "planner",
    "fft_plan",
    "depthwise_conv2d",
)
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def compile_cpp(output: Path, sources: list[Path], flags: list[str]) -> Path:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    command = [COMPILER, "-std=c++20", "-O1", "-g1", "-w", *SANITIZE, *flags]
    command += [f"-I{ROOT / 'csrc'}", f"-I{HERE}", *map(str, sources), "-o", str(output), "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return output


@pytest.fixture(scope="module", params=VECTORS)
def driver(request, tmp_path_factory) -> Path:
    if request.param == "avx512" and _C.detected_isa() not in ("avx512", "amx"):
        pytest.skip("this processor has no AVX-512")
    sources = [HERE / "driver.cpp", *(ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in SOURCES)]
    folder = tmp_path_factory.mktemp("amx_emulation")
    return compile_cpp(folder / f"driver_{request.param}", sources, VECTORS[request.param])


@pytest.mark.parametrize("seed", range(4))
def test_emulated_kernels_match_float64(driver, seed):
    done = subprocess.run([driver, str(seed), "15"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "failures 0" in done.stdout


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> Path:
    return compile_cpp(tmp_path_factory.mktemp("amx_faults") / "faults", [HERE / "faults.cpp"], [])


@pytest.mark.parametrize(
    "misuse, message",
    [
        ("unconfigured", "without configuration"),
        ("release", "release without configuration"),
        ("palette", "palette is not 1"),
        ("size", "tile size out of range"),
        ("disagree", "tile sizes disagree"),
        ("undefined", "read before it was loaded"),
        ("after", "without configuration"),
    ],
)
def test_emulation_catches_misuse(faults, misuse, message):
    done = subprocess.run([faults, misuse], capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stderr


def test_emulation_accepts_correct_use(faults):
    assert subprocess.run([faults, "none"]).returncode == 0


def candidates(
    pass_name="forward", size=(8, 128, 56, 56), kernel=(31, 31), dtype="bfloat16", isa="amx", threads=2, **kw
):
    padding = [k // 2 for k in kernel]
    options = {"stride": [1, 1], "padding": padding, "dilation": [1, 1], **kw}
    plans = _C.plan(
        pass_name, list(size), size[1], list(kernel), dtype=dtype, isa=isa, threads=threads, **options
    )
    return {p["algorithm"]: p for p in plans}, plans[0]["algorithm"]


needs_amx_code = pytest.mark.skipif("amx" not in _C.compiled_isas(), reason="not an x86-64 build")
PASSES = ("forward", "backward_input", "backward_weight")


@needs_amx_code
@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"dtype": "float32"}, "dtype is not bfloat16"),
        ({"dtype": "float16"}, "dtype is not bfloat16"),
        ({"isa": "avx512"}, "this processor has no AMX"),
        ({"stride": [2, 2]}, "stride is not 1"),
        ({"dilation": [1, 2]}, "dilation is not 1"),
        ({"kernel": (31, 1)}, "fewer than three taps"),
    ],
)
def test_declines_with_reason(changes, reason):
    plans, chosen = candidates(**changes)
    assert chosen != "toeplitz"
    assert not plans["toeplitz"]["possible"]
    assert reason in plans["toeplitz"]["reason"]


LAYERS = [
    ((1, 128, 56, 56), (31, 31)),
    ((8, 256, 28, 28), (29, 29)),
    ((32, 512, 14, 14), (27, 27)),
    ((64, 1024, 7, 7), (13, 13)),
    ((8, 96, 56, 56), (7, 7)),
    ((8, 124, 56, 56), (51, 5)),
    ((8, 124, 56, 56), (5, 51)),
    ((1, 64, 200, 320), (13, 13)),
]


@needs_amx_code
@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("size, kernel", LAYERS)
def test_beats_direct_sums_on_real_layers(pass_name, size, kernel):
    plans, chosen = candidates(pass_name, size, kernel)
    toeplitz = plans["toeplitz"]
    assert chosen != "direct"
    assert toeplitz["possible"] and toeplitz["cycles"] < plans["direct"]["cycles"]
    assert 0 < toeplitz["scratch_bytes"] <= 16 << 20


@needs_amx_code
@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("kernel", [5, 7, 9, 11, 13])
def test_chosen_for_middle_kernels(pass_name, kernel):
    swept = pass_name == "backward_weight" and kernel == 5
    assert candidates(pass_name, (8, 96, 56, 56), (kernel, kernel))[1] == ("planar" if swept else "toeplitz")


@needs_amx_code
@pytest.mark.parametrize("size", [(1, 128, 56, 56), (3, 64, 14, 14), (2, 8, 1, 5000), (1, 16, 400, 400)])
def test_forward_tiles_do_not_depend_on_threads(size):
    tiles = {candidates(size=size, kernel=(9, 9), threads=t)[0]["toeplitz"]["tile"] for t in (1, 2, 7, 64)}
    assert len(tiles) == 1


@pytest.mark.skipif(_C.active_isa() != "amx", reason="this processor has no AMX")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size, kernel", [((2, 40, 30, 37), 13), ((9, 24, 14, 14), 27), ((1, 8, 70, 70), 51)])
def test_real_unit_matches_float64(size, kernel, memory_format):
    torch.manual_seed(0)
    x = torch.randn(size).bfloat16().to(memory_format=memory_format)
    w = torch.randn(size[1], 1, kernel, kernel).bfloat16()
    g = torch.randn(size).bfloat16().to(memory_format=memory_format)
    pad = [kernel // 2] * 2
    xd, wd = x.double().requires_grad_(), w.double().requires_grad_()
    yd = F.conv2d(xd, wd, padding=pad, groups=size[1])
    yd.backward(g.double())
    ops = torch.ops.lkconv
    one = [1, 1]
    got = (
        ops.depthwise_conv2d(x, w, None, one, pad, one),
        ops.depthwise_conv2d_backward_input(g, w, list(size), one, pad, one),
        ops.depthwise_conv2d_backward_weight(g, x, [kernel] * 2, one, pad, one),
    )
    for result, exact in zip(got, (yd, xd.grad, wd.grad), strict=True):
        # One rounding to bfloat16, and float32 sums whose terms are of the results' own size.
        error = (result.double() - exact).abs()
        assert (error <= 2**-8 * exact.abs() + 1e-5 * exact.abs().max()).all()
