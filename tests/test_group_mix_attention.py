"""GroupMixAttention and GroupMixBlock: values, gradients, names, modes, pictures."""

import copy

import pytest
import torch

from group_mix_cases import SIZES, attention, relative, unfused
from lkconv import GroupMixAttention, GroupMixBlock, reference

ops = torch.ops.lkconv


def both(module, other, x, size):
    """Outputs and gradients of x and of every parameter of two modules."""
    results = []
    grad = torch.randn(x.shape, dtype=torch.float64)
    for m, dtype in ((module, x.dtype), (other, torch.float64)):
        leaf = x.detach().to(dtype).requires_grad_()
        out = m(leaf, size)
        out.backward(grad.to(out.dtype))
        results.append((out, leaf.grad))
    return results


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dim,batch,height,width", SIZES)
def test_equals_independent_composition(dim, batch, height, width, training):
    module = attention(dim, training=training)
    other = unfused(module)
    x = torch.randn(batch, height * width, dim, dtype=torch.float64)
    (out, grad), (expected, expected_grad) = both(module, other, x, (height, width))
    assert relative(out, expected) < 1e-10
    assert relative(grad, expected_grad) < 1e-9 or (grad - expected_grad).norm() < 1e-12
    theirs = [other.aggregation.norms[i] for i in range(4)]
    for norm, expected_norm in zip(module.aggregator.norms(), theirs, strict=True):
        torch.testing.assert_close(norm.running_var, expected_norm.running_var)
    pairs = [
        (module.qkv, other.qkv), (module.proj, other.proj), (module.crpe.conv_list[1], other.position[1]),
        (module.aggregator.agg3.conv1, other.aggregation.mixers[3][0]),
        (module.aggregator.agg0.conv.pointwise_conv, other.aggregation.local[1]),
    ]  # fmt: skip
    for a, b in pairs:
        assert relative(a.weight.grad, b.weight.grad) < 1e-9 or b.weight.grad.norm() < 1e-12


@pytest.mark.parametrize("dim,batch,height,width", SIZES[:9])
def test_float32(dim, batch, height, width):
    module = attention(dim, torch.float32)
    (out, grad), (expected, expected_grad) = both(
        module, unfused(module), torch.randn(batch, height * width, dim), (height, width)
    )
    assert relative(out, expected) < 1e-5
    assert relative(grad, expected_grad) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [40, 90, 160, 240])  # 90: heads of nine channels
def test_core_in_half_types(dim, dtype):
    """The core alone: at most twice the error of the same operators in the same dtype."""
    d, size = dim // 5, (7, 9)
    module = attention(dim)
    weights, biases = module.crpe.parameter_lists()
    mixed, local = torch.randn(3, 2, 63, 4 * d).to(dtype), torch.randn(2, 63, d).to(dtype)
    results = []
    for kind in (torch.float64, dtype, None):
        m = mixed.to(kind or dtype).requires_grad_()
        if kind is None:
            out, _, _ = ops.group_mix_attention(m, local, *size, weights, biases, module.scale)
        else:
            heads = m.view(3, 2, 63, 8, d // 2).transpose(2, 3)
            out = reference.group_mix_attention(*heads, local.to(kind), size, weights, biases, module.scale)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype))
        results.append((out, m.grad))
    for exact, eager, ours in zip(*results, strict=True):
        assert relative(ours, exact) <= 2 * relative(eager, exact) + torch.finfo(dtype).eps / 4


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [40, 80, 200, 320])
def test_half_types_err_at_most_twice_as_much_as_eager(dim, dtype, training):
    """The whole module: output and gradients of the input and the parameters, against the composition."""
    size = (9, 8)
    module = attention(dim, training=training).to(dtype)
    exact, eager = unfused(module), unfused(module, dtype)
    x = torch.randn(3, 72, dim).to(dtype)
    grad = torch.randn(x.shape).to(dtype)
    results = []
    for m in (exact, eager, module):
        leaf = x.to(next(m.parameters()).dtype).requires_grad_()
        out = m(leaf, size)
        out.backward(grad.to(out.dtype))
        theirs, first = m is not module, m.aggregation.mixers[3] if m is not module else m.aggregator.agg3
        depthwise, pointwise = tuple(first) if theirs else (first.conv1, first.pointwise_conv)
        weights = [m.qkv.weight, m.proj.weight, depthwise.weight, pointwise.weight]
        results.append((out, leaf.grad, *(w.grad for w in weights)))
    eps = torch.finfo(dtype).eps / 4
    for i, (right, theirs, ours) in enumerate(zip(*results, strict=True)):
        assert relative(ours, right) <= 2 * relative(theirs, right) + eps, i


def test_core_gradcheck():
    module, size = attention(10), (3, 4)
    weights, biases = module.crpe.parameter_lists()
    mixed = torch.randn(3, 2, 12, 8, dtype=torch.float64, requires_grad=True)
    local = torch.randn(2, 12, 2, dtype=torch.float64, requires_grad=True)

    def core(mixed, local, *p):
        return ops.group_mix_attention(mixed, local, *size, list(p[:3]), list(p[3:]), 0.4)[0]

    assert torch.autograd.gradcheck(core, (mixed, local, *weights, *biases))


@pytest.mark.parametrize("offset", [-200.0, 0.0, 300.0])
def test_softmax_is_safe_for_large_keys(offset):
    """The running maximum keeps exp in range, whatever the order of the keys."""
    module, size = attention(40, torch.float32), (20, 21)
    weights, biases = module.crpe.parameter_lists()
    mixed = torch.randn(3, 1, 420, 32)
    mixed[1] = mixed[1] * 30 + offset + torch.linspace(-80, 80, 420)[:, None]
    out, log_sum, context = ops.group_mix_attention(
        mixed, torch.zeros(1, 420, 8), *size, weights, biases, 0.4
    )
    q, k, v = mixed.double().view(3, 1, 420, 8, 4).transpose(2, 3)
    expected = reference.group_mix_attention(
        q,
        k,
        v,
        torch.zeros(1, 420, 8).double(),
        size,
        [w.double() for w in weights],
        [b.double() for b in biases],
        0.4,
    )
    assert relative(out, expected) < 1e-5
    assert relative(log_sum, k.logsumexp(2).flatten(1)) < 1e-6
    assert relative(context, k.softmax(2).transpose(2, 3) @ v) < 1e-5


def test_published_names():
    names = set(GroupMixAttention(40, qkv_bias=True).state_dict())
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    expected = {f"{layer}.{p}" for layer in ("qkv", "proj") for p in ("weight", "bias")}
    expected |= {f"aggregator.norm{i}.{p}" for i in range(4) for p in norm}
    expected |= {f"aggregator.agg{i}.{c}.weight" for i in (1, 2, 3) for c in ("conv1", "pointwise_conv")}
    expected |= {f"aggregator.agg0.conv.{c}.weight" for c in ("conv1", "pointwise_conv")}
    expected |= {f"aggregator.agg0.norm.{p}" for p in ("weight", "bias")}
    expected |= {f"crpe.conv_list.{i}.{p}" for i in range(3) for p in ("weight", "bias")}
    assert names == expected
    block = set(GroupMixBlock(40, qkv_bias=True).state_dict())
    layers = ("cpe.proj", "norm1", "norm2", "mlp.fc1", "mlp.fc2")
    assert block == {f"att.{n}" for n in expected} | {f"{x}.{p}" for x in layers for p in ("weight", "bias")}


def test_signature_of_the_published_module():
    module = GroupMixAttention(40, 8, False, 0.25, 0.0, 0.1)
    assert module.qkv.bias is None and module.scale == 0.25 and module.proj_drop.p == 0.1
    assert GroupMixAttention(80).scale == 10**-0.5


def test_dropout():
    module = attention(40, torch.float32, training=True)
    x = torch.randn(2, 12, 40)
    plain = module(x, (3, 4))
    module.proj_drop.p = 0.5
    dropped = module(x, (3, 4))
    kept = dropped != 0
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(dropped[kept], 2 * plain[kept])
    module.proj_drop.p, module.attn_drop.p = 0.0, 0.5
    assert not torch.allclose(module(x, (3, 4)), plain)
    module.eval()
    once, again = module(x, (3, 4)), module(x, (3, 4))
    assert torch.equal(once, again)


def test_attention_maps_explain_the_output():
    """map @ v is the attention term that the forward pass computes without ever forming the map."""
    module, size = attention(40), (4, 5)
    x = torch.randn(2, 20, 40, dtype=torch.float64)
    maps = module.attention_maps(x, size, [0, 7, 19])
    assert maps.shape == (2, 8, 3, 4, 5)
    q, k, v, _ = module.aggregator(module.qkv(x), size)
    expected = module.scale * q @ (k.softmax(2).transpose(2, 3) @ v)
    torch.testing.assert_close(maps.flatten(3) @ v, expected[:, :, [0, 7, 19]])
    module.train()
    module.aggregator.norm1.eval()
    before = copy.deepcopy(module.state_dict())
    module.attention_maps(x, size, [0])
    assert module.aggregator.norm0.training and not module.aggregator.norm1.training
    assert all(torch.equal(before[n], t) for n, t in module.state_dict().items())
    with pytest.raises(ValueError, match="queries"):
        module.attention_maps(x, size, [20])


def test_attention_maps_of_a_block():
    block, size = GroupMixBlock(40, qkv_bias=True).double(), (4, 5)
    x = torch.randn(2, 20, 40, dtype=torch.float64)
    seen = []
    block.att.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    block(x, size)
    before = copy.deepcopy(block.state_dict())
    maps = block.attention_maps(x, size, [3, 11])
    torch.testing.assert_close(maps, block.att.attention_maps(seen[0], size, [3, 11]))
    assert maps.shape == (2, 8, 2, 4, 5) and not maps.requires_grad
    assert all(torch.equal(before[n], t) for n, t in block.state_dict().items())
    with pytest.raises(ValueError, match="size"):
        block.attention_maps(x, (4, 6), [0])


@pytest.mark.parametrize("dim,message", [(41, "multiple of 5"), (45, "divisible by 8"), (0, "positive")])
def test_dimensions(dim, message):
    with pytest.raises(ValueError, match=message):
        GroupMixAttention(dim)


def test_errors_of_forward():
    module = attention(40, torch.float32)
    with pytest.raises(ValueError, match="num_heads must be 8"):
        GroupMixAttention(40, num_heads=4)
    with pytest.raises(ValueError, match="size"):
        module(torch.zeros(1, 12, 40), (3, 5))
    with pytest.raises(ValueError, match="size must be two positive"):
        module(torch.zeros(1, 12, 40), (-3, -4))
    with pytest.raises(ValueError, match="40 channels"):
        module(torch.zeros(1, 12, 80), (3, 4))


def test_autocast_runs_the_kernels_in_bfloat16():
    module = attention(80, torch.float32, training=True)
    x = torch.randn(2, 49, 80, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as profile:
        out = module(x, (7, 7))
    assert out.dtype == torch.bfloat16
    assert {"lkconv::group_mix_mix", "lkconv::group_mix_attention"} <= {e.name for e in profile.events()}
    out.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())
    assert relative(out, unfused(module)(x.double(), (7, 7))) < 0.03
    q, *_ = lkconv_aggregate_under_autocast(module)
    assert q.dtype == torch.bfloat16


def lkconv_aggregate_under_autocast(module):
    with torch.autocast("cpu", torch.bfloat16):
        return module.aggregator(torch.randn(1, 49, 240), (7, 7))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [10, 50, 80, 200])
def test_scratch_of_earlier_calls_does_not_leak(dim, dtype):
    """Kernels reuse scratch: what a call with NaNs left there must not reach the next one."""
    module = attention(dim, dtype)
    x = torch.randn(1, 30, dim, dtype=dtype)
    outs = []
    for bad in (0.0, float("nan"), 0.0):
        leaf = (x + bad).requires_grad_()
        out = module(leaf, (5, 6))
        outs.append((out, *torch.autograd.grad(out.sum(), [leaf, module.aggregator.agg3.conv1.weight])))
    for a, b in zip(outs[0], outs[2], strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
