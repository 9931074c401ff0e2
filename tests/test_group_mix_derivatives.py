"""Derivatives of Group-Mix attention beyond the first gradient: double backward, vmap, torch.func."""

import copy

import pytest
import torch

from group_mix_cases import attention, relative, unfused
from lkconv.attention.heads import split_heads

SIZE = (3, 2)


def functional(module, size=SIZE):
    """The module as a function of its input and parameters."""
    names = [n for n, _ in module.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, size))

    return call, [p.detach().requires_grad_() for p in module.parameters()]


@pytest.mark.parametrize("training", [False, True])
def test_twice_differentiable(training):
    torch.manual_seed(1)
    module = attention(10, training=training)
    call, parameters = functional(module)
    x = torch.randn(2, 6, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("training", [False, True])
def test_a_penalty_on_the_gradient(training):
    """What double backward is used for; against the composition, and only the needed gradients."""
    torch.manual_seed(2)
    module = attention(40, training=training)
    other = unfused(module)
    results = []
    for one in (module, other):
        x = torch.linspace(-1, 1, 2 * 15 * 40, dtype=torch.float64).reshape(2, 15, 40).requires_grad_()
        (slope,) = torch.autograd.grad(one(x, (3, 5)).square().sum(), x, create_graph=True)
        assert slope.requires_grad
        results.append(torch.autograd.grad(slope.square().sum(), x)[0])
    assert relative(*results) <= 1e-9


def test_the_gradient_does_not_depend_on_create_graph():
    torch.manual_seed(3)
    for dtype, limit in ((torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 0.03)):
        for training in (False, True):
            module = attention(40, dtype, training=training)
            x = torch.randn(2, 15, 40).to(dtype).requires_grad_()
            grads = [
                torch.autograd.grad(
                    module(x, (3, 5)).float().square().sum(),
                    [x, module.aggregator.agg1.pointwise_conv.weight],
                    create_graph=create,
                )
                for create in (False, True)
            ]
            for first, second in zip(*grads, strict=True):
                assert first.dtype == second.dtype and relative(second, first) <= limit


def untracked(training):
    """A module without running statistics to update: vmap has none of its own to write."""
    module = attention(40, training=training)
    if training:
        for norm in module.aggregator.norms():
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
            norm.track_running_stats = False
    return module


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap_over_tokens(dim, training):
    module = untracked(training)
    x = torch.randn(3, 2, 15, 40, dtype=torch.float64)
    got = torch.vmap(lambda t: module(t, (3, 5)), in_dims=dim)(x.movedim(0, dim))
    expected = torch.stack([module(t, (3, 5)) for t in x])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("training", [False, True])
def test_vmap_over_parameters(training):
    """An ensemble: every sample its own parameters, and its own or the common input."""
    modules = [untracked(training) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    base = copy.deepcopy(modules[0])
    x = torch.randn(3, 2, 15, 40, dtype=torch.float64)

    def call(p, b, t):
        return torch.func.functional_call(base, (p, b), (t, (3, 5)))

    for inputs, at in ((x, 0), (x[0], None)):
        got = torch.vmap(call, in_dims=(0, 0, at))(parameters, buffers, inputs)
        each = [m(inputs if at is None else t, (3, 5)) for m, t in zip(modules, x, strict=True)]
        torch.testing.assert_close(got, torch.stack(each))


@pytest.mark.parametrize("training", [False, True])
def test_per_sample_gradients(training):
    module = untracked(training)
    call, parameters = functional(module, (3, 5))
    x = torch.randn(3, 2, 15, 40, dtype=torch.float64)

    def loss(p, t):
        return call(t, *p).square().sum()

    parameters = tuple(p.detach() for p in parameters)
    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, t in enumerate(x):
        leaves = [p.clone().requires_grad_() for p in parameters]
        expected = torch.autograd.grad(loss(leaves, t), leaves)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g[i], e)


def test_vmap_of_views():
    mixed = torch.randn(2, 3, 2, 6, 32)
    got = torch.vmap(split_heads)(mixed)
    expected = [split_heads(m) for m in mixed]
    for part, wanted in zip(got, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(part, torch.stack(wanted))


@pytest.mark.parametrize("training", [False, True])
def test_many_gradients_at_once(training):
    """The backward ops themselves under vmap."""
    module = untracked(training)
    x = torch.randn(2, 15, 40, dtype=torch.float64, requires_grad=True)
    out = module(x, (3, 5))
    directions = torch.randn(3, *out.shape, dtype=torch.float64)

    def pull(direction):
        return torch.autograd.grad(out, x, direction, retain_graph=True)[0]

    got = torch.vmap(pull)(directions)
    each = [pull(d) for d in directions]
    torch.testing.assert_close(got, torch.stack(each))


def test_forward_mode():
    module = attention(40)
    x, tangent = torch.randn(2, 2, 15, 40, dtype=torch.float64)
    got = torch.func.jvp(lambda t: module(t, (3, 5)), (x,), (tangent,))[1]
    step = 1e-6
    expected = (module(x + step * tangent, (3, 5)) - module(x - step * tangent, (3, 5))) / (2 * step)
    assert relative(got, expected) <= 1e-7
