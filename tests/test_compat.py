"""The old extension's names, reached the way the code written against it reaches them."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lkconv
from lkconv.compat import directory


@pytest.fixture
def module(monkeypatch):
    monkeypatch.setenv("LARGE_KERNEL_CONV_IMPL", directory())
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.path.append(os.environ["LARGE_KERNEL_CONV_IMPL"])
    return importlib.import_module("depthwise_conv2d_implicit_gemm")


def test_command_prints_the_directory():
    done = subprocess.run(
        [sys.executable, "-m", "lkconv.compat"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout == directory() + "\n"
    assert os.path.isfile(os.path.join(done.stdout.strip(), "depthwise_conv2d_implicit_gemm.py"))


def test_directory_on_python_path():
    code = (
        "from depthwise_conv2d_implicit_gemm import DepthWiseConv2dImplicitGEMM as D; print(D(4, 7).padding)"
    )
    path = os.pathsep.join([directory(), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.stdout == "(3, 3)\n", done.stderr


@pytest.mark.parametrize("kernel", [3, 31, (5, 51), (4, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_keeps_the_size(module, kernel, bias):
    layer = module.DepthWiseConv2dImplicitGEMM(4, kernel, bias=bias).double()
    assert isinstance(layer, nn.Conv2d) and set(layer.state_dict()) == (
        {"weight", "bias"} if bias else {"weight"}
    )
    x = torch.randn(2, 4, 13, 12, dtype=torch.float64)
    expected = F.conv2d(x, layer.weight, layer.bias, 1, layer.padding, 1, 4)[..., :13, :12]
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def test_padding_is_true_so_that_merging_by_attributes_works(module):
    origin = module.DepthWiseConv2dImplicitGEMM(4, 13, bias=False)
    assert origin.padding == (6, 6) and origin.stride == (1, 1) and origin.dilation == (1, 1)
    # What the official merge does: a new convolution made from the attributes, and the weights added.
    merged = nn.Conv2d(
        origin.in_channels,
        origin.out_channels,
        origin.kernel_size,
        origin.stride,
        origin.padding,
        origin.dilation,
        origin.groups,
    )
    small = nn.Conv2d(4, 4, 5, padding=2, groups=4)
    merged.weight.data = origin.weight.data + F.pad(small.weight.data, [4] * 4)
    merged.bias.data = small.bias.data
    x = torch.randn(1, 4, 16, 16)
    torch.testing.assert_close(merged(x), origin(x) + small(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, dtype", [("FP32", torch.float32), ("FP16", torch.float16)])
def test_autograd_functions(module, name, dtype):
    function = getattr(module, f"_DepthWiseConv2dImplicitGEMM{name}")
    x = torch.randn(2, 4, 10, 9, dtype=dtype, requires_grad=True)
    w = torch.randn(4, 1, 5, 5, requires_grad=True)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function.apply(x, w)
        assert y.dtype == dtype and y.shape == x.shape
        expected = lkconv.depthwise_conv2d(x, w.to(dtype), padding=2)
        assert torch.equal(y, expected)
        dx, dw = torch.autograd.grad(y.sum(), (x, w))
        assert dx.dtype == dtype and dw.dtype == torch.float32


def test_layer_takes_bfloat16_channels_last_and_compile(module):
    layer = module.DepthWiseConv2dImplicitGEMM(4, 7).bfloat16()
    x = torch.randn(2, 4, 9, 9, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    y = layer(x)
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), y)
