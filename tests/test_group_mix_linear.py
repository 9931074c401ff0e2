"""The projections of Group-Mix attention: which product computes them, and that it is the same one."""

import pytest
import torch
from torch import nn

import lkconv._C
from lkconv.attention import linear as projections
from lkconv.attention.linear import linear, prefers_onednn

needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this torch has no oneDNN",
)


@pytest.fixture
def products(monkeypatch):
    """The products that oneDNN is asked for, on every processor."""
    asked, product = [], projections._product
    monkeypatch.setattr(
        projections, "prefers_onednn", lambda dtype, vendor, isa: dtype in (torch.float32, torch.bfloat16)
    )
    monkeypatch.setattr(projections, "_product", lambda *a: asked.append(0) or product(*a))
    return asked


def case(bias=True, inputs=20, outputs=60, dtype=torch.float32):
    torch.manual_seed(0)
    module = nn.Linear(inputs, outputs, bias=bias).to(dtype)
    x, grad = torch.randn(3, 7, inputs), torch.randn(3, 7, outputs)
    return module, x.to(dtype).requires_grad_(), grad.to(dtype)


def gradients(function, module, x, grad):
    return torch.autograd.grad(function(x), [x, *module.parameters()], grad)


def test_which_processors_need_it(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    prefers_onednn.cache_clear()
    for vendor, isa in (("GenuineIntel", "avx512"), ("AuthenticAMD", "avx2"), ("", "avx512")):
        assert not prefers_onednn(torch.float32, vendor, isa)
    assert not prefers_onednn(torch.bfloat16, "GenuineIntel", "avx2")
    assert not prefers_onednn(torch.float16, "AuthenticAMD", "avx512")
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        assert prefers_onednn(torch.float32, "AuthenticAMD", "avx512")
        assert prefers_onednn(torch.bfloat16, "GenuineIntel", "amx")
    prefers_onednn.cache_clear()
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not prefers_onednn(torch.float32, "AuthenticAMD", "avx512")
    prefers_onednn.cache_clear()


def test_which_processors_have_whole_vectors():
    whole = lkconv._C.whole_512_bits
    assert whole("AuthenticAMD", 0x00B00F21, False) and whole("AuthenticAMD", 0x00B40F40, False)  # Zen 5
    assert whole("AuthenticAMD", 0x00B70F00, False)
    assert not whole("AuthenticAMD", 0x00B20F40, False)  # Zen 5 of notebooks
    assert not whole("AuthenticAMD", 0x00B60F00, False)
    assert not whole("AuthenticAMD", 0x00A10F11, False)  # Zen 4
    assert whole("GenuineIntel", 0x000806F8, True) and not whole("GenuineIntel", 0x000606A6, False)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(20, 60), (60, 20), (1, 1)])
def test_values_and_gradients(products, bias, inputs, outputs, dtype):
    """As exact as the module, judged by float64."""
    module, x, grad = case(bias, inputs, outputs, dtype)
    exact = nn.Linear(inputs, outputs, bias=bias).double()
    exact.load_state_dict(module.state_dict())
    wide = x.detach().double().requires_grad_()
    found = [linear(module, x), *gradients(lambda t: linear(module, t), module, x, grad)]
    plain = [module(x), *gradients(module, module, x, grad)]
    expected = [exact(wide), *gradients(exact, exact, wide, grad.double())]
    assert len(products) == (4 if dtype == torch.float32 else 2)
    for a, b, c in zip(found, plain, expected, strict=True):
        assert a.shape == c.shape and a.dtype == dtype
        assert (a - c).norm() <= 2 * (b - c).norm() + 1e-6 * c.norm()


@needs_onednn
def test_only_wanted_gradients(products):
    module, x, grad = case()
    module.weight.requires_grad_(False)
    out = linear(module, x.detach())
    (found,) = torch.autograd.grad(out, module.bias, grad)
    torch.testing.assert_close(found, grad.sum((0, 1)))
    assert len(products) == 1


@needs_onednn
def test_second_derivatives(products):
    module, x, grad = case()

    def second(function):
        (first,) = torch.autograd.grad(function(x).square(), x, grad, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, module.weight])

    torch.testing.assert_close(second(lambda t: linear(module, t)), second(module))


@needs_onednn
def test_runs_are_identical(products):
    module, x, grad = case(inputs=200, outputs=600)
    runs = [gradients(lambda t: linear(module, t), module, x, grad) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def double(module, x):
    return linear(module.double(), x.double())


def autocast(module, x):
    with torch.autocast("cpu", torch.bfloat16):
        return linear(module, x)


def hooked(module, x):
    module.register_forward_hook(lambda m, args, out: out * 2)
    return linear(module, x)


def another_type(module, x):
    return linear(nn.Sequential(module), x)


def transformed(module, x):
    return torch.func.jvp(lambda t: linear(module, t), (x,), (x,))[0]


def plain_backend(module, x):
    with lkconv.use_backend("torch"):
        return linear(module, x)


def reduced_precision(module, x):
    torch.set_float32_matmul_precision("high")
    try:
        return linear(module, x)
    finally:
        torch.set_float32_matmul_precision("highest")


def empty(module, x):
    return linear(module, x[:0])


@pytest.mark.parametrize(
    "call",
    [double, autocast, hooked, another_type, transformed, plain_backend, reduced_precision, empty],
    ids=lambda f: f.__name__,
)
def test_what_the_module_itself_computes(products, call):
    module, x, _ = case()
    call(module, x)
    assert not products


def test_wrong_widths_are_the_modules_own_error(products):
    module, x, _ = case()
    with pytest.raises(RuntimeError) as expected:
        module(x[..., 1:])
    with pytest.raises(RuntimeError) as raised:
        linear(module, x[..., 1:])
    assert str(raised.value) == str(expected.value) and not products


def test_torch_compile_sees_the_module(products):
    module, x, _ = case()
    compiled = torch.compile(lambda t: linear(module, t), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    assert not products
