"""The Triton kernels that fold branch kernels compile for GPUs that are not here, without spills."""

from __future__ import annotations

import os

import pytest
import torch

from merge_cases import CASES, Case
from triton_support import kernels

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from triton_aot import CUDA_TARGETS, HIP_TARGET, Launch, Recorder, compile_launch, resources

NAMES = ("merge_depthwise_kernels", "merge_depthwise_kernels_backward")
MODELS = {case.name: case for case in CASES if case.name in ("replknet", "unireplknet", "unscaled", "single")}


def launches(case: Case, dtype: torch.dtype, monkeypatch) -> dict[str, Launch]:
    """What one call of either op would launch, with tensors that have sizes but no data."""
    operators, recorder = kernels("merge_depthwise_kernels"), Recorder()
    for name in NAMES:
        monkeypatch.setattr(operators, f"{name}_kernel", recorder(getattr(operators, f"{name}_kernel")))

    def meta(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    o, place = case.channels, (case.offset(), case.step())
    weights = [meta(o, 1, *b.kernel) for b in case.branches]
    scales = [meta(o) for _ in weights] if case.scaled else []
    biases = [meta(o) for _ in range(case.biases)]
    operators.merge_depthwise_kernels(weights, scales, biases, case.kernel, *place, dtype)
    dense = meta(o, 1, *case.kernel)
    operators.merge_depthwise_kernels_backward(dense, meta(o), weights, scales, biases, *place)
    return dict(zip(NAMES, recorder.launches, strict=True))


@pytest.mark.parametrize("arch", CUDA_TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_architectures(dtype, arch, monkeypatch):
    """A block of UniRepLKNet: six branches in one launch, nothing in local memory."""
    for name, launch in launches(MODELS["unireplknet"], dtype, monkeypatch).items():
        compiled = compile_launch(launch, CUDA_TARGETS[arch])
        used = resources(compiled)
        assert used.stack == 0, f"{name} spills {used.stack} bytes a thread"
        assert used.registers * 128 <= 65536
        assert f"fma.rn.{'f64' if dtype == torch.float64 else 'f32'}" in compiled.asm["ptx"]


@pytest.mark.parametrize("case", MODELS.values(), ids=lambda c: c.name)
def test_cases(case, monkeypatch):
    """Without scales, without biases, and the largest kernel: one architecture, and the other vendor's."""
    for name, launch in launches(case, torch.float16, monkeypatch).items():
        used = resources(compile_launch(launch, CUDA_TARGETS[90]))
        assert used.stack == 0, f"{name} spills {used.stack} bytes a thread"
        assert "global_store" in compile_launch(launch, HIP_TARGET).asm["amdgcn"]
