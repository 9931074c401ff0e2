"""What torch.compile sees of the Triton operators, traced on fake CUDA tensors: no GPU is needed."""

from __future__ import annotations

import os

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from triton_support import kernels

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is opaque to torch.compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402

from lkconv.attention import segmented_registration  # noqa: E402
from lkconv.ops import register_hooks  # noqa: E402

kernels()
register_hooks("lkconv_triton")
segmented_registration.register_hooks("lkconv_triton")
GEOMETRY = ((2, 1), (6, 6), (1, 1))


class Target:
    """The part of a Triton driver that tracing asks for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class AllPasses(torch.nn.Module):
    def forward(self, x, w, dy):
        ops = torch.ops.lkconv_triton
        return (
            ops.depthwise_conv2d(x, w, None, *GEOMETRY),
            ops.depthwise_conv2d_backward_input(dy, w, x.shape, *GEOMETRY),
            ops.depthwise_conv2d_backward_weight(dy, x, w.shape[2:], *GEOMETRY),
        )


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setenv("LKCONV_TRITON_AUTOTUNE", "0")
    monkeypatch.setattr(triton.runtime.driver, "_active", Target())


def fake(mode, size, channels_last, dynamic, name):
    sizes = [DimDynamic.STATIC] * 4
    if dynamic:
        sizes = [DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.DYNAMIC]
    tensor = torch.empty(size, dtype=torch.bfloat16, device="meta")
    if channels_last:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    context = StatelessSymbolicContext(dynamic_sizes=sizes)
    made = mode.from_tensor(tensor, symbolic_context=context, source=ConstantSource(name))
    made.fake_device = torch.device("cuda", 0)
    return made


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_traced_into_kernels(dynamic, channels_last):
    """The operators dissolve into kernel calls that copy no input, with symbolic sizes left symbolic."""
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    x = fake(mode, (6, 16, 32, 32), channels_last, dynamic, "x")
    dy = fake(mode, (6, 16, 16, 32), channels_last, dynamic, "dy")
    w = fake(mode, (16, 1, 13, 13), False, False, "w")
    graph, _ = aot_export_module(AllPasses(), (x, w, dy), trace_joint=False)
    calls = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    # The forward, one call per stride phase, the weight gradient and its second pass.
    assert len(calls) == 1 + 2 + 2
    assert not [node for node in graph.graph.nodes if "lkconv" in str(node.target)]
    # Only outputs are written: a tensor to clone that the kernel merely reads would cost a copy per call.
    assert {name for node in calls for name in node.kwargs["tensors_to_clone"]} <= {"y", "partial", "out"}
    if dynamic:
        batch = x.shape[0].node.expr
        assert not environment.replacements.get(batch, batch).is_number, "the batch size was specialised"


class Segments(torch.nn.Module):
    def forward(self, x, w):
        return (torch.ops.lkconv_triton.segmented_depthwise_conv2d(x, [w, None, w], [None] * 3, [16, 8, 16]),)


@pytest.mark.parametrize("channels_last", [False, True])
def test_segments_are_traced_into_kernels_that_write_slices(channels_last):
    """A kernel for each window, an output of which nothing is put together, and no clone of the input."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x, w = fake(mode, (6, 40, 32, 32), channels_last, True, "x"), fake(mode, (16, 1, 3, 3), False, False, "w")
    graph, _ = aot_export_module(Segments(), (x, w), trace_joint=False)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert sum("triton_kernel_wrapper" in target for target in targets) == 2
    assert not [target for target in targets if "lkconv" in target or "aten.cat" in target]
    calls = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert {name for node in calls for name in node.kwargs["tensors_to_clone"]} == {"y"}


def test_fake_outputs_have_the_memory_format_of_real_ones():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    for channels_last in (False, True):
        x = fake(mode, (6, 16, 32, 32), channels_last, False, "x")
        w = fake(mode, (32, 1, 13, 13), False, False, "w")
        with mode:
            y = torch.ops.lkconv_triton.depthwise_conv2d(x, w, None, *GEOMETRY)
        assert y.shape == (6, 32, 16, 32) and y.device.type == "cuda"
        assert y.is_contiguous(memory_format=torch.channels_last) is channels_last
