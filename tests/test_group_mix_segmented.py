"""segmented_depthwise_conv2d against one F.conv2d per segment."""

import pytest
import torch

import lkconv
from bench import measure, segmented
from lkconv import reference


def inception_weights(gate=6, dtype=torch.float64):
    """The splits of InceptionNeXt: identity, 3 x 3, 1 x 11, 11 x 1."""
    kernels = [(3, 3), (1, 11), (11, 1)]
    weights = [torch.randn(gate, 1, *k, dtype=dtype, requires_grad=True) for k in kernels]
    return [None, *weights], [None, *(torch.randn(gate, dtype=dtype, requires_grad=True) for _ in kernels)]


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_equals_reference(format):
    weights, biases = inception_weights()
    x = torch.randn(2, 40, 9, 13, dtype=torch.float64).to(memory_format=format).requires_grad_()
    leaves = [x, *weights[1:], *biases[1:]]
    results = []
    for function in (lkconv.segmented_depthwise_conv2d, reference.segmented_depthwise_conv2d):
        out = function(x, weights, biases)
        results.append(
            (
                out,
                torch.autograd.grad((out * torch.linspace(0, 1, out.numel()).view(out.shape)).sum(), leaves),
            )
        )
    (out, grads), (expected, expected_grads) = results
    torch.testing.assert_close(out, expected)
    assert torch.equal(out[:, :22], x[:, :22])
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b)


def test_runs_one_depthwise_op_per_segment_without_copying_the_input():
    weights, biases = inception_weights(dtype=torch.float32)
    x = torch.randn(2, 40, 9, 13)
    with torch.no_grad(), torch.profiler.profile() as profile:
        lkconv.segmented_depthwise_conv2d(x, weights, biases)
    names = [e.name for e in profile.events()]
    assert names.count("lkconv::depthwise_conv2d") == 3
    assert not {"aten::contiguous", "aten::clone", "aten::copy_"} & set(names)


@pytest.mark.parametrize("mode", segmented.MODES)
def test_benchmark_of_a_mixer(mode):
    """The four stages of InceptionNeXt-T; one is measured, in both layouts of both sides."""
    assert [(c, side, len(w)) for c, side, w in segmented.mixers().values()] == [
        (96, 56, 3), (192, 28, 3), (384, 14, 3), (768, 7, 3),
    ]  # fmt: skip
    name = list(segmented.mixers())[3]
    rows = segmented.measure_mixer(name, 1, "float32", mode, "cpu", measure.Budget(seconds=0.01, turns=1))
    assert len(rows) == 4 and all(r["median"] and r["error"] < 1e-5 for r in rows)
    assert "x" in segmented.show(rows)


def test_explicit_splits_with_two_identities():
    w = torch.randn(4, 1, 5, 5)
    x = torch.randn(1, 10, 6, 6)
    out = lkconv.segmented_depthwise_conv2d(x, [None, w, None], splits=[3, 4, 3])
    expected = torch.nn.functional.conv2d(x[:, 3:7], w, padding=2, groups=4)
    torch.testing.assert_close(out, torch.cat([x[:, :3], expected, x[:, 7:]], 1))


@pytest.mark.parametrize(
    "weights,biases,splits,message",
    [
        ([None, None], None, None, "splits must be given"),
        ([torch.zeros(4, 1, 3, 3)], None, None, "sum to"),
        ([None, torch.zeros(4, 1, 3, 3)], [None], None, "biases must have"),
        ([None, torch.zeros(4, 1, 4, 3)], None, None, "odd"),
        ([None, torch.zeros(4, 2, 3, 3)], None, None, "weights\\[1\\] must be"),
        ([None, torch.zeros(4, 1, 3, 3)], [torch.zeros(6), None], None, "biases\\[0\\] must be None"),
        ([None, torch.zeros(4, 1, 3, 3)], [None, torch.zeros(3)], None, "biases\\[1\\]"),
        ([None, torch.zeros(4, 1, 3, 3)], None, [5, 5], "weights\\[1\\] must be"),
    ],
)
def test_errors(weights, biases, splits, message):
    with pytest.raises(ValueError, match=message):
        lkconv.segmented_depthwise_conv2d(torch.zeros(1, 10, 4, 4), weights, biases, splits)
