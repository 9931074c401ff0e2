"""What the Triton planner reports of a call against what the call does, on tensors that hold no data."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from triton_support import PASSES, kernels

pytest.importorskip("triton")
from triton_aot import Recorder

operators = kernels("depthwise_conv2d")
planner = kernels("planner")
plan = kernels().plan

GEOMETRIES = {  # (N, C, H, W), channels out, kernel, stride, padding, dilation
    "plain": ((4, 16, 20, 24), 16, (9, 9), (1, 1), (4, 4), (1, 1)),
    "large": ((8, 64, 32, 32), 64, (31, 31), (1, 1), (15, 15), (1, 1)),
    "multiplier": ((4, 8, 14, 15), 24, (5, 13), (1, 1), (2, 6), (1, 1)),
    "stride 2": ((8, 32, 56, 56), 32, (13, 13), (2, 2), (6, 6), (1, 1)),
    "unequal strides": ((2, 16, 30, 31), 32, (7, 11), (3, 2), (3, 5), (1, 1)),
    "phases that no tap reaches": ((2, 8, 17, 18), 8, (3, 5), (2, 2), (0, 1), (2, 2)),
    "phases without pixels": ((2, 8, 1, 9), 8, (3, 5), (2, 2), (1, 2), (1, 1)),
    "one column": ((2, 8, 30, 1), 8, (5, 5), (1, 1), (2, 2), (1, 1)),
    "one channel": ((8, 1, 40, 40), 1, (13, 13), (1, 1), (6, 6), (1, 1)),
}


class Does(TorchDispatchMode):
    """Notes the kernels, copies and fills of a call in order, and the bytes it allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.name()
        if name in ("aten::empty.memory_format", "aten::clone"):
            self.bytes += out.numel() * out.element_size()
        if name in ("aten::clone", "aten::copy_"):
            self.launches.append("copy")
        elif name == "aten::zero_":
            self.launches.append("zero")
        return out


class Interleaved(Recorder):
    """A recorder of launches that notes them between the copies."""

    def __init__(self, does: Does) -> None:
        super().__init__()
        self.does = does

    def __call__(self, kernel):
        self.does.launches.append(kernel.__name__.removesuffix("_kernel"))
        return super().__call__(kernel)


def do(pass_name, geometry, dtype, channels_last, monkeypatch) -> Does:
    """Runs a call without its kernels."""
    size, channels, kernel, stride, padding, dilation = geometry
    form = torch.channels_last if channels_last else torch.contiguous_format
    out = kernels("problem").output_size
    out_size = [out(size[2 + i], kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1)]

    def empty(*of):
        return torch.empty(of, dtype=dtype, device="meta").to(memory_format=form)

    x, y = empty(*size), empty(size[0], channels, *out_size)
    w = torch.empty(channels, 1, *kernel, dtype=dtype, device="meta")
    operators._settled.clear()
    does = Does()
    monkeypatch.setattr(kernels("launch"), "wrap_triton", Interleaved(does))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    with does:
        if pass_name == "forward":
            result = operators.depthwise_conv2d(x, w, None, stride, padding, dilation)
        elif pass_name == "backward_input":
            result = operators.depthwise_conv2d_backward_input(y, w, size, stride, padding, dilation)
        else:
            result = operators.depthwise_conv2d_backward_weight(y, x, kernel, stride, padding, dilation)
    does.bytes -= result.numel() * result.element_size()
    return does


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_a_call_launches_and_allocates_what_is_reported(
    geometry, dtype, channels_last, pass_name, monkeypatch
):
    name = str(dtype).removeprefix("torch.")
    chosen = plan(pass_name, *geometry, name, channels_last=channels_last)[0]
    does = do(pass_name, geometry, dtype, channels_last, monkeypatch)
    assert chosen["launches"] == does.launches
    assert chosen["scratch_bytes"] == does.bytes


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_copies_of_channels_last_are_counted(channels_last):
    """Rows for the matrix units, and back: both copies are as large as their tensors."""
    geometry = ((8, 64, 32, 32), 64, (31, 31), (1, 1), (15, 15), (1, 1))
    copies = 2 * 2 * 8 * 64 * 32 * 32 * channels_last
    for pass_name in ("forward", "backward_input"):
        chosen, other = plan(pass_name, *geometry, "float16", channels_last=channels_last)
        assert chosen["algorithm"] == "toeplitz" and chosen["scratch_bytes"] == copies
        assert other["algorithm"] == "direct" and other["scratch_bytes"] == 0
    chosen = plan("backward_weight", *geometry, "float16", channels_last=channels_last)[0]
    assert chosen["algorithm"] == "toeplitz"
    assert chosen["scratch_bytes"] == copies + chosen["splits"] * 64 * 31 * 31 * 4


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_stride_phases_are_reported_together(dtype):
    """Four phases of 28 x 28 pixels: what each takes on its own, added."""
    geometry = GEOMETRIES["stride 2"]
    (problems, complete) = kernels("report").make_problems("backward_input", *geometry, False)
    assert complete and len(problems) == 4
    best = [planner.plan_conv(p, dtype, planner.H200)[0][0] for p in problems]
    chosen, *others = plan("backward_input", *geometry, dtype)
    for key in ("macs", "bytes", "cycles"):
        assert chosen[key] == sum(getattr(p, key) for p in best)
    assert chosen["flops"] == 2 * chosen["macs"] > 2 * 3 * best[0].macs
    assert len(chosen["launches"]) == 4
    for other in others:
        assert not other["possible"] or other["cycles"] >= chosen["cycles"]


def test_the_costliest_phase_stands_for_the_call():
    """A phase one column wide has no band; the other one is what explain() names."""
    geometry = ((64, 96, 56, 56), 96, (27, 27), (2, 27), (13, 13), (1, 1))
    problems, _ = kernels("report").make_problems("backward_input", *geometry, False)
    plans = [planner.plan_conv(p, "float16", planner.H200)[0] for p in problems]
    main = max((found[0] for found in plans), key=lambda p: p.cycles)
    chosen = plan("backward_input", *geometry, "float16")[0]
    assert chosen["algorithm"] == main.algorithm and chosen["blocks"] == main.blocks
    assert len(chosen["launches"]) == len(problems) > 4


def test_a_gradient_that_no_window_reaches_is_zero():
    """The only output reads the padding alone."""
    geometry = ((2, 3, 1, 1), 3, (1, 1), (3, 3), (1, 1), (1, 1))
    (chosen,) = plan("backward_input", *geometry)
    assert chosen["possible"] and chosen["launches"] == ["zero"] and chosen["flops"] == 0
