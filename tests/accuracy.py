"""How accurate a kernel must be: float64 is the oracle, PyTorch in the same dtype the yardstick.

The limits are stated once, here, and hold for every backend:

* float64: relative error (norm) at most 1e-13;
* float32: at most ``1e-6 * sqrt(taps)``, and at most twice the error of PyTorch plus one rounding;
* float16 and bfloat16: at most twice the error of PyTorch plus one float32 rounding.
"""

import warnings

import torch

import lkconv._C  # noqa: F401 - registers the ops
from cases import Case, Tensors, conv

PASSES = ("forward", "backward_input", "backward_weight")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def torch_result(pass_name: str, case: Case, t: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """What PyTorch computes in `dtype` from contiguous copies of the tensors.

    In float16 by its own kernel: oneDNN has one only for processors with AVX512-FP16, and there its code
    generator does not come back for some kernel sizes (16x20 is one).
    """
    if dtype != torch.float16:
        return _torch_result(pass_name, case, t, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the switch speaks of TF32 on other devices
        with torch.backends.mkldnn.flags(enabled=False):
            return _torch_result(pass_name, case, t, dtype)


def _torch_result(pass_name: str, case: Case, t: Tensors, dtype: torch.dtype) -> torch.Tensor:
    x, weight, grad = (v.to(dtype).contiguous() for v in (t.input, t.weight, t.grad_output))
    if pass_name == "forward":
        return conv(x, weight, None if t.bias is None else t.bias.to(dtype), case)
    mask = [pass_name == "backward_input", pass_name == "backward_weight", False]
    result = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *case.geometry, False, [0, 0], case.channels, mask
    )
    return result[0] if mask[0] else result[1]


def op_result(pass_name: str, case: Case, t: Tensors) -> torch.Tensor:
    """What the op under test computes."""
    ops = torch.ops.lkconv
    if pass_name == "forward":
        return ops.depthwise_conv2d(t.input, t.weight, t.bias, *case.geometry)
    if pass_name == "backward_input":
        return ops.depthwise_conv2d_backward_input(t.grad_output, t.weight, list(case.size), *case.geometry)
    return ops.depthwise_conv2d_backward_weight(t.grad_output, t.input, list(case.kernel), *case.geometry)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of `expected`; NaN in `actual` gives NaN."""
    difference = (actual.double() - expected).norm()
    norm = expected.norm()
    return float(difference / norm) if norm > 0 else float(difference)


def largest_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    if expected.numel() == 0:
        return 0.0
    return float((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


def limit_for(dtype: torch.dtype, taps: int, torch_error: float) -> float:
    if dtype == torch.float64:
        return 1e-13
    twice = 2 * torch_error + torch.finfo(torch.float32).eps
    return min(1e-6 * taps**0.5, twice) if dtype == torch.float32 else twice


def check(pass_name: str, case: Case, *samples: Tensors) -> None:
    """Runs the op under test on every sample and judges the error of all results together.

    One sample says enough where results are many. Where they are few, PyTorch's error on one sample is a
    matter of luck (a handful of roundings may all come out exact), and several samples make a yardstick.
    """
    ours, theirs, exact = [], [], []
    dtype = samples[0].input.dtype
    for t in samples:
        expected = torch_result(pass_name, case, t, torch.float64)
        actual = op_result(pass_name, case, t)
        assert actual.shape == expected.shape and actual.dtype == dtype
        ours.append(actual.flatten())
        theirs.append(torch_result(pass_name, case, t, dtype).flatten())
        exact.append(expected.flatten())
    actual, reference, expected = torch.cat(ours), torch.cat(theirs), torch.cat(exact)
    measures = [relative_error]
    if dtype in (torch.float16, torch.bfloat16):
        # The norm hides one wrong element among many rounded ones; the largest error does not.
        measures.append(largest_error)
    for measure in measures:
        error, torch_error = measure(actual, expected), measure(reference, expected)
        limit = limit_for(dtype, case.taps, torch_error)
        # Not "error > limit": a NaN must fail.
        assert error <= limit, (
            f"{pass_name} {case} {dtype}: {measure.__name__} {error:.3g}, limit {limit:.3g}, "
            f"PyTorch {torch_error:.3g}"
        )
