"""The CUDA kernels, run on the CPU by the host emulator, against a plain loop in float64.

Every case runs with a block's threads in three orders under AddressSanitizer and UndefinedBehaviorSanitizer;
the results must be right, and the same to the last bit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cuda_host import build
from cuda_host.cases import CASES, DTYPES, ORDERS, PASSES, Case, same

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler to build the emulator with")

# Unit roundoff of the output, and for tf32 of the product of two rounded operands.
ROUNDOFF = {"f64": 2.0**-53, "f32": 2.0**-24, "tf32": 2.0**-10, "f16": 2.0**-11, "bf16": 2.0**-8}


def norm_limit(dtype: str, taps: int, rounding: float) -> float:
    """Largest relative error (norm). `rounding` is that of the exact result rounded to dtype: no kernel that
    rounds its output once can be better, so twice it is twice PyTorch's error at least."""
    if dtype == "f64":
        return 1e-13
    if dtype == "f32":
        return 1e-6 * taps**0.5
    if dtype == "tf32":
        return 2.0**-11
    return 2 * rounding + 2.0**-23


def element_limit(dtype: str, taps: int) -> float:
    """Largest error of one element over the sum of its products' absolute values."""
    if dtype == "f64":
        return 1e-14
    return ROUNDOFF[dtype] + 2e-6


def run(driver: Path, lines: list[str]) -> list[dict]:
    """One result per line; a line that stops the driver fails alone."""
    results: list[dict] = []
    while len(results) < len(lines):
        rest = lines[len(results) :]
        done = subprocess.run([str(driver)], input="\n".join(rest) + "\n", capture_output=True, text=True)
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        if len(answers) < len(rest) and (not answers or answers[-1]["ok"]):
            error = done.stderr[-2000:] or f"the driver ended with status {done.returncode}"
            answers.append({"ok": False, "error": error})
        results += answers
    return results


def wrong(result: dict, dtype: str, taps: int) -> str:
    """Why a result is wrong, or ""."""
    if not result["ok"]:
        return result["error"]
    if not result["relative"] <= norm_limit(dtype, taps, result["rounding"]):
        return f"relative error {result['relative']}"
    if not result["worst"] <= element_limit(dtype, taps):
        return f"an element is wrong by {result['worst']} of its products"
    return ""


def algorithms(dtype: str) -> tuple[str, ...]:
    return ("direct", "toeplitz") if dtype in ("tf32", "f16", "bf16") else ("direct",)


def jobs() -> list[tuple[Case, str, str, str]]:
    """Case, pass, dtype, algorithm. float32 and bfloat16 meet every case; the other dtypes share their
    code, and meet every other case."""
    found = []
    for i, case in enumerate(CASES):
        for pass_name in PASSES:
            for k, dtype in enumerate(DTYPES):
                if dtype in ("f32", "bf16") or (i + k) % 2 == 0:
                    found += [
                        (case, pass_name, dtype, a)
                        for a in algorithms(dtype)
                        if (dtype, a) != ("tf32", "direct")
                    ]
    return found


def line_of(case: Case, pass_name: str, dtype: str, algorithm: str, order: str) -> str:
    return case.words(**{"pass": pass_name}, dtype=dtype, algorithm=algorithm, order=order, bias=1)


@pytest.fixture(scope="session")
def driver() -> Path:
    return build.build_driver()


@pytest.fixture(scope="session")
def results(driver: Path) -> dict[str, dict]:
    """Results of all lines, run by a few processes."""
    lines = [line_of(*job, order) for job in jobs() for order in ORDERS]
    workers = os.cpu_count() or 1
    parts = [lines[i::workers] for i in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        answers = list(pool.map(lambda part: run(driver, part), parts))
    return {
        line: r
        for part, answer in zip(parts, answers, strict=True)
        for line, r in zip(part, answer, strict=True)
    }


@pytest.mark.parametrize("job", jobs(), ids=lambda j: "-".join(map(str, j)))
def test_case(results: dict[str, dict], job: tuple[Case, str, str, str]) -> None:
    case, _, dtype, algorithm = job
    found = [results[line_of(*job, order)] for order in ORDERS]
    for order, result in zip(ORDERS, found, strict=True):
        reason = wrong(
            result,
            dtype,
            case.taps if job[1] != "backward_weight" else case.size[0] * case.size[2] * case.size[3],
        )
        assert not reason, f"threads in {order} order: {reason}"
    assert len({r["hash"] for r in found}) == 1, "the result depends on the order of threads"
    if algorithm == "toeplitz" and case.stride[1] == 1:
        assert all(r["mma"] > 0 for r in found), "the Toeplitz kernel did not run"


@pytest.mark.parametrize("shared", (101376, 49152))
@pytest.mark.parametrize("pass_name", PASSES)
def test_small_shared_memory(driver: Path, pass_name: str, shared: int) -> None:
    """GPUs with 99 KB a block, and the 48 KB that every GPU has: tiles shrink, results stay right."""
    cases = [same((2, 2, 40, 48), (31, 31)), same((1, 18, 24, 24), (13, 13), layout="nhwc")]
    jobs_ = [(c, pass_name, d, a) for c in cases for d in ("f64", "f32", "bf16") for a in algorithms(d)]
    lines = [line_of(*job, "random") + f" shared={shared}" for job in jobs_]
    for job, result in zip(jobs_, run(driver, lines), strict=True):
        assert not wrong(result, job[2], 2 * 40 * 48), str(job)


@pytest.mark.parametrize("layout", ("far_images", "far_planes", "far_rows", "far_pixels"))
@pytest.mark.parametrize("pass_name", PASSES)
def test_offsets_beyond_32_bits(driver: Path, pass_name: str, layout: str) -> None:
    """Input and output each lie in more than 2^31 elements of address space, spread along one dimension."""
    far = [
        Case((3, 4, 10, 12), (5, 5), (2, 2), layout=layout),
        Case((2, 3, 11, 9), (4, 3), (1, 1), stride=(2, 1), multiplier=2, layout=layout),
    ]
    jobs_ = [(c, pass_name, d, a) for c in far for d in DTYPES for a in algorithms(d)]
    for job, result in zip(jobs_, run(driver, [line_of(*job, "random") for job in jobs_]), strict=True):
        assert not wrong(result, job[2], 3 * 10 * 12), str(job)


@pytest.mark.parametrize("pass_name", PASSES)
def test_enormous_kernels(driver: Path, pass_name: str) -> None:
    """Kernels whose taps do not fit shared memory are staged in chunks."""
    case = Case((1, 1, 6, 9), (70, 90), (69, 89))
    lines = [line_of(case, pass_name, d, "direct", "random") + " shared=16384" for d in ("f32", "f64")]
    for dtype, result in zip(("f32", "f64"), run(driver, lines), strict=True):
        assert not wrong(result, dtype, case.taps)


# A kernel with one thing broken, and a job that must notice: file, text, replacement, job.
TOEPLITZ = (same((3, 1, 40, 40), (7, 7)), "bf16", "toeplitz")
MUTANTS = {
    "direct: no barrier between staging and computing": (
        "direct.cuh",
        "p.by_channels, p.input_lanes);\n        sync_block();",
        "p.by_channels, p.input_lanes);",
        (same((1, 2, 12, 12), (5, 5)), "forward", "f32", "direct"),
    ),
    "direct: no barrier before outputs take the window's place": (
        "direct.cuh",
        "sync_block();  // the window is read no more",
        "// the window is read no more",
        (same((1, 2, 12, 12), (5, 5)), "forward", "f32", "direct"),
    ),
    "direct: halo one row short": (
        "direct.cuh",
        "(c.kernel_h - 1) * p.dil_h + 1);",
        "(c.kernel_h - 1) * p.dil_h);",
        (same((1, 1, 80, 32), (5, 5)), "forward", "f32", "direct"),
    ),
    "direct weight: no barrier between workers' sums": (
        "direct_weight.cuh",
        "sums[r] = acc[r];\n  sync_block();",
        "sums[r] = acc[r];",
        (same((2, 1, 12, 12), (5, 5)), "backward_weight", "f32", "direct"),
    ),
    "toeplitz: no barrier between copies and products": (
        "toeplitz.cuh",
        "source);\n    sync_block();",
        "source);",
        (TOEPLITZ[0], "forward", *TOEPLITZ[1:]),
    ),
    "toeplitz: the next copies overwrite a stage in use": (
        "toeplitz.cuh",
        "sync_block();  // the next step overwrites this stage",
        "",
        (same((40, 8, 40, 16), (7, 7)), "forward", *TOEPLITZ[1:]),
    ),
    "toeplitz: waits for one group of copies too few": (
        "toeplitz.cuh",
        "wait_copies<1>",
        "wait_copies<2>",
        (TOEPLITZ[0], "forward", *TOEPLITZ[1:]),
    ),
    "toeplitz: halo one row short": (
        "toeplitz.cuh",
        "(p.kernel_h - 1) * p.dil_h;",
        "(p.kernel_h - 2) * p.dil_h;",
        (same((1, 1, 600, 16), (5, 5)), "forward", *TOEPLITZ[1:]),
    ),
    "toeplitz: 32-bit offsets of rows": (
        "toeplitz_window.cuh",
        "int64_t(src.row0 + row) * src.stride_h",
        "int(unsigned(src.row0 + row) * unsigned(src.stride_h))",
        (Case((2, 1, 10, 12), (5, 5), (2, 2), layout="far_rows"), "forward", *TOEPLITZ[1:]),
    ),
    "direct: 32-bit offsets of output images": (
        "tile_io.cuh",
        "static_cast<T*>(view.data) + n * view.stride_n",
        "static_cast<T*>(view.data) + int(unsigned(n) * unsigned(view.stride_n))",
        (Case((3, 1, 6, 8), (3, 3), (1, 1), layout="far_images"), "forward", "f32", "direct"),
    ),
    "toeplitz: band one tap off": (
        "toeplitz.cuh",
        "t.corner = left - t.x0 + p.pad_w;",
        "t.corner = left - t.x0 + p.pad_w + 1;",
        (TOEPLITZ[0], "forward", *TOEPLITZ[1:]),
    ),
    "toeplitz weight: waits for one group of copies too few": (
        "toeplitz_weight.cuh",
        "wait_copies<1>",
        "wait_copies<2>",
        (TOEPLITZ[0], "backward_weight", *TOEPLITZ[1:]),
    ),
    "toeplitz weight: no warp barrier before diagonals are summed": (
        "toeplitz_weight.cuh",
        "= acc[k][d][i];\n    sync_warp();",
        "= acc[k][d][i];",
        (TOEPLITZ[0], "backward_weight", *TOEPLITZ[1:]),
    ),
    "toeplitz weight: one block diagonal missing": (
        "planner_toeplitz.cpp",
        "p.first_diagonal = int(-floor_div(",
        "p.first_diagonal = int(1 - floor_div(",
        (TOEPLITZ[0], "backward_weight", *TOEPLITZ[1:]),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_broken_kernels_are_caught(name: str, tmp_path: Path) -> None:
    file, text, replacement, job = MUTANTS[name]
    shutil.copytree(build.ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "csrc" / "cuda" / file
    source = path.read_text()
    assert source.count(text) == 1, "the mutated text must occur once"
    path.write_text(source.replace(text, replacement))
    mutant = build.build_driver(tmp_path, sanitize=False)
    found = run(mutant, [line_of(*job, order) + " sms=1" for order in ORDERS])
    case, _, dtype, _ = job
    assert any(wrong(r, dtype, case.taps) for r in found) or len({r["hash"] for r in found}) > 1
