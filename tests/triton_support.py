"""What the Triton test files share: cases, references, tolerances and one runner for every device."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import lkconv

ROOT = Path(__file__).resolve().parents[1]
PASSES = ("forward", "backward_input", "backward_weight")


def kernels(module: str = "") -> Any:
    """``lkconv.triton_kernels`` or one of its modules, from an installation or from this source tree."""
    if importlib.util.find_spec("lkconv.triton_kernels") is None:
        lkconv.__path__.append(str(ROOT))
    return importlib.import_module("lkconv.triton_kernels" + (f".{module}" if module else ""))


def run_interpreted(names: list[str], folder: Path) -> dict[str, str | None]:
    """Runs tests by name in one interpreting process; each test's failure, or None."""
    results = folder / "results.json"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "tests" / "triton_interpreted.py"), str(results), *names]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    reports = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    found = {report["name"]: report["failure"] for report in reports}
    lost = (
        f"the interpreting process ended ({process.returncode}) before this test:\n{process.stderr[-3000:]}"
    )
    return {name: found.get(name, lost) for name in names}


@dataclass(frozen=True)
class Case:
    """One problem; ``layout`` is nchw, nhwc, or sliced: a view into a wider and taller tensor."""

    size: tuple[int, int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1
    bias: bool = True
    layout: str = "nchw"
    dtype: str = "float32"
    algorithm: str = "direct"

    @property
    def name(self) -> str:
        parts = [self.algorithm, self.dtype, self.layout, "x".join(map(str, self.size))]
        parts.append("k" + "x".join(map(str, self.kernel)))
        for letter, pair in (("s", self.stride), ("p", self.padding), ("d", self.dilation)):
            parts.append(letter + "x".join(map(str, pair)))
        return "-".join(parts) + (f"-m{self.multiplier}" if self.multiplier > 1 else "")


# Every case runs for each algorithm, dtype and pass.
GEOMETRIES = (
    Case((2, 3, 9, 11), (3, 3), padding=(1, 1)),
    Case((1, 2, 7, 7), (13, 13), padding=(6, 6)),  # kernel wider than the map
    Case((2, 2, 12, 20), (7, 7), padding=(3, 3), layout="sliced"),
    Case((2, 4, 8, 9), (5, 5), padding=(2, 2), layout="nhwc"),
    Case((1, 1, 12, 33), (3, 31), padding=(1, 15)),  # several column blocks, columns not a multiple of 8
    Case((1, 1, 19, 24), (17, 5), padding=(8, 2), layout="sliced"),
    Case((2, 2, 11, 13), (4, 6), padding=(1, 3)),  # even kernel
    Case((2, 2, 11, 13), (3, 5), stride=(2, 2), padding=(1, 2)),
    Case((1, 3, 14, 15), (7, 7), stride=(2, 1), padding=(3, 3), layout="nhwc"),
    Case((1, 2, 16, 17), (3, 3), padding=(6, 6), dilation=(6, 7)),
    Case((2, 2, 13, 14), (5, 4), stride=(3, 2), padding=(2, 1), dilation=(2, 3)),  # unequal stride phases
    Case((1, 2, 9, 12), (3, 3), stride=(2, 2), dilation=(2, 2)),  # phases that no tap reaches
    Case((1, 2, 10, 10), (2, 2), stride=(3, 3)),  # input pixels that no window reaches
    Case((2, 2, 9, 10), (5, 5), padding=(2, 2), multiplier=3),
    Case((1, 2, 12, 12), (7, 3), stride=(2, 2), padding=(3, 1), multiplier=2, layout="nhwc"),
    Case((3, 2, 1, 20), (1, 9), padding=(0, 4)),  # H = 1
    Case((2, 2, 20, 1), (9, 3), padding=(4, 1), layout="sliced"),  # W = 1
    Case((1, 33, 6, 5), (3, 3), padding=(1, 1), layout="nhwc"),  # channels past a block
    Case((1, 1, 8, 40), (3, 9), padding=(7, 11)),  # padding wider than the kernel
    Case((2, 2, 8, 8), (1, 1), bias=False),
    Case((5, 1, 30, 24), (3, 13), padding=(1, 6), bias=False),  # several row blocks
)


def has_toeplitz(case: Case) -> bool:
    """Why not is the planner's to say; this is what the tests expect of it."""
    return case.kernel[1] >= 3 and case.dtype != "float64"


def interpreter_cases() -> list[Case]:
    """All geometries in float32; float16 where operands stay half, float64 where sums are double."""
    single, half, double = cases(("float32",)), cases(("float16",)), cases(("float64",))
    return single + [case for case in half if case.algorithm == "toeplitz"] + double[::3]


def cases(dtypes: tuple[str, ...]) -> list[Case]:
    every = [
        Case(**{**vars(case), "dtype": dtype, "algorithm": algorithm})
        for case in GEOMETRIES
        for dtype in dtypes
        for algorithm in ("direct", "toeplitz")
    ]
    return [case for case in every if case.algorithm == "direct" or has_toeplitz(case)]


@contextmanager
def only(algorithm: str) -> Iterator[None]:
    """Runs the planner's best plan of one algorithm, also for stride phases where another would win."""
    tuning, operators = kernels("tuning"), kernels("depthwise_conv2d")
    before = tuning.choose

    def choose(key, plans, time):
        return next((plan for plan in plans if plan.algorithm == algorithm), plans[0]), True

    operators._settled.clear()
    tuning.choose = choose
    try:
        yield
    finally:
        tuning.choose = before
        operators._settled.clear()


def lay_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "nhwc":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        n, c, h, w = tensor.shape
        wide = torch.full((n, c + 1, h + 1, w + 3), float("nan"), dtype=tensor.dtype, device=tensor.device)
        view = wide[:, 1:, :h, 2 : w + 2]
        view.copy_(tensor)
        return view
    return tensor.contiguous()


def expected(case: Case, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All three passes by F.conv2d and autograd in ``dtype``, on the CPU."""
    x = inputs["input"].detach().cpu().to(dtype).contiguous().requires_grad_()
    w = inputs["weight"].detach().cpu().to(dtype).requires_grad_()
    bias = inputs["bias"].detach().cpu().to(dtype) if case.bias else None
    with torch.enable_grad():
        y = F.conv2d(x, w, bias, case.stride, case.padding, case.dilation, groups=case.size[1])
        gy = inputs["grad_output"].detach().cpu().to(dtype).contiguous()
        dx, dw = torch.autograd.grad(y, (x, w), gy)
    return {"forward": y.detach(), "backward_input": dx, "backward_weight": dw}


def make_inputs(case: Case, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(case.name) + sum(case.size))
    dtype = getattr(torch, case.dtype)
    n, c, h, w = case.size

    def random(*size):
        return torch.randn(size, generator=generator).to(dtype).to(device)

    out = [
        (case.size[2 + i] + 2 * case.padding[i] - case.dilation[i] * (case.kernel[i] - 1) - 1)
        // case.stride[i]
        + 1
        for i in (0, 1)
    ]
    return {
        "input": lay_out(random(n, c, h, w), case.layout),
        "weight": random(c * case.multiplier, 1, *case.kernel),
        "bias": random(c * case.multiplier),
        "grad_output": lay_out(random(n, c * case.multiplier, *out), case.layout),
    }


def run_pass(case: Case, pass_name: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    geometry = (case.stride, case.padding, case.dilation)
    ops = torch.ops.lkconv_triton
    if pass_name == "forward":
        bias = inputs["bias"] if case.bias else None
        return ops.depthwise_conv2d(inputs["input"], inputs["weight"], bias, *geometry)
    if pass_name == "backward_input":
        grad_output, weight = inputs["grad_output"], inputs["weight"]
        return ops.depthwise_conv2d_backward_input(grad_output, weight, case.size, *geometry)
    return ops.depthwise_conv2d_backward_weight(
        inputs["grad_output"], inputs["input"], case.kernel, *geometry
    )


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    error = (got.double().cpu() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)
    return float(error)


def check_pass(case: Case, pass_name: str, device: str) -> None:
    """Runs one pass of one case: value, memory format and bit-identical repetition."""
    inputs = make_inputs(case, device)
    exact = expected(case, inputs, torch.float64)[pass_name]
    peer = expected(case, inputs, getattr(torch, case.dtype))[pass_name]
    check_result(case, pass_name, inputs, exact, peer)


def check_result(case: Case, pass_name: str, inputs: dict, exact: torch.Tensor, peer: torch.Tensor) -> None:
    """As check_pass, given the results in float64 and those of PyTorch in the case's dtype."""
    with only(case.algorithm):
        got = run_pass(case, pass_name, inputs)
        if inputs["input"].device.type != "cpu":  # the interpreter runs programs one after the other
            assert torch.equal(got, run_pass(case, pass_name, inputs)), "two runs differ"
    assert got.dtype == getattr(torch, case.dtype) and got.shape == exact.shape
    check_error(case, relative_error(got, exact), relative_error(peer, exact))
    check_format(case, pass_name, inputs, got)


def check_error(case: Case, error: float, peer_error: float) -> None:
    """At most twice the error of F.conv2d in the same dtype, and in float32 at most 1e-6 sqrt(taps).

    In float64 F.conv2d is the oracle itself, so the float32 bound is scaled by the ratio of the two epsilons.
    """
    eps = torch.finfo(getattr(torch, case.dtype)).eps
    bound = 1e-6 * (case.kernel[0] * case.kernel[1]) ** 0.5 * (eps / torch.finfo(torch.float32).eps)
    if case.dtype != "float64":
        assert error <= 2 * peer_error + eps, f"error {error:.2e}, F.conv2d {peer_error:.2e}"
    if case.dtype in ("float32", "float64"):
        assert error <= bound, f"error {error:.2e}, bound {bound:.2e}"


def check_format(case: Case, pass_name: str, inputs: dict[str, torch.Tensor], got: torch.Tensor) -> None:
    """The memory format torch itself would give an output shaped like ``got``."""
    first = inputs["grad_output" if pass_name == "backward_input" else "input"]
    suggested = torch._prims_common.suggest_memory_format(first)
    if pass_name == "backward_weight":
        suggested = torch.contiguous_format
    assert got.is_contiguous(memory_format=suggested), f"{got.stride()} is not {suggested}"
