"""``explain`` of GPU tensors without a GPU: fake tensors, and a machine that is given, not asked for."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import lkconv
from float32_precision import tf32_allowed
from lkconv import backends

HAS_CUDA_MODULE = torch.version.cuda is not None and importlib.util.find_spec("lkconv._C_cuda") is not None
needs_cuda_module = pytest.mark.skipif(not HAS_CUDA_MODULE, reason="lkconv._C_cuda was not built")
H100 = backends.CudaMachine()
SMALL = backends.CudaMachine(sms=84, shared_per_block=101376, shared_per_sm=102400)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FORMATS = (torch.contiguous_format, torch.channels_last)
PASSES = ("forward", "backward_input", "backward_weight")


@pytest.fixture(autouse=True)
def choices_of_its_own(monkeypatch):
    """What this file decides about devices must not outlive it."""
    monkeypatch.setattr(backends, "_choices", {})


@pytest.fixture
def cuda_machine(monkeypatch, request):
    machine = getattr(request, "param", H100)
    monkeypatch.setattr(backends, "cuda_machine", lambda device: machine)


def explain(size, kernel, dtype=torch.bfloat16, memory_format=torch.contiguous_format, multiplier=1, **call):
    with FakeTensorMode():
        x = torch.empty(size, dtype=dtype, device="cuda", memory_format=memory_format)
        w = torch.empty(size[1] * multiplier, 1, *kernel, dtype=dtype, device="cuda")
        return lkconv.explain(x, w, **call)


@needs_cuda_module
@pytest.mark.parametrize("cuda_machine", (H100, SMALL), indirect=True, ids=("H100", "small"))
@pytest.mark.parametrize("memory_format", FORMATS, ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "kernel", "call"),
    [
        ((64, 384, 32, 32), (31, 31), {"padding": 15}),
        ((32, 96, 56, 56), (7, 7), {"padding": 3}),
        ((2, 12, 20, 24), (3, 3), {"stride": 2, "padding": 1}),
        ((2, 6, 16, 19), (5, 4), {"stride": (3, 2), "padding": 2, "dilation": (2, 3)}),
        ((2, 6, 11, 16), (5, 9), {"padding": (2, 4), "multiplier": 3}),
        ((1, 1, 1, 1), (1, 1), {}),
    ],
)
def test_every_cuda_call_is_explained(size, kernel, call, dtype, memory_format, cuda_machine):
    report = explain(size, kernel, dtype, memory_format, **call)
    assert report.backend == "cuda"
    lines = str(report).splitlines()
    for name in PASSES:
        plan = report.passes[name]
        assert plan.algorithm in ("direct", "toeplitz")
        assert len(plan.tile) == 2 and all(side > 0 for side in plan.tile)
        assert plan.flops > 0 and plan.scratch_bytes >= 0
        ((other, reason),) = plan.alternatives
        assert {plan.algorithm, other} == {"direct", "toeplitz"} and reason
        line = next(line for line in lines if line.startswith(f"{name}: "))
        assert f"{plan.algorithm}, tile {plan.tile[0]}x{plan.tile[1]}, {plan.block}, " in line
        assert f"  not cuda:{other}: {reason}" in lines


@needs_cuda_module
def test_the_tile_is_rows_by_columns(cuda_machine):
    """At 31x31 and 64 images a tile of the matrix units is 16 whole images of one channel."""
    report = explain((64, 384, 32, 32), (31, 31), padding=15)
    assert report.tile == (32, 32)
    assert report.passes["forward"].block == "2 tiles a block, each of 1 channel and 16 images"
    narrow = explain((1, 64, 40, 24), (3, 3), torch.float32, padding=1).passes["forward"]
    assert narrow.tile[1] == 24 and narrow.block.startswith("1 tile a block, each of ")


@needs_cuda_module
def test_scratch_is_that_of_the_whole_call(cuda_machine):
    size, taps = (64, 384, 32, 32), 31 * 31
    maps = 2 * 64 * 384 * 32 * 32
    dense = explain(size, (31, 31), padding=15).passes
    assert dense["forward"].scratch_bytes == dense["backward_input"].scratch_bytes == 0
    partial_weights = dense["backward_weight"].scratch_bytes
    assert partial_weights > 0 and partial_weights % (4 * 384 * taps) == 0
    # channels_last tensors are copied to planes for the matrix units, and back
    copied = explain(size, (31, 31), memory_format=torch.channels_last, padding=15).passes
    assert copied["forward"].scratch_bytes == copied["backward_input"].scratch_bytes == 2 * maps
    assert copied["backward_weight"].scratch_bytes == partial_weights + 2 * maps


@needs_cuda_module
def test_stride_phases_are_counted_together(cuda_machine):
    """The phases of backward_input do about the work of the forward pass, where none multiplies a band's
    zeros."""
    with tf32_allowed(False):
        strided = explain((8, 64, 56, 56), (7, 7), torch.float32, stride=2, padding=3).passes
    assert 0.8 < strided["backward_input"].flops / strided["forward"].flops < 3
    assert strided["forward"].flops >= 2 * 8 * 64 * 28 * 28 * 40


@needs_cuda_module
def test_reasons_against_the_other_algorithm(cuda_machine, monkeypatch):
    def reason(dtype=torch.bfloat16, **more):
        report = explain((8, 64, 56, 56), (31, 31), dtype, padding=15, **more)
        return report.passes["forward"].alternatives[0][1]

    assert "estimated to be slower: " in reason() and " cycles against " in reason()
    assert "float64" in reason(torch.float64)
    with tf32_allowed(False):
        assert "tf32" in reason(torch.float32)
    with tf32_allowed(True):
        assert "estimated to be slower" in reason(torch.float32)
    assert "stride along the row" in reason(stride=(1, 2))
    monkeypatch.setenv("LKCONV_TOEPLITZ", "0")
    assert reason() == "LKCONV_TOEPLITZ=0"


FAR = {"dilation": (1, 9000), "padding": (0, 5000)}  # a window far wider than shared memory


@needs_cuda_module
@pytest.mark.parametrize(
    ("size", "kernel", "call", "reason"),
    [
        ((1, 1, 1, 2**29 + 8), (1, 3), {}, "an extent of 536870920 is beyond 2^29"),
        ((1, 2, 1, 2**28), (1, 3), {"dilation": (1, 2**28 - 1), "padding": (0, 2**28)}, "is beyond 2^29"),
        ((2, 3, 40, 10000), (3, 3), FAR, "bytes of shared memory"),
    ],
)
def test_what_no_algorithm_takes_another_backend_computes(size, kernel, call, reason, cuda_machine, caplog):
    with caplog.at_level("WARNING", "lkconv"):
        report = explain(size, kernel, torch.float64, **call)
    assert report.backend in ("triton", "torch") and not caplog.records
    why = dict(report.alternatives)["cuda"]
    assert (
        why.startswith("no kernel takes ")
        and "which its op leaves to PyTorch: " in why
        and why.endswith(reason)
    )
    assert f"  not cuda: {why}" in str(report)
    with lkconv.use_backend("cuda"):
        for _ in range(2):
            asked = explain(size, kernel, torch.float64, **call)
    assert asked.backend == report.backend and dict(asked.alternatives)["cuda"] == f"asked for, but {why}"
    assert len(caplog.records) == 1 and why in caplog.text, "a request that fails is logged once"
    ordinary = explain((2, 3, 40, 40), (3, 3), torch.float64, padding=1)
    assert ordinary.backend == "cuda", "one call's sizes decide about no other"


class Called(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.name())
        return op(*args, **(kwargs or {}))


@needs_cuda_module
def test_a_call_that_no_cuda_kernel_takes_is_computed_elsewhere(cuda_machine, monkeypatch):
    """Forward and both gradients; were the forward left to CUDA, its gradients would raise."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # or FakeTensorMode would use the GPU
    with FakeTensorMode() as mode, Called() as called:
        x, w = (mode.from_tensor(torch.empty(s, device="meta")) for s in ((2, 3, 40, 10000), (3, 1, 3, 3)))
        x.fake_device = w.fake_device = torch.device("cuda:0")
        lkconv.depthwise_conv2d(x, w, **FAR)
        refused, called.names = called.names, []
        lkconv.depthwise_conv2d(x, w, padding=1)
    ours = [[n for n in names if n.startswith("lkconv::")] for names in (refused, called.names)]
    assert ours == [[], ["lkconv::depthwise_conv2d"]]
    assert [n for n in refused if "conv" in n], "another backend computes it"


@needs_cuda_module
def test_an_empty_batch_is_explained(cuda_machine):
    report = explain((0, 4, 8, 8), (3, 3))
    assert report.backend == "cuda" and report.algorithm == "none: the tensors are empty"


@needs_cuda_module
def test_the_call_names_its_launches_and_refuses_empty_problems():
    cuda = backends.cuda_module()[0]
    geometry = (31, 31), (1, 1), (15, 15), (1, 1), "bfloat16"
    chosen, other = cuda.plan("forward", (64, 384, 32, 32), 384, *geometry, channels_last=True)
    assert [launch["name"] for launch in chosen["launches"]] == ["pack", "toeplitz_forward", "pack"]
    assert [launch["name"] for launch in other["launches"]] == ["direct_forward"]
    assert chosen["launches"][1]["blocks"] == chosen["blocks"] and other["scratch_bytes"] == 0
    with pytest.raises(ValueError, match="nothing to plan"):
        cuda.plan("forward", (0, 384, 32, 32), 384, *geometry)


@pytest.mark.parametrize("memory_format", FORMATS, ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_calls_are_explained(dtype, memory_format, monkeypatch):
    pytest.importorskip("triton")
    from triton_support import kernels

    monkeypatch.setattr(kernels(), "is_available", lambda device: (True, ""))
    monkeypatch.setattr(kernels("report"), "machine_of", lambda device: kernels("planner").H200)
    monkeypatch.setenv("LKCONV_TRITON_AUTOTUNE", "0")
    with lkconv.use_backend("triton"):
        report = explain((8, 64, 32, 32), (13, 13), dtype, memory_format, padding=6)
    assert report.backend == "triton"
    for name in PASSES:
        plan = report.passes[name]
        assert plan.algorithm in ("direct", "toeplitz") and plan.block is None and len(plan.tile) == 2
        assert plan.flops > 0 and plan.alternatives and all(reason for _, reason in plan.alternatives)
    assert "not cuda: triton comes first (asked for)" in str(report) or not HAS_CUDA_MODULE
