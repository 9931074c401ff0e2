"""lkconv::merge_depthwise_kernels and its adjoint: the fold of all branches by one kernel."""

import os
import subprocess
import sys

import pytest
import torch

import lkconv
from lkconv import backends, reference, use_backend
from lkconv.reparam import Branch, Geometry, merged_depthwise_conv2d
from lkconv.reparam.merge_depthwise_kernels import register_hooks
from merge_cases import CASES, Case, centred, exact, operands
from merge_cases import Branch as Place
from reparam_cases import relative_error

FOLD = torch.ops.lkconv.merge_depthwise_kernels.default
ADJOINT = torch.ops.lkconv.merge_depthwise_kernels_backward.default
# Relative to the norm; one rounding of the result for half types.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SMALL = Case(
    "small", 3, (5, 6), (Place((5, 6)), Place((2, 3), (1, 0), (2, 2)), Place((1, 1), (2, 3))), biases=2
)
BARE = Case("bare", 2, (3, 3), (Place((3, 3)), Place((2, 1), (0, 2), (2, 1))), scaled=False, biases=0)


def fold(case, t, dtype, op=FOLD):
    return op(t.weights, t.scales, t.biases, list(case.kernel), case.offset(), case.step(), dtype)


def adjoint(case, t, op=ADJOINT):
    return op(t.grad_weight, t.grad_bias, t.weights, t.scales, t.biases, case.offset(), case.step())


def check(case, t, dtype, fold_op=FOLD, adjoint_op=ADJOINT):
    kernel, bias, grad_weights, grad_scales = exact(case, t)
    got_kernel, got_bias = fold(case, t, dtype, fold_op)
    assert got_kernel.dtype == got_bias.dtype == dtype
    assert got_kernel.is_contiguous() and got_kernel.shape == kernel.shape
    assert relative_error(got_kernel.cpu(), kernel) <= TOLERANCE[dtype]
    assert relative_error(got_bias.cpu(), bias) <= TOLERANCE[dtype] if case.biases else not got_bias.any()
    got = adjoint(case, t, adjoint_op)
    for found, wanted, like in zip(got, (grad_weights, grad_scales), (t.weights, t.scales), strict=False):
        assert len(found) == len(wanted)
        for one, other, operand in zip(found, wanted, like, strict=True):
            assert one.dtype == operand.dtype and one.shape == other.shape
            assert one.is_contiguous() or adjoint_op is reference.merge_depthwise_kernels_backward
            assert relative_error(one.cpu(), other) <= TOLERANCE[one.dtype]
    assert len(got[2]) == case.biases
    for one, operand in zip(got[2], t.biases, strict=True):
        assert torch.equal(one, t.grad_bias.to(operand.dtype))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_values(case, dtype):
    check(case, operands(case, dtype), dtype)


@pytest.mark.parametrize("case", [*CASES, SMALL], ids=lambda c: c.name)
def test_the_reference_is_the_same_function(case):
    check(case, operands(case, torch.float64), torch.float64,
          reference.merge_depthwise_kernels, reference.merge_depthwise_kernels_backward)  # fmt: skip


@pytest.mark.parametrize("result", TOLERANCE, ids=str)
def test_mixed_dtypes(result):
    """Each operand in a dtype of its own: float64 anywhere makes every sum double."""
    case = Case("mixed", 5, (9, 9), (Place((9, 9)), centred(5, 9), centred(3, 9, 3), centred(1, 9)), biases=4)
    t = operands(case, torch.float32)
    order = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    for wide in (False, True):
        dtypes = order if wide else [torch.float32, *order[:3]]
        t.weights = [w.to(d) for w, d in zip(t.weights, dtypes, strict=True)]
        t.scales = [s.to(d) for s, d in zip(t.scales, dtypes[::-1], strict=True)]
        t.biases = [b.to(d) for b, d in zip(t.biases, dtypes[1:] + dtypes[:1], strict=True)]
        t.grad_weight = t.grad_weight.to(result)
        kernel, *_ = exact(case, t)
        accumulated = fold(case, t, result)[0]
        if result == torch.float64:
            assert relative_error(accumulated, kernel) <= 1e-12
        check(case, t, result)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    """20 branches of half-precision kernels: the sum's error is that of casting the exact one."""
    case = next(c for c in CASES if c.name == "many")
    t = operands(case, dtype)
    kernel, *_ = exact(case, t)
    cast = relative_error(kernel.to(dtype), kernel)
    assert relative_error(fold(case, t, dtype)[0], kernel) <= 1.01 * cast


def test_float32_is_no_worse_than_the_reference():
    for case in CASES:
        t = operands(case, torch.float32)
        kernel, _, _, grad_scales = exact(case, t)
        got = fold(case, t, torch.float32)[0]
        plain = fold(case, t, torch.float32, reference.merge_depthwise_kernels)[0]
        assert relative_error(got, kernel) <= 2 * relative_error(plain, kernel) + 1e-7
        if case.scaled:
            theirs = adjoint(case, t, reference.merge_depthwise_kernels_backward)[1]
            for one, other, true in zip(adjoint(case, t)[1], theirs, grad_scales, strict=True):
                assert relative_error(one, true) <= 2 * relative_error(other, true) + 1e-6


@pytest.mark.parametrize("case", [SMALL, BARE], ids=lambda c: c.name)
def test_first_and_second_derivatives(case):
    t = operands(case, torch.float64, grad=True)
    n, s = len(t.weights), len(t.scales)

    def folded(*leaves):
        return FOLD(
            list(leaves[:n]), list(leaves[n : n + s]), list(leaves[n + s :]), case.kernel, case.offset(),
            case.step(), torch.float64,
        )  # fmt: skip

    def gathered(dense, vector, *leaves):
        found = ADJOINT(
            dense, vector, list(leaves[:n]), list(leaves[n : n + s]), t.biases, case.offset(), case.step()
        )
        return tuple(x for group in found for x in group)

    assert torch.autograd.gradcheck(folded, t.leaves())
    assert torch.autograd.gradgradcheck(folded, t.leaves())
    arguments = [t.grad_weight.requires_grad_(), t.grad_bias.requires_grad_(), *t.weights, *t.scales]
    assert torch.autograd.gradcheck(gathered, arguments)
    assert torch.autograd.gradgradcheck(gathered, arguments)


def test_derivatives_stay_in_the_two_ops():
    t = operands(SMALL, torch.float32, grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        kernel, bias = fold(SMALL, t, torch.float32)
        grads = torch.autograd.grad((kernel.sin().sum(), bias.sum()), t.leaves(), create_graph=True)
        torch.autograd.grad([g.square().sum() for g in grads[:-2]], t.weights + t.scales)
    counts = {e.key: e.count for e in profile.key_averages() if e.key.startswith("lkconv::")}
    assert counts == {
        # The value, and the gradient of the adjoint for the dense gradient.
        "lkconv::merge_depthwise_kernels": 2,
        # First derivatives, the adjoint's own for weights and scales, and the fold's through sin.
        "lkconv::merge_depthwise_kernels_backward": 3,
    }


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("case", [SMALL, BARE], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck(case, dtype, grad):
    t = operands(case, dtype, grad)
    geometry = case.offset(), case.step()
    torch.library.opcheck(FOLD, (t.weights, t.scales, t.biases, list(case.kernel), *geometry, dtype))
    dense, vector = t.grad_weight.requires_grad_(grad), t.grad_bias.requires_grad_(grad)
    torch.library.opcheck(ADJOINT, (dense, vector, t.weights, t.scales, t.biases, *geometry))


def test_gradients_of_any_strides():
    """An expanded gradient, as of .sum(), and a channels_last one."""
    t = operands(SMALL, torch.float64)
    t.grad_weight = torch.full((), 0.5, dtype=torch.float64).expand(t.grad_weight.shape)
    t.grad_bias = torch.full((), 2.0, dtype=torch.float64).expand(t.grad_bias.shape)
    check(SMALL, t, torch.float64)
    t.grad_weight = torch.randn(3, 1, 6, 5, dtype=torch.float64).transpose(2, 3)
    check(SMALL, t, torch.float64)


def test_a_non_finite_tap_stays_where_it_is():
    """Zeros between the taps are never multiplied: neither by a NaN nor by an infinite scale."""
    case = Case("holes", 2, (7, 7), (Place((3, 3), (1, 1), (2, 2)), Place((1, 1), (0, 0))))
    t = operands(case, torch.float32)
    t.scales[0][0] = float("inf")
    t.weights[0][1, 0, 1, 1] = float("nan")
    kernel, _ = fold(case, t, torch.float32)
    hit = torch.zeros(2, 7, 7, dtype=torch.bool)
    hit[0, 1::2, 1::2] = True
    hit[1, 3, 3] = True
    assert torch.equal(~kernel[:, 0].isfinite(), hit)


def test_no_channels():
    case = Case("none", 0, (3, 3), (Place((3, 3)), Place((1, 1), (1, 1))))
    t = operands(case, torch.float32)
    assert fold(case, t, torch.float32)[0].shape == (0, 1, 3, 3)
    assert [g.shape for g in adjoint(case, t)[0]] == [(0, 1, 3, 3), (0, 1, 1, 1)]


def test_many_channels_run_in_parallel_with_the_same_bits():
    case = Case("wide", 700, (13, 13), (Place((13, 13)), centred(5, 13), centred(3, 13, 5)))
    t = operands(case, torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = fold(case, t, torch.float32), adjoint(case, t)
        torch.set_num_threads(1)
        one = fold(case, t, torch.float32), adjoint(case, t)
    finally:
        torch.set_num_threads(threads)
    for groups in zip((two[0], *two[1]), (one[0], *one[1]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(*groups, strict=True))
    check(case, t, torch.float32)


def test_vmap():
    case, size = SMALL, 4
    many = [operands(Case(f"vmap {'x' * i}", *list(vars(case).values())[1:]), torch.float64)
            for i in range(size)]  # fmt: skip
    weights = [torch.stack(group, 2) for group in zip(*(t.weights for t in many), strict=True)]
    biases = [torch.stack(group) for group in zip(*(t.biases for t in many), strict=True)]
    scales = many[0].scales  # shared
    rest = case.kernel, case.offset(), case.step(), torch.float64

    kernels, sums = torch.vmap(lambda w, b: FOLD(w, scales, b, *rest), in_dims=(2, 0))(weights, biases)
    grads = torch.vmap(
        lambda w, b: ADJOINT(many[0].grad_weight, many[0].grad_bias, w, scales, b, *rest[1:3]), in_dims=(2, 0)
    )(weights, biases)
    for i, t in enumerate(many):
        t.scales, t.grad_weight, t.grad_bias = scales, many[0].grad_weight, many[0].grad_bias
        kernel, bias = fold(case, t, torch.float64)
        assert torch.equal(kernels[i], kernel) and torch.equal(sums[i], bias)
        for found, wanted in zip(grads, adjoint(case, t), strict=True):
            assert all(torch.equal(a[i], b) for a, b in zip(found, wanted, strict=True))


def layer():
    """A float64 merged call and its leaves, over all of the op's arguments."""
    target = Geometry.make(7, 1, 3, 1, 3)
    side = Geometry.make(3, 1, 2, 2, 3)
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True)
              for s in ((2, 3, 8, 9), (3, 1, 7, 7), (3, 1, 3, 3), 3, 3, 3)]  # fmt: skip

    def call(x, large, small, s0, s1, bias):
        return merged_depthwise_conv2d(x, [Branch(large, target, s0, bias), Branch(small, side, s1)], target)

    return call, leaves


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_whole(backend):
    call, leaves = layer()

    def step(*leaves):
        y = call(*leaves)
        return y, *torch.autograd.grad(y.square().sum(), leaves)

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    got = compiled(*leaves)
    wanted = step(*leaves)
    assert relative_error(got, wanted[0]) <= 1e-12
    found = torch.autograd.grad(got.square().sum(), leaves)
    assert all(relative_error(a, b) <= 1e-12 for a, b in zip(found, wanted[1:], strict=True))


def test_the_ops_compile_and_export_themselves():
    class Fold(torch.nn.Module):
        def forward(self, weights, scales, biases):
            kernel, bias = FOLD(
                weights, scales, biases, SMALL.kernel, SMALL.offset(), SMALL.step(), torch.float64
            )
            return kernel * 2, bias

    t = operands(SMALL, torch.float64, grad=True)
    arguments = t.weights, t.scales, t.biases
    wanted = Fold()(*arguments)
    compiled = torch.compile(Fold(), fullgraph=True, backend="aot_eager")(*arguments)
    exported = torch.export.export(Fold(), arguments).module()(*arguments)
    for got in (compiled, exported):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        found = torch.autograd.grad(got[0].square().sum(), t.weights + t.scales, retain_graph=True)
        grads = torch.autograd.grad(wanted[0].square().sum(), t.weights + t.scales, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(found, grads, strict=True))


def test_operands_without_a_kernel_take_the_reference():
    """Under use_backend("torch"), and for weights in a dtype the kernels do not know."""
    call, leaves = layer()
    wanted = call(*leaves)
    small = leaves[2].detach().to(torch.float8_e5m2)
    for context, weight in (("torch", leaves[2]), ("cpu", small)):
        x, large, _, *rest = leaves
        with use_backend(context), torch.profiler.profile() as profile:
            got = call(x, large, weight, *rest)
        assert not any(e.key == "lkconv::merge_depthwise_kernels" for e in profile.key_averages())
        other = call(x, large, weight.double(), *rest)
        assert relative_error(got, wanted if weight is leaves[2] else other) <= 1e-12


def test_memory_safety_checks():
    """What Python's checks prevent, the op itself refuses before it touches memory."""
    t = operands(SMALL, torch.float32)
    rest = [5, 6], SMALL.offset(), SMALL.step(), torch.float32
    wrong = [
        ([], [], [], [5, 6], [], [], torch.float32),
        (t.weights, t.scales[:1], t.biases, *rest),
        (t.weights, t.scales, [t.biases[0][:2]], *rest),
        (t.weights, [s[:2] for s in t.scales], t.biases, *rest),
        (t.weights, t.scales, t.biases, [4, 6], *rest[1:]),
        (t.weights, t.scales, t.biases, [5, 6], [0, 0, 1, 0, 2, -3], *rest[2:]),
        (t.weights, t.scales, t.biases, [5, 6], rest[1], [1, 1, 2, 2, 0, 1], torch.float32),
        (t.weights, t.scales, t.biases, [5, 6], rest[1][:4], *rest[2:]),
        (t.weights, t.scales, t.biases, *rest[:3], torch.int32),
        ([t.weights[0], t.weights[1][:2], t.weights[2]], t.scales, t.biases, *rest),
        ([t.weights[0].squeeze(1), *t.weights[1:]], t.scales, t.biases, *rest),
    ]
    for arguments in wrong:
        with pytest.raises(RuntimeError, match="lkconv"):
            FOLD(*arguments)
    with pytest.raises(RuntimeError, match="lkconv"):
        ADJOINT(t.grad_weight[:, :, :4], t.grad_bias, t.weights, t.scales, t.biases, *rest[1:3])
    with pytest.raises(RuntimeError, match="lkconv"):
        ADJOINT(t.grad_weight, t.grad_bias[:2], t.weights, t.scales, t.biases, *rest[1:3])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_values_on_a_gpu(backend, dtype):
    """Every case, the same bits twice, and a merged convolution that uses both kernels."""
    choice = backends.BACKENDS[["cpu", "cuda", "triton"].index(backend)]
    if reason := choice.declines(torch.device("cuda"), dtype):
        pytest.skip(reason)
    choice.load()
    namespace = "lkconv" if backend == "cuda" else "lkconv_triton"
    register_hooks(namespace)
    ops = getattr(torch.ops, namespace)
    pair = ops.merge_depthwise_kernels.default, ops.merge_depthwise_kernels_backward.default
    for case in CASES:
        t = operands(case, dtype, device="cuda")
        check(case, t, dtype, *pair)
        assert torch.equal(fold(case, t, dtype, pair[0])[0], fold(case, t, dtype, pair[0])[0])
        twice = adjoint(case, t, pair[1]), adjoint(case, t, pair[1])
        for one, other in zip(*twice, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    call, leaves = layer()
    moved = [leaf.detach().cuda().requires_grad_() for leaf in leaves]
    with use_backend(backend), torch.profiler.profile() as profile:
        got = torch.autograd.grad(call(*moved).square().sum(), moved)
    assert f"{namespace}::merge_depthwise_kernels_backward" in {e.key for e in profile.key_averages()}
    for one, other in zip(got, torch.autograd.grad(call(*leaves).square().sum(), leaves), strict=True):
        assert relative_error(one.cpu(), other) <= 1e-12


PROBE = """
import sys
sys.path[:0] = sys.argv[1:3]
import torch
from merge_cases import CASES
from test_reparam_merge_depthwise_kernels import TOLERANCE, check, operands
import lkconv._C as core
assert core.active_isa() == sys.argv[3], core.active_isa()
for case in CASES:
    for dtype in TOLERANCE:
        check(case, operands(case, dtype), dtype)
"""


@pytest.mark.parametrize("isa", [i for i in lkconv._C.compiled_isas() if i in ("baseline", "avx2")])
def test_lower_instruction_sets(isa):
    """The best one runs above; AMX has the code of AVX-512 here."""
    order = ["baseline", "avx2", "avx512", "amx"]
    if order.index(isa) > order.index(lkconv._C.detected_isa()):
        pytest.skip(f"this machine has no {isa}")
    here = os.path.dirname(os.path.abspath(__file__))
    root = os.path.dirname(os.path.dirname(os.path.abspath(lkconv.__file__)))
    done = subprocess.run(
        [sys.executable, "-c", PROBE, root, here, isa],
        env={**os.environ, "LKCONV_MAX_CPU_ISA": isa}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
