"""Checks of the Triton operators beyond values: edges, hooks, non-finite inputs, 64-bit offsets."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F

import merge_cases
from lkconv import reference, segmented_depthwise_conv2d, use_backend
from lkconv._fake import memory_format
from lkconv.ops import register_hooks
from triton_support import Case, expected, kernels, lay_out, make_inputs, only, relative_error, run_pass

OPS = torch.ops.lkconv_triton
SAME_7 = Case((2, 2, 10, 24), (7, 7), padding=(3, 3), bias=False)
ONE = (1, 1)


def check_empty_batch() -> None:
    x, w = torch.empty(0, 3, 8, 8), torch.randn(3, 1, 3, 3)
    assert OPS.depthwise_conv2d(x, w, None, ONE, ONE, ONE).shape == (0, 3, 8, 8)
    assert OPS.depthwise_conv2d_backward_input(x, w, x.shape, ONE, ONE, ONE).shape == x.shape
    assert torch.equal(OPS.depthwise_conv2d_backward_weight(x, x, (3, 3), ONE, ONE, ONE), torch.zeros_like(w))


def check_expanded_gradient() -> None:
    """A gradient of .sum() has stride 0 everywhere."""
    inputs = make_inputs(SAME_7, "cpu")
    inputs["grad_output"] = torch.full((), 0.5).expand(inputs["grad_output"].shape)
    exact = expected(SAME_7, inputs, torch.float64)
    for algorithm in ("direct", "toeplitz"):
        with only(algorithm):
            for pass_name in ("backward_input", "backward_weight"):
                assert relative_error(run_pass(SAME_7, pass_name, inputs), exact[pass_name]) < 1e-6


def check_misaligned_input() -> None:
    """A row that starts one element past an aligned address must not be read in aligned vectors."""
    inputs = make_inputs(SAME_7, "cpu")
    flat = torch.full((inputs["input"].numel() + 1,), float("nan"))
    flat[1:] = inputs["input"].flatten()
    inputs["input"] = flat[1:].view(inputs["input"].shape)
    exact = expected(SAME_7, inputs, torch.float64)["forward"]
    for algorithm in ("direct", "toeplitz"):
        with only(algorithm):
            assert relative_error(run_pass(SAME_7, "forward", inputs), exact) < 1e-6


def check_64_bit_offsets() -> None:
    """The kernels' 64-bit variants give the same bits as their 32-bit ones."""
    launch = kernels("launch")
    case = Case((1, 2, 7, 20), (3, 5), stride=(2, 1), padding=(1, 2), multiplier=2)
    narrow = launch.needs_int64
    for algorithm in ("direct", "toeplitz"):
        for pass_name in ("forward", "backward_input", "backward_weight"):
            inputs = make_inputs(case, "cpu")
            with only(algorithm):
                expected_bits = run_pass(case, pass_name, inputs)
                launch.needs_int64 = lambda *extents: True
                try:
                    got = run_pass(case, pass_name, inputs)
                finally:
                    launch.needs_int64 = narrow
            assert torch.equal(got, expected_bits)


def check_non_finite() -> None:
    """A non-finite pixel reaches every output whose window holds it, and never another image or channel."""
    case = Case((2, 2, 12, 40), (5, 5), padding=(2, 2), bias=False)
    for algorithm in ("direct", "toeplitz"):
        for value in (float("nan"), float("inf"), float("-inf")):
            inputs = make_inputs(case, "cpu")
            inputs["input"][1, 0, 6, 20] = value
            hit = torch.zeros(case.size, dtype=torch.bool)
            hit[1, 0, 4:9, 18:23] = True
            with only(algorithm):
                lost = run_pass(case, "forward", inputs).isfinite()
            assert not (lost & hit).any()
            assert lost[0].all() and lost[1, 1].all()
            if algorithm == "direct":
                assert torch.equal(~lost, hit)
            # Toeplitz may spread it along the row, never to other rows.
            assert lost[1, 0, :4].all() and lost[1, 0, 9:].all()


def check_non_finite_gradient() -> None:
    case = Case((2, 2, 12, 20), (5, 5), padding=(2, 2), bias=False)
    for algorithm in ("direct", "toeplitz"):
        inputs = make_inputs(case, "cpu")
        inputs["grad_output"][1, 0, 6, 10] = float("nan")
        with only(algorithm):
            dw = run_pass(case, "backward_weight", inputs).isfinite()
            dx = run_pass(case, "backward_input", inputs).isfinite()
        assert not dw[0].any() and dw[1].all()
        assert not dx[1, 0, 4:9, 8:13].any() and dx[0].all() and dx[1, 1].all()


def check_splits_do_not_lose_pixels() -> None:
    """Every number of splits adds up to the same gradient."""
    operators, planner = kernels("depthwise_conv2d"), kernels("planner")
    case = Case((3, 1, 11, 24), (3, 7), padding=(1, 3))
    inputs = make_inputs(case, "cpu")
    exact = expected(case, inputs, torch.float64)["backward_weight"]
    whole = planner.split_count
    for splits in (1, 2, 3, 7, 50):
        planner.split_count = lambda *_, s=splits: s
        try:
            for algorithm in ("direct", "toeplitz"):
                with only(algorithm):
                    got = run_pass(case, "backward_weight", inputs)
                assert relative_error(got, exact) < 5e-7, (splits, algorithm)
        finally:
            planner.split_count = whole
            operators._settled.clear()


def check_every_toeplitz_block() -> None:
    """Every block size the planner may choose computes the same function."""
    operators, tuning = kernels("depthwise_conv2d"), kernels("tuning")
    case = Case((2, 1, 20, 72), (2, 11), padding=(1, 5), bias=False)
    inputs = make_inputs(case, "cpu")
    exact = expected(case, inputs, torch.float64)
    before = tuning.choose
    for pass_name in ("forward", "backward_weight"):
        seen: list = []

        def collect(key, plans, time, into=seen):
            into.extend(plans)
            return plans[0], False

        operators._settled.clear()
        tuning.choose = collect
        run_pass(case, pass_name, inputs)
        toeplitz = [plan for plan in seen if plan.algorithm == "toeplitz"]
        assert len(toeplitz) >= 4
        try:
            for plan in toeplitz:
                tuning.choose = lambda key, plans, time, plan=plan: (plan, False)
                got = run_pass(case, pass_name, inputs)
                assert relative_error(got, exact[pass_name]) < 5e-7, plan
        finally:
            tuning.choose = before


def check_available() -> None:
    available, reason = kernels().is_available("cpu")
    assert available and "interpreted" in reason


def check_large_padding_gradient() -> None:
    """backward_input with padding beyond the kernel has negative padding in its own terms."""
    case = Case((1, 2, 8, 9), (3, 3), padding=(5, 4), stride=(2, 1), bias=False)
    inputs = make_inputs(case, "cpu")
    exact = expected(case, inputs, torch.float64)["backward_input"]
    for algorithm in ("direct", "toeplitz"):
        with only(algorithm):
            assert relative_error(run_pass(case, "backward_input", inputs), exact) < 5e-7


def check_transposed_weight() -> None:
    """Weights of any strides: the gradient of a transposed view is a view."""
    x, w = torch.randn(2, 3, 9, 10), torch.randn(3, 1, 5, 4).transpose(2, 3)
    exact = F.conv2d(x.double(), w.double(), groups=3)
    for algorithm in ("direct", "toeplitz"):
        with only(algorithm):
            got = OPS.depthwise_conv2d(x, w, None, ONE, (0, 0), ONE)
        assert relative_error(got, exact) < 5e-7


def check_gradients_of_every_order() -> None:
    """Autograd as lkconv.ops puts it on, double backward included."""
    hooked = register_hooks("lkconv_triton").forward
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, dtype=torch.float64, requires_grad=True)
    arguments = (x, w, b)
    conv = lambda x, w, b: hooked(x, w, b, (2, 1), (1, 1), ONE)  # noqa: E731
    with deterministic(False):
        assert torch.autograd.gradcheck(conv, arguments, fast_mode=True)
        assert torch.autograd.gradgradcheck(conv, arguments, fast_mode=True)


def check_opcheck() -> None:
    register_hooks("lkconv_triton")
    x, w, dy = torch.randn(2, 2, 6, 7), torch.randn(2, 1, 3, 3), torch.randn(2, 2, 6, 7)
    for tensor in (x, w, dy):
        tensor.requires_grad_()
    geometry = (ONE, ONE, ONE)
    with deterministic(False):
        torch.library.opcheck(OPS.depthwise_conv2d.default, (x, w, None, *geometry))
        torch.library.opcheck(OPS.depthwise_conv2d_backward_input.default, (dy, w, list(x.shape), *geometry))
        torch.library.opcheck(OPS.depthwise_conv2d_backward_weight.default, (dy, x, [3, 3], *geometry))


def check_public_interface() -> None:
    """A user debugs through the public function: the Triton backend takes CPU tensors here."""
    import lkconv

    x, w = torch.randn(2, 3, 8, 9), torch.randn(3, 1, 5, 5)
    with lkconv.use_backend("triton"):
        y = lkconv.depthwise_conv2d(x, w, padding=2)
        report = lkconv.explain(x, w, padding=2)
    assert relative_error(y, F.conv2d(x.double(), w.double(), padding=2, groups=3)) < 5e-7
    assert report.backend == "triton" and report.algorithm in ("direct", "toeplitz")
    assert "not triton:" in str(report)


def check_merged_values(case: merge_cases.Case, dtype: torch.dtype) -> None:
    """Fold and adjoint against a plain loop, tap by tap."""
    check_merged(case, merge_cases.operands(case, dtype), dtype)


def check_merged(case: merge_cases.Case, t: merge_cases.Operands, dtype: torch.dtype) -> None:
    bound = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
    kernel, bias, grad_weights, grad_scales = merge_cases.exact(case, t)
    size = list(case.kernel)
    fold = OPS.merge_depthwise_kernels.default
    adjoint = OPS.merge_depthwise_kernels_backward.default
    got = fold(t.weights, t.scales, t.biases, size, case.offset(), case.step(), dtype)
    for one, other in zip(got, (kernel, bias), strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        assert relative_error(one, other) <= bound[dtype]
    found = adjoint(t.grad_weight, t.grad_bias, t.weights, t.scales, t.biases, case.offset(), case.step())
    wanted = grad_weights, grad_scales, [t.grad_bias.double() for _ in t.biases]
    for group, exact, like in zip(found, wanted, (t.weights, t.scales, t.biases), strict=True):
        for one, other, operand in zip(group, exact, like, strict=True):
            assert one.dtype == operand.dtype and one.shape == other.shape
            assert relative_error(one, other) <= bound[one.dtype]


def check_merge_of_mixed_dtypes() -> None:
    dtypes = (torch.float32, torch.float16, torch.float64)
    branches = tuple(merge_cases.centred(k, 9, d) for k, d in ((9, 1), (3, 3), (1, 1)))
    case = merge_cases.Case("mixed", 3, (9, 9), branches, biases=3)
    t = merge_cases.operands(case, torch.float32)
    t.weights = [w.to(d) for w, d in zip(t.weights, dtypes, strict=True)]
    t.scales = [s.to(d) for s, d in zip(t.scales, dtypes[::-1], strict=True)]
    t.biases = [b.to(d) for b, d in zip(t.biases, dtypes, strict=True)]
    for dtype in dtypes:
        t.grad_weight = t.grad_weight.to(dtype)
        check_merged(case, t, dtype)


def check_merge_gradients_and_opcheck() -> None:
    """Double backward inside the two ops, fake kernels, and the merged convolution on top of them."""
    merging = importlib.import_module("lkconv.reparam.merge_depthwise_kernels")
    merging.register_hooks("lkconv_triton")
    fold = OPS.merge_depthwise_kernels.default
    adjoint = OPS.merge_depthwise_kernels_backward.default
    branches = (merge_cases.Branch((3, 4)), merge_cases.Branch((2, 2), (0, 1), (2, 2)))
    case = merge_cases.Case("small", 2, (3, 4), branches)
    t = merge_cases.operands(case, torch.float64, grad=True)
    rest = [3, 4], case.offset(), case.step(), torch.float64
    with deterministic(False):
        call = lambda *x: fold(list(x[:2]), list(x[2:4]), list(x[4:]), *rest)  # noqa: E731
        assert torch.autograd.gradcheck(call, t.leaves(), fast_mode=True)
        assert torch.autograd.gradgradcheck(call, t.leaves(), fast_mode=True)
        torch.library.opcheck(fold, (t.weights, t.scales, t.biases, *rest))
        dense, vector = t.grad_weight.requires_grad_(), t.grad_bias.requires_grad_()
        torch.library.opcheck(adjoint, (dense, vector, t.weights, t.scales, t.biases, *rest[1:3]))


def check_merged_convolution() -> None:
    """lkconv.reparam on the Triton backend: one fold, one gather."""
    import lkconv
    from lkconv.reparam import Branch, Geometry, merged_depthwise_conv2d

    target, side = Geometry.make(5, 1, 2, 1, 3), Geometry.make(3, 1, 2, 2, 3)
    sizes = ((1, 3, 6, 7), (3, 1, 5, 5), (3, 1, 3, 3), (3,), (3,))
    x, large, small, scale, bias = leaves = [torch.randn(s, requires_grad=True) for s in sizes]
    branches = [Branch(large, target, scale, bias), Branch(small, side)]

    def run(backend: str):
        with lkconv.use_backend(backend), torch.profiler.profile() as profile:
            y = merged_depthwise_conv2d(x, branches, target)
            grads = torch.autograd.grad(y.square().sum(), leaves)
        return (y, *grads), {e.key for e in profile.key_averages()}

    got, names = run("triton")
    assert "lkconv_triton::merge_depthwise_kernels" in names
    assert "lkconv_triton::merge_depthwise_kernels_backward" in names
    for one, other in zip(got, run("torch")[0], strict=True):
        assert relative_error(one.detach(), other.detach()) < 1e-5


def segments(dtype: torch.dtype = torch.float32) -> tuple:
    """Arguments of ``segmented_depthwise_conv2d``: an identity between windows, an empty segment."""
    windows = [(3, (3, 3)), (5, None), (4, (1, 7)), (0, (3, 3)), (2, (7, 1))]
    splits = [channels for channels, _ in windows]
    weights = [None if k is None else torch.randn(c, 1, *k, dtype=dtype) for c, k in windows]
    biases = [torch.randn(3, dtype=dtype), None, None, None, torch.randn(2, dtype=dtype)]
    return torch.randn(2, sum(splits), 9, 20, dtype=dtype), weights, biases, splits


def check_segments() -> None:
    """Slices of channels from and into wider tensors, in both layouts and by both algorithms."""
    for layout in ("nchw", "nhwc", "sliced"):
        x, *rest = segments()
        x = lay_out(x, layout)
        weights, biases, splits = rest
        doubles = ([None if t is None else t.double() for t in ts] for ts in (weights, biases))
        exact = reference.segmented_depthwise_conv2d(x.double(), *doubles, splits)
        for algorithm in ("direct", "toeplitz"):
            with only(algorithm):
                y = OPS.segmented_depthwise_conv2d(x, *rest)
            assert relative_error(y, exact) < 1e-6 and torch.equal(y[:, 3:8], x[:, 3:8])
            assert y.is_contiguous(memory_format=memory_format(x))
    x, *rest = segments()
    assert OPS.segmented_depthwise_conv2d(x[:0], *rest).shape == (0, *x.shape[1:])


def check_gradients_of_segments() -> None:
    """Of the public function, which stays inside the operators of Triton, and opcheck."""
    x, weights, biases, splits = segments(torch.float64)
    leaves = [t.requires_grad_() for t in (x, *weights, *biases) if t is not None and t.numel()]
    found, names = [], []
    for backend in ("triton", "torch"):
        with use_backend(backend), torch.profiler.profile() as profile:
            y = segmented_depthwise_conv2d(x, weights, biases, splits)
            found.append([y, *torch.autograd.grad(y.pow(3).sum(), leaves)])
        names.append({e.name for e in profile.events() if e.name.startswith("lkconv")})
    for one, other in zip(*found, strict=True):
        assert relative_error(one.detach(), other.detach()) < 1e-12
    used = {"segmented_depthwise_conv2d", "depthwise_conv2d_backward_weight"}
    assert names == [{f"lkconv_triton::{name}" for name in used}, set()]
    with deterministic(False):
        torch.library.opcheck(OPS.segmented_depthwise_conv2d.default, (x, weights, biases, splits))


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """The poison of torch.empty is off where torch itself compares results that it fills later."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)


def merge_value_checks() -> dict[str, Callable[[], None]]:
    """Folds of branch kernels: every case in float32, some in the dtypes the interpreter also has."""
    chosen = [(case, torch.float32) for case in merge_cases.CASES]
    chosen += [(case, d) for d in (torch.float64, torch.float16) for case in merge_cases.CASES[2:6]]
    return {f"merge-{c.name}-{d}": partial(check_merged_values, c, d) for c, d in chosen}


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_") and name not in ("check_merged_values", "check_merged")
}
CHECKS |= merge_value_checks()
