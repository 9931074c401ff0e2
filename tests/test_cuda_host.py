"""The CUDA kernels, run on the CPU by the host emulator, against a plain loop in float64.

The cases are those of every backend and some of GPU tiles, in every dtype, pass and algorithm, with a block's
threads in up to three orders (``cuda_host/cases.py`` says which), under AddressSanitizer and
UndefinedBehaviorSanitizer; the results must be right, and the same to the last bit.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cuda_host import build
from cuda_host.cases import CASES, DTYPES, LARGE, NON_FINITE, ORDERS, PASSES, Case, orders, same
from processes import exclusive

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler to build the emulator with")


def norm_limit(dtype: str, taps: int, rounding: float) -> float:
    """Largest relative error (norm). `rounding` is that of the exact result rounded to dtype, for tf32 of the
    exact result of rounded operands: no kernel that rounds once can be better, so twice it is twice PyTorch's
    error at least."""
    if dtype == "f64":
        return 1e-13
    if dtype == "f32":
        return 1e-6 * taps**0.5
    if dtype == "tf32":
        return 2 * rounding + 1e-6 * taps**0.5
    return 2 * rounding + 2.0**-23


def element_limit(dtype: str) -> float:
    """Largest error of one element beyond what rounding must cost, over the sum of its products' absolute
    values: twice float32's, because a sum near the middle of two numbers of dtype may round to the other."""
    return 1e-14 if dtype == "f64" else 4e-6


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
    if not result["worst"] <= element_limit(dtype):
        return f"an element is wrong by {result['worst']} of its products"
    return ""


def algorithms(dtype: str) -> tuple[str, ...]:
    return ("direct", "toeplitz") if dtype in ("tf32", "f16", "bf16") else ("direct",)


Job = tuple[Case, str, str, str]  # case, pass, dtype, algorithm


def jobs(cases: tuple[Case, ...]) -> list[Job]:
    """Every pass, dtype and algorithm of the cases; tf32 is a mode of the Toeplitz kernels alone."""
    return [
        (case, pass_name, dtype, algorithm)
        for case in cases
        for pass_name in PASSES
        for dtype in DTYPES
        for algorithm in algorithms(dtype)
        if (dtype, algorithm) != ("tf32", "direct")
    ]


def line_of(case: Case, pass_name: str, dtype: str, algorithm: str, order: str, **more: object) -> str:
    return case.words(**{"pass": pass_name}, dtype=dtype, algorithm=algorithm, order=order, **more)


@pytest.fixture(scope="session")
def driver() -> Path:
    return build.build_driver()


def run_by_processes(driver: Path, lines: list[str]) -> dict[str, dict]:
    """Line -> result, run by a process for each core."""
    workers = os.cpu_count() or 1
    parts = [lines[i::workers] for i in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        answers = list(pool.map(lambda part: run(driver, part), parts))
    return {
        line: r
        for part, answer in zip(parts, answers, strict=True)
        for line, r in zip(part, answer, strict=True)
    }


@pytest.fixture(scope="session")
def results(driver: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Results of all lines, which pytest's workers share: the first one here computes them."""
    lines = [line_of(*job, order) for job in jobs(CASES) for order in orders(job[0], job[2])]
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return run_by_processes(driver, lines)
    answer = (
        tmp_path_factory.getbasetemp().parent / "cuda_host_results.json"
    )  # of this run, of all its workers
    with exclusive("cuda_host_results"):
        if not answer.exists():
            partial = answer.with_suffix(".partial")
            partial.write_text(json.dumps(run_by_processes(driver, lines)))
            partial.replace(answer)
    return json.loads(answer.read_text())


def products_of(job: Job) -> int:
    """How many products the longest sum adds."""
    case, pass_name, _, _ = job
    return case.taps if pass_name != "backward_weight" else math.prod(case.size) // max(1, case.channels)


@pytest.mark.parametrize("job", jobs(CASES), ids=lambda j: "-".join(map(str, j)))
def test_case(results: dict[str, dict], job: Job) -> None:
    case, _, dtype, algorithm = job
    found = {order: results[line_of(*job, order)] for order in orders(case, dtype)}
    for order, result in found.items():
        reason = wrong(result, dtype, products_of(job))
        assert not reason, f"threads in {order} order: {reason}"
    assert len({r["hash"] for r in found.values()}) == 1, "the result depends on the order of threads"
    if algorithm == "toeplitz" and case.stride[1] == 1 and case.size[0] > 0:
        assert all(r["mma"] > 0 for r in found.values()), "the Toeplitz kernel did not run"


def test_every_case_meets_every_order() -> None:
    for case in CASES:
        assert {order for dtype in DTYPES for order in orders(case, dtype)} == set(ORDERS)
    assert sum(case.products > LARGE for case in CASES) < len(CASES) / 4


@pytest.mark.parametrize("pass_name", PASSES)
def test_non_finite(driver: Path, pass_name: str) -> None:
    """No result loses a NaN or an infinity that it sums up, and none reaches another image or channel.

    With the direct kernels none reaches any other result, but for other taps of its channel: at the image's
    border grad_output is multiplied by the zeros around the input.
    """
    found = [job for job in jobs(NON_FINITE) if job[1] == pass_name]
    assert len(found) > 100
    spread = set()
    lines = [line_of(*job, "random", nonfinite=1) for job in found]
    for job, result in zip(found, run(driver, lines), strict=True):
        label = "-".join(map(str, job))
        assert not wrong(result, job[2], products_of(job)), label
        assert result["lost"] == 0 and result["escaped"] == 0, (label, result)
        if result["spread"]:
            spread.add(job[3])
    assert spread == ({"direct", "toeplitz"} if pass_name == "backward_weight" else {"toeplitz"})


@pytest.mark.parametrize("shared", (101376, 49152))
@pytest.mark.parametrize("pass_name", PASSES)
def test_small_shared_memory(driver: Path, pass_name: str, shared: int) -> None:
    """GPUs with 99 KB a block, and the 48 KB that every GPU has: tiles shrink, results stay right."""
    cases = [same((2, 2, 40, 48), (31, 31)), same((1, 18, 24, 24), (13, 13), "nhwc")]
    found = [(c, pass_name, d, a) for c in cases for d in ("f64", "f32", "bf16") for a in algorithms(d)]
    lines = [line_of(*job, "random", shared=shared) for job in found]
    for job, result in zip(found, run(driver, lines), strict=True):
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
    lines = [line_of(case, pass_name, d, "direct", "random", shared=16384) for d in ("f32", "f64")]
    for dtype, result in zip(("f32", "f64"), run(driver, lines), strict=True):
        assert not wrong(result, dtype, case.taps)


@pytest.mark.parametrize("dtype", ("f64", "bf16"))
@pytest.mark.parametrize("pass_name", PASSES)
def test_what_fits_no_kernel_is_refused(driver: Path, pass_name: str, dtype: str) -> None:
    """A window far wider than shared memory: the op leaves the call to PyTorch."""
    case = Case((1, 1, 2, 12000), (1, 3), (0, 9000), dilation=(1, 9000))
    line = line_of(case, pass_name, dtype, "auto", "forward", shared=49152)
    (result,) = run(driver, [line])
    assert not result["ok"] and "of shared memory" in result["error"]


# A kernel with one thing broken, and a job that must notice: file, text, replacement, job.
TOEPLITZ = (same((3, 1, 40, 40), (7, 7)), "bf16", "toeplitz")
MUTANTS = {
    "direct: no barrier between staging and computing": (
        "direct.cuh",
        "stage_window<T>(window, p, t, chunk, n, 0);\n    sync_block();",
        "stage_window<T>(window, p, t, chunk, n, 0);",
        (same((1, 2, 12, 12), (5, 5)), "forward", "f32", "direct"),
    ),
    "direct, any width: no barrier between staging and computing": (
        "direct.cuh",
        "stage_window<T>(window, p, t, chunk, n, j);\n          sync_block();",
        "stage_window<T>(window, p, t, chunk, n, j);",
        (same((1, 2, 12, 12), (9, 9)), "forward", "f32", "direct"),
    ),
    "direct: no barrier before outputs take the window's place": (
        "direct.cuh",
        "sync_block();  // the window is read no more: outputs take its place",
        "",
        (same((1, 2, 13, 13), (9, 9)), "forward", "f32", "direct"),
    ),
    "direct: the next image takes a window in use": (
        "direct.cuh",
        "sync_block();  // the window is read no more, and outputs are complete",
        "",
        (same((64, 1, 32, 32), (5, 5)), "forward", "f32", "direct"),
    ),
    "direct: zeros missing beside the image": (
        "tile_io.cuh",
        "for (int c = needed / 4 * 4; c < left; c += 4)",
        "for (int c = needed / 4 * 4; c + 4 < left; c += 4)",
        (same((1, 2, 13, 13), (5, 5)), "forward", "f32", "direct"),
    ),
    "direct: 32-bit steps down the rows": (
        "tile_io.cuh",
        "advance = w.step * src.stride_h, advance_to",
        "advance = int(unsigned(w.step) * unsigned(src.stride_h)), advance_to",
        (Case((2, 1, 10, 16), (5, 5), (2, 2), layout="far_rows"), "forward", "f32", "direct"),
    ),
    "direct: halo one row short": (
        "direct.cuh",
        "(c.kernel_h - 1) * p.dil_h + 1);",
        "(c.kernel_h - 1) * p.dil_h);",
        (same((1, 1, 210, 32), (5, 5)), "forward", "f32", "direct"),
    ),
    "direct weight: no barrier between workers' sums": (
        "direct_weight.cuh",
        "sums[r] = acc[r];\n  sync_block();",
        "sums[r] = acc[r];",
        (same((2, 1, 12, 12), (5, 5)), "backward_weight", "f32", "direct"),
    ),
    "toeplitz: no barrier between copies and products": (
        "toeplitz.cuh",
        "source, p.walk);\n      sync_block();",
        "source, p.walk);",
        (TOEPLITZ[0], "forward", *TOEPLITZ[1:]),
    ),
    "toeplitz: the next copies overwrite a stage in use": (
        "toeplitz.cuh",
        "sync_block();  // the next step overwrites this stage",
        "",
        (same((40, 4, 40, 16), (31, 7)), "forward", *TOEPLITZ[1:]),  # warps meet unequal numbers of rows
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
    "toeplitz: rows outside the image keep what was there": (
        "toeplitz.cuh",
        "if (step < 2 || p.tiles_y > 1) zero_outside(stage, p, shape);",
        "if (step < 1) zero_outside(stage, p, shape);",
        (same((40, 4, 40, 16), (7, 7)), "forward", *TOEPLITZ[1:]),  # several tiles a block
    ),
    "toeplitz: one row of zeros too few": (
        "planner_toeplitz.cpp",
        "p.rows_below = int(std::clamp<int64_t>(beyond, 0, apart));",
        "p.rows_below = int(std::clamp<int64_t>(beyond - 1, 0, apart));",
        (same((16, 1, 12, 16), (7, 7)), "forward", *TOEPLITZ[1:]),
    ),
    "direct, stride 2: one input row left out": (
        "direct.cuh",
        "u < 2 * (kFixedRows - 1) + kWidth; ++u",
        "u < 2 * (kFixedRows - 1) + kWidth - 1; ++u",
        (Case((1, 2, 13, 16), (3, 3), (1, 1), stride=(2, 2)), "forward", "f32", "direct"),
    ),
    "toeplitz: 32-bit offsets of rows": (
        "tile_io.cuh",
        "int64_t(src.row0 + row) * src.stride_h",
        "int(unsigned(src.row0 + row) * unsigned(src.stride_h))",
        (Case((2, 1, 10, 12), (5, 5), (2, 2), layout="far_rows"), "forward", *TOEPLITZ[1:]),
    ),
    "direct: 32-bit offsets of output images": (
        "direct.cuh",
        "T* out = static_cast<T*>(to.data) + n * to.stride_n",
        "T* out = static_cast<T*>(to.data) + int(unsigned(n) * unsigned(to.stride_n))",
        (Case((3, 1, 6, 8), (3, 3), (1, 1), layout="far_images"), "forward", "f32", "direct"),
    ),
    "toeplitz: band one tap off": (
        "toeplitz.cuh",
        "c.corner = c.col0 - c.x0 + p.pad_w;",
        "c.corner = c.col0 - c.x0 + p.pad_w + 1;",
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
    "toeplitz weight: no barrier between copies and products": (
        "toeplitz_weight.cuh",
        "p.grad_walk);\n    sync_block();",
        "p.grad_walk);",
        (TOEPLITZ[0], "backward_weight", *TOEPLITZ[1:]),
    ),
    "toeplitz weight: the next tile takes a table in use": (
        "toeplitz_weight.cuh",
        "sync_block();  // the next tile overwrites the table, and this stage after it",
        "",
        # 15 steps of depth for 4 warps: the one with fewer is early with the table of the next tile, which
        # has one image instead of six.
        (same((7, 4, 40, 40), (7, 7)), "backward_weight", *TOEPLITZ[1:]),
    ),
    "reduce_splits: only the last partial sum": (
        "direct_weight.cuh",
        "sum += partial[",
        "sum = partial[",
        (same((40, 1, 40, 16), (7, 7)), "backward_weight", *TOEPLITZ[1:]),
    ),
    "pack: no barrier between reading and writing the tile": (
        "pack.cuh",
        "sync_block();",
        "",
        (same((1, 33, 12, 12), (5, 5), "nhwc"), "forward", *TOEPLITZ[1:]),
    ),
    "stride phases: one output row off": (
        "../problem.h",
        "a.pad = (a.taps - 1) * a.dil - y0;",
        "a.pad = (a.taps - 1) * a.dil - y0 + (r > 0);",
        (Case((1, 2, 13, 14), (5, 5), (2, 2), stride=(2, 2)), "backward_input", "f32", "direct"),
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
    found = run(mutant, [line_of(*job, order, sms=1) for order in ORDERS])
    case, _, dtype, _ = job
    assert any(wrong(r, dtype, case.taps) for r in found) or len({r["hash"] for r in found}) > 1
