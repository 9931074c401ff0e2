"""``convert``: which layers change, and that nothing else does."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lkconv


class Special(nn.Conv2d):
    """A subclass, whose behaviour only its author knows."""


def model():
    shared = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    return nn.ModuleDict(
        {
            "dense": nn.Conv2d(3, 4, 3, padding=1),
            "depthwise": nn.Conv2d(4, 8, (7, 5), 1, (3, 2), groups=4, padding_mode="reflect", bias=False),
            "grouped": nn.Conv2d(8, 4, 3, padding=1, groups=4),
            "single": nn.Conv2d(1, 4, 3, groups=1),
            "special": Special(4, 4, 3, groups=4),
            "nested": nn.Sequential(shared, nn.Sequential(nn.ReLU(), shared)),
            "transposed": nn.ConvTranspose2d(4, 4, 3, groups=4),
        }
    )


def run(m, x):
    return m["nested"](m["grouped"](m["depthwise"](m["dense"](x))))


CONVERTED = {"depthwise", "nested.0"}  # nested.1.1 is nested.0


@pytest.mark.parametrize("inplace", [True, False])
def test_exactly_the_depthwise_layers_change(inplace):
    original = model().double().eval()
    x = torch.randn(2, 3, 12, 10, dtype=torch.float64)
    expected = run(original, x)
    types = {n: type(m) for n, m in original.named_modules()}
    converted = lkconv.convert(original, inplace=inplace)
    assert (converted is original) == inplace
    now = {n: type(m) for n, m in converted.named_modules()}
    assert {n for n in types if types[n] is not now[n]} == CONVERTED
    assert all(now[n] is lkconv.DepthwiseConv2d for n in CONVERTED)
    assert_close(run(converted, x), expected, rtol=1e-10, atol=1e-10)
    if not inplace:
        assert {n: type(m) for n, m in original.named_modules()} == types
        assert not {id(p) for p in original.parameters()} & {id(p) for p in converted.parameters()}


def test_state_mode_sharing_and_settings_stay():
    original = model()
    original["depthwise"].requires_grad_(False).half()
    original["nested"].eval()
    state = copy.deepcopy(original.state_dict())
    parameters = list(original.parameters())
    converted = lkconv.convert(original, inplace=True)
    assert all(p is q for p, q in zip(converted.parameters(), parameters, strict=True))
    assert_close(dict(converted.state_dict()), dict(state), rtol=0, atol=0)
    layer = converted["depthwise"]
    assert (layer.padding_mode, layer.channel_multiplier, layer.padding) == ("reflect", 2, (3, 2))
    assert layer.weight.dtype == torch.float16 and not layer.weight.requires_grad and layer.bias is None
    assert layer.training and not converted["nested"][0].training
    copied = lkconv.convert(model())
    assert copied["nested"][0] is copied["nested"][1][1]


@pytest.mark.parametrize("inplace", [True, False])
def test_root_is_a_convolution(inplace):
    root = nn.Conv2d(4, 4, 3, groups=4)
    converted = lkconv.convert(root, inplace=inplace)
    assert type(converted) is lkconv.DepthwiseConv2d
    assert (converted is root) == inplace
    x = torch.randn(1, 4, 6, 6)
    assert_close(converted(x), nn.Conv2d._conv_forward(root, x, root.weight, root.bias))


def test_hooks_stay():
    layer = nn.Conv2d(2, 2, 3, groups=2)
    seen = []
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    lkconv.convert(layer)(torch.randn(1, 2, 4, 4))
    assert seen == ["before", "forward"]


def test_converting_again_changes_nothing():
    once = lkconv.convert(model())
    types = [type(m) for m in once.modules()]
    assert [type(m) for m in lkconv.convert(once, inplace=True).modules()] == types


def test_parametrized_layer_stays():
    # parametrize gives the layer a class of its own, so it is no longer exactly nn.Conv2d.
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, groups=4))
    assert type(lkconv.convert(layer, inplace=True)) is not lkconv.DepthwiseConv2d


def test_optimizer_and_references_see_the_converted_layer():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    held = net[0]
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    lkconv.convert(net, inplace=True)
    before = net[0].weight.clone()
    net(torch.randn(2, 4, 6, 6)).square().sum().backward()
    optimizer.step()
    assert held is net[0] and type(held) is lkconv.DepthwiseConv2d and not torch.equal(before, held.weight)


@pytest.mark.parametrize("value", [None, torch.zeros(1), nn.Conv2d])
def test_not_a_module(value):
    with pytest.raises(TypeError, match=r"model must be an nn\.Module; got"):
        lkconv.convert(value)
