"""The CUDA ops on a real GPU: the emulator's cases, and what only a GPU has: streams, graphs, devices."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
from cuda_host.cases import CASES, PASSES, Case, same
from float32_precision import tf32_allowed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

if torch.cuda.is_available():
    import lkconv
    import lkconv._C_cuda  # registers the CUDA kernels

Tensors = tuple[torch.Tensor, ...]  # input, weight, bias, grad_output
TORCH_DTYPE = {
    "f64": torch.float64,
    "f32": torch.float32,
    "tf32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
}
# float64 and float32 have one algorithm, and "auto" takes it; tf32 adds the Toeplitz kernels to float32.
DTYPE_AND_ALGORITHM = [
    *((dtype, "auto") for dtype in TORCH_DTYPE),
    *((dtype, "direct") for dtype in ("f16", "bf16")),
    *((dtype, "toeplitz") for dtype in ("tf32", "f16", "bf16")),
]


def place(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of `t` in a layout, surrounded by NaN where the layout has a surrounding."""
    if layout == "nhwc":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "slice":
        n, c, h, w = t.shape
        wide = torch.full((n, c + 2, h + 1, w + 3), float("nan"), dtype=t.dtype, device=t.device)
        view = wide[:, 1 : c + 1, 1:, 1 : w + 1]
        return view.copy_(t)
    if layout == "expand":
        return t[:1, :1].expand(t.shape)
    return t


def tensors(case: Case, dtype: torch.dtype) -> Tensors:
    """input, weight, bias, grad_output on the GPU."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    channels = case.size[1] * case.multiplier
    x = torch.randn(case.size, generator=generator, dtype=torch.float64)
    weight = torch.randn(channels, 1, *case.kernel, generator=generator, dtype=torch.float64)
    bias = torch.randn(channels, generator=generator, dtype=torch.float64)
    height, width = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(
            case.size[2:], case.padding, case.dilation, case.kernel, case.stride, strict=True
        )
    )
    grad = torch.randn(case.size[0], channels, height, width, generator=generator, dtype=torch.float64)
    x, grad = (place(t.to(dtype).cuda(), case.layout) for t in (x, grad))
    return x, weight.to(dtype).cuda(), bias.to(dtype).cuda(), grad


def op(pass_name: str, case: Case, t: Tensors) -> torch.Tensor:
    x, weight, bias, grad = t
    geometry = list(case.stride), list(case.padding), list(case.dilation)
    if pass_name == "forward":
        return torch.ops.lkconv.depthwise_conv2d(x, weight, bias if case.bias else None, *geometry)
    if pass_name == "backward_input":
        return torch.ops.lkconv.depthwise_conv2d_backward_input(grad, weight, list(case.size), *geometry)
    return torch.ops.lkconv.depthwise_conv2d_backward_weight(grad, x, list(case.kernel), *geometry)


def aten(pass_name: str, case: Case, t: Tensors) -> torch.Tensor:
    """The same through PyTorch, in the tensors' own dtype and device."""
    x, weight, bias, grad = (v.contiguous() for v in t)
    geometry = case.stride, case.padding, case.dilation
    if pass_name == "forward":
        return F.conv2d(x, weight, bias if case.bias else None, *geometry, case.size[1])
    mask = [pass_name == "backward_input", pass_name == "backward_weight", False]
    grads = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *map(list, geometry), False, [0, 0], case.size[1], mask
    )
    return grads[0] if mask[0] else grads[1]


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double().cpu() - exact).norm() / exact.norm().clamp_min(1e-300))


def rounded_to_tf32(t: torch.Tensor) -> torch.Tensor:
    """The nearest numbers whose low 13 bits are zero, as the kernels round their operands."""
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def check(pass_name: str, case: Case, t: Tensors, dtype_name: str, result: torch.Tensor) -> None:
    exact = aten(pass_name, case, tuple(v.double().cpu() for v in t))
    error = relative_error(result, exact)
    products = case.taps if pass_name != "backward_weight" else t[3].numel() // t[3].size(1)
    sums = 1e-6 * products**0.5
    if dtype_name == "f64":
        assert error <= 1e-13
    elif dtype_name == "tf32":
        x, weight, bias, grad = t
        operands = (rounded_to_tf32(x), rounded_to_tf32(weight), bias, rounded_to_tf32(grad))
        rounding = relative_error(aten(pass_name, case, tuple(v.double() for v in operands)), exact)
        assert error <= 2 * rounding + sums
    elif dtype_name == "f32":
        assert error <= sums
    else:
        peer = relative_error(aten(pass_name, case, t), exact)
        assert error <= 2 * peer + 2.0**-23


@pytest.fixture
def algorithm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "direct":
        monkeypatch.setenv("LKCONV_TOEPLITZ", "0")
    if request.param == "toeplitz":
        monkeypatch.setenv("LKCONV_DIRECT", "0")
    return request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills freed memory with NaN, so that an element that a kernel forgets is seen."""
    torch.cuda.empty_cache()
    keep = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(4)]
    del keep
    yield


@pytest.mark.parametrize(("dtype_name", "algorithm"), DTYPE_AND_ALGORITHM, indirect=["algorithm"])
@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case, pass_name: str, dtype_name: str, algorithm: str, poisoned: None) -> None:
    t = tensors(case, TORCH_DTYPE[dtype_name])
    with tf32_allowed(dtype_name == "tf32"):
        first, second = op(pass_name, case, t), op(pass_name, case, t)
        check(pass_name, case, t, dtype_name, first)
    assert torch.equal(first, second), "two runs differ"
    if pass_name != "backward_weight" and case.layout == "nhwc":
        assert first.is_contiguous(memory_format=torch.channels_last)


LARGE = (
    same((64, 96, 32, 32), (31, 31)),
    same((32, 128, 14, 14), (27, 27)),
    same((8, 64, 56, 56), (31, 31)),
    same((16, 200, 7, 7), (13, 13)),
    same((8, 96, 56, 56), (7, 7), layout="nhwc"),
    same((4, 64, 128, 128), (3, 3)),
)


@pytest.mark.parametrize("dtype_name", ("f32", "tf32", "bf16"))
@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_real_sizes(case: Case, pass_name: str, dtype_name: str) -> None:
    """Many blocks on every SM: against PyTorch in float64 on the GPU."""
    t = tensors(case, TORCH_DTYPE[dtype_name])
    exact = aten(pass_name, case, tuple(v.double() for v in t)).cpu()
    with tf32_allowed(dtype_name == "tf32"):
        results = [op(pass_name, case, t) for _ in range(3)]
    limit = {"f32": 1e-5, "tf32": 2.0**-11, "bf16": 2.0**-8}[dtype_name]
    assert relative_error(results[0], exact) <= limit
    assert all(torch.equal(results[0], r) for r in results[1:]), "runs differ"


@pytest.mark.parametrize("pass_name", PASSES)
def test_runs_on_the_current_stream(pass_name: str) -> None:
    """Work queued on a side stream is done in its order, without waiting for the device."""
    case = same((16, 64, 32, 32), (31, 31))
    t = tensors(case, torch.bfloat16)
    expected = op(pass_name, case, t)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        delayed = tuple(v.clone() for v in t)
        result = op(pass_name, case, delayed)
        assert not stream.query(), "the call waited for the device"
        stream.synchronize()
    assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype_name", ("f32", "bf16"))
@pytest.mark.parametrize("pass_name", PASSES)
def test_cuda_graph(pass_name: str, dtype_name: str) -> None:
    case = same((4, 32, 28, 28), (13, 13))
    t = tensors(case, TORCH_DTYPE[dtype_name])
    op(pass_name, case, t)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(pass_name, case, t)
    for v in t:
        v.copy_(torch.randn_like(v))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, op(pass_name, case, t))


@pytest.mark.parametrize("pass_name", PASSES)
def test_a_workspace_that_does_not_fit_is_out_of_memory(pass_name: str) -> None:
    """There is room for the output, but not for all that the call takes beside it."""
    case = same((64, 128, 56, 56), (31, 31), layout="nhwc")
    t = tensors(case, torch.bfloat16)
    expected = op(pass_name, case, t)
    scratch = lkconv.explain(t[0], t[1], padding=15).passes[pass_name].scratch_bytes
    if scratch < 2**25:
        pytest.skip("the kernels take next to no scratch here")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + expected.nbytes + scratch // 2
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties().total_memory)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            op(pass_name, case, t)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(op(pass_name, case, t), expected), "a failed call leaves nothing behind"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_tensors_device() -> None:
    case = same((2, 8, 14, 14), (7, 7))
    t = tuple(v.to("cuda:1") for v in tensors(case, torch.float32))
    with torch.cuda.device(0):
        result = op("forward", case, t)
        assert torch.cuda.current_device() == 0
    assert result.device == torch.device("cuda:1")
    check("forward", case, t, "f32", result)


def test_tensors_on_different_devices_are_refused() -> None:
    x, weight, bias, _ = tensors(same((1, 2, 5, 5), (3, 3)), torch.float32)
    with pytest.raises(RuntimeError, match="one CUDA device"):
        torch.ops.lkconv.depthwise_conv2d(x, weight.cpu(), bias, [1, 1], [1, 1], [1, 1])


FAR = Case((2, 3, 8, 60000), (3, 3), (1, 50000), dilation=(1, 50000))  # a window wider than shared memory


@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize("dtype_name", ("f64", "f32", "bf16"))
@pytest.mark.parametrize("pass_name", PASSES)
def test_what_no_kernel_takes_the_op_leaves_to_torch(pass_name: str, dtype_name: str, layout: str) -> None:
    case = dataclasses.replace(FAR, layout=layout)
    t = tensors(case, TORCH_DTYPE[dtype_name])
    result = op(pass_name, case, t)
    check(pass_name, case, t, dtype_name, result)
    assert result.is_contiguous(memory_format=torch.channels_last) == (
        layout == "nhwc" and pass_name != "backward_weight"
    )


def test_a_compiled_graph_that_no_kernel_takes() -> None:
    x, weight, bias, grad = (v.requires_grad_() for v in tensors(FAR, torch.float32))
    geometry = FAR.stride, FAR.padding, FAR.dilation
    results = [
        torch.autograd.grad(f(x, weight, bias, *geometry), (x, weight, bias), grad)
        for f in (lkconv.depthwise_conv2d, torch.compile(lkconv.depthwise_conv2d, fullgraph=True))
    ]
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-3)


def test_tf32_follows_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 uses tf32 exactly when torch's own convolutions may."""
    monkeypatch.setenv("LKCONV_DIRECT", "0")
    case = same((8, 16, 32, 32), (31, 31))
    t = tensors(case, torch.float32)
    exact = aten("forward", case, tuple(v.double() for v in t)).cpu()
    with tf32_allowed(False):
        precise = relative_error(op("forward", case, t), exact)
    with tf32_allowed(True):
        rounded = relative_error(op("forward", case, t), exact)
    assert precise < 1e-5 < rounded <= 2.0**-11


@pytest.mark.parametrize("dtype_name", ("f32", "tf32", "f16", "bf16"))
@pytest.mark.parametrize("pass_name", ("forward", "backward_input"))
def test_non_finite_inputs_are_not_lost(pass_name: str, dtype_name: str) -> None:
    """Every output whose window holds a NaN is NaN; other images and channels do not notice."""
    case = same((3, 2, 20, 20), (7, 7))
    x, weight, bias, grad = tensors(case, TORCH_DTYPE[dtype_name])
    source = x if pass_name == "forward" else grad
    source[1, 1, 9, 11] = float("nan")
    with tf32_allowed(dtype_name == "tf32"):
        result = op(pass_name, case, (x, weight, bias, grad)).isnan()
    assert result[1, 1, 6:13, 8:15].all()
    for n, c in itertools.product(range(3), range(2)):
        assert (n, c) == (1, 1) or not result[n, c].any()


@pytest.mark.parametrize("dtype_name", ("f64", "f32", "f16", "bf16"))
@pytest.mark.parametrize("layout", ("nchw", "nhwc", "slice"))
def test_segments_of_channels(layout: str, dtype_name: str, poisoned: None) -> None:
    """Read from and written into slices: what one convolution of each slice gives, to the bit."""
    dtype, splits, windows = TORCH_DTYPE[dtype_name], [13, 5, 8, 7], [None, (3, 3), (1, 11), (31, 31)]
    x = place(torch.randn(2, sum(splits), 27, 26, device="cuda").to(dtype), layout)
    weights = [
        k and torch.randn(c, 1, *k, device="cuda").to(dtype) for c, k in zip(splits, windows, strict=True)
    ]
    y = torch.ops.lkconv.segmented_depthwise_conv2d(x, weights, [None] * 4, splits)
    for got, piece, w in zip(y.split(splits, 1), x.split(splits, 1), weights, strict=True):
        if w is not None:
            padding = [w.shape[2] // 2, w.shape[3] // 2]
            piece = torch.ops.lkconv.depthwise_conv2d(piece, w, None, [1, 1], padding, [1, 1])
        assert torch.equal(got, piece)


def test_more_than_2_31_elements() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 20 << 30:
        pytest.skip("needs 20 GB of free device memory")
    x = torch.zeros(1, 3, 1 << 15, 1 << 15, dtype=torch.bfloat16, device="cuda")
    x[0, 2, -40:, -40:] = torch.randn(40, 40, device="cuda").bfloat16()
    weight = torch.randn(3, 1, 7, 7, device="cuda").bfloat16()
    out = torch.ops.lkconv.depthwise_conv2d(x, weight, None, [1, 1], [3, 3], [1, 1])
    exact = F.conv2d(x[:, 2:, -40:, -40:].double(), weight[2:].double(), padding=3)[:, :, 4:, 4:]
    assert relative_error(out[:, 2:, -36:, -36:], exact.cpu()) <= 2.0**-8
    assert out[0, :2].count_nonzero() == 0
