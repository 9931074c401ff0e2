"""Both of torch's switches decide whether float32 convolutions may use tf32, in CUDA and in Triton."""

import pytest
import torch

from lkconv import backends
from triton_support import kernels

GPU = torch.device("cuda:0")


def by_cuda():
    module, reason = backends.cuda_module()
    return module.allows_tf32() if module else pytest.skip(reason)


def by_triton():
    pytest.importorskip("triton")
    return kernels("keys").tf32_allowed(GPU)


@pytest.fixture(params=[by_cuda, by_triton], ids=["cuda", "triton"])
def allowed(request):
    return request.param


@pytest.fixture(autouse=True)
def switches():
    """The three levels of the newer switch, set to "none"; as they were afterwards."""
    levels = (torch.backends.cudnn.conv, torch.backends.cudnn, torch.backends)
    before = [level.fp32_precision for level in levels]
    for level in levels:
        level.fp32_precision = "none"
    yield
    for level, value in zip(levels, before, strict=True):
        level.fp32_precision = value


@pytest.mark.parametrize("value", [True, False])
def test_allow_tf32(allowed, value):
    torch.backends.cudnn.allow_tf32 = value
    assert allowed() is value


@pytest.mark.parametrize(
    ("conv", "cudnn", "everywhere", "expected"),
    [
        ("tf32", "none", "none", True),
        ("ieee", "none", "none", False),
        ("none", "none", "none", False),
        ("none", "tf32", "none", True),
        ("none", "none", "tf32", True),
        ("none", "none", "ieee", False),
        ("none", "ieee", "tf32", False),  # the nearer level decides
        ("tf32", "ieee", "ieee", True),
        ("ieee", "tf32", "tf32", False),
    ],
)
def test_fp32_precision(allowed, conv, cudnn, everywhere, expected):
    torch.backends.fp32_precision = everywhere
    torch.backends.cudnn.fp32_precision = cudnn
    torch.backends.cudnn.conv.fp32_precision = conv
    assert allowed() is expected


def test_the_switches_are_of_nvidia_gpus(monkeypatch):
    pytest.importorskip("triton")
    torch.backends.cudnn.allow_tf32 = True
    tf32_allowed = kernels("keys").tf32_allowed
    assert tf32_allowed(GPU)
    assert not tf32_allowed(torch.device("cpu")) and not tf32_allowed(torch.device("xpu"))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not tf32_allowed(GPU)
