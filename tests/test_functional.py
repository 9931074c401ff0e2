"""``depthwise_conv2d`` against ``F.conv2d`` and the reference, over the whole argument space."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import lkconv

# (input, weight, stride, padding, dilation)
SHAPES = [
    ((2, 4, 9, 8), (4, 1, 3, 3), 1, 1, 1),
    ((2, 3, 11, 7), (6, 1, 5, 2), (2, 1), (2, 3), (1, 2)),
    ((1, 5, 4, 4), (5, 1, 9, 11), 1, (4, 5), 1),
    ((3, 2, 1, 6), (2, 1, 1, 4), 1, (0, 2), 1),
    ((1, 7, 13, 12), (21, 1, 7, 7), 3, "valid", 1),
    ((2, 2, 6, 5), (2, 1, 4, 6), 1, "same", 1),
    ((2, 2, 6, 5), (4, 1, 4, 3), 1, "same", (3, 2)),
    ((4, 8, 8), (8, 1, 5, 5), 1, 2, 1),
    ((0, 4, 8, 8), (4, 1, 3, 3), 1, 1, 1),
    ((0, 4, 0, 8), (4, 1, 3, 3), 1, 2, 1),
    ((2, 3, 33, 31), (3, 1, 31, 29), 1, (15, 14), 1),
]
TOLERANCE = dict(rtol=1e-10, atol=1e-11)


def tensors(size, weight_size, bias=True, dtype=torch.float64, grad=False):
    made = [torch.randn(size, dtype=dtype), torch.randn(weight_size, dtype=dtype)]
    made.append(torch.randn(weight_size[0], dtype=dtype) if bias else None)
    return [t if t is None else t.requires_grad_(grad) for t in made]


def expected(x, w, b, stride=1, padding=0, dilation=1):
    return F.conv2d(x, w, b, stride, padding, dilation, groups=x.shape[-3])


def gradients(function, x, w, b, *geometry):
    leaves = [t for t in (x, w, b) if t is not None and t.requires_grad]
    y = function(x, w, b, *geometry)
    g = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return y, torch.autograd.grad(y, leaves, g)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_value_and_gradients(case, bias):
    size, weight_size, *geometry = case
    x, w, b = tensors(size, weight_size, bias, grad=True)
    y, grads = gradients(lkconv.depthwise_conv2d, x, w, b, *geometry)
    y_expected, grads_expected = gradients(expected, x, w, b, *geometry)
    torch.testing.assert_close(y, y_expected, **TOLERANCE)
    torch.testing.assert_close(grads, grads_expected, **TOLERANCE)
    with torch.no_grad():
        assert torch.equal(lkconv.depthwise_conv2d(x, w, b, *geometry), y)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_reference_is_conv2d(case):
    size, weight_size, *geometry = case
    x, w, b = tensors(size, weight_size)
    assert torch.equal(lkconv.reference.depthwise_conv2d(x, w, b, *geometry), expected(x, w, b, *geometry))


@pytest.mark.parametrize("case", [c for c in SHAPES if len(c[0]) == 4 and not isinstance(c[3], str)], ids=str)
def test_reference_gradients(case):
    size, weight_size, *geometry = case
    x, w, _ = tensors(size, weight_size, bias=False, grad=True)
    y = expected(x, w, None, *geometry)
    g = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, w), g)
    ours = lkconv.reference.depthwise_conv2d_backward_input(g, w, x.shape, *geometry)
    torch.testing.assert_close(ours, dx, **TOLERANCE)
    ours = lkconv.reference.depthwise_conv2d_backward_weight(g, x, w.shape[2:], *geometry)
    torch.testing.assert_close(ours, dw, **TOLERANCE)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_arguments(data):
    n, c, m = (data.draw(st.integers(1, 3)) for _ in range(3))
    kernel = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    dilation = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    stride = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = data.draw(st.tuples(st.integers(0, 9), st.integers(0, 9)))
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in (0, 1)]
    height, width = (data.draw(st.integers(v, v + 12)) for v in least)
    x, w, b = tensors((n, c, height, width), (c * m, 1, *kernel), grad=True)
    ours = gradients(lkconv.depthwise_conv2d, x, w, b, stride, padding, dilation)
    torch.testing.assert_close(ours, gradients(expected, x, w, b, stride, padding, dilation), **TOLERANCE)


@pytest.mark.parametrize(
    "value", [2, (2, 2), [2, 2], [2], torch.Size([2, 2]), np.int64(2), torch.tensor(2)], ids=repr
)
@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_spellings_of_a_pair(name, value):
    x, w, b = tensors((1, 2, 9, 9), (2, 1, 3, 3))
    ours = lkconv.depthwise_conv2d(x, w, b, **{name: value})
    torch.testing.assert_close(ours, expected(x, w, b, **{name: 2}), **TOLERANCE)


@pytest.mark.parametrize("needs", [n for n in itertools.product((True, False), repeat=3) if any(n)], ids=str)
def test_gradient_of_a_subset(needs):
    made = tensors((2, 3, 7, 6), (6, 1, 5, 3))
    for t, need in zip(made, needs, strict=True):
        t.requires_grad_(need)
    ours = gradients(lkconv.depthwise_conv2d, *made, 1, 2, 1)
    torch.testing.assert_close(ours, gradients(expected, *made, 1, 2, 1), **TOLERANCE)


def test_frozen_weight_keeps_no_input():
    kept = []
    x, w, _ = tensors((2, 3, 7, 6), (3, 1, 3, 3), bias=False)
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        lkconv.depthwise_conv2d(x, w, padding=1)
    assert kept == [w.shape]


# --- memory ---------------------------------------------------------------------------------------------


def layouts(x):
    """The same values, laid out in several ways."""
    wide = torch.full((*x.shape[:-1], 3 * x.shape[-1] + 1), float("nan"), dtype=x.dtype)
    wide[..., 1 : 1 + 2 * x.shape[-1] : 2] = x
    return {
        "contiguous": x.contiguous(),
        "channels_last": x.to(memory_format=torch.channels_last),
        "sliced": wide[..., 1 : 1 + 2 * x.shape[-1] : 2],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "batch inside": x.movedim(0, -1).contiguous().movedim(-1, 0),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["contiguous", "channels_last", "sliced", "transposed", "batch inside"])
def test_layouts(name, dtype):
    x, w, b = tensors((2, 5, 8, 7), (5, 1, 5, 3), dtype=dtype)
    w = layouts(w)["sliced"].requires_grad_()
    laid = layouts(x)[name].requires_grad_()
    # In float64 the two sums differ in their last bits alone; in float32 the oracle is float64.
    y, (dx, dw) = gradients(lkconv.depthwise_conv2d, laid, w, b, 1, (2, 1), 1)
    wide = [t.detach().double() for t in (x, w, b)]
    y64, (dx64, dw64) = gradients(
        expected, wide[0].requires_grad_(), wide[1].requires_grad_(), wide[2], 1, (2, 1), 1
    )
    if dtype == torch.float64:
        torch.testing.assert_close((y, dx, dw), (y64, dx64, dw64), **TOLERANCE)
    else:
        assert (y.double() - y64).norm() <= 1e-6 * 15**0.5 * y64.norm()
    last = laid.is_contiguous(memory_format=torch.channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def test_expanded_arguments_and_gradient():
    x = torch.randn(1, 1, 8, 7, dtype=torch.float64).expand(3, 4, 8, 7).requires_grad_()
    w = torch.randn(1, 1, 3, 3, dtype=torch.float64).expand(4, 1, 3, 3).requires_grad_()
    ours = torch.autograd.grad(lkconv.depthwise_conv2d(x, w, padding=1).sum(), (x, w))
    torch.testing.assert_close(
        ours, torch.autograd.grad(expected(x, w, None, 1, 1).sum(), (x, w)), **TOLERANCE
    )


def test_negative_view():
    x = torch.randn(1, 2, 6, 6, dtype=torch.complex128).conj().imag
    w = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    assert x.is_neg()
    torch.testing.assert_close(lkconv.depthwise_conv2d(x, w), expected(x.clone(), w, None), **TOLERANCE)


def test_same_inputs_same_bits():
    x, w, b = tensors((2, 8, 20, 20), (8, 1, 13, 13), dtype=torch.float32, grad=True)
    first = gradients(lkconv.depthwise_conv2d, x, w, b, 1, 6, 1)
    second = gradients(lkconv.depthwise_conv2d, x, w, b, 1, 6, 1)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(p, q) for p, q in zip(first[1], second[1], strict=True))


# --- dtypes and modes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.int64, torch.int32, torch.uint8])
def test_other_dtypes_are_conv2d(dtype):
    x = (torch.randn(1, 4, 8, 8) * 3).abs().to(dtype)
    w = (torch.randn(4, 1, 3, 3) * 3).abs().to(dtype)
    ours = lkconv.depthwise_conv2d(x, w, padding=1)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, expected(x, w, None, 1, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype):
    x, w, b = tensors((2, 6, 12, 12), (6, 1, 7, 7), dtype=dtype, grad=True)
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    ours = gradients(lkconv.depthwise_conv2d, x, w, b, 1, 3, 1)
    theirs = gradients(expected, x, w, b, 1, 3, 1)
    exact = gradients(expected, *wide, 1, 3, 1)
    for mine, other, true in zip(
        (ours[0], *ours[1]), (theirs[0], *theirs[1]), (exact[0], *exact[1]), strict=True
    ):
        assert mine.dtype == dtype
        limit = 2 * (other.double() - true).norm() + torch.finfo(dtype).eps
        # The gradient that enters was rounded to the half type alike for all three.
        assert (mine.double() - true).norm() <= limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_honours_its_dtype(dtype):
    x, w, b = tensors((2, 4, 8, 8), (4, 1, 3, 3), dtype=torch.float32, grad=True)
    with torch.autocast("cpu", dtype):
        y = lkconv.depthwise_conv2d(x, w, b, padding=1)
        mixed = lkconv.depthwise_conv2d(x.to(dtype), w, b, padding=1)
    assert y.dtype == dtype and torch.equal(y, mixed)
    y.sum().backward()
    assert x.grad.dtype == w.grad.dtype == b.grad.dtype == torch.float32
    assert torch.equal(y, lkconv.depthwise_conv2d(x.to(dtype), w.to(dtype), b.to(dtype), padding=1))


def test_autocast_leaves_float64():
    x, w, _ = tensors((1, 2, 5, 5), (2, 1, 3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert lkconv.depthwise_conv2d(x, w).dtype == torch.float64


def test_inference_mode_and_no_grad():
    x, w, b = tensors((2, 4, 8, 8), (4, 1, 3, 3), grad=True)
    true = expected(x, w, b).detach()
    with torch.no_grad():
        y = lkconv.depthwise_conv2d(x, w, b)
    assert not y.requires_grad
    torch.testing.assert_close(y, true, **TOLERANCE)
    with torch.inference_mode():
        y = lkconv.depthwise_conv2d(x, w, b)
        assert y.is_inference()
        inside = lkconv.depthwise_conv2d(torch.ones(1, 4, 4, 4, dtype=torch.float64), w, b)
    torch.testing.assert_close(y, true, **TOLERANCE)
    assert inside.is_inference()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    x, w, b = tensors((2, 4, 8, 8), (4, 1, 3, 3), grad=True)

    def block(x):
        return lkconv.depthwise_conv2d(x, w, b, padding=1).tanh()

    ours = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).sum(), (x, w, b))
    torch.testing.assert_close(ours, torch.autograd.grad(block(x).sum(), (x, w, b)))
    if reentrant:
        checkpoint(block, x, use_reentrant=True).sum().backward()
        torch.testing.assert_close((x.grad, w.grad, b.grad), ours)


def test_meta_device():
    y = lkconv.depthwise_conv2d(
        torch.empty(2, 4, 9, 8, device="meta"), torch.empty(8, 1, 3, 3, device="meta")
    )
    assert y.device.type == "meta" and y.shape == (2, 8, 7, 6)


def test_onednn_tensors_go_to_conv2d():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    x, w, _ = tensors((1, 4, 8, 8), (4, 1, 3, 3), dtype=torch.float32)
    y = lkconv.depthwise_conv2d(x.to_mkldnn(), w.to_mkldnn())
    torch.testing.assert_close(y.to_dense(), expected(x, w, None))


def test_tensor_subclass_and_function_mode():
    class Tagged(torch.Tensor):
        pass

    x, w, _ = tensors((1, 4, 8, 8), (4, 1, 3, 3))
    assert type(lkconv.depthwise_conv2d(x.as_subclass(Tagged), w)) is Tagged

    class Record(torch.overrides.TorchFunctionMode):
        seen = ()

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen = (*self.seen, func)
            return func(*args, **(kwargs or {}))

    with Record() as mode:
        lkconv.depthwise_conv2d(x, w)
    assert mode.seen == (lkconv.depthwise_conv2d,)


def test_fx_records_one_call():
    graph = torch.fx.symbolic_trace(lambda x, w: lkconv.depthwise_conv2d(x, w, padding=1).relu())
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [lkconv.depthwise_conv2d]
    x, w, _ = tensors((1, 4, 8, 8), (4, 1, 3, 3))
    torch.testing.assert_close(graph(x, w), expected(x, w, None, 1, 1).relu(), **TOLERANCE)


@pytest.mark.filterwarnings("ignore")
def test_jit_trace():
    layer = lkconv.DepthwiseConv2d(4, 3, padding=1, dtype=torch.float64)
    traced = torch.jit.trace(layer, torch.randn(1, 4, 8, 8, dtype=torch.float64))
    assert "lkconv::depthwise_conv2d" in str(traced.inlined_graph)
    other = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(traced(other), layer(other), **TOLERANCE)


def test_profiler_shows_the_op():
    x, w, b = tensors((1, 4, 8, 8), (4, 1, 3, 3), grad=True)
    with torch.profiler.profile() as profile:
        lkconv.depthwise_conv2d(x, w, b).sum().backward()
    names = {event.name for event in profile.events()}
    assert {
        "lkconv::depthwise_conv2d",
        "lkconv::depthwise_conv2d_backward_input",
        "lkconv::depthwise_conv2d_backward_weight",
    } <= names


def test_arguments_are_untouched():
    x, w, b = tensors((2, 4, 8, 8), (4, 1, 7, 7), dtype=torch.float32, grad=True)
    before = copy.deepcopy([t.detach() for t in (x, w, b)])
    lkconv.depthwise_conv2d(x, w, b, padding=3).square().sum().backward()
    assert all(torch.equal(t, u) for t, u in zip((x, w, b), before, strict=True))


def test_backward_twice_and_retain():
    x, w, b = tensors((1, 2, 5, 5), (2, 1, 3, 3), grad=True)
    y = lkconv.depthwise_conv2d(x, w, b).sum()
    y.backward(retain_graph=True)
    once = w.grad.clone()
    y.backward()
    torch.testing.assert_close(w.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_saved_input_changed_in_place_is_an_error():
    x, w, b = tensors((1, 2, 5, 5), (2, 1, 3, 3), grad=True)
    hidden = x * 1
    y = lkconv.depthwise_conv2d(hidden, w, b)
    hidden.zero_()
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()
