"""The Group-Mix Triton kernels compile for GPUs that are not here, onto matrix units and without spills."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from triton_aot import CUDA_TARGETS, HIP_TARGET, Recorder, compile_launch, resources
from triton_group_mix_calls import arguments, run_all
from triton_support import kernels

MATRIX_UNITS = {80: ("mma.sync",), 90: ("wgmma.mma_async", "mma.sync"), 100: ("tcgen05.mma", "mma.sync")}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# (C, kernel) -> bytes a thread that the assembler of Triton 3.8, not of 3.9, keeps on the stack on sm_90.
STACK = {(40, "weight_kernel"): 24}
PRODUCTS = {
    "aggregate_kernel", "pointwise_kernel", "weight_kernel", "context_kernel", "attend_kernel",
    "grad_context_kernel", "attend_backward_kernel",
}  # fmt: skip
LARGEST = {"aggregate_kernel", "weight_kernel", "attend_backward_kernel"}


def launches(dim, dtype, monkeypatch, names=None, tf32=False):
    """What the ops launch on an H200 for images of 28 x 28, one launch of each kernel and mode."""
    group_mix, recorder = kernels("group_mix"), Recorder()
    monkeypatch.setattr(group_mix, "wrap_triton", recorder)
    monkeypatch.setattr(group_mix, "tf32_allowed", lambda device: tf32)
    run_all(group_mix, arguments(dim, 8, (28, 28), dtype), (28, 28))
    found = {(launch.kernel.__name__, launch.args.get("TRAIN")): launch for launch in recorder.launches}
    assert len(found) == 16
    return [launch for (name, _), launch in found.items() if names is None or name in names]


@pytest.mark.parametrize("arch", CUDA_TARGETS)
def test_half_types_use_matrix_units_and_do_not_spill(arch, monkeypatch):
    """On sm_80 and sm_100 ptxas moves a few bytes to memory so that more programs fit."""
    names = None if arch == 90 else PRODUCTS | {"spread_kernel", "taps_kernel"}
    for launch in launches(320, torch.bfloat16, monkeypatch, names):
        compiled, name = compile_launch(launch, CUDA_TARGETS[arch]), launch.kernel.__name__
        used = resources(compiled)
        assert used.stack <= (0 if arch == 90 else 32), f"{name} spills {used.stack} bytes a thread"
        assert used.shared <= SHARED_LIMIT[arch]
        assert any(unit in compiled.asm["ptx"] for unit in MATRIX_UNITS[arch]) is (name in PRODUCTS), name


@pytest.mark.parametrize("dim,dtype", [(40, torch.float16), (200, torch.bfloat16), (480, torch.bfloat16)])
def test_no_width_spills_in_half_types(dim, dtype, monkeypatch):
    for launch in launches(dim, dtype, monkeypatch, LARGEST):
        used = resources(compile_launch(launch, CUDA_TARGETS[90]))
        allowed = STACK.get((dim, launch.kernel.__name__), 0)
        assert used.stack <= allowed, f"{launch.kernel.__name__} spills {used.stack} bytes a thread"


@pytest.mark.parametrize("dim,dtype", [(320, torch.float32), (160, torch.float64)])
def test_wide_types_keep_all_but_a_few_values_in_registers(dim, dtype, monkeypatch):
    """ptxas gives up a few loop invariants for more threads; a tile that spilled would take hundreds of
    bytes.
    """
    for launch in launches(dim, dtype, monkeypatch, LARGEST | {"attend_kernel"}):
        used = resources(compile_launch(launch, CUDA_TARGETS[90]))
        assert used.stack <= 64, f"{launch.kernel.__name__} spills {used.stack} bytes a thread"
        assert used.shared <= SHARED_LIMIT[80]


def test_tf32_where_torch_allows_it(monkeypatch):
    for allowed in (False, True):
        launch = launches(80, torch.float32, monkeypatch, {"pointwise_kernel"}, allowed)[0]
        ptx = compile_launch(launch, CUDA_TARGETS[90]).asm["ptx"]
        assert ("tf32" in ptx) is allowed


def test_amd(monkeypatch):
    """Nothing here is particular to one vendor: the same source compiles for gfx942."""
    for launch in launches(
        80, torch.float16, monkeypatch, {"pointwise_kernel", "context_kernel", "taps_kernel"}
    ):
        code = compile_launch(launch, HIP_TARGET).asm["amdgcn"]
        assert ("v_mfma" in code) is (launch.kernel.__name__ in PRODUCTS)
