"""A Triton that cannot compile: the next plan, then plain PyTorch, and the reason is kept. Needs no GPU."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
import torch.nn.functional as F

import lkconv
from lkconv import backends, functional
from triton_support import kernels

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompilationError  # noqa: E402
from triton.runtime.errors import InterpreterError, OutOfResources, PTXASError  # noqa: E402

faults, tuning, operators = kernels("faults"), kernels("tuning"), kernels("depthwise_conv2d")
ops = torch.ops.lkconv_triton
KEY = ("triton", torch.device("cpu"), torch.float32, "depthwise_conv2d")
GEOMETRY = ([1, 1], [3, 3], [1, 1])
MESSAGE = "the assembler of this machine knows no such GPU"


@pytest.fixture(autouse=True)
def forgotten():
    """What was learnt from failures ends with the test."""
    yield
    for learnt in (tuning._rejected, operators._settled, backends._gave_up, backends._choices):
        learnt.clear()


@pytest.fixture
def tensors():
    x, w, g = torch.randn(2, 4, 12, 16), torch.randn(4, 1, 7, 7), torch.randn(2, 4, 12, 16)
    return x, w.requires_grad_(False), g


def compiles(monkeypatch, wanted, error=None):
    """Only kernels of the ``wanted`` algorithms compile; PyTorch runs for them. Returns what was tried."""
    tried = []

    def conv(plan, p, x, w, bias, y):
        tried.append(plan.algorithm)
        if plan.algorithm not in wanted:
            raise error or PTXASError(MESSAGE)
        y.copy_(F.conv2d(x, w, bias, padding=3, groups=x.size(1)))

    def weight(plan, p, x, dy, out):
        conv(plan, p, x, out, None, dy.clone())
        out.copy_(torch.nn.grad.conv2d_weight(x, out.shape, dy, padding=3, groups=x.size(1)))

    monkeypatch.setattr(operators, "launch_conv", conv)
    monkeypatch.setattr(operators, "launch_weight", weight)
    return tried


# --- which errors are failures to compile -----------------------------------------------------------------


@triton.jit
def meaningless(x):
    tl.store(x, tl.no_such_function(x))


@triton.jit
def adds_one(x):
    tl.store(x, tl.load(x) + 1)


def compile_for_hopper(kernel, **options):
    source = ASTSource(fn=kernel, signature={"x": "*fp32"}, constexprs={})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def caught(function, *args, **kwargs):
    with pytest.raises(Exception) as info:
        function(*args, **kwargs)
    return info.value


def test_what_the_compiler_raises_is_a_failure_to_compile():
    error = caught(compile_for_hopper, meaningless)
    assert isinstance(error, CompilationError)
    assert "CompilationError" in faults.compile_failure(error)
    assert "no_such_function" in faults.compile_failure(error)
    assert faults.compile_failure(OutOfResources(300_000, 232_448, "shared memory"))


def test_errors_of_other_classes_count_where_the_compiler_raised_them(monkeypatch, tmp_path):
    """A pass or a tool of the compiler that fails raises RuntimeError, OSError or CalledProcessError."""
    from triton.backends.nvidia import compiler

    def broken(*args, **kwargs):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler.CUDABackend, "make_ttgir", broken)
    error = caught(compile_for_hopper, adds_one)
    assert faults.compile_failure(error) == "RuntimeError: PassManager::run failed"


def test_other_errors_are_not():
    device = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    for error in (RuntimeError("of the user"), device, InterpreterError("a kernel's bug"), MemoryError()):
        assert faults.compile_failure(caught(raise_it, error)) is None


def raise_it(error):
    raise error


def test_long_messages_keep_both_ends():
    text = faults.summary("what is wrong\n" + "a listing\n" * 1000 + "the last line")
    assert text.startswith("what is wrong a listing") and text.endswith("listing the last line")
    assert len(text) < faults.SUMMARY + 10 and faults.summary("short") == "short"


# --- the next plan ----------------------------------------------------------------------------------------


def test_the_next_plan_runs_and_the_failed_one_is_not_tried_again(monkeypatch, tensors, caplog):
    x, w, _ = tensors
    first = operators_first(monkeypatch, tensors)
    other = {"direct": "toeplitz", "toeplitz": "direct"}[first]
    tried = compiles(monkeypatch, {other})
    with caplog.at_level("WARNING", "lkconv"):
        y = ops.depthwise_conv2d(x, w, None, *GEOMETRY)
    torch.testing.assert_close(y, F.conv2d(x, w, padding=3, groups=4))
    assert tried[0] == first and tried[-1] == other and tried.count(other) == 1
    assert len(caplog.records) == tried.count(first) and MESSAGE in caplog.text
    assert not backends._gave_up
    del tried[:]
    ops.depthwise_conv2d(x, w, None, *GEOMETRY)
    assert tried == [other]
    monkeypatch.setattr(kernels("report"), "device_at", lambda index: x.device)
    chosen, declined = kernels().plan("forward", x.shape, 4, (7, 7), (1, 1), (3, 3), (1, 1), "float32", 0)
    assert chosen["algorithm"] == other and declined["algorithm"] == first
    assert not declined["possible"] and MESSAGE in declined["reason"]


def operators_first(monkeypatch, tensors):
    """The algorithm of the plan that comes first."""
    x, w, _ = tensors
    with monkeypatch.context() as patch:
        tried = compiles(patch, {"direct", "toeplitz"})
        ops.depthwise_conv2d(x, w, None, *GEOMETRY)
    operators._settled.clear()
    return tried[0]


# --- the next backend -------------------------------------------------------------------------------------


def test_without_a_plan_plain_pytorch_computes_every_pass(monkeypatch, tensors, caplog):
    tried = compiles(monkeypatch, set())
    x, w, g = tensors
    x = x.contiguous(memory_format=torch.channels_last)
    with caplog.at_level("WARNING", "lkconv"):
        y = ops.depthwise_conv2d(x, w, torch.ones(4), *GEOMETRY)
        dx = ops.depthwise_conv2d_backward_input(g, w, x.shape, *GEOMETRY)
        dw = ops.depthwise_conv2d_backward_weight(g, x, [7, 7], *GEOMETRY)
    torch.testing.assert_close(y, F.conv2d(x, w, torch.ones(4), padding=3, groups=4))
    torch.testing.assert_close(dx, torch.nn.grad.conv2d_input(x.shape, w, g, padding=3, groups=4))
    torch.testing.assert_close(dw, torch.nn.grad.conv2d_weight(x, w.shape, g, padding=3, groups=4))
    assert y.is_contiguous(memory_format=torch.channels_last) and dx.is_contiguous() and dw.is_contiguous()
    assert {"direct", "toeplitz"} == set(tried)
    assert MESSAGE in backends._gave_up[KEY] and "gives up depthwise_conv2d" in caplog.text


def test_the_backend_declines_from_then_on_with_the_reason(monkeypatch, tensors):
    class Available:
        is_available = staticmethod(lambda device: (True, ""))

    compiles(monkeypatch, set())
    ops.depthwise_conv2d(*tensors[:2], None, *GEOMETRY)
    monkeypatch.setitem(sys.modules, "lkconv.triton_kernels", Available)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # lets the backend take CPU tensors
    report = lkconv.explain(*tensors[:2], padding=3)
    assert MESSAGE in dict(report.alternatives)["triton"]


def test_what_was_asked_for_by_name_raises_with_the_compilers_message(monkeypatch, tensors):
    compiles(monkeypatch, set())
    x, w, g = tensors
    calls = (
        lambda: ops.depthwise_conv2d(x, w, None, *GEOMETRY),
        lambda: ops.depthwise_conv2d_backward_input(g, w, x.shape, *GEOMETRY),
        lambda: ops.depthwise_conv2d_backward_weight(g, x, [7, 7], *GEOMETRY),
    )
    for call in calls:
        with lkconv.use_backend("triton"), pytest.raises(faults.CannotCompile) as info:
            call()
        assert MESSAGE in str(info.value) and "asked for by name" in str(info.value)
    assert not backends._gave_up


@pytest.mark.parametrize("asked", [True, False])
def test_unrelated_errors_are_the_callers(monkeypatch, tensors, asked):
    compiles(monkeypatch, set(), ZeroDivisionError("a bug"))
    with lkconv.use_backend("triton" if asked else "torch"), pytest.raises(ZeroDivisionError, match="a bug"):
        ops.depthwise_conv2d(*tensors[:2], None, *GEOMETRY)
    assert not tuning._rejected and not backends._gave_up


def test_ops_without_a_plain_form_leave_the_call_to_the_next_backend(caplog):
    def fails(tokens):
        raise PTXASError(MESSAGE)

    guarded = faults.guarded("group_mix_mix", "group_mix", fails, None)
    answers = []

    @backends.retried
    def call(tokens):
        key = ("triton", tokens.device, tokens.dtype, "group_mix")
        answers.append(backends._gave_up.get(key))
        return "the next backend" if answers[-1] else guarded(tokens)

    with caplog.at_level(logging.WARNING, "lkconv"):
        assert call(torch.zeros(1)) == "the next backend"
    assert answers[0] is None and MESSAGE in answers[1]


def test_merging_falls_back_as_well(monkeypatch):
    def fails(tensor):
        raise PTXASError(MESSAGE)

    monkeypatch.setattr(kernels("merge_depthwise_kernels"), "device_guard", fails)
    weights, scales, biases = [torch.randn(4, 1, 3, 3)], [torch.randn(4)], [torch.randn(4)]
    place = [1, 1], [1, 1]
    found = ops.merge_depthwise_kernels(weights, scales, biases, [5, 5], *place, torch.float32)
    expected = torch.ops.lkconv.merge_depthwise_kernels(
        weights, scales, biases, [5, 5], *place, torch.float32
    )
    torch.testing.assert_close(found, expected)
    given = (*expected, weights, scales, biases, *place)
    torch.testing.assert_close(
        ops.merge_depthwise_kernels_backward(*given),
        torch.ops.lkconv.merge_depthwise_kernels_backward(*given),
    )
    assert [key[3] for key in backends._gave_up] == ["merge_depthwise_kernels"]


@pytest.fixture
def nothing_compiles(monkeypatch):
    """Triton comes first, for CPU tensors too, and compiles nothing."""

    def fails(tensor):
        raise PTXASError(MESSAGE)

    first = [b._replace(declines=lambda *_: None) for b in backends.BACKENDS if b.name == "triton"]
    monkeypatch.setattr(backends, "BACKENDS", (*first, *(b for b in backends.BACKENDS if b.name != "triton")))
    backends._choices.clear()
    # What CPU tensors take without a question to the backends, among which Triton is no candidate for them.
    monkeypatch.setattr(functional, "_at_once", lambda *_: False)
    for module in ("group_mix", "normalised_branches", "merge_depthwise_kernels", "launch"):
        monkeypatch.setattr(kernels(module), "device_guard", fails)


def outputs_and_gradients(module, *arguments):
    torch.manual_seed(1)
    x = arguments[0].double().requires_grad_()
    y = module(x, *arguments[1:])
    return [y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


@pytest.mark.parametrize(
    ("make", "arguments", "families"),
    [
        (lambda: lkconv.GroupMixAttention(40), (torch.randn(2, 24, 40), (4, 6)), {"group_mix"}),
        (lambda: lkconv.GroupMixAttention(40).eval(), (torch.randn(2, 24, 40), (4, 6)), {"group_mix"}),
        (
            lambda: lkconv.reparam.DilatedReparamBlock(8, 13),
            (torch.randn(2, 8, 14, 14),),
            {"normalised_branches", "depthwise_conv2d"},
        ),
    ],
    ids=["attention in training", "attention", "branches in training"],
)
def test_blocks_end_up_on_the_next_backend(nothing_compiles, make, arguments, families):
    module = make().double()
    found = outputs_and_gradients(module, *arguments)
    assert {key[3] for key in backends._gave_up} == families
    with lkconv.use_backend("torch"):
        expected = outputs_and_gradients(module, *arguments)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
