"""group_mix_aggregate against the plain PyTorch reference and against an independent composition."""

import copy

import pytest
import torch

import lkconv
from group_mix_cases import SIZES, aggregate_arguments, attention, relative, unfused
from lkconv import reference

NAMES = ("q", "k", "v", "local")
HALF = (torch.bfloat16, torch.float16)


def run(function, qkv, size, arguments, **options):
    leaves = [qkv] + [t for v in arguments.values() for t in (v if isinstance(v, list) else [v])]
    leaves = [t for t in leaves if t.requires_grad]
    out = function(qkv, size, **arguments, **options)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in out]
    return out, torch.autograd.grad(out, leaves, grads)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dim,batch,height,width", SIZES)
def test_equals_reference_in_float64(dim, batch, height, width, training):
    module = attention(dim).aggregator
    other = copy.deepcopy(module)
    qkv = torch.randn(batch, height * width, 3 * dim, dtype=torch.float64, requires_grad=True)
    size, options = (height, width), {"training": training}
    out, grads = run(lkconv.group_mix_aggregate, qkv, size, aggregate_arguments(module), **options)
    expected, expected_grads = run(
        reference.group_mix_aggregate, qkv, size, aggregate_arguments(other), **options
    )
    for name, a, b in zip(NAMES, out, expected, strict=True):
        assert a.shape == b.shape
        assert relative(a, b) < 1e-12, name
    for a, b in zip(grads, expected_grads, strict=True):
        # A single token makes some gradients through the norms vanish: compare with the rounding of 1.
        assert relative(a, b) < 1e-10 or (a - b).norm() < 1e-12
    for norm, expected_norm in zip(module.norms(), other.norms(), strict=True):
        torch.testing.assert_close(norm.running_mean, expected_norm.running_mean, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(norm.running_var, expected_norm.running_var, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dim,batch,height,width", SIZES[:9])
def test_float32_error(dim, batch, height, width, training):
    module = attention(dim, training=training)
    qkv = torch.randn(batch, height * width, 3 * dim, dtype=torch.float64)
    exact, _ = unfused(module).aggregation(qkv, (height, width))
    out = module.float().aggregator(qkv.float(), (height, width))
    assert relative(torch.stack(out[:3]), exact) < 1e-5


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dim", [40, 80, 200, 320])
def test_half_types_err_at_most_twice_as_much_as_eager(dim, dtype, training):
    size = (9, 8)
    module = attention(dim, training=training).to(dtype)
    qkv = torch.randn(3, 72, 3 * dim).to(dtype)
    ours, eager, exact = qkv.clone(), qkv.clone(), qkv.double()
    for t in (ours, eager, exact):
        t.requires_grad_()
    mixed, local = unfused(module).aggregation(exact, size)
    eager_mixed, eager_local = unfused(module, dtype).aggregation(eager, size)
    *heads, own_local = module.aggregator(ours, size)
    eps = torch.finfo(dtype).eps / 4
    assert relative(torch.stack(heads), mixed) <= 2 * relative(eager_mixed, mixed) + eps
    assert relative(own_local, local) <= 2 * relative(eager_local, local) + eps
    g = torch.randn(mixed.shape, dtype=torch.float64)
    for out in (mixed, eager_mixed, torch.stack(heads)):
        out.backward(g.to(out.dtype))
    assert relative(ours.grad, exact.grad) <= 2 * relative(eager.grad, exact.grad) + eps


def keep_away_from_the_jump(module, qkv, size, training):
    """hardswish's derivative jumps at +-3: no input may lie where a finite difference crosses."""
    inputs = []
    hooks = [n.register_forward_hook(lambda m, i, o: inputs.append(o.detach())) for n in module.norms()]
    hooks.append(module.agg0.norm.register_forward_hook(lambda m, i, o: inputs.append(o.detach())))
    state = copy.deepcopy(module.state_dict())
    module.train(training).composed(qkv, size)
    module.load_state_dict(state)
    for h in hooks:
        h.remove()
    return min((x.abs() - 3).abs().min().item() for x in inputs) > 1e-4


@pytest.mark.parametrize("training", [False, True])
def test_gradcheck(training):
    size, dim = (3, 4), 10
    for seed in range(100):
        torch.manual_seed(seed)
        module = attention(dim).aggregator
        qkv = torch.randn(1, 12, 3 * dim, dtype=torch.float64, requires_grad=True)
        if keep_away_from_the_jump(module, qkv, size, training):
            break
    else:
        pytest.fail("no example keeps away from hardswish's jump")
    arguments = aggregate_arguments(module)
    means, variances = arguments.pop("running_means"), arguments.pop("running_vars")
    names = list(arguments)
    flat = [t for v in arguments.values() for t in (v if isinstance(v, list) else [v])]

    def function(qkv, *parameters):
        groups, at = {}, 0
        for name in names:
            n = 4 if isinstance(arguments[name], list) else 1
            groups[name] = list(parameters[at : at + n]) if n == 4 else parameters[at]
            at += n
        statistics = {"running_means": None, "running_vars": None} if training else {
            "running_means": means, "running_vars": variances,
        }  # fmt: skip
        return lkconv.group_mix_aggregate(qkv, size, **groups, **statistics, training=training)

    assert torch.autograd.gradcheck(function, (qkv, *flat), eps=1e-6, atol=1e-6, rtol=1e-5)


def test_bit_identical_and_independent_of_memory_layout():
    module = attention(80, torch.float32, training=True).aggregator
    qkv = torch.randn(2, 196, 240)
    wide = torch.randn(2, 196, 250)
    wide[..., 5:245] = qkv
    a, b, c = (module(x, (14, 14)) for x in (qkv, qkv, wide[..., 5:245]))
    for x, y, z in zip(a, b, c, strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


def test_expanded_gradients():
    module = attention(40, training=True).aggregator
    qkv = torch.randn(2, 15, 120, dtype=torch.float64, requires_grad=True)
    sum_of = sum(t.sum() for t in module(qkv, (5, 3)))
    sum_of.backward()
    mine, qkv.grad = qkv.grad, None
    sum(t.sum() for t in module.composed(qkv, (5, 3))).backward()
    torch.testing.assert_close(mine, qkv.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_input_is_not_lost(bad):
    module = attention(80, torch.float32).aggregator
    qkv = torch.randn(2, 64, 240)
    qkv[1, 27, 5] = bad  # q, segment 0
    qkv[1, 27, 80 + 70] = bad  # k, segment 4
    q, k, v, local = module(qkv, (8, 8))
    assert not q[1, 0, 27, 5].isfinite() and not local[1, 27].isfinite().any()
    assert (
        q[0].isfinite().all() and k[0].isfinite().all() and v.isfinite().all() and local[0].isfinite().all()
    )


def test_empty_batch():
    module = attention(40).aggregator
    q, k, v, local = module(torch.empty(0, 6, 120, dtype=torch.float64), (2, 3))
    assert q.shape == k.shape == v.shape == (0, 8, 6, 4) and local.shape == (0, 6, 8)


@pytest.mark.parametrize("training", [False, True])
def test_segments_wider_than_the_kernels_take(training):
    """d = 498 is past the widest segment of the kernels, 496: plain PyTorch takes it."""
    torch.manual_seed(0)
    with torch.no_grad():
        module, other = (attention(2490, torch.float32, training).aggregator for _ in range(2))
        other.load_state_dict(module.state_dict())
        qkv = torch.randn(1, 6, 3 * 2490)
        expected = other.composed(qkv, (2, 3))
        function = lkconv.group_mix_aggregate(qkv, (2, 3), **aggregate_arguments(module), training=training)
        for result in (function, module(qkv, (2, 3))):
            for a, b in zip(result, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_use_backend_torch_reaches_no_kernel():
    module = attention(40, torch.float32).aggregator
    qkv = torch.randn(1, 6, 120)
    with torch.profiler.profile() as native:
        a = module(qkv, (2, 3))
    with lkconv.use_backend("torch"), torch.profiler.profile() as plain:
        b = module(qkv, (2, 3))
    assert "lkconv::group_mix_aggregate" in {e.name for e in native.events()}
    assert not any("lkconv" in e.name for e in plain.events())
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"num_heads": 4}, "num_heads must be 8"),
        ({"size": (5, 4)}, "size must have height"),
        ({"size": (15,)}, "size must be"),
        ({"size": (-3, -5)}, "size must be two positive"),
        ({"qkv": torch.zeros(1, 15, 121)}, "3 \\* C"),
        ({"qkv": torch.zeros(1, 15, 3 * 42)}, "multiple of 5"),
        ({"qkv": torch.zeros(1, 15, 3 * 45)}, "divisible by 8"),
        ({"qkv": torch.zeros(15, 120)}, "qkv must be"),
        ({"depthwise_weights": []}, "depthwise_weights must have 4"),
        ({"layer_norm_bias": torch.zeros(3)}, "layer_norm_bias"),
        ({"norm_biases": [torch.zeros(7)] * 4}, "norm_biases\\[0\\]"),
        ({"running_means": None}, "together"),
        ({"running_means": None, "running_vars": None}, "training=False"),
    ],
)
def test_errors(change, message):
    arguments = aggregate_arguments(attention(40).aggregator)
    call = {"qkv": torch.zeros(1, 15, 120, dtype=torch.float64), "size": (3, 5), **arguments, **change}
    with pytest.raises(ValueError, match=message):
        lkconv.group_mix_aggregate(**call)


def test_wrong_types():
    arguments = aggregate_arguments(attention(40).aggregator)
    with pytest.raises(TypeError, match="size must be two integers"):
        lkconv.group_mix_aggregate(torch.zeros(1, 15, 120, dtype=torch.float64), (3.0, 5.0), **arguments)
    with pytest.raises(TypeError, match="floating"):
        lkconv.group_mix_aggregate(torch.zeros(1, 15, 120, dtype=torch.int64), (3, 5), **arguments)
