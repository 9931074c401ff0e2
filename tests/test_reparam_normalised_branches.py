"""lkconv::normalised_branches and its sisters: statistics, sum and gradients of all branches of a block."""

import copy

import pytest
import torch

import lkconv._C
from lkconv import reparam, use_backend
from lkconv.reparam import normalised_branches
from lkconv.reparam.geometry import Geometry
from processes import run_pytest

OPS = torch.ops.lkconv
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

# (size, kernels as (kernel, padding, dilation), with the identity, tensors given)
SUMS = {
    "one": ((2, 3, 5, 7), [(3, 1, 1)], False, 0),
    "dilated": ((2, 20, 12, 9), [(5, 2, 1), (3, 2, 2), (3, 3, 3)], False, 1),
    "identity": ((1, 17, 7, 7), [((3, 1), (1, 0), 1), (1, 0, 1)], True, 0),
    "all": ((3, 33, 6, 14), [(7, 3, 1), ((1, 5), (0, 2), 1)], True, 2),
    "smaller": ((2, 16, 9, 11), [((3, 5), 0, (2, 1)), (5, (0, 0), 1)], False, 0),
    "larger": ((2, 5, 4, 3), [(3, 2, 1), (5, 3, 1)], False, 1),
    "tiles": ((1, 18, 150, 131), [(5, 2, 1), (3, 4, 4)], True, 1),
    "wide kernel": ((2, 9, 4, 4), [(9, 4, 1), (3, 1, 1)], False, 0),
}


def pair(value):
    return (value, value) if isinstance(value, int) else value


class Sum:
    """Random operands of one sum, and its formulas in float64."""

    def __init__(self, name, dtype, layout=torch.contiguous_format, seed=0):
        torch.manual_seed(seed)
        self.size, kernels, self.identity, given = SUMS[name]
        self.geometries = [Geometry(*map(pair, (k, 1, p, d)), self.size[1]) for k, p, d in kernels]
        self.dtype, self.layout = dtype, layout
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.input = self.random(*self.size)
        self.weights = [self.random(self.size[1], 1, *g.kernel_size) for g in self.geometries]
        out = self.convolve(self.input, self.weights[0], self.geometries[0]).shape
        self.given = [self.random(*out) for _ in range(given)]
        self.grad = self.random(*out)
        self.padding = [p for g in self.geometries for p in g.padding]
        self.dilation = [d for g in self.geometries for d in g.dilation]

    def random(self, *size):
        tensor = torch.randn(size, dtype=torch.float64).to(self.dtype)
        return tensor.contiguous(memory_format=self.layout) if tensor.dim() == 4 else tensor

    def factors(self, *size):
        return torch.randn(*size, self.size[1], dtype=self.wide) / 8  # sums stay within float16

    @staticmethod
    def convolve(input, weight, g):
        return torch.nn.functional.conv2d(
            input.double(), weight.double(), None, 1, g.padding, g.dilation, input.shape[1]
        )

    def branches(self, input=None, weights=None, given=None):
        if input is None:
            input, weights, given = self.input, self.weights, self.given
        found = [self.convolve(input, w, g) for w, g in zip(weights, self.geometries, strict=True)]
        return found + [input.double()] * self.identity + [t.double() for t in given]

    def outputs(self):
        return OPS.normalised_branches(
            self.input, self.weights, self.given, self.padding, self.dilation, self.identity
        )


def error(got, wanted):
    wanted = wanted.detach()
    return float((got.detach().double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def per_channel(factor):
    return factor.double().reshape(1, -1, 1, 1)


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=str)
def layout(request):
    return request.param


@pytest.mark.parametrize("name", SUMS)
def test_outputs_and_sum(name, dtype, layout):
    s = Sum(name, dtype, layout)
    saved, means, variances = s.outputs()
    exact = s.branches()
    for b, y in enumerate(exact):
        # What is kept is rounded to the dtype, and statistics are those of what is kept.
        assert (means[b] - y.mean((0, 2, 3))).abs().max() <= TOLERANCE[dtype] * y.abs().max()
        assert error(variances[b], y.var((0, 2, 3), correction=0)) <= 2 * TOLERANCE[dtype]
    scales, shift = s.factors(len(exact)), s.factors()
    out = OPS.normalised_branches_sum(s.input, saved, s.given, s.identity, scales, shift)
    wanted = sum(per_channel(a) * y for a, y in zip(scales, exact, strict=True)) + per_channel(shift)
    assert out.dtype == dtype and out.is_contiguous(memory_format=layout)
    assert error(out, wanted) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", SUMS)
def test_gradients(name, dtype, layout):
    s = Sum(name, dtype, layout)
    saved, _, _ = s.outputs()
    exact = s.branches()
    means = s.factors(len(exact))
    total, dots = OPS.normalised_branches_dots(s.grad, s.input, saved, s.given, s.identity, means)
    assert error(total, s.grad.double().sum((0, 2, 3))) <= max(2e-6, TOLERANCE[dtype] / 10)
    wanted = torch.stack(
        [(s.grad.double() * (y - per_channel(m))).sum((0, 2, 3)) for y, m in zip(exact, means, strict=True)]
    )
    assert error(dots, wanted) <= TOLERANCE[dtype]
    a, b, c = (s.factors(len(exact)) for _ in range(3))
    dz = [
        per_channel(a[i]) * s.grad.double() + per_channel(b[i]) * y + per_channel(c[i])
        for i, y in enumerate(exact)
    ]
    leaves = [t.double().requires_grad_() for t in (s.input, *s.weights, *s.given)]
    kernels = len(s.weights)
    branches = s.branches(leaves[0], leaves[1 : 1 + kernels], leaves[1 + kernels :])
    expected = torch.autograd.grad(branches, leaves, dz)
    grad_input, grad_weights, grad_given = OPS.normalised_branches_backward(
        s.grad, s.input, saved, s.weights, s.given, s.padding, s.dilation, s.identity, a, b, c
    )
    assert grad_input.is_contiguous(memory_format=layout)
    for got, want in zip((grad_input, *grad_weights, *grad_given), expected, strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        assert error(got, want) <= TOLERANCE[dtype]


def everything(s):
    saved, means, variances = s.outputs()
    out = OPS.normalised_branches_sum(s.input, saved, s.given, s.identity, means, variances[0])
    total, dots = OPS.normalised_branches_dots(s.grad, s.input, saved, s.given, s.identity, means)
    arguments = (s.weights, s.given, s.padding, s.dilation, s.identity, means, variances, dots)
    grads = OPS.normalised_branches_backward(s.grad, s.input, saved, *arguments)
    return [saved, means, variances, out, total, dots, grads[0], *grads[1], *grads[2]]


@pytest.mark.parametrize("name", ["all", "tiles"])
def test_neither_threads_nor_repetition_change_bits(name, layout):
    s = Sum(name, torch.float32, layout)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            found.append(everything(s))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_statistics_of_a_large_mean():
    """Sums of squares less squared means would have no digit left."""
    x = torch.randn(4, 3, 20, 20) + 3e4
    weight = torch.ones(3, 1, 1, 1)
    _, means, variances = OPS.normalised_branches(x, [weight], [], [0, 0], [1, 1], True)
    exact = x.double().var((0, 2, 3), correction=0)
    for b in range(2):
        assert error(variances[b], exact) <= 1e-5
        assert error(means[b], x.double().mean((0, 2, 3))) <= 1e-7


def test_strided_operands():
    s = Sum("all", torch.float32)
    want = everything(s)
    for name in ("input", "grad"):
        tensor = getattr(s, name)
        wide = torch.full([2 * n for n in tensor.shape], float("nan"))
        view = wide[::2, 1::2, ::2, 1::2]
        setattr(s, name, view.copy_(tensor))
    s.weights = [w.transpose(2, 3).contiguous().transpose(2, 3) for w in s.weights]
    for got, wanted in zip(everything(s), want, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_opcheck():
    for name in ("all", "smaller"):
        for dtype, layout in ((torch.float32, torch.channels_last), (torch.float64, torch.contiguous_format)):
            s = Sum(name, dtype, layout)
            saved, means, variances = s.outputs()
            where = (s.given, s.identity)
            tests = ("test_schema", "test_faketensor")
            convolution = (s.padding, s.dilation, s.identity)
            for op, arguments in (
                (OPS.normalised_branches, (s.input, s.weights, s.given, *convolution)),
                (OPS.normalised_branches_sum, (s.input, saved, *where, means, variances[0])),
                (OPS.normalised_branches_dots, (s.grad, s.input, saved, *where, means)),
                (
                    OPS.normalised_branches_backward,
                    (s.grad, s.input, saved, s.weights, s.given, *convolution, means, means, means),
                ),
            ):
                torch.library.opcheck(op.default, arguments, test_utils=tests)


def test_memory_safety_checks():
    s = Sum("all", torch.float32)
    saved, means, variances = s.outputs()
    outputs = (s.input, s.weights, s.given, s.padding, s.dilation, s.identity)
    wrong = [
        (OPS.normalised_branches, {**dict(enumerate(outputs)), **change})
        for change in (
            {0: s.input[0]},
            {0: s.input.double()},
            {1: []},
            {1: [w[1:] for w in s.weights]},
            {2: [s.given[0][:, :, 1:], s.given[1]]},
            {2: [t.half() for t in s.given]},
            {3: s.padding[:-1]},
            {3: [p + 1 for p in s.padding]},
            {4: [0] * len(s.dilation)},
        )
    ]
    sums = (s.input, saved, s.given, s.identity, means, variances[0])
    wrong += [
        (OPS.normalised_branches_sum, {**dict(enumerate(sums)), **change})
        for change in (
            {1: saved[:1]},
            {1: saved.double()},
            {1: saved.transpose(3, 4)},
            {1: saved.flatten()},
            {3: False},
            {4: means[1:]},
            {4: means.double()},
            {5: means},
        )
    ]
    dots = (s.grad, s.input, saved, s.given, s.identity, means)
    wrong += [
        (OPS.normalised_branches_dots, {**dict(enumerate(dots)), **change})
        for change in ({0: s.grad[:1]}, {0: s.grad.double()}, {5: means[0]})
    ]
    for op, arguments in wrong:
        with pytest.raises(RuntimeError, match="lkconv"):
            op(*arguments.values())


def test_arrangement():
    """Large kernels run apart, small ones in place; what the ops cannot take runs otherwise."""
    x = torch.randn(4, 160, 28, 28)

    def geometry(kernel, stride=1):
        return Geometry(*map(pair, (kernel, stride, kernel // 2, 1)), 160)

    found = normalised_branches.arrange(x, [geometry(31), None, geometry(5)], 160)
    assert (found.kernels, found.identity, found.apart, found.order) == ((2,), (1,), (0,), (2, 1, 0))
    assert normalised_branches.arrange(x, [geometry(3, 2), geometry(5, 2)], 160) is None
    assert normalised_branches.arrange(x, [geometry(3), None, None], 160) is None
    assert normalised_branches.arrange(x, [geometry(3)], 320) is None
    assert normalised_branches.arrange(x.to("meta"), [geometry(3)], 160) is None
    with use_backend("torch"):
        assert normalised_branches.arrange(x, [geometry(3)], 160) is None


@pytest.mark.parametrize("layout", ["dense", "nhwc"])
def test_training_uses_them_once(layout):
    block = reparam.ReparamLargeKernelConv(64, 64, 31, 1, 64, 5).train()
    x = torch.randn(2, 64, 40, 40)
    if layout == "nhwc":
        x = x.to(memory_format=torch.channels_last)

    def run(path):
        one = copy.deepcopy(block)
        with torch.profiler.profile() as profile, reparam.use_training_path(path):
            y = one(x)
            grads = torch.autograd.grad(y.pow(3).sum(), list(one.parameters()))
        counts = {e.key: e.count for e in profile.key_averages()}
        return [y, *grads, *one.buffers()], [counts.get(f"lkconv::{name}", 0) for name in names]

    stages = ("", "_sum", "_dots", "_backward")
    names = [*(f"normalised_branches{s}" for s in stages), "depthwise_conv2d"]
    got, count = run("fused")
    wanted, none = run("branches")
    assert (count, none) == ([1, 1, 1, 1, 1], [0, 0, 0, 0, 2])
    for a, b in zip(got, wanted, strict=True):
        assert error(a, b.double()) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_instruction_sets(isa):
    if isa == lkconv._C.active_isa() or isa not in lkconv._C.compiled_isas():
        pytest.skip(f"{isa} is what every test runs on, or is not compiled")
    chosen = "test_outputs_and_sum or test_gradients or test_opcheck"
    passed = run_pytest(
        "tests/test_reparam_normalised_branches.py", "-k", chosen, env={"LKCONV_MAX_CPU_ISA": isa}
    )
    assert passed == 2 * len(SUMS) * len(TOLERANCE) * 2 + 1
