"""Every user error is a ValueError or TypeError that names the argument, what was expected and what came."""

import pytest
import torch
from torch.autograd.function import once_differentiable

import lkconv
from processes import ROOT

X = torch.zeros(2, 4, 9, 8)
W = torch.zeros(8, 1, 3, 5)
B = torch.zeros(8)

CASES = {
    "input type": (TypeError, "input must be a Tensor; got list", dict(input=[1.0])),
    "weight type": (TypeError, "weight must be a Tensor; got NoneType", dict(weight=None)),
    "bias type": (TypeError, "bias must be a Tensor; got float", dict(bias=1.0)),
    "input rank": (ValueError, r"input must be .*; got shape \(4, 9\)", dict(input=X[0, :, :, 0])),
    "input 5-D": (ValueError, r"input must be .*; got shape \(1, 2, 4", dict(input=X[None])),
    "weight rank": (ValueError, r"weight must be .*; got shape \(8, 3, 5\)", dict(weight=W[:, 0])),
    "weight dtype": (
        TypeError,
        "weight must have input's dtype torch.float32; got .*64",
        dict(weight=W.double()),
    ),
    "bias dtype": (
        TypeError,
        "bias must have input's dtype torch.float32; got .*bfloat16",
        dict(bias=B.bfloat16()),
    ),
    "bool input": (
        TypeError,
        "input must be float64, .*; got torch.bool",
        dict(input=X.bool(), weight=W.bool()),
    ),
    "float8": (TypeError, "input must be float64, .*float8", dict(input=X.to(torch.float8_e4m3fn))),
    "weight device": (
        ValueError,
        "weight must be on input's device cpu; got meta",
        dict(weight=W.to("meta")),
    ),
    "bias device": (ValueError, "bias must be on input's device cpu; got meta", dict(bias=B.to("meta"))),
    "no channels": (ValueError, "input must have at least one channel", dict(input=X[:, :0], weight=W[:0])),
    "channel mismatch": (
        ValueError,
        r"weight must be .* C = 3.*; got shape \(8, 1, 3, 5\)",
        dict(input=X[:, :3]),
    ),
    "fewer outputs": (ValueError, r"weight must be .* C = 4", dict(weight=W[:3])),
    "no outputs": (ValueError, r"weight must be .* C = 4", dict(weight=W[:0])),
    "not depthwise": (ValueError, r"weight must be .*\(8, 2, 3, 5\)", dict(weight=W.expand(8, 2, 3, 5))),
    "empty kernel": (ValueError, "weight must have a positive kernel size", dict(weight=W[:, :, :0])),
    "empty image": (
        ValueError,
        "input must have positive height and width",
        dict(input=X[:, :, :0], padding=3),
    ),
    "empty image same": (ValueError, "input must have positive", dict(input=X[:, :, :0], padding="same")),
    "empty unbatched": (ValueError, "input must have positive", dict(input=X[0, :, :0], padding=3)),
    "bias size": (ValueError, r"bias must have shape \(8,\).*; got \(7,\)", dict(bias=B[:7])),
    "bias rank": (ValueError, r"bias must have shape \(8,\).*; got \(8, 1\)", dict(bias=B[:, None])),
    "empty output": (
        ValueError,
        r"kernel \(3, 5\).*input \(2, 8\).*padding \(0, 0\)",
        dict(input=X[:, :, :2]),
    ),
    "empty dilated": (ValueError, r"dilation \(1, 2\).*leave no output", dict(dilation=(1, 2))),
    "stride 0": (ValueError, "stride must be .* at least 1; got 0", dict(stride=0)),
    "stride pair": (ValueError, r"stride must be .*; got \(1, -1\)", dict(stride=(1, -1))),
    "stride triple": (ValueError, "stride must be an int or a pair", dict(stride=(1, 1, 1))),
    "stride empty": (ValueError, "stride must be an int or a pair", dict(stride=())),
    "stride float": (TypeError, r"stride must be .*; got 1.0 \(float\)", dict(stride=1.0)),
    "stride bool": (TypeError, r"stride must be .*; got True \(a bool\)", dict(stride=True)),
    "stride bool tensor": (TypeError, "a bool", dict(stride=torch.tensor(True))),
    "stride None": (TypeError, "stride must be .*; got None", dict(stride=None)),
    "stride string": (TypeError, "stride must be .*; got 'same'", dict(stride="same")),
    "dilation 0": (ValueError, "dilation must be .* at least 1; got 0", dict(dilation=0)),
    "dilation float": (TypeError, r"dilation must be .*; got \(1, 2.0\)", dict(dilation=(1, 2.0))),
    "padding negative": (ValueError, "padding must be .* at least 0; got -1", dict(padding=-1)),
    "padding beyond 64 bits": (
        ValueError,
        r"padding must be at most 2\*\*60; got \(1, 4611686018427387904\)",
        dict(padding=(1, 2**62)),
    ),
    "padding wraps": (ValueError, "padding must be at most", dict(padding=2**63 - 1)),
    "padding bool": (TypeError, r"padding must be .*\(a bool\)", dict(padding=(False, 1))),
    "padding word": (ValueError, "padding must be .* 'same' or 'valid'; got 'full'", dict(padding="full")),
    "same strided": (
        ValueError,
        r"padding='same' needs stride 1; got stride \(2, 1\)",
        dict(padding="same", stride=(2, 1)),
    ),
}


@pytest.mark.parametrize("function", [lkconv.depthwise_conv2d, lkconv.explain], ids=["conv", "explain"])
@pytest.mark.parametrize("case", CASES)
def test_message(case, function):
    error, message, changed = CASES[case]
    with pytest.raises(error, match=message) as caught:
        function(**{"input": X, "weight": W, "bias": B, **changed})
    assert type(caught.value) is error


def test_valid_arguments_pass():
    assert lkconv.depthwise_conv2d(X, W, B).shape == (2, 8, 7, 4)


def test_autocast_does_not_hide_a_float64_mismatch():
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match="weight must have input's dtype"),
    ):
        lkconv.depthwise_conv2d(X, W.double())


MODULE_CASES = {
    "channels type": (TypeError, "channels must be an int; got 4.0", (4.0, 3), {}),
    "channels bool": (TypeError, "channels must be an int; got True", (True, 3), {}),
    "channels 0": (ValueError, "channels must be at least 1; got 0", (0, 3), {}),
    "multiplier 0": (ValueError, "channel_multiplier must be at least 1", (4, 3), dict(channel_multiplier=0)),
    "kernel 0": (ValueError, "kernel_size must be .* at least 1; got 0", (4, 0), {}),
    "kernel triple": (ValueError, "kernel_size must be", (4, (3, 3, 3)), {}),
    "kernel float": (TypeError, "kernel_size must be", (4, 3.0), {}),
    "stride 0": (ValueError, "stride must be", (4, 3, 0), {}),
    "padding": (ValueError, "padding must be", (4, 3, 1, -1), {}),
    "padding word": (ValueError, "[Pp]adding", (4, 3, 1, "full"), {}),
    "same strided": (ValueError, "padding='same'", (4, 3, 2, "same"), {}),
    "dilation": (TypeError, "dilation must be", (4, 3, 1, 0, 1.5), {}),
    "padding mode": (ValueError, "padding_mode", (4, 3), dict(padding_mode="wrap")),
}


@pytest.mark.parametrize("case", MODULE_CASES)
def test_module_message(case):
    error, message, args, kwargs = MODULE_CASES[case]
    with pytest.raises(error, match=message):
        lkconv.DepthwiseConv2d(*args, **kwargs)


def test_module_call_with_wrong_channels():
    with pytest.raises(ValueError, match=r"weight must be .* C = 5"):
        lkconv.DepthwiseConv2d(4, 3)(torch.zeros(1, 5, 8, 8))


# --- memory -----------------------------------------------------------------------------------------------

ENORMOUS = 1 << 22  # as padding of one pixel: an output of 2^48 bytes, more than there are addresses


def enormous(pixel):
    return lkconv.depthwise_conv2d(pixel, torch.ones(1, 1, 1, 1), padding=ENORMOUS)


class EnormousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pixel):
        return pixel.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return enormous(grad)


@pytest.fixture
def full(monkeypatch):
    """A full GPU, as far as Python can tell: torch.empty runs out of memory."""
    asked = []

    def empty(sizes, **options):
        asked.append((tuple(sizes), options))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 TiB.")

    monkeypatch.setattr(torch, "empty", empty)
    return asked


def test_a_failed_allocation_is_torchs_own_error():
    with pytest.raises(RuntimeError, match="281475043819524 bytes") as ours:
        enormous(torch.ones(1, 1, 1, 1))
    with pytest.raises(RuntimeError) as torchs:
        torch.empty(1, 1, 2 * ENORMOUS + 1, 2 * ENORMOUS + 1)
    assert type(ours.value) is type(torchs.value) and str(ours.value) == str(torchs.value)


def test_out_of_memory_keeps_its_type_and_message(full):
    """The kernels' C++ asks for memory through the stable ABI, which loses both."""
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory. Tried to allocate 256.00 TiB.$"):
        enormous(torch.ones(1, 1, 1, 1))
    side = 2 * ENORMOUS + 1
    assert full == [((1, 1, side, side), {"dtype": torch.float32, "device": "cpu"})]


def test_out_of_memory_keeps_its_type_in_a_backward_pass(full):
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        EnormousGradient.apply(torch.ones(1, 1, 1, 1, requires_grad=True)).sum().backward()


def test_out_of_memory_keeps_its_type_under_vmap_and_in_recorded_calls(full):
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        torch.vmap(enormous)(torch.ones(2, 1, 1, 1, 1))
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        enormous(torch.ones(1, 1, 1, 1, requires_grad=True))


def test_memory_that_was_freed_meanwhile_serves(monkeypatch):
    """Where torch.empty finds memory, the call is tried once more, and fails for what it really lacks."""
    asked = []
    monkeypatch.setattr(torch, "empty", lambda *args, **options: asked.append(args))
    with pytest.raises(RuntimeError):
        enormous(torch.ones(1, 1, 1, 1))
    assert len(asked) == 1


def test_every_allocation_keeps_torchs_error():
    """New tensors come from allocation.h alone, on CPUs and GPUs."""
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    direct = {p.name for p in files if "stable::empty" in p.read_text()}
    assert direct == {"allocation.h"}
