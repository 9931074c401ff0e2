"""``DepthwiseConv2d`` is an ``nn.Conv2d`` in everything but the kernel."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.testing import assert_close

import lkconv

TOLERANCE = dict(rtol=1e-10, atol=1e-11)


def twin(channels, kernel_size, multiplier=1, **kwargs):
    """The nn.Conv2d and the DepthwiseConv2d made from the same arguments and the same seed."""
    kwargs = {"dtype": torch.float64, **kwargs}
    torch.manual_seed(5)
    plain = nn.Conv2d(channels, channels * multiplier, kernel_size, groups=channels, **kwargs)
    torch.manual_seed(5)
    return plain, lkconv.DepthwiseConv2d(channels, kernel_size, channel_multiplier=multiplier, **kwargs)


GEOMETRIES = [
    dict(padding=2),
    dict(padding=(1, 3), stride=(2, 1)),
    dict(padding="valid", stride=2),
    dict(padding="same"),
    dict(padding="same", dilation=(2, 1)),
    dict(padding=(3, 2), dilation=2),
]


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_is_the_conv2d_of_the_same_arguments(geometry, multiplier, mode):
    for kernel_size, bias in (((5, 4), True), (3, False)):
        plain, layer = twin(3, kernel_size, multiplier, bias=bias, padding_mode=mode, **geometry)
        assert isinstance(layer, nn.Conv2d)
        ignored = {"_parameters", "_forward_hooks", "training"}
        assert {k: v for k, v in vars(layer).items() if k not in ignored} == {
            k: v for k, v in vars(plain).items() if k not in ignored
        }
        assert_close(dict(layer.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
        for size in ((2, 3, 12, 11), (3, 12, 11)):
            x = torch.randn(size, dtype=torch.float64, requires_grad=True)
            y, y_plain = layer(x), plain(x)
            assert_close(y, y_plain, **TOLERANCE)
            wanted = [x, layer.weight], [x, plain.weight]
            assert_close(
                torch.autograd.grad(y.square().sum(), wanted[0]),
                torch.autograd.grad(y_plain.square().sum(), wanted[1]),
                rtol=1e-9,
                atol=1e-9,
            )


def test_attributes():
    layer = lkconv.DepthwiseConv2d(6, 7, padding=3, channel_multiplier=2)
    assert (layer.in_channels, layer.out_channels, layer.groups, layer.channel_multiplier) == (6, 12, 6, 2)
    assert (layer.kernel_size, layer.stride, layer.padding, layer.dilation) == (
        (7, 7),
        (1, 1),
        (3, 3),
        (1, 1),
    )
    assert layer.weight.shape == (12, 1, 7, 7) and layer.bias.shape == (12,)
    assert lkconv.DepthwiseConv2d(6, 7, bias=False).bias is None


def test_repr():
    assert repr(lkconv.DepthwiseConv2d(6, 7)) == "DepthwiseConv2d(6, kernel_size=(7, 7))"
    layer = lkconv.DepthwiseConv2d(6, (7, 3), 2, 1, 3, False, "reflect", 2)
    assert repr(layer) == (
        "DepthwiseConv2d(6, kernel_size=(7, 3), stride=(2, 2), padding=(1, 1), dilation=(3, 3), bias=False, "
        "padding_mode=reflect, channel_multiplier=2)"
    )


def test_device_and_dtype():
    layer = lkconv.DepthwiseConv2d(4, 3, device="meta", dtype=torch.bfloat16)
    assert layer.weight.is_meta and layer.weight.dtype == torch.bfloat16
    layer = layer.to_empty(device="cpu")
    assert layer(torch.zeros(1, 4, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("clone", ["deepcopy", "pickle", "torch.save"])
def test_copies(clone):
    layer = lkconv.DepthwiseConv2d(4, 5, padding="same", padding_mode="circular", channel_multiplier=2)
    if clone == "deepcopy":
        other = copy.deepcopy(layer)
    elif clone == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    x = torch.randn(1, 4, 9, 9)
    assert type(other) is lkconv.DepthwiseConv2d and other.weight is not layer.weight
    assert torch.equal(other(x), layer(x))


def test_checkpoints_load_both_ways():
    plain, layer = twin(4, 5)
    other = nn.Conv2d(4, 4, 5, groups=4, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    layer.load_state_dict(nn.Conv2d(4, 4, 5, groups=4).state_dict())
    assert torch.equal(other.weight, plain.weight) and not torch.equal(layer.weight, plain.weight)


def test_batch_norm_fuser():
    layer = lkconv.DepthwiseConv2d(4, 5, padding=2, bias=False, dtype=torch.float64)
    norm = nn.BatchNorm2d(4, dtype=torch.float64)
    x = torch.randn(8, 4, 9, 9, dtype=torch.float64)
    nn.Sequential(layer, norm)(x)
    norm.eval()
    fused = fuse_conv_bn_eval(layer.eval(), norm)
    assert type(fused) is lkconv.DepthwiseConv2d and fused.bias is not None
    assert_close(fused(x), norm(layer(x)), **TOLERANCE)


def test_parametrizations_and_pruning():
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    for wrap in (parametrizations.weight_norm, parametrizations.spectral_norm):
        plain, layer = twin(4, 3)
        torch.manual_seed(1)
        plain = wrap(plain).eval()
        torch.manual_seed(1)
        layer = wrap(layer).eval()
        assert_close(layer(x), plain(x), **TOLERANCE)
        layer(x).sum().backward()
    plain, layer = twin(4, 3)
    for module in (plain, layer):
        prune.l1_unstructured(module, "weight", amount=0.5)
    assert_close(layer(x), plain(x), **TOLERANCE)
    assert (layer.weight == 0).sum() == 18


def test_hooks_run():
    layer = lkconv.DepthwiseConv2d(2, 3)
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    layer.register_full_backward_hook(lambda module, gi, go: seen.append("backward"))
    layer(torch.randn(1, 2, 5, 5, requires_grad=True)).sum().backward()
    assert seen == [(1, 2, 3, 3), "backward"]


@pytest.mark.parametrize(
    "memory_format, grad", itertools.product((torch.contiguous_format, torch.channels_last), (True, False))
)
def test_memory_format_is_kept(memory_format, grad):
    layer = lkconv.DepthwiseConv2d(4, 5, padding=2).to(memory_format=memory_format)
    x = torch.randn(2, 4, 8, 8).to(memory_format=memory_format).requires_grad_(grad)
    assert layer(x).is_contiguous(memory_format=memory_format)


def test_trains():
    torch.manual_seed(0)
    target = nn.Conv2d(3, 3, 5, padding=2, groups=3)
    layer = lkconv.DepthwiseConv2d(3, 5, padding=2)
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    x = torch.randn(8, 3, 10, 10)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(x), target(x).detach()).backward()
        optimizer.step()
    assert_close(layer.weight, target.weight, rtol=0.02, atol=0.01)
