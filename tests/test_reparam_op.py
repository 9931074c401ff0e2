"""lkconv::merged_depthwise_conv2d: one op for all branches, in every mode PyTorch has."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lkconv import use_backend
from lkconv.reparam import Branch, Geometry, merged_depthwise_conv2d
from reparam_cases import relative_error

OP = torch.ops.lkconv.merged_depthwise_conv2d.default
CHANNELS = 4
TARGET = Geometry.make(7, 1, 3, 1, CHANNELS)
GEOMETRIES = (
    TARGET,
    Geometry.make((3, 5), 1, (1, 2), 1, CHANNELS),
    Geometry.make(3, 1, 2, 2, CHANNELS),
    Geometry.make(1, 1, 0, 1, CHANNELS),
)


def tensors(dtype=torch.float64, multiplier=1, grad=True, geometries=GEOMETRIES):
    generator = torch.Generator().manual_seed(0)
    out = CHANNELS * multiplier

    def make(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

    x = make(2, CHANNELS, 9, 8)
    weights = [make(out, 1, *g.kernel_size) for g in geometries]
    return x, weights, [make(out) for _ in geometries], [make(out) for _ in geometries]


def call(x, weights, scales, biases, target=TARGET, geometries=GEOMETRIES):
    branches = [
        Branch(w, g, s, b, f"b{i}")
        for i, (w, g, s, b) in enumerate(zip(weights, geometries, scales, biases, strict=True))
    ]
    return merged_depthwise_conv2d(x, branches, target)


def unmerged(x, weights, scales, biases, geometries=GEOMETRIES):
    y = 0
    for w, g, s, b in zip(weights, geometries, scales, biases, strict=True):
        z = F.conv2d(x, w, None, g.stride, g.padding, g.dilation, CHANNELS)
        y = y + z * s.reshape(1, -1, 1, 1) + b.reshape(1, -1, 1, 1)
    return y


def flat_arguments(x, weights, scales, biases):
    padding = [p for g in GEOMETRIES for p in g.padding]
    dilation = [d for g in GEOMETRIES for d in g.dilation]
    return x, weights, scales, biases, [7, 7], [1, 1], [3, 3], [1, 1], padding, dilation


def leaves(x, weights, scales, biases):
    return [x, *weights, *scales, *biases]


def from_leaves(function):
    n = len(GEOMETRIES)
    return lambda x, *rest: function(x, rest[:n], rest[n : 2 * n], rest[2 * n :])


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("multiplier", [1, 3])
def test_value_and_gradients(multiplier, backend):
    arguments = tensors(multiplier=multiplier)
    expected = unmerged(*arguments)
    with use_backend(backend):
        got = call(*arguments)
        found = torch.autograd.grad(got.square().sum(), leaves(*arguments))
    wanted = torch.autograd.grad(expected.square().sum(), leaves(*arguments))
    assert relative_error(got, expected) <= 1e-12
    for one, other in zip(found, wanted, strict=True):
        assert relative_error(one, other) <= 1e-12


def test_strided_with_multiplier():
    """The patch embedding's case: stride 2, 7 + 3, two output channels per input channel."""
    geometries = (Geometry.make(7, 2, 3, 1, CHANNELS), Geometry.make(3, 2, 1, 1, CHANNELS))
    arguments = tensors(multiplier=2, geometries=geometries)
    got = call(*arguments, geometries[0], geometries)
    expected = unmerged(*arguments, geometries)
    found = torch.autograd.grad(got.square().sum(), leaves(*arguments))
    wanted = torch.autograd.grad(expected.square().sum(), leaves(*arguments))
    assert all(relative_error(a, b) <= 1e-12 for a, b in zip(found, wanted, strict=True))


def test_first_and_second_derivatives():
    arguments = leaves(*tensors())
    assert torch.autograd.gradcheck(from_leaves(call), arguments)
    assert torch.autograd.gradgradcheck(from_leaves(call), arguments, fast_mode=True)


def test_only_the_wanted_gradients():
    x, weights, scales, biases = tensors(grad=False)
    weights[1].requires_grad_()
    (got,) = torch.autograd.grad(call(x, weights, scales, biases).square().sum(), [weights[1]])
    (want,) = torch.autograd.grad(unmerged(x, weights, scales, biases).square().sum(), [weights[1]])
    assert relative_error(got, want) <= 1e-12


@pytest.mark.parametrize("case", ["full", "bare", "channels_last", "no_grad"])
def test_opcheck(case):
    x, weights, scales, biases = tensors(torch.float32, grad=case != "no_grad")
    if case == "bare":
        scales, biases = [], []
    if case == "channels_last":
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(OP, flat_arguments(x, weights, scales, biases))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernels_keep_their_precision_until_the_end(dtype):
    """float32 branches under a half-precision input: folded in float32, one rounding of the kernel."""
    x, weights, scales, biases = tensors(torch.float32, grad=False)
    got = call(x.to(dtype), weights, scales, biases)
    assert got.dtype == dtype
    branches64 = [[t.double() for t in group] for group in (weights, scales, biases)]
    expected = unmerged(x.to(dtype).double(), *branches64)
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    assert relative_error(got, expected) <= tolerance


@pytest.mark.parametrize("batch", [0, 1])
def test_empty_and_single_batches(batch):
    x, weights, scales, biases = tensors()
    y = call(x[:batch], weights, scales, biases)
    assert y.shape == (batch, CHANNELS, 9, 8)
    y.sum().backward()
    assert all(t.grad.isfinite().all() for t in weights)


def test_memory_format_follows_the_input():
    x, weights, scales, biases = tensors(grad=False)
    last = call(x.to(memory_format=torch.channels_last), weights, scales, biases)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(last, call(x, weights, scales, biases)) <= 1e-12
    wide = torch.randn(2, 2 * CHANNELS, 9, 16, dtype=torch.float64)
    view = wide[:, ::2, :, 3:11]
    assert (
        relative_error(call(view, weights, scales, biases), unmerged(view, weights, scales, biases)) <= 1e-12
    )


def test_one_convolution_forward_and_one_of_each_gradient():
    """And one kernel that folds, once more for the gradient of the input, and one that gathers."""
    arguments = tensors(torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(*arguments).sum().backward()
    counts = {e.key: e.count for e in profile.key_averages() if e.key.startswith("lkconv::")}
    assert counts == {
        "lkconv::merged_depthwise_conv2d": 1,
        "lkconv::merge_depthwise_kernels": 2,
        "lkconv::merge_depthwise_kernels_backward": 1,
        "lkconv::depthwise_conv2d": 1,
        "lkconv::depthwise_conv2d_backward_input": 1,
        "lkconv::depthwise_conv2d_backward_weight": 1,
    }


def test_compiled_whole_with_dynamic_batch():
    compiled = torch.compile(from_leaves(call), fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 1):
        x, *rest = tensors()
        arguments = leaves(x[:batch].detach().requires_grad_(), *rest)
        got, expected = compiled(*arguments), from_leaves(call)(*arguments)
        found = torch.autograd.grad(got.square().sum(), arguments)
        wanted = torch.autograd.grad(expected.square().sum(), arguments)
        assert relative_error(got, expected) <= 1e-12
        assert all(relative_error(a, b) <= 1e-12 for a, b in zip(found, wanted, strict=True))


def test_functorch_transforms():
    arguments = leaves(*tensors(grad=False))
    square = lambda *t: from_leaves(call)(*t).square().sum()  # noqa: E731
    got = torch.func.grad(square, argnums=tuple(range(len(arguments))))(*arguments)
    arguments = [t.requires_grad_() for t in arguments]
    wanted = torch.autograd.grad(square(*arguments), arguments)
    assert all(relative_error(a, b) <= 1e-12 for a, b in zip(got, wanted, strict=True))
    x, weights, scales, biases = tensors(grad=False)
    stacked = torch.stack([x, x + 1, 2 * x])
    batched = torch.vmap(lambda one: call(one, weights, scales, biases))(stacked)
    assert relative_error(batched[2], call(2 * x, weights, scales, biases)) <= 1e-12


def test_forward_mode():
    from torch.autograd import forward_ad

    x, weights, scales, biases = tensors(grad=False)
    with forward_ad.dual_level():
        y = call(forward_ad.make_dual(x, torch.ones_like(x)), weights, scales, biases)
        tangent = forward_ad.unpack_dual(y).tangent
    none = [torch.zeros_like(b) for b in biases]
    assert relative_error(tangent, call(torch.ones_like(x), weights, scales, none)) <= 1e-12


def refusals():
    x, *_ = tensors(grad=False)
    small = Geometry.make(3, 1, 1, 1, CHANNELS)
    w = torch.zeros(CHANNELS, 1, 3, 3)
    wrong = nn.Parameter(torch.zeros(CHANNELS, 1, 5, 5))
    return [
        (TypeError, "floating-point", x.long(), [Branch(w, small)], TARGET),
        (ValueError, r"\(N, C, H, W\)", x[0], [Branch(w, small)], TARGET),
        (ValueError, "at least one", x, [], TARGET),
        (ValueError, "target groups 5", x, [Branch(w, small)], Geometry.make(7, 1, 3, 1, 5)),
        (ValueError, "side: weight must be", x, [Branch(wrong, small, name="side")], TARGET),
        (ValueError, "not a multiple", x, [Branch(w[:3], small)], TARGET),
        (ValueError, "side: scale must be", x, [Branch(w, small, torch.ones(3), name="side")], TARGET),
        (ValueError, "side: bias must be", x, [Branch(w, small, None, torch.ones(3), "side")], TARGET),
        (ValueError, "side: stride", x, [Branch(w, Geometry.make(3, 2, 1, 1, 4), name="side")], TARGET),
        (ValueError, "side: groups", x, [Branch(w, Geometry.make(3, 1, 1, 1, 2), name="side")], TARGET),
        (ValueError, "side: padding_mode", x,
         [Branch(w, Geometry.make(3, 1, 1, 1, 4, "circular"), name="side")], TARGET),
        (ValueError, "side: its output height", x,
         [Branch(w, Geometry.make(3, 1, 0, 1, 4), name="side")], TARGET),
    ]  # fmt: skip


@pytest.mark.parametrize("row", refusals(), ids=[r[1] for r in refusals()])
def test_refusals(row):
    error, words, x, branches, target = row
    with pytest.raises(error, match=words):
        merged_depthwise_conv2d(x, branches, target)
