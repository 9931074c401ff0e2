"""The Triton operators on a GPU: the interpreter's cases and bfloat16, torch.compile, opcheck, streams."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import pytest
import torch

from triton_checks import deterministic
from triton_support import (
    PASSES,
    Case,
    cases,
    check_pass,
    check_result,
    expected,
    kernels,
    make_inputs,
    run_pass,
)

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton is interpreting"),
]

DTYPES = ("float32", "float16", "bfloat16", "float64")
LAYERS = (
    Case((8, 64, 32, 32), (31, 31), padding=(15, 15)),
    Case((4, 128, 14, 14), (27, 27), padding=(13, 13)),
    Case((4, 96, 56, 56), (7, 7), padding=(3, 3), layout="nhwc"),
    Case((2, 61, 28, 28), (51, 5), padding=(25, 2)),
)


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path, exact_products):
    """Hooks on, choices in a folder of the test's own."""
    from lkconv.ops import register_hooks

    kernels()
    register_hooks("lkconv_triton")
    monkeypatch.setenv("LKCONV_CACHE_DIR", str(tmp_path))


@pytest.fixture
def without_poison(poisoned_memory):
    """Determinism, which poisoned memory needs, forbids tuning and reaches into torch's own checks."""
    with deterministic(False):
        yield


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("case", cases(DTYPES), ids=lambda case: case.name)
def test_values(case, pass_name):
    check_pass(case, pass_name, "cuda")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda case: case.name)
def test_layers(layer, dtype):
    """Every algorithm and pass against one reference, since a CPU takes seconds for that."""
    layer = replace(layer, dtype=dtype)
    inputs = make_inputs(layer, "cuda")
    exact, peer = (expected(layer, inputs, kind) for kind in (torch.float64, getattr(torch, dtype)))
    for algorithm, pass_name in itertools.product(("direct", "toeplitz"), PASSES):
        case = replace(layer, algorithm=algorithm)
        check_result(case, pass_name, inputs, exact[pass_name], peer[pass_name])


@pytest.mark.parametrize("pass_name", PASSES)
def test_tuned_choice_is_stored_and_repeats_bit_for_bit(pass_name, without_poison):
    case = Case((8, 64, 32, 32), (13, 13), padding=(6, 6), dtype="bfloat16")
    operators, tuning = kernels("depthwise_conv2d"), kernels("tuning")
    inputs = make_inputs(case, "cuda")
    operators._settled.clear()
    first = run_pass(case, pass_name, inputs)
    assert len(list(tuning.cache_dir().glob("*.json"))) == 1
    operators._settled.clear()  # as a new process would
    assert torch.equal(run_pass(case, pass_name, inputs), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, without_poison):
    x = torch.randn(2, 8, 16, 16, device="cuda", dtype=dtype, requires_grad=True)
    w = torch.randn(8, 1, 7, 7, device="cuda", dtype=dtype, requires_grad=True)
    dy = torch.randn(2, 8, 16, 16, device="cuda", dtype=dtype, requires_grad=True)
    geometry = ((1, 1), (3, 3), (1, 1))
    ops = torch.ops.lkconv_triton
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(ops.depthwise_conv2d.default, (x, w, None, *geometry), **tolerance)
    torch.library.opcheck(
        ops.depthwise_conv2d_backward_input.default, (dy, w, list(x.shape), *geometry), **tolerance
    )
    torch.library.opcheck(
        ops.depthwise_conv2d_backward_weight.default, (dy, x, [7, 7], *geometry), **tolerance
    )


def test_gradcheck(without_poison):
    x = torch.randn(2, 3, 7, 6, device="cuda", dtype=torch.float64, requires_grad=True)
    w = torch.randn(6, 1, 3, 5, device="cuda", dtype=torch.float64, requires_grad=True)

    def conv(x, w):
        return torch.ops.lkconv_triton.depthwise_conv2d(x, w, None, (2, 1), (1, 2), (1, 1))

    assert torch.autograd.gradcheck(conv, (x, w)) and torch.autograd.gradgradcheck(conv, (x, w))


@pytest.mark.parametrize("channels_last", [False, True])
def test_compiled_training_step(channels_last, without_poison):
    """Inductor runs the same kernels; several batch sizes need one dynamic graph."""
    w = torch.randn(32, 1, 13, 13, device="cuda", requires_grad=True)

    def loss(x, w):
        y = torch.ops.lkconv_triton.depthwise_conv2d(x.relu(), w, None, (1, 1), (6, 6), (1, 1))
        return (y.sigmoid() * 2).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for batch in (3, 4, 5):
        x = torch.randn(batch, 32, 24, 24, device="cuda")
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        grads = [torch.autograd.grad(f(x, w), w)[0] for f in (loss, compiled)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_current_stream_is_used():
    """A kernel on another stream would read the input before it is written."""
    stream = torch.cuda.Stream()
    x = torch.zeros(8, 64, 56, 56, device="cuda")
    w = torch.ones(64, 1, 3, 3, device="cuda")
    run = lambda: torch.ops.lkconv_triton.depthwise_conv2d(x, w, None, (1, 1), (1, 1), (1, 1))  # noqa: E731
    run()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(1.0)
        y = run()
    stream.synchronize()
    assert y[:, :, 1:-1, 1:-1].eq(9).all()


def test_graph_capture():
    """Capturing times nothing and replays on new data."""
    x = torch.randn(2, 16, 20, 20, device="cuda", dtype=torch.float16)
    w = torch.randn(16, 1, 7, 7, device="cuda", dtype=torch.float16)
    run = lambda: torch.ops.lkconv_triton.depthwise_conv2d(x, w, None, (1, 1), (3, 3), (1, 1))  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, run())


def test_more_than_2_31_elements():
    """Offsets past 32 bits, compared where they wrap."""
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    x = torch.zeros(2, 1100, 1024, 1024, device="cuda", dtype=torch.float16)
    x[-1, -1] = torch.randn(1024, 1024, device="cuda")
    w = torch.randn(1100, 1, 3, 3, device="cuda", dtype=torch.float16)
    y = torch.ops.lkconv_triton.depthwise_conv2d(x, w, None, (1, 1), (1, 1), (1, 1))
    last = torch.nn.functional.conv2d(x[-1:, -1:].double(), w[-1:].double(), padding=1)
    torch.testing.assert_close(y[-1:, -1:].double(), last, rtol=1e-2, atol=1e-2)
    assert not y[0].any()


def test_unavailable_is_explained():
    available, reason = kernels().is_available("cpu")
    assert not available and "TRITON_INTERPRET" in reason
    available, reason = kernels().is_available("cuda")
    assert available or "compute capability" in reason
