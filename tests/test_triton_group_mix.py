"""Group-Mix attention in Triton: values in the interpreter and on a GPU, choice of backend, tracing."""

from __future__ import annotations

import os

import pytest
import torch

import lkconv
from lkconv import backends
from triton_support import kernels, run_interpreted

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has a process of its own", allow_module_level=True)

from torch._functorch.aot_autograd import aot_export_module  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from group_mix_cases import attention  # noqa: E402
from lkconv.attention import registration  # noqa: E402
from lkconv.attention.registration import register_hooks  # noqa: E402
from triton_checks import deterministic  # noqa: E402
from triton_group_mix_calls import Recorded, arguments, run_all  # noqa: E402
from triton_group_mix_checks import CHECKS, INTERPRETED_CHECKS, ON_DEVICE, check_case  # noqa: E402

NAMES = tuple(registration.OUTPUTS)
DEVICE = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


# ---- values -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory) -> dict[str, str | None]:
    """Runs the selected interpreter tests of this file in one interpreting process."""
    items = [item for item in request.session.items if item.path == request.path]
    names = [item.callspec.params["name"] for item in items if item.originalname == "test_interpreted"]
    return run_interpreted(names, tmp_path_factory.mktemp("interpreter"))


@pytest.mark.parametrize("name", INTERPRETED_CHECKS)
def test_interpreted(name, outcomes):
    assert outcomes[name] is None, outcomes[name]


@pytest.mark.gpu
@DEVICE
@pytest.mark.parametrize("case", ON_DEVICE, ids=lambda case: case.name)
def test_on_a_device(case, exact_products):
    check_case(case, "cuda")


@pytest.mark.gpu
@DEVICE
@pytest.mark.parametrize("name", CHECKS)
def test_check_on_a_device(name, exact_products):
    CHECKS[name]("cuda")


# ---- choice of backend ------------------------------------------------------------------------------------
def test_a_backend_without_these_kernels_says_so(monkeypatch):
    """On CUDA tensors Triton is next in line, and every other backend has its reason."""
    kernels()
    cuda = next(b for b in backends.BACKENDS if b.name == "cuda")
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: False)
    assert cuda.lacks("group_mix") == "the CUDA module has no Group-Mix kernels"
    assert cuda.lacks("depthwise_conv2d") is None
    takes = {"declines": lambda device, dtype: None}
    table = [b._replace(**takes) if b.name in ("cuda", "triton") else b for b in backends.BACKENDS]
    monkeypatch.setattr(backends, "BACKENDS", tuple(table))
    choice = backends._decide(None, torch.device("cuda"), torch.float32, "group_mix")
    assert choice.name == "triton" and choice.ops.forward.namespace == "lkconv_triton"
    assert dict(choice.declined)["cuda"] == "the CUDA module has no Group-Mix kernels"
    assert dict(choice.declined)["torch"] == "triton comes first"
    asked = backends._decide("cuda", torch.device("cuda"), torch.float32, "group_mix")
    assert dict(asked.declined)["cuda"].startswith("asked for, but ") and asked.name == "triton"
    assert backends._decide(None, torch.device("cuda"), torch.float32).name == "cuda"


def test_cpu_tensors_stay_with_the_cpu_kernels():
    module = attention(40, torch.float32).aggregator
    qkv = torch.randn(1, 6, 120)
    with lkconv.use_backend("triton"):  # declines: nothing interprets here
        assert module.namespace(qkv) == "lkconv"
    with lkconv.use_backend("torch"):
        assert module.namespace(qkv) is None


# ---- blocks -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("item_bytes", [2, 4, 8])
def test_blocks_cover_every_width(item_bytes):
    planner = kernels("group_mix_planner")
    for channels in (1, 5, 8, 10, 16, 24, 32, 40, 48, 64, 72, 96, 200, 496):
        blocks = planner.blocks_for(channels, item_bytes)
        assert channels <= blocks.outputs < 2 * max(channels, 16)
        for side in (blocks.pixels, blocks.sum_pixels, blocks.inputs, blocks.outputs):
            assert side >= 16 and side & (side - 1) == 0  # what tl.dot takes
        idle = -channels % blocks.inputs
        assert idle <= -channels % (48 - blocks.inputs)  # the other of 16 and 32 wastes no less
        assert blocks.window_pixels & (blocks.window_pixels - 1) == 0


def test_splits_fill_the_machine_without_tiny_pieces():
    planner, machine = kernels("group_mix_planner"), kernels("planner").H200
    assert planner.splits_for(10_000, 10_000, machine) == 1
    assert planner.splits_for(12, 3, machine) == 1
    assert planner.splits_for(12, 10_000, machine) == 44
    assert planner.splits_for(1, 100_000, machine) == 256
    for tiles in range(1, 60):
        assert 1 <= planner.splits_for(4, tiles, machine) <= tiles


# ---- what a compiler sees ---------------------------------------------------------------------------------
class Target:
    """The part of a Triton driver that tracing asks for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class EveryOp(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, tensors):
        flat = []
        for out in run_all(torch.ops.lkconv_triton, tensors, self.size):
            flat += out if isinstance(out, tuple | list) else [out]
        return tuple(flat)


def test_traced_into_kernels(monkeypatch):
    """The operators dissolve into kernel calls that copy no input."""
    kernels()
    register_hooks("lkconv_triton")
    monkeypatch.setattr(triton.runtime.driver, "_active", Target())
    mode = FakeTensorMode()

    def fake(tensor):
        made = mode.from_tensor(tensor)
        made.fake_device = torch.device("cuda", 0)
        return made

    tensors = torch.utils._pytree.tree_map(fake, arguments(80, 2, (9, 7), torch.bfloat16))
    graph, _ = aot_export_module(EveryOp((9, 7)), (tensors,), trace_joint=False)
    calls = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    # evaluation 2, mix 2, normalise 1, sums 2, backward 6, attention 4, its backward 6
    assert len(calls) == 23
    assert not [node for node in graph.graph.nodes if "lkconv" in str(node.target)]
    written = {"mixed", "premix", "prelocal", "local", "partial", "out", "grad_qkv", "grad_t", "log_sum",
    "context",
               "grad_bias", "grad_mixed"}  # fmt: skip
    assert {name for node in calls for name in node.kwargs["tensors_to_clone"]} <= written


@pytest.mark.gpu
@DEVICE
@pytest.mark.parametrize("name", NAMES)
def test_opcheck_on_a_device(name):
    kernels()
    register_hooks("lkconv_triton")
    tensors = arguments(40, 2, (3, 5), torch.float32, "cuda")
    for value in torch.utils._pytree.tree_leaves(tensors):
        value.normal_().abs_()
    calls = Recorded(torch.ops.lkconv_triton)
    run_all(calls, tensors, (3, 5))
    with deterministic(False):
        torch.library.opcheck(getattr(torch.ops.lkconv_triton, name).default, calls.arguments[name])


@pytest.mark.gpu
@DEVICE
@pytest.mark.parametrize("training", [False, True])
def test_compiled_on_a_device(training):
    module = attention(80, torch.float32, training).cuda()
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(2, 63, 80, device="cuda", requires_grad=True)
    results = []
    for run in (module, compiled):
        with lkconv.use_backend("triton"):
            out = run(x, (9, 7))
            results.append(
                (out, *torch.autograd.grad(out.square().sum(), [x, module.crpe.conv_list[2].weight]))
            )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@DEVICE
def test_bit_identical_on_a_device():
    tensors = arguments(160, 4, (28, 27), torch.bfloat16, "cuda")
    for value in torch.utils._pytree.tree_leaves(tensors):
        value.normal_().abs_()
    kernels()
    register_hooks("lkconv_triton")
    first, second = (run_all(torch.ops.lkconv_triton, tensors, (28, 27)) for _ in range(2))
    for a, b in zip(*(torch.utils._pytree.tree_leaves(r) for r in (first, second)), strict=True):
        assert torch.equal(a, b)
