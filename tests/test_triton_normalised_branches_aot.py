"""The Triton kernels of normalised branches compile for GPUs that are not here, without spills."""

from __future__ import annotations

import os

import pytest
import torch

from normalised_branches_cases import LAYOUTS
from triton_support import kernels

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from triton_aot import CUDA_TARGETS, HIP_TARGET, Launch, Recorder, compile_launch, resources

KERNELS = (
    "outputs", "statistics", "sum", "dots", "add_tiles", "backward_input", "backward_weight",
    "add_weight_splits", "backward_given",
)  # fmt: skip
# (size, kernels as (kernel, padding, dilation)); UniRepLKNet's 13 x 13 and RepLKNet's 31 x 31 run apart.
BLOCKS = {
    "unireplknet": ((32, 160, 28, 28), [(5, 2, 1), (7, 6, 2), (3, 3, 3), (3, 4, 4), (3, 5, 5)]),
    "replknet": ((32, 128, 56, 56), [(5, 2, 1)]),
    "replknet 7": ((32, 1024, 7, 7), [(5, 2, 1)]),
    "7x7": ((64, 96, 56, 56), [(7, 3, 1), (3, 1, 1), (1, 0, 1)]),
}


def launches(name: str, dtype: torch.dtype, layout: str, monkeypatch) -> dict[str, Launch]:
    """What one training step would launch, with tensors that have sizes but no data: an identity, and one
    branch convolved before."""
    operators, recorder = kernels("normalised_branches"), Recorder()
    for kernel in KERNELS:
        attribute = f"{kernel}_kernel"
        monkeypatch.setattr(operators, attribute, recorder(getattr(operators, attribute)))

    def meta(*size: int, dtype=dtype) -> torch.Tensor:
        tensor = torch.empty(size, dtype=dtype, device="meta")
        return tensor.contiguous(memory_format=LAYOUTS[layout]) if len(size) == 4 else tensor

    size, convolutions = BLOCKS[name]
    x, given, wide = meta(*size), [meta(*size)], torch.promote_types(dtype, torch.float32)
    weights = [meta(size[1], 1, k, k).contiguous() for k, _, _ in convolutions]
    padding, dilation = ([c[i] for c in convolutions for _ in range(2)] for i in (1, 2))
    saved, means, _ = operators.normalised_branches(x, weights, given, padding, dilation, True)
    operators.normalised_branches_sum(x, saved, given, True, means, means[0])
    operators.normalised_branches_dots(x, x, saved, given, True, means)
    factors = [meta(len(weights) + 2, size[1], dtype=wide)] * 3
    operators.normalised_branches_backward(x, x, saved, weights, given, padding, dilation, True, *factors)
    return dict(zip(KERNELS, recorder.launches, strict=True))


# (block, kernel) -> bytes a thread that the assembler of Triton 3.8, not of 3.9, keeps on the stack on sm_90.
STACK = {("7x7", "backward_input"): 8}


def check(name: str, launch: Launch, arch: int, stack: int = 0) -> None:
    used = resources(compile_launch(launch, CUDA_TARGETS[arch]))
    assert used.stack <= stack, f"{name} spills {used.stack} bytes a thread"
    assert used.registers * 128 <= 65536


@pytest.mark.parametrize("arch", CUDA_TARGETS)
@pytest.mark.parametrize("dtype,layout", [(torch.float32, "nchw"), (torch.bfloat16, "nhwc")], ids=str)
def test_architectures(dtype, layout, arch, monkeypatch):
    """A block of UniRepLKNet: five kernels and two more branches in one launch, nothing in local memory."""
    for name, launch in launches("unireplknet", dtype, layout, monkeypatch).items():
        check(name, launch, arch)


@pytest.mark.parametrize(
    "block,dtype,layout",
    [
        ("unireplknet", torch.float64, "nchw"),
        ("replknet", torch.bfloat16, "nchw"),
        ("replknet 7", torch.bfloat16, "nchw"),
        ("7x7", torch.float16, "nchw"),
    ],
    ids=str,
)
def test_blocks(block, dtype, layout, monkeypatch):
    for name, launch in launches(block, dtype, layout, monkeypatch).items():
        check(name, launch, 90, STACK.get((block, name), 0))


def test_amd(monkeypatch):
    """Nothing here is particular to one vendor: the same source compiles for gfx942."""
    for launch in launches("replknet", torch.float16, "nchw", monkeypatch).values():
        assert "global_store" in compile_launch(launch, HIP_TARGET).asm["amdgcn"]
