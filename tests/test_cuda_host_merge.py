"""The CUDA kernels that fold branch kernels, run on the CPU under sanitizers: values, orders of threads.

The emulator and what it proves: tests/test_cuda_host.py.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cuda_host import build
from merge_cases import CASES, Branch, Case, Operands, exact, operands

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler to build the emulator with")

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # in the order of csrc/conv_params.h
TOLERANCE = dict(zip(DTYPES, (1e-14, 5e-7, 1e-3, 8e-3), strict=True))
ORDERS = ("forward", "reverse", "random")
MORE_THAN_A_LAUNCH = Case("launches", 3, (5, 5), tuple(Branch((3, 3), (1, 1)) for _ in range(50)), biases=30)
MORE_BIASES = Case("biases", 3, (3, 3), (Branch((3, 3)),), biases=30)


def pack(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}q", *numbers)


def pack_tensor(t: Tensor | None, dims: tuple[int, ...]) -> bytes:
    """A tensor with all of its storage, and the strides of ``dims``."""
    if t is None:
        return pack(-1)
    memory = bytes(t.untyped_storage().tolist())
    strides = [t.stride(d) for d in dims]
    head = pack(DTYPES.index(t.dtype), len(memory), t.storage_offset(), len(dims), *strides)
    return head + memory


def pack_problem(case: Case, t: Operands, dtype: torch.dtype, backward: bool, order: str) -> bytes:
    kernel = t.grad_weight if backward else torch.empty(0, 0, 0, 0, dtype=dtype)
    bias = t.grad_bias if backward else torch.empty(0, dtype=dtype)
    wide = torch.float64 in {dtype, kernel.dtype, bias.dtype, *(x.dtype for x in t.leaves())}
    out = [pack(backward, ORDERS.index(order), 1, wide, case.channels, *case.kernel)]
    out += [pack_tensor(kernel, (0, 2, 3)), pack_tensor(bias, (0,)), pack(len(case.branches))]
    for i, b in enumerate(case.branches):
        out += [pack(*b.kernel, *b.offset, *b.step), pack_tensor(t.weights[i], (0, 2, 3))]
        out.append(pack_tensor(t.scales[i] if t.scales else None, (0,)))
    out += [pack(len(t.biases)), *(pack_tensor(b, (0,)) for b in t.biases)]
    return b"".join(out)


def run(driver: Path, folder: Path, case: Case, t: Operands, dtype: torch.dtype, backward: bool) -> list:
    """The kernel's results as one flat tensor for each, the same for every order of threads, and launches."""
    problems = [folder / f"problem-{order}" for order in ORDERS]
    results = [folder / f"results-{order}" for order in ORDERS]
    for order, path in zip(ORDERS, problems, strict=True):
        path.write_bytes(pack_problem(case, t, dtype, backward, order))
    lines = "".join(f"{a} {b}\n" for a, b in zip(problems, results, strict=True))
    done = subprocess.run([str(driver)], input=lines, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    found = [path.read_bytes() for path in results]
    assert found[0] == found[1] == found[2], "the result depends on the order of threads"
    like = [*t.weights, *t.scales, *t.biases]
    if not backward:
        like = [
            torch.empty(case.channels, 1, *case.kernel, dtype=dtype),
            torch.empty(case.channels, dtype=dtype),
        ]
    out, at = [], 0
    for x in like:
        size = x.numel() * x.element_size()
        out.append(torch.frombuffer(bytearray(found[0][at : at + size]), dtype=x.dtype).view(x.shape))
        at += size
    assert at == len(found[0])
    return [out, answers[0]["launches"]]


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def check(driver: Path, folder: Path, case: Case, dtype: torch.dtype, t: Operands | None = None) -> None:
    t = t or operands(case, dtype)
    kernel, bias, grad_weights, grad_scales = exact(case, t)
    launches = -(-max(len(case.branches), case.biases) // 24)
    (got, sums), count = run(driver, folder, case, t, dtype, False)
    assert count == launches
    assert error(got, kernel) <= TOLERANCE[dtype]
    assert error(sums, bias) <= TOLERANCE[dtype] if case.biases else not sums.any()
    found, count = run(driver, folder, case, t, dtype, True)
    assert count == launches
    wanted = [*grad_weights, *grad_scales, *(t.grad_bias.double() for _ in t.biases)]
    for one, other in zip(found, wanted, strict=True):
        assert error(one, other) <= TOLERANCE[one.dtype]


@pytest.fixture(scope="module")
def driver() -> Path:
    return build.build_driver(name="merge_driver")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, MORE_THAN_A_LAUNCH, MORE_BIASES], ids=lambda c: c.name)
def test_values(driver, tmp_path, case, dtype):
    check(driver, tmp_path, case, dtype)


@pytest.mark.parametrize("result", DTYPES, ids=str)
def test_mixed_dtypes(driver, tmp_path, result):
    case = Case("mixed", 5, (7, 7), tuple(Branch((3, 3), (i, 0), (1, 2)) for i in range(4)), biases=4)
    t = operands(case, torch.float32)
    t.weights = [w.to(d) for w, d in zip(t.weights, DTYPES, strict=True)]
    t.scales = [s.to(d) for s, d in zip(t.scales, DTYPES[::-1], strict=True)]
    t.biases = [b.to(d) for b, d in zip(t.biases, DTYPES, strict=True)]
    t.grad_weight, t.grad_bias = t.grad_weight.to(result), t.grad_bias.to(torch.bfloat16)
    check(driver, tmp_path, case, result, t)


SIDE = Case("side", 5, (9, 9), (Branch((9, 9)), Branch((3, 2), (1, 2), (3, 4))))
MUTANTS = {
    "a tap between two of a dilated branch": (" || right % b.step_w", "", "merge.cuh"),
    "no warp barrier before lanes are summed": (" = dot;\n  sync_warp();", " = dot;", "merge.cuh"),
    "the last lane's sum is lost": ("l < kWarp", "l < kWarp - 1", "merge.cuh"),
    "later launches forget the first": ("p.first = index == 0", "p.first = true", "merge_run.h"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_broken_kernels_are_caught(name, tmp_path):
    text, replacement, file = MUTANTS[name]
    shutil.copytree(build.ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "csrc" / "cuda" / file
    source = path.read_text()
    assert source.count(text) == 1, "the mutated text must occur once"
    path.write_text(source.replace(text, replacement))
    driver = build.build_driver(tmp_path, False, "merge_driver")
    case = MORE_THAN_A_LAUNCH if "launches" in name else SIDE
    with pytest.raises(AssertionError, match=r"order of threads|error\("):
        check(driver, tmp_path, case, torch.float32)
