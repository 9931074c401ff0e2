"""Group-Mix modules whose submodules were hooked, replaced or parametrised: what a user did must run."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import lkconv
from group_mix_cases import attention, fused_ops, relative
from lkconv.attention.modules import PositionEncoding

SIZE = (5, 3)
CONVOLVED = ["agg1.conv1", "agg2.pointwise_conv", "agg3.conv1", "agg0.conv.conv1", "agg0.conv.pointwise_conv"]
HOOKED = [*CONVOLVED, "agg1", "agg0", "agg0.conv", "agg0.norm", "norm0", "norm3"]
CORE = ["crpe", "crpe.conv_list.0", "crpe.conv_list.2", "attn_drop"]


def inputs(training=False):
    return attention(40, training=training), torch.randn(2, 15, 40, dtype=torch.float64)


@pytest.mark.parametrize("name", [*(f"aggregator.{n}" for n in HOOKED), *CORE, "aggregator", "qkv", "proj"])
@pytest.mark.parametrize("kind", ["pre", "post", "backward"])
def test_hooks_run(name, kind):
    """A hook on any submodule is called as often as without fused kernels, and what it returns is used."""
    module, x = inputs()
    calls = []
    target = module.get_submodule(name)
    if kind == "pre":
        target.register_forward_pre_hook(lambda m, args: calls.append(0) or (args[0] * 1.5, *args[1:]))
    elif kind == "post":
        target.register_forward_hook(
            lambda m, args, out: (
                calls.append(0) or (out * 1.5 if torch.is_tensor(out) else tuple(t * 1.5 for t in out))
            )
        )
    else:
        target.register_full_backward_hook(lambda m, grad_in, grad_out: calls.append(0))
    x.requires_grad_()
    out = module(x, SIZE)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    count = len(calls)
    with lkconv.use_backend("torch"):
        expected = module(x, SIZE)
        (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    assert count == 1 and len(calls) == 2
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("name", [*(f"aggregator.{n}" for n in CONVOLVED), "crpe.conv_list.1"])
def test_pruned_and_normalised_weights(name):
    """Both are forward pre-hooks that write the weight which the call then reads."""
    module, x = inputs()
    prune.random_unstructured(module.get_submodule(name), "weight", 0.5)
    with torch.no_grad():
        module.get_submodule(name).weight_orig.mul_(3)
    out = module(x, SIZE)
    with lkconv.use_backend("torch"):
        torch.testing.assert_close(out, module(x, SIZE))
    module, x = inputs()
    with pytest.warns(FutureWarning, match="deprecated"):
        nn.utils.weight_norm(module.get_submodule(name))
    with torch.no_grad():
        module.get_submodule(name).weight_g.mul_(2)
    out = module(x, SIZE)
    with lkconv.use_backend("torch"):
        torch.testing.assert_close(out, module(x, SIZE))


def test_parametrised_weights_stay_fused():
    """Parametrisations show in the parameter itself: the kernels take what it is now."""
    module, x = inputs()
    for name in ("aggregator.agg2.conv1", "aggregator.agg0.conv.pointwise_conv", "crpe.conv_list.2"):
        parametrizations.weight_norm(module.get_submodule(name))
        with torch.no_grad():
            module.get_submodule(name).parametrizations.weight.original0.mul_(2)
    assert fused_ops(module, x, SIZE) == {"group_mix_aggregate", "group_mix_attention"}
    out = module(x, SIZE)
    with lkconv.use_backend("torch"):
        torch.testing.assert_close(out, module(x, SIZE))


def test_converted_convolutions_stay_fused():
    module, x = inputs()
    converted = lkconv.convert(module)
    assert isinstance(converted.aggregator.agg3.conv1, lkconv.DepthwiseConv2d)
    assert fused_ops(converted, x, SIZE) == {"group_mix_aggregate", "group_mix_attention"}
    torch.testing.assert_close(converted(x, SIZE), module(x, SIZE))


def dilated(channels):
    return nn.Conv2d(channels, channels, 3, padding=2, dilation=2, groups=channels, bias=False)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


REPLACEMENTS = {
    "another geometry": ("aggregator.agg1.conv1", lambda: dilated(8)),
    "another window": (
        "aggregator.agg1.conv1",
        lambda: nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False),
    ),
    "a bias": ("aggregator.agg2.pointwise_conv", lambda: nn.Conv2d(8, 8, 1)),
    "a subclass": ("aggregator.agg2.pointwise_conv", lambda: Doubled(8, 8, 1, bias=False)),
    "another module": ("aggregator.agg3", lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GELU())),
    "an identity": ("aggregator.agg0.norm", nn.Identity),
    "a norm without parameters": (
        "aggregator.agg0.norm",
        lambda: nn.LayerNorm(8, elementwise_affine=False),
    ),
    "a position encoding without bias": (
        "crpe.conv_list.0",
        lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
    ),
    "a dilated position encoding": ("crpe.conv_list.1", lambda: dilated(12)),
    "no dropout": ("attn_drop", nn.Identity),
}


@pytest.mark.parametrize("what", REPLACEMENTS)
@pytest.mark.parametrize("training", [False, True])
def test_replaced_submodules_run(what, training):
    module, x = inputs(training)
    name, make = REPLACEMENTS[what]
    module.set_submodule(name, make().double().train(training))
    other = copy.deepcopy(module)
    out = module(x, SIZE)
    with lkconv.use_backend("torch"):
        expected = other(x, SIZE)
    assert relative(out, expected) < 1e-12
    for a, b in zip(module.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_forward_set_on_an_instance_runs():
    """As libraries that move or quantise modules do."""
    module, x = inputs()
    plain = module(x, SIZE)
    conv = module.aggregator.agg1.conv1
    before = conv.forward
    conv.forward = lambda t: 2 * before(t)
    other = module(x, SIZE)
    assert not torch.allclose(plain, other)
    with lkconv.use_backend("torch"):
        torch.testing.assert_close(other, module(x, SIZE))


def test_the_rest_stays_fused():
    """A hook in the position encoding leaves the aggregation to its kernel."""
    module, x = inputs()
    assert fused_ops(module, x, SIZE) == {"group_mix_aggregate", "group_mix_attention"}
    module.crpe.conv_list[0].register_forward_hook(lambda *_: None)
    assert fused_ops(module, x, SIZE) == {"group_mix_aggregate"}
    module.aggregator.norm2.register_forward_hook(lambda *_: None)
    assert fused_ops(module, x, SIZE) == set()


def test_hooks_inside_a_compiled_module():
    module, x = inputs()
    module.aggregator.agg1.conv1.register_forward_hook(lambda m, args, out: out * 2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, SIZE), module(x, SIZE))


def test_position_encoding_as_a_module():
    crpe = PositionEncoding(4).double()
    q, v = torch.randn(2, 2, 8, 15, 4, dtype=torch.float64)
    image = v.transpose(2, 3).reshape(2, 32, *SIZE)
    parts = [c(t) for c, t in zip(crpe.conv_list, image.split([8, 12, 12], 1), strict=True)]
    expected = q * torch.cat(parts, 1).reshape(2, 8, 4, 15).transpose(2, 3)
    torch.testing.assert_close(crpe(q, v, SIZE), expected)
